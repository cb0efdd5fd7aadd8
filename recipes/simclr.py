"""SimCLR: A Simple Framework for Contrastive Learning of Visual Representations, Chen, Kornblith,
Norouzi and Hinton, ICML 2020.

Two views of every image pass through one encoder and a small projector; each of the 2N embeddings
of a batch must find the other view of its image among the 2N - 1 others (NT-Xent, Eq. 1 and
Algorithm 1). There is no queue, no predictor and no momentum copy: negatives are the batch.

    python recipes/simclr.py --data /path/to/imagenet                # 1000 epochs, ResNet-50
    torchrun --nproc_per_node 8 recipes/simclr.py --epochs 100 --data /path/to/imagenet

Aims at 69.3 % linear top-1 on ImageNet (Table 6), and at 64.5 % in 100 epochs. The paper's 100
epochs took 1.5 hours of 128 TPU v3 cores (Sec. 2.2). Paper and code (google-research/simclr at
be133b3, the code of the ICML paper, not of SimCLR v2) differ: `--follow paper` (default) or
`--follow official`; see recipes/simclr.md.
"""

import dataclasses
import math
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
    Positive,
    PositiveInt,
    RunConfig,
    Share,
    later,
)
from common.distributed import average_gradients, gather, gather_with_grad, rank
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.models import EMBED_DIMS, build_encoder, in_full_precision, mlp
from common.optim import build_optimizer, scaled_lr, set_lr, warmup_cosine
from common.run.flags import parse
from common.run.run import Run


@dataclass(frozen=True)
class Config(RunConfig):
    """SimCLR: each view finds the other one of its image in the batch (Chen et al. 2020).

    Each flag says where its value comes from: "Sec.", "App." and "Table" are the paper's, "code"
    the authors' at be133b3, its first commit.
    """

    follow: Literal["paper", "official"] = "paper"  # official: --loss official, as the code
    # Algorithm 1: the mean over all 2N embeddings; code: both views' means added, twice as much
    loss: Literal["paper", "official"] = "paper"

    epochs: PositiveInt = 1000  # Sec. 6; 100 in the ablations, Sec. 2.3
    batch_size: PositiveInt = 4096  # global batch; Sec. 2.3
    # base rate; Sec. 2.3 and code: 0.3, times batch/lr-batch; App. B.1: 0.075, times sqrt(batch)
    lr: NotNegative | None = None
    # --lr is multiplied by batch/lr-batch (linear; Sec. 2.3) or by sqrt(batch) (sqrt; App. B.1)
    lr_scaling: Literal["linear", "sqrt"] = "linear"
    lr_batch: Count = 256  # linear: the batch that --lr is given for, 0: not scaled; Sec. 2.3
    # classic_lars: the rate is inside the momentum; unstated; code (lars_optimizer.py)
    optimizer: Literal["classic_lars", "lars", "sgd", "adamw"] = "classic_lars"
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; unstated; code
    weight_decay: NotNegative = 1e-6  # Sec. 2.3; code; LARS leaves out biases and norms (code)
    warmup_epochs: NotNegative = 10  # Sec. 2.3; from 0 (code)
    temperature: Positive = 0.1  # Table 5; code
    l2_norm: bool = True  # Eq. 1: cosines; --no-l2-norm: plain products, Table 5
    projector: Literal["none", "linear", "mlp"] = "mlp"  # Sec. 2.1; none, linear: Sec. 4.2, code
    # batch norm after each FC; the equation of Sec. 2.1 shows none; code: yes, no offset at the end
    projector_norm: bool = True
    # with --projector mlp; 0: as wide as the encoder's output; code
    projector_hidden: Count = later(0)
    output_dim: PositiveInt = 128  # Sec. 2.3; not with --projector none
    # what the second view goes through. shared: the first's encoder and projector; same: another
    # pair of --arch; an arch: another pair with this encoder (VICReg paper, Table 5). The first is
    # exported
    second_arch: Literal["shared", "same", ARCHS] = later("shared")
    zero_init_residual: bool = True  # start the last batch norm of each block at 0; unstated; code
    views: ViewName = "simclr"  # App. A; cifar: App. B.9, half the strength and no blur
    jitter_strength: NotNegative = 1.0  # scales --views' colour jitter; s of App. A
    crop_min: Share = 0.08  # smallest area of a crop, as a share of the image's; App. A; code
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # unstated; code


