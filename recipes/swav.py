"""SwAV: Unsupervised Learning of Visual Features by Contrasting Cluster Assignments, Caron, Misra,
Mairal, Goyal, Bojanowski and Joulin, NeurIPS 2020.

Every view is scored against learned prototypes. The scores of a large crop, balanced over the batch
by Sinkhorn and Knopp's iteration so that all prototypes are used alike, are its code; every other
crop of the image must predict it. There are no pairs of images, no momentum copy and no predictor.

    python recipes/swav.py --data /path/to/imagenet                     # 800 epochs, 2 + 6 crops
    python recipes/swav.py --no-multi-crop --epochs 400 --data /path/to/imagenet

Aims at 75.3 % linear top-1 on ImageNet (README of the code), 70.1 % with two crops in 400 epochs.
800 epochs took the authors 49 hours of 64 GPUs. The paper itself was not at hand: every constant is
the released code's (facebookresearch/swav at 06b1b7c); see recipes/swav.md.
"""

import math
import sys
from collections.abc import Sequence
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
)
from common.distributed import all_reduce_sum, average_gradients, gather, rank, world_size
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.models import build_encoder, full_precision, in_full_precision, mlp
from common.optim import build_optimizer, scaled_lr, set_lr, warmup_cosine
from common.run.flags import parse
from common.run.run import Run
from common.support_set import SupportSet


@dataclass(frozen=True)
class Config(RunConfig):
    """SwAV: swapped prediction of cluster codes (Caron et al. 2020).

    Each flag says where its value comes from: "code" is the authors' released code (main_swav.py
    and its scripts), "GSG" the paper of guided stop-gradient (Lee and Lee 2023).
    """

    prototypes: PositiveInt = 3000  # K; code
    # Sinkhorn's epsilon: a smaller one makes codes sharper; code (0.03 against collapse)
    epsilon: Positive = 0.05
    sinkhorn_iterations: Count = 3  # balancing steps for each code; code
    temperature: Positive = 0.1  # temperature of the predictions; code
    # steps from the start in which prototypes get no gradient; code: 313, an epoch at batch 4096
    freeze_prototypes_steps: Count = 313
    # past embeddings of each large crop that join Sinkhorn, 0: none; code: 3840 at batch 256
    queue_size: Count = 0
    queue_start_epoch: Count = 15  # with --queue-size: whole epochs before it is filled; code
    multi_crop: bool = True  # add small crops, which predict codes and have none; code; no ViT
    small_crops: Count = 6  # with --multi-crop: small crops per image; code
    small_crop_size: PositiveInt = 96  # with --multi-crop: side of a small crop in pixels; code
    # with --multi-crop, instead of --crop-min: small crops have at most this share of the image's
    # area, large ones at least; code
    multi_crop_scale: Share = 0.14

    epochs: PositiveInt = 800  # its longest; code
    batch_size: PositiveInt = 4096  # global batch; code
    lr: NotNegative = 4.8  # highest rate, as it is; code; 0.6 at batch 256
    lr_batch: Count = 0  # the batch that --lr is given for, 0: not scaled, as the code
    lr_end: Share = 0.001  # last rate as a share of the highest; code: 0.0048
    optimizer: Literal["larc", "lars", "sgd", "adamw"] = "larc"  # code: apex's LARC around SGD
    sgd_momentum: Share = 0.9  # momentum of LARC, LARS or SGD; code
    weight_decay: NotNegative = 1e-6  # code; LARC decays every tensor
    warmup_epochs: NotNegative = 10  # code; none at batch 256
    warmup_start: Share = 0.0625  # first rate of a warm-up, a share of the highest; code: 0.3
    projector_hidden: PositiveInt = 2048  # its one hidden layer; code
    output_dim: PositiveInt = 128  # dimension of embeddings and prototypes; code
    views: ViewName = "simclr"  # code: the same for all crops; cifar: GSG App. B.2
    jitter_strength: NotNegative = 1.0  # scales --views' colour jitter; code: s
    # without --multi-crop: smallest area of a crop, as a share of the image's; code
    crop_min: Share = 0.08
    crop_interpolation: Literal["bicubic", "bilinear"] = "bilinear"  # of crops; code


