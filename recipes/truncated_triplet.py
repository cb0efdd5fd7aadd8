"""Truncated triplet: Solving Inefficiency of Self-supervised Representation Learning, Wang, Wang,
Wang, Torr and Lin, ICCV 2021.

BYOL's networks with a triplet loss: a prediction is pulled to the target's projection of the other
view and pushed from a deputy of the other images, the mean distance of those ranked 2nd to 10th
hardest. The hardest, which may be of the same class, is left out (smoothed rank-k).

    python recipes/truncated_triplet.py --data /path/to/imagenet                # 1000 epochs
    python recipes/truncated_triplet.py --epochs 200 --data /path/to/imagenet

Aims at 73.8 % linear top-1 on ImageNet in 200 epochs and 75.9 % in "700-900" (README of the code,
whose schedule is of 1000). Paper and code (wanggrun/triplet at c1bbaa9) differ: `--follow paper`
(default) or `official`, a flag for each; see truncated_triplet.md. It costs what BYOL's runs do.
"""

import dataclasses
import math
import re
import sys
from dataclasses import dataclass
from typing import Literal

import common.run.early  # noqa: F401  # isort: skip
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import View, ViewName, two_views
from common.config import (
    CIFAR10,
    PHOTOS,
    Count,
    NotNegative,
    Positive,
    PositiveInt,
    RunConfig,
    Share,
)
from common.distributed import average_gradients, gather, rank
from common.errors import UserError, command
from common.fast.batch_norm import count_values
from common.fast.micro_batch import Pieces
from common.models import build_encoder, in_full_precision, mlp, momentum_copy, update_momentum
from common.optim import build_optimizer, momentum_to_one, scaled_lr, set_lr, warmup_cosine
from common.run.flags import parse
from common.run.run import Run

WARMUP_START = 1e-4  # where the warm-up starts, as a share of the rate: code, warmup_ratio
# smallest side of an online and of a target view under --random-resize, of 224 pixels: code
ONLINE_SIDE, TARGET_SIDE = 96, 128
RESIZE_KEY = 0x547269  # keeps the draws of --random-resize apart from others of the same seed


@dataclass(frozen=True)
class Config(RunConfig):
    """Truncated triplet: smoothed rank-k triplets on BYOL's networks (Wang et al. 2021).

    Each flag says where its value comes from: "slides" are of the paper's Sec. 3, "code" is the
    authors' code for 1000 epochs, "GSG" the paper of guided stop-gradient (Lee and Lee 2023).
    """

    follow: Literal["paper", "official"] = "paper"  # official: sets each flag to the released code
    # negatives are images of the same so many consecutive rows of the global batch, 0: of all;
    # slides: all other images; code: the 196 of a GPU
    block: Count = 0
    # unguarded_lars decays and adapts the scales of the batch norms in shortcuts too; code: yes,
    # since its regular expression for norms misses their names
    adapt_shortcuts: bool = False
    batch_size: PositiveInt = 4096  # global batch; code's file name; what it says: 196 x 8 x 4
    # the deputy's ranks, first-last, 1 is the hardest; code: 2-10; slides: 2 to 2k + 1
    ranks: str = "2-10"
    gamma: Positive = 2.0  # factor of the positive's distance; code
    margin: float = 100.0  # -C of the slides; code: so large that the hinge never acts
    # resize each view anew to a random square, 96 to 224 pixels, the target's 128 to 224; code:
    # yes, and the paper is silent, so that it is off unless asked for
    random_resize: bool = False
    epochs: PositiveInt = 1000  # code
    lr: NotNegative = 4.8  # code, at its batch
    lr_batch: Count = 0  # the batch that --lr is given for, 0: not scaled; code has one batch
    # unguarded_lars: the rate is inside the momentum, and tensors of zeros never move; code
    optimizer: Literal["unguarded_lars", "lars", "sgd", "adamw"] = "unguarded_lars"
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; code
    weight_decay: NotNegative = 1e-6  # code; LARS leaves out biases and norms
    warmup_epochs: NotNegative = 10  # linear from 1e-4 of the rate; code
    cosine_per: Literal["epoch", "step"] = "epoch"  # when the cosine moves the rate; code
    momentum: Share = 0.99  # momentum of the target at the start; a cosine takes it to 1; code
    zero_init_residual: bool = False  # start the last batch norm of each block at 0; code
    projector_hidden: PositiveInt = 4096  # code
    predictor_hidden: PositiveInt = 4096  # code
    output_dim: PositiveInt = 256  # code
    views: ViewName = "byol"  # code; cifar: GSG App. B.2
    jitter_strength: NotNegative = 1.0  # scales --views' colour jitter; code: 1
    crop_min: Share = 0.08  # smallest area of a crop, as a share of the image's; code
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # code


