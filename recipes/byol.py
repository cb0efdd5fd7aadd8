"""BYOL: Bootstrap Your Own Latent, Grill et al., NeurIPS 2020.

An online network predicts, from one view of an image, what a target network says of another view:
the predictor's output is pulled to the target's projection, both l2-normalised, in both directions.
The target gets no gradient; it is a moving average of the online network, whose momentum rises to 1
over the training. There are no negatives (Sec. 3, Eq. 2).

    python recipes/byol.py --data /path/to/imagenet                  # 1000 epochs, ResNet-50
    python recipes/byol.py --epochs 300 --data /path/to/imagenet     # its ablations' baseline

Aims at 74.3 % linear top-1 on ImageNet (1000 epochs; 72.5 at 300), batch 4096. LARS adds a
thousandth of a weight's norm per unit of the rate to its momentum, however large the gradient is:
short runs need --optimizer sgd. Another experiment than `byol_gsg.py --no-gsg`, which has SimSiam's
heads, SGD and a fixed momentum. See recipes/byol.md.
"""

import dataclasses
import sys
from dataclasses import dataclass
from typing import Literal

import common.run.early  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import View, ViewName, two_views
from common.config import CIFAR10, PHOTOS, Count, NotNegative, PositiveInt, RunConfig, Share
from common.distributed import average_gradients
from common.errors import command
from common.fast.micro_batch import Pieces
from common.models import build_encoder, in_full_precision, mlp, momentum_copy, update_momentum
from common.optim import build_optimizer, momentum_to_one, scaled_lr, set_lr, warmup_cosine
from common.run.flags import parse
from common.run.run import Run


@dataclass(frozen=True)
class Config(RunConfig):
    """BYOL: bootstrap your own latent (Grill et al. 2020), with its own heads.

    Each flag says where its value comes from: "Sec." and "App." are the paper's, "code" the
    authors' released code, "GSG" the paper of guided stop-gradient (Lee and Lee 2023). By default
    rate, decay and momentum are those of the number of epochs.
    """

    epochs: PositiveInt = 1000  # Sec. 3.3; ablations 300, Sec. 5
    batch_size: PositiveInt = 4096  # global batch; Sec. 3.3
    # base rate, times batch/lr-batch; Sec. 3.3: 0.2, Sec. 5: 0.3 (300 epochs); code: 0.45 (40, 100)
    lr: NotNegative | None = None
    lr_batch: Count = 256  # the batch that --lr is given for, 0: not scaled; Sec. 3.3
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # Sec. 3.3; short runs: sgd
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; App. J; code
    # LARS leaves out biases and norms; Sec. 3.3: 1.5e-6, Sec. 5: 1e-6 (300 epochs); code
    weight_decay: NotNegative | None = None
    warmup_epochs: NotNegative = 10  # linear from 0; Sec. 3.3
    # momentum of the target (tau) at the start; Sec. 3.3: 0.996, Sec. 5: 0.99 (300 epochs);
    # code: 0.97 (40 epochs)
    momentum: Share | None = None
    # cosine: the momentum rises to 1, Sec. 3.3; fixed: Table 5a
    momentum_schedule: Literal["cosine", "fixed"] = "cosine"
    # without it the projection itself is pulled to the target; Tables 5b, 19
    predictor: bool = True
    # first weights of the target; code: random ones of its own; online: a copy, as App. J
    target_start: Literal["random", "online"] = "random"
    # start the last batch norm of each block at 0; the code does, but its README has the paper's
    # numbers without
    zero_init_residual: bool = False
    projector_hidden: PositiveInt = 4096  # Sec. 3.3
    predictor_hidden: PositiveInt = 4096  # Sec. 3.3
    output_dim: PositiveInt = 256  # Sec. 3.3
    views: ViewName = "byol"  # App. B, Table 6; cifar: GSG App. B.2
    jitter_strength: NotNegative = 1.0  # scales --views' colour jitter; App. B: 1
    crop_min: Share = 0.08  # smallest area of a crop, as a share of the image's; App. B
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # App. B


