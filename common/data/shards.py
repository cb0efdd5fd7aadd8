"""Packed images: tar files beside an index, read at known places without unpacking.

`packed.json` names the splits, their classes and their shards; `train.npz` and `val.npz` hold, for
every image in the order of the folder it came from, name, label, shard, offset and length. A shard
is a plain tar file: `tar`, or webdataset, reads it without this index.
"""

import os
import threading
import time
import zipfile
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.errors import UserError
from common.run import documents

NAME = "packed.json"
VERSION = 1
# what reading a damaged npz file raises (zipfile: a method of compression that does not exist)
DAMAGED = (OSError, ValueError, KeyError, EOFError, NotImplementedError, zipfile.BadZipFile)
ARRAYS = ("paths", "labels", "shard", "offset", "length")
AHEAD = 16  # at most so many images are read before their turn, per process
AHEAD_BYTES = 16 << 20  # and at most so many bytes, unless a single image is larger
# a read that takes longer (seconds) counts as slow: 110 kB from the page cache take 0.05 ms,
# reading ahead costs 0.03 ms
SLOW = 0.5e-3

Place = tuple[str, int, int]  # path of a shard, offset, length


@dataclass
class Index:
    """One split: arrays of (N,), one entry for each image, and what all images share."""

    paths: np.ndarray  # bytes, relative to the split's folder
    labels: np.ndarray  # int64, zeros if there are no classes
    shard: np.ndarray  # number in `files`
    offset: np.ndarray  # int64, bytes
    length: np.ndarray  # int64, bytes
    classes: list[str]
    files: list[str]
    source: str  # name of the folder that was packed
    resized: int


class Handles:
    """Holds shards open and reads them by position, so that processes share nothing but the files;
    a process that was forked, or that was sent a copy, opens its own.

    On a file system behind a network a read is mostly waiting. If reads are slow, the images that
    `expect` was told of are therefore read before their turn, several at once. Threads do this,
    because they need nothing of the file system (posix_fadvise fills a page cache that some file
    systems do not read from). If reads are fast, threads would only cost time.
    """

    def __init__(self) -> None:
        self.opened: dict[str, int] = {}
        self.owner = os.getpid()
        self.slow, self.is_first = False, False
        self.expected: deque[Place] = deque()
        self.ahead: dict[Place, Future] = {}
        self.threads: ThreadPoolExecutor | None = None
        self.opening = threading.Lock()

    def __reduce__(self):
        return Handles, ()

    def __deepcopy__(self, memo: dict) -> "Handles":
        return Handles()

    def expect(self, places: Iterable[Place]) -> None:
        """Notes what will be read next, in this order; forgets what was expected before."""
        self.check_owner()
        self.expected, self.ahead, self.is_first = deque(places), {}, True
        if self.slow:
            self.read_ahead()

    def read(self, path: str, offset: int, length: int) -> bytes:
        """Returns the bytes at a place; raises UserError that names the shard if it cannot."""
        self.check_owner()
        started = time.perf_counter()
        place = path, offset, length
        coming = self.ahead.pop(place, None)
        if coming is None:
            data = self.read_now(*place)
            if self.expected and self.expected[0] == place:
                self.expected.popleft()
        else:
            data = coming.result()
        is_slow = time.perf_counter() - started > SLOW
        # a batch's first read has waited for its whole time, later ones were perhaps under way
        self.slow = is_slow if self.is_first else self.slow or is_slow
        self.is_first = False
        if self.slow:
            self.read_ahead()
        return data

    def read_ahead(self) -> None:
        """Asks for as many of the expected images as may be under way."""
        held = sum(length for _, _, length in self.ahead)
        while self.expected and len(self.ahead) < AHEAD:
            held += self.expected[0][2]
            if self.ahead and held > AHEAD_BYTES:
                return
            if self.threads is None:
                self.threads = ThreadPoolExecutor(AHEAD, "shards")
            place = self.expected.popleft()
            self.ahead[place] = self.threads.submit(self.read_now, *place)

    def read_now(self, path: str, offset: int, length: int) -> bytes:
        try:
            data = os.pread(self.descriptor(path), length, offset)
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})", this_rank=True) from None
        if len(data) < length:
            text = f"{path} is cut short: pack again, or copy this file again"
            raise UserError(text, this_rank=True)
        return data

    def descriptor(self, path: str) -> int:
        with self.opening:
            if path not in self.opened:
                self.opened[path] = os.open(path, os.O_RDONLY)
            return self.opened[path]

    def check_owner(self) -> None:
        if self.owner != os.getpid():
            self.__init__()


def is_packed(root: Path) -> bool:
    """Tells whether common/data/pack.py wrote a folder; raises UserError if it has not finished."""
    if (root / NAME).is_file():
        return True
    if not (root / "train").is_dir() and any(root.glob("train-?????.tar*")):
        raise UserError(
            f"{root} is not packed to its end: start the same `python -m common.data.pack` again",
        )
    return False


def describe(root: Path) -> dict:
    """Returns what packed.json says."""
    try:
        about = documents.read_json(root / NAME, "packed")
    except UserError as error:
        raise UserError(f"{error}: pack again") from None
    if (version := about["version"]) != VERSION:
        raise UserError(f"{root / NAME} is of version {version}, not {VERSION}: pack again")
    return about


def fits(
    entry: dict[str, Any],
    paths: np.ndarray,
    labels: np.ndarray,
    shard: np.ndarray,
    offset: np.ndarray,
    length: np.ndarray,
) -> bool:
    """Tells whether the arrays of a split agree with packed.json: whole numbers, one for each
    image, of classes and shards that there are, and of places within these shards.
    """
    numbers = (labels, shard, offset, length)
    if paths.dtype.kind != "S" or any(array.dtype.kind not in "iu" for array in numbers):
        return False
    if any(array.shape != (entry["images"],) for array in (paths, *numbers)):
        return False
    for array, count in ((labels, len(entry["classes"]) or 1), (shard, len(entry["shards"]))):
        if array.min() < 0 or array.max() >= count:
            return False
    sizes = np.array([*entry["shards"].values()])[shard]
    return bool((offset >= 0).all() and (length >= 0).all() and (length <= sizes - offset).all())


def split_names(root: Path) -> list[str]:
    return list(describe(root)["splits"])


def read_index(root: Path, split: str) -> Index:
    """Reads a split's index; raises UserError for a shard that is missing or of another size."""
    about = describe(root)
    entry = about["splits"][split]
    for name, size in entry["shards"].items():
        path = root / name
        if not path.is_file():
            raise UserError(f"{path} is missing: pack again, or copy it again")
        if path.stat().st_size != size:
            raise UserError(
                f"{path} has {path.stat().st_size} bytes and should have {size}: pack again, or "
                "copy it again",
            )
    try:
        with documents.opened(root / f"{split}.npz") as whole, np.load(whole) as file:
            arrays = [file[name] for name in ARRAYS]
    except DAMAGED as error:
        raise UserError(f"{root / split}.npz cannot be read ({error}): pack again") from None
    if not fits(entry, *arrays):
        raise UserError(f"{root / split}.npz and {NAME} disagree: pack again")
    return Index(*arrays, entry["classes"], [*entry["shards"]], about["source"], about["resized"])
