"""The lab's picture of what views are worth: how much k-NN is lost without some, over training."""

import math
import statistics
from pathlib import Path
from typing import Any

from common.run import pictures
from results import lab
from results.claims import Runs
from results.lab_methods import COLUMNS, TWO, finish, panels

STYLES = (("o", "-"), ("s", "--"), ("^", ":"))  # of a panel's lines, in the order of claims.yaml
BEYOND = 1.5  # where published drops stand, in multiples of the most views seen


def drops(what: dict[str, Any], runs: Runs) -> dict[str, Any]:
    """Returns, for each panel of claims.yaml's `drops`, the points of each line that has run."""
    panels, order = {}, {}
    for label, panel in what.get("drops", {}).items():
        order |= dict.fromkeys(panel["lines"])
        views = panel.get("views", TWO)
        lines = {name: drop(runs, *arms, views) for name, arms in panel["lines"].items()}
        if any(lines.values()):
            published = panel.get("published", {})
            panels[label] = {
                "lines": {name: points for name, points in lines.items() if points},
                "published": {name: value for name, value in published.items() if lines[name]},
            }
    return {"order": [*order], "panels": panels} if panels else {}


def arms_of(what: dict[str, Any]) -> list[str]:
    """Lists the runs of all panels."""
    panels = what.get("drops", {}).values()
    return [arm for panel in panels for pair in panel["lines"].values() for arm in pair]


def drop(runs: Runs, whole: str, fewer: str, views: int) -> list[dict[str, float]]:
    """Returns the points of k-NN lost, paired by seed, with their 95 % interval, at each epoch at
    which every run measured it, and the views of an image that it had seen by then.
    """
    arms = [lab.of_arm(runs, arm) for arm in (whole, fewer)]
    pairs = [[curve(arm[seed]) for arm in arms] for seed in arms[0] if seed in arms[1]]
    if not pairs:
        return []
    common = set.intersection(*({*one} for pair in pairs for one in pair))
    found = []
    for epoch in sorted(common):
        lost = [100 * (pair[0][epoch] - pair[1][epoch]) for pair in pairs]
        point = {"views": views * epoch, "mean": round(statistics.fmean(lost), 3)}
        if len(lost) > 1:
            between = lab.interval(lost)
            point |= {"low": round(between.low, 3), "high": round(between.high, 3)}
        found.append(point)
    return found


def curve(one: lab.Measured) -> dict[float, float]:
    """Returns a run's k-NN by epoch, without that of its start."""
    both = zip(one.curve["epoch"], one.curve["knn"], strict=True)
    return {epoch: value for epoch, value in both if value is not None and epoch > 0}


def caption(numbers: dict[str, Any]) -> str:
    return (
        "What views are worth over training: points of k-NN that a method loses without some of "
        "them, at equal epochs, over the views of an image that the whole method has seen; mean "
        "over seeds, paired, with its 95 % interval. Hollow diamonds at the right: what "
        "the paper's method loses, at its own scale and by its own read-out."
    )


def draw(path: Path, numbers: dict[str, Any]) -> None:
    """Draws a panel for each method."""
    plt = pictures.headless_pyplot()
    shown, style = numbers["panels"], dict(zip(numbers["order"], STYLES, strict=False))
    seen = {p["views"] for of in shown.values() for line in of["lines"].values() for p in line}
    paper = max(seen) * BEYOND
    columns = min(COLUMNS, len(shown))
    figure, axes = panels(plt, shown, columns, 2.0)
    for axis, of in zip(axes, shown.values(), strict=True):
        draw_lines(axis, of["lines"], style)
        for value in of["published"].values():
            axis.plot(paper, value, "kD", mfc="white", ms=6)
        axis.axhline(0, color="0.35", lw=0.8)
        axis.set_xscale("log")
        axis.set_xlim(min(seen) / BEYOND, paper * BEYOND)
        axis.set_xticks([*doublings(seen), paper], [*map("{:g}".format, doublings(seen)), "paper"])
        axis.minorticks_off()
    for name in numbers["order"]:
        if any(name in of["lines"] for of in shown.values()):
            axes[0].plot([], [], "k", marker=style[name][0], ls=style[name][1], ms=4.5, label=name)
    axes[0].plot([], [], "kD", mfc="white", ms=6, lw=0, label="published")
    for axis in axes[::columns]:
        axis.set_ylabel("points of k-NN lost", fontsize=9)
    for axis in axes[-columns:]:
        axis.set_xlabel("views of an image", fontsize=9)
    finish(figure, path, plt, axes[0], "What views are worth", numbers)


def draw_lines(axis, lines: dict[str, list[dict[str, float]]], style: dict[str, Any]) -> None:
    """Draws each line with its intervals."""
    for name, points in lines.items():
        marker, line = style[name]
        xs, means = [p["views"] for p in points], [p["mean"] for p in points]
        lows, highs = ([p.get(end, p["mean"]) for p in points] for end in ("low", "high"))
        axis.vlines(xs, lows, highs, color="black", lw=1.1)
        axis.plot(xs, means, "k", marker=marker, ls=line, ms=4.5, lw=1.2)


def doublings(seen: set[float]) -> list[float]:
    """Returns the least of these numbers and its doublings up to the largest, at most five."""
    least, most = min(seen), max(seen)
    found = [least * 2**n for n in range(math.floor(math.log2(most / least)) + 1)]
    return found[:: math.ceil(len(found) / 5)]
