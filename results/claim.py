"""One claim of the lab in minutes, on photographs that are embedded: both sides, one seed.

    make claim NAME=gsg-without-predictor     # or: python results/claim.py NAME [--seed 1]
    make claim                                # lists the claims

Each run of the claim is trained as the plan's tier `photos` trains its recipe, with the flags that
set the run apart; what the lab sets for its own images, encoder and length stays out. It shows the
mechanism, on other images and one seed, and judges nothing: results/claims.md does.
"""

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from common import cards
from common.errors import UserError, command, nearest_name
from common.run import documents, geometry, metrics, results
from common.run.help import in_80_columns
from common.run.signals import run_child
from results import claims, lab
from results.lab_page import formula
from slurm import plan

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
RUNS = ROOT / "runs" / "claim"
TIER = "photos"
# what the lab sets for its encoder and images; photos has its own, unless the claim is about it
SIZES = {"projector-hidden", "output-dim", "predictor-hidden", "projector-layers"}
SIZES |= {"lr", "lr-biases"}
LENGTHS = {"epochs", "warmup-epochs"}  # photos has its own, epochs in the runs' proportion
FOREIGN = {"init", "subset-seed"}  # another run of the lab, another draw of its images
EPOCHS = 3  # for a recipe of no family that the tier names
SIDES = 2  # a claim of more runs than these has fewer epochs: all of them take four minutes
HERE_TOO = {"knn", "gain", "rank", "std", "feature_rank"}  # of a run without a read-out
WIDTH = 40  # of the text's bars
PRIMARY = "primary, judged"  # a heading of the list


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", nargs="?", help="a claim of the lab; default: list them")
    parser.add_argument("--seed", type=int, default=0, help="of all of its runs (default 0)")
    arguments = parser.parse_args(argv)
    what = documents.read_yaml(HERE / "claims.yaml", "claims")  # checked against the plan below
    by_name = {claim["name"]: claim for claim in what.get("lab", {"claims": []})["claims"]}
    if arguments.name is None:
        print(listed([*by_name.values()]) or "no claims yet")
        print(
            "\nmake claim NAME=… trains one on photographs, in minutes; results/claims.md judges."
        )
        return
    if arguments.name not in by_name:
        hint = nearest_name(arguments.name, by_name)
        raise UserError(f"{arguments.name} is no claim of the lab{hint}; make claim lists them")
    planned = plan.load(HERE / "plan.yaml")
    claims.load(HERE / "claims.yaml", planned)
    show(by_name[arguments.name], planned, arguments.seed)


def listed(found: list[dict[str, Any]]) -> str:
    """Lists claims by name, the primary ones first, the others under their packages."""
    headings: dict[str, list[str]] = {PRIMARY: []}
    for claim in found:
        heading = PRIMARY if claim["primary"] else claim.get("package", lab.FIRST)
        headings.setdefault(heading, []).append(f"  {claim['name']}: {claim['claim']}")
    return "\n".join("\n".join([f"{h}:", *lines]) for h, lines in headings.items() if lines)


def show(claim: dict[str, Any], planned: dict[str, plan.Planned], seed: int) -> None:
    """Trains the claim's runs on photos and prints their numbers."""
    arms = on_photos(claim, planned, documents.read_yaml(HERE / "plan.yaml", "plan")["tiers"])
    print(f"{claim['claim']} ({claim['source'].strip()}): {claim['published'].strip()}\n")
    found = {}
    for arm, (recipe, flags) in arms.items():
        folder = RUNS / f"{claim['name']}-{seed}" / arm
        line = [str(ROOT / plan.script_of(recipe)), *flags, "--seed", str(seed)]
        if code := run_child([sys.executable, *line, "--output", str(folder)]):
            raise UserError(f"{arm} ended with exit code {code}, see above")
        found[arm] = of_folder(folder)
    print("\n" + "\n".join(table(claim, found)))


# -- the runs -------------------------------------------------------------------------------------


