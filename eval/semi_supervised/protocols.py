"""The papers' fine-tunings on 1 % and 10 % of the labels; README.md is the same as a table."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from common.augment import View, two_views


@dataclass(frozen=True)
class Protocol:
    """One paper's or code's fine-tuning. Rates are per 256 images of the batch. If there are
    several rates or numbers of epochs, held-out images choose one combination.
    """

    head_lrs: dict[int, tuple[float, ...]]  # by percent; if one is missing, no source states it
    encoder_lrs: dict[int, tuple[float, ...]]
    epochs: dict[int, tuple[int, ...]]
    batch: dict[int, int]
    tied: bool = False  # head and encoder share one rate: the two lists go pair by pair
    nesterov: bool = False
    schedule: str = "cosine per epoch"  # or "cosine per step", "steps"
    interpolation: str = "bilinear"
    init: str = "normal 0.01"
    crop_min: float = 0.08  # smallest share of the area of a training crop; torchvision's default
    assumed: bool = False
    lars: bool = False  # SimCLR's instead of SGD; it gives the head momentum alone
    projector_layers: int = 0  # first layers of the projector that stay under the head
    others: Mapping[int, "Protocol"] = field(default_factory=dict)  # of percents without a source

    def view(self, size: int) -> View:
        """Returns the view of the training images: a crop of `size` pixels and a flip."""
        return two_views("crop-flip", size, self.crop_min, self.interpolation)[0]


def both(value: Any) -> dict[int, Any]:
    """Returns the same value for 1 % and 10 %."""
    return {1: value, 10: value}


SWEEP = (0.01, 0.02, 0.05, 0.1, 0.005)
# BYOL App. C.1: Nesterov 0.9, no weight decay, batch 1024, these rates for everything, 30 or 50
# epochs, chosen on a local validation set. Schedule, scaling of the rate by batch/256, bicubic and
# the head's start as in its code for linear evaluation (byol/eval_experiment.py)
BYOL = Protocol(
    both(SWEEP),
    both(SWEEP),
    both((30, 50)),
    both(1024),
    tied=True,
    nesterov=True,
    schedule="cosine per step",
    interpolation="bicubic",
    init="haiku",
)
# vicreg README.md and evaluate.py; its App. C.2 states the same but for the crops
VICREG = Protocol({1: (0.08,), 10: (0.1,)}, {1: (0.03,), 10: (0.01,)}, both((20,)), both(256))
PROTOCOLS = {
    # SNCLR Sec. 4.2 follows Barlow Twins and BYOL and states no number: Barlow Twins' set-up, with
    # a sweep around the rates of Barlow Twins, VICReg and SwAV
    "snclr": Protocol(
        both((0.1, 0.2, 0.5, 1.0, 5.0)),
        both((0.005, 0.01, 0.02, 0.03)),
        both((20,)),
        both(256),
        assumed=True,
    ),
    "nnclr": replace(BYOL, assumed=True),  # no source states NNCLR's
    "byol": BYOL,
    # SimCLR App. B.5: Nesterov, 0.05 * batch / 256 for everything, batch 4096, 60 or 30 epochs, no
    # warm-up, no weight decay; cosine, bicubic and the head's start as in its code
    "simclr": Protocol(
        both((0.05,)),
        both((0.05,)),
        {1: (60,), 10: (30,)},
        both(4096),
        tied=True,
        nesterov=True,
        schedule="cosine per step",
        interpolation="bicubic",
    ),
    # README.md and evaluate.py: 1 % only
    "barlow": Protocol({1: (0.5,)}, {1: (0.005,)}, {1: (20,)}, {1: 256}),
    "vicreg": replace(VICREG, crop_min=0.2),  # VICReg App. C.2: crops of 20 to 100 %
    "vicreg-code": VICREG,
    # swav README.md and eval_semisup.py: 8 GPUs of 32, rates times 0.2 after 12 and 16 epochs
    "swav": Protocol(
        {1: (5.0,), 10: (0.2,)},
        {1: (0.02,), 10: (0.01,)},
        both((20,)),
        both(256),
        schedule="steps",
        init="torch",
    ),
    # TWIST's README and evaluate.py, whose batch is 256
    "twist": Protocol({1: (0.2,), 10: (0.2,)}, {1: (0.04,), 10: (0.02,)}, both((20,)), both(256)),
    # ours, for images of 32 pixels and a CPU, and no paper's: batches that 1 % of CIFAR-10 fills
    "small": Protocol(
        both((1.0,)),
        both((0.01, 0.03, 0.1, 0.3)),
        {1: (60,), 10: (20,)},
        {1: 32, 10: 128},
    ),
}
# fnc README.md, 1 % only: LARS, 0.005 * sqrt(1024) at batch 1024, 60 epochs, from the projector's
# first layer, a head of zeros; crops of data.py's default. 10 %: SimCLR's, on whose code it builds
PROTOCOLS["fnc"] = Protocol(
    {1: (0.04,)},
    {1: (0.04,)},
    {1: (60,)},
    {1: 1024},
    tied=True,
    schedule="cosine per step",
    interpolation="bicubic",
    init="zeros",
    crop_min=0.2,
    lars=True,
    projector_layers=1,
    others={10: replace(PROTOCOLS["simclr"], assumed=True)},
)
SWAV_EPOCHS, SWAV_FACTOR = (12, 16), 0.2  # eval_semisup.py --decay_epochs, --gamma


def schedule(kind: str, step: int, steps_per_epoch: int, epochs: int) -> float:
    """Returns the factor of both rates at a step."""
    epoch = step // steps_per_epoch
    if kind == "steps":
        return SWAV_FACTOR ** sum(epoch >= after for after in SWAV_EPOCHS)
    if kind == "cosine per epoch":
        return 0.5 * (1 + math.cos(math.pi * epoch / epochs))
    return 0.5 * (1 + math.cos(math.pi * step / (steps_per_epoch * epochs)))
