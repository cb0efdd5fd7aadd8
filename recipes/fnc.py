"""FNC: Boosting Contrastive Self-Supervised Learning with False Negative Cancellation, Huynh,
Kornblith, Walter, Maire and Khademi, WACV 2022.

SimCLR, but negatives that look like the anchor's image are none any more. Further views of each
image, its support set, are compared with all negatives; those most alike, and alike enough, are
taken for false negatives and attracted, as the views of the anchor's own image are (`--cancel
attract`, the default), or left out of the denominator (`eliminate`). `none` is SimCLR.

    python recipes/fnc.py --data /path/to/imagenet                   # 1000 epochs, ResNet-50
    torchrun --nproc_per_node 8 recipes/fnc.py --follow official --data /path/to/imagenet

Aims at 74.4 % linear top-1 on ImageNet (README of the code), and 63.7 and 71.1 % on 1 and 10 % of
the labels. A step costs 14 forwards of an image where SimCLR's costs 6, with `--follow official`
40. Paper and code (google-research/fnc at adf5da5) differ: `--follow paper` (default) or
`--follow official`; see recipes/fnc.md.
"""

import functools
import math
import sys
from dataclasses import dataclass
from typing import Annotated, Literal

import common.run.early  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import View, ViewName, two_views
from common.config import (
    CIFAR10,
    PHOTOS,
    Bound,
    Count,
    NotNegative,
    Positive,
    PositiveInt,
    RunConfig,
    Share,
)
from common.distributed import average_gradients, gather, gather_with_grad, rank, world_size
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.models import build_encoder, in_full_precision, mlp, momentum_copy, update_momentum
from common.optim import build_optimizer, scaled_lr, set_lr, warmup_cosine
from common.run.flags import parse
from common.run.monitors import shares_found
from common.run.run import Run

Cosine = Annotated[float, Bound("lie between -1 and 1", lambda value: -1 <= value <= 1)]


@dataclass(frozen=True)
class Config(RunConfig):
    """FNC: contrast without the false negatives that support views find (Huynh et al. 2022).

    Each flag says where its value comes from: "paper" is the paper as another author describes it,
    which is all that could be read, "code" the authors' at adf5da5.
    """

    follow: Literal["paper", "official"] = "paper"  # official: code's --loss, --anchors, --memory
    # paper: the mean over anchors; official: twice as much, as the code
    loss: Literal["paper", "official"] = "paper"
    anchors: Literal["main", "all"] = "main"  # paper: two main views; code: support views too
    # rows of the memory, times --batch-size; 0: neither memory nor momentum encoder; paper: an
    # extra; code: 16
    memory: Count = 0
    momentum: Share = 0.999  # with --memory: momentum of its momentum encoder, constant; code
    support_views: Count = 8  # paper; code; 0: main views look for false negatives themselves
    # what becomes of false negatives; with none they are not looked for; paper: both; code: attract
    cancel: Literal["attract", "eliminate", "none"] = "attract"
    top_k: PositiveInt = 10  # an image has at most so many false negatives; paper; code
    threshold: Cosine = 0.7  # a false negative's score is above this; paper; code
    # a score is the max or the mean of a view's cosines with the support set; paper
    aggregate: Literal["max", "mean"] = "max"

    epochs: PositiveInt = 1000  # paper; 100 in its ablations and the code
    batch_size: PositiveInt = 4096  # global batch; paper; code
    lr: NotNegative = 0.1  # base rate, scaled as --lr-scaling says; code
    # --lr is multiplied by batch/lr-batch (linear) or by sqrt(batch) (sqrt); code
    lr_scaling: Literal["linear", "sqrt"] = "sqrt"
    lr_batch: Count = 256  # linear: the batch that --lr is given for, 0: not scaled; code
    # classic_lars: the rate is inside the momentum; code
    optimizer: Literal["classic_lars", "lars", "sgd", "adamw"] = "classic_lars"
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; code
    weight_decay: NotNegative = 1e-4  # code; LARS leaves out biases and norms (code)
    warmup_epochs: NotNegative = 10  # from 0; code
    temperature: Positive = 0.1  # code
    projector_layers: PositiveInt = 3  # paper: SimCLR v2's; code
    projector_hidden: Count = 0  # 0: as wide as the encoder's output; code
    output_dim: PositiveInt = 128  # code
    zero_init_residual: bool = True  # start the last batch norm of each block at 0; code
    # main and support views; paper: SimCLR's; code: RandAugment too, which is not here
    views: ViewName = "simclr"
    jitter_strength: NotNegative = 1.0  # scales --views' colour jitter; code
    crop_min: Share = 0.08  # smallest area of a crop, as a share of the image's; code
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # code


PRESETS = {
    "official": {"loss": "official", "anchors": "all", "memory": 16},
    # unstated: no paper has FNC on CIFAR-10. SimCLR's there, from the README of its code
    "cifar10": CIFAR10
    | {"lr": 1.0, "lr_scaling": "linear", "weight_decay": 1e-6, "epochs": 1000, "temperature": 0.5},
    # ours, chosen on held-out patches: fnc.md
    "photos": PHOTOS
    | {
        "lr": 0.03,
        "lr_scaling": "linear",
        "lr_batch": 64,
        "optimizer": "sgd",
        "warmup_epochs": 1,
        "temperature": 0.5,
        "support_views": 2,
    },
}


