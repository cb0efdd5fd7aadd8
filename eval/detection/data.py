"""COCO and VOC from their own layouts, both as COCO's annotations; training examples."""

import gc
import hashlib
import json
import pickle
import xml.etree.ElementTree as ElementTree
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.augment import to_tensor, view_rng
from common.config import MAX_PIXELS
from common.errors import UserError, say_once
from common.run import documents
from eval.dense import load_image, or_error
from eval.transfer.readers import VOC_CLASSES

LAYOUTS = {
    "coco": "annotations/instances_train2017.json and instances_val2017.json, train2017/, val2017/",
    "voc": "VOC2007/ (trainval and test) and VOC2012/, each with Annotations/, ImageSets/Main/, "
    "JPEGImages/",
}
# images of the published splits (cocodataset.org; the VOC2007 and VOC2012 development kits)
IMAGES = {
    "coco_2017_train": 118_287,
    "coco_2017_val": 5_000,
    "voc_2007_trainval": 5_011,
    "voc_2012_trainval": 11_540,
    "voc_2007_test": 4_952,
}
# COCOeval ignores objects above its largest area, 1e10: so VOC's difficult ones get this area
IGNORED_AREA = 1e12
LEAST_SIDE = 1e-3  # pixels


class Detections:
    """Images with boxes and masks. `content` has the form of a COCO annotation file, but its file
    names are whole paths.
    """

    def __init__(self, name: str, content: dict[str, Any]):
        self.name, self.content = name, content
        self.images: list[dict[str, Any]] = content["images"]
        self.categories = sorted(c["id"] for c in content["categories"])
        self.objects: dict[int, list[dict[str, Any]]] = defaultdict(list)
        self.shapeless: set[int] = set()  # ids of objects that are not trained on, see check.py
        self.max_pixels = MAX_PIXELS  # a larger image counts as unreadable
        for one in content["annotations"]:
            self.objects[one["image_id"]].append(one)

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Returns a hash of file names and boxes: a continued training must see the same ones."""
        digest = hashlib.sha256()
        for image in self.images:
            boxes = [[o["category_id"], *o["bbox"]] for o in self.objects[image["id"]]]
            digest.update(f"{Path(image['file_name']).name} {boxes}\n".encode())
        return digest.hexdigest()[:12]

    def with_objects(self) -> list[dict[str, Any]]:
        """Returns the images to train on, those with an object that is no crowd, as detectron2."""
        return [i for i in self.images if any(map(is_object, self.objects[i["id"]]))]


def is_object(one: dict[str, Any]) -> bool:
    """Tells whether this is no crowd, has an area, and is not marked as shapeless by check.py."""
    return not one.get("iscrowd") and has_extent(one) and not one.get("shapeless")


def has_extent(one: dict[str, Any]) -> bool:
    """Tells whether a box is larger than what float32 rounds away; COCO's are in 0.01 pixels."""
    return min(one["bbox"][2:]) > LEAST_SIDE


def folder_of(split: str, data: str) -> Path:
    """Returns the folder that holds a split's layout: --data, or coco/ or VOCdevkit/ in it."""
    kind = split.split("_")[0]
    root = documents.expanded(data)
    inner, mark = {"coco": ("coco", "annotations"), "voc": ("VOCdevkit", "VOC2007")}[kind]
    for folder in (root, root / inner):
        if data and (folder / mark).is_dir():
            return folder
    raise UserError(f"--data {data or 'is missing'}: give a folder with {LAYOUTS[kind]}")


def load(splits: list[str], data: str, name: str) -> Detections:
    """Returns the images of several splits, one after the other; raises UserError for a wrong
    layout.
    """
    parts = []
    for split in splits:
        kind, year, part = split.split("_")
        folder = folder_of(split, data)
        parts.append((read_coco if kind == "coco" else read_voc)(folder, year, part))
    whole = parts[0]
    for part in parts[1:]:
        whole["images"] += part["images"]
        whole["annotations"] += part["annotations"]
    for number, one in enumerate(whole["annotations"], 1):
        one.setdefault("id", number)
    images = Counter(image["id"] for image in whole["images"])
    if twice := [identity for identity, count in images.items() if count > 1]:
        raise UserError(f"{name}: {len(twice):,} images are listed twice, the first is {twice[0]}")
    if stray := sum(one["image_id"] not in images for one in whole["annotations"]):
        say_once(f"{name}: left out are {stray:,} objects of images that are not listed")
    return Detections(name, whole)


def read_coco(folder: Path, year: str, part: str) -> dict[str, Any]:
    path = folder / "annotations" / f"instances_{part}{year}.json"
    try:
        with documents.opened(path) as file:
            content = json.load(file)
        needed = ("images", "annotations", "categories")
        content = {name: content[name] for name in needed}
        check_fields(content)
    except UserError as error:
        raise UserError(f"{error}; --data wants {LAYOUTS['coco']}") from None
    except KeyError as error:
        raise UserError(f"{path} is no COCO annotation file (it lacks {error})") from None
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is no COCO annotation file ({error})") from None
    images = folder / f"{part}{year}"
    for image in content["images"]:
        image["file_name"] = str(images / image["file_name"])
    return content


