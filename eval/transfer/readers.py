"""The datasets as they lie on disk: torchvision's readers if they exist, else lists.

Every reader gives all images of a dataset with their labels and the official parts; which of them
train, validate and test is for splits.py.
"""

import csv
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torchvision import datasets

from common.data.images import ArrayImages, FolderImages, Images
from common.data.sets import as_bytes, load_cifar10, scan_folder
from common.errors import UserError, is_disk_error
from common.run import documents
from eval.transfer.manifest import Manifest

# VOC2007 devkit, VOCinit.m
VOC_CLASSES = ("aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair")
VOC_CLASSES = (*VOC_CLASSES, "cow", "diningtable", "dog", "horse", "motorbike", "person")
VOC_CLASSES = (*VOC_CLASSES, "pottedplant", "sheep", "sofa", "train", "tvmonitor")
CIFAR10_CLASSES = {"airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse"}
CIFAR10_CLASSES |= {"ship", "truck"}
BIRDSNAP_IMAGES = "download/images"  # where get_birdsnap.py puts what it fetches


@dataclass
class Pool:
    """All images of a dataset: labels (N,), or (N,20) zeros and ones for VOC2007; `parts` are
    indices by official part (train, val, test, or all); `copy` is a record's field of that name.
    """

    images: Images
    labels: np.ndarray
    parts: dict[str, np.ndarray]
    copy: str | None = None
    missing: int = 0  # images that the lists name and the disk lacks


@dataclass
class Part:
    """The files and labels that a reader found of one official part."""

    paths: list[str]
    labels: np.ndarray


def read(manifest: Manifest, root: Path) -> Pool:
    """Returns the dataset below `root`; raises UserError if it is not there or cannot be
    understood.
    """
    try:
        return READERS[manifest.key](root)
    except (RuntimeError, OSError, EOFError, KeyError, ValueError, AssertionError) as error:
        if is_disk_error(error):
            raise
        text = str(error).split(". You can use")[0]
        raise UserError(
            f"{manifest.name} in {root / manifest.folder}: {text or type(error).__name__}; "
            f"python eval/transfer/prepare.py --root {root} --datasets {manifest.key} says what to "
            "do"
        ) from None


def text_of(path: Path) -> str:
    """Returns a list's text; FileNotFoundError if it is none, or a folder or a pipe instead."""
    if not path.is_file():
        raise FileNotFoundError(f"no file {path}")
    return documents.read_text(path)


def pool_of(root: Path, parts: dict[str, Part]) -> Pool:
    """Returns a pool of image files; those that are not on disk are left out and counted."""
    paths, labels, places, missing = [], [], {}, 0
    for name, part in parts.items():
        there = np.array([os.path.isfile(path) for path in part.paths], dtype=bool)
        missing += int((~there).sum())
        places[name] = np.arange(len(paths), len(paths) + int(there.sum()))
        paths += [os.path.relpath(p, root) for p, t in zip(part.paths, there, strict=True) if t]
        labels.append(part.labels[there])
    if not paths:
        raise FileNotFoundError("none of the images that the lists name is there")
    images = FolderImages(str(root), as_bytes(paths), None, [], "")
    return Pool(images, np.concatenate(labels), places, missing=missing)


def files_of(dataset: Any) -> Part:
    """Returns files and labels of torchvision's Food101, DTD, FGVCAircraft or Flowers102."""
    return Part([str(path) for path in dataset._image_files], np.array(dataset._labels))


def food101(root: Path) -> Pool:
    return pool_of(root, {p: files_of(datasets.Food101(root, p)) for p in ("train", "test")})


def dtd(root: Path) -> Pool:
    parts = ("train", "val", "test")
    return pool_of(root, {p: files_of(datasets.DTD(root, p, partition=1)) for p in parts})


def aircraft(root: Path) -> Pool:
    parts = ("train", "val", "test")  # torchvision's default labels are the 100 variants
    return pool_of(root, {p: files_of(datasets.FGVCAircraft(root, p)) for p in parts})


def flowers(root: Path) -> Pool:
    parts = ("train", "val", "test")
    return pool_of(root, {p: files_of(datasets.Flowers102(root, p)) for p in parts})


def cars(root: Path) -> Pool:
    parts = {}
    for name in ("train", "test"):
        samples = datasets.StanfordCars(root, name)._samples
        parts[name] = Part([path for path, _ in samples], np.array([int(y) for _, y in samples]))
    return pool_of(root, parts)


def pets(root: Path) -> Pool:
    parts = {}
    for name, official in (("train", "trainval"), ("test", "test")):
        dataset = datasets.OxfordIIITPet(root, official)
        parts[name] = Part([str(p) for p in dataset._images], np.array(dataset._labels))
    return pool_of(root, parts)


def cifar(kind: type, root: Path) -> Pool:
    train, test = kind(root, train=True), kind(root, train=False)
    pixels = np.concatenate([train.data, test.data])
    images = ArrayImages(pixels, None, train.classes, "")
    labels = np.array([*train.targets, *test.targets])
    return array_pool(images, labels, len(train.data))


