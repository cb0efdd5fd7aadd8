"""Files of weights, read without running what they hold."""

import argparse
import hashlib
import pickle
import re
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from numpy._core import multiarray, numeric
from torch import Tensor

from common.errors import UserError
from common.models import EMBED_DIMS
from common.run.backbone import listed

# what projects save next to their weights, and what numpy's numbers and arrays are made of: plain
# values, whose making runs no code of the file. They have numpy 1's names and numpy 2's
SAFE = {
    "argparse.Namespace": argparse.Namespace,
    "numpy.dtype": np.dtype,
    "numpy.ndarray": np.ndarray,
}
for package in ("numpy.core", "numpy._core"):
    SAFE[f"{package}.multiarray._reconstruct"] = multiarray._reconstruct
    SAFE[f"{package}.multiarray.scalar"] = multiarray.scalar
    SAFE[f"{package}.numeric._frombuffer"] = numeric._frombuffer
NUMBERS = {type(np.dtype(code)) for code in "?" + np.typecodes["AllInteger"] + "efd"}
# the keys under which checkpoints keep their weights; of DINO's two networks it is the teacher
ENTRIES = ("state_dict", "model", "teacher")
# names in files of encoders that have another name here
ARCHS = {
    "deit_small": "vit_small",  # dino/main_dino.py calls it so too
    "mae_vit_base_patch16": "vit_base",
    "vit_base_patch16": "vit_base",  # in mae/models_vit.py
    "vit_base_patch16_224": "vit_base",
    "vit_small_patch16_224": "vit_small",
}


class Refused(pickle.UnpicklingError):
    """The file asks for a type that is not among the safe ones."""


class ArrayUnpickler(pickle.Unpickler):
    """Loads plain pickles, which torch.load does not take, and knows the SAFE types alone."""

    def find_class(self, module: str, name: str) -> Any:
        if module == "_codecs" and name == "encode":  # how protocol 2 writes bytes
            return lambda text, encoding: text.encode("latin1")
        if f"{module}.{name}" not in SAFE:
            raise Refused(f"GLOBAL {module}.{name}")
        return SAFE[f"{module}.{name}"]


def read(path: Path) -> tuple[Any, str]:
    """Returns (what the file holds, its sha256), of one and the same file though a run may replace
    its checkpoint meanwhile. Raises UserError if it cannot be read.
    """
    with open(path, "rb") as file:
        content = load(path, file)
        file.seek(0)
        return content, hashlib.file_digest(file, "sha256").hexdigest()


def load(path: Path, file: BinaryIO) -> Any:
    """Returns what an open file holds; raises UserError that says what is refused, and how to go
    on.
    """
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except Exception as error:
            raise UserError(f"{path} is no safetensors file: {error}") from None
    is_zip = file.read(2) == b"PK"
    file.seek(0)
    try:
        if path.suffix == ".pkl" and not is_zip:
            return ArrayUnpickler(file, encoding="latin1").load()
        named = [(made, name) for name, made in SAFE.items()]
        with torch.serialization.safe_globals([*named, *NUMBERS]):
            return torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and stream errors of many types
        found = re.search(r"(?:GLOBAL |but got <class ')(\w[\w.]*\w)", str(error))
        if found is None:
            kind = type(error).__name__
            raise UserError(f"{path} cannot be read as a checkpoint of weights ({kind})") from None
        raise UserError(
            f"{path} holds a {found[1]}, which is not loaded since it could run code: if you trust "
            f"the file, save its weights alone by torch.save(torch.load('{path.name}', "
            "weights_only=False)['state_dict'], 'weights.pth'), or from the key they are under"
        ) from None


def weights_of(content: Any, where: str) -> dict[str, Any]:
    """Returns `tensors`, and the `arch` and `epoch` that the content names (None if it does not);
    raises UserError if it has no weights.
    """
    found: dict[str, Any] = {"arch": None, "epoch": None}
    state = content
    if isinstance(content, dict):
        found["arch"] = arch_in(content)
        if isinstance(content.get("epoch"), int | float | np.number):
            found["epoch"] = float(content["epoch"])
        entries = (content[n] for n in ENTRIES if isinstance(content.get(n), dict))
        state = next(entries, content)
    tensors = {n: as_tensor(t) for n, t in state.items()} if isinstance(state, dict) else {}
    if not tensors or None in tensors.values():
        names = [str(name) for name in state] if isinstance(state, dict) else []
        inside = f": it has {listed(names)}" if names else ""
        raise UserError(f"{where} holds no state_dict of tensors{inside}")
    return found | {"tensors": tensors}


def as_tensor(value: Any) -> Tensor | None:
    """Returns a tensor, also for a numpy array of numbers; None for anything else."""
    if isinstance(value, np.ndarray) and type(value.dtype) in NUMBERS:
        return torch.from_numpy(np.array(value))  # a pickle's own memory cannot be written
    return value if isinstance(value, Tensor) else None


def arch_in(content: dict[str, Any]) -> str | None:
    """Returns the encoder that a checkpoint names, in its own words: by itself, or among the flags
    that it holds, if it is one that is known here.
    """
    if isinstance(content.get("arch"), str):
        return content["arch"]
    flags = content.get("args")
    flags = vars(flags) if isinstance(flags, argparse.Namespace) else flags
    named = [flags.get(n) for n in ("arch", "model")] if isinstance(flags, dict) else []
    return next((n for n in named if isinstance(n, str) and n in {**ARCHS, **EMBED_DIMS}), None)
