"""Images by number: held in memory, in files, or inside shards."""

import dataclasses
import hashlib
import os
import re
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import ClassVar

import numpy as np
from PIL import Image
from torch import Tensor

from common.config import MAX_PIXELS
from common.data import shards
from common.errors import UserError
from common.fast import pixels

Image.MAX_IMAGE_PIXELS = None  # `open_image` has a limit of its own, which a flag raises
SKIP_HINT = ", or use --on-bad-image skip"
# what Pillow raises at files that are damaged, cut short or not what their names say
UNREADABLE = (OSError, SyntaxError, ValueError, EOFError, OverflowError, MemoryError, struct.error)


@dataclass
class ArrayImages:
    """Images of one size held in memory: `pixels` uint8 (N,H,W,3), `labels` (N,) or None."""

    pixels: np.ndarray
    labels: np.ndarray | None
    classes: list[str]
    name: str
    per_image: ClassVar = ("pixels",)

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def load_array(self, index: int) -> np.ndarray:
        """Returns uint8 (H,W,4), see common/fast/pixels.py."""
        return pixels.four_channels(self.pixels[index])

    def fingerprint(self) -> str:
        """Returns a hash of all pixels: a continued run must see the same images."""
        return hashlib.sha256(np.ascontiguousarray(self.pixels)).hexdigest()[:12]


@dataclass
class FolderImages:
    """Image files below `root`: `paths` relative to it (bytes), `labels` (N,) or None."""

    root: str
    paths: np.ndarray  # fixed-width bytes: 1.3 million str objects would be copied per worker
    labels: np.ndarray | None
    classes: list[str]
    name: str
    max_pixels: int = field(default=MAX_PIXELS, kw_only=True)
    per_image: ClassVar = ("paths",)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def read(self, index: int) -> bytes:
        """Returns the file as it is."""
        with open(self.path(index), "rb") as file:
            return file.read()

    def load(self, index: int) -> Image.Image:
        """Loads the image as RGB; raises UserError that names the file if it cannot be read."""
        path = self.path(index)
        try:
            with open_image(self.source(index), self.max_pixels) as image:
                return as_rgb(image)
        except UNREADABLE as error:
            raise UserError(
                f"{path} cannot be read ({said(error, path)}): mend or remove it{SKIP_HINT}",
                this_rank=True,
            ) from None

    def source(self, index: int) -> str | BytesIO:
        """Returns what Pillow opens."""
        return self.path(index)

    def load_array(self, index: int) -> np.ndarray:
        """Loads the image as uint8 (H,W,4), see common/fast/pixels.py. If anything is odd about a
        file, Pillow judges it, as in `load`.
        """
        try:
            array = pixels.decode_jpeg(self.read(index), self.max_pixels)
        except OSError:
            array = None
        if array is None:
            array = pixels.four_channels(np.asarray(self.load(index)))
        return array

    def fingerprint(self) -> str:
        """Returns a hash of all file names: a continued run must see the same images."""
        return hashlib.sha256(b"\n".join(self.paths.tolist())).hexdigest()[:12]


def open_image(source: str | Path | BytesIO, max_pixels: int) -> Image.Image:
    """Opens an image and reads its header alone. Raises ValueError if it has more than
    `max_pixels`: a few bytes of a file may claim so many, and decoding would take gigabytes.
    """
    image = Image.open(source)
    if (number := image.width * image.height) > max_pixels:
        image.close()
        size = f"{image.width}x{image.height} is {number:,} pixels"
        raise ValueError(f"{size}, more than --max-pixels {max_pixels}")
    return image


def said(error: Exception, path: str | Path) -> str:
    """Returns what an error says, without the file, which is named already."""
    text = re.sub(r" <_io.BytesIO object at \w+>", "", str(error)).replace(f" {str(path)!r}", "")
    return text or ("out of memory" if isinstance(error, MemoryError) else type(error).__name__)


def as_rgb(image: Image.Image) -> Image.Image:
    """Converts to 8 bits per channel, of 16-bit grey the upper 8: Pillow would clip it to white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"{image.mode} pixels of 32 bits: store it with 8 or 16")
    return image.convert("RGB")


@dataclass
class PackedImages(FolderImages):
    """The same files inside shards that pack.py wrote: tar files, read at known places."""

    packed: str  # the folder of the shards
    shard: np.ndarray  # (N,) which of `files` holds an image
    offset: np.ndarray  # (N,) where its bytes begin in that file
    length: np.ndarray  # (N,) how many bytes it has
    files: list[str]
    resized: int  # shorter side to which larger images were reduced; 0: the original files
    handles: shards.Handles = field(default_factory=shards.Handles, compare=False)
    per_image: ClassVar = ("paths", "shard", "offset", "length")

    def path(self, index: int) -> str:
        """Returns shard and name, for messages."""
        return f"{self.shard_path(index)}: {os.fsdecode(self.paths[index])}"

    def shard_path(self, index: int) -> str:
        return os.path.join(self.packed, self.files[self.shard[index]])

    def place(self, index: int) -> shards.Place:
        return self.shard_path(index), int(self.offset[index]), int(self.length[index])

    def expect(self, samples: Iterable[int]) -> None:
        """Announces what is read next, in this order, see `shards.Handles`."""
        self.handles.expect(map(self.place, samples))

    def read(self, index: int) -> bytes:
        return self.handles.read(*self.place(index))

    def source(self, index: int) -> BytesIO:
        return BytesIO(self.read(index))

    def fingerprint(self) -> str:
        """Returns the fingerprint of the folder that was packed, if its files are unchanged."""
        if not self.resized:
            return super().fingerprint()
        names = b"\n".join([*self.paths.tolist(), b"resized to %d" % self.resized])
        return hashlib.sha256(names).hexdigest()[:12]


Images = ArrayImages | FolderImages
CenterView = Callable[[Image.Image, int], Tensor]  # (image, size) -> uint8 (3,size,size)


def subset(images: Images, samples: np.ndarray) -> Images:
    """Returns the images of these numbers, in this order, with their labels."""
    labels = None if images.labels is None else images.labels[samples]
    parts = {name: getattr(images, name)[samples] for name in images.per_image}
    return dataclasses.replace(images, **parts, labels=labels)
