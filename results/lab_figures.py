"""The lab's pictures, drawn from its records by results/report.py: what each part of a method is
worth, every claim's effect beside the published one, what views are worth over training
(lab_drops.py), and all methods (lab_methods.py).

A picture carries the digest of its numbers, as those of curves.py; without records there is none.
"""

import itertools
import statistics
from pathlib import Path
from typing import Any

from common.run import pictures
from results import curves, fixed, lab, lab_drops, lab_methods, tables
from results.claims import Runs
from results.joined import Joined
from slurm.plan import PROTOCOLS

PARTS, EFFECTS, MORE = "lab-parts.png", "lab-effects.png", "lab-secondary.png"
METHODS, SPECTRA, DROPS = "lab-methods.png", "lab-spectra.png", "lab-drops.png"
FRONT = (PARTS, EFFECTS)  # in the README of the project too
COMMAND = "python results/report.py"
# of the controls' lines, in the order of claims.yaml
DASHES = ("--", (0, (8, 2)), (0, (3, 4)), ":", "-.", (0, (1, 4)))
# the heading for each verdict, by the words that the verdict begins with
ORDER = {lab.SEEN: lab.SEEN, lab.REVERSED: lab.REVERSED, "smaller": "smaller than is of interest"}
ORDER |= {word: word for word in (lab.OPEN, lab.NOT_TESTABLE)}
OTHERS = {"rank": "effective rank", "std": "std·√D of the embedding"}
OTHERS |= {"feature_rank": "effective rank of the representation"}
OTHERS |= {"found_over_chance": "points of precision over chance"}
OTHERS |= {"purity_growth": "points of the look-ups' purity, last against first epoch"}
OTHERS |= {"auc_over_chance": "points of AUC of the positiveness over chance"}
OTHERS |= {"views": "views of an image until k-NN is 5 points above random"}


def shown(joined: Joined) -> list[dict[str, str]]:
    """Returns the pictures that there are numbers for, in the form of figures.yaml's entries."""
    captions = {PARTS: parts_caption, EFFECTS: effects_caption, MORE: secondary_caption}
    captions[METHODS] = lab_methods.accuracies_caption
    captions |= {SPECTRA: lab_methods.spectra_caption, DROPS: lab_drops.caption}
    return [
        {"file": name, "caption": captions[name](numbers), "command": COMMAND, "page": "claims.md"}
        for name, numbers in numbers_of(joined).items()
    ]


def numbers_of(joined: Joined) -> dict[str, dict[str, Any]]:
    """Returns all that each picture shows, by its file's name."""
    what = joined.claims.get("lab")
    if not what:
        return {}
    found = {PARTS: parts_of(what, joined.runs), EFFECTS: effects_of(what, joined.runs)}
    found[MORE] = secondary_of(what, joined.runs)
    if numbers := lab_drops.drops(what, joined.runs):
        found[DROPS] = numbers | {"title": scale(lab_drops.arms_of(what), joined.runs)}
    title = {"title": scale([of["run"] for of in what.get("methods", {}).values()], joined.runs)}
    for name, of in ((METHODS, lab_methods.accuracies), (SPECTRA, lab_methods.spectra)):
        if numbers := of(what, joined.runs):
            found[name] = numbers | title
    return {name: numbers for name, numbers in found.items() if numbers}


def stale(joined: Joined, folder: Path) -> dict[Path, dict[str, Any]]:
    """Returns the pictures that show other numbers than the records, with the records' own."""
    return {
        folder / name: numbers
        for name, numbers in numbers_of(joined).items()
        if not (folder / name).exists() or curves.shown_by(folder / name) != curves.digest(numbers)
    }


def draw(path: Path, numbers: dict[str, Any]) -> None:
    drawing = {PARTS: draw_parts, EFFECTS: draw_effects, MORE: draw_effects}
    drawing |= {METHODS: lab_methods.draw_accuracies, SPECTRA: lab_methods.draw_spectra}
    drawing[DROPS] = lab_drops.draw
    drawing[path.name](path, numbers)


def scale(arms: list[str], runs: Runs) -> str:
    """Says what the runs were trained on and for how long, as far as they have it in common."""
    ones = [one for arm in arms for _, one in fixed.records_of(runs, arm)]
    said = [{tables.data_cell(one["pretraining"], "dataset") for one in ones}]
    if len(said[0]) > 1:  # runs on parts of it: what they are parts of
        parts = [one["pretraining"] | {"incomplete": None} for one in ones]
        said = [{tables.data_cell(part, "dataset") for part in parts}]
    said.append({one["arch"] for one in ones})
    for name, unit in (("batch", "batch {}"), ("epochs", "{} epochs")):
        said.append({unit.format(f"{one['pretraining'][name]:g}") for one in ones})
    return ", ".join(min(values) for values in said if len(values) == 1)


# -- take one part away ---------------------------------------------------------------------------


