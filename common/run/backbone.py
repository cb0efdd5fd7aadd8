"""`backbone.safetensors`: an encoder's weights under torchvision's or timm's own names.

Metadata say how to build the encoder (arch, loader, loader_kwargs), where it comes from (recipe,
epoch, commit, configuration hash), how its input is made (image size, mean, std), and hold the
features of one fixed input, so that a wrong build is noticed: two ViT-S with 6 and 12 heads have
the same names and shapes.
"""

import copy
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.augment import MEAN, STD
from common.config import LARGEST_IMAGE
from common.errors import UserError
from common.files import write
from common.models import build_encoder, timm_arguments
from common.run import documents, results

NAME = results.BACKBONE
LISTED = 10  # names in an error's line, which may be of hundreds
CHECK_FEATURES = 16  # how many features of the fixed input are stored
TOLERANCE = 1e-3  # of their largest: other machines round differently, other networks differ by far


def loader_of(arch: str, image_size: int) -> tuple[str, dict[str, Any]]:
    """Returns the public function and arguments that build this arch (a ResNet with classifier)."""
    if arch.startswith("vit"):
        return "timm.create_model", timm_arguments(arch, image_size)
    if arch in ("resnet50", "resnet101", "resnet18"):
        return f"torchvision.models.{arch}", {}
    return "common.models.build_encoder", {"arch": arch}


def metadata_of(arch: str, image_size: int) -> dict[str, Any]:
    """Returns what a backbone's file says of how to build the encoder and its input."""
    loader, arguments = loader_of(arch, image_size)
    how = {"arch": arch, "loader": loader, "loader_kwargs": arguments, "image_size": image_size}
    return how | {"mean": MEAN, "std": STD}


def fixed_input(image_size: int) -> Tensor:
    """Returns (1,3,S,S) float32: smooth waves of fixed frequencies, the same on every machine."""
    y, x = np.mgrid[0:image_size, 0:image_size] / image_size
    waves = [np.sin(2 * np.pi * ((c + 1) * x + (3 - c) * y) + c) for c in range(3)]
    return torch.from_numpy(np.stack(waves)[None].astype(np.float32))


@torch.no_grad()
def check_features(encoder: nn.Module, image_size: int) -> list[float]:
    """Returns the first features of the fixed input, in eval mode, float32, on CPU."""
    encoder = copy.deepcopy(encoder).to("cpu", torch.float32).eval()
    features = encoder(fixed_input(image_size))[0, :CHECK_FEATURES].tolist()
    return [float(f"{f:.7g}") for f in features]


def export_backbone(
    path: Path, encoder: nn.Module, arch: str, image_size: int, facts: dict[str, Any]
) -> None:
    """Writes the encoder in float32 with its metadata; `facts` adds recipe, epoch, commit, …"""
    from safetensors.torch import save

    about = metadata_of(arch, image_size)
    metadata = {
        **{n: v if isinstance(v, str) else json.dumps(v) for n, v in about.items()},
        "feature_check": json.dumps(check_features(encoder, image_size)),
        **{name: str(value) for name, value in facts.items()},
    }
    tensors = {
        name: (t.float() if t.is_floating_point() else t).detach().cpu().contiguous().clone()
        for name, t in encoder.state_dict().items()
    }
    write(path, sorted_header(save(tensors, metadata)))


def sorted_header(content: bytes) -> bytes:
    """Sorts the header of a safetensors file, so that equal runs give equal files."""
    length = int.from_bytes(content[:8], "little")
    header = json.dumps(json.loads(content[8 : 8 + length]), sort_keys=True).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + content[8 + length :]


def load_backbone(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """Loads (encoder in eval mode on CPU, metadata) from a backbone file or a run folder.

    Names must match exactly, and the features of the fixed input must be those that the run stored.
    Raises UserError otherwise.
    """
    from safetensors import safe_open

    path = Path(path)
    path = path / NAME if path.is_dir() else path
    documents.opened(path).close()  # refuses a pipe, which would block
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        raise UserError(f"{path} cannot be read as a backbone: {error}") from None
    if "arch" not in metadata or "feature_check" not in metadata:
        raise UserError(f"{path} has no metadata of these recipes (arch, feature_check)")
    try:
        image_size = int(metadata["image_size"])
        stored = [float(number) for number in documents.parsed_json(metadata["feature_check"])]
    except (LookupError, ValueError, TypeError) as error:
        raise UserError(f"{path}: its image_size or feature_check is damaged ({error})") from None
    if not 0 < image_size <= LARGEST_IMAGE or len(stored) != CHECK_FEATURES:
        raise UserError(f"{path}: no run writes such an image_size or feature_check")
    try:
        encoder = build_encoder(metadata["arch"], image_size)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    load_exactly(encoder, tensors, str(path))
    found = check_features(encoder, image_size)
    largest = max(map(abs, stored))
    worst = max(abs(a - b) for a, b in zip(stored, found, strict=True))
    if not worst <= TOLERANCE * largest:  # also if something is not a number
        raise UserError(
            f"{path}: the features of the fixed input differ from those stored by the run; "
            "the file was changed or this code builds another network"
        )
    return encoder.eval(), metadata


def load_exactly(encoder: nn.Module, tensors: dict[str, Tensor], where: str) -> None:
    """Loads weights if names and shapes match exactly; raises UserError that says what does not."""
    expected = encoder.state_dict()
    missing = [f"missing {name}" for name in expected if name not in tensors]
    unexpected = [f"unexpected {name}" for name in tensors if name not in expected]
    other = [
        f"{name} is {(*tensors[name].shape,)}, not {(*expected[name].shape,)}"
        for name in expected
        if name in tensors and tensors[name].shape != expected[name].shape
    ]
    if missing or unexpected or other:
        kinds = itertools.zip_longest(missing, unexpected, other)  # some of each are said
        problems = listed([text for row in kinds for text in row if text])
        raise UserError(f"{where} does not fit the encoder: {problems}")
    encoder.load_state_dict(tensors)


def listed(names: Sequence[str]) -> str:
    """Joins the names in one line; beyond LISTED it gives the first ones and how many more."""
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more
