"""The papers' claims at equal budget: cifar10.md, made of claims.yaml, plan.yaml and records.

python results/report.py writes the page with the others.
"""

import functools
import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError
from results import record, tables
from slurm.plan import PROTOCOLS, Planned
from slurm.plan import load as load_plan

HERE = Path(__file__).resolve().parent
CLAIMS = HERE / "claims.yaml"
SIDES = ("better", "worse")
PURITY = "neighbour_purity"
SHOWN = {"knn": "k-NN", "linear": "linear", "semi 1%": "1 %", "semi 10%": "10 %"}
# a plan's run -> protocol -> seed -> (file name, record)
Runs = dict[str, dict[str, dict[int, tuple[str, dict[str, Any]]]]]

HEAD = """# The papers' claims at equal budget

Made by `python results/report.py` from [claims.yaml](claims.yaml), [plan.yaml](plan.yaml) and
[records/](records/): change those, not this page.

Do the claims hold at the scale of GSG's own CIFAR-10 experiment, or as near to it as there is a
machine for? Both runs of a claim have the same images, encoder, batch, nominal rate and number of
epochs; what else differs between two recipes is said with the claim. An epoch with guided
stop-gradient takes four views of an image instead of two, so one comparison is at equal views too.
The tables hold percentages of the test images after the last epoch, *±* the standard deviation
over seeds; k-NN has k = 200, tau = 0.1 and votes of the images that were trained on. CIFAR-10 is
everywhere a **JPEG copy** of it. Training times on CPUs are of a machine that other work shared:
no comparison.

On a tier a claim **holds** where the means differ its way by more than the spread of a difference
of two runs, √(s₁² + s₂²); it **does not hold** where they differ the other way by more than that;
else the difference is **within the spread**. That is a description, no test of significance: of two
methods that are equal, three seeds leave the spread in one comparison of six. A seed is the same
initial encoder and the same order of images in both runs, so the differences by seed are given too.
One seed has no spread: its difference is shown and nothing judged. `photos` is 5 400 small patches
of 18 photographs, labelled by photograph, and its runs are short: it shows that a recipe learns,
and is a weak witness for or against a claim about CIFAR-10 or ImageNet.
"""


@functools.cache
def plan() -> dict[str, Planned]:
    """The runs of plan.yaml by their names."""
    return load_plan(HERE / "plan.yaml")


def load(path: Path = CLAIMS) -> dict[str, Any]:
    """claims.yaml; UserError where it names a run that plan.yaml has not."""
    what = yaml.safe_load(path.read_text())
    unknown = [n for n in what["runs"] if not any(t["prefix"] + n in plan() for t in what["tiers"])]
    unknown += [n for s in what["scans"] for n in s["runs"].values() if n not in plan()]
    unknown += [c[n] for c in what["claims"] for n in SIDES if c[n] not in what["runs"]]
    if unknown:
        raise UserError(f"{path} names {unknown[0]}, which is no run of plan.yaml")
    return what


def recorded(records: Sequence[tuple[str, dict[str, Any]]]) -> Runs:
    """The records of the plan's runs, by their run folders' names."""
    found: Runs = {}
    for run in plan().values():
        for seed in run.seeds:
            for name, one in records:
                if not record.is_of(one, run, seed):
                    continue
                by_seed = found.setdefault(run.name, {}).setdefault(one["protocol"], {})
                if seed in by_seed:
                    twice = f"{by_seed[seed][0]} and {name} are both {one['protocol']}"
                    raise UserError(f"{twice} of {run.name}, seed {seed}: remove one")
                by_seed[seed] = name, one
    return found


def values(runs: Runs, name: str, protocol: str) -> list[float]:
    """A run's numbers by one protocol, in percent, in the order of its seeds."""
    by_seed = runs.get(name, {}).get(protocol, {})
    return [by_seed[seed][1]["value"] for seed in sorted(by_seed)]


# -- verdicts -------------------------------------------------------------------------------------


WORDS = ("holds", "does not hold", "within the spread", "one seed", "not run")


@dataclass(frozen=True)
class Verdict:
    """One of the first four WORDS; one seed judges nothing."""

    word: str
    difference: float  # points, better minus worse as the claim has them


