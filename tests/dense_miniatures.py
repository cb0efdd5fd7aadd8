"""Miniatures of COCO, VOC and ADE20K in their own layouts: bright shapes on dark noise, so that a
few iterations learn to find them.
"""

import json
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from eval.transfer.readers import VOC_CLASSES

WIDTH, HEIGHT = 128, 96
# COCO's 80 ids run from 1 to 90 with these left out
GAPS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)
COCO_IDS = [i for i in range(1, 91) if i not in GAPS]
RECTANGLE, ELLIPSE = 13, 90  # stop sign and toothbrush: ids that are not places in the list
COLOURS = {0: (230, 60, 40), 1: (60, 90, 240)}


def picture(number: int) -> tuple[Image.Image, list[tuple[int, tuple[int, int, int, int]]]]:
    """Draws (image, [(kind, (x1,y1,x2,y2))]): a red rectangle and a blue ellipse side by side."""
    rng = np.random.default_rng(number)
    image = Image.fromarray(rng.integers(0, 60, (HEIGHT, WIDTH, 3), dtype=np.uint8))
    draw = ImageDraw.Draw(image)
    objects = []
    for place, kind in enumerate(rng.permutation(2).tolist()):
        width, height = rng.integers(36, 52, 2).tolist()
        x = place * 64 + int(rng.integers(2, 62 - width))
        y = int(rng.integers(2, HEIGHT - 2 - height))
        corners = (x, y, x + width - 1, y + height - 1)
        (draw.rectangle if kind == 0 else draw.ellipse)(corners, fill=COLOURS[kind])
        objects.append((kind, corners))
    return image, objects


def outline(kind: int, corners: tuple[int, int, int, int]) -> list[float]:
    """Returns COCO's polygon of a shape: x and y in turn."""
    x1, y1, x2, y2 = corners[0], corners[1], corners[2] + 1, corners[3] + 1
    if kind == 0:
        return [x1, y1, x2, y1, x2, y2, x1, y2]
    angles = np.linspace(0, 2 * np.pi, 24, endpoint=False)
    x = (x1 + x2) / 2 + (x2 - x1) / 2 * np.cos(angles)
    y = (y1 + y2) / 2 + (y2 - y1) / 2 * np.sin(angles)
    return np.stack([x, y], 1).ravel().round(2).tolist()


def coco(root: Path, train: int = 8, val: int = 4) -> Path:
    """Writes annotations/, train2017/, val2017/; one training image has no objects, one a crowd."""
    (root / "annotations").mkdir(parents=True)
    categories = [{"id": i, "name": f"class {i}", "supercategory": "thing"} for i in COCO_IDS]
    for part, first, count in (("train", 0, train), ("val", 1000, val)):
        images, annotations = [], []
        (root / f"{part}2017").mkdir()
        for number in range(first, first + count):
            image, objects = picture(number)
            name = f"{number:012d}.jpg"
            image.save(root / f"{part}2017" / name, quality=95)
            images.append({"id": number, "file_name": name, "width": WIDTH, "height": HEIGHT})
            for kind, (x1, y1, x2, y2) in objects:
                width, height = x2 - x1 + 1, y2 - y1 + 1
                annotations.append(
                    {
                        "id": len(annotations) + 1,
                        "image_id": number,
                        "category_id": (RECTANGLE, ELLIPSE)[kind],
                        "bbox": [x1, y1, width, height],
                        "area": width * height * (1 if kind == 0 else np.pi / 4),
                        "iscrowd": 0,
                        "segmentation": [outline(kind, (x1, y1, x2, y2))],
                    }
                )
        if part == "train":
            empty, crowded = first + count, first
            image = Image.new("RGB", (WIDTH, HEIGHT))
            image.save(root / "train2017" / f"{empty:012d}.jpg")
            about = {"file_name": f"{empty:012d}.jpg", "width": WIDTH, "height": HEIGHT}
            images.append({"id": empty, **about})
            counts = [0, HEIGHT, HEIGHT * (WIDTH - 1)]  # the first column
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": crowded,
                    "category_id": RECTANGLE,
                    "bbox": [0, 0, 1, HEIGHT],
                    "area": HEIGHT,
                    "iscrowd": 1,
                    "segmentation": {"size": [HEIGHT, WIDTH], "counts": counts},
                }
            )
        content = {"images": images, "annotations": annotations, "categories": categories}
        path = root / "annotations" / f"instances_{part}2017.json"
        path.write_text(json.dumps(content))
    return root


def voc(root: Path, train: int = 4, test: int = 4) -> Path:
    """Writes VOC2007 with trainval and test, VOC2012 with trainval: aeroplanes and tvmonitors. The
    test's first image has a difficult object.
    """
    parts = {"VOC2007": {"trainval": train, "test": test}, "VOC2012": {"trainval": train}}
    number = 0
    for year, splits in parts.items():
        for folder in ("Annotations", "ImageSets/Main", "JPEGImages"):
            (root / year / folder).mkdir(parents=True)
        for split, count in splits.items():
            names = []
            for place in range(count):
                number += 1
                name = f"{number:06d}" if year == "VOC2007" else f"2008_{number:06d}"
                names.append(name)
                image, objects = picture(2000 + number)
                image.save(root / year / "JPEGImages" / f"{name}.jpg", quality=95)
                difficult = split == "test" and place == 0
                text = voc_annotation(name, objects, difficult)
                (root / year / "Annotations" / f"{name}.xml").write_text(text)
            (root / year / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
    return root


def voc_annotation(name: str, objects: list, difficult: bool) -> str:
    parts = [f"<annotation><filename>{name}.jpg</filename>"]
    parts.append(f"<size><width>{WIDTH}</width><height>{HEIGHT}</height><depth>3</depth></size>")
    for place, (kind, (x1, y1, x2, y2)) in enumerate(objects):
        parts.append(
            f"<object><name>{VOC_CLASSES[(0, -1)[kind]]}</name><pose>Unspecified</pose>"
            f"<truncated>0</truncated><difficult>{int(difficult and place == 0)}</difficult>"
            f"<bndbox><xmin>{x1 + 1}</xmin><ymin>{y1 + 1}</ymin><xmax>{x2 + 1}</xmax>"
            f"<ymax>{y2 + 1}</ymax></bndbox></object>"
        )
    return "".join([*parts, "</annotation>"])


def ade20k(root: Path, train: int = 6, val: int = 3) -> Path:
    """Writes ADEChallengeData2016: images/ and annotations/ of training and validation. Of the
    labels, 0 is unlabelled (the left eight columns), 1 the ground, 13 and 150 the shapes.
    """
    folder = root / "ADEChallengeData2016"
    for part, first, count in (("training", 3000, train), ("validation", 4000, val)):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True)
        for number in range(first, first + count):
            image, objects = picture(number)
            labels = Image.new("L", image.size, 1)
            draw = ImageDraw.Draw(labels)
            for shape, corners in objects:
                form = draw.rectangle if shape == 0 else draw.ellipse
                form(corners, fill=(13, 150)[shape])
            draw.rectangle((0, 0, 7, HEIGHT), fill=0)
            name = f"ADE_{'train' if part == 'training' else 'val'}_{number:08d}"
            image.save(folder / "images" / part / f"{name}.jpg", quality=95)
            labels.save(folder / "annotations" / part / f"{name}.png")
    return folder
