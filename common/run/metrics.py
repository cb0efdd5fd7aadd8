"""`metrics.jsonl`: one JSON object per line, exactly resumable; and the same to wandb."""

import json
import math
import secrets
from pathlib import Path
from typing import Any

from common import files
from common.errors import say_error
from common.run import documents

NAME = "metrics.jsonl"


def read(path: Path, schema: str = "metrics") -> list[dict[str, Any]]:
    """All whole lines of a metrics file, in order; what a crash cut off at its end is left out.

    UserError for a line that is damaged elsewhere or is not as the schema wants it, a run's or that
    of an evaluation ("log").
    """
    if not path.exists():
        return []
    return [with_yardstick(record) for record in documents.read_lines(path, schema)]


def with_yardstick(record: dict[str, Any]) -> dict[str, Any]:
    """A line of epoch 0 from before the random encoder was calibrated (calibrate.py) has its k-NN
    under a name of its own: it is none to measure a run by.
    """
    if record.get("epoch") != 0 or record.get("calibrated") or "knn" not in record:
        return record
    others = {name: value for name, value in record.items() if name != "knn"}
    return others | {"knn_as_initialised": record["knn"]}


def cut(path: Path, step: int, schema: str = "metrics") -> list[dict[str, Any]]:
    """Drops what was logged after `step`, so that a resumed run logs it again, once."""
    kept = [record for record in read(path, schema) if record["step"] <= step]
    files.write(path, "".join(json.dumps(record) + "\n" for record in kept))
    return kept


def write(path: Path, records: list[dict[str, Any]]) -> None:
    with open(path, "a") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def finite(values: dict[str, Any]) -> dict[str, Any]:
    """Without the values that JSON cannot hold (a purity of nothing)."""
    return {n: v for n, v in values.items() if not isinstance(v, float) or math.isfinite(v)}


def means(records: list[dict[str, Any]]) -> dict[str, float]:
    """The mean of each number over step records, where it is present."""
    sums: dict[str, list[float]] = {}
    for record in records:
        for name, value in record.items():
            if name not in ("kind", "epoch", "step", "memory_gb", "calibrated"):
                sums.setdefault(name, []).append(value)
    result = {name: math.fsum(values) / len(values) for name, values in sums.items()}
    timed = [r for r in records if r.get("images_per_second", 0) > 0]
    if timed:  # all images over all seconds
        seconds = [1 / r["images_per_second"] for r in timed]
        result["images_per_second"] = len(timed) / math.fsum(seconds)
        waits = [r["data_wait"] * s for r, s in zip(timed, seconds, strict=True)]
        result["data_wait"] = math.fsum(waits) / math.fsum(seconds)
    return result


class Wandb:
    """Weights & Biases, if asked for; a failure of it is said once and never stops a run."""

    def __init__(self, enabled: bool, folder: Path, recipe: str, config: dict[str, Any]):
        self.run = None
        if not enabled:
            return
        try:
            import wandb

            identity = folder / "wandb_id"
            if not identity.exists():
                identity.write_text(secrets.token_hex(4))
            self.run = wandb.init(
                project="selfsup-recipes",
                name=f"{recipe} {folder.name}",
                id=identity.read_text(),
                resume="allow",
                dir=folder,
                config=config,
            )
        except Exception as error:
            self.give_up(error)

    def log(self, records: list[dict[str, Any]]) -> None:
        if self.run is None:
            return
        try:
            for record in records:
                kind = record["kind"]
                self.run.log({f"{kind}/{n}": v for n, v in record.items() if n != "kind"})
        except Exception as error:
            self.give_up(error)

    def finish(self) -> None:
        if self.run is None:
            return
        try:
            self.run.finish(quiet=True)
        except Exception as error:
            self.give_up(error)

    def give_up(self, error: Exception) -> None:
        self.run = None
        say_error(f"wandb failed ({type(error).__name__}: {error}); the run goes on without it")
