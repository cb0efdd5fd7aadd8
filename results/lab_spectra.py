"""The lab's picture of singular values: how many directions embedding and representation use."""

import math
import statistics
from pathlib import Path
from typing import Any

from common.run import pictures
from results import curves, lab
from results.claims import Runs

COLUMNS = 4
FLOOR = -6.0  # decades below the largest: what is less is float32's rounding
STYLES = {"embedding": "-", "representation": "--"}


def of_runs(what: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """Returns decades below the largest singular value, the mean over seeds, of each method of
    `spectra` that has run; {} if none has.
    """
    found = {}
    for label, arm in what.get("spectra", {}).items():
        if ones := lab.of_arm(runs, arm).values():
            last = [one.record["geometry"][0][-1] for one in ones]
            found[label] = {
                where: decades([lay[where]["singular_values"] for lay in last]) for where in STYLES
            }
    return {"methods": found, "arms": [what["spectra"][label] for label in found]} if found else {}


def decades(by_seed: list[list[float]]) -> list[float]:
    """Returns log10 of each singular value over the largest, its mean over seeds."""
    least = 10**FLOOR
    relative = [
        [math.log10(max(least, value / max(values[0], least))) for value in values]
        for values in by_seed
    ]
    return [round(statistics.fmean(column), 4) for column in zip(*relative, strict=True)]


def caption(numbers: dict[str, Any]) -> str:
    return (
        "Singular values of the embedding (what the loss sees; solid) and of the representation "
        "(what is evaluated; dashed) on 2 000 test images after the last epoch, relative to the "
        "largest, mean over seeds: a line that falls early uses few directions."
    )


def draw(path: Path, numbers: dict[str, Any]) -> None:
    """Draws a panel for each method."""
    plt = pictures.headless_pyplot()
    methods = numbers["methods"]
    rows = -(-len(methods) // COLUMNS)
    figure, axes = plt.subplots(
        rows, COLUMNS, figsize=(9, 1.1 + 1.6 * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis, (label, lines) in zip(axes.flat, methods.items(), strict=False):
        for where, style in STYLES.items():
            axis.plot(range(1, len(lines[where]) + 1), lines[where], "k", ls=style, lw=1.4)
        axis.set_title(label, fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8, labelbottom=True)
    for axis in axes.flat[len(methods) :]:
        axis.set_visible(False)
    for style in STYLES.items():
        axes.flat[0].plot([], [], "k", ls=style[1], lw=1.4, label=style[0])
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=2, fontsize=8.5, frameon=False)
    figure.supylabel("log10 of the value / the largest", fontsize=9)
    figure.suptitle(f"Singular values, by rank\n{numbers['title']}", fontsize=11)
    figure.tight_layout(rect=(0, 0.3 / figure.get_figheight(), 1, 1))
    pictures.save(figure, path, plt, {curves.DIGEST: curves.digest(numbers)})
