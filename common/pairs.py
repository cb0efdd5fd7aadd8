"""Pairs of images within the global batch, and their rows from whichever rank holds them."""

from typing import Literal

import numpy as np
import torch
from torch import Tensor

from common.distributed import gather, rank, world_size

Pairing = Literal["global", "local", "derangement"]
PAIRING_KEY = 0x475347  # keeps these draws apart from others of the same seed


def draw_pairs(pairing: Pairing, batch: int, ranks: int, seed: int, step: int) -> Tensor:
    """Draws (batch,) int64: image i of the global batch is x1 beside image `pairs[i]` as x2.

    It draws from (seed, step) alone, so equally on every rank. "global" is a uniform permutation of
    the global batch, the same for any number of ranks; about one image meets itself (as the
    `shuffle` of GSG's Algorithm 1 allows). "derangement" is uniform among those in which none does.
    "local" is a permutation within the run of images that each rank holds (as the released code).
    Raises ValueError for a derangement of one image or a batch that does not divide.
    """
    rng = np.random.Generator(np.random.Philox(key=[seed, PAIRING_KEY], counter=[0, 0, 0, step]))
    if pairing == "local":
        if batch % ranks:
            raise ValueError(f"a batch of {batch} does not divide over {ranks} ranks")
        local = batch // ranks
        blocks = [start + rng.permutation(local) for start in range(0, batch, local)]
        return torch.from_numpy(np.concatenate(blocks))
    if pairing == "derangement" and batch < 2:
        raise ValueError("one image cannot be paired with another: a derangement needs two")
    if pairing not in ("global", "derangement"):
        raise ValueError(f"unknown pairing {pairing}: global, local or derangement")
    images = np.arange(batch)
    pairs = rng.permutation(batch)
    while pairing == "derangement" and (pairs == images).any():  # 1 in e permutations has none
        pairs = rng.permutation(batch)
    return torch.from_numpy(pairs)


def rows_of_partners(x2: Tensor, pairs: Tensor | None) -> Tensor:
    """Returns the rows of the x2 images that this rank's x1 images are paired with, from any rank
    and without gradient. `pairs` are those of `draw_pairs`; None pairs row i with row i.
    """
    if pairs is None:
        return x2.detach()
    return gather(x2)[own_part(pairs, len(x2))]


def rows_of_owners(x1: Tensor, pairs: Tensor | None) -> Tensor:
    """Returns the rows of the x1 images that this rank's x2 images are paired with: the inverse."""
    if pairs is None:
        return x1
    return gather(x1)[own_part(pairs.argsort(), len(x1))]


def own_part(pairs: Tensor, local: int) -> Tensor:
    """Returns this rank's rows of the global `pairs`. Raises ValueError if its length is not the
    batch's or, on CPU, if it is no permutation (asking would make the host wait for a GPU).
    """
    if pairs.shape != (world_size() * local,):
        raise ValueError(
            f"pairs {(*pairs.shape,)} for {world_size()} x {local} images: one number for each"
        )
    if pairs.device.type == "cpu" and not torch.equal(
        pairs.sort().values, torch.arange(len(pairs))
    ):
        raise ValueError("pairs is no permutation of the batch")
    return pairs[rank() * local : (rank() + 1) * local]