def judge(better: Sequence[float], worse: Sequence[float]) -> Verdict:
    """Two lists of numbers over seeds: the spread of a difference is the root of the sum of their
    squared standard deviations (n - 1).
    """
    difference = statistics.fmean(better) - statistics.fmean(worse)
    if min(len(better), len(worse)) < 2:
        return Verdict("one seed", difference)
    spread = math.hypot(statistics.stdev(better), statistics.stdev(worse))
    if abs(difference) <= spread:
        return Verdict("within the spread", difference)
    return Verdict("holds" if difference > 0 else "does not hold", difference)


def sentence(claim: dict[str, Any], what: dict[str, Any], runs: Runs) -> str:
    """What the tiers say of a claim, in one sentence."""
    said = []
    for tier in what["tiers"]:
        names = [tier["prefix"] + claim[side] for side in SIDES]
        for evaluation, label in SHOWN.items():
            protocol = PROTOCOLS[evaluation]
            pair = [values(runs, name, protocol) for name in names]
            if not all(pair):
                continue
            found = judge(*pair)
            if found.word == "does not hold" and not claim["tried"]:
                raise UserError(
                    f"{CLAIMS.name}: '{claim['claim']}' does not hold on {tier['short']}: "
                    "say under tried where its cause was looked for"
                )
            numbers = f"{label} {mean_cell(pair[0])} against {mean_cell(pair[1])}"
            word = "one seed, not judged" if found.word == "one seed" else f"**{found.word}**"
            numbers += f", {found.difference:+.2f}{seed_by_seed(runs, *names, protocol)}"
            said.append(f"{tier['short']}: {word} ({numbers})")
    text = f"**{claim['claim'][0].upper()}{claim['claim'][1:]}.** {'; '.join(said) or 'Not run'}. "
    text += f"Source: {claim['source'].strip()}."
    more = [claim[name].strip() for name in ("differs", "tried") if claim.get(name)]
    return filled(" ".join([text, *more]), runs)


def filled(text: str, runs: Runs) -> str:
    """The text with each {run of the plan} replaced by its k-NN, or by "not run"."""

    def number(name: re.Match) -> str:
        if name[1] not in plan():
            raise UserError(f"{CLAIMS.name} quotes {name[1]}, which is no run of plan.yaml")
        return mean_cell(values(runs, name[1], PROTOCOLS["knn"])) or "not run"

    return re.sub(r"\{([a-z0-9.-]+)\}", number, text)


def in_short(what: dict[str, Any], runs: Runs) -> str:
    """How many claims hold, on each tier, by k-NN."""
    protocol, said = PROTOCOLS["knn"], []
    for tier in what["tiers"]:
        words = []
        for claim in what["claims"]:
            pair = [values(runs, tier["prefix"] + claim[side], protocol) for side in SIDES]
            words.append(judge(*pair).word if all(pair) else "not run")
        counts = [f"{words.count(word)} {word}" for word in WORDS if word in words]
        said.append(f"{tier['short']}: {', '.join(counts)}")
    return f"In short, of {len(what['claims'])} claims, by k-NN. {'; '.join(said)}."


def seed_by_seed(runs: Runs, better: str, worse: str, protocol: str) -> str:
    """The differences of the seeds that both runs have, as "; by seed +0.50, -0.20"."""
    a, b = runs[better][protocol], runs[worse][protocol]
    seeds = sorted(a.keys() & b.keys())
    differences = [f"{a[seed][1]['value'] - b[seed][1]['value']:+.2f}" for seed in seeds]
    return f"; by seed {', '.join(differences)}" if len(seeds) > 1 else ""


def mean_cell(numbers: Sequence[float]) -> str:
    """58.21 ± 0.45; of one seed the number alone."""
    if not numbers:
        return ""
    spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.2f}{spread}"


# -- the page -------------------------------------------------------------------------------------


def markdown(published, records, figures: Sequence[dict[str, str]]) -> str:
    """The text of cifar10.md; figures are those of figures.yaml that belong to it."""
    what, runs = load(), recorded(records)
    text = [HEAD, "## The claims\n", in_short(what, runs), ""]
    text += [f"{n}. {sentence(claim, what, runs)}" for n, claim in enumerate(what["claims"], 1)]
    for tier in what["tiers"]:
        text += ["", f"## {tier['title']}\n", tier["note"].strip(), ""]
        text += tier_table(tier, what, runs)
    text += ["", "## Values that the papers leave open\n", *scan_tables(what, runs)]
    text += ["", "## What the look-ups retrieve\n", RETRIEVED, *purity_tables(what, runs)]
    if figures:
        text += ["", "## Figures"]
    for figure in figures:
        text += [f"\n![{figure['caption']}](figures/{figure['file']})\n"]
        text += [f"{figure['caption']} `{figure['command']}`"]
    text += ["", "## Published, under other settings\n", CONTEXT, "", context_table(published)]
    return "\n".join(text) + "\n"


