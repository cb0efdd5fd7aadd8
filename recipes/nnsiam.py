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

import common.run.early  # noqa: F401  # isort: skip
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.augment import View, ViewName, two_views
from common.config import CIFAR10, PHOTOS, Count, NotNegative, PositiveInt, RunConfig, Share, later
from common.distributed import average_gradients
from common.errors import command
from common.fast.micro_batch import Pieces
from common.models import build_encoder, in_full_precision, mlp
from common.optim import build_optimizer, scaled_lr, set_lr, warmup_cosine
from common.run.flags import parse
from common.run.run import Run
from common.support_set import SupportSet


@dataclass(frozen=True)
class Config(RunConfig):
    """NNSiam: SimSiam with nearest neighbours as positives (Dwibedi et al. 2021, suppl. C).

    Each flag says where its value comes from: "suppl. C", SimSiam's paper or code, "GSG" (the paper
    of guided stop-gradient, Lee and Lee 2023), or "unstated" with what we took instead.
    """

    # unstated; the 71.3 % that suppl. Table 1 compares with is SimSiam's at 800
    epochs: PositiveInt = 800
    batch_size: PositiveInt = 4096  # global batch; suppl. C
    lr: NotNegative = 0.2  # base rate, times batch/lr-batch; suppl. C
    lr_batch: Count = 256  # the batch of --lr, 0: not scaled; unstated, as SimSiam Sec. 3
    optimizer: Literal["lars", "sgd", "adamw"] = "lars"  # suppl. C
    sgd_momentum: Share = 0.9  # momentum of LARS or SGD; unstated, as SimSiam Sec. 3
    weight_decay: NotNegative = 1e-6  # unstated; NNCLR's LARS setting, biases and norms left out
    warmup_epochs: NotNegative = 10  # linear from 0; unstated; SimSiam Sec. 4 for batches from 1024
    fixed_predictor_lr: bool = True  # unstated; SimSiam Sec. 4.2 and its --fix-pred-lr
    queue_size: PositiveInt = 98304  # unstated; NNCLR's
    zero_init_residual: bool = True  # start the last batch norm of each block at 0; SimSiam App. A
    projector_layers: PositiveInt = 3  # "SimSiam" (suppl. C): 2048-2048-2048, SimSiam Sec. 3
    projector_hidden: PositiveInt = 2048  # SimSiam Sec. 3
    output_dim: PositiveInt = 2048  # suppl. C
    output_affine: bool = False  # affine batch norm at the projector's output; SimSiam's code: no
    predictor_hidden: PositiveInt = 512  # SimSiam Sec. 3
    views: ViewName = "simsiam"  # unstated; SimSiam's code; cifar: GSG App. B.2
    jitter_strength: NotNegative = later(1.0)  # scales --views' colour jitter; s of SimCLR's App. A
    crop_min: Share = 0.2  # smallest area of a crop, as a share of the image's; SimSiam's code
    crop_interpolation: Literal["bicubic", "bilinear"] = "bilinear"  # SimSiam's code


# unstated: no paper has NNSiam on CIFAR-10. GSG's App. B.2, C.2 and lightly's; the queue is ours
SMALL_IMAGES = {
    "lr_batch": 512,
    "optimizer": "sgd",
    "warmup_epochs": 0,
    "fixed_predictor_lr": False,
    "queue_size": 16384,
    "zero_init_residual": False,  # unstated; lightly
    "projector_layers": 2,  # GSG App. C.2
    "output_affine": True,  # unstated; lightly's default, which GSG App. C.2 follows
    "crop_min": 0.08,
}
PRESETS = {
    "cifar10": CIFAR10 | SMALL_IMAGES,
    "photos": PHOTOS | SMALL_IMAGES | {"lr_batch": 64, "queue_size": 2048},
}


