"""Guided stop-gradient (Lee and Lee, NeurIPS 2023, Algorithm 1): what its two recipes share.

A batch x1 is paired with its shuffle x2. Of the four distances between the projections of a pair's
views, the least one says which view of each image is the source: its prediction is pulled towards
the projection, without gradient, of the *other* view of the same image. So only the distances need
the other image of a pair, and with it other ranks.
"""

from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import gather, rank, world_size
from common.models import in_full_precision

Pairing = Literal["global", "local", "derangement"]
CHOICES = ("11_21", "11_22", "12_21", "12_22")  # columns of the distances, in Algorithm 1's order
PAIRING_KEY = 0x475347  # parts these draws from others of the same seed


def draw_pairs(pairing: Pairing, batch: int, ranks: int, seed: int, step: int) -> Tensor:
    """(batch,) int64: image i of the global batch is x1 beside image `pairs[i]` as x2.

    Drawn from (seed, step) alone, so equal on every rank. "global": a uniform permutation of the
    global batch, the same for any number of ranks, about one image of which meets itself (as
    Algorithm 1's `shuffle` allows). "derangement": uniform among those where none does. "local": a
    permutation within the run of images that each rank holds (as the released code). Raises
    ValueError for a derangement of one image or a batch that does not divide.
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


@in_full_precision
def guiding_distances(
    z11: Tensor, z12: Tensor, z21: Tensor, z22: Tensor, pairs: Tensor | None = None
) -> Tensor:
    """(N,4): Euclidean distances d11,21 d11,22 d12,21 d12,22 of this rank's images x1 to the x2
    that they are paired with, without gradient.

    z (N,D), unnormalised projections of this rank's images; `pairs` as in `gsg_loss`.
    """
    z11, z12 = z11.detach(), z12.detach()
    z21, z22 = rows_of_partners(z21, pairs), rows_of_partners(z22, pairs)
    ends = ((z11, z21), (z11, z22), (z12, z21), (z12, z22))
    return torch.stack([torch.linalg.vector_norm(a - b, dim=1) for a, b in ends], dim=1)


@in_full_precision
def gsg_loss(
    p11: Tensor,
    p12: Tensor,
    p21: Tensor,
    p22: Tensor,
    z11: Tensor,
    z12: Tensor,
    z21: Tensor,
    z22: Tensor,
    pairs: Tensor | None = None,
    distances: Tensor | None = None,
) -> Tensor:
    """Algorithm 1: 0.5 * (D(source of x1, target of x1) + D(source of x2, target of x2)), the mean
    over pairs; D the negative cosine. Predictions p and targets z, (N,D) each -> scalar.

    Row i is image x1, paired with row `pairs[i]` of the x2 tensors; None: row i with row i. Under
    a process group `pairs` is the permutation of the global batch (world*N,), rows in rank order,
    equal on all ranks. Each rank adds the x1 term and the x2 term of its own images, which may
    belong to two pairs; the mean over ranks is the mean over pairs. Gradient flows through the
    predictions that were chosen, never through z. Ties go to the first of Algorithm 1's branches.
    `distances` are `guiding_distances` of the same tensors, where they are already known.
    """
    if distances is None:
        distances = guiding_distances(z11, z12, z21, z22, pairs)
    choice = distances.argmin(dim=1)  # of the pairs with this rank's x1; the first least one
    choice_of_x2 = rows_of_owners(choice, pairs)  # of the pairs with this rank's x2
    x11_is_source = choice < 2  # d11,21 or d11,22 is the least
    x21_is_source = choice_of_x2 % 2 == 0  # d11,21 or d12,21 is the least
    of_x1 = torch.where(x11_is_source, negative_cosine(p11, z12), negative_cosine(p12, z11))
    of_x2 = torch.where(x21_is_source, negative_cosine(p21, z22), negative_cosine(p22, z21))
    return (0.5 * (of_x1 + of_x2)).mean()


@in_full_precision
def symmetric_loss(p1: Tensor, p2: Tensor, z1: Tensor, z2: Tensor) -> Tensor:
    """The baselines' loss without GSG: D(p1, z2)/2 + D(p2, z1)/2, the mean over images.

    SimSiam Eq. 2; for BYOL with z of the momentum encoder (its Eq. 2 is 2 - 2 cos of the same).
    All (N,D) -> scalar; no gradient flows through z.
    """
    return 0.5 * (negative_cosine(p1, z2) + negative_cosine(p2, z1)).mean()


def negative_cosine(p: Tensor, z: Tensor) -> Tensor:
    """D of SimSiam Eq. 1 with stop-gradient on z, row by row: (N,D),(N,D) -> (N,)."""
    return -F.cosine_similarity(p, z.detach(), dim=1)


def choice_statistics(distances: Tensor) -> dict[str, Tensor]:
    """For the metrics, of distances (N,4): `choice_11_21` … the share of pairs that took each
    branch, `distance_11_21` … the mean of each distance.
    """
    choice, means = distances.argmin(dim=1), distances.mean(dim=0)
    shares = [(choice == i).double().mean() for i in range(len(CHOICES))]
    statistics = {f"choice_{name}": s for name, s in zip(CHOICES, shares, strict=True)}
    return statistics | {f"distance_{name}": m for name, m in zip(CHOICES, means, strict=True)}


def rows_of_partners(x2: Tensor, pairs: Tensor | None) -> Tensor:
    """Rows of the x2 images that this rank's x1 images are paired with, from any rank."""
    if pairs is None:
        return x2.detach()
    return gather(x2)[own_part(pairs, len(x2))]


def rows_of_owners(x1: Tensor, pairs: Tensor | None) -> Tensor:
    """Rows of the x1 images that this rank's x2 images are paired with: the inverse."""
    if pairs is None:
        return x1
    return gather(x1)[own_part(pairs.argsort(), len(x1))]


def own_part(pairs: Tensor, local: int) -> Tensor:
    """This rank's rows of the global `pairs`; ValueError where its length is not the batch's, or,
    on CPU, where it is no permutation (asking would make the host wait for a GPU).
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
