"""Average precision by pycocotools: COCO's, and VOC2007's eleven recalls."""

import contextlib
import io
from typing import Any

import numpy as np
import torch

from eval.detection.data import Detections

MEASURES = ("AP", "AP50", "AP75")
MASK_THRESHOLD = 0.5  # of a mask's probability: torchvision's reference, detectron2


def as_results(
    image: int, out: dict[str, torch.Tensor], categories: list[int]
) -> list[dict[str, Any]]:
    """Turns torchvision's output for an image into COCO's results; label i is categories[i - 1]."""
    from pycocotools import mask

    boxes = out["boxes"].float().cpu().clone()
    boxes[:, 2:] -= boxes[:, :2]
    found = [
        {"image_id": image, "category_id": categories[label - 1], "bbox": box, "score": score}
        for label, box, score in zip(
            out["labels"].tolist(), boxes.tolist(), out["scores"].tolist(), strict=True
        )
    ]
    if "masks" in out:
        for one, probability in zip(found, out["masks"], strict=True):
            pixels = (probability[0] > MASK_THRESHOLD).to(torch.uint8).cpu().numpy()
            one["segmentation"] = mask.encode(np.asfortranarray(pixels))
    return found


def of(
    images: Detections, results: list[dict[str, Any]], masks: bool, voc: bool = False
) -> dict[str, dict[str, float]]:
    """Returns {"box": {"AP": …, "AP50": …, "AP75": …}, "mask": …} in percent, the mean over the
    classes that occur; `voc` takes precision at 11 recalls instead of 101 (VOC2007).
    """
    from pycocotools.coco import COCO
    from pycocotools.cocoeval import COCOeval

    kinds = {"box": "bbox"} | ({"mask": "segm"} if masks else {})
    if not results:
        return {kind: dict.fromkeys(MEASURES, 0.0) for kind in kinds}
    found = {}
    with contextlib.redirect_stdout(io.StringIO()):  # it prints what it does
        truth = COCO()
        truth.dataset = images.content
        truth.createIndex()
        for kind, name in kinds.items():
            # loadRes reads masks only from results that have no box
            own = [{n: v for n, v in r.items() if n != "bbox"} for r in results]
            measured = COCOeval(truth, truth.loadRes(own if kind == "mask" else results), name)
            if voc:
                measured.params.recThrs = np.linspace(0, 1, 11)
            measured.evaluate()
            measured.accumulate()
            # thresholds, recalls, classes, areas, detections: all areas, 100 detections
            found[kind] = averages(measured.eval["precision"][..., 0, -1])
    return found


def averages(precision: np.ndarray) -> dict[str, float]:
    """Returns AP over all overlaps, at 0.5 and 0.75, of precisions (10,R,C); -1: no such class."""

    def mean(part: np.ndarray) -> float:
        known = part[part > -1]
        return 100 * float(known.mean()) if known.size else 0.0

    return {"AP": mean(precision), "AP50": mean(precision[0]), "AP75": mean(precision[5])}
