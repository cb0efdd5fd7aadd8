"""The data sets by name: from photographs, class folders, packed shards or CIFAR-10's files."""

import contextlib
import functools
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from common.config import MAX_PIXELS
from common.data import photos, shards
from common.data.images import SKIP_HINT, ArrayImages, FolderImages, Images, PackedImages
from common.errors import UserError, is_disk_error, nearest_path, say_once
from common.run import documents

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
VALPREP = "valprep.sh of github.com/soumith/imagenetloader.torch"  # sorts ImageNet's val/


def load_dataset(
    name: str, data: str, download: bool = False, max_pixels: int = MAX_PIXELS
) -> tuple[Images, Images | None]:
    """Loads training images and labelled test images (None if there are none).

    `photos` needs no folder. `imagenet` is train/ and val/ with class folders, `imagefolder` is
    train/ and optional val/, in class folders or flat (no labels), or a folder with images directly
    in it. `cifar10` is torchvision's python batches or train/ and test/ with class folders. A
    folder that pack.py wrote stands for the `imagenet` or `imagefolder` it was made of. Raises
    UserError for a wrong layout. Larger images than `max_pixels` count as unreadable.
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
        check_exists(root)
        if name == "imagefolder" and not is_folder(root / "train") and images_in(root):
            return scan_folder(root, "", True, name, max_pixels, flat=True), None
        check_folder(root, name)
        read, splits = scan_folder, [s for s in ("train", "val") if is_folder(root / s)]
    how = {"flat_allowed": name == "imagefolder", "name": name, "max_pixels": max_pixels}
    read = functools.partial(read, root, **how)
    train = read("train")
    if "val" not in splits:
        if name == "imagenet":
            raise UserError(f"{root} has no folder val/: ImageNet is train/ and val/")
        return train, None
    val = read("val")
    if val.labels is None or train.labels is None:
        flat, hint = ("train", "") if train.labels is None else ("val", how_to_sort(val))
        say_once(
            f"{root}: {flat}/ has no class folders{hint}, so the {len(val):,} images of val/ are "
            "left out: no k-NN, no evaluation"
        )
        return train, None
    check_same_classes(root, train, val, "val")
    return train, val


def how_to_sort(val: FolderImages) -> str:
    released = os.path.basename(val.paths[0]).startswith(b"ILSVRC2012_val_")
    return f" (ImageNet's as released: {VALPREP} sorts them)" if released else ""


def check_same_classes(root: Path, train: Images, test: Images, split: str) -> None:
    """Raises UserError if a side has class folders that the other lacks, and names some of them."""
    own = {
        "train": sorted(set(train.classes) - set(test.classes)),
        split: sorted(set(test.classes) - set(train.classes)),
    }
    if not any(own.values()):
        return
    one, two = own.values()
    if {*map(composed, one)} == {*map(composed, two)}:
        raise UserError(
            f"{root}: {len(one)} class folders of train/ and {split}/ differ only in Unicode form "
            f"({one[0]!a} and {two[0]!a}): rename those of one side, for example by `convmv -f "
            f"utf8 -t utf8 --nfc -r --notest {root}`"
        )
    said = [f"{len(n)} only in {side}/: {some(n)}" for side, n in own.items() if n]
    raise UserError(
        f"{root}: train/ and {split}/ do not have the same class folders ({'; '.join(said)}): both "
        "need the same ones, since a class's label is its folder's place in sorted order"
    )


def composed(name: str) -> str:
    """Returns a name in one Unicode form: macOS may have taken accents apart."""
    return unicodedata.normalize("NFC", name)


def some(names: Sequence[str]) -> str:
    """Returns the first of many names, as text."""
    return ", ".join(map(repr, names[:3])) + (", …" if len(names) > 3 else "")


def photo_patches(split: str) -> ArrayImages:
    pixels, labels = photos.patches(split)
    return ArrayImages(pixels, labels, list(photos.PHOTOS), "photos")


def check_folder(root: Path, name: str) -> None:
    """Raises UserError that names the layouts of this data set if there is no train/."""
    if is_folder(root / "train"):
        return
    expected = f"--data {root} has no folder train/: expected {root}/train/CLASS/IMAGE"
    if name == "imagefolder":
        expected += f", or without labels {root}/train/IMAGE or {root}/IMAGE"
    raise UserError(expected)


def images_in(folder: Path) -> list[str]:
    """Returns the images that lie directly in a folder."""
    return images_among(entries_of(folder), "", {})


def check_exists(root: Path) -> None:
    if is_folder(root):
        return
    if root.exists():
        raise UserError(f"--data {root} is a file: name the folder of the images")
    folders = []
    with contextlib.suppress(OSError):  # none above it, or none that may be listed
        folders = [path.name for path in root.parent.iterdir() if path.is_dir()]
    near = nearest_path(root.name, folders)
    raise UserError(f"--data {root}: no such folder{near}")


def is_folder(path: Path) -> bool:
    """Tells whether there is a folder; raises UserError for a link that leads nowhere."""
    if path.is_symlink() and not os.path.exists(path):
        raise UserError(f"{path} is a link to nothing, or to itself: mend or remove it")
    return path.is_dir()


def scan_folder(
    root: Path,
    split: str,
    flat_allowed: bool,
    name: str,
    max_pixels: int = MAX_PIXELS,
    flat: bool = False,
) -> FolderImages:
    """Returns the images of root/split: class folders in sorted order, files sorted within each;
    with `flat` those directly in it, whatever folders there are. Says what is left out and how
    much.
    """
    folder = root / split
    found = entries_of(folder)
    classes = {} if flat else class_folders(folder, found)
    left_out: dict[str, list[str]] = {}
    paths = images_among([e for e in found if e.name not in classes], "", left_out)
    labels, title = None, f"{root.name} ({name})"
    if not classes and not paths:
        raise UserError(f"{folder} holds neither class folders nor images")
    if not classes and not flat_allowed:
        raise UserError(no_class_folders(folder, split, name, len(paths)))
    if classes:
        if paths:
            left_out["images beside the class folders"] = paths
        paths, labels = labelled_images(folder, classes, left_out)
        title = "ImageNet" if name == "imagenet" else title
    if left_out:
        counts = [f"{len(names):,} {kind} ({some(names)})" for kind, names in left_out.items()]
        say_once(f"{folder}: left out are {'; '.join(counts)}")
    return FolderImages(
        str(folder), as_bytes(paths), labels, [*classes], title, max_pixels=max_pixels
    )


def class_folders(folder: Path, found: Sequence[os.DirEntry]) -> dict[str, None]:
    """Names the class folders, in order; raises UserError for a link that cannot be one."""
    names = {}
    for entry in found:
        if entry.name.startswith(".") or not is_folder_entry(entry):
            continue
        if entry.is_symlink() and folder.resolve().is_relative_to(Path(entry.path).resolve()):
            raise UserError(f"{entry.path} is a link to a folder that holds it: remove it")
        names[entry.name] = None
    forms = Counter(map(composed, names))
    if twice := [name for name in names if forms[composed(name)] > 1]:
        raise UserError(
            f"{folder} has {len(twice)} class folders whose names differ only in Unicode form "
            f"({', '.join(map(ascii, twice[:2]))}): they would be two classes; merge them"
        )
    return names


def is_folder_entry(entry: os.DirEntry) -> bool:
    """Tells whether it is a folder or a link to one. Raises UserError for a link to nothing, unless
    it is named as an image, whose reader will say so.
    """
    if not entry.is_symlink():
        return entry.is_dir()
    broken_image = is_image(entry.name) and not os.path.exists(entry.path)
    return not broken_image and is_folder(Path(entry.path))


def labelled_images(
    folder: Path, classes: Iterable[str], left_out: dict[str, list[str]]
) -> tuple[list[str], np.ndarray]:
    """Returns (paths, labels) of the images in class folders; raises UserError for one without."""
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        files = images_among(entries_of(folder / name), f"{name}/", left_out)
        if not files:
            raise UserError(f"{folder / name} holds no images: remove the folder or fill it")
        paths += files
        labels += [label] * len(files)
    return paths, np.array(labels)


def images_among(
    entries: Sequence[os.DirEntry], prefix: str, left_out: dict[str, list[str]]
) -> list[str]:
    """Returns a folder's images, as paths; puts what else is there into `left_out`, by kind."""
    files = []
    for entry in entries:
        path = prefix + entry.name
        hidden = entry.name.startswith(".")
        if entry.is_dir(follow_symlinks=False):  # this needs no look at the file
            kind = None if hidden else "folders inside folders of images"
        elif is_image(entry.name):
            if entry.is_file(follow_symlinks=False) or entry.is_symlink():
                files.append(path)
                continue
            kind = "pipes and devices"  # opening one would wait
        elif hidden:
            kind = "hidden images" if is_image(entry.name.lstrip("._")) else None
        else:
            kind = "files without an image's ending"
        if kind:
            left_out.setdefault(kind, []).append(path)
    return files


