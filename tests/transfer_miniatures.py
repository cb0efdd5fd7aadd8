"""Miniatures of the 12 datasets in their real on-disk layouts, for the real readers."""

import hashlib
import json
import pickle
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.io import savemat
from torchvision import datasets

from eval.transfer.readers import VOC_CLASSES

CLASSES = 3  # of every dataset but CIFAR-10 and VOC2007
TRAIN, VAL, TEST = 8, 4, 4  # images of a class


def picture(label: int, number: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    """Draws noise around the class's colour, so that there is something to learn."""
    rng = np.random.default_rng([label, number])
    colour = np.array([(label * 90) % 256, (label * 50 + 60) % 256, 200 - (label * 70) % 200])
    pixels = colour + rng.integers(-40, 40, size=(size[1], size[0], 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def save(path: Path, label: int, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(label, number).save(path, quality=95)


def write_lines(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")


def food101(root: Path) -> None:
    lists: dict[str, dict[str, list[str]]] = {"train": {}, "test": {}}
    for label, name in enumerate(["apple_pie", "baklava", "waffles"]):
        for number in range(TRAIN + TEST):
            part = lists["train" if number < TRAIN else "test"]
            part.setdefault(name, []).append(f"{name}/{1000 + number}")
            save(root / "food-101" / "images" / name / f"{1000 + number}.jpg", label, number)
    (root / "food-101" / "meta").mkdir()
    for name, content in lists.items():
        (root / "food-101" / "meta" / f"{name}.json").write_text(json.dumps(content))


def cifar(root: Path, kind: type, monkeypatch) -> None:
    """Writes the python batches; torchvision's md5 sums become those of the miniature."""
    folder, ten = root / kind.base_folder, kind is datasets.CIFAR10
    folder.mkdir(parents=True)
    classes = 10 if ten else CLASSES
    sums = {"train_list": [], "test_list": []}
    for listed, seed in (("train_list", 0), ("test_list", 100)):
        for batch, (name, _) in enumerate(getattr(kind, listed)):
            labels = list(range(classes)) * (1 if ten and listed == "train_list" else 4)
            pixels = [
                np.asarray(picture(y, seed + 10 * batch + i, (32, 32))).transpose(2, 0, 1).ravel()
                for i, y in enumerate(labels)
            ]
            key = "labels" if ten else "fine_labels"
            content = pickle.dumps({"data": np.stack(pixels), key: labels})
            (folder / name).write_bytes(content)
            sums[listed].append([name, hashlib.md5(content).hexdigest()])
    names = pickle.dumps({kind.meta["key"]: [f"class {i}" for i in range(classes)]})
    (folder / kind.meta["filename"]).write_bytes(names)
    meta = kind.meta | {"md5": hashlib.md5(names).hexdigest()}
    for name, value in (sums | {"meta": meta}).items():
        monkeypatch.setattr(kind, name, value)


def birdsnap(root: Path) -> None:
    folder = root / "birdsnap"
    rows, tests = ["url\tmd5\tpath\tspecies_id\tbb_x1\tbb_y1\tbb_x2\tbb_y2"], ["path"]
    for label, name in enumerate(["Acadian_Flycatcher", "Acorn_Woodpecker", "Blue_Jay"]):
        for number in range(TRAIN + TEST):
            path = f"{name}/{5000 + number}.jpg"
            rows.append(f"http://127.0.0.1/{number}.jpg\t0\t{path}\t{label + 1}\t1\t1\t9\t9")
            if number >= TRAIN:
                tests.append(path)
            save(folder / "download" / "images" / path, label, number)
    write_lines(folder / "images.txt", rows)
    write_lines(folder / "test_images.txt", tests)
    write_lines(folder / "species.txt", ["id\tcommon\tscientific\tdir"])


def sun397(root: Path) -> None:
    folder = root / "SUN397"
    names = ["/a/abbey", "/a/apartment_building/outdoor", "/b/bakery/shop"]
    lists: dict[str, list[str]] = {"Training_01.txt": [], "Testing_01.txt": []}
    for label, name in enumerate(names):
        for number in range(TRAIN + TEST):
            path = f"{name}/sun_{label}{number:04d}.jpg"
            lists["Training_01.txt" if number < TRAIN else "Testing_01.txt"].append(path)
            save(folder / path.lstrip("/"), label, number)
    write_lines(folder / "ClassName.txt", names)
    for name, lines in lists.items():
        write_lines(folder / name, lines)


def cars(root: Path) -> None:
    folder = root / "stanford_cars"
    kind = np.dtype([("bbox_x1", object), ("class", object), ("fname", object)])
    (folder / "devkit").mkdir(parents=True)
    for part, count, offset in (("train", TRAIN, 0), ("test", TEST, TRAIN)):
        rows = []
        for i in range(CLASSES * count):
            rows.append((1, i % CLASSES + 1, f"{i + 1:05d}.jpg"))  # classes run from 1
            save(folder / f"cars_{part}" / rows[-1][2], i % CLASSES, offset + i)
        annotations = {"annotations": np.array([rows], dtype=kind)}
        file = "cars_test_annos_withlabels.mat" if part == "test" else "devkit/cars_train_annos.mat"
        savemat(folder / file, annotations)
    names = np.array([["AM General Hummer", "Acura RL", "Acura TL"]], dtype=object)
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})


def aircraft(root: Path) -> None:
    folder = root / "fgvc-aircraft-2013b" / "data"
    names, number = ["707-320", "Boeing 717", "DH-82"], 0
    write_lines(folder / "variants.txt", names)
    for part, count in (("train", TRAIN), ("val", VAL), ("test", TEST)):
        lines = []
        for label, name in enumerate(names):
            for _ in range(count):
                lines.append(f"{number:07d} {name}")
                save(folder / "images" / f"{number:07d}.jpg", label, number)
                number += 1
        write_lines(folder / f"images_variant_{part}.txt", lines)


def voc2007(root: Path) -> None:
    """Writes images: image i shows class i mod 20; its neighbour is difficult in it."""
    folder, number = root / "VOCdevkit" / "VOC2007", 0
    for part, count in (("train", 40), ("val", 20), ("test", 20)):
        names = [f"{number + i:06d}" for i in range(count)]
        number += count
        write_lines(folder / "ImageSets" / "Main" / f"{part}.txt", names)
        for c, name in enumerate(VOC_CLASSES):
            said = {c: 1, (c + 1) % 20: 0}
            lines = [f"{n} {said.get(i % 20, -1):2d}" for i, n in enumerate(names)]
            write_lines(folder / "ImageSets" / "Main" / f"{name}_{part}.txt", lines)
        for i, name in enumerate(names):
            save(folder / "JPEGImages" / f"{name}.jpg", i % 20, number + i)


def dtd(root: Path) -> None:
    folder = root / "dtd" / "dtd"
    for part, offset, count in (("train", 0, TRAIN), ("val", TRAIN, VAL), ("test", 50, TEST)):
        lines = []
        for label, name in enumerate(["banded", "blotchy", "zigzagged"]):
            for number in range(offset, offset + count):
                lines.append(f"{name}/{name}_{number:04d}.jpg")
                save(folder / "images" / lines[-1], label, number)
        write_lines(folder / "labels" / f"{part}1.txt", lines)


def pets(root: Path) -> None:
    folder = root / "oxford-iiit-pet"
    for part, offset, count in (("trainval", 1, TRAIN), ("test", 100, TEST)):
        lines = []
        for label, name in enumerate(["Abyssinian", "american_bulldog", "Bengal"]):
            for number in range(offset, offset + count):
                lines.append(f"{name}_{number} {label + 1} 1 1")
                save(folder / "images" / f"{name}_{number}.jpg", label, number)
        write_lines(folder / "annotations" / f"{part}.txt", lines)


def caltech101(root: Path) -> None:
    folder = root / "caltech101" / "101_ObjectCategories"
    for label, name in enumerate(["BACKGROUND_Google", "accordion", "airplanes"]):
        for number in range(1, 34 + label):
            save(folder / name / f"image_{number:04d}.jpg", label, number)


def flowers(root: Path, monkeypatch) -> None:
    folder = root / "flowers-102"
    labels, ids, number = [], {}, 0
    for part, count in (("trnid", TRAIN), ("valid", VAL), ("tstid", TEST)):
        ids[part] = []
        for label in range(CLASSES):
            for _ in range(count):
                number += 1
                labels.append(label + 1)
                ids[part].append(number)
                save(folder / "jpg" / f"image_{number:05d}.jpg", label, number)
    savemat(folder / "imagelabels.mat", {"labels": np.array([labels])})
    savemat(folder / "setid.mat", {name: np.array([v]) for name, v in ids.items()})
    sums = dict(datasets.Flowers102._file_dict)
    for key, name in (("label", "imagelabels.mat"), ("setid", "setid.mat")):
        sums[key] = (name, hashlib.md5((folder / name).read_bytes()).hexdigest())
    monkeypatch.setattr(datasets.Flowers102, "_file_dict", sums)


def write_all(root: Path, monkeypatch) -> None:
    """Writes all 12; the miniatures' checksums replace torchvision's of CIFAR and Flowers."""
    for write in (food101, birdsnap, sun397, cars, aircraft, voc2007, dtd, pets, caltech101):
        write(root)
    cifar(root, datasets.CIFAR10, monkeypatch)
    cifar(root, datasets.CIFAR100, monkeypatch)
    flowers(root, monkeypatch)
