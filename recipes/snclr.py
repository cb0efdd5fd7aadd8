"""SNCLR: Soft Neighbors are Positive Supporters, Ge et al., ICLR 2023.

Each view is contrasted not only with the other view (y2, from a momentum branch) but also with the
K nearest neighbours of y2 in a queue, each weighted by its positiveness: a softmax over the
cross-attention of y1 with the neighbours. Neighbours of the other images of the batch join the
negatives (Eq. 2 to 4, App. A).

    python recipes/snclr.py --arch vit_small --epochs 300 --data /path/to/imagenet
    torchrun --nproc_per_node 8 recipes/snclr.py --arch vit_small --epochs 300 --data ...

Aims at linear top-1 on ImageNet of 73.4 % (ViT-S/16, 300 epochs), 76.8 % (ViT-B/16, 300) and
75.3 % (ResNet-50, 800; 74.5 % at 400), all at batch 4096; the paper used 32 A100 (Sec. 4, App. A).
Paper and code differ: `--follow paper` (default) or `official`, a flag for each; see snclr.md.
"""

import dataclasses
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import common.run.early  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F
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
    later,
)
from common.distributed import average_gradients
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.fast.tiled import cosines, logsumexp_of_cosines
from common.models import (
    build_encoder,
    freeze_patch_embedding,
    in_full_precision,
    mlp,
    momentum_copy,
    update_momentum,
)
from common.optim import build_optimizer, momentum_to_one, scaled_lr, set_lr, warmup_cosine
from common.run.flags import parse
from common.run.monitors import weights_read
from common.run.run import Run
from common.support_set import SupportSet


@dataclass(frozen=True)
class Config(RunConfig):
    """SNCLR: soft neighbours as positives (Ge et al. 2023).

    Each flag says where its value comes from: "Sec." and "App." are the paper's, "code" the
    authors' released code, "GSG" the paper of guided stop-gradient (Lee and Lee 2023). The arch
    sets the optimizer and its rates (see the presets).
    """

    follow: Literal["paper", "official"] = "paper"  # official: sets each flag to the released code
    loss: Literal["paper", "official"] = "paper"  # Eq. 2; code: soft-label cross-entropy x 2 tau
    heads: Literal["paper", "official"] = "paper"  # Sec. 4.1: FC-BN-ReLU-FC; code: MoCo-v3's
    # cosine: the momentum rises to 1, as in the code; App. A: fixed
    momentum_schedule: Literal["fixed", "cosine"] = "fixed"
    # Eq. 1 for so long, App. A, m unstated: the lr warm-up, or 5 % without one; code: 0
    neighbour_free_epochs: NotNegative | None = None
    queue_scope: Literal["global", "rank"] = "global"  # unstated; code: one private queue per rank
    exclude_self: bool = True  # Sec. 1, Fig. 2: samples from other images; code: no
    freeze_patch_embedding: bool = False  # unstated; code: yes (ViT only)
    vit_small: Literal["timm", "mocov3"] = "timm"  # App. A: timm, DeiT; code: 12 heads, sin-cos
    warmup_start_lr: NotNegative = 1e-6  # App. A; code: 0
    crop_interpolation: Literal["bicubic", "bilinear"] = "bicubic"  # App. A: BYOL's; code: bilinear

    epochs: PositiveInt = 800  # Sec. 4.1 (ResNet-50); ViTs 300
    batch_size: PositiveInt = 4096  # global batch; App. A
    lr: NotNegative = 0.3  # base rate, times batch/lr-batch; Sec. 4.1 (ResNet-50); ViTs 1.5e-4
    lr_batch: Count = 256  # the batch that --lr is given for, 0: not scaled; Sec. 4.1
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # Sec. 4.1 (ResNet-50); ViTs AdamW
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; unstated; code
    weight_decay: NotNegative = 1e-6  # unstated for ResNet-50, the code's default; ViTs 0.1, App. A
    warmup_epochs: NotNegative = 10  # Sec. 4.1 (ResNet-50); ViTs 40
    momentum: Share = 0.99  # momentum of the momentum branch; Sec. 4.1
    neighbours: Count = 30  # K; Sec. 4.1
    queue_size: PositiveInt = 128000  # annex, Table 6 (Table 5: the largest set); code
    temperature: Positive = 0.2  # tau, unstated; code (ViT-S)
    positiveness_scale: Positive = 1.0  # 1/gamma of Eq. 4, unstated; code has none
    detach_positiveness: bool = False  # unstated; code keeps the gradient through the weights
    projector_hidden: PositiveInt = 4096  # Sec. 4.1 "follow BYOL", BYOL Sec. 3.3; code
    predictor_hidden: PositiveInt = 4096  # Sec. 4.1 "follow BYOL", BYOL Sec. 3.3; code
    output_dim: PositiveInt = 256  # Table 6 (128 000 x 256); BYOL Sec. 3.3; code
    views: ViewName = "byol"  # App. A "follow BYOL"; cifar: GSG App. B.2
    jitter_strength: NotNegative = later(1.0)  # scales --views' colour jitter; s of SimCLR's App. A
    crop_min: Share = 0.08  # smallest area of a crop, as a share of the image's; BYOL App. B; code