def no_class_folders(folder: Path, split: str, name: str, images: int) -> str:
    """Says what to do about images that lie side by side although labels are needed."""
    text = f"{folder} has no class folders, its {images:,} images lie side by side"
    if name == "imagenet" and split == "val":
        return (
            f"{text}, as ImageNet's val/ is released: sort them into {folder}/CLASS/ with the "
            f"class folders of train/ (in {folder}, {VALPREP} does it)"
        )
    text += f": sort them into {folder}/CLASS/"
    if name == "imagenet":
        text += " (ImageNet's train/ is released as one tar file for each class)"
    return text


def entries_of(folder: Path) -> list[os.DirEntry]:
    """Returns what a folder holds, sorted by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})") from None


def check_packed(root: Path, name: str) -> None:
    if "train" not in shards.split_names(root):
        raise UserError(f"{root} holds no packed train/")


def packed_split(
    root: Path, split: str, flat_allowed: bool, name: str, max_pixels: int = MAX_PIXELS
) -> PackedImages:
    """Returns the images of root/split as they were before they were packed, in the same order."""
    index = shards.read_index(root, split)
    if not index.classes and not flat_allowed:
        raise UserError(
            f"{root}: its {split}/ was packed without class folders: sort its images into "
            f"{split}/CLASS/ and pack them again",
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
        max_pixels=max_pixels,
    )


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_ENDINGS and not name.startswith(".")


def as_bytes(paths: Sequence[str]) -> np.ndarray:
    return np.array([os.fsencode(p) for p in paths])


def load_cifar10(root: Path, download: bool) -> tuple[ArrayImages, ArrayImages]:
    """Loads CIFAR-10 into memory, from the python batches or class folders of 32x32 images."""
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
            image = files.load_array(index)[:, :, :3]
        except UserError as error:  # all ranks read all of CIFAR-10 at the start
            raise UserError(str(error).removesuffix(SKIP_HINT)) from None
        if image.shape != (32, 32, 3):
            height, width, _ = image.shape
            raise UserError(
                f"{files.path(index)} is {width}x{height}: CIFAR-10's images are 32x32",
            )
        pixels[index] = image
    return ArrayImages(pixels, files.labels, files.classes, f"CIFAR-10 ({copy})")