# ours: two views, as every recipe has on small images
SMALL_IMAGES = {"multi_crop": False, "small_crop_size": 16}
PRESETS = {
    "vit": {"multi_crop": False},  # its positions fit one size
    # the scripts of the code for batch 256: rate 0.6, no warm-up, an epoch of fixed prototypes (97
    # steps), a queue; 1000 prototypes: ours
    "cifar10": CIFAR10
    | SMALL_IMAGES
    | {"lr": 0.6, "lr_batch": 256, "weight_decay": 1e-6, "warmup_epochs": 0}
    | {"freeze_prototypes_steps": 97, "queue_size": 3840, "prototypes": 1000},
    # ours, chosen on held-out patches: swav.md
    "photos": PHOTOS
    | SMALL_IMAGES
    | {"optimizer": "sgd", "lr_batch": 64, "warmup_epochs": 0}
    | {"prototypes": 100, "freeze_prototypes_steps": 68, "projector_hidden": 512},
}


class SwAV(nn.Module):
    """Encoder, projector (code: Linear, batch norm, ReLU, Linear, both with a bias) and prototypes,
    which are the rows of a linear layer without bias.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.encoder = build_encoder(config.arch, config.image_size)
        sizes = [self.encoder.embed_dim, config.projector_hidden, config.output_dim]
        self.projector = mlp(sizes, hidden_bias=True, output_bias=True)
        self.prototypes = nn.Linear(config.output_dim, config.prototypes, bias=False)

    @torch.no_grad()
    def normalize_prototypes(self) -> None:
        """Brings every prototype back to length 1, before each forward."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))


@in_full_precision
def similarities(z: Tensor, prototypes: Tensor) -> Tensor:
    """Computes cosines (N,K), in float32 at least, of rows (N,D) and (K,D) of length 1."""
    return z @ prototypes.T


@torch.no_grad()
@in_full_precision
def sinkhorn(scores: Tensor, epsilon: float = 0.05, iterations: int = 3) -> Tensor:
    """Makes codes (N,K), whose rows sum to 1, of cosines (N,K) of this rank's part of the batch.

    Q is exp(scores / epsilon) over its sum. `iterations` times each prototype is brought to the
    share 1/K of the global batch, then each image to 1/M; at last Q is multiplied by M. Without
    iterations only the sum and M act. All is done in logarithms, in which no epsilon is too small.
    """
    log_Q = scores / epsilon
    if iterations == 0:
        images = over_ranks(torch.full_like(log_Q[0, :1], math.log(len(log_Q))))
        return (log_Q - over_ranks(log_Q.logsumexp((0, 1))[None]) + images).exp()
    for _ in range(iterations):  # the constants 1/K, 1/M and M cancel
        log_Q = log_Q - over_ranks(log_Q.logsumexp(0))
        log_Q = log_Q - log_Q.logsumexp(1, keepdim=True)
    return log_Q.exp()


def over_ranks(logarithms: Tensor) -> Tensor:
    """Returns the logarithm of the sum over ranks of what `logarithms` mean: (K,) each -> (K,)."""
    return gather(logarithms[None]).logsumexp(0)


def swav_loss(
    scores: Sequence[Tensor], codes: Sequence[Tensor], temperature: float = 0.1
) -> Tensor:
    """Computes the swapped prediction: V tensors of cosines (N,K), S <= V of codes (N,K) -> scalar.

    codes[s] were made from crop s. It is the mean over s of the mean over the other crops v of the
    cross-entropy of codes[s] with softmax(scores[v] / temperature), over this rank's images. Codes
    get no gradient. Raises ValueError for fewer than two crops, or no code or too many.
    """
    crops, assigning = len(scores), len(codes)
    if crops < 2 or not 1 <= assigning <= crops:
        raise ValueError(f"{crops} crops and {assigning} codes: 2 or more crops, 1 code to a crop")
    terms = []
    for v, of_crop in enumerate(scores):
        others = [code.detach() for s, code in enumerate(codes) if s != v]
        if others:
            terms.append(cross_entropy(of_crop, sum(others), temperature))
    return sum(terms) / (assigning * (crops - 1))


