"""Pictures of a run: its learning curves, and what all pictures share."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from common.errors import UserError, make_folder
from common.files import replacing
from common.run import metrics

PANELS = (
    ("loss", "loss"),
    ("knn", "k-NN accuracy"),
    ("lr", "learning rate"),
    ("momentum", "momentum of the copy"),
    ("embedding_std", "std of the normalised embedding"),
    ("effective_rank", "effective rank"),
    ("neighbour_purity", "retrieved with the query's label"),
    ("self_matches", "retrieved the query itself"),
    ("grad_norm", "gradient norm"),
)
SHARES = ("knn", "neighbour_purity", "self_matches")  # are shown in percent
VECTOR = {".pdf": {"CreationDate": None}, ".svg": {"Date": None}}  # equal runs, equal files
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


def draw_curves(
    path: Path,
    records: list[dict[str, Any]],
    title: str,
    dim: int,
    own: dict[str, str],
    marks: dict[str, float] | None = None,
) -> None:
    """Draws each metric that a run has over its epochs: steps in pale, epoch means in full colour
    at the middle of their epoch. A panel whose name ends in _ shows all metrics that begin with it.

    `own` are the panels of the recipe's own metrics, name and title, from its card. `dim` is the
    width of the embedding: its std is 1/sqrt(dim) when spread over the sphere. `marks` are epochs
    at which something sets in, by name: each is a dashed line in every panel.
    """
    plt = headless_pyplot()
    epochs = [r for r in records if r["kind"] == "epoch"]
    steps = [r for r in records if r["kind"] == "step"]
    last = max((r["step"] for r in records), default=0)
    per_epoch = max((r["step"] / r["epoch"] for r in epochs if r["epoch"]), default=None)
    logged = [*dict.fromkeys(name for record in records for name in record)]
    shown = [*PANELS[:-1], *own.items(), PANELS[-1]]
    panels = [(lines, label) for p, label in shown if (lines := lines_of(p, logged))]
    figure, axes = grid(plt, even_rows(len(panels), 3), (4, 2.7))
    scale = per_epoch or 1.0
    for axis, (lines, label) in zip(axes, panels, strict=True):
        for name, colour in zip(lines, COLOURS, strict=False):
            pale = [(r["step"], r[name]) for r in steps if name in r]
            bold = metrics.curve(epochs, name)
            for points, style in (
                (pale, {"alpha": 0.35, "lw": 0.8, "marker": "." if len(pale) == 1 else None}),
                (bold, {"lw": 1.8, "marker": "o" if len(bold) < 30 else None, "ms": 3}),
            ):
                if points:
                    x, y = zip(*((step / scale, value) for step, value in points), strict=True)
                    axis.plot(x, y, color=colour, **style)
        if len(lines) > 1:
            for name, colour in zip(lines, COLOURS, strict=False):
                axis.plot([], [], color=colour, label=name.split("_", 1)[1].replace("_", ","))
            axis.legend(fontsize=7, ncols=2)
        if lines == ["embedding_std"]:
            axis.axhline(dim**-0.5, color="grey", ls=":", lw=1)
        if lines[0] in ("embedding_std", *SHARES) or len(lines) > 1:
            axis.set_ylim(bottom=0)
        if lines[0] in SHARES:
            in_percent(axis)
        for epoch in (marks or {}).values():
            if 0 < epoch < last / scale:
                axis.axvline(epoch, color="grey", ls="--", lw=1)
        axis.set_title(label, fontsize=10)
        axis.set_xlim(0, max(last / scale, 1e-9))
        axis.set_xlabel("epoch" if per_epoch else "step", fontsize=8)
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.3)
    said = [f"{name} at epoch {epoch:.3g}" for name, epoch in (marks or {}).items() if epoch > 0]
    figure.suptitle("\n".join([title, *(f"dashed: {text}" for text in said)]), fontsize=11)
    figure.tight_layout()
    save(figure, path, plt)


def even_rows(panels: int, most: int) -> list[int]:
    """Returns how many panels each row has: at most so many, and rows differ by one at most."""
    rows = -(-panels // most)
    least, more = divmod(panels, rows)
    return [least + (row < more) for row in range(rows)]


def grid(plt, counts: Sequence[int], size: tuple[float, float]) -> tuple[Any, list[Any]]:
    """Returns (figure, an axis for each panel) with so many panels in each row, `size` in inches in
    the fullest; those of a row with fewer are wider, so that no place is empty.
    """
    columns = math.lcm(*counts)
    figure = plt.figure(figsize=(size[0] * max(counts), size[1] * len(counts)))
    cells = figure.add_gridspec(len(counts), columns)
    places = [
        cells[row, number * columns // count : (number + 1) * columns // count]
        for row, count in enumerate(counts)
        for number in range(count)
    ]
    return figure, [figure.add_subplot(place) for place in places]


def in_percent(axis) -> None:
    """Shows the values of an axis, which are shares, as percent."""
    from matplotlib.ticker import PercentFormatter

    axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))


def lines_of(panel: str, logged: list[str]) -> list[str]:
    """Returns the metrics that a panel shows, of those that were logged."""
    return [n for n in logged if n == panel or (panel.endswith("_") and n.startswith(panel))]


def show(axis, image: np.ndarray | None, text: str, frame: str) -> None:
    if image is None:
        axis.text(0.5, 0.5, "random\nstart", ha="center", va="center", fontsize=7)
        axis.set_xlim(0, 1)
        axis.set_box_aspect(1)
    else:
        axis.imshow(image)
    axis.set_xticks([])
    axis.set_yticks([])
    axis.set_title(text, fontsize=7)
    for spine in axis.spines.values():
        spine.set_color(frame)
        spine.set_linewidth(2)


def headless_pyplot():
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def check_target(path: Path) -> None:
    """Makes the folder of a picture to come; raises UserError if it cannot be written there."""
    if path.suffix not in (".png", *VECTOR) or path.is_dir():
        raise UserError(f"--output {path}: name a file, like figure.png, figure.pdf or figure.svg")
    make_folder(path.parent)


def save(figure, path: Path, plt, facts: dict[str, str] | None = None) -> None:
    """Writes the picture beside and renames it. A PNG has 256 colours: a third of the size, small
    enough to keep in a repository and inside a page; `facts` become its text chunks. A PDF or SVG
    has lines and letters as they are.
    """
    if path.suffix in VECTOR:
        fonts = {"pdf.fonttype": 42, "svg.fonttype": "none", "svg.hashsalt": "figure"}
        with replacing(path) as beside, plt.rc_context(fonts):
            figure.savefig(beside, format=path.suffix[1:], metadata=VECTOR[path.suffix])
        plt.close(figure)
        return
    chunks = PngInfo()
    for name, text in (facts or {}).items():
        chunks.add_text(name, text)
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=110, format="png")
    plt.close(figure)
    with Image.open(drawn) as picture:
        few = picture.convert("RGB").quantize(256)
    with replacing(path) as beside:
        few.save(beside, "PNG", optimize=True, pnginfo=chunks)
