"""Curves of a tier of claims.yaml, drawn from its records.

    python results/curves.py photos --output results/figures/claims-photos-curves.png

The picture carries a digest of the numbers that it shows, so that `python results/report.py` can
say when the records have others, and draw it anew.
"""

import argparse
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from common import cards
from common.errors import UserError, command
from common.run import documents, pictures
from common.run.help import in_80_columns
from results import claims
from results.joined import Joined, load

PANELS = {"knn": "k-NN accuracy", claims.PURITY: "retrieved with the query's label"}
PANELS |= {"effective_rank": "effective rank"}
MARKERS = "os^Dvp*X"  # one for each colour, so that lines are told apart without colours too
DIGEST = "numbers"  # the PNG's text chunk
SCRIPT = "results/curves.py"

Points = list[tuple[float, float]]


def numbers_of(tier: dict[str, str], joined: Joined) -> dict[str, Any]:
    """Returns all that the picture shows: its title, and for each family, run and metric the points
    (epoch, value) of each seed and of the mean over the seeds that have the epoch. k-NN is at an
    epoch's end, where it was measured, means over an epoch's steps are at its middle. Families have
    different numbers of epochs, so no line of one is compared with one of another.
    """
    families: dict[str, Any] = {}
    for name, method in joined.claims["runs"].items():
        run = tier["prefix"] + name
        if seeds := claims.histories(joined.runs, run):
            lines = {metric: lines_of(seeds, metric) for metric in PANELS}
            family = cards.load()[joined.plan[run].recipe].family
            families.setdefault(family, {})[method] = lines
    return {"title": tier["title"].replace("`", ""), "families": families}


def lines_of(seeds: Sequence[dict[str, list]], metric: str) -> dict[str, Any]:
    """Returns a run's points of one metric."""
    epochs = sorted({epoch for curve in seeds for epoch, _ in points_of(curve, metric)})
    means = [(epoch, round(claims.average(seeds, metric, epoch), 6)) for epoch in epochs]
    lines = [means, *(points_of(curve, metric) for curve in seeds)]
    if metric != "knn":  # the mean over an epoch's steps
        lines = [[((math.ceil(e) - 1 + e) / 2, value) for e, value in line] for line in lines]
    return {"mean": lines[0], "seeds": lines[1:]}


def points_of(curve: dict[str, list], metric: str) -> Points:
    """Returns the epochs at which a metric was measured, with its values."""
    pairs = zip(curve["epoch"], curve.get(metric, []), strict=False)
    return [(epoch, value) for epoch, value in pairs if value is not None]


def digest(numbers: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(numbers, sort_keys=True).encode()).hexdigest()


def draw(path: Path, numbers: dict[str, Any]) -> None:
    """Draws a row of panels for each family, one for each metric that any run of it has. In them is
    a line for each run: the mean over seeds, with the seeds in pale.
    """
    plt = pictures.headless_pyplot()
    families = numbers["families"]
    metrics = {family: metrics_of(methods) for family, methods in families.items()}
    figure, axes = pictures.grid(plt, [*map(len, metrics.values())], (5.2, 3.9))
    places = iter(axes)
    for family, methods in families.items():
        row = [next(places) for _ in metrics[family]]
        for axis, metric in zip(row, metrics[family], strict=True):
            draw_panel(axis, {method: lines[metric] for method, lines in methods.items()})
            axis.set_title(f"{PANELS[metric]}, {family}", fontsize=10)
            if metric in pictures.SHARES:
                pictures.in_percent(axis)
        lines, labels = row[0].get_legend_handles_labels()
        row[-1].legend(
            lines, labels, loc="center left", bbox_to_anchor=(1.03, 0.5), fontsize=9, frameon=False
        )
    figure.suptitle(numbers["title"], fontsize=11)
    figure.tight_layout()
    pictures.save(figure, path, plt, {DIGEST: digest(numbers)})


def metrics_of(methods: dict[str, dict[str, Any]]) -> list[str]:
    """Lists the metrics of PANELS that any run of a family has."""
    return [m for m in PANELS if any(lines[m]["mean"] for lines in methods.values())]


def draw_panel(axis, methods: dict[str, dict[str, Any]]) -> None:
    """Draws one metric of a family; a run has one colour and marker in all panels of it."""
    for number, (method, lines) in enumerate(methods.items()):
        colour = f"C{number}"
        for points in lines["seeds"]:
            axis.plot(
                *zip(*points, strict=True) if points else ([], []), c=colour, alpha=0.25, lw=0.7
            )
        xs, ys = zip(*lines["mean"], strict=True) if lines["mean"] else ((), ())
        axis.plot(xs, ys, color=colour, marker=MARKERS[number], ms=5, lw=1.8, label=method)
    axis.set_xlabel("epoch", fontsize=8)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.tick_params(labelsize=8)
    axis.grid(alpha=0.3)


# -- what is out of date --------------------------------------------------------------------------


def stale(joined: Joined, folder: Path) -> dict[Path, dict[str, Any]]:
    """Returns the pictures in `folder` that this script drew of other numbers than the records
    have, with the numbers that they should show.
    """
    found = {}
    for figure in joined.figures:
        words = figure["command"].split()
        if SCRIPT not in words:
            continue
        name = " ".join(words[words.index(SCRIPT) + 1 :][:1])
        if name not in tiers(joined):
            raise UserError(f"figures.yaml: {figure['file']}: {name} is no tier of claims.yaml")
        numbers = numbers_of(tiers(joined)[name], joined)
        if shown_by(folder / figure["file"]) != digest(numbers):
            found[folder / figure["file"]] = numbers
    return found


def shown_by(path: Path) -> str | None:
    """Returns the digest of the numbers that a picture shows; None if it is not this script's."""
    try:
        with documents.opened(path) as file, Image.open(file) as picture:
            return picture.info.get(DIGEST)
    except (OSError, SyntaxError, ValueError):
        return None


def tiers(joined: Joined) -> dict[str, dict[str, str]]:
    """Returns the tiers of claims.yaml by the names that this command has for them."""
    return {tier["prefix"].rstrip("-") or "cifar10": tier for tier in joined.claims["tiers"]}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tier", help="the tier of claims.yaml to draw, for example photos")
    parser.add_argument("--output", type=Path, required=True, help="picture: .png, .pdf or .svg")
    arguments = parser.parse_args(argv)
    pictures.check_target(arguments.output)
    joined = load()
    known = tiers(joined)
    if arguments.tier not in known:
        raise UserError(f"claims.yaml has no tier {arguments.tier}, only {', '.join(known)}")
    numbers = numbers_of(known[arguments.tier], joined)
    if not numbers["families"]:
        raise UserError(f"{arguments.tier}: no record of these runs has a history to draw")
    draw(arguments.output, numbers)
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    sys.exit(command(main))
