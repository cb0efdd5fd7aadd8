"""TWIST: Self-Supervised Learning by Estimating Twin Class Distributions, Wang, Kong, Zhang, Liu
and Li, arXiv 2110.07402.

A softmax over as many classes as the projector has outputs is the answer to each of two views. The
two answers shall agree (consistency), each be confident (sharpness), and the mean answer of a batch
have all classes (diversity). There are no pairs of images, no momentum copy, no predictor and no
stop-gradient; a batch norm before the softmax, without scale and offset, keeps classes alive.

    python recipes/twist.py --data /path/to/imagenet                    # 800 epochs, ResNet-50
    torchrun --nproc_per_node 8 recipes/twist.py --data /path/to/imagenet

Aims at 72.6 % linear top-1 on ImageNet (README of the code, without small crops and
self-labelling). Costs 800 epochs at batch 2048, with 32768 classes. The paper itself was not at
hand: every constant is the released code's (bytedance/TWIST at 796d36e); see recipes/twist.md.
"""

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Literal

import common.run.early  # noqa: F401  # isort: skip
import torch
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
from common.distributed import average_gradients, gather_with_grad, rank, world_size
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.models import build_encoder, in_full_precision, mlp
from common.optim import build_optimizer, scaled_lr, set_lr, warmup_cosine
from common.run.flags import parse
from common.run.run import Run


@dataclass(frozen=True)
class Config(RunConfig):
    """TWIST: twin class distributions (Wang et al. 2021).

    Each flag says where its value comes from: "code" is the authors' released code, with the
    command of its README for ResNet-50 without small crops, "GSG" the paper of guided stop-gradient
    (Lee and Lee 2023).
    """

    lam1: float = 0.0  # the sharpness counts 1 + lam1 times; code (its ViTs: -0.6)
    lam2: float = 1.0  # the diversity counts lam2 times; code
    tau: Positive = 1.0  # temperature of sharpness and diversity, not of consistency; code
    # batch norm of the logits before the softmax, without scale and offset; code: lbn_type
    logit_norm: bool = True
    # images over which --logit-norm takes its statistics, both views of each; 0: the global batch;
    # code: 256
    bunch_size: Count = 256
    projector_layers: PositiveInt = 3  # the last gives the logits; code
    projector_hidden: PositiveInt = 4096  # width of the projector's hidden layers; code
    output_dim: PositiveInt = 32768  # classes; code's README (4096 with small crops)

    epochs: PositiveInt = 800  # code's README
    batch_size: PositiveInt = 2048  # global batch; code's README: 8 GPUs of 256
    lr: NotNegative = 0.5  # base rate, times batch/lr-batch; code
    lr_batch: Count = 256  # the batch that --lr is given for, 0: not scaled; code
    lr_end: Share = 0.001  # last rate as a share of the highest; code
    # unguarded_lars: trust ratio |w| / (|g| + decay |w|) without a guard against norms of 0, the
    # rate inside the momentum; code (lars.py)
    optimizer: Literal["unguarded_lars", "lars", "sgd", "adamw"] = "unguarded_lars"
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; code
    weight_decay: NotNegative = 1.5e-6  # code; LARS leaves out biases and norms
    # from 0; default: 10, 5 for 50 epochs or fewer, 3 for 20 or fewer; code
    warmup_epochs: NotNegative | None = None
    views: ViewName = "byol"  # code: --aug barlow; cifar: GSG App. B.2
    jitter_strength: NotNegative = 1.0  # scales --views' colour jitter; s of SimCLR's App. A
    crop_min: Share = 0.08  # smallest area of a crop, as a share of the image's; code
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # of crops; code


# ours: the code has nothing for small images
SMALL_IMAGES = {"crop_interpolation": "bilinear", "bunch_size": 0}
PRESETS = {
    "cifar10": CIFAR10
    | SMALL_IMAGES
    | {"lr": 0.5, "weight_decay": 1.5e-6, "projector_hidden": 2048, "output_dim": 1024},
    # chosen on held-out patches: twist.md
    "photos": PHOTOS
    | SMALL_IMAGES
    | {"optimizer": "sgd", "lr_batch": 64, "warmup_epochs": 1}
    | {"projector_hidden": 512, "output_dim": 128},
}


