"""The names that detectron2 gives to a ResNet-50: a backbone under them, and whether it arrived."""

import pickle
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common import files
from common.errors import UserError, make_folder
from common.run.backbone import listed

KEYS = Path(__file__).resolve().parent / "resnet50_keys.txt"
# where the backbone sits in detectron2's models: res5 is in the head of a C4 one
BODIES = ("backbone.bottom_up.", "backbone.", "roi_heads.")
# what a detector has besides the backbone: these parts train from random weights
NEW = ("backbone.fpn_", "proposal_generator.", "roi_heads.box_", "roi_heads.mask_")
NEW += ("roi_heads.res5.norm.",)
COUNTER = "num_batches_tracked"


def detectron2_name(name: str) -> str:
    """Maps layer1.0.bn2.weight to res2.0.conv2.norm.weight, conv1.weight to stem.conv1.weight."""
    name = re.sub(r"^layer(\d)", lambda found: f"res{int(found[1]) + 1}", name)
    name = re.sub(r"bn(\d)", r"conv\1.norm", name)
    name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
    return name if name.startswith("res") else f"stem.{name}"


def torchvision_name(name: str) -> str:
    """Maps res2.0.conv2.norm.weight to layer1.0.bn2.weight, stem.conv1.weight to conv1.weight."""
    name = re.sub(r"^res(\d)", lambda found: f"layer{int(found[1]) - 1}", name)
    name = re.sub(r"conv(\d)\.norm", r"bn\1", name.removeprefix("stem."))
    return name.replace("shortcut.norm", "downsample.1").replace("shortcut", "downsample.0")


def convert(tensors: dict[str, Tensor], where: str = "the backbone") -> dict[str, Tensor]:
    """Returns torchvision's ResNet-50 under detectron2's names, float32 on CPU; UserError with a
    list of names if they or their shapes are not those of detectron2's ResNet-50.
    """
    found = {
        detectron2_name(name): t.detach().to("cpu", torch.float32)
        for name, t in tensors.items()
        if not name.endswith(COUNTER)
    }
    problems = differences({n: tuple(t.shape) for n, t in found.items()}, expected_shapes())
    if problems:
        raise UserError(
            f"{where} is no ResNet-50 of torchvision's: {len(problems)} mismatches: "
            f"{listed(problems)}"
        )
    return found


def expected_shapes() -> dict[str, tuple[int, ...]]:
    """Returns name and shape of every tensor of detectron2's ResNet-50."""
    lines = [line.split() for line in KEYS.read_text().splitlines() if not line.startswith("#")]
    return {name: tuple(map(int, shape.split("x"))) for name, shape in lines}


def differences(found: dict[str, tuple], expected: dict[str, tuple]) -> list[str]:
    problems = [f"missing {n}" for n in expected if n not in found]
    problems += [f"unexpected {n}" for n in found if n not in expected]
    return problems + [
        f"{n} is {found[n]}, not {expected[n]}"
        for n in found
        if n in expected and found[n] != expected[n]
    ]


def check_loaded(state: dict[str, Tensor], converted: dict[str, Tensor]) -> None:
    """Raises UserError unless a detectron2 model's state holds every converted tensor, equal, and
    all else in it is new: FPN, RPN, heads.
    """
    problems, own = [], {}
    for name, tensor in state.items():
        if name.startswith(NEW) or name.endswith(COUNTER):
            continue
        prefix = next((p for p in BODIES if name.startswith(p)), "")
        own[name.removeprefix(prefix)] = tensor
    for name, tensor in converted.items():
        if name not in own:
            problems.append(f"the model has no {name}")
        elif own[name].shape != tensor.shape or not torch.equal(own[name].cpu(), tensor):
            problems.append(f"{name} was not loaded")
    problems += [f"{name} was not in the backbone" for name in own if name not in converted]
    if problems:
        raise UserError(
            f"the detector did not take the backbone: {len(problems)} mismatches: "
            f"{listed(problems)}"
        )


def write(path: Path, converted: dict[str, Tensor], facts: dict[str, Any]) -> None:
    """Writes detectron2's pickle: numpy arrays, which it matches by the ends of names."""
    content = {
        "model": {name: tensor.numpy() for name, tensor in converted.items()},
        "__author__": f"selfsup-recipes, backbone {facts['sha256']}",
        "matching_heuristics": True,
    }
    make_folder(path.parent)
    files.write(path, pickle.dumps(content))
