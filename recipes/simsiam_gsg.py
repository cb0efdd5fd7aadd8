"""SimSiam-GSG: SimSiam with guided stop-gradient, Lee and Lee, NeurIPS 2023.

SimSiam pulls each view towards the other, with the stop-gradient on both in turn. Guided
stop-gradient looks at two images at once, four views: the two views of different images whose
projections are nearest become the sources, each is pulled to the other view of its own image and so
away from the other image. Contrast without a negative term in the loss (App. A, Algorithm 1).

    python recipes/simsiam_gsg.py --data /path/to/imagenet           # 100 epochs, ResNet-50
    python recipes/simsiam_gsg.py --no-gsg --data /path/to/imagenet  # its baseline: SimSiam

The claim is the difference between the two at equal epochs, on ImageNet and CIFAR-10; the paper's
tables were at no source at hand (SimSiam itself: 68.1 % linear top-1 at 100 epochs). Four views
per image: an epoch costs twice the baseline's. See recipes/simsiam_gsg.md.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn

from common.augment import View, cifar_view, simsiam_view
from common.config import RunConfig, parse
from common.distributed import average_gradients
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.gsg import (
    Pairing,
    choice_statistics,
    draw_pairs,
    gsg_loss,
    guiding_distances,
    symmetric_loss,
)
from common.models import build_encoder, full_precision, mlp
from common.optim import build_optimizer, grad_norm, scaled_lr, set_lr, warmup_cosine
from common.run.run import Run


@dataclass(frozen=True)
class Config(RunConfig):
    """SimSiam-GSG: SimSiam with guided stop-gradient (Lee and Lee 2023).

    Each flag says where its value comes from: "App." is the paper's appendix, "code" the authors'
    released code (ImageNet only), "SimSiam" the paper that App. C.1 follows.
    """

    follow: Literal["paper", "official"] = "paper"  # official: --pairing local, as the code
    gsg: bool = True  # --no-gsg: plain SimSiam, two views, symmetric loss, all else equal
    # App. A shuffles the batch; code: each rank's own (local); derangement: no image meets itself
    pairing: Pairing = "global"

    epochs: int = 100  # code; SimSiam Sec. 3
    batch_size: int = 512  # global batch; code; SimSiam Sec. 3
    lr: float = 0.05  # base rate, times batch/lr-batch; App. C.1: SimSiam Sec. 3; code
    lr_batch: int = 256  # the batch that --lr is given for, 0: not scaled; SimSiam Sec. 3; code
    optimizer: Literal["sgd", "lars", "adamw"] = "sgd"  # App. C.1: SimSiam Sec. 3; code
    sgd_momentum: float = 0.9  # momentum of SGD or LARS; SimSiam Sec. 3; code
    # SGD: on all parameters, biases and norms too; SimSiam Sec. 3, App. A; code
    weight_decay: float = 1e-4
    cosine_per: Literal["epoch", "step"] = "epoch"  # when the cosine moves the rate; code
    fixed_predictor_lr: bool = True  # SimSiam Sec. 4.2; --fix-pred-lr of the code's README
    zero_init_residual: bool = True  # last batch norm of each block; SimSiam App. A; code
    projector_layers: int = 3  # 2048-2048-2048; App. C.1
    projector_hidden: int = 2048  # App. C.1
    output_dim: int = 2048  # App. C.1
    output_affine: bool = False  # affine batch norm at the projector's output; code: no
    predictor_hidden: int = 512  # App. C.1
    views: Literal["simsiam", "cifar"] = "simsiam"  # App. B.1; cifar: App. B.2, without blur
    crop_min: float = 0.2  # smallest share of the area; App. B.1
    crop_interpolation: Literal["bicubic", "bilinear"] = "bilinear"  # unstated; code


SMALL_IMAGES = {  # App. B.2 and C.2, "the default setup of lightly"; its CIFAR-10 benchmark
    "image_size": 32,
    "epochs": 200,  # unstated; lightly (secondary: the paper too)
    "batch_size": 512,  # unstated; secondary (lightly: 128, its table has 512 too)
    "lr": 0.06,  # unstated; lightly
    "lr_batch": 0,  # unstated; lightly does not scale SimSiam's
    "weight_decay": 5e-4,  # unstated; lightly
    "fixed_predictor_lr": False,  # unstated; lightly
    "zero_init_residual": False,  # unstated; lightly
    "projector_layers": 2,  # App. C.2: 512-2048-2048
    "output_affine": True,  # unstated; lightly
    "views": "cifar",  # App. B.2
    "crop_min": 0.08,  # App. B.2
}
PRESETS = {
    "official": {"pairing": "local"},
    "cifar10": {"arch": "resnet18_cifar", **SMALL_IMAGES},
    "photos": {
        "arch": "tiny",
        **SMALL_IMAGES,
        "epochs": 10,
        "batch_size": 64,
        "lr": 0.02,
        "knn_every": 5,
    },
}


class SimSiam(nn.Module):
    """f = encoder + projector, h = predictor, as App. C: batch norm after every FC of the
    projector, also the last, ReLU after all but the last; the predictor's last FC plain.
    """

    def __init__(self, config: Config):
        super().__init__()
        encoder = build_encoder(config.arch, config.image_size, config.zero_init_residual)
        hidden = [config.projector_hidden] * (config.projector_layers - 1)
        sizes = [encoder.embed_dim, *hidden, config.output_dim]
        projector = mlp(sizes, output_norm=True, output_affine=config.output_affine)
        self.f = nn.Sequential(encoder, projector)
        sizes = [config.output_dim, config.predictor_hidden, config.output_dim]
        self.h = mlp(sizes, output_bias=True)


def project(
    f: nn.Sequential, views: Sequence[Tensor], encode: Pieces | None = None
) -> list[Tensor]:
    """Projections of each view, batch-norm statistics per view; `encode`: the encoder of f where
    it runs in pieces. One without batch norms (a ViT) takes all views in one forward otherwise,
    which changes nothing.
    """
    encoder, projector = f
    encode = encode or Pieces(encoder)
    return [projector(y) for y in encode(*views)]


def views_of(config: Config) -> list[View]:
    """x11, x12, and with GSG x21, x22: fresh views of every image in both of its parts."""
    view = simsiam_view if config.views == "simsiam" else cifar_view
    view = view(config.image_size, config.crop_min, config.crop_interpolation)
    return [view] * (4 if config.gsg else 2)


def check(config: Config) -> Config:
    if config.projector_layers < 1:
        raise UserError("--projector-layers must be 1 or more")
    return config


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, PRESETS, argv, check)
    run = Run("simsiam_gsg", config)
    model = run.place(SimSiam(config))
    encode = Pieces(model.f[0], config)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    predictor = {"params": model.h.parameters()}
    if config.fixed_predictor_lr:
        predictor["fixed_lr"] = lr
    groups = [{"params": model.f.parameters()}, predictor]
    optimizer = build_optimizer(
        config.optimizer, groups, lr, config.sgd_momentum, config.weight_decay
    )
    run.begin(model.f[0], model=model, optimizer=optimizer)

    for step, views, ids in run.batches(views_of(config)):
        moved = step if config.cosine_per == "step" else step - step % run.steps_per_epoch
        rate = warmup_cosine(moved, run.total_steps, 0, lr)
        set_lr(optimizer, rate)

        with run.autocast():
            z = project(model.f, views, encode)  # z11, z12, z21, z22: projections
            p = [model.h(z_) for z_ in z]  # p11, …: predictions, before anything is chosen
        z, p = full_precision(*z), full_precision(*p)

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
            grad_norm=grad_norm(model),
            **run.watch(z[0], ids, None, None),
            **(choice_statistics(distances) if config.gsg else {}),
        )

    run.finish(config.output_dim)


if __name__ == "__main__":
    sys.exit(command(main))
