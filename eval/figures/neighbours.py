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
from pathlib import Path

import common.run.early  # noqa: F401  # isort: skip
import numpy as np

from common import cards
from common.config import MAX_PIXELS
from common.data.images import Images
from common.data.sets import load_dataset
from common.data.splits import parts
from common.errors import UserError, command
from common.run import checkpoint, documents, pictures
from common.run.flags import coerce
from common.run.help import in_80_columns
from common.run.neighbours import Found, Lookup, draw, look_up, purity
from common.support_set import SupportSet


def restore(run: Path, path: Path) -> Lookup:
    """Returns the look-up of a run at one of its checkpoints, built by its recipe's `look_up`."""
    where = run / "config.yaml"
    saved = documents.read_yaml(where, "config", ("recipe",))
    name = saved.pop("recipe")
    if name not in cards.load():
        raise UserError(f"{where}: recipe: there is no recipe {name} here")
    recipe = importlib.import_module(f"recipes.{name}")
    fields = {f.name for f in dataclasses.fields(recipe.Config)}
    own = {n: v for n, v in saved.items() if n in fields}
    config = recipe.Config(
        **{n: coerce(recipe.Config, n, v, f"{where}: {n}") for n, v in own.items()}
    )
    state = checkpoint.load(path)
    if "queue" not in state["state"]:
        raise UserError(f"{run}: {name} has no support set, so no neighbours to show")
    embeddings = state["state"]["queue"]["ranks"][0]
    queue = SupportSet(*embeddings["embeddings"].shape)
    queue.load_state_dict(embeddings)
    select, weigh = recipe.look_up(config, state["state"])
    return Lookup(state["epoch"], queue, select.eval(), weigh)


def choose_queries(images: Images, count: int, seed: int) -> np.ndarray:
    """Draws one image of each of `count` classes from the seed; without labels, any images."""
    rng = np.random.default_rng(seed)
    if images.labels is None:
        return np.sort(rng.choice(len(images), min(count, len(images)), replace=False))
    classes = np.unique(images.labels)
    spread = np.linspace(0, len(classes) - 1, min(count, len(classes))).round().astype(int)
    return np.array([rng.choice(np.flatnonzero(images.labels == classes[c])) for c in spread])


# -- the command ----------------------------------------------------------------------------------


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("evolution", "positiveness"))
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder of a recipe with a queue")
    parser.add_argument("--output", type=Path, required=True, help="picture: .png, .pdf or .svg")
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
    needs = ("recipe", "dataset", "data", "arch", "image_size")
    config = documents.read_yaml(run / "config.yaml", "config", needs)
    last = checkpoint.find(run)
    if last is None:
        raise UserError(f"{run} has no checkpoint.pt")
    if min(arguments.queries, arguments.neighbours + 1) < 1:
        raise UserError("--queries and --neighbours must be above 0")
    data = config["data"] if arguments.data is None else arguments.data
    limit = config.get("max_pixels", MAX_PIXELS)
    images = load_dataset(config["dataset"], data, max_pixels=limit)
    chosen = config.get("train_images", 0), config.get("validation_share", 0.0)
    images, _ = parts(*images, *chosen)  # the queue's ids count these
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
        if moments[-1].weights is None:
            raise UserError(f"{run}: its recipe, {config['recipe']}, weighs no neighbours")
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
    """Returns the neighbours of the largest positiveness, in its order."""
    order = np.argsort(-found.weights, axis=1, kind="stable")[:, :shown]
    return Found(
        found.epoch,
        *(np.take_along_axis(a, order, axis=1) for a in (found.ids, found.cosines, found.weights)),
    )


if __name__ == "__main__":
    sys.exit(command(main))
