"""Accuracy against one flag: a point for each run, seeds of one value with their spread.

    python eval/figures/ablation.py RUN [RUN …] --over neighbours --output neighbours.png

The runs differ in that flag and in the seed only. Where results/published.yaml has numbers of the
same method with that setting, they stand in a panel of their own (another data set, another
protocol: the shapes may be compared, the heights not).
"""

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import common.run.early  # noqa: F401  # isort: skip
from common import cards
from common.errors import UserError, command, nearest_name
from common.run import documents, pictures, results
from common.run.help import in_80_columns
from results.record import PLACES

PUBLISHED = Path(__file__).resolve().parents[2] / "results" / "published.yaml"
# a published row without settings is of the paper's main setting
MAIN_SETTINGS = {"SNCLR": {"neighbours": 30, "queue_size": 128000}}


def points_of(runs: Sequence[Path], flag: str) -> tuple[dict[str, Any], dict[float, list[float]]]:
    """Returns (the first run's configuration, k-NN accuracies in percent by value of the flag)."""
    points: dict[float, list[float]] = {}
    first: dict[str, Any] = {}
    for run in runs:
        if not (run / "results.json").exists():
            raise UserError(f"{run} is no finished run: it has no results.json")
        config = documents.read_yaml(run / "config.yaml", "config", ("recipe", "arch"))
        first = first or config
        if flag not in config:
            raise UserError(f"{run}: no flag {flag}{nearest_name(flag, config)}")
        if isinstance(config[flag], bool) or not isinstance(config[flag], int | float):
            raise UserError(f"--over {flag}: {config[flag]!r} is no number to plot against")
        differing = {n for n in {*first, *config} if first.get(n) != config.get(n)}
        differing -= {flag, "seed", *PLACES}
        if differing:
            raise UserError(f"{run} differs from {runs[0]} in {', '.join(sorted(differing))} too")
        knn = results.read(run, ("knn",))["knn"]
        if knn is None:
            raise UserError(f"{run} has no k-NN accuracy")
        points.setdefault(float(config[flag]), []).append(100 * knn)
    return first, dict(sorted(points.items()))


def published_points(method: str, flag: str, path: Path = PUBLISHED) -> tuple[str, list]:
    """Returns (what they are, [(value of the flag, number)]) of a method in published.yaml."""
    base = method.removesuffix(" (official)")
    main = MAIN_SETTINGS.get(base, {}).get(flag)
    rows = documents.read_yaml(path, "published")
    rows = [r for r in rows if r["method"] == base and r["value"]]
    varied = [r for r in rows if flag in (r.get("settings") or {})]
    if not varied or main is None:
        return "", []
    like = varied[0]
    keys = ("arch", "epochs", "dataset", "protocol", "metric")
    found = {row["settings"][flag]: row["value"] for row in varied}
    for row in rows:
        if not row.get("settings") and all(row[k] == like[k] for k in keys):
            found[main] = row["value"]
    what = f"published: {like['dataset']}, {like['arch']}, {like['protocol']}"
    return what, sorted(found.items())


def draw(path: Path, flag: str, panels: list[tuple[str, str, dict[float, list[float]]]]) -> None:
    plt = pictures.headless_pyplot()
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.4), squeeze=False)
    for axis, (title, label, points) in zip(axes.flat, panels, strict=True):
        values = [*points]
        means = [statistics.fmean(points[v]) for v in values]
        spreads = [statistics.stdev(points[v]) if len(points[v]) > 1 else 0.0 for v in values]
        axis.errorbar(range(len(values)), means, yerr=spreads, marker="o", capsize=3)
        axis.set_xticks(range(len(values)), [f"{v:g}" for v in values])
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(flag.replace("_", " "), fontsize=9)
        axis.set_ylabel(label, fontsize=9)
        if any(spreads):
            axis.plot([], [], color="C0", marker="o", label="mean and std over seeds")
            axis.legend(fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    figure.tight_layout()
    pictures.save(figure, path, plt)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="finished run folders")
    parser.add_argument("--over", required=True, help="the flag, as neighbours or queue-size")
    parser.add_argument("--output", type=Path, required=True, help="picture: .png, .pdf or .svg")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    pictures.check_target(arguments.output)
    flag = arguments.over.replace("-", "_")
    config, points = points_of(arguments.runs, flag)
    if len(points) < 2:
        raise UserError(f"--over {arguments.over}: all runs have the same value")
    method = cards.method_of(config["recipe"], config)
    found = results.read(arguments.runs[0], ("dataset", "epoch"))
    title = f"{method}, {config['arch']}, {found['dataset']}, {found['epoch']:g} epochs"
    panels = [(title, "k-NN accuracy, %", points)]
    what, published = published_points(method, flag)
    if published:
        panels.append((what, "top-1, %", {value: [number] for value, number in published}))
    draw(arguments.output, flag, panels)
    for value, accuracies in points.items():
        print(f"{flag} {value:g}: {', '.join(f'{a:.2f}' for a in accuracies)} %")
    print(f"wrote {arguments.output}")


if __name__ == "__main__":
    sys.exit(command(main))
