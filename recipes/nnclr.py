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

import common.run.early  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import View, ViewName, small_crops, two_views
from common.config import (
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
from common.models import build_encoder, in_full_precision, mlp, momentum_copy, update_momentum
from common.optim import build_optimizer, momentum_to_one, scaled_lr, set_lr, warmup_cosine
from common.run.flags import parse
from common.run.run import Run
from common.support_set import SupportSet


@dataclass(frozen=True)
class Config(RunConfig):
    """NNCLR: nearest-neighbour contrastive learning (Dwibedi et al. 2021).

    Each flag says where its value comes from: "suppl." is the paper's supplement, "secondary"
    another author's re-implementation or quotation of the paper, "GSG" the paper of guided
    stop-gradient (Lee and Lee 2023).
    """

    epochs: PositiveInt = 1000  # secondary (VISSL fork that quotes the paper)
    batch_size: PositiveInt = 4096  # global batch; secondary; suppl. C has it for NNSiam
    lr: NotNegative = 0.3  # base rate, times batch/lr-batch; secondary (VISSL fork)
    lr_batch: Count = 256  # the batch that --lr is given for, 0: not scaled; secondary
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # secondary
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; secondary
    weight_decay: NotNegative = 1e-6  # secondary; LARS leaves out biases and norms
    warmup_epochs: NotNegative = 10  # secondary; from 0: unstated, see nnclr.md
    queue_size: PositiveInt = 98304  # secondary (VISSL fork: 24 x 4096)
    temperature: Positive = 0.1  # suppl. Algorithm 1
    # add the term normalised over neighbours: a secondary reading of Sec. 3.2
    symmetric_loss: bool = False
    momentum_encoder: bool = False  # suppl. Algorithm 2
    # with --momentum-encoder: its momentum at the start; unstated: BYOL's for 1000 epochs
    momentum: Share = 0.996
    # cosine: the momentum rises to 1; unstated: BYOL's
    momentum_schedule: Literal["cosine", "fixed"] = "cosine"
    projector_layers: PositiveInt = 3  # secondary (lightly quotes the paper): 2048-2048-256
    projector_hidden: PositiveInt = 2048  # secondary (quote)
    predictor_hidden: PositiveInt = 4096  # secondary (quote)
    output_dim: PositiveInt = 256  # secondary (quote)
    views: ViewName = "byol"  # secondary: "BYOL scheme"; cifar: GSG App. B.2
    jitter_strength: NotNegative = later(1.0)  # scales --views' colour jitter; s of SimCLR's App. A
    crop_min: Share = 0.08  # smallest area of a crop, as a share of the image's; BYOL App. B
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # BYOL App. B
    multi_crop: bool = False  # add small crops; no source at hand states how, see SwAV's values
    small_crops: Count = 6  # with --multi-crop: small crops per image; SwAV's code
    # with --multi-crop: side of a small crop in pixels; SwAV's code
    small_crop_size: PositiveInt = 96
    # with --multi-crop, instead of --crop-min: small crops have at most this share of the image's
    # area, large ones at least; SwAV
    multi_crop_scale: Share = 0.14


# unstated: no paper has NNCLR on CIFAR-10. Views, budget: GSG's App. B.2, C.2; the rest is ours
SMALL_IMAGES = {
    "lr_batch": 512,
    "optimizer": "sgd",
    "warmup_epochs": 0,
    "queue_size": 16384,
    "predictor_hidden": 2048,
    "crop_interpolation": "bilinear",
    "momentum": 0.99,
    "small_crop_size": 16,
}
PRESETS = {
    "cifar10": CIFAR10 | SMALL_IMAGES,
    "photos": PHOTOS | SMALL_IMAGES | {"lr_batch": 64, "queue_size": 2048},
}


class NNCLR(nn.Module):
    """Encoder and heads (secondary, quote): batch norm after every FC of the projector, ReLU after
    all but the last; a predictor with batch norm and ReLU on its hidden layer.
    """

    def __init__(self, config: Config):
        super().__init__()
        width, hidden = config.output_dim, config.projector_hidden
        self.encoder = build_encoder(config.arch, config.image_size)
        sizes = [self.encoder.embed_dim, *[hidden] * (config.projector_layers - 1), width]
        self.projector = mlp(sizes, output_norm=True)
        self.predictor = mlp([width, config.predictor_hidden, width], output_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns projections, (N,3,H,W) -> (N,D)."""
        return self.projector(self.encoder(x))


@in_full_precision
def nnclr_loss(neighbours: Tensor, predictions: Tensor, temperature: float = 0.1) -> Tensor:
    """Computes L(nn, p) of Algorithm 1, one direction: cross-entropy of row i with column i.

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
    """Computes the term that a secondary reading of Sec. 3.2 adds: it is normalised over the
    neighbours of all ranks instead of over the predictions. Shapes are those of nnclr_loss.
    """
    nn_, p = F.normalize(neighbours, dim=1), F.normalize(predictions, dim=1)
    logits = p @ gather(nn_).T / temperature
    labels = rank() * len(p) + torch.arange(len(p), device=p.device)
    return F.cross_entropy(logits, labels)


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    if not config.multi_crop:
        return [*two_views(config.views, size, crop_min, mode, config.jitter_strength)]
    # SwAV's code: large crops of (0.14, 1), small ones of (0.05, 0.14) of the area. Colours and
    # blur of the small crops are unstated: those of T, T', T, …
    scale = (0.05, config.multi_crop_scale)
    large = two_views(config.views, size, scale[1], mode, config.jitter_strength)
    return [*large, *small_crops(large, config.small_crops, config.small_crop_size, scale)]


def look_up(config: Config, state: dict) -> tuple[nn.Module, None]:
    """Returns, from a checkpoint's state, what maps images to the embedding that is looked up, and
    None, since neighbours have no weight.
    """
    model = NNCLR(config)
    model.load_state_dict(state["model"])
    if "target" not in state:
        return model, None
    target = momentum_copy(encoder=model.encoder, projector=model.projector)
    target.load_state_dict(state["target"])
    return target, None


def resolve(config: Config) -> Config:
    """Checks the configuration; raises UserError for small crops that cannot be."""
    if config.multi_crop and config.arch.startswith("vit"):
        raise UserError("--multi-crop needs a ResNet: a ViT's positions fit one size")
    if config.multi_crop and not 0.05 < config.multi_crop_scale < 1:
        raise UserError("--multi-crop-scale must lie between 0.05 and 1")
    return config


def parse_arguments(argv: list[str] | None = None) -> Config:
    return parse(Config, PRESETS, argv, resolve)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("nnclr", config)
    model = run.place(NNCLR(config))
    target, encode = None, Pieces(model.encoder, config)
    if config.momentum_encoder:
        target = momentum_copy(encoder=model.encoder, projector=model.projector)
        encode_target = Pieces(target.encoder, config)
    queue = SupportSet(config.queue_size, config.output_dim, config.seed)
    queue = queue.to(run.device, run.dtype)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    state = {"model": model, "optimizer": optimizer, "queue": queue}
    run.begin(model.encoder, **state, **({"target": target} if target else {}))

    for step, (x1, x2, *small), ids in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr)
        set_lr(optimizer, rate)

        with run.autocast():
            z1, z2 = map(model.projector, encode(x1, x2))  # projections, n-by-d
            p1, p2 = model.predictor(z1), model.predictor(z2)  # predictions, n-by-d
            ps = []
            if small:
                (zs,) = map(model.projector, encode(torch.cat(small)))
                ps = model.predictor(zs).chunk(len(small))
            zq1, zq2 = z1, z2
            if target:  # Algorithm 2 looks up with the momentum encoder
                with torch.no_grad():
                    zq1, zq2 = map(target.projector, encode_target(x1, x2))

        (NN1, found1), (NN2, found2) = queue.nearest(zq1), queue.nearest(zq2)  # top-1 look-up
        NN1, NN2 = NN1[:, 0], NN2[:, 0]

        pairs = [(NN1, p2), (NN2, p1)]  # L(NN1, p2)/2 + L(NN2, p1)/2
        pairs += [(NN, p) for p in ps for NN in (NN1, NN2)]  # small crops go with both
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
            t = momentum_to_one(step, run.total_steps, config.momentum)
        retrieved = queue.ids[torch.cat([found1, found2], dim=1)]
        own = {"momentum": t} if target else {}
        run.log(loss=loss, lr=rate, z=z1, retrieved=retrieved, **own)
        queue.enqueue(zq1, ids)  # only view 1, after both look-ups
        if target:
            update_momentum(target, model, t)

    run.finish(config.output_dim, queue, select=target or model)


if __name__ == "__main__":
    sys.exit(command(main))
