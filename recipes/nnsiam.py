"""NNSiam: SimSiam with the nearest neighbour as positive, Dwibedi et al., ICCV 2021, supplement C.

SimSiam asks the prediction of one view to match the projection of the other, without gradient.
NNSiam replaces that projection by its nearest neighbour in a support set, whose hard look-up is
the stop-gradient: no negatives, no momentum encoder.

    python recipes/nnsiam.py --data /path/to/imagenet                # 800 epochs, ResNet-50
    torchrun --nproc_per_node 8 recipes/nnsiam.py --data /path/to/imagenet

Aims at 72.6 % linear top-1 and 90.4 % top-5 on ImageNet (supplement, Table 1; SimSiam 71.3 %).
The supplement states batch, optimizer, base rate and width only; see recipes/nnsiam.md.
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import View, cifar_view, simsiam_view
from common.config import RunConfig, parse
from common.distributed import average_gradients
from common.errors import UserError, command
from common.fast.micro_batch import Pieces
from common.models import build_encoder, full_precision, in_full_precision, mlp
from common.optim import build_optimizer, grad_norm, scaled_lr, set_lr, warmup_cosine
from common.run.run import Run
from common.support_set import SupportSet


@dataclass(frozen=True)
class Config(RunConfig):
    """NNSiam: SimSiam with nearest neighbours as positives (Dwibedi et al. 2021, suppl. C).

    Each flag says where its value comes from: "suppl. C", SimSiam's paper or code, or "unstated"
    with what we took instead.
    """

    epochs: int = 800  # unstated; the 71.3 % that suppl. Table 1 compares with is SimSiam's at 800
    batch_size: int = 4096  # global batch; suppl. C
    lr: float = 0.2  # base rate, times batch/lr-batch; suppl. C
    lr_batch: int = 256  # the batch of --lr, 0: not scaled; unstated, as SimSiam Sec. 3
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # suppl. C
    sgd_momentum: float = 0.9  # momentum of LARS or SGD; unstated, as SimSiam Sec. 3
    weight_decay: float = 1e-6  # unstated; NNCLR's LARS setting, biases and norms left out
    warmup_epochs: float = 10  # linear from 0; unstated; SimSiam Sec. 4 for batches from 1024
    fixed_predictor_lr: bool = True  # unstated; SimSiam Sec. 4.2 and its --fix-pred-lr
    queue_size: int = 98304  # unstated; NNCLR's
    zero_init_residual: bool = True  # last batch norm of each block; SimSiam App. A
    projector_layers: int = 3  # "SimSiam" (suppl. C): 2048-2048-2048, SimSiam Sec. 3
    projector_hidden: int = 2048  # SimSiam Sec. 3
    output_dim: int = 2048  # suppl. C
    output_affine: bool = False  # affine batch norm at the projector's output; SimSiam's code: no
    predictor_hidden: int = 512  # SimSiam Sec. 3
    views: Literal["simsiam", "cifar"] = "simsiam"  # unstated; SimSiam's code; cifar: GSG App. B.2
    crop_min: float = 0.2  # smallest share of the area; SimSiam's code
    crop_interpolation: Literal["bicubic", "bilinear"] = "bilinear"  # SimSiam's code


# unstated: no paper has NNSiam on CIFAR-10. GSG's App. B.2 and C.2 and lightly's; the queue ours
SMALL_IMAGES = {
    "image_size": 32,
    "epochs": 200,
    "batch_size": 512,
    "lr": 0.06,
    "lr_batch": 512,
    "optimizer": "sgd",
    "weight_decay": 5e-4,
    "warmup_epochs": 0,
    "fixed_predictor_lr": False,
    "queue_size": 16384,
    "zero_init_residual": False,  # unstated; lightly
    "projector_layers": 2,  # GSG App. C.2
    "output_affine": True,  # unstated; lightly's default, which GSG App. C.2 follows
    "views": "cifar",
    "crop_min": 0.08,
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


class NNSiam(nn.Module):
    """f = encoder + projector, h = predictor, as SimSiam Sec. 3: batch norm after every FC of the
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


@in_full_precision
def nnsiam_loss(p1: Tensor, p2: Tensor, nn1: Tensor, nn2: Tensor) -> Tensor:
    """D(p1, nn2)/2 + D(p2, nn1)/2, D the negative cosine; all (N,D) -> scalar.

    p are predictions, nn1 and nn2 the neighbours of z1 and z2, which get no gradient. The
    supplement writes no formula: SimSiam's symmetric loss with z replaced by its neighbour.
    """
    return negative_cosine(p1, nn2) / 2 + negative_cosine(p2, nn1) / 2


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D of SimSiam Eq. 1 with stop-gradient on z, mean over the batch."""
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


def views_of(config: Config) -> list[View]:
    view = simsiam_view if config.views == "simsiam" else cifar_view
    return [view(config.image_size, config.crop_min, config.crop_interpolation)] * 2


def check(config: Config) -> Config:
    if config.projector_layers < 1:
        raise UserError("--projector-layers must be 1 or more")
    return config


def main(argv: list[str] | None = None) -> None:
    config = parse(Config, PRESETS, argv, check)
    run = Run("nnsiam", config)
    model = run.place(NNSiam(config))
    encode, projector = Pieces(model.f[0], config), model.f[1]
    Q = SupportSet(config.queue_size, config.output_dim, config.seed)
    Q = Q.to(run.device, run.dtype)
    run.warn_of_long_queue(config.queue_size)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    predictor = {"params": model.h.parameters()}
    if config.fixed_predictor_lr:
        predictor["fixed_lr"] = lr
    groups = [{"params": model.f.parameters()}, predictor]
    optimizer = build_optimizer(
        config.optimizer, groups, lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    labels = run.labels()
    run.begin(model.f[0], model=model, optimizer=optimizer, queue=Q)

    for step, (x1, x2), ids in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr)
        set_lr(optimizer, rate)

        with run.autocast():
            z1, z2 = map(projector, encode(x1, x2))  # projections, n-by-d
            p1, p2 = model.h(z1), model.h(z2)  # predictions, n-by-d
        z1, z2, p1, p2 = full_precision(z1, z2, p1, p2)

        (nn1, found1), (nn2, found2) = Q.nearest(z1), Q.nearest(z2)  # the implicit stop-gradient
        loss = nnsiam_loss(p1, p2, nn1[:, 0], nn2[:, 0])

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        retrieved = Q.ids[torch.cat([found1, found2], dim=1)]
        run.log(
            loss=loss,
            lr=rate,
            grad_norm=grad_norm(model),
            **run.watch(z1, ids, retrieved, labels),
        )
        Q.enqueue(z1, ids)  # which view is unstated; view 1, as NNCLR's Algorithm 1

    run.finish(config.output_dim, Q, select=model.f)


if __name__ == "__main__":
    sys.exit(command(main))