class TWIST(nn.Module):
    """Encoder and projector: batch norm and ReLU after all layers but the last, which gives the
    logits; all have a bias (code).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.encoder = build_encoder(config.arch, config.image_size)
        hidden = [config.projector_hidden] * (config.projector_layers - 1)
        sizes = [self.encoder.embed_dim, *hidden, config.output_dim]
        self.projector = mlp(sizes, hidden_bias=True, output_bias=True)


@in_full_precision
def normalize_logits(logits1: Tensor, logits2: Tensor, bunch: int = 0) -> tuple[Tensor, Tensor]:
    """Applies batch norm without scale and offset to both views' logits (N,C) together.

    Mean and biased variance (+ 1e-5) are those of `bunch` consecutive images of the global batch,
    with gradient, whichever ranks hold them; 0 takes all. `bunch` divides the global batch.
    """
    logits = torch.stack([logits1, logits2], dim=1)  # (N,2,C)
    bunch = bunch or len(logits) * world_size()
    mean = bunch_means(logits.mean(dim=1), bunch)
    variance = bunch_means((logits - mean[:, None]).square().mean(dim=1), bunch)
    normed = (logits - mean[:, None]) * (variance[:, None] + 1e-5).rsqrt()
    return normed[:, 0], normed[:, 1]


def bunch_means(rows: Tensor, bunch: int) -> Tensor:
    """Replaces each row of (N,C) by the mean of its bunch of the global batch."""
    piece = math.gcd(len(rows), bunch)  # images that are in one bunch and on one rank
    means = rows.unflatten(0, (-1, piece)).mean(dim=1)  # of this rank's pieces
    if piece == bunch:
        return means.repeat_interleave(bunch, dim=0)
    means = gather_with_grad(means).unflatten(0, (-1, bunch // piece)).mean(dim=1)
    own = rank() * len(rows) + torch.arange(len(rows), device=rows.device)
    return means[own // bunch]


def entropy(p: Tensor, log_p: Tensor) -> Tensor:
    """Returns the mean over rows of -sum_k p_k log p_k."""
    return -(p * log_p).sum(dim=1).mean()


@in_full_precision
def twist_terms(
    logits1: Tensor, logits2: Tensor, tau: float = 1.0, eps: float = 1e-5
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns consistency, sharpness and diversity of the logits (N,C) of two views, scalars.

    Consistency is half of KL(p1|p2) + KL(p2|p1) of their softmax, averaged over images. Of the
    softmax of logits / tau, averaged over views, sharpness is the mean entropy of an image, and
    diversity the entropy of the mean over the images of all ranks, gathered with gradient.
    """
    p1, p2 = logits1.softmax(dim=1), logits2.softmax(dim=1)
    log1, log2 = (p1 + eps).log(), (p2 + eps).log()
    consistency = ((p1 - p2) * (log1 - log2)).sum(dim=1).mean() / 2  # both divergences at once
    if tau != 1:
        p1, p2 = (logits1 / tau).softmax(dim=1), (logits2 / tau).softmax(dim=1)
        log1, log2 = (p1 + eps).log(), (p2 + eps).log()
    sharpness = (entropy(p1, log1) + entropy(p2, log2)) / 2
    mean1, mean2 = (gather_with_grad(p.mean(dim=0, keepdim=True)).mean(0, True) for p in (p1, p2))
    diversity = (entropy(mean1, (mean1 + eps).log()) + entropy(mean2, (mean2 + eps).log())) / 2
    return consistency, sharpness, diversity


@in_full_precision
def twist_loss(
    logits1: Tensor,
    logits2: Tensor,
    lam1: float = 0.0,
    lam2: float = 1.0,
    tau: float = 1.0,
    eps: float = 1e-5,
    terms: tuple[Tensor, Tensor, Tensor] | None = None,
) -> Tensor:
    """Computes consistency + (1 + lam1) * sharpness - lam2 * diversity of logits (N,C) -> scalar.

    Logits are those after the batch norm. `terms` are `twist_terms` of them, if already known.
    """
    consistency, sharpness, diversity = terms or twist_terms(logits1, logits2, tau, eps)
    return consistency + (1 + lam1) * sharpness - lam2 * diversity


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    return [*two_views(config.views, size, crop_min, mode, config.jitter_strength)]


def resolve(config: Config) -> Config:
    """Fills in the warm-up of --epochs if none is given."""
    if config.warmup_epochs is not None:
        return config
    short = 3.0 if config.epochs <= 20 else 5.0
    return dataclasses.replace(config, warmup_epochs=short if config.epochs <= 50 else 10.0)


def check_bunches(config: Config) -> None:
    """Raises UserError for bunches that do not fill the batch, or that nothing would read."""
    bunch = PRESETS.get(config.dataset, {}).get("bunch_size", Config.bunch_size)
    if not config.logit_norm and config.bunch_size != bunch:
        text = f"--bunch-size {config.bunch_size}: --no-logit-norm leaves nothing that reads it"
        raise UserError(f"{text}; leave it out")
    if config.logit_norm and config.bunch_size and config.batch_size % config.bunch_size:
        text = f"--bunch-size {config.bunch_size} must divide --batch-size {config.batch_size}"
        raise UserError(f"{text}; 0 is the whole batch")


def parse_arguments(argv: list[str] | None = None) -> Config:
    config = parse(Config, PRESETS, argv, resolve)
    check_bunches(config)
    return config


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("twist", config)
    model = run.place(TWIST(config))
    encode = Pieces(model.encoder, config)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    most = math.log(max(2, config.output_dim))  # the largest entropy
    run.begin(model.encoder, model=model, optimizer=optimizer)

    for step, (x1, x2), _ in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr, end=config.lr_end * lr)
        set_lr(optimizer, rate)

        with run.autocast():  # both views in one forward: their batch statistics are joint (code)
            (h,) = encode(torch.cat([x1, x2]))
            f1, f2 = model.projector(h).chunk(2)  # logits, n-by-classes each

        p = normalize_logits(f1, f2, config.bunch_size) if config.logit_norm else (f1, f2)
        terms = consistency, sharpness, diversity = twist_terms(*p, config.tau)
        loss = twist_loss(*p, config.lam1, config.lam2, terms=terms)

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        own = {"sharpness": sharpness / most, "diversity": diversity / most}
        run.log(loss=loss, lr=rate, z=f1, consistency=consistency, **own)

    run.finish(config.output_dim)


if __name__ == "__main__":
    sys.exit(command(main))
