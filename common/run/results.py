"""`results.json`, the last file of a run to appear: what came out, and whether a run is finished.

Nothing here needs torch: a cluster's login node asks it of many runs.
"""

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common import cards, files
from common.errors import UserError
from common.progress import duration
from common.run import documents, environment, metrics, model_card

NAME = "results.json"
BACKBONE = "backbone.safetensors"
FAILED = "failed.json"  # of a run whose loss or gradient was no number
NUMBERS = ("recipe", "epoch", "step", "loss", "loss_first", "knn", "knn_before", "hours")
NUMBERS += ("images_per_second", "dataset", "commit", "dirty", "config_hash", "backbone_sha256")


def is_finished(folder: Path, last_step: int | None = None) -> bool:
    """Tells whether a folder holds the results of a run's very last step, with their backbone.

    The last step is that of the last start, if it is not given.
    """
    try:
        needs = ("backbone_sha256", "step")
        results = documents.read_json(folder / NAME, "results", needs)
        if last_step is None:
            last_step = environment.last_start(folder)["steps"]["last"]
        same = checksum(folder / BACKBONE) == results["backbone_sha256"]
        return same and results["step"] == last_step
    except (OSError, UserError):
        return False


def checksum(path: Path) -> str:
    """Returns the sha256 of a file, read again only if its time or size has changed."""
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    file = path.stat()
    return checksum_at(path, file.st_mtime_ns, file.st_size)


@functools.cache
def checksum_at(path: Path, time: int, size: int) -> str:
    with documents.opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path, needs: Sequence[str] = NUMBERS) -> dict[str, Any]:
    """Reads a finished run's results; raises UserError if they, or any of `needs`, are missing."""
    if not (folder / NAME).exists():
        raise UserError(f"{folder} is no finished run: it has no {NAME}")
    return documents.read_json(folder / NAME, "results", needs)


def write(folder: Path, facts: dict[str, Any]) -> None:
    """Writes results.json: `facts`, what the metrics say of the loss and of the random encoder, and
    the checksum of the backbone, which is there by now.
    """
    records = metrics.read(folder / metrics.NAME)
    losses = [r["loss"] for r in records if r["kind"] == "step"]
    start = next((r for r in records if r["kind"] == "epoch" and r["epoch"] == 0), {})
    found = facts | {
        "loss": losses[-1] if losses else None,
        "loss_first": losses[0] if losses else None,
        "knn_before": start.get("knn"),
        "backbone_sha256": checksum(folder / BACKBONE),
    }
    files.write(folder / NAME, json.dumps(found, indent=2) + "\n")


def write_failure(folder: Path, error: str, at: dict[str, Any], seconds: float) -> None:
    """Notes that training ended in a loss or gradient that is no number, so that this can be
    recorded as other ends are; `at` has its step and epoch.
    """
    found = {"error": error, "epoch": at["epoch"], "step": at["step"], "hours": seconds / 3600}
    files.write(folder / FAILED, json.dumps(found, indent=2) + "\n")


def say(folder: Path) -> None:
    """Prints the last lines: what was learned, and where the files are."""
    r = read(folder)
    loss = ""
    if None not in (r["loss_first"], r["loss"]):
        loss = f"loss {r['loss_first']:.4f} -> {r['loss']:.4f}"
    knn = ""
    if r["knn"] is not None:
        before = f"{r['knn_before']:.1%} -> " if r["knn_before"] is not None else ""
        knn = f", k-NN {before}{r['knn']:.1%}"
    print(
        f"{r['recipe']}: {r['epoch']:g} epochs, {r['step']} steps, {loss}{knn}, "
        f"{r['images_per_second']:.0f} images/s, {duration(3600 * r['hours'])}"
    )
    shown = [BACKBONE, model_card.NAME, "curves.png", "neighbours.png", metrics.NAME]
    if r["recipe"] in cards.load():  # of others no protocol is known
        print(f"evaluate it: make evaluate RUN={folder}")
    print(f"{folder}: {' '.join(f for f in shown if (folder / f).exists())}", flush=True)
