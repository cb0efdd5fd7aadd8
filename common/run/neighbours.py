"""What a support set gives for a few images: looked up as the recipe does it, and drawn."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.data.images import Images
from common.data.loaders import center_batches
from common.errors import UserError
from common.fast.center import center_view
from common.fast.pixels import to_input
from common.run import pictures
from common.support_set import SupportSet

MAX_SIDE = 112  # of a shown image, in pixels


@dataclass
class Lookup:
    """A recipe's state at one moment: what looks up, and where."""

    epoch: float
    queue: SupportSet
    select: Callable[[Tensor], Tensor]  # images -> the embedding that is looked up
    # images and their neighbours (N,k,D) -> weights (N,k), as SNCLR's positiveness
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None


@dataclass
class Found:
    """Neighbours of the queries at one moment, best first: ids, cosines and weights, (N,k) each."""

    epoch: float
    ids: np.ndarray
    cosines: np.ndarray
    weights: np.ndarray | None

    def best(self, shown: int) -> "Found":
        """Returns the first `shown` of them."""
        weights = None if self.weights is None else self.weights[:, :shown]
        return Found(self.epoch, self.ids[:, :shown], self.cosines[:, :shown], weights)


@torch.no_grad()
def look_up(at: Lookup, images: Images, queries: np.ndarray, size: int, k: int) -> Found:
    """Finds the k entries of the queue that are nearest to each query's center view, or all of them
    if there are fewer. An entry of the query itself never counts; raises UserError if none is left.
    """
    entries = at.queue.embeddings
    ids = torch.from_numpy(queries).to(entries.device)
    own = int((at.queue.ids == ids[:, None]).sum(dim=1).max())
    if (k := min(k, at.queue.size - own)) < 1:
        raise UserError("the queue holds nothing but the query itself")
    pixels = torch.cat([*center_batches(images, queries, size)])
    x = to_input(pixels, entries.device, entries.dtype)
    z = at.select(x)
    neighbours, positions = at.queue.nearest(z, k, exclude_ids=ids)
    cosines = torch.einsum("nd,nkd->nk", F.normalize(z.to(entries.dtype), dim=1), neighbours)
    weights = at.weigh(x, neighbours).float().cpu().numpy() if at.weigh else None
    return Found(at.epoch, at.queue.ids[positions].cpu().numpy(), cosines.cpu().numpy(), weights)


def purity(found: Found, images: Images, queries: np.ndarray) -> float | None:
    """Returns the share of neighbours with the query's label; None without labels or neighbours."""
    if images.labels is None or not (found.ids >= 0).any():
        return None
    same = images.labels[found.ids.clip(min=0)] == images.labels[queries][:, None]
    return float(same[found.ids >= 0].mean())


def draw(
    path: Path, images: Images, queries: np.ndarray, moments: list[Found], size: int, title: str
) -> None:
    """Draws a row for each query, with a block of neighbours for each moment."""
    plt = pictures.headless_pyplot()
    k = min(found.ids.shape[1] for found in moments)
    widths = [1.0] + ([0.25] + [1.0] * k) * len(moments)
    figure, axes = plt.subplots(
        len(queries),
        len(widths),
        figsize=(0.82 * sum(widths), 1.2 * len(queries) + 1.0),
        squeeze=False,
        gridspec_kw={"width_ratios": widths, "wspace": 0.06, "hspace": 0.45},
    )
    side = min(size, MAX_SIDE)
    for row, query in enumerate(queries):
        pictures.show(axes[row, 0], thumbnail(images, query, side), "", "black")
        for number, found in enumerate(moments):
            first = 1 + number * (k + 1)
            axes[row, first].axis("off")
            for column in range(k):
                sample = int(found.ids[row, column])
                text = f"{found.cosines[row, column]:.2f}"
                if found.weights is not None:
                    text = f"w {found.weights[row, column]:.4f}\ncos {text}"
                image = thumbnail(images, sample, side) if sample >= 0 else None
                frame = frame_of(images, query, sample)
                pictures.show(axes[row, first + 1 + column], image, text, frame)
    figure.suptitle(title, fontsize=10)
    legend = add_legend(plt, figure, images, moments)
    figure.set_figheight(figure.get_figheight() + legend)
    above, below = 1.0 / figure.get_figheight(), (0.1 + legend) / figure.get_figheight()
    figure.subplots_adjust(left=0.02, right=0.98, bottom=below, top=1 - above)
    height = 1.62 if moments[0].weights is not None else 1.38  # above the first row's numbers
    axes[0, 0].annotate("query", (0.5, height), xycoords="axes fraction", ha="center", fontsize=9)
    for number, found in enumerate(moments):
        share = purity(found, images, queries)
        label = f"epoch {found.epoch:g}"
        label += f": {share:.0%} of the label" if share is not None else ""
        axis = axes[0, 2 + number * (k + 1)]
        axis.annotate(label, (0, height), xycoords="axes fraction", ha="left", fontsize=9)
    pictures.save(figure, path, plt)


def add_legend(plt, figure, images: Images, moments: list[Found]) -> float:
    """Says below the picture what the frames' colours and the numbers above the images mean, in as
    many columns as it is wide; returns its height in inches.
    """
    colours = {"tab:green": "the query's label", "tab:red": "another label"}
    said = {} if images.labels is None else colours
    grey = ["no label"] if images.labels is None else []
    grey += ["no image: random start"] if any((found.ids < 0).any() for found in moments) else []
    said = said | ({"grey": " or ".join(grey)} if grey else {})
    patch = plt.matplotlib.patches.Patch
    handles = [patch(facecolor="white", edgecolor=c, lw=2, label=t) for c, t in said.items()]
    weighed = any(found.weights is not None for found in moments)
    number = "cos: cosine with the query" if weighed else "number: cosine with the query"
    numbers = ["w: positiveness, the weight in the loss"] * weighed + [number]
    handles += [plt.Line2D([], [], lw=0, label=text) for text in numbers]
    how = {"loc": "lower center", "fontsize": 8, "frameon": False}
    for columns in range(len(handles), 0, -1):
        legend = figure.legend(handles=handles, ncols=columns, **how)
        box = legend.get_window_extent()
        if box.width <= figure.bbox.width or columns == 1:
            break
        legend.remove()
    return box.height / figure.dpi


def thumbnail(images: Images, sample: int, side: int) -> np.ndarray:
    return center_view(images.load(int(sample)), side).permute(1, 2, 0).numpy()


def frame_of(images: Images, query: int, sample: int) -> str:
    if sample < 0 or images.labels is None:
        return "grey"
    return "tab:green" if images.labels[sample] == images.labels[query] else "tab:red"
