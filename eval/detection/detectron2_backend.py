"""detectron2's models, trainer and launcher on a task of configs/. Imported only where detectron2
is there; README.md says how to install it.
"""

import functools
import json
import math
import multiprocessing
import os
import re
import signal
from pathlib import Path
from typing import Any

import torch
from detectron2.checkpoint import DetectionCheckpointer
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import (
    load_coco_json,
    register_coco_instances,
    register_pascal_voc,
)
from detectron2.engine import DefaultTrainer, HookBase, default_setup, hooks, launch
from detectron2.evaluation import COCOEvaluator, PascalVOCDetectionEvaluator
from detectron2.layers import get_norm
from detectron2.modeling import build_model
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, Res5ROIHeads
from detectron2.utils import comm
from torch import Tensor, nn
from torch import distributed as dist
from torch.multiprocessing import ProcessExitedException

from common import files
from common.errors import EXIT_STOPPED, Stopped, UserError
from common.run.signals import StopRequests
from eval.dense import same_features, step_seed
from eval.detection import data
from eval.detection.detectron2_names import check_loaded, convert, write
from eval.detection.scores import MEASURES
from eval.detection.settings import Job, Settings
from eval.transfer.readers import VOC_CLASSES

FOLDER = "detectron2"  # its OUTPUT_DIR in the evaluation's folder
RESULTS = "results.json"
KEPT = 2  # checkpoints


@ROI_HEADS_REGISTRY.register()
class Res5ROIHeadsExtraNorm(Res5ROIHeads):
    """The C4 head with one more batch norm after res5, for backbones whose own norms are trained
    (MoCo, Sec. 4.2 and detection/train_net.py).
    """

    @classmethod
    def _build_res5_block(cls, cfg: CfgNode):
        blocks, channels = super()._build_res5_block(cfg)
        blocks.add_module("norm", get_norm(cfg.MODEL.RESNETS.NORM, channels))
        return blocks, channels


class StopTraining(BaseException):
    """Ends detectron2's loop without the traceback that it logs for an Exception."""


class Trainer(DefaultTrainer):
    """detectron2's trainer with the task's evaluator, and with checkpoints by the clock."""

    minutes, requests = 15.0, StopRequests()

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None):
        folder = output_folder or os.path.join(cfg.OUTPUT_DIR, "inference")
        if dataset_name.startswith("voc"):
            return PascalVOCDetectionEvaluator(dataset_name)
        return COCOEvaluator(dataset_name, output_dir=folder)

    def build_hooks(self) -> list[HookBase | None]:
        """Returns detectron2's hooks, but `SaveOrStop` instead of its periodic checkpoints."""
        found = [h for h in super().build_hooks() if not isinstance(h, hooks.PeriodicCheckpointer)]
        place = next(i for i, h in enumerate(found) if isinstance(h, hooks.EvalHook))
        found.insert(place, SaveOrStop(self.minutes, self.requests))
        return found


class SaveOrStop(HookBase):
    """Saves by the clock, at the end, and if any process was asked to stop. The last two of all
    checkpoints stay, so that a crash while saving leaves one.
    """

    def __init__(self, minutes: float, requests: StopRequests):
        self.seconds, self.requests = 60 * minutes, requests
        self.timer = hooks.Timer()

    def after_step(self) -> None:
        due = self.timer.seconds() > self.seconds > 0
        flags = torch.tensor([self.requests.received is not None, due], device=self.device())
        flags = flags.int()
        if comm.get_world_size() > 1:
            dist.all_reduce(flags, op=dist.ReduceOp.MAX)
        stop, save = flags.bool().tolist()
        if stop or save or self.trainer.iter + 1 == self.trainer.max_iter:
            self.save()
        if stop:
            raise StopTraining

    def device(self) -> torch.device:
        return next(self.trainer.model.parameters()).device

    def save(self) -> None:
        self.timer.reset()
        if not comm.is_main_process():
            return
        iteration, folder = self.trainer.iter, Path(self.trainer.cfg.OUTPUT_DIR)
        self.trainer.checkpointer.save(f"model_{iteration:07d}", iteration=iteration)
        for old in sorted(folder.glob("model_*.pth"))[:-KEPT]:
            old.unlink()


