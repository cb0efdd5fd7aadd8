"""Encoders to evaluate: a run, an exported backbone, or a checkpoint of another project.

Which encoder a file needs is taken from the file or from `arch`, never guessed from its tensors:
MoCo-v3's ViT-S has 12 heads under the very names and shapes of timm's 6.
"""

import datetime
import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import cards
from common.errors import UserError, nearest_name
from common.models import EMBED_DIMS, build_encoder
from common.run import backbone, documents
from results import record

IMAGE_SIZE = 224  # of checkpoints that do not say their own
PIXELS, RANDOM = "pixels", "random"  # controls: no encoder at all, and an untrained one

# Where each project keeps its encoder: (prefix of the encoder, prefixes of what else is in it).
# moco-v3 moco/builder.py: the linear evaluation takes the base encoder, not the momentum one.
# simsiam/builder.py, and gsg/builder.py, whose BYOL adds `encoder_momentum`.
LAYOUTS = {
    "moco-v3": ("base_encoder.", ("momentum_encoder.", "predictor.")),
    "moco-v3, momentum encoder only": ("momentum_encoder.", ("predictor.",)),
    "simsiam": ("encoder.", ("predictor.", "encoder_momentum.", "predictor_momentum.")),
}
# classifiers and projectors sit in the place of the last layer: torchvision's fc, timm's head
HEADS = {"resnet": ("fc.",), "vit": ("head.",), "tiny": ()}


