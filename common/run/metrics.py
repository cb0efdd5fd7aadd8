"""`metrics.jsonl`: one JSON object per line, exactly resumable; and the same to wandb and
TensorBoard.
"""

import json
import math
import secrets
from pathlib import Path
from typing import Any

from common import files
from common.errors import say_error
from common.run import documents

NAME = "metrics.jsonl"
TENSORBOARD = "tensorboard"  # folder in the run's
NO_METRICS = ("kind", "epoch", "step", "calibrated")  # these say which line it is


def read(path: Path, schema: str = "metrics") -> list[dict[str, Any]]:
    """Reads all whole lines of a metrics file, in order, without what a crash cut off at its end.

    Raises UserError for a line that is damaged elsewhere or is not as the schema wants it, a run's
    or that of an evaluation ("log").
    """
    if not path.exists():
        return []
    return [with_yardstick(record) for record in documents.read_lines(path, schema)]


def with_yardstick(record: dict[str, Any]) -> dict[str, Any]:
    """Renames the k-NN of a line of epoch 0 from before the random encoder was calibrated
    (calibrate.py): a run cannot be measured by it.
    """
    if record.get("epoch") != 0 or record.get("calibrated") or "knn" not in record:
        return record
    others = {name: value for name, value in record.items() if name != "knn"}
    return others | {"knn_as_initialised": record["knn"]}


def cut(path: Path, step: int, schema: str = "metrics") -> list[dict[str, Any]]:
    """Drops what was logged after `step`, so that a resumed run logs it again, once, and the line
    of an epoch that was broken off, which the run now finishes.
    """
    kept = [record for record in read(path, schema) if record["step"] <= step]
    kept = [r for r in kept if r.get("kind") != "epoch" or r["epoch"] % 1 == 0]
    files.write(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def write(path: Path, records: list[dict[str, Any]]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Returns the values without those that JSON cannot hold (NaN, infinities)."""
    return {n: v for n, v in values.items() if not isinstance(v, float) or math.isfinite(v)}


def means(records: list[dict[str, Any]]) -> dict[str, float]:
    """Returns the mean of each number over the step records that have it."""
    sums: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in (*NO_METRICS, "memory_gb"):
                sums.setdefault(name, []).append(value)
    result = {name: math.fsum(values) / len(values) for name, values in sums.items()}
    timed = [r for r in records if r.get("images_per_second", 0) > 0]
    if timed:  # all images over all seconds
        seconds = [1 / r["images_per_second"] for r in timed]
        result["images_per_second"] = len(timed) / math.fsum(seconds)
        waits = [r["data_wait"] * s for r, s in zip(timed, seconds, strict=True)]
        result["data_wait"] = math.fsum(waits) / math.fsum(seconds)
    return result


def curve(records: list[dict[str, Any]], metric: str) -> list[tuple[float, float]]:
    """Returns (step, value) of a metric in the epoch lines among `records`: the mean over an
    epoch's steps stands at the epoch's middle, k-NN at its end, where it was measured.
    """
    epochs = [record for record in records if record["kind"] == "epoch"]
    begins = [0, *(record["step"] for record in epochs)]
    places = [
        record["step"] if metric == "knn" else (begin + record["step"]) / 2
        for begin, record in zip(begins, epochs, strict=False)
    ]
    return [(at, r[metric]) for at, r in zip(places, epochs, strict=True) if metric in r]


class TensorBoard:
    """Writes files for TensorBoard in the run's folder, if asked to; a failure is said once and
    never stops a run. `step` is that of the checkpoint which the run goes on from: what was written
    beyond it is hidden there and written again.
    """

    def __init__(self, enabled: bool, folder: Path, step: int):
        self.writer = None
        if not enabled:
            return
        try:
            from torch.utils.tensorboard import SummaryWriter

            first = step + 1 if step else 0
            self.writer = SummaryWriter(folder / TENSORBOARD, purge_step=first, flush_secs=30)
        except Exception as error:
            self.give_up(error)

    def log(self, records: list[dict[str, Any]]) -> None:
        """Writes each number of each record, as step/loss or epoch/knn, at the record's step."""
        if self.writer is None:
            return
        try:
            for record in records:
                for name, value in record.items():
                    if name not in NO_METRICS:
                        tag = f"{record['kind']}/{name}"
                        self.writer.add_scalar(tag, value, record["step"])
        except Exception as error:
            self.give_up(error)

    def finish(self) -> None:
        if self.writer is None:
            return
        try:
            self.writer.close()
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        self.writer = None
        say_error(f"tensorboard failed ({type(error).__name__}: {error}); the run goes on without")


class Wandb:
    """Sends metrics to Weights & Biases, if asked to; a failure is said once and never stops a run.

    `wandb_id` in the folder holds the run's name there and the last step sent of each kind, so that
    a continued run sends none twice.
    """

    def __init__(self, enabled: bool, folder: Path, recipe: str, config: dict[str, Any]):
        self.run = None
        if not enabled:
            return
        try:
            import wandb

            self.file = folder / "wandb_id"
            words = documents.read_text(self.file).split() if self.file.exists() else []
            self.identity, *sent = words or [secrets.token_hex(4)]
            self.sent = dict(zip(("step", "epoch"), map(int, sent or (-1, -1)), strict=True))
            self.note()
            tags = [tag.strip() for tag in config["wandb_tags"].split(",") if tag.strip()]
            self.run = wandb.init(
                project=config["wandb_project"],
                entity=config["wandb_entity"] or None,
                group=config["wandb_group"] or None,
                tags=tags or None,
                name=f"{recipe} {folder.name}",
                id=self.identity,
                resume="allow",
                dir=folder,
                config=config,
                settings=wandb.Settings(quiet=True),
            )
            self.run.define_metric("epoch/*", step_metric="epoch/epoch")
        except Exception as error:
            self.give_up(error)

    def note(self) -> None:
        files.write(self.file, " ".join([self.identity, *map(str, self.sent.values())]) + "\n")

    def log(self, records: list[dict[str, Any]]) -> None:
        """Sends records at their own steps; those of one step become one row there."""
        if self.run is None:
            return
        try:
            for record in records:
                kind, step = record["kind"], record["step"]
                if step > self.sent[kind]:
                    values = {f"{kind}/{n}": v for n, v in record.items() if n != "kind"}
                    self.run.log(values, step=step)
                    self.sent[kind] = step
            self.note()
        except Exception as error:
            self.give_up(error)

    def finish(self) -> None:
        if self.run is None:
            return
        try:
            self.run.finish()
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        self.run = None
        say_error(f"wandb failed ({type(error).__name__}: {error}); the run goes on without it")