def check_fields(content: dict[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError unless all fields are there that are used later."""
    for image in content["images"]:
        if not (image["file_name"] and image["width"] > 0 and image["height"] > 0):
            raise ValueError(f"image {image['id']} has no size")
    classes = {one["id"] for one in content["categories"]}
    for one in content["annotations"]:
        box = [float(side) for side in one["bbox"]]
        if len(box) != 4 or one["category_id"] not in classes:
            what = f"box {box}, category {one['category_id']}"
            raise ValueError(f"object {one['id']} of image {one['image_id']}: {what}")


def read_voc(folder: Path, year: str, part: str) -> dict[str, Any]:
    """Returns a VOC split's boxes in COCO's form. VOC's corners are pixels from 1 on, both within
    the box: as in detectron2, (xmin=1, xmax=W) is the whole width.
    """
    root = folder / f"VOC{year}"
    lists = root / "ImageSets" / "Main" / f"{part}.txt"
    try:
        names = documents.read_text(lists).split()
    except UserError as error:
        raise UserError(f"{error}; --data wants {LAYOUTS['voc']}") from None
    images, annotations = [], []
    for name in names:
        path = root / "Annotations" / f"{name}.xml"
        try:
            tree = ElementTree.parse(path)
            found = [voc_object(one, part) for one in tree.findall("object")]
            size = {n: int(tree.findtext(f"size/{n}")) for n in ("width", "height")}
            # 2007: 6 digits, 2012: 4 + 6
            identity = int(year) * 10**8 + int(name.replace("_", ""))
        except (OSError, ElementTree.ParseError, ValueError, TypeError, AttributeError) as error:
            raise UserError(f"{path} cannot be read as VOC's annotation ({error})") from None
        file = str(root / "JPEGImages" / f"{name}.jpg")
        images.append({"id": identity, "file_name": file, **size})
        annotations += [{"image_id": identity, **one} for one in found]
    categories = [{"id": i, "name": name} for i, name in enumerate(VOC_CLASSES, 1)]
    return {"images": images, "annotations": annotations, "categories": categories}


def voc_object(element: ElementTree.Element, part: str) -> dict[str, Any]:
    """Returns box (x,y,w,h) and class; difficult objects train, and do not count in the test."""
    corners = ("xmin", "ymin", "xmax", "ymax")
    x1, y1, x2, y2 = (float(element.findtext(f"bndbox/{n}")) for n in corners)
    x1, y1 = x1 - 1, y1 - 1
    difficult = part == "test" and element.findtext("difficult", "0").strip() == "1"
    area = IGNORED_AREA if difficult else (x2 - x1) * (y2 - y1)
    return {
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "category_id": VOC_CLASSES.index(element.findtext("name")) + 1,
        "area": area,
        "iscrowd": 0,
    }


class Examples(torch.utils.data.Dataset):
    """A data set that maps (epoch, number) to an image uint8 (3,H,W) and its target. A key of
    (seed, epoch, image) decides the flip; an unreadable image gives an error's text.
    """

    def __init__(self, images: Detections, seed: int, masks: bool):
        self.seed, self.masks, self.max_pixels = seed, masks, images.max_pixels
        self.labels = {c: i for i, c in enumerate(images.categories, 1)}  # 0: background
        # bytes in one array: each loader process would copy COCO's million objects by touching them
        packed = [
            pickle.dumps((one["file_name"], [*filter(is_object, images.objects[one["id"]])]))
            for one in images.with_objects()
        ]
        self.ends = np.cumsum([0, *map(len, packed)])
        self.packed = np.frombuffer(b"".join(packed), dtype=np.uint8)
        gc.freeze()  # their garbage collectors must not walk what the annotations left behind

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, dict[str, Tensor]] | str:
        epoch, number = key
        first, last = self.ends[number : number + 2]
        path, objects = pickle.loads(self.packed[first:last])
        image = or_error(lambda: load_image(path, max_pixels=self.max_pixels))
        if isinstance(image, str):
            return image
        pixels = to_tensor(image)
        boxes = torch.tensor([o["bbox"] for o in objects], dtype=torch.float32)
        boxes[:, 2:] += boxes[:, :2]
        target = {"boxes": boxes}
        target["labels"] = torch.tensor([self.labels[o["category_id"]] for o in objects])
        if self.masks:
            target["masks"] = torch.stack([mask_of(o, *pixels.shape[1:]) for o in objects])
        if view_rng(self.seed, epoch, number, 0).random() < 0.5:
            pixels, target = flipped(pixels, target)
        return pixels, target


def mask_of(one: dict[str, Any], height: int, width: int) -> Tensor:
    """Returns the mask, uint8 (H,W), that an object's polygons or run lengths describe."""
    from pycocotools import mask

    shape = one["segmentation"]
    if isinstance(shape, list):
        encoded = mask.merge(mask.frPyObjects(shape, height, width))
    elif isinstance(shape["counts"], list):
        encoded = mask.frPyObjects(shape, height, width)
    else:
        encoded = shape
    return torch.from_numpy(mask.decode(encoded))


def flipped(pixels: Tensor, target: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Mirrors image, boxes and masks from right to left."""
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = pixels.shape[2] - boxes[:, [2, 0]]
    target = target | {"boxes": boxes}
    if "masks" in target:
        target["masks"] = target["masks"].flip(2)
    return pixels.flip(2), target
