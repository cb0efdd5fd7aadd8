"""Barlow Twins: redundancy reduction, Zbontar, Jing, Misra, LeCun and Deny, ICML 2021.

The cross-correlation matrix of the embeddings of two views, over the batch, is driven to the
identity: ones on the diagonal make the embedding invariant to the views, zeros off it decorrelate
its dimensions. No negatives, no momentum copy, no predictor; large dimensions help.

    python recipes/barlow_twins.py --data /path/to/imagenet               # 1000 epochs, ResNet-50
    python recipes/barlow_twins.py --epochs 300 --data /path/to/imagenet  # of the ablations

Aims at 73.2 % linear top-1 on ImageNet (Table 1), 71.4 % at 300 epochs (Table 5). Paper and
released code disagree: `--follow paper` (default) or `--follow official`, and one flag for each
difference. Rates mean what they mean in the released code, whose gradient is divided by its number
of ranks: `--code-ranks`, see recipes/barlow_twins.md. Costs 1000 epochs at batch 2048, with a
correlation matrix of 8192 x 8192 each step.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import common.run.early  # noqa: F401  # isort: skip
import torch
from torch import Tensor, nn

from common.augment import View, ViewName, two_views
from common.config import (
    ARCHS,
    CIFAR10,
    PHOTOS,
    Count,
    NotNegative,
    Positive,
    PositiveInt,
    RunConfig,
    Share,
)
from common.distributed import average_gradients, gather_with_grad
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.models import build_encoder, in_full_precision, mlp
from common.optim import build_optimizer, scaled_lr, set_lr, warmup_cosine, weights_and_biases
from common.run.flags import parse
from common.run.run import Run

Terms = Literal["both", "invariance", "redundancy"]


@dataclass(frozen=True)
class Config(RunConfig):
    """Barlow Twins: self-supervised learning via redundancy reduction (Zbontar et al. 2021).

    Each flag says where its value comes from: "Sec." and "Table" are the paper's, "code" the
    authors' released code (main.py), "GSG" the paper of guided stop-gradient (Lee and Lee 2023).
    """

    follow: Literal["paper", "official"] = "paper"  # official: sets each flag to the released code
    lambd: NotNegative = 0.005  # lambda, of the redundancy; Sec. 2.2; code: 0.0051
    weight_decay: NotNegative = 1.5e-6  # Sec. 2.2; code: 1e-6; biases and norms are left out
    # the ranks of the released code, which divide its gradient: Sec. 2.2, 32 GPUs; code's README:
    # 16. 1: the exact gradient, which then needs other --lr-biases and --weight-decay
    code_ranks: PositiveInt = 32

    # invariance: the sum over C's diagonal alone; redundancy: that off it alone; Table 5
    terms: Terms = "both"
    # what the second view goes through. shared: the first's encoder and projector; same: another
    # pair of --arch; an arch: another pair with this encoder (VICReg paper, Table 5). The first is
    # exported
    second_arch: Literal["shared", "same", ARCHS] = "shared"
    epochs: PositiveInt = 1000  # Sec. 2.2; ablations 300, Sec. 4
    batch_size: PositiveInt = 2048  # global batch; Sec. 2.2
    lr: Positive = 0.2  # base rate of weights, times batch/lr-batch; Sec. 2.2
    lr_biases: NotNegative = 0.0048  # base rate of biases and batch norms, likewise; Sec. 2.2
    lr_batch: Count = 256  # the batch that both are given for, 0: not scaled; Sec. 2.2
    lr_end: Share = 0.001  # last rate as a share of the highest; Sec. 2.2: "a factor of 1000"
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # Sec. 2.2
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; unstated; code
    warmup_epochs: NotNegative = 10  # Sec. 2.2; from 0: unstated; code
    zero_init_residual: bool = True  # start the last batch norm of each block at 0; unstated; code
    projector_layers: PositiveInt = 3  # 8192-8192-8192; Sec. 2.2
    projector_hidden: PositiveInt = 8192  # Sec. 2.2
    output_dim: PositiveInt = 8192  # Sec. 2.2
    views: ViewName = "byol"  # Sec. 2.2; cifar: GSG App. B.2
    # smallest area of a crop, as a share of the image's; Sec. 2.2: BYOL's; code
    crop_min: Share = 0.08
    jitter_strength: NotNegative = 1.0  # scales --views' colour jitter; s of SimCLR's App. A
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # unstated, as BYOL; code


# ours: the paper has no number on small images. Views and epochs of GSG's App. B.2 and C.2; the
# exact gradient, and so other rates of the biases
SMALL_IMAGES = {"code_ranks": 1, "weight_decay": 1e-6}
SMALL_IMAGES |= {"zero_init_residual": False, "crop_interpolation": "bilinear"}
PRESETS = {
    "official": {"lambd": 0.0051, "weight_decay": 1e-6, "code_ranks": 16},  # main.py at 8e8d284
    "cifar10": CIFAR10 | SMALL_IMAGES | {"lr": 0.3, "projector_hidden": 2048, "output_dim": 2048},
    "photos": PHOTOS
    | SMALL_IMAGES
    | {"lr": 2.0, "lr_biases": 0.05, "lr_batch": 64, "warmup_epochs": 0}
    | {"projector_hidden": 512, "output_dim": 512},
}


def branch(config: Config, arch: str) -> tuple[nn.Module, nn.Module]:
    """Builds an encoder and its projector: batch norm and ReLU after all FCs but the last, which is
    plain; there are no biases (unstated; code).
    """
    encoder = build_encoder(arch, config.image_size, config.zero_init_residual)
    hidden = [config.projector_hidden] * (config.projector_layers - 1)
    return encoder, mlp([encoder.embed_dim, *hidden, config.output_dim])


class BarlowTwins(nn.Module):
    """One encoder and projector for both views, or with `--second-arch` a pair for each."""

    def __init__(self, config: Config):
        super().__init__()
        self.encoder, self.projector = branch(config, config.arch)
        if config.second_arch != "shared":
            other = config.arch if config.second_arch == "same" else config.second_arch
            self.second_encoder, self.second_projector = branch(config, other)


def standardised(z: Tensor) -> Tensor:
    """Scales each column of (M,D) to mean 0 and standard deviation 1 over the batch, as the
    affine-free batch norm of the released code does: biased variance, and 1e-5 under the root.
    """
    z = z - z.mean(dim=0)
    return z / torch.sqrt(z.square().mean(dim=0) + 1e-5)


@in_full_precision
def correlation_terms(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the sums of Eq. 1 for projections (N,D): that over the diagonal of (1 - C_ii)^2, and
    that off it of C_ij^2. C is Eq. 2's over the global batch, gathered with gradient.
    """
    Z1, Z2 = standardised(gather_with_grad(z1)), standardised(gather_with_grad(z2))
    C = Z1.T @ Z2 / len(Z1)
    diagonal = C.diagonal()
    return (1 - diagonal).square().sum(), (C - torch.diag(diagonal)).square().sum()


