"""The folder of a run or of an evaluation: what it is of, changes refused, exact resume.

All ranks read, and meet the same mistakes; rank 0 writes.
"""

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

import torch
import yaml

from common import cards, distributed
from common.errors import UserError, make_folder
from common.files import write
from common.run import checkpoint, documents, environment, lock
from common.run.flags import changed_fields

CONFIG = "config.yaml"


def choose(path: str | Path, resume: str) -> Path:
    """Returns the folder itself; with `--resume never` it takes the first of its name, then with
    -2, -3, …, that is not there yet.
    """
    path = chosen = documents.expanded(path).absolute()
    number = 1
    while resume == "never" and chosen.exists():
        number += 1
        chosen = path.with_name(f"{path.name}-{number}")
    return chosen


def read_config(folder: Path) -> dict[str, Any] | None:
    """Reads a folder's config.yaml, None if there is none; raises UserError for a damaged one."""
    path = folder / CONFIG
    if not path.exists():
        return None
    try:
        return documents.read_yaml(path, "config")
    except UserError as error:
        text = f"{path} is damaged: remove it, or use another --output ({error})"
        raise UserError(text) from None


def changes(holds: dict[str, Any], config: Any, saved: dict[str, Any]) -> list[str]:
    """Lists `name was A, is B` for what a folder holds and for each field that enters the numbers.
    The fields of another recipe or evaluation, the first of `holds`, are not compared.
    """
    found = [f"{n} was {saved.get(n)}, is {v}" for n, v in holds.items() if saved.get(n) != v]
    first = next(iter(holds))
    return found if saved.get(first) != holds[first] else found + changed_fields(config, saved)


def facts_of_run(recipe: str, config: Any, saved: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns what a run's config.yaml says beside its flags: method, plan, and the settings that
    neither the preset nor the card's flags explain. A `saved` plan stays unless another is given.
    """
    card = cards.load().get(recipe)
    chooses = card.chooses if card else []
    settings = getattr(config, "settings", {})
    return {
        "method": cards.method_of(recipe, dataclasses.asdict(config)),
        "plan": getattr(config, "plan_name", "") or (saved or {}).get("plan"),
        "settings": {n: v for n, v in settings.items() if n not in chooses},
    }


class Folder:
    """The folder of one run or evaluation, which no other may go on with.

    `holds` says what it is of: its recipe or evaluation, then what else never changes.
    """

    def __init__(self, path: Path, holds: dict[str, Any], config: Any):
        self.path, self.holds, self.config = path, holds, config
        self.saved = read_config(path)
        self.commit, self.dirty = environment.commit()  # of the start: the tree may change later
        self.flags = {n: v for n, v in dataclasses.asdict(config).items() if n != "plan_name"}

    def lock(self) -> None:
        """Keeps other processes from writing here until this one ends. Raises UserError, on all
        ranks, if another one writes here now.
        """
        error = None
        if distributed.rank() == 0:
            try:
                make_folder(self.path)
                self.held = lock.take(self.path)
                if self.held:  # nobody else is saving: what a killed process had half written
                    for half in self.path.glob("checkpoint*.partial"):
                        half.unlink(missing_ok=True)
            except UserError as problem:
                error = str(problem)
        if (error := distributed.from_rank_zero(error)) is not None:
            raise UserError(error)

    def refuse_changes(self) -> None:
        """Raises UserError if the folder holds something else."""
        if self.saved is None:
            return
        if changed := changes(self.holds, self.config, self.saved):
            raise UserError(
                f"{self.path} holds something else ({'; '.join(changed)}): use the same flags, "
                "another --output, or --resume never",
            )

    def write_config(self, **facts: Any) -> None:
        """Writes config.yaml: what the folder holds, `facts`, the flags. Rank 0 calls it, after all
        ranks have read the folder.
        """
        make_folder(self.path)
        content = {**self.holds, **facts, **self.flags}
        write(self.path / CONFIG, yaml.safe_dump(content, sort_keys=False))

    def complete_config(self, **facts: Any) -> None:
        """Adds the facts that a finished run's config.yaml lacks, if it can be written."""
        saved = self.saved or {}
        if any(name not in saved or saved[name] != value for name, value in facts.items()):
            with contextlib.suppress(OSError, UserError):
                self.write_config(**facts)

    def save(self, **state: Any) -> None:
        """Saves `state` as the checkpoint, next to what it is of. Rank 0 writes."""
        if distributed.rank() == 0:
            content = {**self.present(), **self.holds, "config": self.flags, **state}
            checkpoint.save(self.path, content)

    def present(self) -> dict[str, Any]:
        """Returns what a continued run should share with the start before."""
        torch_version = str(torch.__version__)
        return {"commit": self.commit, "torch": torch_version, "ranks": distributed.world_size()}

    def restore(self) -> dict[str, Any] | None:
        """Returns what was saved last or None; raises UserError if it is of something else."""
        first = distributed.rank() == 0
        path = distributed.from_rank_zero(checkpoint.find(self.path) if first else None)
        if path is None:
            return None
        saved = checkpoint.load(path)
        if "config" in saved:  # evaluations did not save it once
            was = saved | saved["config"]
            if changed := changes(self.holds, self.config, was):
                text = "; ".join(changed)
                raise UserError(f"{path} holds something else ({text}): use another --output")
        for what, now in self.present().items():
            if first and (was := saved.get(what, now)) != now:
                print(f"warning: the checkpoint was written with {what} {was}, this is {now}")
        return saved


def finished_record(path: Path, backbone: str) -> dict[str, Any] | None:
    """Returns the record in a file, if it is whole and of the backbone of this checksum, else None:
    an evaluation has finished if its record is there.
    """
    try:
        found = documents.read_json(path, "block")
    except UserError:
        return None
    return found if found.get("backbone_sha256") == [backbone] else None