class NNSiam(nn.Module):
    """SimSiam's networks (its Sec. 3): batch norm after every FC of the projector, also the last,
    ReLU after all but the last; the predictor's last FC is plain.
    """

    def __init__(self, config: Config):
        super().__init__()
        width, hidden = config.output_dim, config.projector_hidden
        self.encoder = build_encoder(config.arch, config.image_size, config.zero_init_residual)
        sizes = [self.encoder.embed_dim, *[hidden] * (config.projector_layers - 1), width]
        self.projector = mlp(sizes, output_norm=True, output_affine=config.output_affine)
        self.predictor = mlp([width, config.predictor_hidden, width], output_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        """Returns projections, (N,3,H,W) -> (N,D)."""
        return self.projector(self.encoder(x))


@in_full_precision
def nnsiam_loss(p1: Tensor, p2: Tensor, nn1: Tensor, nn2: Tensor) -> Tensor:
    """Computes D(p1, nn2)/2 + D(p2, nn1)/2, D the negative cosine; all (N,D) -> scalar.

    p are predictions, nn1 and nn2 the neighbours of z1 and z2, which get no gradient. The
    supplement writes no formula: this is SimSiam's symmetric loss with z replaced by its neighbour.
    """
    return negative_cosine(p1, nn2) / 2 + negative_cosine(p2, nn1) / 2


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """Computes D of SimSiam Eq. 1 with stop-gradient on z, the mean over the batch."""
    return -F.cosine_similarity(p, z.detach(), dim=1).mean()


def views_of(config: Config) -> list[View]:
    size, crop_min, mode = config.image_size, config.crop_min, config.crop_interpolation
    return [*two_views(config.views, size, crop_min, mode, config.jitter_strength)]


def look_up(config: Config, state: dict) -> tuple[nn.Module, None]:
    """Returns, from a checkpoint's state, what maps images to the embedding that is looked up, and
    None, since neighbours have no weight.
    """
    model = NNSiam(config)
    model.load_state_dict(state["model"])
    return model, None


def parse_arguments(argv: list[str] | None = None) -> Config:
    return parse(Config, PRESETS, argv)


def main(argv: list[str] | None = None) -> None:
    config = parse_arguments(argv)
    run = Run("nnsiam", config)
    model = run.place(NNSiam(config))
    encode = Pieces(model.encoder, config)
    queue = SupportSet(config.queue_size, config.output_dim, config.seed)
    queue = queue.to(run.device, run.dtype)

    lr = scaled_lr(config.lr, config.batch_size, config.lr_batch)
    predictor = {"params": model.predictor.parameters()}
    if config.fixed_predictor_lr:
        predictor["fixed_lr"] = lr
    groups = [{"params": [*model.encoder.parameters(), *model.projector.parameters()]}, predictor]
    optimizer = build_optimizer(
        config.optimizer, groups, lr, config.sgd_momentum, config.weight_decay
    )
    warmup_steps = config.warmup_epochs * run.steps_per_epoch
    run.begin(model.encoder, model=model, optimizer=optimizer, queue=queue)

    for step, (x1, x2), ids in run.batches(views_of(config)):
        rate = warmup_cosine(step, run.total_steps, warmup_steps, lr)
        set_lr(optimizer, rate)

        with run.autocast():
            z1, z2 = map(model.projector, encode(x1, x2))  # projections, n-by-d
            p1, p2 = model.predictor(z1), model.predictor(z2)  # predictions, n-by-d

        # the implicit stop-gradient
        (nn1, found1), (nn2, found2) = queue.nearest(z1), queue.nearest(z2)
        loss = nnsiam_loss(p1, p2, nn1[:, 0], nn2[:, 0])

        optimizer.zero_grad()
        loss.backward()
        encode.replay()
        average_gradients(model)
        optimizer.step()

        retrieved = queue.ids[torch.cat([found1, found2], dim=1)]
        run.log(loss=loss, lr=rate, z=z1, retrieved=retrieved)
        queue.enqueue(z1, ids)  # which view is unstated; view 1, as NNCLR's Algorithm 1

    run.finish(config.output_dim, queue, select=model)


if __name__ == "__main__":
    sys.exit(command(main))
