"""Runs side by side: what differs first, then how they went, and their curves in one picture."""

import argparse
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.run import documents, metrics, pictures, results
from results.record import PLACES

CURVES = (
    ("loss", "loss"),
    ("knn", "k-NN accuracy"),
    ("embedding_std", "std of the normalised embedding"),
    ("effective_rank", "effective rank"),
    ("neighbour_purity", "retrieved with the query's label"),
    ("images_per_second", "images per second"),
)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="report.py compare", description="Configurations, metrics and curves of runs."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders")
    parser.add_argument("--output", type=Path, default=None, help="picture: .png, .pdf or .svg")
    arguments = parser.parse_args(argv)
    if arguments.output:
        pictures.check_target(arguments.output)
    runs = [load(run) for run in arguments.runs]
    names = short_names(arguments.runs)
    print(text(names, runs))
    if arguments.output:
        draw(arguments.output, names, runs)
        print(f"\nwrote {arguments.output}")


def load(folder: Path) -> dict[str, Any]:
    """Returns config, metrics and, if the run is finished, results."""
    if not (folder / "config.yaml").exists():
        raise UserError(f"{folder} is no run folder: it has no config.yaml")
    finished = folder / "results.json"
    return {
        "config": documents.read_yaml(folder / "config.yaml", "config"),
        "metrics": metrics.read(folder / metrics.NAME),
        "results": results.read(folder, ("hours", "epoch", "knn")) if finished.exists() else None,
    }


def short_names(folders: list[Path]) -> list[str]:
    """Returns the folders' names, with their parents' if two are alike."""
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [f"{f.resolve().parent.name}/{f.resolve().name}" for f in folders]
    return names


def text(names: list[str], runs: list[dict[str, Any]]) -> str:
    """Returns a table: flags that differ, then metrics, then how many flags are the same."""
    flags = list(dict.fromkeys(name for run in runs for name in run["config"]))
    flags = [flag for flag in flags if flag not in ("plan", "settings")]
    values = {flag: [show(run["config"].get(flag, "–")) for run in runs] for flag in flags}
    differing = [f for f in flags if len(set(values[f])) > 1 and f not in PLACES]
    rows = [("", names)] + [(flag, values[flag]) for flag in differing]
    rows.append(None)
    last = [last_of(run) for run in runs]
    rows += [(m, [show(one.get(m, "–")) for one in last]) for m in MEASURED]
    widths = [max(len(r[1][i]) for r in rows if r) for i in range(len(runs))]
    left = max(len(r[0]) for r in rows if r)
    lines = []
    for row in rows:
        if row is None:
            lines.append("-" * (left + sum(widths) + 2 * len(widths)))
            continue
        cells = (cell.rjust(width) for cell, width in zip(row[1], widths, strict=True))
        lines.append("  ".join([row[0].ljust(left), *cells]).rstrip())
    same = len(flags) - len(differing)
    return "\n".join([*lines, f"{same} flags are the same or only say where files are"])


MEASURED = ("epochs done", "loss", "knn before", "knn", "embedding_std", "effective_rank")
MEASURED += ("neighbour_purity", "images_per_second", "hours")


def last_of(run: dict[str, Any]) -> dict[str, Any]:
    """Returns what the run's last epoch says, and its results if it is finished."""
    epochs = [r for r in run["metrics"] if r["kind"] == "epoch"]
    steps = [r for r in run["metrics"] if r["kind"] == "step"]
    values: dict[str, Any] = {}
    for record in [*steps[-1:], *epochs]:
        values |= record
    with_knn = [r for r in epochs if "knn" in r]
    before = next((r["knn"] for r in with_knn if r["epoch"] == 0), None)
    values["knn before"] = "–" if before is None else f"{before:.1%}"
    trained = [r["knn"] for r in with_knn if r["epoch"] > 0]
    values["knn"] = f"{trained[-1]:.1%}" if trained else "–"
    values["epochs done"] = max((r["epoch"] for r in epochs), default=0)
    if found := run["results"]:  # of the last step, which may be within an epoch (--max-steps)
        values |= {"hours": found["hours"], "epochs done": found["epoch"]}
        if found["knn"] is not None:
            values["knn"] = f"{found['knn']:.1%}"
    return values


def show(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return str(value)
    return f"{value:.4g}"


def draw(path: Path, names: list[str], runs: list[dict[str, Any]]) -> None:
    """Draws epoch means at the middle of their epochs, a panel for each metric that any run has; a
    run's line has one colour in all of them.
    """
    plt = pictures.headless_pyplot()
    panels = [c for c in CURVES if any(c[0] in r for run in runs for r in epochs_of(run))]
    if not panels:
        raise UserError("--output: none of these runs has an epoch to draw")
    figure, axes = pictures.grid(plt, pictures.even_rows(len(panels), 3), (4.2, 3))
    # ten colours, then the same ones dashed
    styles = [{"c": f"C{i % 10}", "ls": ("-", "--", ":")[i // 10 % 3]} for i in range(len(runs))]
    for axis, (metric, label) in zip(axes, panels, strict=True):
        for run, style in zip(runs, styles, strict=True):
            if points := metrics.curve(run["metrics"], metric):
                steps, values = zip(*points, strict=True)
                scale = steps_per_epoch(run)
                axis.plot([step / scale for step in steps], values, marker="o", ms=3, **style)
        axis.set_title(label, fontsize=10)
        axis.set_xlabel("epoch", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
        if metric != "loss":
            axis.set_ylim(bottom=0)
        if metric in pictures.SHARES:
            pictures.in_percent(axis)
    handles = [plt.Line2D([], [], **style) for style in styles]
    figure.legend(handles, names, loc="lower center", ncols=min(4, len(names)), fontsize=8)
    figure.tight_layout(rect=(0, 0.06 + 0.03 * (len(names) // 5), 1, 1))
    pictures.save(figure, path, plt)


def epochs_of(run: dict[str, Any]) -> list[dict[str, Any]]:
    return [r for r in run["metrics"] if r["kind"] == "epoch"]


def steps_per_epoch(run: dict[str, Any]) -> float:
    return next((r["step"] / r["epoch"] for r in epochs_of(run) if r["epoch"]), 1.0)
