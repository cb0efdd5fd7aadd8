"""Encoders to evaluate: a run, an exported backbone, or a checkpoint of another project.

Which encoder a file needs is taken from the file or from `arch`, never guessed from its tensors:
MoCo-v3's ViT-S has 12 heads under the very names and shapes of timm's 6.
"""

import datetime
import hashlib
import math
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common import cards
from common.errors import UserError, nearest_name
from common.models import EMBED_DIMS, build_encoder
from common.run import backbone, checkpoint, documents, environment, results
from common.run.folder import read_config
from eval import weights
from eval.layouts import CIFAR, adapt_stem, unwrap
from results import record

IMAGE_SIZE = 224  # of checkpoints that do not say their own
PIXELS, RANDOM = "pixels", "random"  # controls: no encoder at all, and an untrained one
# a classifier or projector takes the name of the last layer: torchvision's fc, timm's head
HEADS = {"resnet": ("fc.",), "vit": ("head.",), "tiny": ()}


def load_encoder(
    source: str | Path, arch: str | None = None, image_size: int | None = None
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns (encoder in eval mode on CPU, facts) of `source`.

    `source` is a run folder, a `backbone.safetensors` or a checkpoint of a run, a checkpoint of
    another project in one of the LAYOUTS, or a control: "pixels" (the image itself, of
    `image_size`) or "random" (`arch` with the weights of seed 0). `arch` is needed if the file does
    not name it, and must agree if it does. The encoder maps (N,3,S,S) to (N,embed_dim); a ViT of
    another S than `image_size` gets its positions interpolated.

    The facts are arch, recipe (None for others), image_size, sha256 of the file, run (the folder of
    a finished one, or None), config (the run's, or {}), layout, epoch (or None), `metadata` of our
    own files, `record`, the fields of a record that only the file knows, and perhaps `note`. Raises
    UserError for anything that does not match exactly, with some of what is missing and unexpected.
    """
    if arch is not None and arch not in EMBED_DIMS:
        near = nearest_name(arch, EMBED_DIMS)
        raise UserError(f"--arch {arch}: none of {', '.join(EMBED_DIMS)}{near}")
    if str(source) in (PIXELS, RANDOM):
        return control(str(source), arch, image_size or IMAGE_SIZE)
    path = documents.expanded(source)
    if path.is_dir():
        path = newest_of(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or run folder")
    if path.suffix == ".safetensors" and "feature_check" in safetensors_metadata(path):
        encoder, facts = own_backbone(path, arch)
    else:
        content, sha256 = weights.read(path)
        if checkpoint.is_ours(content):
            encoder, facts = own_checkpoint(path, content, arch)
        else:
            encoder, facts = foreign(path, content, arch, image_size)
        facts["sha256"] = sha256
    return at_size(encoder, facts, image_size)


def newest_of(folder: Path) -> Path:
    """Returns the newest file of a run's encoder: the backbone if the run has ended, else the
    newest checkpoint. Raises UserError if the folder has neither.
    """
    exported, saved = folder / backbone.NAME, checkpoint.find(folder)
    if saved is not None and not (exported.exists() and results.is_finished(folder)):
        return saved
    if not exported.exists():
        raise UserError(
            f"{folder} has no {backbone.NAME} and no {checkpoint.NAME}: not a run folder"
        )
    return exported


def own_backbone(path: Path, arch: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """Returns an encoder that one of our runs exported; its features are checked on load."""
    encoder, metadata = backbone.load_backbone(path)
    refuse_other(path, metadata["arch"], arch)
    run = path.absolute().parent
    run = run if (run / results.NAME).exists() else None
    return encoder, {
        "arch": metadata["arch"],
        "recipe": metadata.get("recipe"),
        "image_size": int(metadata["image_size"]),
        "sha256": sha256_of(path),
        "run": run,
        "config": (read_config(run) or {}) if run else {},
        "layout": "ours",
        "epoch": float(metadata["epoch"]) if "epoch" in metadata else None,
        "metadata": metadata,
        "record": {},
    }


def own_checkpoint(
    path: Path, saved: dict[str, Any], arch: str | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the encoder of a run's checkpoint, saved before the run's end or as a snapshot."""
    if "recipe" not in saved:
        raise UserError(f"{path} is the checkpoint of an evaluation: give a run's, or its backbone")
    state = checkpoint.in_format_2(saved)["state"]["model"]
    config, starts = config_of(path, saved)
    refuse_other(path, config["arch"], arch)
    encoder = build(config["arch"], config["image_size"])
    prefix = "encoder."
    tensors = {n.removeprefix(prefix): t for n, t in state.items() if n.startswith(prefix)}
    backbone.load_exactly(encoder, tensors, str(path))
    return encoder.eval(), {
        "arch": config["arch"],
        "recipe": saved["recipe"],
        "image_size": config["image_size"],
        "run": None,
        "config": config,
        "layout": "ours",
        "epoch": float(saved["epoch"]),
        "metadata": {},
        "record": record.of_checkpoint(config, saved, starts),
    }


def config_of(path: Path, saved: dict[str, Any]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Returns (config.yaml, the starts in environment.json) of the run that a checkpoint is of. If
    the checkpoint lies elsewhere, returns the flags that it holds itself, and no starts.
    """
    folder = path.parent.parent if path.parent.name == "snapshots" else path.parent
    flags = {"recipe": saved["recipe"], **saved.get("config", {})}
    config = read_config(folder) or {}
    if all(config.get(n, v) == v for n, v in flags.items() if n not in record.PLACES):
        flags = config | flags
        try:
            first = documents.read_json(folder / environment.NAME, "environment")
            starts = [first, *first.get("restarts", [])]
        except UserError:
            starts = []
    else:
        starts = []
    if not {"arch", "image_size"} <= set(flags):
        raise UserError(f"{path} does not say its run's flags: leave it beside the config.yaml")
    own = {"method": cards.method_of(saved["recipe"], flags), "plan": None, "settings": {}}
    return own | flags, starts


def foreign(
    path: Path, content: Any, arch: str | None, image_size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns the encoder of another project's checkpoint; its keys must match exactly."""
    found = weights.weights_of(content, str(path))
    layout, tensors = unwrap(found["tensors"], str(path))
    arch = arch_of(path, found["arch"], layout.name, arch)
    size = size_of(path, arch, tensors, image_size)
    encoder = build(arch, size)
    said = adapt_stem(encoder, layout, arch, str(path))
    heads = HEADS[re.split(r"[0-9_]", arch)[0]]
    tensors = {name: t for name, t in tensors.items() if not name.startswith(heads)}
    tensors = with_counters(tensors, encoder)
    backbone.load_exactly(encoder, tensors, f"{path} ({layout.name} layout, {arch})")
    return encoder.eval(), {
        "arch": arch,
        "recipe": None,
        "image_size": size,
        "run": None,
        "config": {},
        "layout": said,
        "epoch": found["epoch"],
        "metadata": {},
        "record": {"layout": said},
    }


def with_counters(tensors: dict[str, Tensor], encoder: nn.Module) -> dict[str, Tensor]:
    """Adds batch norms' counters of steps to the tensors if they have none at all, as in files from
    before PyTorch 0.4.1 and in detectron2's. No feature depends on these counters.
    """
    counter = "num_batches_tracked"
    if any(name.endswith(counter) for name in tensors):
        return tensors
    fresh = encoder.state_dict()
    return tensors | {name: t for name, t in fresh.items() if name.endswith(counter)}


def size_of(path: Path, arch: str, tensors: dict[str, Tensor], image_size: int | None) -> int:
    """Returns the image size to build another project's encoder for: a ViT's own, by its positions.
    Raises UserError if that size is not the default of images, and --image-size is not given.
    """
    positions = tensors.get("pos_embed")
    patch = tensors.get("patch_embed.proj.weight")
    if not arch.startswith("vit") or positions is None or patch is None or patch.shape[-1] != 16:
        return image_size or IMAGE_SIZE
    side = math.isqrt(max(positions.shape[1] - 1, 0)) if positions.ndim == 3 else 0
    own = 16 * side
    if not side or side**2 + 1 != positions.shape[1]:
        return image_size or IMAGE_SIZE
    if image_size is None and own != IMAGE_SIZE:
        raise UserError(
            f"{path} has positions for images of {own} pixels, not {IMAGE_SIZE}: give --image-size "
            f"{own}, or another multiple of 16 to interpolate them"
        )
    return own


def at_size(
    encoder: nn.Module, facts: dict[str, Any], image_size: int | None
) -> tuple[nn.Module, dict[str, Any]]:
    """Returns encoder and facts at the size asked for: a ViT's positions are interpolated."""
    own = facts["image_size"]
    if image_size in (None, own) or not facts["arch"].startswith("vit"):
        return encoder, facts
    if image_size % 16:
        raise UserError(f"--image-size {image_size}: {facts['arch']} takes multiples of 16")
    encoder.set_input_size(image_size)
    note = f"positions interpolated from {own} to {image_size} pixels"
    return encoder, facts | {"image_size": image_size, "note": note}


def build(arch: str, image_size: int) -> nn.Module:
    """Returns `build_encoder`'s encoder; raises UserError for a size that the arch cannot take."""
    try:
        return build_encoder(arch, image_size)
    except ValueError as error:
        raise UserError(str(error)) from None


def refuse_other(path: Path, named: str, arch: str | None) -> None:
    """Raises UserError if --arch is another than the file's."""
    if arch not in (None, named):
        raise UserError(f"{path} holds {named}, not --arch {arch}")


def arch_of(path: Path, named: str | None, layout: str, arch: str | None) -> str:
    """Returns our name of the encoder that the file names, or else that --arch gives."""
    if named in ("vit_small", "vit_base") and layout.startswith("moco-v3"):
        named += "_mocov3"  # moco-v3 vits.py: 12 heads, fixed positions
    elif named == "vit_small" and layout != "dino":
        if arch not in ("vit_small", "vit_small_mocov3"):
            raise UserError(
                f"{path} holds a vit_small, which has 6 heads in timm and DINO and 12 in MoCo-v3, "
                "also after its linear evaluation: give --arch vit_small or vit_small_mocov3"
            )
        named = arch
    elif named == "resnet18" and arch == CIFAR:
        named = arch  # their first convolutions differ in shape: the wrong one cannot load
    if named is None:
        if arch is None:
            raise UserError(
                f"{path} does not say which encoder it holds: give --arch "
                f"({', '.join(EMBED_DIMS)})",
            )
        return arch
    named = weights.ARCHS.get(named, named)
    if named not in EMBED_DIMS:
        raise UserError(f"{path} holds {named}, which is none of {', '.join(EMBED_DIMS)}")
    refuse_other(f"{path} ({layout} layout)", named, arch)
    return named


def record_fields(facts: dict[str, Any], config: Any, described: dict[str, Any]) -> dict[str, Any]:
    """Returns a record's fields about the encoder of these `facts`: its run's, else what its file
    says.

    `config` has backbone, method, pretrained_on and seed; `described` is `environment.describe` of
    the evaluation.
    """
    if facts["run"] is not None:
        found = record.of_runs([facts["run"]])
    else:
        found = fields_of_file(facts, config, described) | facts["record"]
    return record.noted(found, facts.get("note", ""))


def in_words(facts: dict[str, Any]) -> str:
    """Says how this encoder differs from a finished run's at its own image size, "" if not."""
    fields = facts["record"]
    epoch = fields.get("epoch", "last")
    words = [fields.get("layout"), "" if epoch == "last" else f"epoch {epoch}", facts.get("note")]
    return ", ".join(word for word in words if word)


def fields_of_file(facts: dict[str, Any], config: Any, described: dict[str, Any]) -> dict[str, Any]:
    """Returns a record's fields about the encoder of a file that lies in no finished run."""
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
    """Returns the header's metadata; {} if there is none or the file is damaged."""
    try:
        with documents.opened(path) as file:
            length = int.from_bytes(file.read(8), "little")
            header = file.read(min(length, 100_000_000)).decode()
        return documents.parsed_json(header, strict=False).get("__metadata__", {})
    except (OSError, UserError, ValueError, AttributeError):
        return {}


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# -- controls -------------------------------------------------------------------------------------


def is_random(facts: dict[str, Any]) -> bool:
    """Tells whether an encoder was never trained: the control, or a run's snapshot of epoch 0."""
    if facts["layout"] == "control":
        return facts["arch"] != PIXELS
    return facts["layout"] == "ours" and facts["epoch"] == 0


class Pixels(nn.Module):
    """An encoder whose features are the normalised image itself: (N,3,S,S) -> (N,3*S*S)."""

    def __init__(self, image_size: int):
        super().__init__()
        self.embed_dim = 3 * image_size**2
        # says device and precision, as an encoder's weights do
        self.scale = nn.Parameter(torch.ones(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return (x * self.scale).flatten(1)


def control(name: str, arch: str | None, image_size: int) -> tuple[nn.Module, dict[str, Any]]:
    """Returns raw pixels or a random encoder: what an evaluation gives without any training."""
    if name == RANDOM and arch is None:
        raise UserError("--backbone random needs --arch")
    if name == PIXELS and arch is not None:
        raise UserError("--backbone pixels takes no --arch")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        encoder = Pixels(image_size) if name == PIXELS else build(arch, image_size)
    digest = hashlib.sha256(b"calibrated" if name == RANDOM else b"")  # evaluations calibrate it
    for key, tensor in encoder.state_dict().items():
        digest.update(key.encode() + tensor.contiguous().numpy().tobytes())
    return encoder.eval(), {
        "arch": arch or PIXELS,
        "recipe": None,
        "image_size": image_size,
        "sha256": digest.hexdigest(),
        "run": None,
        "config": {},
        "layout": "control",
        "epoch": None,
        "metadata": {},
        "record": {},
    }


class FirstFeatures(nn.Module):
    """An encoder cut to its first `number` features; raises UserError if it has fewer."""

    def __init__(self, encoder: nn.Module, number: int):
        super().__init__()
        if number > encoder.embed_dim:
            has = f"the encoder has {encoder.embed_dim} features"
            raise UserError(f"--first-features {number}: {has}")
        self.encoder, self.embed_dim = encoder, number

    def forward(self, images: Tensor) -> Tensor:
        return self.encoder(images)[:, : self.embed_dim]
