"""The papers' linear evaluations; README.md is the same as a table."""

import math
from dataclasses import dataclass, replace

from common.augment import View, two_views


@dataclass(frozen=True)
class Protocol:
    """One paper's or code's linear evaluation. Rates are per 256 images of the batch."""

    optimizer: str  # sgd, nesterov (both momentum 0.9) or larc (SGD momentum 0.9 inside)
    lrs: tuple[float, ...]  # of ResNets; --lrs grid is built around the first
    batch: int
    epochs: int
    vit_lrs: tuple[float, ...] = ()  # of ViTs, if they differ
    schedule: str = "epoch"  # cosine to 0, one rate per epoch or per step
    weight_decay: float = 0.0
    interpolation: str = "bilinear"  # torchvision's default, which the PyTorch codes leave
    init: str = "normal 0.01"  # of the head's weight; biases 0
    crop_min: float = 0.08  # smallest share of the area of a training crop; torchvision's default
    warmup_epochs: int = 0  # the cosine's rates, times a line from 1e-4 to 1, per step
    assumed: bool = False  # taken from another paper because no source states it

    def view(self, size: int) -> View:
        """Returns the view of the training images: a crop of `size` pixels and a flip."""
        return two_views("crop-flip", size, self.crop_min, self.interpolation)[0]

    def rates(self, arch: str) -> tuple[float, ...]:
        return self.vit_lrs if arch.startswith("vit") and self.vit_lrs else self.lrs


# BYOL App. C.1: Nesterov, 80 epochs, batch 1024, five rates, chosen on held-out training images.
# Its code (byol/eval_experiment.py): cosine per step, bicubic, haiku's initialisation; 0.2 alone.
BYOL = Protocol(
    "nesterov",
    (0.2, 0.4, 0.3, 0.1, 0.05),
    batch=1024,
    epochs=80,
    schedule="step",
    interpolation="bicubic",
    init="haiku",
)
# SimCLR App. B.6, as its B.5 but for rate and epochs: Nesterov, 0.1 * batch / 256, batch 4096, 90
# epochs, no warm-up, no weight decay; cosine per step, bicubic and a head of zeros as in its code
# and the command of its README
SIMCLR = Protocol(
    "nesterov",
    (0.1,),
    batch=4096,
    epochs=90,
    schedule="step",
    interpolation="bicubic",
    init="zeros",
)
# triplet configs/benchmarks/linear_classification/imagenet/r50_last_cos.py
TRIPLET = Protocol("sgd", (0.04,), batch=256, epochs=100, warmup_epochs=10)
# moco-v3 main_lincls.py: SGD, 0.1 and 3 (its CONFIG.md for ViT), batch 1024, cosine per epoch
MOCOV3 = Protocol("sgd", (0.1,), batch=1024, epochs=90, vit_lrs=(3.0,))
# vicreg README.md (--lr-head 0.02) and evaluate.py; its App. C.2 states the same but for the crops
VICREG = Protocol("sgd", (0.02,), batch=256, epochs=100, weight_decay=1e-6)
PROTOCOLS = {
    # SNCLR Sec. 4.2: SGD, batch 4096, 90 epochs, 0.1 and 3; the rest, which it does not state, is
    # MoCo-v3's, to whose code its README refers
    "snclr": Protocol("sgd", (0.1,), batch=4096, epochs=90, vit_lrs=(3.0,)),
    "simsiam": Protocol("larc", (0.02,), batch=4096, epochs=90),  # SimSiam App. A
    "simsiam-code": Protocol("larc", (0.1,), batch=4096, epochs=90),  # main_lincls.py's default
    "gsg": Protocol("larc", (0.1,), batch=4096, epochs=90),  # gsg main_lincls.py --lars
    "mocov3": MOCOV3,
    "byol": BYOL,
    "simclr": SIMCLR,
    # DirectCLR's paper states none, and trains "with a standard recipe of SimCLR" (Sec. 6.2)
    "directclr": replace(SIMCLR, assumed=True),
    "vicreg": replace(VICREG, crop_min=0.2),  # VICReg App. C.2: crops of 20 to 100 %
    "vicreg-code": VICREG,
    # barlowtwins README.md and evaluate.py, which do not scale the rate
    "barlow": Protocol("sgd", (0.3,), batch=256, epochs=100, weight_decay=1e-6),
    "triplet": TRIPLET,
    # r50_last_cos_for_LessSslEpoch.py, of shorter pretraining: 200 epochs and not 700 to 900
    "triplet-short": replace(TRIPLET, lrs=(0.15,)),
    # swav eval_linear.py: 8 GPUs of 32, its rate not scaled
    "swav": Protocol("sgd", (0.3,), batch=256, epochs=100, weight_decay=1e-6),
    # TWIST's paper was not at hand; SimCLR's stands for it
    "twist": replace(SIMCLR, assumed=True),
    # TWIST's README and evaluate.py: 0.2 at batch 1024, not scaled
    "twist-code": Protocol("sgd", (0.05,), batch=1024, epochs=100),
    # no source at hand states NNCLR's; BYOL's stands for it
    "nnclr": replace(BYOL, assumed=True),
}
# FNC evaluates as SimCLR v2, whose paper was not read: SimCLR's stands for it
PROTOCOLS["fnc"] = replace(PROTOCOLS["simclr"], assumed=True)
# fnc README.md and run.py: 0.005 * sqrt(1024) at batch 1024; crops of data.py's default
PROTOCOLS["fnc-code"] = replace(PROTOCOLS["simclr"], lrs=(0.04,), batch=1024, crop_min=0.2)
# --lrs grid: the protocol's (first) rate times these
GRID = (0.03, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 100.0)
# for `photos`, ours and no paper's: its 4 400 patches would be one batch of the papers' size
PHOTOS_BATCH = 256


def schedule(
    kind: str, step: int, steps_per_epoch: int, epochs: int, warmup_epochs: int = 0
) -> float:
    """Returns the factor of the learning rate at a step: half a cosine from 1 to 0, in a warm-up
    times a line from 1e-4 to 1 (mmcv's lr_updater.py, with the triplet's warmup_ratio).
    """
    warmup = warmup_epochs * steps_per_epoch
    line = 1e-4 + (1 - 1e-4) * step / warmup if step < warmup else 1.0
    if kind == "epoch":
        return line * 0.5 * (1 + math.cos(math.pi * (step // steps_per_epoch) / epochs))
    return line * 0.5 * (1 + math.cos(math.pi * step / (steps_per_epoch * epochs)))
