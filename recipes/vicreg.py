"""VICReg: variance-invariance-covariance regularization, Bardes, Ponce and LeCun, ICLR 2022.

The embeddings of two views are pulled together (invariance) while, in each branch by itself, every
dimension keeps a standard deviation of at least 1 over the batch (variance) and every two
dimensions are decorrelated (covariance). No negatives, no momentum copy, no predictor, nothing
normalised; the branches need not share weights: `--second-arch`.

    python recipes/vicreg.py --data /path/to/imagenet                   # 1000 epochs, ResNet-50
    python recipes/vicreg.py --epochs 100 --lr 0.3 --data /path/to/imagenet   # of the ablations

Aims at 73.2 % linear top-1 on ImageNet (Table 1), 68.6 % at 100 epochs. Paper and released code
disagree: `--follow paper` (default) or `--follow official`, and one flag for each difference; see
recipes/vicreg.md. Costs 1000 epochs at batch 2048, with a covariance matrix of 8192 x 8192 for each
branch and step.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import common.run.early  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import View, ViewName, two_views
from common.config import (
    ARCHS,
    CIFAR10,
    PHOTOS,
    Count,
    NotNegative,
    PositiveInt,
    RunConfig,
    Share,
)
from common.distributed import average_gradients, gather_with_grad
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.models import build_encoder, in_full_precision, mlp
from common.optim import build_optimizer, scaled_lr, set_lr, warmup_cosine
from common.run.flags import parse
from common.run.run import Run


@dataclass(frozen=True)
class Config(RunConfig):
    """VICReg: variance, invariance and covariance (Bardes et al. 2022).

    Each flag says where its value comes from: "Sec." and "App." are the paper's, "code" the
    authors' released code (main_vicreg.py), "GSG" the paper of guided stop-gradient (Lee and Lee
    2023).
    """

    follow: Literal["paper", "official"] = "paper"  # official: sets each flag to the released code
    # Eq. 6 and Algorithm 1 add the variance terms of both branches; code: their mean
    loss: Literal["paper", "official"] = "paper"
    views: ViewName = "vicreg"  # App. C.1: BYOL's made symmetric; code: BYOL's; cifar: GSG App. B.2
    # last rate as a share of the highest: Sec. 4.2, 0.002 of 1.6; code: 0.001
    lr_end: Share = 0.00125

    sim_coeff: NotNegative = 25.0  # lambda, of the invariance; Sec. 4.2
    std_coeff: NotNegative = 25.0  # mu, of the variance; Sec. 4.2
    cov_coeff: NotNegative = 1.0  # nu, of the covariance; Sec. 4.2
    # what the second view goes through. shared: the first's encoder and expander; same: another
    # pair of --arch; an arch: another pair with this encoder (Table 5). The first is exported
    second_arch: Literal["shared", "same", ARCHS] = "shared"
    epochs: PositiveInt = 1000  # Sec. 4.2; ablations 100
    batch_size: PositiveInt = 2048  # global batch; Sec. 4.2
    lr: NotNegative = 0.2  # base rate, times batch/lr-batch; Sec. 4.2; 100 epochs: 0.3, App. C.4
    lr_batch: Count = 256  # the batch that --lr is given for, 0: not scaled; Sec. 4.2
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # Sec. 4.2
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; unstated; code
    weight_decay: NotNegative = 1e-6  # Sec. 4.2; LARS leaves out biases and norms, as the code
    warmup_epochs: NotNegative = 10  # from 0; Sec. 4.2
    zero_init_residual: bool = True  # start the last batch norm of each block at 0; unstated; code
    projector_layers: PositiveInt = 3  # the expander, 8192-8192-8192; Sec. 4.2
    projector_hidden: PositiveInt = 8192  # Sec. 4.2
    output_dim: PositiveInt = 8192  # Sec. 4.2
    crop_min: Share = 0.08  # smallest area of a crop, as a share of the image's; App. C.1
    jitter_strength: NotNegative = 1.0  # scales --views' colour jitter; s of SimCLR's App. A
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # unstated; code


# our choice, since the paper has no number on small images. Views and epochs are those of GSG's
# App. B.2 and C.2
SMALL_IMAGES = {"zero_init_residual": False, "crop_interpolation": "bilinear"}
PRESETS = {
    "official": {"loss": "official", "views": "byol", "lr_end": 0.001},  # main_vicreg.py at 4e12602
    "cifar10": CIFAR10
    | SMALL_IMAGES
    | {"lr": 0.3, "weight_decay": 1e-6, "projector_hidden": 2048, "output_dim": 2048},
    "photos": PHOTOS
    | SMALL_IMAGES
    | {"optimizer": "sgd", "lr": 0.004, "lr_batch": 64, "warmup_epochs": 0}
    | {"projector_hidden": 512, "output_dim": 512},
}


def branch(config: Config, arch: str) -> tuple[nn.Module, nn.Module]:
    """Builds an encoder and its expander: batch norm and ReLU after all FCs but the last, which is
    plain and has no bias; the others have one (unstated; code).
    """
    encoder = build_encoder(arch, config.image_size, config.zero_init_residual)
    hidden = [config.projector_hidden] * (config.projector_layers - 1)
    return encoder, mlp([encoder.embed_dim, *hidden, config.output_dim], hidden_bias=True)


class VICReg(nn.Module):
    """One encoder and expander for both views, or with `--second-arch` a pair for each."""

    def __init__(self, config: Config):
        super().__init__()
        self.encoder, self.projector = branch(config, config.arch)
        if config.second_arch != "shared":
            other = config.arch if config.second_arch == "same" else config.second_arch
            self.second_encoder, self.second_projector = branch(config, other)


def variance(z: Tensor) -> Tensor:
    """Computes v of Eq. 1 and 2: (M,D) -> scalar, how far standard deviations are below 1."""
    return F.relu(1 - torch.sqrt(z.var(dim=0) + 1e-4)).mean()


def covariance(z: Tensor) -> Tensor:
    """Computes c of Eq. 3 and 4: (M,D) -> scalar, squared covariances of dimension pairs over D."""
    z = z - z.mean(dim=0)
    C = z.T @ z / (len(z) - 1)
    return (C - torch.diag(C.diagonal())).square().sum() / z.shape[1]


@in_full_precision
def vicreg_terms(z1: Tensor, z2: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns s(Z, Z'), v(Z) + v(Z') and c(Z) + c(Z') of Eq. 6, of embeddings (N,D).

    s is Algorithm 1's mse_loss, the mean over images and dimensions: the text's distance of vectors
    is D times that. Variances and covariances are those of the global batch, gathered with
    gradient; s is the mean over this rank's images.
    """
    Z1, Z2 = gather_with_grad(z1), gather_with_grad(z2)
    return F.mse_loss(z1, z2), variance(Z1) + variance(Z2), covariance(Z1) + covariance(Z2)


