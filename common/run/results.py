"""The end of a run: exported backbone, results.json, curves.png, neighbours.png, last lines."""

import functools
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from common import cards, files
from common.augment import center_view
from common.config import config_hash
from common.data.loaders import center_batches
from common.fast.pixels import to_input
from common.run import backbone, metrics, pictures
from common.support_set import SupportSet

if TYPE_CHECKING:
    from common.run.run import Run

NAME = "results.json"
SHOWN_QUERIES, SHOWN_NEIGHBOURS, SHOWN_SIDE = 8, 8, 112


def is_finished(run: "Run") -> bool:
    """Whether the folder holds the results of this run's very last step, with their backbone."""
    path = run.folder / backbone.NAME
    try:
        results = json.loads((run.folder / NAME).read_text())
        if not isinstance(results, dict) or results.get("step") != run.last_step:
            return False
        file = path.stat()
        return results.get("backbone_sha256") == sha256(path, file.st_mtime_ns, file.st_size)
    except (OSError, ValueError):
        return False


@functools.cache  # asked several times of one file: for as long as neither time nor size changes
def sha256(path: Path, time: int, size: int) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write(run: "Run", accuracy: float | None) -> None:
    """Exports the backbone and writes results.json, the last file of a run to appear."""
    records = metrics.read(run.folder / metrics.NAME)
    losses = [r["loss"] for r in records if r["kind"] == "step"]
    start = next((r for r in records if r["kind"] == "epoch" and r["epoch"] == 0), {})
    facts = {
        "recipe": run.recipe,
        "epoch": run.step / run.steps_per_epoch,
        "commit": run.commit,
        "config_hash": config_hash(run.config),
    }
    path = run.folder / backbone.NAME
    backbone.export_backbone(path, run.encoder, run.config.arch, run.config.image_size, facts)
    results: dict[str, Any] = {
        **facts,
        "dirty": run.dirty,
        "step": run.step,
        "dataset": run.train.name,
        "loss": losses[-1] if losses else None,
        "loss_first": losses[0] if losses else None,
        "knn": accuracy,
        "knn_before": start.get("knn"),
        "hours": run.seconds / 3600,
        "images_per_second": run.config.batch_size * run.step / max(run.seconds, 1e-9),
        "backbone_sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    files.write(run.folder / NAME, json.dumps(results, indent=2) + "\n")


def say(run: "Run") -> None:
    """The last lines: what was learned, and where the files are."""
    r = json.loads((run.folder / NAME).read_text())
    loss = f"loss {r['loss_first']:.4f} -> {r['loss']:.4f}" if r["loss"] is not None else ""
    knn = ""
    if r["knn"] is not None:
        before = f"{r['knn_before']:.1%} -> " if r["knn_before"] is not None else ""
        knn = f", k-NN {before}{r['knn']:.1%}"
    print(
        f"{r['recipe']}: {r['epoch']:g} epochs, {r['step']} steps, {loss}{knn}, "
        f"{r['images_per_second']:.0f} images/s, {in_words(3600 * r['hours'])}"
    )
    files = [backbone.NAME, "curves.png", "neighbours.png", metrics.NAME]
    print(f"{run.folder}: {' '.join(f for f in files if (run.folder / f).exists())}", flush=True)


def draw_curves(run: "Run", dim: int) -> None:
    records = metrics.read(run.folder / metrics.NAME)
    card = cards.load().get(run.recipe)
    own = card.metrics if card else {}
    pictures.draw_curves(run.folder / "curves.png", records, title(run), dim, own)


@torch.no_grad()
def draw_neighbours(
    run: "Run",
    queue: SupportSet,
    select: Callable[[Tensor], Tensor],
    weigh: Callable[[Tensor, Tensor], Tensor] | None,
    k: int,
) -> None:
    """neighbours.png for a few images spread over the training set: `select` maps images to the
    embedding that looks up, `weigh` images and their k neighbours to the positiveness (N,k).
    """
    size = run.config.image_size
    queries = np.linspace(0, len(run.train) - 1, min(SHOWN_QUERIES, len(run.train)))
    queries = queries.round().astype(int)
    for module in run.state.values():
        if isinstance(module, nn.Module):
            module.eval()
    pixels = torch.cat([*center_batches(run.train, queries, size)])
    x, ids = to_input(pixels, run.device, run.dtype), torch.from_numpy(queries).to(run.device)
    own = int((queue.ids == ids[:, None]).sum(dim=1).max())  # these are never shown
    k = min(k, queue.size - own)
    if k < 1:
        run.warn("no neighbours.png: the queue holds nothing but the query itself")
        return
    z = select(x)
    neighbours, positions = queue.nearest(z, k, exclude_ids=ids)
    z = nn.functional.normalize(z.to(neighbours.dtype), dim=1)
    cosines = torch.einsum("nd,nkd->nk", z, neighbours).cpu().numpy()
    weights = weigh(x, neighbours).float().cpu().numpy() if weigh else None
    found = queue.ids[positions[:, :SHOWN_NEIGHBOURS]].cpu().numpy()
    pictures.draw_neighbours(
        run.folder / "neighbours.png",
        [thumbnail(run, q) for q in queries],
        [[thumbnail(run, i) if i >= 0 else None for i in row] for row in found],
        cosines,
        weights,
        [[same_label(run, q, i) for i in row] for q, row in zip(queries, found, strict=True)],
        f"neighbours in the queue: {title(run)}",
    )


def thumbnail(run: "Run", sample: int) -> np.ndarray:
    side = min(run.config.image_size, SHOWN_SIDE)
    return center_view(run.train.load(int(sample)), side).permute(1, 2, 0).numpy()


def same_label(run: "Run", a: int, b: int) -> bool | None:
    if run.train.labels is None or b < 0:
        return None
    return bool(run.train.labels[a] == run.train.labels[b])


def title(run: "Run") -> str:
    return f"{run.recipe}, {run.config.arch}, {run.train.name}, seed {run.config.seed}"


def in_words(seconds: float) -> str:
    """90 -> '1 min 30 s'."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"