def load_encoder(
    source: str | Path, arch: str | None = None, image_size: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """(encoder in eval mode on CPU, facts) of `source`.

    `source` is a run folder, a `backbone.safetensors`, a checkpoint of torchvision, timm, moco-v3
    or simsiam layout, or a control: "pixels" (the image itself, of `image_size`) or "random"
    (`arch` with the weights of seed 0). `arch` is needed where the file does not name it, and must
    agree where it does. The encoder maps (N,3,S,S) to (N,embed_dim).

    facts: arch, recipe (None for others), image_size, sha256 of the file, run (its folder, or
    None), layout, epoch (or None), and `metadata` of our own files. Raises UserError for anything
    that does not match exactly, with every missing and unexpected key.
    """
    if arch is not None and arch not in EMBED_DIMS:
        near = nearest_name(arch, EMBED_DIMS)
        raise UserError(f"--arch {arch}: none of {', '.join(EMBED_DIMS)}{near}")
    if str(source) in (PIXELS, RANDOM):
        return control(str(source), arch, image_size or IMAGE_SIZE)
    path = documents.expanded(source)
    if path.is_dir():
        if not (path / backbone.NAME).exists():
            raise UserError(
                f"{path} has no {backbone.NAME}: not a run folder, or the run is not finished"
            )
        path = path / backbone.NAME
    if not path.is_file():
        raise UserError(f"{path}: no such file or run folder")
    if path.suffix == ".safetensors" and "feature_check" in safetensors_metadata(path):
        return own_backbone(path, arch)
    return foreign(path, arch, image_size)


def own_backbone(path: Path, arch: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """An encoder that one of our runs exported; its features are checked on load."""
    encoder, metadata = backbone.load_backbone(path)
    if arch not in (None, metadata["arch"]):
        raise UserError(f"{path} holds {metadata['arch']}, not --arch {arch}")
    run = path.absolute().parent
    return encoder, {
        "arch": metadata["arch"],
        "recipe": metadata.get("recipe"),
        "image_size": int(metadata["image_size"]),
        "sha256": sha256_of(path),
        "run": run if (run / "results.json").exists() else None,
        "layout": "ours",
        "epoch": float(metadata["epoch"]) if "epoch" in metadata else None,
        "metadata": metadata,
    }


def foreign(
    path: Path, arch: str | None, image_size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """An encoder of another project's checkpoint, its keys matched exactly."""
    content = read_tensors(path)
    layout, tensors = unwrap(content["tensors"], str(path))
    arch = arch_of(path, content["arch"], layout, arch)
    image_size = image_size or IMAGE_SIZE
    encoder = build_encoder(arch, image_size)
    heads = HEADS[re.split(r"[0-9_]", arch)[0]]
    tensors = {name: t for name, t in tensors.items() if not name.startswith(heads)}
    backbone.load_exactly(encoder, tensors, f"{path} ({layout} layout, {arch})")
    return encoder.eval(), {
        "arch": arch,
        "recipe": None,
        "image_size": image_size,
        "sha256": sha256_of(path),
        "run": None,
        "layout": layout,
        "epoch": content["epoch"],
        "metadata": {},
    }


def read_tensors(path: Path) -> dict[str, Any]:
    """`tensors`, and the `arch` and `epoch` that the file names (None where it does not)."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        try:
            return {"tensors": load_file(path), "arch": None, "epoch": None}
        except Exception as error:
            raise UserError(f"{path} is no safetensors file: {error}") from None
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # zip, pickle and stream errors of many types
        raise UserError(
            f"{path} cannot be read as a checkpoint of weights ({type(error).__name__})"
        ) from None
    found = {"arch": None, "epoch": None}
    if isinstance(state, dict):
        if isinstance(state.get("arch"), str):
            found["arch"] = state["arch"]
        if isinstance(state.get("epoch"), int | float):
            found["epoch"] = float(state["epoch"])
        for name in ("state_dict", "model"):
            if isinstance(state.get(name), dict):
                state = state[name]
                break
    tensors = state if isinstance(state, dict) else {}
    if not tensors or not all(isinstance(t, Tensor) for t in tensors.values()):
        raise UserError(f"{path} holds no state_dict of tensors")
    return found | {"tensors": dict(tensors)}


def unwrap(tensors: dict[str, Tensor], where: str) -> tuple[str, dict[str, Tensor]]:
    """(layout, the encoder's tensors): prefixes removed, what is known not to be of the encoder
    dropped by name. Anything else stays, for the exact match to name.
    """
    if all(name.startswith("module.") for name in tensors):  # DistributedDataParallel's
        tensors = {name.removeprefix("module."): t for name, t in tensors.items()}
    for layout, (prefix, others) in LAYOUTS.items():
        if any(name.startswith(prefix) for name in tensors):
            kept = {n: t for n, t in tensors.items() if not n.startswith(others)}
            return layout, {name.removeprefix(prefix): t for name, t in kept.items()}
    return "torchvision or timm", tensors


def arch_of(path: Path, named: str | None, layout: str, arch: str | None) -> str:
    """Our name of the encoder: of what the file names, else of --arch."""
    if named is None:
        if arch is None:
            raise UserError(
                f"{path} does not say which encoder it holds: give --arch "
                f"({', '.join(EMBED_DIMS)})",
            )
        return arch
    if named == "vit_small" and layout.startswith("moco-v3"):
        named = "vit_small_mocov3"  # moco-v3 vits.py: 12 heads, fixed positions
    if named not in EMBED_DIMS:
        raise UserError(f"{path} holds {named}, which is none of {', '.join(EMBED_DIMS)}")
    if arch not in (None, named):
        raise UserError(f"{path} ({layout} layout) holds {named}, not --arch {arch}")
    return named


def record_fields(facts: dict[str, Any], config: Any, described: dict[str, Any]) -> dict[str, Any]:
    """A record's fields about the encoder of these `facts`: of its run, else what its file says.

    `config` has backbone, method, pretrained_on and seed; `described` is `environment.describe` of
    the evaluation.
    """
    if facts["run"] is not None:
        return record.of_runs([facts["run"]])
    metadata, devices = facts["metadata"], described["devices"]
    method = config.method or f"{Path(config.backbone).name} ({facts['layout']})"
    if facts["recipe"] is not None:
        method = cards.method_of(facts["recipe"], {})
    return {
        "method": method,
        "recipe": facts["recipe"],
        "arch": facts["arch"],
        "pretraining": {
            "dataset": config.pretrained_on,
            "copy": None,
            "incomplete": None,
            "epochs": facts["epoch"],
            "batch": None,
        },
        "seeds": [config.seed],
        "seeds_of": "evaluation",
        "epoch": "last",
        "commit": metadata.get("commit", described["commit"]),
        "dirty": False,
        "config_hash": metadata.get("config_hash"),
        "command": [],
        "versions": {n: v for n, v in described["versions"].items() if v is not None},
        "hardware": f"{devices['name']} x {devices['ranks']}",
        "hours": None,
        "images_per_second": None,
        "backbone_sha256": [facts["sha256"]],
        "date": datetime.date.today().isoformat(),
    }


def safetensors_metadata(path: Path) -> dict[str, str]:
    """The header's metadata; empty where there is none or the file is damaged."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            return json.loads(file.read(min(length, 100_000_000))).get("__metadata__", {})
    except (OSError, ValueError, AttributeError):
        return {}


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- controls -------------------------------------------------------------------------------------


class Pixels(nn.Module):
    """The normalised image as its own features: (N,3,S,S) -> (N,3*S*S)."""

    def __init__(self, image_size: int):
        super().__init__()
        self.embed_dim = 3 * image_size**2
        # says device and precision, as an encoder's weights do
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).flatten(1)


def control(name: str, arch: str | None, image_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """Raw pixels, or a random encoder: what an evaluation gives without any training."""
    if name == RANDOM and arch is None:
        raise UserError("--backbone random needs --arch")
    if name == PIXELS and arch is not None:
        raise UserError("--backbone pixels has no --arch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Pixels(image_size) if name == PIXELS else build_encoder(arch, image_size)
    digest = hashlib.sha256(b"calibrated" if name == RANDOM else b"")  # by the evaluations
    for key, tensor in encoder.state_dict().items():
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return encoder.eval(), {
        "arch": arch or PIXELS,
        "recipe": None,
        "image_size": image_size,
        "sha256": digest.hexdigest(),
        "run": None,
        "layout": "control",
        "epoch": None,
        "metadata": {},
    }