@in_full_precision
def vicreg_loss(
    z1: Tensor,
    z2: Tensor,
    sim: float = 25.0,
    std: float = 25.0,
    cov: float = 1.0,
    form: Literal["paper", "official"] = "paper",
    terms: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Computes Eq. 6: sim * s + std * (v + v') + cov * (c + c') of raw embeddings (N,D) -> scalar.

    "official" takes the mean of v and v', half of the paper's sum; c and c' are added in both.
    `terms` are `vicreg_terms` of the same embeddings, if they are already known.
    """
    if form not in ("paper", "official"):
        raise ValueError(f"unknown form {form} of VICReg's loss: paper or official")
    s, v, c = terms or vicreg_terms(z1, z2)
    return sim * s + std * (v if form == "paper" else v / 2) + cov * c


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
    run = Run("vicreg", config)
    model = run.place(VICReg(config))
    encode, shared = Pieces(model.encoder, config), config.second_arch == "shared"
    encode_second = encode if shared else Pieces(model.second_encoder, config)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    run.begin(model.encoder, model=model, optimizer=optimizer)

    for step, (x1, x2), _ in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr, end=config.lr_end * lr)
        set_lr(optimizer, rate)

        with run.autocast():
            if shared:
                z1, z2 = map(model.projector, encode(x1, x2))  # embeddings, n-by-d
            else:
                (y1,), (y2,) = encode(x1), encode_second(x2)
                z1, z2 = model.projector(y1), model.second_projector(y2)

        terms = s, v, c = vicreg_terms(z1, z2)
        coefficients = config.sim_coeff, config.std_coeff, config.cov_coeff
        loss = vicreg_loss(z1, z2, *coefficients, config.loss, terms)

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        encode_second.replay()
        average_gradients(model)
        optimizer.step()

        run.log(loss=loss, lr=rate, z=z1, invariance=s, variance=v, covariance=c)

    run.finish(config.output_dim)


if __name__ == "__main__":
    sys.exit(command(main))
