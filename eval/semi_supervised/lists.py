"""Which images are labelled: SimCLR's lists on ImageNet, class-balanced draws elsewhere."""

import hashlib
import os
import urllib.error
import urllib.request
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from common.data.images import FolderImages, Images
from common.data.splits import split_classes
from common.errors import UserError, say_once
from common.files import write
from common.run import documents

# google-research/simclr, imagenet_subsets/: 12 811 and 128 116 files
URL = "https://raw.githubusercontent.com/google-research/simclr/master/imagenet_subsets/{}"
SHA256 = {
    "1percent.txt": "71e82a48ba78252683ae334c4d019ebd5c6e855b9599c1389fbe83eb9549cf17",
    "10percent.txt": "6d09de11e7bdaf5b1f3b1f249b6183695f97310cdd20f0c03e7235b6b9392091",
}


def simclr_list(percent: int) -> Path:
    """Returns SimCLR's list of this percentage: downloaded once, checked every time."""
    name = f"{percent}percent.txt"
    caches = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(caches) / "selfsup-recipes" / name
    if not path.exists():
        url = URL.format(name)
        try:
            with urllib.request.urlopen(url, timeout=60) as answer:
                content = answer.read()
        except (OSError, urllib.error.URLError) as error:
            raise UserError(
                f"{url} cannot be downloaded ({error}): fetch it elsewhere and give --list FILE"
            ) from None
        check(content, name, url)
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, content)
    with documents.opened(path) as file:
        check(file.read(), name, str(path))
    return path


def check(content: bytes, name: str, where: str) -> None:
    found = hashlib.sha256(content).hexdigest()
    if found != SHA256[name]:
        raise UserError(
            f"{where} is not SimCLR's {name} (sha256 {found[:12]}…, not {SHA256[name][:12]}…): "
            "remove it, or give --list FILE"
        )


def read_list(path: Path, images: Images, unreadable: Iterable[str] = ()) -> np.ndarray:
    """Returns the numbers of the images that a list names, in its order. It leaves out those that
    `unreadable` names, which --on-bad-image skip has taken out of the images, and says how many.

    One image per line: `n01440764_10026.JPEG`, whose class folder is what stands before the
    underscore, or `folder/file`. Raises UserError for a line that names no image on disk.
    """
    if not isinstance(images, FolderImages):
        raise UserError("--list needs image files: --dataset imagenet or imagefolder")
    try:
        lines = [line.strip() for line in documents.read_text(path).splitlines()]
    except UserError as error:
        raise UserError(f"--list cannot be read: {error}") from None
    wanted = [n if "/" in n else f"{n.split('_')[0]}/{n}" for n in lines if n]
    if not wanted:
        raise UserError(f"--list {path} names no image")
    places = {os.fsdecode(p): i for i, p in enumerate(images.paths.tolist())}
    unreadable = {*unreadable}
    bad = [name for name in wanted if name not in places and name in unreadable]
    missing = [name for name in wanted if name not in places and name not in unreadable]
    if missing:
        raise UserError(
            f"{len(missing)} of the {len(wanted)} images in {path} are not in {images.root}, "
            f"the first is {missing[0]}: complete the data set, or give another --list",
        )
    if len(set(wanted)) < len(wanted):
        twice = next(name for i, name in enumerate(wanted) if name in wanted[:i])
        raise UserError(f"--list {path} names {twice} twice")
    if bad:
        say_once(
            f"{path}: left out are {len(bad)} of its {len(wanted)} images, which cannot be read "
            f"(--on-bad-image skip); the first is {bad[0]}"
        )
    if len(bad) == len(wanted):
        raise UserError(f"none of the {len(wanted)} images in {path} can be read")
    return np.array([places[name] for name in wanted if name in places])


def balanced_subset(labels: np.ndarray, percent: int, seed: int) -> np.ndarray:
    """Draws the numbers of `percent` % of each class's images, at least one, from `seed`."""
    _, drawn = split_classes(labels, lambda count: count * percent / 100, seed)
    return drawn
