"""DirectCLR: Understanding Dimensional Collapse in Contrastive Self-supervised Learning, Jing,
Vincent, LeCun and Tian, ICLR 2022.

A contrastive loss that sees the first d0 features of a representation, and no projector: the rest
learns through the residual connection of the last block (Sec. 6.2, Fig. 10). `--projector` has the
other rows of its ablation too, all with the same loss of N - 1 negatives.

    python recipes/directclr.py --data /path/to/imagenet              # 100 epochs, ResNet-50
    python recipes/directclr.py --projector none --data /path/to/imagenet   # linear, mlp, random

Aims at 62.7 % linear top-1 on ImageNet (Table 1), beside 66.5 with an MLP, 61.1 with a linear
projector, 51.5 with none and 43.0 with random features. The authors' 100 epochs took 7 hours of 32
V100 GPUs (README of the code). Paper and code (facebookresearch/directclr at a86f64c) differ:
`--follow paper` (default) or `--follow official`; see recipes/directclr.md.
"""

import dataclasses
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
from common.distributed import average_gradients, gather_with_grad, rank
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.models import EMBED_DIMS, build_encoder, in_full_precision, mlp
from common.optim import build_optimizer, scaled_lr, set_lr, warmup_cosine
from common.run.flags import parse
from common.run.run import Run

RANDOM_KEY = 0x644C52  # keeps the draws of `random` apart from others of the same seed


@dataclass(frozen=True)
class Config(RunConfig):
    """DirectCLR: InfoNCE on the first features of the representation (Jing et al. 2022).

    Each flag says where its value comes from: "Sec.", "App." and "Table" are the paper's, "code"
    the authors' released code (main.py, utils.py), "GSG" the paper of guided stop-gradient (Lee and
    Lee 2023).
    """

    follow: Literal["paper", "official"] = "paper"  # official: --loss official, as the code
    # paper: Eq. 2, whose negatives are of the anchor's own view; code: of the other, both ways
    loss: Literal["paper", "official"] = "paper"

    # what the loss sees. directclr: r[0:d0], Sec. 6.2; none: all of r; linear, mlp: a trained
    # projector, Table 1; random: d0 features drawn anew for each step, App. F
    projector: Literal["directclr", "none", "linear", "mlp", "random"] = "directclr"
    # features that directclr and random take; default: 360 of 2048 (code: --dim 360), scaled to
    # the encoder's width
    d0: PositiveInt | None = None
    epochs: PositiveInt = 100  # App. D.3
    batch_size: PositiveInt = 4096  # global batch; App. D.3
    lr: NotNegative = 4.8  # App. D.3; the code does not scale it with the batch
    lr_batch: Count = 0  # the batch that --lr is given for, 0: not scaled; code
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # App. D.3
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; unstated; code
    weight_decay: NotNegative = 1e-6  # unstated; code; LARS leaves out biases and norms (code)
    warmup_epochs: NotNegative = 10  # App. D.3; from 0 (code)
    lr_end: Share = 0.001  # last rate as a share of the highest; unstated; code
    temperature: Positive = 0.1  # code; the paper's equations show none
    # with --projector mlp; 0: as wide as the encoder's output; code: 2048
    projector_hidden: Count = 0
    output_dim: PositiveInt = 128  # with --projector linear and mlp; code
    zero_init_residual: bool = True  # start the last batch norm of each block at 0; unstated; code
    views: ViewName = "byol"  # App. D.1 names the steps; code: their numbers; cifar: GSG App. B.2
    jitter_strength: NotNegative = 1.0  # scales --views' colour jitter; code: 1
    crop_min: Share = 0.08  # smallest area of a crop, as a share of the image's; unstated; code
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # unstated; code


# ours: the paper has no number on small images. Views and epochs of GSG's App. B.2 and C.2
SMALL_IMAGES = {"zero_init_residual": False, "crop_interpolation": "bilinear"}
PRESETS = {
    "official": {"loss": "official"},
    # the paper's rate for its batch, and SimCLR's temperature for CIFAR-10 (README of its code)
    "cifar10": CIFAR10
    | SMALL_IMAGES
    | {"lr": 4.8, "lr_batch": 4096, "weight_decay": 1e-6, "temperature": 0.5},
    # an encoder whose last block has an identity shortcut, which `tiny` lacks; directclr.md
    "photos": PHOTOS
    | SMALL_IMAGES
    | {"arch": "resnet_lab", "optimizer": "sgd", "lr": 0.06, "lr_batch": 64, "warmup_epochs": 1},
}


class SubVector(nn.Module):
    """Takes z = r[0:d0] (Sec. 6.2); nothing is trained."""

    def __init__(self, d0: int):
        super().__init__()
        self.d0 = d0

    def forward(self, r: Tensor) -> Tensor:
        return r[:, : self.d0]