# ours: views and epochs of GSG's App. B.2 and C.2; both readings have negatives of the whole batch,
# since 196 divides neither of these
SMALL_IMAGES = {
    "block": 0,
    "adapt_shortcuts": False,
    "optimizer": "sgd",
    "warmup_epochs": 0,
    "projector_hidden": 2048,
    "predictor_hidden": 2048,
    "crop_interpolation": "bilinear",
}
PRESETS = {
    "official": {"block": 196, "adapt_shortcuts": True, "batch_size": 6272},
    "cifar10": CIFAR10 | SMALL_IMAGES | {"lr_batch": 512},
    "photos": PHOTOS | SMALL_IMAGES | {"lr_batch": 64, "momentum": 0.9},
}


class Triplet(nn.Module):
    """BYOL's online network as the code has it: projector and predictor are FC, batch norm, ReLU,
    FC each, all FCs with bias. The projector starts at He's normal weights, the predictor at
    N(0, 0.01), biases at 0.
    """

    def __init__(self, config: Config):
        super().__init__()
        out = config.output_dim
        self.encoder = build_encoder(config.arch, config.image_size, config.zero_init_residual)
        sizes = [self.encoder.embed_dim, config.projector_hidden, out]
        self.projector = mlp(sizes, hidden_bias=True, output_bias=True)
        sizes = [out, config.predictor_hidden, out]
        self.predictor = mlp(sizes, hidden_bias=True, output_bias=True)
        for layer in [*self.projector, *self.predictor]:
            if isinstance(layer, nn.Linear):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
                nn.init.zeros_(layer.bias)
        for layer in (self.predictor[0], self.predictor[-1]):
            nn.init.normal_(layer.weight, std=0.01)