def tier_table(tier: dict[str, str], what: dict[str, Any], runs: Runs) -> list[str]:
    """The tier's numbers, a row for each run that it plans; what is missing is named below."""
    planned = [n for n in what["runs"] if tier["prefix"] + n in plan()]
    asked = dict.fromkeys(e for n in planned for e in plan()[tier["prefix"] + n].evaluations)
    rows, missing = [], []
    for name in planned:
        run = tier["prefix"] + name
        scores = [values(runs, run, PROTOCOLS[e]) for e in asked]
        missing += lacking(runs, plan()[run])
        if not any(scores):
            continue
        one = next(one for by_seed in runs[run].values() for _, one in by_seed.values())
        trained_on = tables.data_cell(one["pretraining"], "dataset")
        row = [what["runs"][name], trained_on, f"{one['pretraining']['epochs']:g}"]
        row += [str(len(seeds_of(runs, run))), mean_cell(random_encoder(runs, run))]
        rows.append([*row, *map(mean_cell, scores), cost(runs, run), links(runs, run)])
    head = ["method", "trained on", "epochs", "seeds", "random encoder, k-NN"]
    head += [SHOWN[e] for e in asked]
    text = [tables.table([*head, "training", "records"], rows), ""] if rows else []
    if missing:
        how = f"`python results/reproduce.py --next --only {missing[0].split()[0]}"
        data = " --cifar10 PATH" if not tier["prefix"].startswith("photos") else ""
        text += [f"**Missing**: {', '.join(missing)}. {how}{data}` runs the first of them."]
    return text


def lacking(runs: Runs, run: Planned) -> list[str]:
    """What a planned run has no record of, as simsiam (seed 1), simsiam (linear of seed 0)."""
    found, name = [], run.name
    trained = seeds_of(runs, name)
    if seeds := [str(s) for s in run.seeds if s not in trained]:
        found.append(f"{name} (seed {', '.join(seeds)})")
    for evaluation in run.evaluations:
        done = runs.get(name, {}).get(PROTOCOLS[evaluation], {})
        if seeds := [str(s) for s in trained if s not in done]:
            found.append(f"{name} ({SHOWN[evaluation]} of seed {', '.join(seeds)})")
    return found


def seeds_of(runs: Runs, run: str) -> list[int]:
    return sorted({seed for by_seed in runs.get(run, {}).values() for seed in by_seed})


def random_encoder(runs: Runs, run: str) -> list[float]:
    of_knn = runs[run].get(PROTOCOLS["knn"], {})
    found = [one.get("others", {}).get("random encoder") for _, one in of_knn.values()]
    return [value for numbers in found if numbers for value in numbers]


def cost(runs: Runs, run: str) -> str:
    """Mean time of training, and on what."""
    ones = {seed: one for by_seed in runs[run].values() for seed, (_, one) in by_seed.items()}
    hours = [one["hours"] for one in ones.values() if one["hours"] is not None]
    one = next(iter(ones.values()))
    time = tables.hours_cell({"hours": statistics.fmean(hours)}) if hours else ""
    return f"{time}, {one['hardware']}"


def links(runs: Runs, run: str) -> str:
    files = dict.fromkeys(runs[run][p][s][0] for p in runs[run] for s in sorted(runs[run][p]))
    return ", ".join(f"[{n}](records/{name})" for n, name in enumerate(files, 1))


def scan_tables(what: dict[str, Any], runs: Runs) -> list[str]:
    text = [SCANS]
    for scan in what["scans"]:
        scores = {v: values(runs, name, PROTOCOLS["knn"]) for v, name in scan["runs"].items()}
        scores = {value: numbers for value, numbers in scores.items() if numbers}
        text += ["", f"{scan['what']}{' (' + scan['unit'] + ')' if scan['unit'] else ''}:", ""]
        if not scores:
            text.append("not run")
            continue
        rows = [
            (
                f"{value:g}{' (ours)' if value == scan['ours'] else ''}",
                mean_cell(numbers),
                str(len(numbers)),
                links(runs, scan["runs"][value]),
            )
            for value, numbers in scores.items()
        ]
        text.append(tables.table(("value", "k-NN on held-out images", "seeds", "records"), rows))
        text += ["", conclusion(scan, scores)]
    return text