# unstated: no paper has SNCLR on CIFAR-10. Views, budget: GSG's App. B.2, C.2; the rest is ours
SMALL_IMAGES = {
    "lr_batch": 512,
    "optimizer": "sgd",
    "warmup_epochs": 0,
    "queue_size": 16384,
    "projector_hidden": 2048,
    "predictor_hidden": 2048,
    "crop_interpolation": "bilinear",
}
PRESETS = {
    "official": {  # the released code at b95c7e5: builder_snclr_factor.py, main_log.py, start.sh
        "loss": "official",
        "heads": "official",
        "momentum_schedule": "cosine",
        "neighbour_free_epochs": 0,
        "queue_scope": "rank",
        "exclude_self": False,
        "freeze_patch_embedding": True,
        "vit_small": "mocov3",
        "warmup_start_lr": 0.0,
        "crop_interpolation": "bilinear",
    },
    "vit": {  # Sec. 4.1, App. A
        "epochs": 300,
        "optimizer": "adamw",
        "lr": 1.5e-4,
        "weight_decay": 0.1,
        "warmup_epochs": 40,
    },
    # start.sh, the only training command of the README; a suspected typo: the paper, MoCo-v3 and
    # the release's other script have 1.5e-4
    "official vit": {"lr": 1.5e-5},
    "cifar10": CIFAR10 | SMALL_IMAGES,
    "photos": PHOTOS | SMALL_IMAGES | {"lr_batch": 64, "queue_size": 2048},
}


class SNCLR(nn.Module):
    """Makes projections y = projector(encoder(x)) and predictions z = predictor(y); the momentum
    branch is a copy of encoder and projector.
    """

    def __init__(self, config: Config):
        super().__init__()
        encoder = build_encoder(config.arch, config.image_size)
        if config.freeze_patch_embedding:
            freeze_patch_embedding(encoder)
        hidden, width, out = config.projector_hidden, config.predictor_hidden, config.output_dim
        if config.heads == "paper":  # BYOL: FC with bias, BN, ReLU, FC without
            projector = mlp([encoder.embed_dim, hidden, out], hidden_bias=True)
            self.predictor = mlp([out, width, out], hidden_bias=True)
        else:  # MoCo-v3: no biases; BN without affine after the projector, and ViT's predictor
            vit = config.arch.startswith("vit")
            sizes = [encoder.embed_dim, *([hidden] * (2 if vit else 1)), out]
            projector = mlp(sizes, output_norm=True, output_affine=False)
            self.predictor = mlp([out, width, out], output_norm=vit, output_affine=False)
        # after the predictor: optimizers know parameters by their order, and checkpoints have this
        self.encoder, self.projector = encoder, projector

    def forward(self, x: Tensor) -> Tensor:
        """Returns projections, (N,3,H,W) -> (N,D)."""
        return self.projector(self.encoder(x))


