"""Features: shorter side to 224 bicubic, centre crop, once per dataset and backbone."""

import hashlib
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor, nn

from common.augment import to_tensor
from common.data.images import ArrayImages, Images
from common.data.loaders import ignore_stop_signals
from common.errors import UserError
from common.fast.pixels import to_input
from common.files import replacing

IMAGE_SIZE = 224  # GSG App. D.1
BATCH = 64  # images; ssl-transfer linear.py. It moves nothing: the encoder is in eval mode


def view(image: Image.Image, size: int) -> Tensor:
    """Shorter side to `size` by bicubic, the central square, uint8 (3,size,size)."""
    if image.size != (size, size):
        image = F.resize(image, size, F.InterpolationMode.BICUBIC)
        image = F.center_crop(image, [size, size])
    return to_tensor(image)


class Views(torch.utils.data.Dataset):
    """Sample -> its view, or the text of what is wrong with its file."""

    def __init__(self, images: Images, size: int):
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return view(self.images.load(index), self.size)
        except UserError as error:
            return str(error).removesuffix(", or use --on-bad-image skip")


def first_problem(items: list[Tensor | str]) -> Tensor | str:
    """A batch (N,3,size,size), or what is wrong with its first bad image."""
    for item in items:
        if isinstance(item, str):
            return item
    return torch.stack(items)


@torch.no_grad()
def extract(
    encoder: nn.Module,
    images: Images,
    size: int,
    workers: int = 0,
    between: Callable[[int], None] = lambda done: None,
) -> Tensor:
    """(N,D) float32 features on the CPU, in order; `between` is called with the images done.

    UserError for an image that cannot be read.
    """
    weight = next(encoder.parameters())
    encoder.eval()
    loader = torch.utils.data.DataLoader(
        Views(images, size),
        batch_size=BATCH,
        num_workers=workers,
        collate_fn=first_problem,
        worker_init_fn=ignore_stop_signals,
    )
    features = torch.empty(0)
    done = 0
    for views in loader:
        if isinstance(views, str):
            raise UserError(views)
        out = encoder(to_input(views, weight.device, weight.dtype)).float().cpu()
        if not done:
            features = torch.empty(len(images), out.shape[1])
        features[done : done + len(out)] = out
        done += len(out)
        between(done)
    return features


def cached(
    folder: Path,
    encoder: nn.Module,
    facts: dict[str, Any],
    key: str,
    images: Images,
    size: int,
    workers: int = 0,
    between: Callable[[int], None] = lambda done: None,
) -> tuple[Tensor, float | None]:
    """(features, seconds that extracting took or None where they were there already).

    The file is named after the backbone's hash, its arch and the image size, and after the names
    and sizes of the image files (the pixels, where they are in memory).
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
    features = extract(encoder, images, size, workers, between)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside, open(beside, "wb") as file:
        np.save(file, features.numpy())
    return features, time.monotonic() - started


def fingerprint(images: Images) -> str:
    """A hash of names and sizes of the files, or of the pixels."""
    if isinstance(images, ArrayImages):
        return images.fingerprint()
    sizes = (os.path.getsize(images.path(i)) for i in range(len(images)))
    lines = [b"%s %d" % (p, s) for p, s in zip(images.paths.tolist(), sizes, strict=True)]
    return hashlib.sha256(b"\n".join(lines)).hexdigest()[:12]
