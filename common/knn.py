"""Weighted k-nearest-neighbour accuracy of frozen features (Wu et al. 2018), as a monitor."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common import distributed
from common.augment import to_input
from common.data import Images, center_batches
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
    """Fraction of test rows whose label wins the vote of their k nearest training rows.

    train_x (M,D), train_y (M,), test_x (N,D), test_y (N,); features of any scale, labels from 0.
    Each neighbour votes with exp(cos / temperature); k is at most M. Sums of equal weight go to
    the smaller label. k and temperature: lightly's CIFAR benchmark, which GSG App. C.2 follows.
    """
    if len(train_x) == 0 or len(test_x) == 0:
        raise ValueError("k-NN needs at least one training and one test row")
    if k < 1 or temperature <= 0:
        raise ValueError(f"k-NN needs k >= 1 and temperature > 0, got {k}, {temperature}")
    similarity, labels = nearest_labels(train_x, train_y, test_x, k)
    classes = int(max(train_y.max(), test_y.max())) + 1
    return vote(similarity, labels, test_y, classes, temperature)


def nearest_labels(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Cosines (N,k) and labels (N,k) of the nearest training rows, best first."""
    train_x, test_x = full_precision(train_x, test_x)
    train_x, test_x = F.normalize(train_x, dim=1), F.normalize(test_x, dim=1)
    train_y = train_y.to(train_x.device)
    similarity, labels = [], []
    for block in test_x.split(QUERY_BLOCK):
        best = (block @ train_x.T).topk(min(k, len(train_x)), dim=1)
        similarity.append(best.values)
        labels.append(train_y[best.indices])
    return torch.cat(similarity), torch.cat(labels)


def vote(
    similarity: Tensor, labels: Tensor, truth: Tensor, classes: int, temperature: float
) -> float:
    """Accuracy of the weighted vote; cosines and labels (N,k), truth (N,)."""
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
    skip_bad_images: bool = False,
) -> Tensor:
    """(len(samples), embed_dim) features of the evaluation views, encoder in eval mode."""
    weight = next(encoder.parameters())
    training = encoder.training
    encoder.eval()
    features = []
    for views in center_batches(images, samples, image_size, 256, workers, skip_bad_images):
        inputs = to_input(views, weight.device, weight.dtype)
        if autocast is None:
            features += full_precision(encoder(inputs))
        else:
            with autocast():
                out = encoder(inputs)
            features += full_precision(out)
    encoder.train(training)
    if not features:
        return torch.empty(0, getattr(encoder, "embed_dim", 0), device=weight.device)
    return torch.cat(features)


def knn_of_encoder(
    encoder: nn.Module,
    train: Images,
    test: Images,
    image_size: int,
    workers: int = 0,
    autocast=None,
    skip_bad_images: bool = False,
    k: int = 200,
    temperature: float = 0.1,
) -> float:
    """k-NN accuracy of an encoder, whole training and test set, spread over ranks.

    Each rank holds the features of its share of the training set only: it finds the nearest of
    its own for every test image, and the ranks' candidates are merged.
    """
    rank, ranks = distributed.rank(), distributed.world_size()
    share = np.arange(rank, len(train), ranks)
    how = image_size, workers, autocast, skip_bad_images
    train_x = extract_features(encoder, train, share, *how)
    train_y = torch.from_numpy(train.labels[share])
    padded = -(-len(test) // ranks) * ranks  # gathers need equal rows: the last ones repeat
    queries = np.minimum(np.arange(rank, padded, ranks), len(test) - 1)
    test_x = extract_features(encoder, test, queries, *how)
    test_x = distributed.gather(test_x)
    truth = torch.from_numpy(test.labels)
    order = torch.arange(padded).view(-1, ranks).T.reshape(-1)  # sample of each gathered row
    test_x = test_x[order.argsort()][: len(test)]
    similarity, labels = nearest_labels(train_x, train_y, test_x, k)
    if ranks > 1:
        k = min(k, len(train))
        missing = (0, k - similarity.shape[1])  # a small share cannot give k: nothing, of no weight
        similarity, labels = F.pad(similarity, missing, value=-torch.inf), F.pad(labels, missing)
        similarity = distributed.gather(similarity.T).T
        labels = distributed.gather(labels.T).T
        best = similarity.topk(k, dim=1)
        similarity, labels = best.values, labels.gather(1, best.indices)
    classes = int(max(train.labels.max(), test.labels.max())) + 1
    return vote(similarity, labels, truth, classes, temperature)
