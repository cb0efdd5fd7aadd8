"""Features: shorter side to 224 bicubic, centre crop, once per dataset and backbone."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from common.data.images import ArrayImages, Images
from common.errors import UserError
from common.fast.center import central_square
from common.files import replacing
from common.knn import extract_features

IMAGE_SIZE = 224  # GSG App. D.1


def view(image: Image.Image, size: int) -> Tensor:
    """Scales the shorter side to `size`, bicubic, and takes the centre: uint8 (3,size,size)."""
    return central_square(image, size, size, "bicubic")


def cached(
    folder: Path,
    encoder: nn.Module,
    facts: dict[str, Any],
    key: str,
    images: Images,
    size: int,
    workers: int = 0,
    between: Callable[[int], None] | None = None,
) -> tuple[Tensor, float | None]:
    """Returns ((N,D) float32 features on the CPU, in order; seconds that extracting took, or None
    if they were there already). `between` is told how many images each batch has. Raises UserError
    for an image that cannot be read.

    The file is named after the backbone's hash, its arch and the image size, and after the names
    and sizes of the image files (after the pixels, if they are in memory).
    """
    backbone = hashlib.sha256(f"{facts['sha256']} {facts['arch']}".encode()).hexdigest()[:12]
    path = folder / f"{key}-{size}-{backbone}-{fingerprint(images)}.npy"
    if path.exists():
        try:
            stored = np.load(path)
        except (ValueError, EOFError):
            raise UserError(f"{path} is damaged: remove it and start again") from None
        if len(stored) == len(images):
            return torch.from_numpy(stored), None
    started = time.monotonic()
    samples = np.arange(len(images))
    features = extract_features(
        encoder, images, samples, size, workers, view=view, after_batch=between
    ).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside, open(beside, "wb") as file:
        np.save(file, features.numpy())
    return features, time.monotonic() - started


def fingerprint(images: Images) -> str:
    """Returns a hash of names and sizes of the files, or of the pixels."""
    if isinstance(images, ArrayImages):
        return images.fingerprint()
    sizes = (os.path.getsize(images.path(i)) for i in range(len(images)))
    lines = [b"%s %d" % (p, s) for p, s in zip(images.paths.tolist(), sizes, strict=True)]
    return hashlib.sha256(b"\n".join(lines)).hexdigest()[:12]
