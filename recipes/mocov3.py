"""MoCo-v3: An Empirical Study of Training Self-Supervised Vision Transformers, Chen, Xie and He,
ICCV 2021.

A query, the prediction of one view, must find the key of the other view, a projection by a momentum
encoder, among the keys of the whole batch; in both directions, without a queue. For ViTs the patch
embedding keeps its random weights, which the paper found to make training stable.

    python recipes/mocov3.py --arch vit_small_mocov3 --data /path/to/imagenet     # 300 epochs
    python recipes/mocov3.py --data /path/to/imagenet                 # ResNet-50, 1000 epochs

Aims at linear top-1 on ImageNet of 73.2 % (ViT-S/16, 300 epochs), 76.7 % (ViT-B/16, 300) and 74.6 %
(ResNet-50, 1000; 72.8 at 300, 68.9 at 100), all at batch 4096: those of its released code, which
the recipe follows; the paper's are 72.5 and 76.5. See recipes/mocov3.md.
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
from common.distributed import average_gradients, gather, rank
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
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
from common.run.run import Run


@dataclass(frozen=True)
class Config(RunConfig):
    """MoCo-v3: momentum contrast for ResNets and ViTs (Chen, Xie and He 2021).

    Each flag says where its value comes from: "Sec." and "App." are the paper's, "code" the
    authors' released code and its CONFIG.md, "GSG" the paper of guided stop-gradient (Lee and Lee
    2023). A ResNet's rate, decay and momentum are by default those of the number of epochs.
    """

    epochs: PositiveInt = 1000  # code: 100, 300 or 1000, Sec. 3: 800 (ResNet-50); ViTs 300
    batch_size: PositiveInt = 4096  # global batch; Sec. 5, App. A; code
    # base rate, times batch/lr-batch; code: 0.6 (100 epochs), 0.3 (300, 1000), App. A: 0.3; ViTs
    # 1.5e-4
    lr: NotNegative | None = None
    lr_batch: Count = 256  # the batch that --lr is given for, 0: not scaled; Sec. 4.1; code
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # App. A; code; ViTs AdamW, Sec. 5
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; code
    # LARS leaves out biases and norms, AdamW nothing (code); code: 1e-6, 1.5e-6 (1000 epochs),
    # App. A: 1.5e-6; ViTs 0.1
    weight_decay: NotNegative | None = None
    warmup_epochs: NotNegative = 10  # linear from 0; code; ViTs 40, Sec. 5
    # momentum of the momentum encoder at the start; code: 0.99, 0.996 (1000 epochs), App. A: 0.996;
    # ViTs 0.99, Sec. 6.2
    momentum: Share | None = None
    # cosine: the momentum rises to 1; App. A; code: --moco-m-cos
    momentum_schedule: Literal["cosine", "fixed"] = "cosine"
    temperature: Positive = 1.0  # T; App. A; code (its default); ViTs 0.2, Sec. 5
    predictor: bool = True  # without it the query is the projection itself; Sec. 6.2
    freeze_patch_embedding: bool = False  # ViTs only: yes, Sec. 4.2; code: --stop-grad-conv1
    zero_init_residual: bool = True  # start the last batch norm of each block at 0; code
    projector_hidden: PositiveInt = 4096  # Sec. 5; code: --moco-mlp-dim
    predictor_hidden: PositiveInt = 4096  # Sec. 5; code: --moco-mlp-dim
    output_dim: PositiveInt = 256  # Sec. 5; code: --moco-dim
    views: ViewName = "byol"  # App. A; code: BYOL's; cifar: GSG App. B.2
    jitter_strength: NotNegative = 1.0  # scales --views' colour jitter; code: 1
    # smallest area of a crop, as a share of the image's; code (ResNet-50); ViTs 0.08
    crop_min: Share = 0.2
    crop_interpolation: Literal["bicubic", "bilinear"] = "bilinear"  # code: the default


# CONFIG.md, ResNet-50. Other lengths: as the next longer one, which App. A's of 800 epochs are
LENGTHS = {
    100: {"lr": 0.6, "weight_decay": 1e-6, "momentum": 0.99},
    300: {"lr": 0.3, "weight_decay": 1e-6, "momentum": 0.99},
    1000: {"lr": 0.3, "weight_decay": 1.5e-6, "momentum": 0.996},
}
# unstated: no paper has MoCo-v3 on CIFAR-10. Views, budget: GSG's App. B.2, C.2; the rest is ours
SMALL_IMAGES = {
    "lr_batch": 512,
    "optimizer": "sgd",
    "warmup_epochs": 0,
    "momentum": 0.99,
    "temperature": 0.2,
    "freeze_patch_embedding": False,
    "projector_hidden": 2048,
    "predictor_hidden": 2048,
    "crop_min": 0.08,
}
PRESETS = {
    "vit": {  # CONFIG.md
        "epochs": 300,
        "lr": 1.5e-4,
        "optimizer": "adamw",
        "weight_decay": 0.1,
        "warmup_epochs": 40,
        "momentum": 0.99,
        "temperature": 0.2,
        "freeze_patch_embedding": True,
        "crop_min": 0.08,
    },
    "cifar10": CIFAR10 | SMALL_IMAGES,
    "photos": PHOTOS | SMALL_IMAGES | {"lr_batch": 64},
}


class MoCo(nn.Module):
    """Encoder and the code's heads (builder.py), without biases: a projector of 2 layers, ViT's of
    3, with a batch norm without affine at its output; a predictor of 2, ViT's with that norm too.
    """

    def __init__(self, config: Config):
        super().__init__()
        hidden, width, out = config.projector_hidden, config.predictor_hidden, config.output_dim
        vit = config.arch.startswith("vit")
        self.encoder = build_encoder(config.arch, config.image_size, config.zero_init_residual)
        if config.freeze_patch_embedding:
            freeze_patch_embedding(self.encoder)
        sizes = [self.encoder.embed_dim, *([hidden] * (2 if vit else 1)), out]
        self.projector = mlp(sizes, output_norm=True, output_affine=False)
        self.predictor = nn.Identity()
        if config.predictor:
            self.predictor = mlp([out, width, out], output_norm=vit, output_affine=False)


@in_full_precision
def mocov3_loss(q: Tensor, k: Tensor, temperature: float) -> Tensor:
    """Computes ctr(q, k) of Algorithm 1, one way: 2 T times the cross-entropy of row and column i.

    Queries q (N,D), keys k (N,D), any scale -> scalar, the mean over rows. Rows are this rank's
    queries, columns the keys of all ranks, gathered without gradient: none flows through k.
    """
    q, k = F.normalize(q, dim=1), F.normalize(k, dim=1)
    logits = q @ gather(k).T / temperature
    labels = rank() * len(q) + torch.arange(len(q), device=q.device)
    return 2 * temperature * F.cross_entropy(logits, labels)


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    return [*two_views(config.views, size, crop_min, mode, config.jitter_strength)]


def resolve(config: Config) -> Config:
    """Fills in the rate, decay and momentum of the length, if no flag or preset gives them. Raises
    UserError if a patch embedding is to be frozen and there is none.
    """
    length = next((n for n in LENGTHS if config.epochs <= n), max(LENGTHS))
    changes = {n: v for n, v in LENGTHS[length].items() if getattr(config, n) is None}
    if config.freeze_patch_embedding and not config.arch.startswith("vit"):
        raise UserError(f"--freeze-patch-embedding: {config.arch} has none, leave it out")
    return dataclasses.replace(config, **changes)


def parse_arguments(argv: list[str] | None = None) -> Config:
    return parse(Config, PRESETS, argv, resolve)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("mocov3", config)
    if config.arch in ("vit_small", "vit_base"):
        run.warn(f"MoCo-v3's own is --arch {config.arch}_mocov3, with fixed sin-cos positions")
    model = run.place(MoCo(config))
    target = momentum_copy(encoder=model.encoder, projector=model.projector)
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
        m = config.momentum
        if config.momentum_schedule == "cosine":
            m = momentum_to_one(step, run.total_steps, config.momentum)

        with run.autocast():
            y1, y2 = map(model.projector, encode(x1, x2))
            q1, q2 = model.predictor(y1), model.predictor(y2)  # queries
            update_momentum(target, model, m)  # before the keys, with the step's own m (code)
            with torch.no_grad():
                k1, k2 = map(target.projector, encode_target(x1, x2))  # keys

        t = config.temperature
        loss = mocov3_loss(q1, k2, t) + mocov3_loss(q2, k1, t)

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        run.log(loss=loss, lr=rate, z=y1, momentum=m)

    run.finish(config.output_dim)


if __name__ == "__main__":
    sys.exit(command(main))
