"""Objects that have no shape, and images that are not what their annotation says: at load, by file
and count, before any of them stops a training of days or a scoring at its end.
"""

import functools
from typing import Any

from common.data.images import UNREADABLE, open_image, said
from common.errors import UserError, say_once
from eval.dense import check_each
from eval.detection.data import Detections, has_extent

ORIENTATION = 0x0112  # EXIF's tag; from 5 on width and height change places
FLAT, BARE = "of no width or height", "without an outline"


def outline(one: dict[str, Any], width: int, height: int) -> list | dict | None:
    """Returns an object's run lengths, or its polygons of three points and more, as detectron2
    takes them; None if there are none, or if they do not fit an image of this size.
    """
    shape = one.get("segmentation")
    if isinstance(shape, dict):
        counts = shape.get("counts")
        whole = not isinstance(counts, list) or sum(counts) == height * width
        return shape if counts and whole and shape.get("size") == [height, width] else None
    return [p for p in shape or () if len(p) % 2 == 0 and len(p) >= 6] or None


def leave_out_shapeless(images: Detections, masks: bool) -> None:
    """Takes objects without extent, or without the outline that masks need, out of training, and
    says how many; images without any object are left out too.
    """
    flat, bare = [], []
    for image in images.images:
        for one in images.objects[image["id"]]:
            if one.get("iscrowd"):
                continue
            if not has_extent(one):
                flat.append((one, image))
            elif masks and (shape := outline(one, image["width"], image["height"])):
                one["segmentation"] = shape
            elif masks:
                bare.append((one, image))
                one["shapeless"] = True
    found = [counted(kind, pairs) for kind, pairs in ((FLAT, flat), (BARE, bare)) if pairs]
    images.shapeless = {one["id"] for one, _ in flat + bare}
    if empty := len(images) - len(images.with_objects()):
        found.append(f"{empty:,} images without objects")
    if found:
        say_once(f"{images.name}, training: left out are {'; '.join(found)}")


def check_truth(images: Detections, masks: bool) -> None:
    """Raises UserError if objects to score by have no outline: pycocotools would stop at them, or
    take them for boxes. Objects without extent count as missed, as in COCO's own scoring; this is
    said.
    """
    flat, bare = [], []
    for image in images.images:
        for one in images.objects[image["id"]]:
            if one.get("iscrowd"):  # neither found nor missed
                continue
            if not has_extent(one):
                flat.append((one, image))
            shape = outline(one, image["width"], image["height"]) if masks else True
            # pycocotools tells polygons from boxes by the first polygon
            if not shape or (isinstance(shape, list) and shape[0] is not one["segmentation"][0]):
                bare.append((one, image))
    if bare:
        raise UserError(
            f"{images.name}, test: {counted(BARE, bare)} cannot be scored: mend or "
            "fetch the annotations again"
        )
    if flat:
        text = counted(FLAT, flat)
        say_once(f"{images.name}, test: {text} count as missed, as in COCO's own scoring")


def counted(kind: str, pairs: list[tuple[dict[str, Any], dict[str, Any]]]) -> str:
    """Says how many objects there are, and which is the first."""
    one, image = pairs[0]
    return f"{len(pairs):,} objects {kind} (the first {one['id']} of {image['file_name']})"


def check_files(images: Detections) -> None:
    """Raises UserError if images are missing, unreadable or of another size than their annotation
    says.
    """
    check_each(
        images.images,
        functools.partial(problem, max_pixels=images.max_pixels),
        f"images of {images.name} are not as annotated",
    )


def problem(image: dict[str, Any], max_pixels: int) -> str | None:
    """Says what is wrong with an image's file, judged by its header; None if nothing is."""
    path, annotated = image["file_name"], (image["width"], image["height"])
    try:
        with open_image(path, max_pixels) as file:
            size = file.size
            if file.getexif().get(ORIENTATION, 1) >= 5:  # as `load_image` turns it upright
                size = size[::-1]
    except FileNotFoundError:
        return f"{path} is missing"
    except UNREADABLE as error:
        return f"{path} cannot be read ({said(error, path)})"
    if size == annotated:
        return None
    has, says = ("x".join(map(str, sides)) for sides in (size, annotated))
    return f"{path} has {has} pixels, its annotation says {says}"
