"""Neighbours that a run's support set gives to fixed queries: over training, or by positiveness.

    python eval/figures/neighbours.py evolution RUN --output evolution.png       # NNCLR Fig. 1
    python eval/figures/neighbours.py positiveness RUN --output positive.png # SNCLR Fig. 3 and 4

`evolution` takes the snapshots that the run kept (--snapshot-epochs 0,1,10 of any recipe with a
queue) and its last checkpoint: a row for each query, a block of columns for each epoch. Green
frames have the query's label, red ones another; grey is an entry of the queue's random start.
`positiveness` (SNCLR) shows the last checkpoint's neighbours in the order of their weight.
"""

import argparse
import dataclasses
import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from common.augment import center_view
from common.data.images import Images
from common.data.loaders import center_batches
from common.data.sets import load_dataset
from common.data.splits import parts
from common.errors import UserError, command
from common.fast.pixels import to_input
from common.models import full_precision, momentum_copy
from common.run import checkpoint, pictures
from common.support_set import SupportSet

MAX_SIDE = 112  # of a shown image, in pixels


@dataclass
class Lookup:
    """A recipe's state at one moment: what looks up, and where."""

    epoch: float
    queue: SupportSet
    select: Callable[[Tensor], Tensor]  # images -> the embedding that is looked up
    weigh: Callable[[Tensor, Tensor], Tensor] | None = None  # SNCLR: images, neighbours -> weights


def restore(run: Path, path: Path) -> Lookup:
    """The look-up of a run at one of its checkpoints."""
    saved = yaml.safe_load((run / "config.yaml").read_text())
    name = saved.pop("recipe")
    recipe = importlib.import_module(f"recipes.{name}")
    fields = {f.name for f in dataclasses.fields(recipe.Config)}
    config = recipe.Config(**{n: v for n, v in saved.items() if n in fields})
    state = checkpoint.load(path)
    if "queue" not in state["state"]:
        raise UserError(f"{run}: {name} has no support set, so there are no neighbours to show")
    embeddings = state["state"]["queue"]["ranks"][0]
    queue = SupportSet(*embeddings["embeddings"].shape)
    queue.load_state_dict(embeddings)
    network, select, weigh = NETWORKS[name](recipe, config, state["state"])
    network.eval()
    return Lookup(state["epoch"], queue, select, weigh)


def of_nnclr(recipe, config, state: dict[str, Any]):
    model = recipe.NNCLR(config)
    model.load_state_dict(state["model"])
    if not config.momentum_encoder:
        return model, model.f, None
    f_m = momentum_copy(model.f)
    f_m.load_state_dict(state["f_m"])
    return f_m, f_m, None


def of_nnsiam(recipe, config, state: dict[str, Any]):
    model = recipe.NNSiam(config)
    model.load_state_dict(state["model"])
    return model, model.f, None


def of_snclr(recipe, config, state: dict[str, Any]):
    model = recipe.SNCLR(config)
    target = momentum_copy(model.branch)
    model.load_state_dict(state["model"])
    target.load_state_dict(state["target"])
    model.eval()

    def weigh(x: Tensor, near: Tensor) -> Tensor:
        return recipe.positiveness(*full_precision(model.branch(x)), near)

    return target, target, weigh


NETWORKS = {"nnclr": of_nnclr, "nnsiam": of_nnsiam, "snclr": of_snclr}


# -- looking up and drawing -----------------------------------------------------------------------


@dataclass
class Found:
    """Neighbours of the queries at one moment: ids, cosines and, for SNCLR, weights, (N,k) each."""

    epoch: float
    ids: np.ndarray
    cosines: np.ndarray
    weights: np.ndarray | None


@torch.no_grad()
def look_up(at: Lookup, images: Images, queries: np.ndarray, size: int, k: int) -> Found:
    """The k nearest entries to the center views of the queries, never their own."""
    dtype = at.queue.embeddings.dtype
    x = to_input(torch.cat([*center_batches(images, queries, size)]), torch.device("cpu"), dtype)
    z = at.select(x)
    ids = torch.from_numpy(queries)
    neighbours, positions = at.queue.nearest(z, k, exclude_ids=ids)
    cosines = torch.einsum("nd,nkd->nk", torch.nn.functional.normalize(z, dim=1), neighbours)
    weights = at.weigh(x, neighbours).numpy() if at.weigh else None
    return Found(at.epoch, at.queue.ids[positions].numpy(), cosines.numpy(), weights)


