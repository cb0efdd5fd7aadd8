"""Pictures of a run: its learning curves, and what all pictures share."""

import io
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
COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red")


def draw_curves(
    path: Path,
    records: list[dict[str, Any]],
    title: str,
    dim: int,
    own: dict[str, str],
    marks: dict[str, float] | None = None,
) -> None:
    """Each metric that a run has over its epochs: steps in pale, epoch means in full colour at the
    middle of their epoch. A panel whose name ends in _ shows every metric that begins with it.

    `own` are the panels of the recipe's own metrics, name and title, from its card. `dim` is the
    width of the embedding: its std is 1/sqrt(dim) when spread over the sphere. `marks` are epochs
    at which something sets in, by name: a dashed line in each panel.
    """
    plt = headless_pyplot()
    epochs = [r for r in records if r["kind"] == "epoch"]
    steps = [r for r in records if r["kind"] == "step"]
    last = max((r["step"] for r in records), default=0)
    per_epoch = max((r["step"] / r["epoch"] for r in epochs if r["epoch"]), default=None)
    logged = [*dict.fromkeys(name for record in records for name in record)]
    shown = [*PANELS[:-1], *own.items(), PANELS[-1]]
    panels = [(lines, label) for p, label in shown if (lines := lines_of(p, logged))]
    columns = min(3, max(1, len(panels)))
    rows = max(1, -(-len(panels) // columns))
    figure, axes = plt.subplots(rows, columns, figsize=(4 * columns, 2.7 * rows), squeeze=False)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    scale = per_epoch or 1.0
    for axis, (lines, label) in zip(axes.flat, panels, strict=False):
        for name, colour in zip(lines, COLOURS, strict=False):
            pale = [(r["step"], r[name]) for r in steps if name in r]
            bold = metrics.curve(epochs, name)
            marker = "o" if len(bold) < 30 else None
            for points, style in (
                (pale, {"alpha": 0.35, "lw": 0.8}),
                (bold, {"lw": 1.8, "marker": marker, "ms": 3}),
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
        zero = ("embedding_std", "knn", "neighbour_purity", "self_matches")
        if lines[0] in zero or len(lines) > 1:
            axis.set_ylim(bottom=0)
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


def lines_of(panel: str, logged: list[str]) -> list[str]:
    """The metrics that a panel shows, of those that were logged."""
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
    """Makes the folder of a picture to come; UserError where it cannot be written there as PNG."""
    if path.suffix != ".png" or path.is_dir():
        raise UserError(f"--output {path}: name a file, like neighbours.png")
    make_folder(path.parent)


def save(figure, path: Path, plt, facts: dict[str, str] | None = None) -> None:
    """Writes the picture beside and renames it, in 256 colours: a third of the size, small enough
    to keep in a repository and inside a page. `facts` become the PNG's text chunks.
    """
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