# code, configs/byol.py; 1000 also Sec. 3.3, 300 also Sec. 5. Other lengths: as the next longer one
LENGTHS = {
    40: {"lr": 0.45, "weight_decay": 1e-6, "momentum": 0.97},
    100: {"lr": 0.45, "weight_decay": 1e-6, "momentum": 0.99},
    300: {"lr": 0.3, "weight_decay": 1e-6, "momentum": 0.99},
    1000: {"lr": 0.2, "weight_decay": 1.5e-6, "momentum": 0.996},
}
# unstated: no paper has BYOL with these heads on CIFAR-10. Views and budget of GSG's App. B.2 and
# C.2; the rate is lightly's, 0.06 x batch/128 of a loss a quarter of this one; the rest is ours
SMALL_IMAGES = {
    "lr_batch": 512,
    "optimizer": "sgd",
    "warmup_epochs": 0,
    "momentum": 0.99,  # lightly
    "projector_hidden": 2048,
    "predictor_hidden": 2048,
    "crop_interpolation": "bilinear",
}
PRESETS = {
    "cifar10": CIFAR10 | SMALL_IMAGES,
    "photos": PHOTOS | SMALL_IMAGES | {"lr_batch": 64, "momentum": 0.9},
}


class BYOL(nn.Module):
    """Encoder, projector and predictor. Both heads are FC, batch norm, ReLU, FC, with no batch norm
    at their output (Sec. 3.3); the first FC has a bias, the last none (code).
    """

    def __init__(self, config: Config):
        super().__init__()
        out = config.output_dim
        self.encoder = build_encoder(config.arch, config.image_size, config.zero_init_residual)
        sizes = [self.encoder.embed_dim, config.projector_hidden, out]
        self.projector = mlp(sizes, hidden_bias=True)
        self.predictor = nn.Identity()
        if config.predictor:
            self.predictor = mlp([out, config.predictor_hidden, out], hidden_bias=True)


@in_full_precision
def byol_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """Computes Eq. 2 in both directions: |p1 - z2|^2 + |p2 - z1|^2 of l2-normalised rows, which is
    4 - 2 cos(p1, z2) - 2 cos(p2, z1); the mean over images.

    Predictions p and the target's projections z, (N,D) each -> scalar; no gradient flows through z.
    """
    return (squared_distance(p1, z2) + squared_distance(p2, z1)).mean()


def squared_distance(p: Tensor, z: Tensor) -> Tensor:
    """Computes |p - z|^2 of l2-normalised rows, with stop-gradient on z: (N,D),(N,D) -> (N,)."""
    # norms of at least 1e-6, as the code's rsqrt(max(|x|^2, 1e-12))
    p, z = F.normalize(p, dim=1, eps=1e-6), F.normalize(z.detach(), dim=1, eps=1e-6)
    return (p - z).square().sum(dim=1)


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    return [*two_views(config.views, size, crop_min, mode, config.jitter_strength)]


def resolve(config: Config) -> Config:
    """Fills in the rate, decay and momentum of the length, if no flag or preset gives them."""
    length = next((n for n in LENGTHS if config.epochs <= n), max(LENGTHS))
    unset = {n: v for n, v in LENGTHS[length].items() if getattr(config, n) is None}
    return dataclasses.replace(config, **unset)


def parse_arguments(argv: list[str] | None = None) -> Config:
    return parse(Config, PRESETS, argv, resolve)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("byol", config)
    model = run.place(BYOL(config))
    start = model if config.target_start == "online" else run.place(BYOL(config))
    target = momentum_copy(encoder=start.encoder, projector=start.projector)
    encode, encode_target = Pieces(model.encoder, config), Pieces(target.encoder, config)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    run.begin(model.encoder, model=model, target=target, optimizer=optimizer)

    for step, (x1, x2), _ in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr)
        set_lr(optimizer, rate)

        with run.autocast():
            y1, y2 = map(model.projector, encode(x1, x2))  # projections
            p1, p2 = model.predictor(y1), model.predictor(y2)  # predictions
            with torch.no_grad():
                z1, z2 = map(target.projector, encode_target(x1, x2))  # the target's projections

        loss = byol_loss(p1, p2, z1, z2)

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        tau = config.momentum
        if config.momentum_schedule == "cosine":
            tau = momentum_to_one(step, run.total_steps, config.momentum)
        run.log(loss=loss, lr=rate, z=y1, momentum=tau)
        update_momentum(target, model, tau)  # after the step, with its own tau

    run.finish(config.output_dim)


if __name__ == "__main__":
    sys.exit(command(main))