# base rates if --lr is not given, by --lr-scaling; other data sets have ImageNet's
RATES = {
    "imagenet": {"linear": 0.3, "sqrt": 0.075},  # Sec. 2.3, App. B.1: 4.8 at batch 4096, both
    "cifar10": {"linear": 1.0},  # code's README
    "photos": {"linear": 0.06},  # ours
}
PRESETS = {
    "official": {"loss": "official"},
    # the README of the code: ResNet-18, batch 512; App. B.9 has ResNet-50 and several batches
    "cifar10": CIFAR10 | {"lr": None, "weight_decay": 1e-6, "epochs": 1000, "temperature": 0.5},
    # ours, chosen on held-out patches: simclr.md
    "photos": PHOTOS
    | {
        "lr": None,
        "lr_batch": 64,
        "optimizer": "sgd",
        "warmup_epochs": 1,
        "temperature": 0.5,
    },
}


def branch(config: Config, arch: str) -> tuple[nn.Module, nn.Module]:
    """Builds an encoder f and its projector g, which starts at N(0, 0.01) (code); `none` is the
    identity, `linear` is one layer.
    """
    encoder = build_encoder(arch, config.image_size, config.zero_init_residual)
    width, out = encoder.embed_dim, config.output_dim
    sizes = {
        "none": [width],
        "linear": [width, out],
        "mlp": [width, config.projector_hidden or width, out],
    }
    projector = mlp(sizes[config.projector], output_norm=True)
    for layer in projector:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, std=0.01)
    if config.projector != "none":
        projector[-1].bias.requires_grad = False  # scale without offset
    if not config.projector_norm:
        projector = nn.Sequential(*(m for m in projector if not isinstance(m, nn.BatchNorm1d)))
    return encoder, projector


class SimCLR(nn.Module):
    """Makes embeddings z = g(h) of h = f(x), with `--second-arch` by a pair for each view."""

    def __init__(self, config: Config):
        super().__init__()
        self.encoder, self.projector = branch(config, config.arch)
        self.dim = self.encoder.embed_dim if config.projector == "none" else config.output_dim
        if config.second_arch != "shared":
            other = config.arch if config.second_arch == "same" else config.second_arch
            self.second_encoder, self.second_projector = branch(config, other)


@in_full_precision
def nt_xent(z1: Tensor, z2: Tensor, temperature: float = 0.1, l2_norm: bool = True) -> Tensor:
    """Computes Eq. 1 and Algorithm 1: views (N,D), any scale -> scalar, the mean over all anchors.

    Each of the 2N embeddings of this rank is an anchor, its positive the other view of its image;
    the sum is over the other 2M - 1 embeddings of the global batch of M images, gathered with
    gradient. `l2_norm` False takes plain products for the cosines.
    """
    z = torch.cat([z1, z2])
    if l2_norm:
        z = F.normalize(z, dim=1)
    logits = z @ gather_with_grad(z).T / temperature  # columns: rank by rank both its views
    own = rank() * len(z) + torch.arange(len(z), device=z.device)
    logits = logits.scatter(1, own[:, None], -math.inf)  # k != i
    return F.cross_entropy(logits, own.roll(len(z1)))


def simclr_loss(
    z1: Tensor,
    z2: Tensor,
    temperature: float = 0.1,
    l2_norm: bool = True,
    form: Literal["paper", "official"] = "paper",
) -> Tensor:
    """Computes NT-Xent ("paper"), or the mean over view 1's anchors plus that over view 2's, twice
    as much ("official"; objective.py). Shapes are those of nt_xent.
    """
    if form not in ("paper", "official"):
        raise ValueError(f"unknown form {form} of SimCLR's loss: paper or official")
    return nt_xent(z1, z2, temperature, l2_norm) * (2 if form == "official" else 1)


