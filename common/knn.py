"""Weighted k-nearest-neighbour accuracy of frozen features (Wu et al. 2018), as a monitor."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.data.images import CenterView, Images
from common.data.loaders import center_batches
from common.errors import UserError
from common.fast.center import center_view
from common.fast.pixels import to_input
from common.models import full_precision

QUERY_BLOCK = 1024


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """Returns the fraction of test rows whose label wins the vote of their k nearest training rows.

    train_x is (M,D), train_y (M,), test_x (N,D), test_y (N,); features have any scale, labels count
    from 0. Each neighbour votes with exp(cos / temperature); k is cut to M. Of equal sums the
    smaller label wins. k and temperature are from lightly's CIFAR benchmark, which GSG App. C.2
    follows.
    """
    if len(train_x) == 0 or len(test_x) == 0:
        raise ValueError("k-NN needs at least one training and one test row")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k-NN needs k >= 1 and temperature > 0, got {k}, {temperature}")
    if min(train_y.min(), test_y.min()) < 0:
        raise ValueError("k-NN needs labels from 0")
    similarity, labels = nearest_labels(train_x, train_y, test_x, k)
    classes = int(max(train_y.max(), test_y.max())) + 1
    return vote(similarity, labels, test_y, classes, temperature)


def nearest_labels(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Returns cosines (N,k) and labels (N,k) of the nearest training rows, best first."""
    train_x, test_x = full_precision(train_x, test_x)
    kind = torch.promote_types(train_x.dtype, test_x.dtype)
    train_x, test_x = train_x.to(kind), test_x.to(kind)
    train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    train_y = train_y.to(train_x.device, torch.long)
    similarity, labels = [], []
    for block in test_x.split(QUERY_BLOCK):
        best = (block @ train_x.T).topk(min(k, len(train_x)), dim=1)
        similarity.append(best.values)
        labels.append(train_y[best.indices])
    return torch.cat(similarity), torch.cat(labels)


def vote(
    similarity: Tensor, labels: Tensor, truth: Tensor, classes: int, temperature: float
) -> float:
    """Returns the accuracy of the weighted vote; cosines and labels are (N,k), truth is (N,)."""
    votes = similarity.new_zeros(len(similarity), classes)
    similarity = similarity - similarity.max(dim=1, keepdim=True).values  # exp cannot overflow
    votes.scatter_add_(1, labels, (similarity / temperature).exp())
    return (votes.argmax(dim=1) == truth.to(votes.device)).double().mean().item()


@torch.no_grad()
def extract_features(
    encoder: nn.Module,
    images: Images,
    samples: np.ndarray,
    image_size: int,
    workers: int = 0,
    autocast=None,
    view: CenterView = center_view,
    after_batch: Callable[[int], None] | None = None,
) -> Tensor:
    """Returns features (len(samples), embed_dim) of the evaluation views, with the encoder in eval
    mode. Calls `after_batch` with the number of images after each batch. Raises UserError, on all
    ranks, if features are not finite.
    """
    weight = next(encoder.parameters())
    training = encoder.training
    encoder.eval()
    features = []
    for views in center_batches(images, samples, image_size, 256, workers, view):
        inputs = to_input(views, weight.device, weight.dtype)
        if autocast is None:
            features += full_precision(encoder(inputs))
        else:
            with autocast():
                out = encoder(inputs)
            features += full_precision(out)
        if after_batch is not None:
            after_batch(len(views))
    encoder.train(training)
    if not features:
        return torch.empty(0, getattr(encoder, "embed_dim", 0), device=weight.device)
    found = torch.cat(features)
    if distributed.any_rank([bool((~found.isfinite()).any())])[0]:
        raise UserError(
            "features are not finite: the encoder has diverged, and nothing is measured on it"
        )
    return found


def knn_of_encoder(
    encoder: nn.Module,
    train: Images,
    test: Images,
    image_size: int,
    workers: int = 0,
    autocast=None,
    k: int = 200,
    temperature: float = 0.1,
    after_batch: Callable[[int], None] | None = None,
) -> float:
    """Returns an encoder's k-NN accuracy over the whole training and test set, spread over ranks.

    Each rank holds the features of its share of the training set only: it finds the nearest of its
    own for every test image, and the ranks' candidates are merged.
    """
    how = image_size, workers, autocast
    seen = {"after_batch": after_batch}
    share = rank_share(len(train))
    train_x = extract_features(encoder, train, share, *how, **seen)
    train_y = torch.from_numpy(train.labels[share])
    test_x = extract_features(encoder, test, rank_share(len(test), padded=True), *how, **seen)
    test_x = gather_shares(test_x, len(test))
    truth = torch.from_numpy(test.labels)
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    (accuracy,) = knn_over_ranks(
        train_x, train_y, test_x, truth, len(train), classes, [k], temperature
    )
    return accuracy


def rank_share(images: int, padded: bool = False) -> np.ndarray:
    """Returns the samples of this rank: every world-size-th. `padded` gives all ranks equally many,
    as gathers need: the last sample repeats.
    """
    ranks = distributed.world_size()
    end = -(-images // ranks) * ranks if padded else images
    return np.minimum(np.arange(distributed.rank(), end, ranks), images - 1)


def gather_shares(rows: Tensor, images: int) -> Tensor:
    """Gathers the rows of every rank's padded share to (images,…) in the order of samples."""
    gathered = distributed.gather(rows)
    ranks = distributed.world_size()
    order = torch.arange(len(gathered)).view(-1, ranks).T.reshape(-1)  # sample of each row
    return gathered[order.argsort().to(gathered.device)][:images]


def knn_over_ranks(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    truth: Tensor,
    train_images: int,
    classes: int,
    ks: Sequence[int],
    temperature: float,
) -> list[float]:
    """Returns the k-NN accuracy for each k. train_x (M,D) and train_y (M,) are this rank's share of
    `train_images`; test_x (N,D) and truth (N,) are the same on all ranks.
    """
    similarity, labels = nearest_labels(train_x, train_y, test_x, max(ks))
    if distributed.world_size() > 1:
        k = min(max(ks), train_images)
        missing = (0, k - similarity.shape[1])  # a share of fewer than k images: no weight
        similarity, labels = F.pad(similarity, missing, value=-torch.inf), F.pad(labels, missing)
        similarity = distributed.gather(similarity.T).T
        labels = distributed.gather(labels.T).T
        best = similarity.topk(k, dim=1)
        similarity, labels = best.values, labels.gather(1, best.indices)
    return [vote(similarity[:, :k], labels[:, :k], truth, classes, temperature) for k in ks]