@in_full_precision
def positiveness(projections: Tensor, neighbours: Tensor) -> Tensor:
    """Computes w_i of Eq. 4 (identity f1 and f2, no scale): y1 (N,D), NN(y2) (N,K,D) -> (N,K).

    It is the softmax over the K own neighbours of the cosine with y1 (the code normalises both, the
    paper does not say). The weight of the instance itself, w_0 = 1, is not in it.
    """
    return cosines(F.normalize(projections, dim=1), neighbours).softmax(dim=1)


@in_full_precision
def snclr_loss(
    predictions: Tensor,
    projections: Tensor,
    keys: Tensor,
    neighbours: Tensor,
    temperature: float,
    form: Literal["paper", "official"] = "paper",
    positiveness_scale: float = 1.0,
    detach_positiveness: bool = False,
) -> Tensor:
    """Computes one direction: z1, y1, y2 (N,D), NN(y2) (N,K,D), any scale -> the mean over images.

    Columns are the keys y2 and their neighbours of all ranks, N + N*K of each, without gradient;
    positives are the own key with weight 1 and the own K neighbours with their positiveness.
    "paper" is Eq. 2, -log of the weighted sum over the whole sum. "official" is the cross-entropy
    with the weights as soft labels, times 2 * temperature. K = 0 gives Eq. 1. Gradient flows
    through z1 and, by the positiveness, through y1.
    """
    if form not in ("paper", "official"):
        raise ValueError(f"unknown form {form} of SNCLR's loss: paper or official")
    keys, neighbours = keys.detach(), neighbours.detach()  # NN(y2)_0 = y2, NN(y2)_1..K
    weights = positiveness_scale * positiveness(projections, neighbours)
    if detach_positiveness:
        weights = weights.detach()
    weights = torch.cat([weights.new_ones(len(keys), 1), weights], dim=1)  # w_0 = 1

    z1 = F.normalize(predictions, dim=1)
    own = [cosines(z1, keys[:, None]), cosines(z1, neighbours)]
    positives = torch.cat(own, dim=1) / temperature  # (N,1+K)
    # over positives and negatives; 2 GB of logits at batch 4096, so in tiles
    total = logsumexp_of_cosines(z1, keys, neighbours, temperature)
    if form == "paper":
        return (total - (weights.log() + positives).logsumexp(dim=1)).mean()
    return (weights * (total[:, None] - positives)).sum(dim=1).mean() * 2 * temperature


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    return [*two_views(config.views, size, crop_min, mode, config.jitter_strength)]


def resolve(config: Config) -> Config:
    """Sets what depends on other flags: the release's ViT-S, its patch embedding, App. A's m."""
    changes = {}
    if config.arch == "vit_small" and config.vit_small == "mocov3":
        changes["arch"] = "vit_small_mocov3"
    if not config.arch.startswith("vit"):
        changes["freeze_patch_embedding"] = False  # there is none
    if config.neighbour_free_epochs is None:
        changes["neighbour_free_epochs"] = config.warmup_epochs or 0.05 * config.epochs
    if config.neighbours > config.queue_size:
        held = config.queue_size
        raise UserError(f"--neighbours {config.neighbours} is more than --queue-size {held} holds")
    return dataclasses.replace(config, **changes)


