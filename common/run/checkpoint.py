"""A run's checkpoint: everything that the next step depends on, saved so that no crash loses it.

It is written beside and renamed, the one before is kept: `checkpoint.pt` is always a whole file.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch

from common.errors import FULL, UserError, is_disk_error
from common.files import replacing
from common.run import documents

NAME = "checkpoint.pt"
PREVIOUS = "checkpoint.previous.pt"
FORMAT = "selfsup-recipes checkpoint 2"
# of format 1, in which recipes had other names for the same parts: f or branch for encoder and
# projector, g or h for the predictor, f_m for the target
FORMAT_1 = "selfsup-recipes checkpoint 1"
MODEL_1 = {"f.0.": "encoder.", "f.1.": "projector.", "branch.0.": "encoder."}
MODEL_1 |= {"branch.1.": "projector.", "g.": "predictor.", "h.": "predictor."}
TARGET_1 = {"0.": "encoder.", "1.": "projector."}


def save(folder: Path, state: dict[str, Any]) -> None:
    """Saves `state` (tensors and plain values) as the folder's checkpoint.

    Raises UserError if it cannot be written; the checkpoint before is then untouched.
    """
    path = folder / NAME
    try:
        with replacing(path) as beside:
            with open(beside, "wb") as file:
                torch.save({"format": FORMAT, **state}, file)
                file.flush()
                os.fsync(file.fileno())
            keep_previous(path, folder / PREVIOUS)
    except (OSError, RuntimeError) as error:
        cause = disk_error_behind(error)
        if cause is None:
            raise
        kept = ", the previous checkpoint is kept" if path.exists() else ""
        cure = "free space" if cause.errno in FULL else "make it writable"
        raise UserError(
            f"cannot save {path} ({cause.strerror}){kept}: {cure} and start the same command again"
        ) from None


def disk_error_behind(error: BaseException | None) -> OSError | None:
    """Finds the disk's own error in a chain of errors: torch's zip writer covers it."""
    while error is not None and not is_disk_error(error):
        error = error.__cause__ or error.__context__
    return error


def keep_previous(path: Path, previous: Path) -> None:
    """Gives the present checkpoint a second name, without a moment in which it has none."""
    if not path.exists():
        return
    try:
        with replacing(previous) as link:
            os.link(path, link)
    except OSError as error:  # file systems without hard links: `find` then takes the previous one
        if is_disk_error(error):
            raise
        os.replace(path, previous)


def keep(folder: Path, path: Path) -> None:
    """Keeps the folder's present checkpoint under another name, by a hard link if that can be."""
    path.parent.mkdir(exist_ok=True)
    with replacing(path) as beside:
        try:
            os.link(folder / NAME, beside)
        except OSError as error:
            if is_disk_error(error):
                raise
            shutil.copyfile(folder / NAME, beside)


def find(folder: Path) -> Path | None:
    """Returns the folder's checkpoint, the previous one if a crash left no other, or None."""
    for name in (NAME, PREVIOUS):
        if (folder / name).exists():
            return folder / name
    return None


def forget(folder: Path) -> None:
    """Removes the folder's checkpoints."""
    for name in (NAME, PREVIOUS):
        (folder / name).unlink(missing_ok=True)


def load(path: Path) -> dict[str, Any]:
    """Loads the state in a checkpoint, on CPU; raises UserError for a truncated or foreign file."""
    spare = path.with_name(PREVIOUS)
    hint = (
        f"to continue from the checkpoint before, move {spare.name} to {path.name}"
        if spare.exists() and path != spare
        else "to begin anew, give another --output or --resume never"
    )
    documents.opened(path).close()  # refuses a pipe, which would block
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # zip, pickle and stream errors of many types
        kind = type(error).__name__
        raise UserError(f"{path} is truncated or no checkpoint ({kind}): {hint}") from None
    if not is_ours(state):
        raise UserError(f"{path} is not a checkpoint of these recipes: {hint}")
    return in_format_2(state)


def is_ours(state: Any) -> bool:
    """Tells whether a file that holds this is a checkpoint of these recipes or evaluations."""
    return isinstance(state, dict) and state.get("format") in (FORMAT, FORMAT_1)


def in_format_2(state: dict[str, Any]) -> dict[str, Any]:
    """Returns a checkpoint's state, under the names of format 2 if it is a run's of format 1."""
    if state["format"] == FORMAT_1 and "model" in state.get("state", {}):
        state["state"] = renamed(state["state"])
    return state


def renamed(parts: dict[str, Any]) -> dict[str, Any]:
    """Puts a run's state of format 1 under the names of format 2. The optimizer knows parameters by
    their order, which is the same.
    """
    parts = {"target" if name == "f_m" else name: part for name, part in parts.items()}
    for name, table in (("model", MODEL_1), ("target", TARGET_1)):
        if name in parts:
            parts[name] = {with_new_start(key, table): v for key, v in parts[name].items()}
    return parts


def with_new_start(key: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if key.startswith(old):
            return new + key.removeprefix(old)
    return key
