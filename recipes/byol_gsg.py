"""BYOL-GSG: BYOL with guided stop-gradient, Lee and Lee, NeurIPS 2023.

BYOL pulls the prediction of each view towards the momentum encoder's projection of the other view.
Guided stop-gradient looks at two images at once, four views: the two views of different images
whose momentum projections are nearest become the sources, each is pulled to the other view of its
own image and so away from the other image. No negative term (App. A, Algorithm 1, "analogously").

    python recipes/byol_gsg.py --data /path/to/imagenet              # 100 epochs, ResNet-50
    python recipes/byol_gsg.py --no-gsg --data /path/to/imagenet     # its baseline: BYOL

The claim is the difference between the two at equal epochs, on ImageNet and CIFAR-10; the paper's
tables were at no source at hand. Both wear SimSiam's heads and optimizer and a fixed momentum, so
BYOL's own numbers are no target. Four views per image: an epoch costs twice the baseline's. See
recipes/byol_gsg.md.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import common.run.early  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import View, ViewName, two_views
from common.config import CIFAR10, PHOTOS, Count, NotNegative, PositiveInt, RunConfig, Share, later
from common.distributed import average_gradients
from common.errors import command
from common.fast.micro_batch import Pieces
from common.models import build_encoder, in_full_precision, mlp, momentum_copy, update_momentum
from common.optim import build_optimizer, scaled_lr, set_lr, warmup_cosine
from common.pairs import Pairing, draw_pairs, rows_of_owners, rows_of_partners
from common.run.flags import parse
from common.run.run import Run


@dataclass(frozen=True)
class Config(RunConfig):
    """BYOL-GSG: BYOL with guided stop-gradient (Lee and Lee 2023).

    Each flag says where its value comes from: "App." is the paper's appendix, "code" the authors'
    released code (ImageNet only), "SimSiam" the paper that App. C.1 follows.
    """

    follow: Literal["paper", "official"] = "paper"  # official: --pairing local, as the code
    gsg: bool = True  # --no-gsg: plain BYOL, two views, symmetric loss, all else equal
    # without it p is the online projection; GSG's abstract: no collapse; BYOL Table 5b: collapse
    predictor: bool = later(True)
    # App. A shuffles the batch; code: each rank's own (local); derangement: no image meets itself
    pairing: Pairing = "global"

    epochs: PositiveInt = 100  # code; SimSiam Sec. 3
    batch_size: PositiveInt = 512  # global batch; code; SimSiam Sec. 3
    # base rate, times batch/lr-batch; App. C.1: SimSiam Sec. 3; code. cifar10: 0.06, lightly
    lr: NotNegative = 0.05
    # the batch that --lr is given for, 0: not scaled; SimSiam Sec. 3; code. cifar10: 128, lightly,
    # so 0.24 at batch 512
    lr_batch: Count = 256
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"  # App. C.1: SimSiam Sec. 3; code
    sgd_momentum: Share = 0.9  # momentum of SGD or LARS; SimSiam Sec. 3; code
    # SGD: on all parameters, biases and norms too; SimSiam Sec. 3, App. A; code
    weight_decay: NotNegative = 1e-4
    cosine_per: Literal["epoch", "step"] = "epoch"  # when the cosine moves the rate; code
    warmup_epochs: NotNegative = later(0.0)  # linear from 0; paper and code: none
    # unstated; SimSiam Sec. 4.2; the code's README has --fix-pred-lr for SimSiam only
    fixed_predictor_lr: bool = True
    momentum: Share = 0.99  # momentum of the momentum encoder, constant; code
    # start the last batch norm of each block at 0; SimSiam App. A; code
    zero_init_residual: bool = True
    projector_layers: PositiveInt = 3  # 2048-2048-2048; App. C.1
    projector_hidden: PositiveInt = 2048  # App. C.1
    output_dim: PositiveInt = 2048  # App. C.1
    output_affine: bool = False  # affine batch norm at the projector's output; code: no
    predictor_hidden: PositiveInt = 512  # App. C.1
    views: ViewName = "simsiam"  # App. B.1; cifar: App. B.2, without blur
    jitter_strength: NotNegative = later(1.0)  # scales --views' colour jitter; s of SimCLR's App. A
    crop_min: Share = 0.2  # smallest area of a crop, as a share of the image's; App. B.1
    crop_interpolation: Literal["bicubic", "bilinear"] = "bilinear"  # unstated; code


SMALL_IMAGES = {  # App. B.2 and C.2, "the default setup of lightly"; its CIFAR-10 benchmark
    "fixed_predictor_lr": False,  # unstated; lightly
    "zero_init_residual": False,  # unstated; lightly
    "projector_layers": 2,  # App. C.2: 512-2048-2048
    "output_affine": True,  # unstated; lightly
    "crop_min": 0.08,  # App. B.2
}
PRESETS = {
    "official": {"pairing": "local"},
    # App. C.2 names lightly's default set-up; its benchmark scales BYOL's rate, not SimSiam's
    "cifar10": CIFAR10 | SMALL_IMAGES | {"lr_batch": 128},
    "photos": PHOTOS | SMALL_IMAGES | {"lr_batch": 0},  # ours
}


class BYOL(nn.Module):
    """The online network, with SimSiam's heads (App. C): batch norm after every FC of the
    projector, also the last, ReLU after all but the last; the predictor's last FC is plain.
    """

    def __init__(self, config: Config):
        super().__init__()
        width, hidden = config.output_dim, config.projector_hidden
        self.encoder = build_encoder(config.arch, config.image_size, config.zero_init_residual)
        sizes = [self.encoder.embed_dim, *[hidden] * (config.projector_layers - 1), width]
        self.projector = mlp(sizes, output_norm=True, output_affine=config.output_affine)
        self.predictor = nn.Identity()
        if config.predictor:
            self.predictor = mlp([width, config.predictor_hidden, width], output_bias=True)


CHOICES = ("11_21", "11_22", "12_21", "12_22")  # columns of the distances, in Algorithm 1's order


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Computes D of SimSiam Eq. 1 by rows, with stop-gradient on z: (N,D),(N,D) -> (N,)."""
    return -F.cosine_similarity(p, z.detach(), dim=1)