def parse_arguments(argv: list[str] | None = None) -> Config:
    return parse(Config, PRESETS, argv, resolve)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("snclr", config)
    if config.follow == "official" and not config.arch.startswith("vit_small"):
        run.warn(f"no released code exists for {config.arch}: MoCo-v3's heads for its family")
    if config.neighbour_free_epochs >= config.epochs:
        run.warn("--neighbour-free-epochs covers the whole run: Eq. 1 only, no neighbours")
    model = run.place(SNCLR(config))
    target = momentum_copy(encoder=model.encoder, projector=model.projector)
    encode, encode_target = Pieces(model.encoder, config), Pieces(target.encoder, config)
    queue = SupportSet(
        config.queue_size, config.output_dim, config.seed, shared=config.queue_scope == "global"
    ).to(run.device, run.dtype)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    optimizer = build_optimizer(
        config.optimizer, model.parameters(), lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    neighbour_free_steps = config.neighbour_free_epochs * run.steps_per_epoch
    run.begin(model.encoder, model=model, target=target, optimizer=optimizer, queue=queue)

    for step, (x1, x2), ids in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr, start=config.warmup_start_lr)
        set_lr(optimizer, rate)

        with run.autocast():
            y1, y2 = map(model.projector, encode(x1, x2))  # projections
            z1, z2 = model.predictor(y1), model.predictor(y2)  # predictions
            with torch.no_grad():
                key1, key2 = map(target.projector, encode_target(x1, x2))  # of the momentum branch

        # App. A: Eq. 1 at first, when neighbours are not yet correctly identified
        k = config.neighbours if step >= neighbour_free_steps else 0
        others = ids if config.exclude_self else None
        near1, found1 = neighbours_of(queue, key1, k, others)
        near2, found2 = neighbours_of(queue, key2, k, others)

        loss = sum(  # both directions, without a half (code)
            snclr_loss(
                z,
                y,
                key,
                near,
                config.temperature,
                config.loss,
                config.positiveness_scale,
                config.detach_positiveness,
            )
            for z, y, key, near in ((z1, y1, key2, near2), (z2, y2, key1, near1))
        )

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        # Sec. 3.2 moves the branch after the step, the code before the next: with that step's value
        momentum_of_next_step = config.momentum
        if config.momentum_schedule == "cosine":
            momentum_of_next_step = momentum_to_one(step + 1, run.total_steps, config.momentum)
        retrieved = queue.ids[torch.cat([found1, found2], dim=1)] if k else None
        of_neighbours = run.ids, queue.ids[found2] if k else None, run.labels
        run.log(
            loss=loss,
            lr=rate,
            z=y1,
            retrieved=retrieved,
            momentum=momentum_of_next_step,
            **(weights_read(positiveness(y1.detach(), near2), *of_neighbours) if k else {}),
        )
        queue.enqueue(key2, ids)  # view 2 of the momentum branch only, after both look-ups (code)

        update_momentum(target, model, momentum_of_next_step)

    run.finish(
        config.output_dim,
        queue,
        select=target,
        weigh=lambda x, near: positiveness(model(x), near),
        k=config.neighbours or 8,
        marks={"neighbours set in (the loss has other columns)": config.neighbour_free_epochs},
    )


def look_up(config: Config, state: dict) -> tuple[nn.Module, Callable[[Tensor, Tensor], Tensor]]:
    """Returns, from a checkpoint's state, what maps images to the embedding that is looked up, and
    what gives the positiveness of images and their neighbours.
    """
    model = SNCLR(config)
    target = momentum_copy(encoder=model.encoder, projector=model.projector)
    model.load_state_dict(state["model"])
    target.load_state_dict(state["target"])
    model.eval()
    return target, lambda x, near: positiveness(model(x), near)


def neighbours_of(
    queue: SupportSet, keys: Tensor, k: int, others: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Finds the k entries of the candidate set nearest to each key (Eq. 3); none for k = 0."""
    if k == 0:
        return keys.new_zeros(len(keys), 0, keys.shape[1]), keys.new_zeros(len(keys), 0)
    return queue.nearest(keys, k, exclude_ids=others)


if __name__ == "__main__":
    sys.exit(command(main))