class RandomFeatures(nn.Module):
    """Takes the features of r whose numbers are in `features`, drawn anew for each step (App. F).
    In eval mode it takes all of r, since the loss sees every feature in its turn.
    """

    features: Tensor

    def forward(self, r: Tensor) -> Tensor:
        return r[:, self.features] if self.training else r


def draw_features(width: int, d0: int, seed: int, step: int) -> Tensor:
    """Draws (d0,) int64, distinct numbers of features below `width`, from (seed, step) alone, so
    equally on all ranks and after a restart.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, RANDOM_KEY], counter=[0, 0, 0, step]))
    return torch.from_numpy(rng.permutation(width)[:d0])


class DirectCLR(nn.Module):
    """Makes representations r = f(x), and what the loss sees of them. The heads are the code's:
    linear is one layer without bias; mlp is two without biases, each with a batch norm.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.encoder = build_encoder(config.arch, config.image_size, config.zero_init_residual)
        width, out = self.encoder.embed_dim, config.output_dim
        hidden = config.projector_hidden or width
        self.projector, self.dim = {
            "directclr": lambda: (SubVector(config.d0), config.d0),
            "none": lambda: (nn.Identity(), width),
            "linear": lambda: (mlp([width, out]), out),
            "mlp": lambda: (mlp([width, hidden, out], output_norm=True), out),
            "random": lambda: (RandomFeatures(), config.d0),
        }[config.projector]()


@in_full_precision
def directclr_loss(
    r1: Tensor,
    r2: Tensor,
    d0: int = 360,
    temperature: float = 0.1,
    form: Literal["paper", "official"] = "official",
) -> Tensor:
    """Computes InfoNCE on the first d0 features of both views' representations (N,D) -> scalar,
    with N - 1 negatives: cosines, the mean over images.

    "official" is half the cross-entropy of view 1's rows with view 2's columns plus half of the
    converse, with no negatives of the anchor's own view. "paper" is Eq. 2, and Sec. 6.2 with the
    minus sign and the positive pair in the sum, which its print lacks: anchors are view 1's,
    negatives the other images of view 1. Columns are of all ranks, gathered with gradient. Raises
    ValueError if d0 is not within 1 to D.
    """
    if form not in ("paper", "official"):
        raise ValueError(f"unknown form {form} of DirectCLR's loss: paper or official")
    if not 0 < d0 <= r1.shape[1]:
        raise ValueError(f"d0 {d0} of {r1.shape[1]} features: 1 or more, at most all of them")
    z1, z2 = F.normalize(r1[:, :d0], dim=1), F.normalize(r2[:, :d0], dim=1)
    own = rank() * len(z1) + torch.arange(len(z1), device=z1.device)
    if form == "official":
        ways = (z1 @ gather_with_grad(z2).T, z2 @ gather_with_grad(z1).T)
        return sum(F.cross_entropy(cosines / temperature, own) / 2 for cosines in ways)
    positives = (z1 * z2).sum(dim=1, keepdim=True)
    cosines = (z1 @ gather_with_grad(z1).T).scatter(
        1, own[:, None], positives
    )  # in z_i z_i's place
    return F.cross_entropy(cosines / temperature, own)


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    return [*two_views(config.views, size, crop_min, mode, config.jitter_strength)]


def resolve(config: Config) -> Config:
    """Fills in the d0 of the encoder's width if none is given; raises UserError for one that is
    wider, or that --projector does not read.
    """
    width = EMBED_DIMS[config.arch]
    usual = round(360 / 2048 * width)
    d0 = usual if config.d0 is None else config.d0
    if d0 > width:
        raise UserError(f"--d0 {d0}: {config.arch} has {width} features")
    if d0 != usual and config.projector not in ("directclr", "random"):
        text = f"--projector {config.projector} does not read it, leave it out"
        raise UserError(f"--d0 {d0}: {text}")
    return dataclasses.replace(config, d0=d0)


def parse_arguments(argv: list[str] | None = None) -> Config:
    return parse(Config, PRESETS, argv, resolve)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("directclr", config)
    model = run.place(DirectCLR(config))
    encode = Pieces(model.encoder, config)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    run.begin(model.encoder, model=model, optimizer=optimizer)

    for step, (x1, x2), _ in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr, end=config.lr_end * lr)
        set_lr(optimizer, rate)
        if config.projector == "random":
            features = draw_features(model.encoder.embed_dim, config.d0, config.seed, step)
            model.projector.features = features.to(run.device, non_blocking=True)

        with run.autocast():  # a forward for each view: their batch statistics are apart (code)
            r1, r2 = encode(x1, x2)  # representations, n-by-d
            z1, z2 = model.projector(r1), model.projector(r2)  # what the loss sees, n-by-d0

        loss = directclr_loss(z1, z2, model.dim, config.temperature, config.loss)

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        run.log(loss=loss, lr=rate, z=z1)

    run.finish(model.dim)


if __name__ == "__main__":
    sys.exit(command(main))