def array_pool(images: ArrayImages, labels: np.ndarray, train: int) -> Pool:
    places = {"train": np.arange(train), "test": np.arange(train, len(labels))}
    return Pool(images, labels, places)


def cifar10(root: Path) -> Pool:
    """Reads torchvision's batches, or class folders of images: then `copy` names the copy."""
    if (root / "cifar-10-batches-py").is_dir():
        return cifar(datasets.CIFAR10, root)
    for folder in (root / "cifar10", root):
        train = folder / "train"
        if train.is_dir() and {p.name for p in train.iterdir()} & CIFAR10_CLASSES:
            train, test = load_cifar10(folder, download=False)
            pixels = np.concatenate([train.pixels, test.pixels])
            labels = np.concatenate([train.labels, test.labels])
            pool = array_pool(ArrayImages(pixels, None, train.classes, ""), labels, len(train))
            # "CIFAR-10 (JPEG copy, 90 of 50000 train images)": the counts are the splits' to say
            pool.copy = train.name.split("(")[1].rstrip(")").split(",")[0]
            return pool
    return cifar(datasets.CIFAR10, root)  # it says what is missing


def cifar100(root: Path) -> Pool:
    return cifar(datasets.CIFAR100, root)


def sun397(root: Path) -> Pool:
    """Reads torchvision's classes, the authors' first split: lines like /a/abbey/sun_….jpg."""
    folder = root / "SUN397"
    # "/a/abbey": the letter's folder is not of the name, as in torchvision's reader
    named = text_of(folder / "ClassName.txt").splitlines()
    labels = {line.strip()[3:]: number for number, line in enumerate(named) if line.strip()}
    parts = {}
    for name, listed in (("train", "Training_01.txt"), ("test", "Testing_01.txt")):
        lines = text_of(folder / listed).split()
        numbers = [labels[line[3:].rsplit("/", 1)[0]] for line in lines]
        parts[name] = Part([str(folder / line.lstrip("/")) for line in lines], np.array(numbers))
    return pool_of(root, parts)


def caltech101(root: Path) -> Pool:
    """Reads all class folders, also the background's, which torchvision's own reader leaves out."""
    folder = root / "caltech101"
    if not (folder / "101_ObjectCategories").is_dir():
        raise FileNotFoundError(f"no folder {folder / '101_ObjectCategories'}")
    found = scan_folder(folder, "101_ObjectCategories", flat_allowed=False, name="caltech101")
    paths = [found.path(number) for number in range(len(found))]
    pool = pool_of(root, {"all": Part(paths, found.labels)})
    pool.images.classes = found.classes
    return pool


def birdsnap(root: Path) -> Pool:
    """Reads images.txt (url, md5, path, species_id, … by tabs, with a header) and test_images.txt
    (a header, then a path per line); the archive's readme.txt explains the format.
    """
    folder = root / "birdsnap"
    tests = set(text_of(folder / "test_images.txt").splitlines()[1:])
    found: dict[str, tuple[list[str], list[int]]] = {"train": ([], []), "test": ([], [])}
    lines = text_of(folder / "images.txt").splitlines()
    for row in csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE):
        paths, labels = found["test" if row["path"] in tests else "train"]
        paths.append(str(folder / BIRDSNAP_IMAGES / row["path"]))
        labels.append(int(row["species_id"]) - 1)  # ids run from 1
    return pool_of(root, {name: Part(paths, np.array(y)) for name, (paths, y) in found.items()})


def voc2007(root: Path) -> Pool:
    """Reads torchvision's images, the devkit's image-level labels: 1 there, 0 difficult, -1 not
    there.

    Difficult counts as not there, as in ssl-transfer (target == 1).
    """
    main = root / "VOCdevkit" / "VOC2007" / "ImageSets" / "Main"
    parts = {}
    for name in ("train", "val", "test"):
        paths = datasets.VOCDetection(root, year="2007", image_set=name).images
        labels = np.stack([voc_labels(main / f"{c}_{name}.txt", paths) for c in VOC_CLASSES], 1)
        parts[name] = Part(paths, labels)
    return pool_of(root, parts)


def voc_labels(path: Path, images: Sequence[str]) -> np.ndarray:
    """Returns one class's column for the images, from lines like "000005 -1"."""
    said = dict(line.split() for line in text_of(path).splitlines() if line.strip())
    return np.array([int(said[Path(image).stem]) == 1 for image in images], dtype=np.int64)


READERS: dict[str, Callable[[Path], Pool]] = {
    "food101": food101,
    "cifar10": cifar10,
    "cifar100": cifar100,
    "birdsnap": birdsnap,
    "sun397": sun397,
    "cars": cars,
    "aircraft": aircraft,
    "voc2007": voc2007,
    "dtd": dtd,
    "pets": pets,
    "caltech101": caltech101,
    "flowers": flowers,
}
