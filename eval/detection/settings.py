"""What a task's YAML file in configs/ says, for both backends, and what --override changes in it.

The files are detectron2's own format and whole: nothing that is not detectron2's default is left
to a base file, so torchvision's backend reads the same schedule, sizes and norms from them.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from common.errors import UserError, nearest_name
from common.run import documents
from eval.dense import DenseEvaluation

CONFIGS = Path(__file__).resolve().parent / "configs"
Task = Literal[
    "coco_mask_rcnn_R50_FPN_1x",
    "coco_mask_rcnn_R50_FPN_3x",
    "voc_faster_rcnn_R50_FPN",
    "voc0712_faster_rcnn_R50_C4",
]
# names of protocols, those of results/published.yaml if it has them
PROTOCOLS = {
    "coco_mask_rcnn_R50_FPN_1x": "FPN Mask R-CNN 1x",
    "coco_mask_rcnn_R50_FPN_3x": "FPN Mask R-CNN 3x",
    "voc_faster_rcnn_R50_FPN": "FPN Faster R-CNN 144k",
    "voc0712_faster_rcnn_R50_C4": "C4 Faster R-CNN 24k",
}


@dataclass
class Settings:
    """A task's values by dotted name, `settings["SOLVER.BASE_LR"]`, overrides included."""

    task: str
    overrides: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.file = CONFIGS / f"{self.task}.yaml"
        self.values = flat(documents.read_yaml(self.file))
        for name, value in self.overrides.items():
            self.values[name] = value

    def __getitem__(self, name: str) -> Any:
        return self.values[name]

    def get(self, name: str, default: Any) -> Any:
        return self.values.get(name, default)

    @property
    def mask(self) -> bool:
        return self["MODEL.MASK_ON"]

    @property
    def iterations(self) -> int:
        return self["SOLVER.MAX_ITER"]

    def learning_rate(self, step: int) -> float:
        """Returns the rate of the iteration after `step` done ones: BASE_LR, with a linear warm-up
        from WARMUP_FACTOR of it, times GAMMA at each of STEPS (detectron2's WarmupMultiStepLR).
        """
        warm = self["SOLVER.WARMUP_ITERS"]
        factor = self["SOLVER.GAMMA"] ** sum(step >= s for s in self["SOLVER.STEPS"])
        if step < warm:
            start = self["SOLVER.WARMUP_FACTOR"]
            factor *= start + (1 - start) * step / warm
        return self["SOLVER.BASE_LR"] * factor

    def protocol(self, backend: str) -> str:
        """Returns the protocol's published name, and what differs from it."""
        name = PROTOCOLS[self.task]
        name += "" if backend == "detectron2" else f", {backend}"
        return name + (", changed" if self.overrides else "")


class Job(DenseEvaluation):
    """An evaluation with its task's settings: this is what the backends get."""

    settings: Settings


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flattens nested values to dotted names: {"A": {"B": 1}} becomes {"A.B": 1}."""
    found = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value
    return found


def parse_overrides(text: str, task: str) -> dict[str, Any]:
    """Parses text like "SOLVER.MAX_ITER=60 INPUT.MIN_SIZE_TRAIN=[240]" to values by name; UserError
    for a name that the task's file lacks, or a value of another type.
    """
    known = Settings(task).values
    found = {}
    for word in text.split():
        name, sign, value = word.partition("=")
        if not sign or name not in known:
            near = nearest_name(name, known)
            raise UserError(
                f"--override {word}: give NAME=VALUE with a name of configs/{task}.yaml, no space "
                f"within{near}",
            )
        try:
            found[name] = documents.parsed_yaml(value)
        except ValueError:
            raise UserError(f"--override {word}: the value is not YAML") from None
        number = isinstance(known[name], int | float) and not isinstance(known[name], bool)
        if number and isinstance(found[name], str):
            with contextlib.suppress(ValueError):
                found[name] = float(found[name])  # YAML reads 1e-3 as text
        kind = (int, float) if number else type(known[name])
        if type(known[name]) is int and isinstance(found[name], float):
            whole = found[name].is_integer()
            found[name] = int(found[name]) if whole else None
        if name == "SOLVER.IMS_PER_BATCH" and found[name] == 0:
            found[name] = None
        if not isinstance(found[name], kind) or (number and isinstance(found[name], bool)):
            raise UserError(f"--override {word}: the file has {known[name]!r}, of another type")
    return found