def choose_queries(images: Images, count: int, seed: int) -> np.ndarray:
    """One image of each of `count` classes, drawn from the seed; without labels, any images."""
    rng = np.random.default_rng(seed)
    if images.labels is None:
        return np.sort(rng.choice(len(images), min(count, len(images)), replace=False))
    classes = np.unique(images.labels)
    spread = np.linspace(0, len(classes) - 1, min(count, len(classes))).round().astype(int)
    return np.array([rng.choice(np.flatnonzero(images.labels == classes[c])) for c in spread])


def purity(found: Found, images: Images, queries: np.ndarray) -> float | None:
    """Share of the shown neighbours with the query's label; None without labels or neighbours."""
    if images.labels is None or not (found.ids >= 0).any():
        return None
    same = images.labels[found.ids.clip(min=0)] == images.labels[queries][:, None]
    return float(same[found.ids >= 0].mean())


def draw(
    path: Path, images: Images, queries: np.ndarray, moments: list[Found], size: int, title: str
) -> None:
    """A row for each query; a block of neighbours for each moment."""
    plt = pictures.headless_pyplot()
    k = moments[0].ids.shape[1]
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
    above, below = 1.0 / figure.get_figheight(), 0.1 / figure.get_figheight()
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


def thumbnail(images: Images, sample: int, side: int) -> np.ndarray:
    return center_view(images.load(int(sample)), side).permute(1, 2, 0).numpy()


def frame_of(images: Images, query: int, sample: int) -> str:
    if sample < 0 or images.labels is None:
        return "grey"
    return "tab:green" if images.labels[sample] == images.labels[query] else "tab:red"


# -- the command ----------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("evolution", "positiveness"))
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of nnclr, nnsiam, snclr")
    parser.add_argument("--output", type=Path, required=True, help="the picture (PNG)")
    parser.add_argument("--data", default=None, help="the images, where the run's --data has moved")
    parser.add_argument("--queries", type=int, default=6, help="number of queries (default 6)")
    parser.add_argument("--neighbours", type=int, default=0, help="per query (default 3, or 8)")
    parser.add_argument("--seed", type=int, default=0, help="draws the queries (default 0)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    pictures.check_target(arguments.output)
    run = arguments.run
    if not (run / "config.yaml").exists():
        raise UserError(f"{run} is no run folder: it has no config.yaml")
    config = yaml.safe_load((run / "config.yaml").read_text())
    if config["recipe"] not in NETWORKS:
        raise UserError(f"{run}: {config['recipe']} has no support set, so no neighbours to show")
    if arguments.what == "positiveness" and config["recipe"] != "snclr":
        raise UserError(f"{run}: only SNCLR has a positiveness, this is {config['recipe']}")
    last = checkpoint.find(run)
    if last is None:
        raise UserError(f"{run} has no checkpoint.pt")
    if min(arguments.queries, arguments.neighbours + 1) < 1:
        raise UserError("--queries and --neighbours must be above 0")
    data = config["data"] if arguments.data is None else arguments.data
    images = load_dataset(config["dataset"], data)
    chosen = config.get("train_images", 0), config.get("validation_share", 0.0)
    images, _ = parts(*images, *chosen)  # the queue's ids are numbers of these
    size = config["image_size"]
    queries = choose_queries(images, arguments.queries, arguments.seed)
    paths = [last]
    shown = arguments.neighbours or 8
    k = max(shown, config.get("neighbours") or 0)  # the weights are a softmax over the run's K
    if arguments.what == "evolution":
        k = shown = arguments.neighbours or 3
        paths = [*sorted((run / "snapshots").glob("epoch-*.pt")), last]
        if len(paths) == 1:
            raise UserError(f"{run} kept no snapshots: train with --snapshot-epochs 0,1,10")
    moments = [look_up(restore(run, path), images, queries, size, k) for path in paths]
    moments = [*{found.epoch: found for found in moments}.values()]
    if arguments.what == "positiveness":
        moments = [by_weight(found, shown) for found in moments]
    else:
        moments = [dataclasses.replace(found, weights=None) for found in moments]
    order = "by positiveness" if arguments.what == "positiveness" else "over training"
    title = f"neighbours {order}: {config['recipe']}, {config['arch']}, {images.name}"
    draw(arguments.output, images, queries, moments, size, title)
    for found in moments:
        share = purity(found, images, queries)
        said = "no labels" if share is None else f"{share:.1%} have the query's label"
        print(f"epoch {found.epoch:g}: {said}")
    print(f"wrote {arguments.output}")


def by_weight(found: Found, shown: int) -> Found:
    """The neighbours of the largest positiveness, in its order."""
    order = np.argsort(-found.weights, axis=1, kind="stable")[:, :shown]
    return Found(
        found.epoch,
        *(np.take_along_axis(a, order, axis=1) for a in (found.ids, found.cosines, found.weights)),
    )


if __name__ == "__main__":
    sys.exit(command(main))