@in_full_precision
def triplet_loss(
    predictions: Tensor,
    targets: Tensor,
    gamma: float = 2.0,
    ranks: tuple[int, int] = (2, 10),
    margin: float = 100.0,
    block: int = 0,
) -> Tensor:
    """Computes one direction: max(0, gamma d(i, i) - deputy(i) + margin), the mean over images.

    Predictions and the target's projections (N,D), any scale -> scalar; no gradient flows through
    targets. d is -2 cos; deputy(i) is the mean of the `ranks` (both included, 1 is the smallest) of
    d(i, j) over the other images j: of all ranks' (`block` 0), or of the same `block` consecutive
    rows of the global batch. Raises ValueError for ranks that are none or more than there are
    negatives, and for a block that does not divide the global batch.
    """
    first, last = ranks
    p, z = F.normalize(predictions, dim=1), gather(F.normalize(targets.detach(), dim=1))
    size = block or len(z)
    if size < 0 or len(z) % size:
        raise ValueError(f"a block of {block} does not divide the global batch of {len(z)}")
    if not 1 <= first <= last < size:
        raise ValueError(f"ranks {first} to {last} of {size - 1} negatives")
    d = -2 * p @ z.T
    rows = rank() * len(p) + torch.arange(len(p), device=p.device)[:, None]
    columns = torch.arange(len(z), device=p.device)
    negative = (columns // size == rows // size) & (columns != rows)
    hardest = d.masked_fill(~negative, math.inf).topk(last, dim=1, largest=False).values
    deputies = hardest[:, first - 1 :].mean(dim=1)
    return F.relu(gamma * d.gather(1, rows).squeeze(1) - deputies + margin).mean()


def ranks_of(config: Config) -> tuple[int, int]:
    """Returns the first and the last of --ranks; raises UserError if they are not two such."""
    found = re.fullmatch(r"([1-9]\d{0,8})(?:-([1-9]\d{0,8}))?", config.ranks)
    first, last = (int(found[1]), int(found[2] or found[1])) if found else (0, 0)
    if not 1 <= first <= last:
        raise UserError(f"--ranks {config.ranks}: give the first and the last rank, like 2-10")
    return first, last


def draw_sides(seed: int, step: int, block: int, image_size: int) -> list[int]:
    """Draws the pixels of --random-resize for a block of images at a step: of the online network's
    views 1 and 2, then of the target's, each from these numbers alone.
    """
    sides = []
    for view, smallest in enumerate((ONLINE_SIDE, ONLINE_SIDE, TARGET_SIDE, TARGET_SIDE)):
        key, counter = [seed, RESIZE_KEY], [0, view, block, step]
        rng = np.random.Generator(np.random.Philox(key=key, counter=counter))
        sides.append(int(rng.integers(round(smallest / 224 * image_size), image_size + 1)))
    return sides


def resized(images: Tensor, side: int) -> Tensor:
    """Resizes (N,C,H,W) to (N,C,side,side), bilinear without antialiasing, as the code."""
    return F.interpolate(images, size=(side, side), mode="bilinear")


def parameter_groups(model: nn.Module, adapt_shortcuts: bool) -> list[dict]:
    """Splits the tensors into those that the code's LARS decays and adapts and those it does not:
    all of one dimension, but with `adapt_shortcuts` not the scales of torchvision's `downsample.1`.
    """
    groups = [{"params": [], "adapted": True}, {"params": [], "adapted": False}]
    for name, p in model.named_parameters():
        missed = adapt_shortcuts and name.endswith("downsample.1.weight")
        groups[0 if p.ndim > 1 or missed else 1]["params"].append(p)
    return groups


def rate_at(config: Config, lr: float, step: int, steps_per_epoch: int, total: int) -> float:
    """Returns the rate: half a cosine from the first step on, times the warm-up (code)."""
    moved = step if config.cosine_per == "step" else step - step % steps_per_epoch
    warmup = config.warmup_epochs * steps_per_epoch
    line = warmup_cosine(min(step, warmup), warmup, warmup, 1.0, start=WARMUP_START)
    return line * warmup_cosine(moved, total, 0, lr)


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    return [*two_views(config.views, size, crop_min, mode, config.jitter_strength)]


def resolve(config: Config) -> Config:
    """Returns the configuration with --ranks as first-last."""
    return dataclasses.replace(config, ranks="-".join(map(str, ranks_of(config))))


def parse_arguments(argv: list[str] | None = None) -> Config:
    """Reads the flags; raises UserError for a block, ranks or a resizing that cannot be."""
    config = parse(Config, PRESETS, argv, resolve)  # resolve also sees the preset alone
    if config.block and config.batch_size % config.block:
        text = "must divide the global batch, --batch-size"
        raise UserError(f"--block {config.block}: {text} {config.batch_size}")
    negatives = (config.block or config.batch_size) - 1
    if ranks_of(config)[1] > negatives:
        raise UserError(f"--ranks {config.ranks}: an image has {negatives} negatives")
    if config.random_resize and config.arch.startswith("vit"):
        raise UserError(f"--random-resize: {config.arch} takes images of one size, leave it out")
    return config


def own_block(config: Config, ranks: int) -> int:
    """Returns the block of this rank's images. Raises UserError if they are of several: a size is
    drawn for each block, and batch norms take the images of a rank together.
    """
    local, block = config.batch_size // ranks, config.block or config.batch_size
    if block % local:
        text = f"the {local} images of a rank must be of one block: --block 0, "
        text += f"or {config.batch_size // block} ranks"
        raise UserError(f"--random-resize with --block {config.block} on {ranks} ranks: {text}")
    return rank() * local // block


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("truncated_triplet", config)
    block = own_block(config, run.ranks) if config.random_resize else 0
    model = run.place(Triplet(config))
    target = momentum_copy(encoder=model.encoder, projector=model.projector)
    if config.random_resize:  # blocks, so ranks, have sizes of their own
        count_values(model.encoder)
        count_values(target.encoder)
    encode, encode_target = Pieces(model.encoder, config), Pieces(target.encoder, config)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    groups = parameter_groups(model, config.adapt_shortcuts)
    momentum, decay = config.sgd_momentum, config.weight_decay
    optimizer = build_optimizer(config.optimizer, groups, lr, momentum, decay)
    run.begin(model.encoder, model=model, target=target, optimizer=optimizer)

    for step, (x1, x2), _ in run.batches(views_of(config)):
        rate = rate_at(config, lr, step, run.steps_per_epoch, run.total_steps)
        set_lr(optimizer, rate)
        online, other = (x1, x2), (x1, x2)  # the views of the online network and of the target
        if config.random_resize:
            sides = draw_sides(config.seed, step, block, config.image_size)
            online, other = map(resized, online, sides[:2]), map(resized, other, sides[2:])

        with run.autocast():
            y1, y2 = map(model.projector, encode(*online))  # projections
            p1, p2 = model.predictor(y1), model.predictor(y2)  # predictions
            with torch.no_grad():
                z1, z2 = map(target.projector, encode_target(*other))  # the target's projections

        how = config.gamma, ranks_of(config), config.margin, config.block
        loss = triplet_loss(p1, z2, *how) + triplet_loss(p2, z1, *how)

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        m = momentum_to_one(step, run.total_steps, config.momentum)
        run.log(loss=loss, lr=rate, z=y1, momentum=m)
        update_momentum(target, model, m)  # after the step, with its own m (code)

    run.finish(config.output_dim)


if __name__ == "__main__":
    sys.exit(command(main))