def configuration(settings: Settings, weights: Path, output: Path, seed: int) -> CfgNode:
    """Returns detectron2's configuration of a task."""
    cfg = get_cfg()
    cfg.merge_from_file(str(settings.file))
    cfg.merge_from_list([part for pair in settings.overrides.items() for part in pair])
    cfg.MODEL.WEIGHTS = str(weights)
    cfg.MODEL.DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
    cfg.OUTPUT_DIR = str(output)
    cfg.SEED = seed
    cfg.freeze()
    return cfg


def pooled(model: nn.Module, x: Tensor) -> Tensor:
    """Returns (1,2048), res5 averaged over positions; the FPN or C4 model must be in eval mode."""
    if hasattr(model.backbone, "bottom_up"):
        return model.backbone.bottom_up(x)["res5"].mean((2, 3))
    out = model.backbone(x)["res4"]
    for name, block in model.roi_heads.res5.named_children():
        out = out if name == "norm" else block(out)
    return out.mean((2, 3))


def check_file(weights: Path, task: str | Settings, encoder: nn.Module) -> None:
    """Loads a converted file into the model of a task; UserError unless every tensor arrived and
    the features are the encoder's.
    """
    settings = Settings(task) if isinstance(task, str) else task
    cfg = configuration(settings, weights, weights.parent, 0).clone()
    cfg.defrost()
    cfg.MODEL.DEVICE = "cpu"
    model = build_model(cfg).eval()
    DetectionCheckpointer(model).load(str(weights))
    encoder = encoder.cpu()
    check_loaded(model.state_dict(), convert(encoder.state_dict()))
    same_features(encoder, lambda x: pooled(model, x), torch.device("cpu"))


def register(settings: Settings, folder: str, shapeless: set[int]) -> None:
    """Registers the task's splits under --data by detectron2's names for them; COCO's training
    images come without the objects of these ids.
    """
    for split in (*settings["DATASETS.TRAIN"], *settings["DATASETS.TEST"]):
        if split in DatasetCatalog:
            DatasetCatalog.remove(split)
            MetadataCatalog.remove(split)
        kind, year, part = split.split("_")
        root = data.folder_of(split, folder)
        if kind == "voc":
            register_pascal_voc(split, str(root / f"VOC{year}"), part, int(year), VOC_CLASSES)
        else:
            file = root / "annotations" / f"instances_{part}{year}.json"
            images = str(root / f"{part}{year}")
            register_coco_instances(split, {}, str(file), images)
            if shapeless and split in settings["DATASETS.TRAIN"]:
                DatasetCatalog.remove(split)
                read = functools.partial(with_shape, str(file), images, split, shapeless)
                DatasetCatalog.register(split, read)


def with_shape(file: str, images: str, split: str, shapeless: set[int]) -> list[dict[str, Any]]:
    """Reads an annotation file as detectron2 does, and leaves these objects out: detectron2 drops
    some of them by itself, and stops at the others.
    """
    found = load_coco_json(file, images, split, extra_annotation_keys=["id"])
    for image in found:
        objects = [one for one in image["annotations"] if one["id"] not in shapeless]
        image["annotations"] = objects
    return found


