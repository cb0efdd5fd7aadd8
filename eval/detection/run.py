"""COCO Mask R-CNN and VOC Faster R-CNN from a backbone, and their AP.

    python eval/detection/run.py --backbone runs/snclr/imagenet-resnet50-0 --data /path/to/coco
    python eval/detection/run.py --backbone RUN --task voc_faster_rcnn_R50_FPN --data VOCdevkit
    python eval/detection/run.py --backbone RUN --data /path/to/coco --backend torchvision
    python eval/detection/run.py --backbone resnet50.pth --arch resnet50 --method Supervised \
        --pretrained-on ImageNet-1k --data /path/to/coco

README.md, beside this file, says what each task is, where it comes from and how to install
detectron2. Writes record.json with AP, AP50 and AP75 of boxes and masks; started again, it
continues.
"""

import dataclasses
import importlib
import importlib.metadata
import sys
from dataclasses import dataclass
from typing import Any, Literal

import common.run.early  # noqa: F401  # isort: skip
from common import distributed
from common.config import free
from common.errors import UserError, command
from common.run import documents
from common.run.flags import parse
from eval.dense import DenseConfig
from eval.detection import check, data, torchvision_backend
from eval.detection.scores import MEASURES
from eval.detection.settings import Job, Settings, Task, parse_overrides
from eval.evaluation import RECORD

INSTALL = "eval/detection/README.md says how to install it"


@dataclass(frozen=True)
class DetectionConfig(DenseConfig):
    """Detection from a backbone: trains a detector of a paper's set-up, and scores it."""

    task: Task = "coco_mask_rcnn_R50_FPN_1x"  # a file of eval/detection/configs
    # values of the task's file to change, like "SOLVER.MAX_ITER=6000 INPUT.MIN_SIZE_TRAIN=[400]";
    # the record says so
    override: str = ""
    # default: detectron2 if it can be imported, else torchvision
    backend: Literal["detectron2", "torchvision"] | None = None
    # processes that detectron2's launcher starts here, one for each GPU; -1: all GPUs
    gpus: int = free(-1)


def parse_arguments(argv: list[str] | None = None) -> DetectionConfig:
    return parse(DetectionConfig, {}, argv)


def main(argv: list[str] | None = None) -> None:
    job = Detection(parse_arguments(argv))
    job.evaluate(f"detection-{job.config.task}-{job.config.backend}")


class Detection(Job):
    """A task on a backbone, by one of the two backends."""

    def __init__(self, config: DetectionConfig):
        overrides = parse_overrides(config.override, config.task)
        self.settings = Settings(config.task, overrides)
        config = dataclasses.replace(config, backend=chosen_backend(config.backend))
        if config.backend == "torchvision":
            torchvision_backend.check(self.settings)
            if config.gpus >= 0:
                raise UserError(
                    "--gpus is for detectron2's launcher: start torchvision's ranks by torchrun",
                )
        elif config.precision != "fp32":
            raise UserError("--precision bf16 is for --backend torchvision")
        super().__init__(config)
        if config.backend == "detectron2" and self.config.arch != "resnet50":
            raise UserError(
                f"{config.backbone} is {self.config.arch}: detectron2's tasks take a resnet50"
            )

    def load_images(self) -> tuple[data.Detections, data.Detections]:
        splits = self.settings["DATASETS.TRAIN"], self.settings["DATASETS.TEST"]
        train, test = (data.load(part, self.config.data, self.dataset_name()) for part in splits)
        check.leave_out_shapeless(train, self.settings.mask)
        check.check_truth(test, self.settings.mask)
        for images in (train, test):
            images.max_pixels = self.config.max_pixels
            check.check_files(images)
        wanted, found = self.settings["MODEL.ROI_HEADS.NUM_CLASSES"], len(test.categories)
        if found != wanted:
            raise UserError(f"{self.config.data} has {found} classes, the task {wanted}")
        return train, test

    def dataset_name(self) -> str:
        """Returns the data set's name in results/published.yaml."""
        return "VOC07+12" if torchvision_backend.is_voc(self.settings) else "COCO2017"

    def dataset_fields(self) -> dict[str, Any]:
        missing = []
        for split, images in (("TRAIN", self.train), ("TEST", self.test)):
            whole = sum(data.IMAGES[name] for name in self.settings[f"DATASETS.{split}"])
            if len(images) != whole:
                missing.append(f"{len(images)} of {whole} {split.lower()} images")
        return {"name": self.train.name, "copy": None, "incomplete": ", ".join(missing) or None}

    def trained(self) -> dict[str, dict[str, float]]:
        """Trains and scores. Returns AP, AP50, AP75 of boxes, and of masks if any, in percent."""
        self.say(f"backend: {self.config.backend} {version(self.config.backend)}")
        if self.config.backend == "torchvision":
            return torchvision_backend.run(self)
        from eval.detection import detectron2_backend

        return detectron2_backend.run(self)

    def conclude(self, found: dict[str, dict[str, float]]) -> None:
        """Writes the record: its value is the AP of boxes, and its scores are the other numbers."""
        settings, backend = self.settings, self.config.backend
        protocol = settings.protocol(backend)
        rows = [
            {"protocol": f"{protocol}, {kind}", "metric": measure, "values": [values[measure]]}
            for kind, values in found.items()
            for measure in MEASURES
        ]
        hyperparameters = {
            "task": settings.task,
            "backend": f"{backend} {version(backend)}",
            "overrides": settings.overrides,
            "iterations": settings.iterations,
            "batch": settings["SOLVER.IMS_PER_BATCH"],
            "lr": settings["SOLVER.BASE_LR"],
            "norms": [settings["MODEL.RESNETS.NORM"], settings["MODEL.FPN.NORM"]]
            if "MODEL.FPN.NORM" in settings.values
            else [settings["MODEL.RESNETS.NORM"]],
        }
        if self.train.shapeless:
            hyperparameters["objects_left_out"] = len(self.train.shapeless)
        assumed = settings.task.startswith("coco")  # norms unstated in SNCLR and GSG, see README
        first, rest = rows[0], rows[1:]
        self.write_record(
            first["protocol"],
            first["values"],
            hyperparameters,
            found,
            assumed,
            metric=first["metric"],
            scores=rest,
        )

    def say_result(self) -> None:
        if self.rank:
            return
        path = self.folder / RECORD
        found = documents.read_json(path, "record")
        text = "; ".join(
            f"{kind} " + ", ".join(f"{name} {value:.2f}" for name, value in values.items())
            for kind, values in found["others"].items()
        )
        self.finish(f"{found['hyperparameters']['backend']}: {text}", [path])


def chosen_backend(wanted: str | None) -> str:
    """Returns `wanted`, else detectron2, or torchvision, saying why, if that is not installed."""
    if wanted == "torchvision":
        return wanted
    try:
        importlib.import_module("detectron2")
        return "detectron2"
    except ImportError as error:
        if wanted == "detectron2":
            raise UserError(f"--backend detectron2: {error}; {INSTALL}") from None
        if distributed.rank() == 0:
            print(f"detectron2 cannot be imported ({error}), so the backend is torchvision")
        return "torchvision"


def version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:  # a checkout on the path
        return str(getattr(importlib.import_module(package), "__version__", "unknown"))


if __name__ == "__main__":
    sys.exit(command(main))