def on_photos(
    claim: dict[str, Any], planned: dict[str, plan.Planned], tiers: dict[str, Any]
) -> dict[str, tuple[str, list[str]]]:
    """Returns (recipe, flags) of each run of the claim's effect on photos; UserError, in one line,
    if they do not differ there.
    """
    if len(claim["effect"]) < 2:
        raise UserError(
            f"{claim['name']} has no version on photos: it compares no two runs; the lab reads one "
            "run in two ways"
        )
    own = {arm: own_flags(planned[arm], tiers) for arm in claim["effect"]}
    about = {flag for flag in SIZES if differs(flag, own, planned)}
    least = min(planned[arm].config["epochs"] for arm in own)
    asked = []
    for arm, flags in own.items():
        recipe = planned[arm].recipe
        kept = {
            flag: value for flag, value in flags.items() if flag not in (SIZES - about) | LENGTHS
        }
        family = cards.load()[recipe].family if recipe in cards.load() else ""
        few = tiers[TIER]["families"].get(family, {}).get("epochs", EPOCHS)
        epochs = math.ceil(few * SIDES / max(SIDES, len(own)))
        kept |= {"epochs": round(epochs * planned[arm].config["epochs"] / least)}
        run = {"recipe": recipe, "flags": kept | {"geometry-points": 1}, "hours": 0}
        asked.append(plan.merged("plan.yaml", arm, TIER, tiers[TIER], run)["asked"])
    answers = plan.resolved(json.dumps(asked))
    lines = {
        arm: (planned[arm].recipe, answer["flags"])
        for arm, answer in zip(own, answers, strict=True)
    }
    same = len({json.dumps(line) for line in lines.values()}) < len(lines)
    if same or any(FOREIGN & {*flags} for flags in own.values()):
        raise UserError(
            f"{claim['name']} has no version on photos: its runs differ in flags of the lab alone"
        )
    return lines


def own_flags(run: plan.Planned, tiers: dict[str, Any]) -> dict[str, Any]:
    """Returns the flags that plan.yaml gives this run, without those of its tier."""
    of_tier = tiers[run.tier]
    runs = {name: one for name, one, _ in plan.expanded(HERE / "plan.yaml", of_tier)}
    return runs[run.name].get("flags") or {}


def differs(flag: str, own: dict[str, dict], planned: dict[str, plan.Planned]) -> bool:
    """Tells whether two runs of one recipe have different values of a flag."""
    seen: dict[str, set] = {}
    for arm, flags in own.items():
        seen.setdefault(planned[arm].recipe, set()).add(flags.get(flag))
    return any(len(values) > 1 for values in seen.values())


def of_folder(folder: Path) -> lab.Measured:
    """Reads what a finished run's own files say of it; it has no linear read-out."""
    found = results.read(folder, ("knn", "knn_before"))
    last = [*metrics.read(folder / geometry.NAME, "geometry")][-1]
    return lab.from_geometry(100 * found["knn"], math.nan, 100 * found["knn_before"], last, {})


# -- what is printed ------------------------------------------------------------------------------


def table(claim: dict[str, Any], found: dict[str, lab.Measured]) -> list[str]:
    """Returns lines: the numbers, a picture of k-NN, and the effect on this one seed."""
    wide = max(map(len, found))
    head = f"{'':{wide}}  k-NN %  random %  std·√D    rank"
    lines = [head]
    for arm, one in found.items():
        numbers = f"{one.knn:6.2f}  {one.random:8.2f}  {one.std:6.2f}  {one.rank:6.1f}"
        lines.append(f"{arm:{wide}}  {numbers}{'  collapsed' if one.collapsed else ''}")
    most = max(max(one.knn, one.random) for one in found.values())
    lines += ["", f"k-NN, and | where its random encoder is, from 0 to {most:.1f} %"]
    lines += [f"{arm:{wide}}  {bar(one, most)}" for arm, one in found.items()]
    measure = claim["measure"] if claim["measure"] in HERE_TOO else "knn"
    values = {arm: lab.value(claim | {"measure": measure}, arm, one) for arm, one in found.items()}
    effect = sum(factor * values[arm] for arm, factor in claim["effect"].items())
    other = "" if measure == claim["measure"] else f" (the lab's: {lab.UNITS[claim['measure']]})"
    effect_of = formula(claim["effect"]).replace("`", "")
    lines += ["", f"{effect_of}: {effect:+.2f} {lab.UNITS[measure]}{other}"]
    return [*lines, "One seed judges nothing: results/claims.md has the lab's, and what they say."]


def bar(one: lab.Measured, most: float) -> str:
    """Draws one run's k-NN as a bar, with its random encoder as a mark in it or behind it."""
    cells = ["#" if n < round(WIDTH * one.knn / most) else " " for n in range(WIDTH + 1)]
    cells[round(WIDTH * one.random / most)] = "|"
    return "".join(cells).rstrip()


if __name__ == "__main__":
    sys.exit(command(main))
