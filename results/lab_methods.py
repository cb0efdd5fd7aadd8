"""The lab's pictures of all methods: their accuracies, and how many directions they use."""

import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.run import pictures
from results import curves, lab
from results.claims import Runs

TWO = 2  # views of an image in a step, of most methods
LINES = {"embedding": "-", "representation": "--"}
COLUMNS = 4
LEGEND = 3  # entries in a line: those of the controls are long
FLOOR = -6.0  # decades below the largest: what is less is float32's rounding
MARKS = {"k-NN": ("o", "black"), "linear": ("s", "0.55"), "k-NN, at equal views": ("o", "white")}


def seeds_of(what: dict[str, Any], runs: Runs) -> dict[str, tuple[int, list[lab.Measured]]]:
    """Returns (views in a step, seeds) of each of claims.yaml's `methods` that has run."""
    found = {
        label: (of.get("views", TWO), [*lab.of_arm(runs, of["run"]).values()])
        for label, of in what.get("methods", {}).items()
    }
    return {label: both for label, both in found.items() if both[1]}


# -- accuracies -----------------------------------------------------------------------------------


def accuracies(what: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """Returns mean, low and high of each mark of each method, and its random encoder's k-NN."""
    rows = {}
    for label, (views, ones) in seeds_of(what, runs).items():
        marks = {"k-NN": [one.knn for one in ones], "linear": [one.linear for one in ones]}
        if views > TWO:
            marks["k-NN, at equal views"] = [at_equal_views(one, views) for one in ones]
        found = {name: span(values) for name, values in marks.items() if None not in values}
        rows[label] = {"random": mean_of([one.random for one in ones]), "marks": found}
    return {"rows": rows} if rows else {}


def at_equal_views(one: lab.Measured, views: int) -> float | None:
    """Returns the k-NN after so many epochs as have the views of a method with two; None if it was
    not measured there.
    """
    epoch = one.curve["epoch"][-1] * TWO / views
    value = dict(zip(one.curve["epoch"], one.curve["knn"], strict=True)).get(epoch)
    return None if value is None else 100 * value


def span(values: Sequence[float]) -> dict[str, float]:
    """Returns the mean and its 95 % interval, which a single seed has not."""
    mean = {"mean": mean_of(values)}
    if len(values) < 2:
        return mean
    found = lab.interval(values)
    return mean | {"low": round(float(found.low), 3), "high": round(float(found.high), 3)}


def mean_of(values: Sequence[float]) -> float:
    return round(statistics.fmean(values), 3)


def accuracies_caption(numbers: dict[str, Any]) -> str:
    return (
        "All methods that have run whole, in no order of merit: accuracy on test images after "
        "equal epochs, mean over seeds with its 95 % interval. Black: k-NN; grey square: linear "
        "read-out; hollow: k-NN of a method with four views in a step once it has seen as many as "
        "the others at their end (its rate is then still high). The short bar is the random "
        "encoder's k-NN."
    )


def draw_accuracies(path: Path, numbers: dict[str, Any]) -> None:
    plt = pictures.headless_pyplot()
    rows = numbers["rows"]
    figure, axis = plt.subplots(figsize=(9, 1.9 + 0.36 * len(rows)))
    for y, row in enumerate(rows.values()):
        axis.vlines(row["random"], y - 0.25, y + 0.25, color="0.35", lw=2.5)
        for n, (name, found) in enumerate(row["marks"].items()):
            at, (marker, fill) = y + 0.2 * (n - 0.5), MARKS[name]
            if "low" in found:
                axis.hlines(at, found["low"], found["high"], color="black", lw=1.2, zorder=2)
            axis.plot(found["mean"], at, "k", marker=marker, mfc=fill, ms=6, zorder=3)
    for name, (marker, fill) in MARKS.items():
        axis.plot([], [], "k", marker=marker, mfc=fill, ms=6, lw=0, label=name)
    axis.plot([], [], marker="|", ms=10, mew=2.5, color="0.35", lw=0, label="its random encoder")
    axis.set_yticks(range(len(rows)), rows, fontsize=9)
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("accuracy on test images, %", fontsize=9)
    axis.grid(axis="x", alpha=0.3)
    finish(figure, path, plt, axis, "All methods", numbers)


# -- singular values ------------------------------------------------------------------------------


def spectra(what: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """Returns decades below the largest singular value, the mean over seeds, of each method."""
    found = {}
    for label, (_, ones) in seeds_of(what, runs).items():
        last = [one.record["geometry"][0][-1] for one in ones]
        found[label] = {
            where: decades([lay[where]["singular_values"] for lay in last]) for where in LINES
        }
    return {"methods": found} if found else {}


def decades(by_seed: list[list[float]]) -> list[float]:
    """Returns log10 of each singular value over the largest, its mean over seeds."""
    least = 10**FLOOR
    relative = [
        [math.log10(max(least, value / max(values[0], least))) for value in values]
        for values in by_seed
    ]
    return [round(statistics.fmean(column), 4) for column in zip(*relative, strict=True)]


def spectra_caption(numbers: dict[str, Any]) -> str:
    return (
        "Singular values, largest first, of the embedding (the projector's output; solid) and of "
        "the representation (what is evaluated; dashed), centred, on 2 000 test images after the "
        "last epoch, relative to the largest, mean over seeds: a line that falls early uses few "
        "directions."
    )


def draw_spectra(path: Path, numbers: dict[str, Any]) -> None:
    """Draws a panel for each method."""
    plt = pictures.headless_pyplot()
    methods = numbers["methods"]
    figure, axes = panels(plt, methods, COLUMNS, 1.6)
    for axis, lines in zip(axes, methods.values(), strict=True):
        for where, style in LINES.items():
            values = lines[where]
            axis.plot(range(1, len(values) + 1), values, "k", ls=style, lw=1.4, label=where)
    figure.supylabel("log10 of value / largest", fontsize=9)
    finish(figure, path, plt, axes[0], "Singular values, largest first", numbers)


def panels(plt, titles: Iterable[str], columns: int, height: float) -> tuple[Any, list[Any]]:
    """Returns a figure and a panel for each title, in rows of so many, on common axes."""
    titles = [*titles]
    rows = -(-len(titles) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(9, 1.1 + height * rows), sharex=True, sharey=True, squeeze=False
    )
    for axis, title in zip(axes.flat, titles, strict=False):
        axis.set_title(title, fontsize=9)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=8, labelbottom=True)
    for axis in axes.flat[len(titles) :]:
        axis.set_visible(False)
    return figure, [*axes.flat[: len(titles)]]


def finish(figure, path: Path, plt, axis, title: str, numbers: dict[str, Any]) -> None:
    """Puts the title above and the legend of `axis`, at most three to a line, below all panels, and
    saves.
    """
    handles, labels = axis.get_legend_handles_labels()
    lines = math.ceil(len(labels) / LEGEND)
    columns = math.ceil(len(labels) / lines)
    figure.legend(handles, labels, loc="lower center", ncols=columns, fontsize=8.5, frameon=False)
    figure.suptitle(f"{title}\n{numbers['title']}", fontsize=11)
    figure.tight_layout(rect=(0, (0.1 + 0.22 * lines) / figure.get_figheight(), 1, 1))
    pictures.save(figure, path, plt, {curves.DIGEST: curves.digest(numbers)})