@torch.no_grad()
@in_full_precision
def contrastive_accuracy(z1: Tensor, z2: Tensor, l2_norm: bool = True) -> Tensor:
    """Returns the share of view 1's embeddings whose nearest, among view 2's of the global batch,
    is their own image's (code, model.py; "contrastive acc." of Table 5). (N,D),(N,D) -> scalar.
    """
    if l2_norm:
        z1, z2 = F.normalize(z1, dim=1), F.normalize(z2, dim=1)
    found = (z1 @ gather(z2).T).argmax(dim=1)
    own = rank() * len(z1) + torch.arange(len(z1), device=z1.device)
    return (found == own).double().mean()


def base_rate(config: Config) -> float:
    """Returns the rate after the warm-up: --lr times batch/lr-batch, or sqrt(batch) (App. B.1)."""
    if config.lr_scaling == "sqrt":
        return config.lr * math.sqrt(config.batch_size)
    return scaled_lr(config.lr, config.batch_size, config.lr_batch)


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    return [*two_views(config.views, size, crop_min, mode, config.jitter_strength)]


def resolve(config: Config) -> Config:
    """Fills in the base rate of --dataset and --lr-scaling if --lr is not given. Raises UserError
    if no source has one, for a --lr-batch that --lr-scaling does not read, and for a second encoder
    that cannot take the images or makes embeddings of another width.
    """
    preset = PRESETS.get(config.dataset, {})
    width = EMBED_DIMS.get(config.second_arch, EMBED_DIMS[config.arch])  # of shared and same
    if config.projector == "none" and width != EMBED_DIMS[config.arch]:
        raise UserError(
            f"--second-arch {config.second_arch}: without a projector its embeddings are {width} "
            f"wide, those of {config.arch} {EMBED_DIMS[config.arch]}: give --projector"
        )
    if config.second_arch.startswith("vit") and config.image_size % 16:
        text = f"--second-arch {config.second_arch}: --image-size must be a multiple of 16"
        raise UserError(f"{text}, not {config.image_size}")
    if config.lr_scaling == "sqrt" and config.lr_batch != preset.get("lr_batch", Config.lr_batch):
        raise UserError(
            f"--lr-batch {config.lr_batch}: --lr-scaling sqrt does not read it, --lr is times "
            "sqrt(--batch-size); leave it out"
        )
    if config.lr is not None:
        return config
    rates = RATES.get(config.dataset, RATES["imagenet"])
    if config.lr_scaling not in rates:
        raise UserError(
            f"--lr-scaling {config.lr_scaling}: no source has such a rate for --dataset "
            f"{config.dataset}, give --lr",
        )
    return dataclasses.replace(config, lr=rates[config.lr_scaling])


def parse_arguments(argv: list[str] | None = None) -> Config:
    return parse(Config, PRESETS, argv, resolve)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("simclr", config)
    model = run.place(SimCLR(config))
    encode, shared = Pieces(model.encoder, config), config.second_arch == "shared"
    encode_second = encode if shared else Pieces(model.second_encoder, config)

    lr = base_rate(config)
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    run.begin(model.encoder, model=model, optimizer=optimizer)

    for step, (x1, x2), _ in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr)
        set_lr(optimizer, rate)

        with run.autocast():
            if shared:  # both views in one forward: their batch statistics are joint (code)
                (h,) = encode(torch.cat([x1, x2]))  # representations, 2n-by-d
                z1, z2 = model.projector(h).chunk(2)  # projections, n-by-d each
            else:
                (h1,), (h2,) = encode(x1), encode_second(x2)
                z1, z2 = model.projector(h1), model.second_projector(h2)

        loss = simclr_loss(z1, z2, config.temperature, config.l2_norm, config.loss)

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        encode_second.replay()
        average_gradients(model)
        optimizer.step()

        accuracy = contrastive_accuracy(z1, z2, config.l2_norm)
        run.log(loss=loss, lr=rate, z=z1, contrastive_accuracy=accuracy)

    run.finish(model.dim)


if __name__ == "__main__":
    sys.exit(command(main))