@in_full_precision
def guiding_distances(
    z11: Tensor, z12: Tensor, z21: Tensor, z22: Tensor, pairs: Tensor | None = None
) -> Tensor:
    """Returns (N,4): Euclidean distances d11,21 d11,22 d12,21 d12,22 of this rank's images x1 to
    the x2 that they are paired with, without gradient.

    z (N,D) are unnormalised projections of this rank's images; `pairs` are those of `gsg_loss`.
    """
    z11, z12 = z11.detach(), z12.detach()
    z21, z22 = rows_of_partners(z21, pairs), rows_of_partners(z22, pairs)
    ends = ((z11, z21), (z11, z22), (z12, z21), (z12, z22))
    return torch.stack([torch.linalg.vector_norm(a - b, dim=1) for a, b in ends], dim=1)


@in_full_precision
def gsg_loss(
    p11: Tensor,
    p12: Tensor,
    p21: Tensor,
    p22: Tensor,
    z11: Tensor,
    z12: Tensor,
    z21: Tensor,
    z22: Tensor,
    pairs: Tensor | None = None,
    distances: Tensor | None = None,
) -> Tensor:
    """Computes Algorithm 1: 0.5 * (D(source of x1, target of x1) + D(source of x2, target of x2)),
    the mean over pairs; D is the negative cosine. Predictions p, targets z, (N,D) each -> scalar.

    Row i is image x1, paired with row `pairs[i]` of the x2 tensors; None pairs row i with row i.
    Under a process group `pairs` is the permutation of the global batch (world*N,), rows in rank
    order, equal on all ranks. Each rank adds the x1 term and the x2 term of its own images, which
    may belong to two pairs; the mean over ranks is the mean over pairs. Gradient flows through the
    predictions that were chosen, never through z. Ties go to the first of Algorithm 1's branches.
    `distances` are `guiding_distances` of the same tensors, if they are already known.
    """
    if distances is None:
        distances = guiding_distances(z11, z12, z21, z22, pairs)
    choice = distances.argmin(dim=1)  # of the pairs with this rank's x1; the first least one
    choice_of_x2 = rows_of_owners(choice, pairs)  # of the pairs with this rank's x2
    x11_is_source = choice < 2  # d11,21 or d11,22 is the least
    x21_is_source = choice_of_x2 % 2 == 0  # d11,21 or d12,21 is the least
    of_x1 = torch.where(x11_is_source, negative_cosine(p11, z12), negative_cosine(p12, z11))
    of_x2 = torch.where(x21_is_source, negative_cosine(p21, z22), negative_cosine(p22, z21))
    return (0.5 * (of_x1 + of_x2)).mean()


