"""`results.json`, the last file of a run to appear: what came out, and whether a run is finished.

Nothing here needs torch: a cluster's login node asks it of many runs.
"""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

from common import files
from common.errors import UserError
from common.run import environment, metrics

NAME = "results.json"
BACKBONE = "backbone.safetensors"


def is_finished(folder: Path, last_step: int | None = None) -> bool:
    """Whether a folder holds the results of a run's very last step, with their backbone.

    The last step is that of the last start, if it is not given.
    """
    try:
        results = json.loads((folder / NAME).read_text())
        if last_step is None:
            starts = json.loads((folder / environment.NAME).read_text())
            last_step = [starts, *starts.get("restarts", [])][-1]["steps"]["last"]
        same = checksum(folder / BACKBONE) == results["backbone_sha256"]
        return same and results["step"] == last_step
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return False


def checksum(path: Path) -> str:
    """The sha256 of a file, read again only if its time or size has changed."""
    file = path.stat()
    return checksum_at(path, file.st_mtime_ns, file.st_size)


@functools.cache
def checksum_at(path: Path, time: int, size: int) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read(folder: Path) -> dict[str, Any]:
    """The results of a finished run; UserError if there are none."""
    if not (folder / NAME).exists():
        raise UserError(f"{folder} is no finished run: it has no {NAME}")
    return json.loads((folder / NAME).read_text())


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


def say(folder: Path) -> None:
    """The last lines: what was learned, and where the files are."""
    r = read(folder)
    loss = f"loss {r['loss_first']:.4f} -> {r['loss']:.4f}" if r["loss"] is not None else ""
    knn = ""
    if r["knn"] is not None:
        before = f"{r['knn_before']:.1%} -> " if r["knn_before"] is not None else ""
        knn = f", k-NN {before}{r['knn']:.1%}"
    print(
        f"{r['recipe']}: {r['epoch']:g} epochs, {r['step']} steps, {loss}{knn}, "
        f"{r['images_per_second']:.0f} images/s, {duration(3600 * r['hours'])}"
    )
    shown = [BACKBONE, "curves.png", "neighbours.png", metrics.NAME]
    print(f"{folder}: {' '.join(f for f in shown if (folder / f).exists())}", flush=True)


def duration(seconds: float) -> str:
    """90 -> '1 min 30 s'."""
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if hours:
        return f"{hours} h {minutes % 60} min"
    return f"{minutes} min {seconds % 60:.0f} s" if minutes else f"{seconds:.0f} s"
