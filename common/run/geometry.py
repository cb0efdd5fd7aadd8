"""How the features of a run's encoder lie: spread, rank and singular values, of test images.

The representation is what the encoder puts out, the embedding what the loss sees of it: the output
of the model's `projector`. Both are taken in eval mode, so that batch norm cannot blow a collapsed
embedding up to unit variance.
"""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.data.images import Images
from common.data.splits import balanced
from common.knn import extract_features, gather_shares, rank_share
from common.run.monitors import effective_rank, embedding_std

NAME = "geometry.jsonl"
IMAGES, VALUES = 2000, 128  # at most: images of the test set, singular values


def epochs_of(config: Any) -> set[int]:
    """Returns the epochs after which --geometry-points measures: spread evenly, up to the last."""
    points = min(config.geometry_points, config.epochs)
    return {math.ceil(config.epochs * n / points) for n in range(1, points + 1)}


@torch.no_grad()
def measure(
    model: nn.Module,
    images: Images,
    image_size: int,
    workers: int = 0,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> dict[str, dict[str, Any]]:
    """Measures `representation` and `embedding`, each with what `described` says, of at most 2 000
    of the images, equally many of each class, the same every time; over all ranks.
    """
    chosen = np.arange(len(images))
    if len(images) > IMAGES:
        classes = 1 if images.labels is None else len(np.unique(images.labels))
        chosen = balanced(images, IMAGES // classes * classes)
    own = chosen[rank_share(len(chosen), padded=True)]
    rows = extract_features(model.encoder, images, own, image_size, workers, autocast)
    rows = gather_shares(rows, len(chosen))
    training = model.projector.training
    model.projector.eval()
    with autocast():
        embedding = model.projector(rows)
    model.projector.train(training)
    return {"representation": described(rows), "embedding": described(embedding)}


def described(rows: Tensor) -> dict[str, Any]:
    """Describes rows (N,D). `std` is the standard deviation of the l2-normalised rows times
    sqrt(D): 1 if they are spread evenly over the sphere, 0 if they are one. `effective_rank` is of
    the same rows. `singular_values` are the up to 128 largest of the centred rows over sqrt(N), as
    they are: roots of their covariance's eigenvalues (DirectCLR Sec. 4.1 draws those).
    """
    rows = rows.double()
    centred = rows - rows.mean(0)
    values = torch.linalg.svdvals(centred)[:VALUES] / len(rows) ** 0.5
    return {
        "std": rounded(embedding_std(rows) * rows.shape[1] ** 0.5),
        "effective_rank": rounded(effective_rank(rows, len(rows))),
        "singular_values": [rounded(value) for value in values],
    }


def rounded(value: Tensor) -> float:
    """Rounds to four digits, as a record keeps it."""
    return float(f"{value:.4g}")