@in_full_precision
def symmetric_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Computes the baseline's loss: D(p1, z2)/2 + D(p2, z1)/2, the mean over images.

    It is SimSiam's Eq. 2; for BYOL z is the momentum encoder's (its Eq. 2 is 2 - 2 cos of the
    same). All (N,D) -> scalar; no gradient flows through z.
    """
    return 0.5 * (negative_cosine(p1, z2) + negative_cosine(p2, z1)).mean()


def choice_statistics(distances: Tensor) -> dict[str, Tensor]:
    """Returns the metrics of distances (N,4): `choice_11_21` … are the shares of pairs that took
    each branch, `distance_11_21` … the means of each distance.
    """
    choice, means = distances.argmin(dim=1), distances.mean(dim=0)
    shares = [(choice == i).double().mean() for i in range(len(CHOICES))]
    statistics = {f"choice_{name}": s for name, s in zip(CHOICES, shares, strict=True)}
    return statistics | {f"distance_{name}": m for name, m in zip(CHOICES, means, strict=True)}


def views_of(config: Config) -> list[View]:
    """Returns x11, x12, and with GSG x21, x22: fresh views of every image in both of its parts."""
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    views = two_views(config.views, size, crop_min, mode, config.jitter_strength)
    return [*views] * (2 if config.gsg else 1)


def parse_arguments(argv: list[str] | None = None) -> Config:
    return parse(Config, PRESETS, argv)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("byol_gsg", config)
    model = run.place(BYOL(config))
    target = momentum_copy(encoder=model.encoder, projector=model.projector)
    encode, encode_target = Pieces(model.encoder, config), Pieces(target.encoder, config)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    predictor = {"params": model.predictor.parameters()}
    if config.fixed_predictor_lr:
        predictor["fixed_lr"] = lr
    groups = [{"params": [*model.encoder.parameters(), *model.projector.parameters()]}, predictor]
    optimizer = build_optimizer(
        config.optimizer, groups, lr, config.sgd_momentum, config.weight_decay
    )
    run.begin(model.encoder, model=model, target=target, optimizer=optimizer)

    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    for step, views, _ in run.batches(views_of(config)):
        moved = step if config.cosine_per == "step" else step - step % run.steps_per_epoch
        rate = warmup_cosine(moved, run.total_steps, warmup_steps, lr)
        set_lr(optimizer, rate)

        update_momentum(target, model, config.momentum)  # before the forward (code)
        with run.autocast():
            online = [model.projector(y) for y in encode(*views)]
            p = [model.predictor(y) for y in online]  # p11, …: before anything is chosen
            with torch.no_grad():
                # z11, …: momentum projections, also for the distances
                z = [target.projector(y) for y in encode_target(*views)]

        if config.gsg:
            pairs = draw_pairs(config.pairing, config.batch_size, run.ranks, config.seed, step)
            pairs = pairs.to(run.device, non_blocking=True)
            distances = guiding_distances(*z, pairs)
            loss = gsg_loss(*p, *z, pairs, distances)
        else:
            loss = symmetric_loss(*p, *z)

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        run.log(
            loss=loss,
            lr=rate,
            z=online[0],
            momentum=config.momentum,
            **(choice_statistics(distances) if config.gsg else {}),
        )

    run.finish(config.output_dim)


if __name__ == "__main__":
    sys.exit(command(main))