def parts_of(what: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """Returns k-NN by seed, and the mean of the random encoders, of both sides of each row."""
    rows, arms = [], []
    for part in what.get("parts", ()):
        sides = {side: side_of(runs, part[side]) for side in ("intact", "broken")}
        if all(side["knn"] for side in sides.values()):
            rows.append({"label": part["label"], "name": part.get("intact_label", ""), **sides})
            arms += [part["intact"], part["broken"]]
    if not rows:
        return {}
    arms_of = what.get("controls", {})
    controls = [line_of(n, runs.get(arm, {})) for n, arm in arms_of.items()]
    controls += [line for arm in arms_of.values() for line in untrained(runs.get(arm, {}))]
    return {"title": scale(arms, runs), "controls": dict(filter(None, controls)), "rows": rows}


def side_of(runs: Runs, arm: str) -> dict[str, Any]:
    found = lab.of_arm(runs, arm).values()
    random = round(statistics.fmean(one.random for one in found), 3) if found else None
    return {"knn": [one.knn for one in found], "random": random}


def line_of(name: str, by_protocol: dict[str, Any]) -> tuple[str, float] | None:
    """Returns a control's k-NN, the mean over its seeds; if it was not read out, its own top-1."""
    if near := [one["scores"][0]["value"] for one in ones(by_protocol, "readout")]:
        return name, round(statistics.fmean(near), 3)
    if own := [one["value"] for one in ones(by_protocol, "classifier")]:
        return f"{name} (top-1)", round(statistics.fmean(own), 3)
    return None


def untrained(by_protocol: dict[str, Any]) -> list[tuple[str, float]]:
    """Returns k-NN of the encoder as initialised and of pixels, if a control recorded them."""
    found = ones(by_protocol, "untrained")
    names = (
        {"random encoder, as initialised": "as initialised", "pixels": "pixels"} if found else {}
    )
    return [
        (name, round(statistics.fmean(one["others"][key][0] for one in found), 3))
        for name, key in names.items()
    ]


def ones(by_protocol: dict[str, Any], evaluation: str) -> list[dict[str, Any]]:
    return [one for _, one in by_protocol.get(PROTOCOLS[evaluation], {}).values()]


def parts_caption(numbers: dict[str, Any]) -> str:
    lines = f" Lines: {'; '.join(numbers['controls'])}." if numbers["controls"] else ""
    return (
        "Take one part away: k-NN on test images, a dot for each seed, filled for the whole method "
        "and hollow without the part. The short bar is the mean of the runs' own random encoders, "
        f"calibrated: hollow dots about or left of it have learned nothing.{lines}"
    )


def draw_parts(path: Path, numbers: dict[str, Any]) -> None:
    """Draws a row for each part: the whole method above, without the part below."""
    plt = pictures.headless_pyplot()
    rows = numbers["rows"]
    figure, axis = plt.subplots(figsize=(9, 1.9 + 0.55 * len(rows)))
    styles = {"intact": {"facecolors": "black"}, "broken": {"facecolors": "white"}}
    labels = {"intact": "whole, a dot per seed", "broken": "without the part"}
    for y, row in enumerate(rows):
        if y % 2:
            axis.axhspan(y - 0.5, y + 0.5, color="0.95", lw=0)
        for side, at in (("intact", y - 0.17), ("broken", y + 0.17)):
            knn, random = row[side]["knn"], row[side]["random"]
            axis.scatter(
                knn, [at] * len(knn), s=34, edgecolors="black", linewidths=1.1, zorder=3,
                **styles[side],
            )  # fmt: skip
            if random is not None:
                axis.vlines(random, at - 0.15, at + 0.15, color="0.35", lw=2.5, zorder=2)
    for side, label in labels.items():
        axis.scatter([], [], s=34, edgecolors="black", label=label, **styles[side])
    axis.plot([], [], marker="|", ms=10, mew=2.5, color="0.35", lw=0, label="its random encoder")
    for (name, value), dashes in zip(
        numbers["controls"].items(), itertools.cycle(DASHES), strict=False
    ):
        axis.axvline(value, color="0.35", ls=dashes, lw=1.3, label=name, zorder=1)
    axis.set_yticks(range(len(rows)), [named(row) for row in rows], fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("k-NN accuracy on test images, %", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    lab_methods.finish(figure, path, plt, axis, "Take one part away", numbers)


def named(row: dict[str, Any]) -> str:
    return f"{row['label']}\n(whole: {row['name']})" if row["name"] else row["label"]


# -- effects --------------------------------------------------------------------------------------


def effects_of(what: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """Returns a panel for each unit: the primary claims that are run, by verdict."""
    judged = lab.judge_all(what["claims"], runs)
    of = [c for c in what["claims"] if c["primary"] and judged[c["name"]].effects]
    of.sort(key=lambda claim: rank_of(judged[claim["name"]].word))
    headings = [[*ORDER.values()][rank_of(judged[claim["name"]].word)] for claim in of]
    return panels_of("The primary claims", of, headings, judged, runs)


def secondary_of(what: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """Returns a panel for each unit: the secondary claims that are run, by package."""
    judged = lab.judge_all(what["claims"], runs)
    of = [c for c in what["claims"] if not c["primary"] and judged[c["name"]].effects]
    headings = [claim.get("package", lab.FIRST) for claim in of]
    return panels_of("Secondary claims, not corrected", of, headings, judged, runs)


def panels_of(
    name: str,
    of: list[dict[str, Any]],
    headings: list[str],
    judged: dict[str, lab.Judged],
    runs: Runs,
) -> dict[str, Any]:
    """Returns the claims' numbers by unit and heading, with the picture's name and scale; {} of no
    claim.
    """
    panels: dict[str, dict[str, list]] = {}
    for claim, heading in zip(of, headings, strict=True):
        found = judged[claim["name"]]
        unit = OTHERS.get(claim["measure"], "points of accuracy")
        line = {"name": claim["name"], "published": claim["published_effect"]}
        line |= {"smallest": claim["smallest"], "seeds": [*found.effects.values()]}
        if found.interval:
            line |= {n: getattr(found.interval, n) for n in ("mean", "low", "high")}
        panels.setdefault(unit, {}).setdefault(heading, []).append(rounded(line))
    arms = [arm for claim in of for arm in claim["effect"]]
    return {"name": name, "title": scale(arms, runs), "panels": panels} if panels else {}


def rank_of(word: str) -> int:
    """Returns the place of a verdict in ORDER; "smaller" stands for any smallest effect."""
    return next(n for n, start in enumerate(ORDER) if word.startswith(start))


def rounded(line: dict[str, Any]) -> dict[str, Any]:
    """Rounds to six digits: the last ones of a float differ between machines."""

    def short(value: Any) -> Any:
        return float(f"{value:.6g}") if isinstance(value, float) else value

    return {n: [*map(short, v)] if isinstance(v, list) else short(v) for n, v in line.items()}


def effects_caption(numbers: dict[str, Any]) -> str:
    return (
        "The primary claims that have run, by verdict: to the right of 0 is what the paper says. "
        "Filled: our mean with its 95 % interval, small dots are seeds. Hollow: the published "
        "effect, at the paper's own scale (where one side learns nothing: nearly all that the "
        "other reaches), so compare the side and not the size. Grey: too small to be of interest."
    )


def secondary_caption(numbers: dict[str, Any]) -> str:
    return (
        "The secondary claims that have run, none of them corrected for their number: to the right "
        "of 0 is what the claim says, of a switch that it helps; dots, diamonds and grey as above."
    )


def draw_effects(path: Path, numbers: dict[str, Any]) -> None:
    """Draws a panel for each unit, in it a line for each claim under its heading."""
    plt = pictures.headless_pyplot()
    panels = {unit: lines_of(by_heading) for unit, by_heading in numbers["panels"].items()}
    heights = [len(lines) for lines in panels.values()]
    figure, axes = plt.subplots(
        len(panels), 1, figsize=(9, 1.6 + 0.9 * len(panels) + 0.33 * sum(heights)), squeeze=False,
        gridspec_kw={"height_ratios": [height + 1.5 for height in heights]},
    )  # fmt: skip
    for axis, (unit, lines) in zip(axes.flat, panels.items(), strict=True):
        draw_panel(axis, lines)
        axis.set_xlabel(f"effect, {unit}", fontsize=9)
    axis.plot([], [], "ko", ms=7, label="ours, 95 % interval")
    axis.plot([], [], "o", color="0.45", ms=3, label="a seed")
    axis.plot([], [], "kD", mfc="white", ms=6, label="published")
    axis.fill_between([], [], [], color="0.85", label="too small to be of interest")
    lab_methods.finish(figure, path, plt, axis, f"{numbers['name']}; ours:", numbers)


def lines_of(by_heading: dict[str, list]) -> list[tuple[str, dict[str, Any] | None]]:
    """Returns (heading, None), then (claim's name, its numbers) for each claim under it."""
    found: list = []
    for heading, claims in by_heading.items():
        found += [(heading, None), *((claim["name"], claim) for claim in claims)]
    return found


def draw_panel(axis, lines: list[tuple[str, dict[str, Any] | None]]) -> None:
    axis.axvline(0, color="black", lw=1, zorder=1)
    for y, (_, claim) in enumerate(lines):
        if claim is None:
            continue
        m, seeds = claim["smallest"], claim["seeds"]
        axis.fill_between([-m, m], y - 0.36, y + 0.36, color="0.85", lw=0, zorder=0)
        axis.plot(seeds, [y + 0.24] * len(seeds), "o", color="0.45", ms=3, zorder=2)
        if "mean" in claim:
            axis.hlines(y, claim["low"], claim["high"], color="black", lw=2, zorder=3)
            axis.plot(claim["mean"], y, "ko", ms=7, zorder=4)
        if claim["published"] is not None:
            axis.plot(claim["published"], y - 0.24, "kD", mfc="white", ms=6, zorder=5)
    axis.set_yticks(range(len(lines)), [name for name, _ in lines], fontsize=9)
    for label, (_, claim) in zip(axis.get_yticklabels(), lines, strict=True):
        label.set_fontweight("normal" if claim else "bold")
    axis.set_ylim(len(lines) - 0.4, -0.6)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", alpha=0.3)