def conclusion(scan: dict[str, Any], scores: dict[float, list[float]]) -> str:
    """Whether another value is better than ours by more than the spread."""
    best = max(scores, key=lambda value: statistics.fmean(scores[value]))
    if scan["ours"] not in scores:
        return f"Best: {best:g}."
    if best == scan["ours"]:
        return f"Ours, {best:g}, is the best of them."
    found = judge(scores[best], scores[scan["ours"]])
    word = {"holds": "more than the spread"}.get(found.word, found.word)
    return f"Best: {best:g}, {found.difference:+.2f} points from ours ({word})."


def purity_tables(what: dict[str, Any], runs: Runs) -> list[str]:
    """Purity of the retrieved neighbours over training, a table for each tier."""
    text = []
    for tier in what["tiers"]:
        found = {m: histories(runs, tier["prefix"] + n) for n, m in what["runs"].items()}
        found = {m: curves for m, curves in found.items() if any(PURITY in c for c in curves)}
        columns = spread_out(
            sorted({e for cs in found.values() for e in cs[0]["epoch"] if e > 0}), 6
        )
        rows = []
        for method, curves in found.items():
            at = [average(curves, PURITY, epoch) for epoch in columns]
            own = average(curves, "self_matches", curves[0]["epoch"][-1])
            rows.append([method, *(percent(v) for v in at), percent(own)])
        if rows:
            head = ("method", *(f"epoch {e}" for e in columns), "own image, last epoch")
            text += ["", f"{tier['title']}:", "", tables.table(head, rows)]
    return text or ["", "Not run."]


def histories(runs: Runs, run: str) -> list[dict[str, list[float | None]]]:
    """What the monitors of each seed said over its epochs."""
    of_knn = runs.get(run, {}).get(PROTOCOLS["knn"], {})
    return [curve for seed in sorted(of_knn) for curve in of_knn[seed][1].get("history", [])]


def average(curves: Sequence[dict[str, list]], metric: str, epoch: int) -> float | None:
    """A metric's mean over seeds at an epoch; None where it was not taken."""
    found = [
        c[metric][c["epoch"].index(epoch)] for c in curves if metric in c and epoch in c["epoch"]
    ]
    found = [value for value in found if value is not None]
    return statistics.fmean(found) if found else None


def spread_out(epochs: Sequence[int], number: int) -> list[int]:
    """At most `number` of the epochs, the first and the last among them."""
    if len(epochs) <= number:
        return [*epochs]
    step = (len(epochs) - 1) / (number - 1)
    return [epochs[round(i * step)] for i in range(number)]


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def context_table(published: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            r["method"],
            r["arch"],
            tables.number_cell(r["epochs"]),
            tables.number_cell(r["batch"]),
            r["protocol"],
            tables.published_cell(r),
            r["source"],
        )
        for r in published
        if (r["pretraining"], r["dataset"]) == ("CIFAR-10", "CIFAR-10")
    ]
    head = ("method", "encoder", "epochs", "batch", "protocol", "published", "source")
    return tables.table(head, sorted(rows, key=lambda row: tables.method_order(row[0])))


SCANS = """Three values each, on `photos` with a fifth of its training images held out, 3 epochs
for NNSiam and 5 for SNCLR; the test images were not looked at. Patches of one photograph overlap,
so held-out ones are easier than the test images, which come from another part of the photograph.
No value was changed after the scan: the runs above have the recipes' own."""

RETRIEVED = """Share of the retrieved entries that have the query's label, in percent, means over
each epoch and over seeds; entries of the queue's random start do not count. Labels are read for
this alone. NNCLR and NNSiam retrieve one neighbour, SNCLR 30. *Own image* is the share that is an
older view of the query itself, which has its label: SNCLR's paper leaves it out, its code does
not."""

CONTEXT = """No number of ours stands in this table, and none of it may be compared with the tables
above: they differ in epochs, batch, images or encoder. GSG's setting is CIFAR ResNet-18, projector
512-2048-2048, predictor 2048-512-2048, no blur (appendix B.2 and C.2), else lightly's default
set-up; it states neither batch nor epochs there (512 and 200, which the first table's runs have,
are secondary), and the numbers of its CIFAR-10 table are not at hand. Its appendix E says of t-SNE
that the clusters of CIFAR-10 part better with guided stop-gradient, for SimSiam and BYOL; compare
the pictures above, with their silhouettes. lightly's table is of its own benchmark, without guided
stop-gradient; batch and epochs are as given there."""