@in_full_precision
def cross_entropy(scores: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Returns the mean over rows of -sum_k target_k log softmax(scores / temperature)_k."""
    return -(target * F.log_softmax(scores / temperature, dim=1)).sum(dim=1).mean()


@torch.no_grad()
def code_entropy(codes: Tensor) -> Tensor:
    """Returns the mean entropy of codes (N,K) over ln K: 1 if they say nothing (a collapse)."""
    return torch.special.entr(codes).sum(dim=1).mean() / math.log(max(2, codes.shape[1]))


@torch.no_grad()
def prototype_usage(scores: Tensor) -> Tensor:
    """Tells how evenly the images of the global batch spread over their nearest prototypes: the
    entropy of these shares over the largest possible; 0 if all have one. (N,K) -> scalar.
    """
    shares = scores.new_zeros(scores.shape[1])
    shares.scatter_add_(0, scores.argmax(dim=1), torch.ones_like(scores[:, 0]))
    images = len(scores) * world_size()
    most = math.log(max(2, min(images, scores.shape[1])))
    return torch.special.entr(all_reduce_sum(shares) / images).sum() / most


def views_of(config: Config) -> list[View]:
    size, mode, strength = config.image_size, config.crop_interpolation, config.jitter_strength
    if not config.multi_crop:
        return [*two_views(config.views, size, config.crop_min, mode, strength)]
    scale = (0.05, config.multi_crop_scale)  # code: large crops of 14 % or more, small of 5 to 14 %
    large = two_views(config.views, size, scale[1], mode, strength)
    return [*large, *small_crops(large, config.small_crops, config.small_crop_size, scale)]


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
    run = Run("swav", config)
    model = run.place(SwAV(config))
    encode, prototypes = Pieces(model.encoder, config), model.prototypes.weight
    past = None  # embeddings of both large crops, side by side
    if config.queue_size:
        past = SupportSet(config.queue_size, 2 * config.output_dim, config.seed)
        past = past.to(run.device, run.dtype)
    fills = config.queue_start_epoch * run.steps_per_epoch  # the first step that fills the queue
    full = fills + math.ceil(config.queue_size / config.batch_size)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    state = {"model": model, "optimizer": optimizer}
    run.begin(model.encoder, **state, **({"past": past} if past else {}))

    for step, (x1, x2, *small), ids in run.batches(views_of(config)):
        start, end = config.warmup_start * lr, config.lr_end * lr
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr, start, end)
        set_lr(optimizer, rate)
        model.normalize_prototypes()

        with run.autocast():  # one encoder pass per resolution, one head pass for all crops (code)
            features = encode(torch.cat([x1, x2]))
            if small:
                features += encode(torch.cat(small))
            z = model.projector(torch.cat(features))
        z = F.normalize(*full_precision(z), dim=1)
        scores = similarities(z, prototypes).chunk(2 + len(small))
        z1, z2 = z.chunk(2 + len(small))[:2]

        joined = [s.detach() for s in scores[:2]]
        if past and step >= full:  # each rank takes its share of the queue
            rows = past.embeddings[rank() :: world_size()].chunk(2, dim=1)
            older = [similarities(row, prototypes.detach()) for row in rows]
            joined = [torch.cat(pair) for pair in zip(older, joined, strict=True)]
        codes = [sinkhorn(s, config.epsilon, config.sinkhorn_iterations) for s in joined]
        codes = [q[-len(x1) :] for q in codes]
        loss = swav_loss(scores, codes, config.temperature)

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        if step < config.freeze_prototypes_steps:
            prototypes.grad = None
        average_gradients(model)
        optimizer.step()

        own = {"code_entropy": code_entropy(codes[0])}
        own["prototype_usage"] = prototype_usage(scores[0].detach())
        run.log(loss=loss, lr=rate, z=z1, **own)
        if past and step >= fills:
            past.enqueue(torch.cat([z1, z2], dim=1), ids)

    run.finish(config.output_dim)


if __name__ == "__main__":
    sys.exit(command(main))