def run(job: Job) -> dict[str, dict[str, float]]:
    """Converts, checks, trains, scores. Returns {"box": {"AP": …}, "mask": …} in percent."""
    gpus = processes(job)
    output = job.folder / FOLDER
    weights, results = output / "backbone.pkl", output / RESULTS
    output.mkdir(exist_ok=True)
    write(weights, convert(job.encoder.state_dict(), job.config.backbone), job.facts)
    check_file(weights, job.settings, job.encoder)
    job.say("every tensor of the backbone is in detectron2's model, and gives the same features")
    if gpus > 1:
        forward_to_children(job.requests)
    requests = job.requests if gpus < 2 else None
    arguments = (job.config, job.settings, job.train.shapeless, weights, output, requests)
    try:
        launch(train, gpus, num_machines=1, dist_url="auto", args=arguments)
    except StopTraining:
        job.stop("saved")
    except FloatingPointError as error:
        text = str(error).splitlines()[0]
        raise UserError(
            f"detectron2: {text} Lower SOLVER.BASE_LR by --override, or, where FrozenBN meets "
            "random weights, set MODEL.RESNETS.NORM=BN"
        ) from None
    except ProcessExitedException as ended:
        if ended.exit_code != EXIT_STOPPED:
            raise
        job.say("stopped and saved; start the same command again to continue")
        raise Stopped from None
    return in_our_words(json.loads(results.read_text()), job.settings.mask)


def processes(job: Job) -> int:
    """Returns how many to start, 0 or 1 for this one alone; raises UserError if that cannot be."""
    there, batch = torch.cuda.device_count(), job.settings["SOLVER.IMS_PER_BATCH"]
    gpus = job.config.gpus if job.config.gpus >= 0 else there
    if job.ranks > 1:
        raise UserError("detectron2 starts its own processes: use --gpus, not torchrun")
    if gpus > max(1, there):
        raise UserError(f"--gpus {gpus}: there are {there} here")
    if batch % max(1, gpus):
        raise UserError(f"SOLVER.IMS_PER_BATCH {batch} does not divide over {gpus} GPUs")
    return gpus


def forward_to_children(requests: StopRequests) -> None:
    """Passes stop signals to this process on to the processes that the launcher starts."""

    def forward(number: int, frame: Any) -> None:
        requests.note(number, frame)
        for child in multiprocessing.active_children():
            os.kill(child.pid, number)

    for number in requests.before:
        signal.signal(number, forward)


def train(
    config: Any,
    settings: Settings,
    shapeless: set[int],
    weights: Path,
    output: Path,
    requests: StopRequests | None,
) -> None:
    """Runs one process of the training; detectron2's `launch` calls it."""
    register(settings, config.data, shapeless)
    # detectron2's sampler starts again with every process: with another order each time, not with
    # the same first images again and again
    seed = step_seed(config.seed, iterations_done(output), 0) % 2**31
    cfg = configuration(settings, weights, output, seed)
    cfg.defrost()
    cfg.DATALOADER.NUM_WORKERS = config.workers if config.workers >= 0 else 4
    cfg.freeze()
    default_setup(cfg, None)
    Trainer.minutes = config.checkpoint_minutes
    if requests is not None:
        train_with(cfg, requests, output)
        return
    with StopRequests() as Trainer.requests:  # a process of its own
        try:
            train_with(cfg, Trainer.requests, output)
        except StopTraining:
            raise SystemExit(EXIT_STOPPED) from None


def iterations_done(output: Path) -> int:
    """Returns how many iterations the checkpoint to go on from has done, 0 if there is none."""
    last = output / "last_checkpoint"  # detectron2's note of the newest file
    digits = re.findall(r"\d+", last.read_text()) if last.exists() else []
    return int(digits[-1]) + 1 if digits else 0


def train_with(cfg: CfgNode, requests: StopRequests, output: Path) -> None:
    Trainer.requests = requests
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=True)
    trainer.train()
    if comm.is_main_process():
        files.write(output / RESULTS, json.dumps(trainer._last_eval_results))


def in_our_words(results: dict[str, dict[str, float]], masks: bool) -> dict[str, dict[str, float]]:
    """Returns detectron2's results as run.py wants them; its NaN, no detection at all, is 0."""
    kinds = {"box": "bbox"} | ({"mask": "segm"} if masks else {})
    return {
        kind: {m: finite(results.get(name, {}).get(m, 0.0)) for m in MEASURES}
        for kind, name in kinds.items()
    }


def finite(value: float) -> float:
    return value if math.isfinite(value) else 0.0
