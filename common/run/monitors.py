"""What is watched while a run trains: collapse, and what the look-ups retrieve."""

import torch
import torch.nn.functional as F
from torch import Tensor

from common.distributed import all_reduce_sum
from common.models import in_full_precision

RANK_ROWS = 512  # rows of the batch that costly monitors are taken over


@torch.no_grad()
@in_full_precision
def embedding_std(z: Tensor) -> Tensor:
    """Returns the standard deviation, averaged over dimensions, of l2-normalised rows of z (N,D).

    It is about 1/sqrt(D) for rows spread evenly over the sphere, 0 for a collapsed embedding
    (SimSiam Sec. 4.1).
    """
    return F.normalize(z, dim=1).std(dim=0, unbiased=False).mean()


@torch.no_grad()
def effective_rank(z: Tensor, most: int = RANK_ROWS) -> Tensor:
    """Returns exp of the entropy of the normalised singular values (Roy and Vetterli 2007) of the
    l2-normalised rows of z (N,D), over at most `most` of them: 1 if all rows lie on one line.
    """
    rows = F.normalize(z[:most].double(), dim=1)  # a collapsed Gram matrix needs it
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows
    values = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    shares = values / values.sum()
    return torch.special.entr(shares).sum().exp()


@torch.no_grad()
def self_matches(query_ids: Tensor, retrieved_ids: Tensor) -> Tensor:
    """Returns the share of retrieved entries (N,k) that are of the query's own image (N,)."""
    return (retrieved_ids == query_ids[:, None]).double().mean()


@torch.no_grad()
def neighbour_purity(query_ids: Tensor, retrieved_ids: Tensor, labels: Tensor) -> Tensor:
    """Returns the share of retrieved entries (N,k) with the query's label, for reading only.
    Entries of the queue's random start (id -1) count in neither part; without others it is NaN.
    """
    known = retrieved_ids >= 0
    same = labels[retrieved_ids.clamp(min=0)] == labels[query_ids][:, None]
    return (same & known).double().sum() / known.double().sum()


@torch.no_grad()
def same_label_auc(
    weights: Tensor, query_ids: Tensor, retrieved_ids: Tensor, labels: Tensor
) -> Tensor:
    """Returns how often, of two entries retrieved for one query, the one with the query's label has
    the larger weight: over all pairs of a row that differ in this, equal weights counting half.

    Weights and numbers of images are (N,k), those of the queries (N,); at most the first 512 rows
    are read. It is 0.5 for weights that know nothing of labels. Entries of the queue's random start
    (id -1) and of the query's own image are in no pair; without a pair it is NaN.
    """
    rows = (weights, query_ids, retrieved_ids)
    weights, query_ids, retrieved_ids = (of[:RANK_ROWS] for of in rows)  # N k² comparisons
    known = (retrieved_ids >= 0) & (retrieved_ids != query_ids[:, None])
    same = labels[retrieved_ids.clamp(min=0)] == labels[query_ids][:, None]
    pairs = (same & known)[:, :, None] & (~same & known)[:, None, :]
    ahead = weights[:, :, None] - weights[:, None, :]
    return ((ahead.sign() + 1) / 2 * pairs).double().sum() / pairs.double().sum()


@torch.no_grad()
def weights_read(
    weights: Tensor, query_ids: Tensor, retrieved_ids: Tensor, labels: Tensor | None
) -> dict[str, Tensor]:
    """Returns the mean of the positiveness (N,k) of retrieved entries, its spread in one image's
    and, with labels, how often it is larger for an entry of the image's class.
    """
    spread = weights.std(dim=1, correction=0).mean()
    found = {"positiveness_mean": weights.mean(), "positiveness_std": spread}
    if labels is not None:
        found["positiveness_auc"] = same_label_auc(weights, query_ids, retrieved_ids, labels)
    return found


@torch.no_grad()
def shares_found(
    mask: Tensor, others: Tensor, query_ids: Tensor, column_ids: Tensor, labels: Tensor | None
) -> dict[str, Tensor]:
    """Returns what a mask (N,C) finds among the columns that count, `others` (N,C), over all ranks.

    `found_share` is the share of these columns that is masked. With labels, `found_precision` is
    the share of the masked ones that have the query's label (NaN if none is masked), `found_chance`
    that share of all of them. Images are given by their numbers, (N,) and (C,).
    """
    found = mask & others
    counts = [others.sum(), found.sum()]
    if labels is not None:
        same = labels[column_ids.clamp(min=0)] == labels[query_ids][:, None]
        counts += [(found & same).sum(), (others & same).sum()]
    counts = all_reduce_sum(torch.stack(counts).double())
    shares = {"found_share": counts[1] / counts[0]}
    if labels is not None:
        shares |= {"found_precision": counts[2] / counts[1], "found_chance": counts[3] / counts[0]}
    return shares
