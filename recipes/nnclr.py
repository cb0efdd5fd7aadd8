"""NNCLR: With a Little Help from My Friends, Dwibedi et al., ICCV 2021.

The positive of a view is not the other view but its nearest neighbour in a support set, a queue of
past projections: two views of one image pass through encoder, projector and predictor, the
projection of one view looks up its nearest neighbour, and InfoNCE asks the prediction of the other
view to match it against the predictions of all other images of the batch (supplement, Algorithm 1).
`--momentum-encoder` looks up and enqueues with a momentum copy (Algorithm 2).

    python recipes/nnclr.py --data /path/to/imagenet                 # 1000 epochs, ResNet-50
    torchrun --nproc_per_node 8 recipes/nnclr.py --data /path/to/imagenet

Aims at 75.6 % linear top-1 on ImageNet (abstract, which does not say whether small crops were
used: --multi-crop). Costs about 1000 epochs at batch 4096; see recipes/nnclr.md, also for where
papers and code leave things open.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import View, byol_views, cifar_view
from common.config import RunConfig, parse
from common.distributed import average_gradients, gather, gather_with_grad, rank
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.models import (
    build_encoder,
    full_precision,
    in_full_precision,
    mlp,
    momentum_copy,
    update_momentum,
)
from common.optim import build_optimizer, grad_norm, scaled_lr, set_lr, warmup_cosine
from common.run.run import Run
from common.support_set import SupportSet


@dataclass(frozen=True)
class Config(RunConfig):
    """NNCLR: nearest-neighbour contrastive learning (Dwibedi et al. 2021).

    Each flag says where its value comes from: "suppl." is the paper's supplement, "secondary"
    another author's re-implementation or quotation of the paper.
    """

    epochs: int = 1000  # secondary (VISSL fork that quotes the paper)
    batch_size: int = 4096  # global batch; secondary; suppl. C has it for NNSiam
    lr: float = 0.3  # base rate, times batch/lr-batch; secondary (VISSL fork)
    lr_batch: int = 256  # the batch that --lr is given for, 0: not scaled; secondary
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # secondary
    sgd_momentum: float = 0.9  # momentum of LARS or SGD; secondary
    weight_decay: float = 1e-6  # secondary; LARS leaves out biases and norms
    warmup_epochs: float = 10  # secondary; from 0: unstated, see nnclr.md
    queue_size: int = 98304  # secondary (VISSL fork: 24 x 4096)
    temperature: float = 0.1  # suppl. Algorithm 1
    # add the term normalised over neighbours: a secondary reading of Sec. 3.2
    symmetric_loss: bool = False
    momentum_encoder: bool = False  # suppl. Algorithm 2
    momentum: float = 0.996  # start of the momentum; unstated: BYOL's for 1000 epochs
    momentum_schedule: Literal["cosine", "fixed"] = "cosine"  # to 1; unstated: BYOL's
    projector_layers: int = 3  # secondary (lightly quotes the paper): 2048-2048-256
    projector_hidden: int = 2048  # secondary (quote)
    predictor_hidden: int = 4096  # secondary (quote)
    output_dim: int = 256  # secondary (quote)
    views: Literal["byol", "cifar"] = "byol"  # secondary: "BYOL scheme"; cifar: GSG App. B.2
    crop_min: float = 0.08  # smallest share of the area; BYOL App. B
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # BYOL App. B
    multi_crop: bool = False  # add small crops; no source at hand states how, see SwAV's values
    small_crops: int = 6  # with --multi-crop; SwAV's code
    small_crop_size: int = 96  # with --multi-crop, pixels; SwAV's code
    # with --multi-crop: the area that parts small from large crops, instead of --crop-min; SwAV
    multi_crop_scale: float = 0.14


# unstated: no paper has NNCLR on CIFAR-10. Views and budget of GSG's App. B.2 and C.2, ours else
SMALL_IMAGES = {
    "image_size": 32,
    "epochs": 200,
    "batch_size": 512,
    "lr": 0.06,
    "lr_batch": 512,
    "optimizer": "sgd",
    "weight_decay": 5e-4,
    "warmup_epochs": 0,
    "queue_size": 16384,
    "predictor_hidden": 2048,
    "views": "cifar",
    "crop_interpolation": "bilinear",
    "momentum": 0.99,
    "small_crop_size": 16,
}
PRESETS = {
    "cifar10": {"arch": "resnet18_cifar", **SMALL_IMAGES},
    "photos": {
        "arch": "tiny",
        **SMALL_IMAGES,
        "epochs": 10,
        "batch_size": 64,
        "lr": 0.02,
        "lr_batch": 64,
        "queue_size": 2048,
        "knn_every": 5,
    },
}


class NNCLR(nn.Module):
    """f = encoder + projector, g = predictor. Secondary (quote): batch norm after every FC of the
    projector, ReLU after all but the last; predictor with batch norm and ReLU on its hidden layer.
    """

    def __init__(self, config: Config):
        super().__init__()
        encoder = build_encoder(config.arch, config.image_size)
        hidden = [config.projector_hidden] * (config.projector_layers - 1)
        projector = mlp([encoder.embed_dim, *hidden, config.output_dim], output_norm=True)
        self.f = nn.Sequential(encoder, projector)
        sizes = [config.output_dim, config.predictor_hidden, config.output_dim]
        self.g = mlp(sizes, output_bias=True)


@in_full_precision
def nnclr_loss(neighbours: Tensor, predictions: Tensor, temperature: float = 0.1) -> Tensor:
    """L(nn, p) of Algorithm 1, one direction: cross-entropy of row i with column i.

    neighbours (N,D), predictions (N,D), any scale -> scalar, the mean over rows. Rows are this
    rank's neighbours, columns the predictions of all ranks, gathered with gradient.
    """
    nn_, p = F.normalize(neighbours, dim=1), F.normalize(predictions, dim=1)
    logits = nn_ @ gather_with_grad(p).T / temperature
    labels = rank() * len(p) + torch.arange(len(p), device=p.device)
    return F.cross_entropy(logits, labels)


@in_full_precision
def nnclr_transposed_loss(
    neighbours: Tensor, predictions: Tensor, temperature: float = 0.1
) -> Tensor:
    """The term that a secondary reading of Sec. 3.2 adds: normalised over the neighbours of all
    ranks instead of over the predictions. Shapes as in nnclr_loss.
    """
    nn_, p = F.normalize(neighbours, dim=1), F.normalize(predictions, dim=1)
    logits = p @ gather(nn_).T / temperature
    labels = rank() * len(p) + torch.arange(len(p), device=p.device)
    return F.cross_entropy(logits, labels)


def views_of(config: Config) -> list[View]:
    size, crop_min = config.image_size, config.crop_min
    if config.multi_crop:
        crop_min = config.multi_crop_scale  # large crops (0.14, 1), small ones (0.05, 0.14)
    if config.views == "byol":
        views = [*byol_views(size, crop_min, config.crop_interpolation)]
    else:
        views = [cifar_view(size, crop_min, config.crop_interpolation)] * 2
    if config.multi_crop:  # colours and blur of the small crops unstated: those of T, T', T, …
        scale = (0.05, config.multi_crop_scale)  # SwAV's code
        small = [v.small(config.small_crop_size, scale) for v in views]
        views += [small[i % 2] for i in range(config.small_crops)]
    return views


def check(config: Config) -> Config:
    if config.multi_crop and config.arch.startswith("vit"):
        raise UserError("--multi-crop needs a ResNet: a ViT's positions fit one size")
    if config.projector_layers < 1:
        raise UserError("--projector-layers must be 1 or more")
    if config.multi_crop and not 0.05 < config.multi_crop_scale < 1:
        raise UserError("--multi-crop-scale must lie between 0.05 and 1")
    return config


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, PRESETS, argv, check)
    run = Run("nnclr", config)
    model = run.place(NNCLR(config))
    f_m = momentum_copy(model.f) if config.momentum_encoder else None
    encode, projector = Pieces(model.f[0], config), model.f[1]
    if f_m:
        encode_m, projector_m = Pieces(f_m[0], config), f_m[1]
    Q = SupportSet(config.queue_size, config.output_dim, config.seed)
    Q = Q.to(run.device, run.dtype)
    run.warn_of_long_queue(config.queue_size)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    labels = run.labels()
    state = {"model": model, "optimizer": optimizer, "queue": Q}
    run.begin(model.f[0], **state, **({"f_m": f_m} if f_m else {}))

    for step, (x1, x2, *small), ids in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr)
        set_lr(optimizer, rate)

        with run.autocast():
            z1, z2 = map(projector, encode(x1, x2))  # projections, n-by-d
            p1, p2 = model.g(z1), model.g(z2)  # predictions, n-by-d
            ps = []
            if small:
                (zs,) = map(projector, encode(torch.cat(small)))
                ps = model.g(zs).chunk(len(small))
            if f_m:
                with torch.no_grad():
                    # Algorithm 2 looks up with the momentum encoder
                    zq1, zq2 = map(projector_m, encode_m(x1, x2))
            else:
                zq1, zq2 = z1, z2
        z1, p1, p2, zq1, zq2, *ps = full_precision(z1, p1, p2, zq1, zq2, *ps)

        (NN1, found1), (NN2, found2) = Q.nearest(zq1), Q.nearest(zq2)  # top-1 look-up
        NN1, NN2 = NN1[:, 0], NN2[:, 0]

        pairs = [(NN1, p2), (NN2, p1)]  # L(NN1, p2)/2 + L(NN2, p1)/2
        pairs += [(NN, p) for p in ps for NN in (NN1, NN2)]  # small crops: both neighbours
        terms = [nnclr_loss(NN, p, config.temperature) for NN, p in pairs]
        if config.symmetric_loss:
            terms += [nnclr_transposed_loss(NN, p, config.temperature) for NN, p in pairs]
        loss = sum(terms) / len(terms)

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        t = config.momentum
        if config.momentum_schedule == "cosine":
            t = warmup_cosine(step, run.total_steps, 0, base=config.momentum, end=1.0)
        retrieved = Q.ids[torch.cat([found1, found2], dim=1)]
        run.log(
            loss=loss,
            lr=rate,
            grad_norm=grad_norm(model),
            **run.watch(z1, ids, retrieved, labels),
            **({"momentum": t} if f_m else {}),
        )
        Q.enqueue(zq1, ids)  # only view 1, after both look-ups
        if f_m:
            update_momentum(f_m, model.f, t)

    run.finish(config.output_dim, Q, select=f_m or model.f)


if __name__ == "__main__":
    sys.exit(command(main))