class FNC(nn.Module):
    """Makes embeddings z = g(h) of h = f(x). Each FC of the projector g starts at N(0, 0.01) and
    has a batch norm after it, the last one with a scale and no offset (code).
    """

    def __init__(self, config: Config):
        super().__init__()
        self.encoder = build_encoder(config.arch, config.image_size, config.zero_init_residual)
        width = self.encoder.embed_dim
        hidden = [config.projector_hidden or width] * (config.projector_layers - 1)
        self.projector = mlp([width, *hidden, config.output_dim], output_norm=True)
        for layer in self.projector:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.weight, std=0.01)
        self.projector[-1].bias.requires_grad = False  # scale without offset


class Memory(nn.Module):
    """The newest `size` projections of the momentum encoder (size,D), those of the latest batch
    first, and the numbers of their images; zeros and -1 at the start (code).
    """

    def __init__(self, size: int, dim: int):
        super().__init__()
        self.register_buffer("rows", torch.zeros(size, dim))
        self.register_buffer("ids", torch.full((size,), -1))

    def put(self, rows: Tensor, ids: Tensor) -> None:
        """Puts one batch in front, and drops as many of the oldest rows."""
        self.rows = torch.cat([rows.to(self.rows.dtype), self.rows])[: len(self.ids)]
        self.ids = torch.cat([ids, self.ids])[: len(self.ids)]


def as_columns(views: Tensor) -> Tensor:
    """Joins (V,N,D) of each rank to (V*M,D), row v*M + image's number among M; with gradient."""
    return gather_with_grad(views.transpose(0, 1)).transpose(0, 1).flatten(0, 1)


def own_columns(images: int, views: int, columns: int, device: torch.device) -> Tensor:
    """Returns (N,V): the numbers of the columns, in as_columns' order, with this rank's images."""
    batch = images * world_size()
    if columns < views * batch:
        raise ValueError(f"{columns} keys do not begin with {views} views of {batch} images")
    own = rank() * images + torch.arange(images, device=device)
    return own[:, None] + batch * torch.arange(views, device=device)


@torch.no_grad()
@in_full_precision
def false_negatives(
    views: Tensor,
    keys: Tensor | None = None,
    top_k: int = 10,
    threshold: float = 0.7,
    aggregate: Literal["max", "mean"] = "max",
    key_views: int = 0,
) -> Tensor:
    """Finds each image's false negatives among the columns: (V,N,D), any scale -> bool (N,C).

    A column's score is the largest (or mean) cosine with the image's V views. It is a false
    negative if it is no view of the image itself, is among the `top_k` largest scores (of equal
    ones the first columns), and lies above `threshold`.

    Columns are the same views of all ranks, in as_columns' order, or `keys` (C,D), equal on all
    ranks: those of this batch in that order, of `key_views` views (0: of V), then older rows. A row
    of zeros has cosine 0.
    """
    if aggregate not in ("max", "mean") or top_k < 1:
        raise ValueError(f"max or mean of at least one score, not {aggregate} of {top_k}")
    z = F.normalize(views, dim=2)
    columns = as_columns(z) if keys is None else F.normalize(keys, dim=1)
    own = own_columns(z.shape[1], key_views or len(z), len(columns), z.device)
    join = torch.maximum if aggregate == "max" else torch.add
    scores = functools.reduce(join, (view @ columns.T for view in z))
    if aggregate == "mean":
        scores /= len(z)
    scores.clamp_(max=1).scatter_(1, own, -math.inf)  # a copy is 1, not a rounding more
    most = min(top_k, len(columns))
    least = scores.topk(most, dim=1).values[:, -1:]
    above, level = scores > least, scores == least
    room = most - above.sum(dim=1, keepdim=True)  # topk's own choice among equals is unstated
    chosen = above | (level & (level.cumsum(dim=1, dtype=torch.int32) <= room))
    return chosen & (scores > threshold)