@in_full_precision
def barlow_twins_loss(
    z1: Tensor,
    z2: Tensor,
    lambd: float = 0.005,
    terms: Terms = "both",
    sums: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Computes Eq. 1 of projections (N,D): sum of (1 - C_ii)^2 + lambd * sum of C_ij^2 -> scalar.

    These are sums over dimensions, not means. `terms` keeps the first ("invariance") or the second
    ("redundancy") alone. `sums` are `correlation_terms` of the same projections, if known already.
    """
    if terms not in ("both", "invariance", "redundancy"):
        raise ValueError(f"unknown terms {terms}: both, invariance or redundancy")
    invariance, redundancy = sums or correlation_terms(z1, z2)
    if terms == "invariance":
        return invariance
    return lambd * redundancy + (invariance if terms == "both" else 0)


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    return [*two_views(config.views, size, crop_min, mode, config.jitter_strength)]


def resolve(config: Config) -> Config:
    """Checks the configuration; raises UserError if a second encoder cannot take the images."""
    if config.second_arch.startswith("vit") and config.image_size % 16:
        text = f"--second-arch {config.second_arch}: --image-size must be a multiple of 16"
        raise UserError(f"{text}, not {config.image_size}")
    return config


def parse_arguments(argv: list[str] | None = None) -> Config:
    return parse(Config, PRESETS, argv, resolve)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("barlow_twins", config)
    model = run.place(BarlowTwins(config))
    encode, shared = Pieces(model.encoder, config), config.second_arch == "shared"
    encode_second = encode if shared else Pieces(model.second_encoder, config)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    weights, biases = weights_and_biases(model, config.lr_biases / config.lr)
    biases["weight_decay"] = 0.0  # of every optimizer; LARS leaves them out by itself
    optimizer = build_optimizer(
        config.optimizer, [weights, biases], lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    run.begin(model.encoder, model=model, optimizer=optimizer)

    for step, (x1, x2), _ in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr, end=config.lr_end * lr)
        set_lr(optimizer, rate)

        with run.autocast():
            if shared:
                z1, z2 = map(model.projector, encode(x1, x2))  # projections, n-by-d
            else:
                (y1,), (y2,) = encode(x1), encode_second(x2)
                z1, z2 = model.projector(y1), model.second_projector(y2)

        invariance, redundancy = sums = correlation_terms(z1, z2)
        loss = barlow_twins_loss(z1, z2, config.lambd, config.terms, sums)

        optimizer.zero_grad()
        (loss / config.code_ranks).backward()
        encode.replay()
        encode_second.replay()
        average_gradients(model)
        optimizer.step()

        run.log(loss=loss, lr=rate, z=z1, invariance=invariance, redundancy=redundancy)

    run.finish(config.output_dim)


if __name__ == "__main__":
    sys.exit(command(main))
