"""The random encoder as a fair yardstick: its weights as drawn, its batch norms with statistics.

A fresh batch norm holds mean 0 and variance 1, which no image ever gave it, while those of any
trained encoder hold what they saw, even at rate 0. In eval mode the fresh ones lose some 20 points
of k-NN on `photos` to the same weights after one pass over images: part of what a run seems to gain
over them is not learning. So whatever is called "random encoder" is calibrated here.
"""

import copy
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from common import distributed
from common.augment import View
from common.data.images import Images
from common.data.loaders import RankBatches, view_loader
from common.errors import UserError
from common.fast.batch_norm import rank_batch_norm
from common.fast.pixels import to_input

IMAGES = 10_000  # at most: means and variances over so many views stand still
BATCH = 256  # images of all ranks


def calibrated(
    encoder: nn.Module,
    images: Images,
    views: Sequence[View],
    seed: int,
    workers: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
    skip_bad_images: bool = False,
) -> nn.Module:
    """Returns a copy of `encoder` in eval mode whose batch norms hold the mean statistics of one
    pass over the first two training views of at most IMAGES images, in the order and with the draws
    of the first epoch under `seed`. Without running statistics, as in a ViT, it is a plain copy.

    Nothing else moves: neither the encoder nor PyTorch's random numbers. Raises UserError for an
    image that cannot be read.
    """
    weight = next(encoder.parameters())
    encoder = rank_batch_norm(copy.deepcopy(encoder), weight.device)
    norms = [m for m in encoder.modules() if getattr(m, "running_mean", None) is not None]
    if not norms:
        return encoder.eval()
    for norm in norms:
        norm.reset_running_stats()
    ranks = distributed.world_size()
    batch = max(1, min(BATCH, len(images)) // ranks) * ranks
    steps = min(len(images), IMAGES) // batch
    order = RankBatches(len(images), batch, seed, 0, steps, distributed.rank(), ranks)
    encoder.train()
    seen = 0
    with torch.random.fork_rng(devices=[]), torch.no_grad():  # a loader draws a number
        for pixels, _, problems, must_stop in view_loader(
            images, views[:2], order, workers, skip_bad_images
        ):
            if must_stop:
                raise UserError(problems[-1], this_rank=True)
            for view in pixels:
                seen += 1
                for norm in norms:  # the plain mean; None would make the host wait for a GPU
                    norm.momentum = 1 / seen
                with autocast():
                    encoder(to_input(view, weight.device, weight.dtype))
    return encoder.eval()