@in_full_precision
def fnc_loss(
    views: Tensor,
    mask: Tensor | None,
    temperature: float = 0.1,
    form: Literal["attract", "eliminate", "none"] = "attract",
    keys: Tensor | None = None,
) -> Tensor:
    """Returns the mean loss of all views as anchors: (V,N,D) of any scale, bool (N,C) -> scalar.

    For an anchor, P are the V - 1 other views of its image, F the masked columns, A all columns but
    the anchor's own. "attract" is log sum_A exp(s/t) less the mean of s/t over P and F; F stays in
    the sum. "eliminate" takes A without F and the mean over P. "none" reads neither F nor `mask`.
    Columns are those of false_negatives, with gradient; `keys` get none.
    """
    if form not in ("attract", "eliminate", "none"):
        raise ValueError(f"unknown form {form} of FNC's loss: attract, eliminate or none")
    if len(views) < 2:
        raise ValueError("FNC's loss needs two views: an anchor and another one of its image")
    z = F.normalize(views, dim=2)
    columns = as_columns(z) if keys is None else F.normalize(keys.detach(), dim=1)
    own = own_columns(z.shape[1], len(z), len(columns), z.device)
    if form != "none" and mask.shape != (z.shape[1], len(columns)):
        raise ValueError(f"a mask {(*mask.shape,)} of {z.shape[1]} images, {len(columns)} columns")
    positives = z if keys is None else columns[own].transpose(0, 1)
    attracted, count = positives.sum(dim=0), len(z) - 1
    if form == "attract":
        found = mask.to(z.dtype)
        attracted, count = attracted + found @ columns, count + found.sum(dim=1)
    losses = []
    for v, anchors in enumerate(z):
        logits = (anchors @ columns.T / temperature).scatter(1, own[:, v : v + 1], -math.inf)
        if form == "eliminate":
            logits = logits.masked_fill(mask, -math.inf)
        attraction = (anchors * (attracted - positives[v])).sum(dim=1) / (temperature * count)
        losses.append(logits.logsumexp(dim=1) - attraction)
    return torch.stack(losses).mean()


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    pair = two_views(config.views, size, crop_min, mode, config.jitter_strength)
    used = config.anchors == "all" or config.cancel != "none"
    return [pair[n % 2] for n in range(2 + config.support_views * used)]


def resolve(config: Config) -> Config:
    """Checks the configuration; raises UserError for flags that do not fit together."""
    preset = PRESETS.get(config.dataset, {})
    if config.lr_scaling == "sqrt" and config.lr_batch != preset.get("lr_batch", Config.lr_batch):
        raise UserError(
            f"--lr-batch {config.lr_batch}: --lr-scaling sqrt does not read it, --lr is times "
            "sqrt(--batch-size); leave it out"
        )
    views = 2 + (config.support_views if config.anchors == "all" else 0)
    if 0 < config.memory < views:
        raise UserError(
            f"--memory {config.memory}: it must hold the {views} views of a batch, so {views} or "
            "more times --batch-size; 0 is none"
        )
    return config


def parse_arguments(argv: list[str] | None = None) -> Config:
    return parse(Config, PRESETS, argv, resolve)


def project(encode: Pieces, projector: nn.Module, views: list[Tensor]) -> Tensor:
    """Projects V views (N,3,H,W) to (V,N,D), in one forward: batch statistics are joint (code)."""
    (h,) = encode(torch.cat(views))
    return projector(h).unflatten(0, (len(views), -1))


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("fnc", config)
    model = run.place(FNC(config))
    encode, more = Pieces(model.encoder, config), {}
    if config.memory:
        start = run.place(FNC(config))  # random weights of its own, no copy (code)
        target = momentum_copy(encoder=start.encoder, projector=start.projector)
        encode_target = Pieces(target.encoder, config)
        memory = Memory(config.memory * config.batch_size, config.output_dim)
        more = {"target": target, "memory": memory.to(run.device, run.dtype)}

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    if config.lr_scaling == "sqrt":
        lr = config.lr * math.sqrt(config.batch_size)
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    labels = run.train.labels
    labels = None if labels is None else torch.from_numpy(labels).to(run.device)
    run.begin(model.encoder, model=model, optimizer=optimizer, **more)

    views = views_of(config)
    anchors = len(views) if config.anchors == "all" else 2
    for step, xs, ids in run.batches(views):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr)
        set_lr(optimizer, rate)

        with run.autocast():
            z = project(encode, model.projector, xs[:anchors])  # anchors, V-by-n-by-d
            with torch.no_grad():
                if config.memory:
                    searching = project(encode_target, target.projector, xs)
                elif xs[anchors:]:
                    # the support views look for the false negatives
                    searching = project(encode, model.projector, xs[anchors:])
                else:
                    searching = z

        keys, column_ids = None, gather(ids).repeat(anchors)
        if config.memory:  # written before it is read (code)
            memory.put(as_columns(searching[:anchors]), column_ids)
            keys, column_ids = memory.rows, memory.ids
            searching = searching[anchors % len(xs) :]  # the support set, or all views
        mask, found = None, {}
        if config.cancel != "none":
            columns = as_columns(z.detach()) if keys is None else keys
            how = config.top_k, config.threshold, config.aggregate
            mask = false_negatives(searching, columns, *how, key_views=anchors)
            own = own_columns(len(ids), anchors, len(columns), ids.device)
            others = (column_ids >= 0).expand(mask.shape).scatter(1, own, False)
            found = shares_found(mask, others, ids, column_ids, labels)

        loss = fnc_loss(z, mask, config.temperature, config.cancel, keys)
        loss = loss * (2 if config.loss == "official" else 1)

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        if config.memory:
            update_momentum(target, model, config.momentum)
            found["momentum"] = config.momentum
        run.log(loss=loss, lr=rate, z=z[0], **found)

    run.finish(config.output_dim)


if __name__ == "__main__":
    sys.exit(command(main))
