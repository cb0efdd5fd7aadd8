"""The data sets by name: from photographs, class folders, packed shards or CIFAR-10's files."""

import contextlib
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common.data import photos, shards
from common.data.images import ArrayImages, FolderImages, Images, PackedImages
from common.errors import UserError, is_disk_error, nearest_path
from common.run import documents

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


def load_dataset(name: str, data: str, download: bool = False) -> tuple[Images, Images | None]:
    """Training images and labelled test images (None where there are none).

    `photos` needs no folder. `imagenet` is train/ and val/ with class folders, `imagefolder`
    train/ and optional val/, in class folders or flat (no labels). `cifar10` is torchvision's
    python batches or train/ and test/ with class folders. A folder that pack.py wrote stands for
    the `imagenet` or `imagefolder` it was made of. Raises UserError for a wrong layout.
    """
    if name == "photos":
        return photo_patches("train"), photo_patches("test")
    if not data:
        hint = " (with --download it is fetched there)" if name == "cifar10" else ""
        raise UserError(
            f"--dataset {name} needs --data FOLDER{hint}; --dataset photos needs no data",
        )
    root = documents.expanded(data)
    if name == "cifar10":
        return load_cifar10(root, download)
    if shards.is_packed(root):
        check_packed(root, name)
        read, splits = packed_split, shards.split_names(root)
    else:
        check_folder(root)
        read, splits = scan_folder, [s for s in ("train", "val") if (root / s).is_dir()]
    train = read(root, "train", flat_allowed=name == "imagefolder", name=name)
    if "val" not in splits:
        if name == "imagenet":
            raise UserError(f"{root} has no folder val/: ImageNet is train/ and val/")
        return train, None
    val = read(root, "val", flat_allowed=name == "imagefolder", name=name)
    if val.labels is None or train.labels is None:
        return train, None
    check_same_classes(root, train, val, "val")
    return train, val


def check_same_classes(root: Path, train: Images, test: Images, split: str) -> None:
    if test.classes != train.classes:
        odd = sorted(set(test.classes) ^ set(train.classes))
        raise UserError(f"{root}: train/ and {split}/ differ in class folders: {odd[:3]}")


def photo_patches(split: str) -> ArrayImages:
    pixels, labels = photos.patches(split)
    return ArrayImages(pixels, labels, list(photos.PHOTOS), "photos")


def check_folder(root: Path) -> None:
    check_exists(root)
    if not (root / "train").is_dir():
        raise UserError(
            f"--data {root} has no folder train/: expected {root}/train/CLASS/IMAGE",
        )


def check_exists(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise UserError(f"--data {root} is a file: name the folder of the images")
    folders = []
    with contextlib.suppress(OSError):  # none above it, or none that may be listed
        folders = [path.name for path in root.parent.iterdir() if path.is_dir()]
    near = nearest_path(root.name, folders)
    raise UserError(f"--data {root}: no such folder{near}")


def scan_folder(root: Path, split: str, flat_allowed: bool, name: str) -> FolderImages:
    """The images of root/split: class folders in sorted order, files sorted within each."""
    folder = root / split
    found = entries_of(folder)
    classes = [e.name for e in found if e.is_dir() and not e.name.startswith(".")]
    broken = [e.path for e in found if e.is_symlink() and not os.path.exists(e.path)]
    if classes and broken:
        raise UserError(f"{broken[0]} is a link to nothing: mend or remove it")
    if not classes:
        files = [e.name for e in found if is_image(e.name)]
        if not files:
            raise UserError(f"{folder} holds neither class folders nor images")
        if not flat_allowed:
            raise UserError(
                f"{folder} has no class folders: use --dataset imagefolder for unlabelled images",
            )
        return FolderImages(str(folder), as_bytes(files), None, [], f"{root.name} ({name})")
    paths: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        files = [e.name for e in entries_of(folder / class_name) if is_image(e.name)]
        if not files:
            raise UserError(
                f"{folder / class_name} holds no images: remove the folder or fill it",
            )
        paths += [f"{class_name}/{file}" for file in files]
        labels += [label] * len(files)
    title = "ImageNet" if name == "imagenet" else f"{root.name} ({name})"
    return FolderImages(str(folder), as_bytes(paths), np.array(labels), classes, title)


def entries_of(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from None


def check_packed(root: Path, name: str) -> None:
    if "train" not in shards.split_names(root):
        raise UserError(f"{root} holds no packed train/")


def packed_split(root: Path, split: str, flat_allowed: bool, name: str) -> PackedImages:
    """The images of root/split as they were before they were packed, in the same order."""
    index = shards.read_index(root, split)
    if not index.classes and not flat_allowed:
        raise UserError(
            f"{root}: its {split}/ has no class folders: use --dataset imagefolder for unlabelled "
            "images",
        )
    title = "ImageNet" if name == "imagenet" else f"{index.source} ({name})"
    return PackedImages(
        os.path.join(root, split),
        index.paths,
        index.labels if index.classes else None,
        index.classes,
        title,
        str(root),
        index.shard,
        index.offset,
        index.length,
        index.files,
        index.resized,
    )


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_ENDINGS and not name.startswith(".")


def as_bytes(paths: Sequence[str]) -> np.ndarray:
    return np.array([os.fsencode(p) for p in paths])


def load_cifar10(root: Path, download: bool) -> tuple[ArrayImages, ArrayImages]:
    """CIFAR-10 in memory, from the python batches or from class folders of 32x32 images."""
    if download or (root / "cifar-10-batches-py").is_dir():
        return cifar10_batches(root, train=True, download=download), cifar10_batches(root, False)
    check_exists(root)
    lacking = [f"{split}/" for split in ("train", "test") if not (root / split).is_dir()]
    if lacking:
        raise UserError(
            f"--data {root} has neither cifar-10-batches-py/ nor train/CLASS/IMAGE and "
            f"test/CLASS/IMAGE ({' and '.join(lacking)} missing): a recipe's --download fetches "
            "the former",
        )
    train, test = cifar10_folder(root, "train", 50_000), cifar10_folder(root, "test", 10_000)
    check_same_classes(root, train, test, "test")
    return train, test


def cifar10_batches(root: Path, train: bool, download: bool = False) -> ArrayImages:
    from torchvision.datasets import CIFAR10

    try:
        source = CIFAR10(root, train=train, download=download)
    except (RuntimeError, OSError, EOFError) as error:
        if is_disk_error(error):
            raise
        raise UserError(f"CIFAR-10 in {root}: {error}") from None
    return ArrayImages(source.data, np.array(source.targets), source.classes, "CIFAR-10")


def cifar10_folder(root: Path, split: str, expected: int) -> ArrayImages:
    files = scan_folder(root, split, flat_allowed=False, name="cifar10")
    copy = "JPEG copy" if files.path(0).lower().endswith((".jpg", ".jpeg")) else "image folders"
    if len(files) != expected:
        copy += f", {len(files)} of {expected} {split} images"
    pixels = np.empty((len(files), 32, 32, 3), dtype=np.uint8)
    for index in range(len(files)):
        try:
            image = files.load(index)
        except UserError as error:  # all ranks read all of CIFAR-10 at the start
            text = str(error).removesuffix(", or use --on-bad-image skip")
            raise UserError(text) from None
        if image.size != (32, 32):
            raise UserError(
                f"{files.path(index)} is {image.width}x{image.height}: CIFAR-10's images are 32x32",
            )
        pixels[index] = image
    return ArrayImages(pixels, files.labels, files.classes, f"CIFAR-10 ({copy})")
