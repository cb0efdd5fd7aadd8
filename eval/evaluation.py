"""What the evaluations of one encoder share: flags, the encoder and its images, a folder with exact
resume, features over ranks, accuracies, and the record.

    job = Evaluation(config)
    job.begin(name)
    state = job.restore()                    # of an interrupted one, or None
    with job.working():
        for … in …:
            …
            job.after_step(lambda: …)        # saves the state where asked to stop
    job.write_record(…)
"""

import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import distributed
from common.augment import two_views
from common.config import DATASETS, MAX_PIXELS, NotNegative, PositiveInt, Seed, Workers, free
from common.data.images import Images
from common.data.loaders import default_workers
from common.data.sets import load_dataset
from common.data.splits import split_classes
from common.errors import Stopped, UserError
from common.fast.center import center_view
from common.files import write
from common.knn import extract_features, rank_share
from common.progress import Progress, duration
from common.run import checkpoint, documents, environment, metrics
from common.run.calibrate import calibrated
from common.run.folder import Folder, changes, choose, finished_record
from common.run.ranks import start
from common.run.readable import readable
from common.run.signals import StopRequests
from eval.encoders import RANDOM, in_words, is_random, load_encoder, record_fields
from results import record

RECORD = "record.json"
TOP = (1, 5)
# size of the held-out part if the sources do not state it: see `held_out`
IMAGENET_PER_CLASS, HELD_OUT_SHARE, HELD_OUT_LEAST = 10, 0.1, 1000
IMAGENET_IMAGES = {"training": 1_281_167, "validation": 50_000}


@dataclass(frozen=True)
class EncoderConfig:
    """The flags that every evaluation has: which encoder, and where the results go."""

    # run folder, its backbone.safetensors or a checkpoint of it, a checkpoint of another project
    # (linear_probe/README.md lists which), or a control: `random` (needs --arch) or `pixels`
    backbone: str = free("")
    arch: str = ""  # encoder, if the file does not say it; never guessed
    seed: Seed = 0  # decides the heads' initialisation, data order, crops, held-out images
    output: str = free("")  # folder of the evaluation; default: eval/<name> in the run folder
    workers: Workers = free(-1)  # loader processes per rank; -1: one per CPU core, at most 16
    # auto: continue what the folder holds; never: take a new folder with -2, -3, …
    resume: Literal["auto", "never"] = free("auto")
    max_pixels: PositiveInt = free(MAX_PIXELS)  # a larger image counts as unreadable
    method: str = ""  # name of a foreign checkpoint's method in the record; ours say their own
    # what a foreign checkpoint was trained on, for the record
    pretrained_on: Literal["ImageNet-1k", "CIFAR-10", "photos", "other"] = "other"
    config: str = free("")  # YAML file with values for these flags; flags win over it


@dataclass(frozen=True)
class TrainingConfig(EncoderConfig):
    """The flags of the evaluations that train something and save it on the way."""

    # default: bf16 autocast of the encoder on a GPU, fp32 on CPU
    precision: Literal["bf16", "fp32", "fp64"] | None = None
    checkpoint_minutes: NotNegative = free(15.0)  # minutes between checkpoints


@dataclass(frozen=True)
class EvaluationConfig(TrainingConfig):
    """The flags of the evaluations on class folders."""

    dataset: DATASETS | None = None  # images to evaluate on; default: the run's own, else imagenet
    data: str = free("")  # folder of the images, as for the recipes; default: the run's own
    # side of a view in pixels; default: the run's own, else 224. A ViT's positions are interpolated
    image_size: PositiveInt | None = None
    seeds: PositiveInt = (
        1  # how often to repeat, with seeds from --seed on; mean and spread are reported
    )
    # skip: read all images once and leave out, with their labels, those that cannot be read
    on_bad_image: Literal["stop", "skip"] = free("stop")


class Evaluation:
    """One evaluation of one encoder. Every rank makes one; rank 0 writes and speaks."""

    calibrates = True  # whether the training images calibrate an encoder that was never trained
    own_settings: Mapping[str, Any] = MappingProxyType({})  # added to the run's in the record
    tf32 = False  # whether fp32 lets a GPU's convolutions round their inputs to 10 bits

    def __init__(self, config: Any):
        if not config.backbone:
            raise UserError("--backbone RUN_OR_FILE is missing")
        self.started = time.monotonic()
        self.device = start()
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        self.encoder, self.facts = load_encoder(
            config.backbone, config.arch or None, getattr(config, "image_size", None)
        )
        sha256 = self.facts["sha256"]
        if distributed.any_rank([distributed.from_rank_zero(sha256) != sha256])[0]:
            raise UserError(f"{config.backbone} changed while the ranks read it: start again")
        if self.facts["layout"] == "ours" and (config.method or config.pretrained_on != "other"):
            raise UserError("--method and --pretrained-on are for other projects' checkpoints")
        self.config = config = self.with_defaults(config)
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        self.encoder.to(self.device, self.dtype).eval()
        if self.device.type == "cuda":
            self.encoder.to(memory_format=torch.channels_last)
            torch.backends.cudnn.benchmark = False  # the same numbers after a restart
            torch.backends.cudnn.deterministic = True
            if config.precision == "fp32" and not self.tf32:
                torch.backends.cudnn.allow_tf32 = False  # PyTorch's default is True
        self.train, self.test = self.load_images()
        self.workers = config.workers
        if self.workers < 0:
            self.workers = default_workers(distributed.ranks_on_this_machine())
        self.unreadable: dict[str, int] = {}
        self.unreadable_names: set[str] = set()  # of training images, as lists name them
        if getattr(config, "on_bad_image", "stop") == "skip":
            self.leave_out_unreadable()
        self.seconds_before = 0.0
        self.environment = environment.describe(self.device, self.ranks)
        script = Path(sys.argv[0]).resolve()
        if script.is_relative_to(environment.REPOSITORY):
            script = script.relative_to(environment.REPOSITORY)
        self.command = " ".join([str(script), *sys.argv[1:]])
        self.requests, self.bar, self.step = StopRequests(), Progress(0, "", silent=True), 0
        self.last_save = time.monotonic()

    def with_defaults(self, config: Any) -> Any:
        """Returns the configuration, with what the run says for flags that are not given."""
        ours = self.facts["config"]
        values: dict[str, Any] = {"arch": self.facts["arch"]}
        if config.dataset is None:
            values["dataset"] = ours.get("dataset", "imagenet")
        if not config.data and values.get("dataset", config.dataset) == ours.get("dataset"):
            values["data"] = ours.get("data", "")
        if config.image_size is None:
            values["image_size"] = self.facts["image_size"]
        return dataclasses.replace(config, **values)

    def load_images(self) -> tuple[Images, Images]:
        """Returns training and labelled test images; raises UserError if labels are missing."""
        config = self.config
        train, test = load_dataset(config.dataset, config.data, max_pixels=config.max_pixels)
        if test is None or train.labels is None:
            raise UserError(
                f"{self.config.data} has no labelled train/ and val/: evaluations need class "
                "folders in both",
            )
        if len(train.classes) < 2:
            raise UserError(f"{self.config.data} has one class: there is nothing to tell apart")
        return train, test

    def leave_out_unreadable(self) -> None:
        """Takes images that cannot be read out of training and test set, and their labels too."""
        for what, name in (("training", "train"), ("test", "test")):
            images = getattr(self, name)
            setattr(self, name, readable(images, what, self.workers))
            if count := len(images) - len(getattr(self, name)):
                self.unreadable[what] = count
                if what == "training":
                    kept = {*self.train.paths.tolist()}
                    gone = [path for path in images.paths.tolist() if path not in kept]
                    self.unreadable_names = {*map(os.fsdecode, gone)}

    def choose_folder(self, name: str) -> Path:
        """Returns --output, else a folder in the run, else one below runs/eval/."""
        config = self.config
        if hasattr(config, "dataset"):
            name = f"{name}-{config.dataset}"
        if config.output:
            folder = Path(config.output)
        elif self.facts["run"] is not None:
            folder = self.facts["run"] / "eval" / name
        else:
            source = Path(config.backbone).stem
            source = f"random-{config.arch}" if config.backbone == RANDOM else source
            folder = Path("runs/eval") / f"{source}-{self.facts['sha256'][:8]}" / name
        return choose(folder, config.resume)

    # -- images ---------------------------------------------------------------------------------

    @property
    def classes(self) -> int:
        return len(self.train.classes)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Returns a context: bf16 for the encoder with --precision bf16, no change otherwise."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    def features(
        self, images: Images, what: str, encoder: nn.Module | None = None, **view: Any
    ) -> Tensor:
        """Returns (m,D) features of this rank's padded share (`rank_share`) of the evaluation
        views, by the encoder of this evaluation or another; `view` is interpolation and square of
        `center_view`. Answers stop requests.
        """
        share = rank_share(len(images), padded=True)
        bar = self.progress_bar(len(share), f"features: {what}", "image")

        def after_batch(number: int) -> None:
            bar.update(number)
            if distributed.any_rank([self.requests.received is not None])[0]:
                bar.close()
                self.stop("while extracting features, which starts again")

        out = extract_features(
            encoder or self.encoder,
            images,
            share,
            self.config.image_size,
            self.workers,
            self.autocast,
            functools.partial(center_view, **view),
            after_batch,
        )
        bar.close()
        return out

    def correct(self, score: Callable[[Tensor], Tensor], features: Tensor, images: Images):
        """Returns (…, len(TOP)) fractions right among the k best classes, over all ranks.

        `features` are those of this rank's padded share of `images`, `score` maps rows of them
        (n,D) to scores (n,…,C).
        """
        share = rank_share(len(images))  # without the padding: nothing counts twice
        labels = torch.from_numpy(images.labels[share]).to(features.device)
        right = 0
        with torch.no_grad():
            for rows, truth in zip(
                features[: len(share)].split(1024), labels.split(1024), strict=True
            ):
                right = right + correct_in_top(score(rows), truth)
        if not isinstance(right, Tensor):  # fewer images than ranks: this one has none
            right = torch.zeros_like(correct_in_top(score(features[:1]), labels.new_zeros(1)))
        return distributed.all_reduce_sum(right.double()) / len(images)

    # -- resume ---------------------------------------------------------------------------------

    def begin(self, name: str) -> None:
        """Prepares the folder of the evaluation of this name, which says its protocol; raises
        UserError if it holds another evaluation. `self.config` is complete by now.
        """
        self.folder = distributed.from_rank_zero(self.choose_folder(name))
        holds = {
            "evaluation": name,
            "backbone_sha256": self.facts["sha256"],
            "images": f"{self.train.fingerprint()} {self.test.fingerprint()}",
        }
        self.store = Folder(self.folder, holds, self.config)
        if self.has_trained_further(self.store.saved or holds):
            raise UserError(
                f"{self.folder} holds this evaluation of an earlier state of "
                f"{self.facts['run']}: the run has trained further since; use another "
                "--output, or --resume never",
            )
        self.store.refuse_changes()
        self.store.lock()
        distributed.barrier()  # all ranks have read the folder before rank 0 writes in it
        if self.rank == 0:
            self.store.write_config()
        self.say(
            f"{name} · {self.facts['arch']} · {self.train.name}: {len(self.train):,} training "
            f"and {len(self.test):,} test images · {self.environment['devices']['name']} x "
            f"{self.ranks}"
        )
        if words := in_words(self.facts):
            self.say(f"backbone: {words}")
        self.say(f"folder: {self.folder}")
        if why := environment.untraceable(self.store.commit, self.store.dirty):
            self.warn(why)
        if is_random(self.facts) and self.calibrates:
            views = two_views("crop-flip", self.config.image_size)
            skip = self.config.on_bad_image == "skip"
            how = 0, self.workers, self.autocast, skip  # seed 0, as the control's weights
            self.encoder = calibrated(self.encoder, self.train, views, *how)

    def has_trained_further(self, saved: dict[str, Any]) -> bool:
        """Tells whether a saved evaluation is of this very run, and only its backbone differs."""
        if self.facts["run"] is None or saved.get("backbone_sha256") == self.facts["sha256"]:
            return False
        run = self.facts["run"].resolve()
        source = documents.expanded(str(saved.get("backbone", ""))).resolve()
        same = run in (source, source.parent) or self.folder.resolve().is_relative_to(run)
        return same and len(changes(self.store.holds, self.config, saved)) == 1

    def restore(self) -> dict[str, Any] | None:
        """Returns the state that an interrupted evaluation left in this folder, or None."""
        saved = self.store.restore()
        if saved is None:
            return None
        self.seconds_before = saved["seconds"]
        return saved["state"]

    def is_written(self, file: str = RECORD) -> bool:
        """Tells whether this evaluation has finished, which is when its record is there."""
        return distributed.from_rank_zero(
            finished_record(self.folder / file, self.facts["sha256"]) is not None
        )

    @contextlib.contextmanager
    def working(self) -> Iterator[None]:
        """Notes stop signals while it is active; the next step answers them."""
        with StopRequests() as self.requests:
            yield
        self.bar.close()

    def progress_bar(self, total: int, what: str, unit: str = "step", initial: int = 0) -> Progress:
        return Progress(total, what, unit, initial, silent=self.rank != 0)

    def after_step(self, state: Callable[[], dict[str, Any]], last: bool = False) -> None:
        """Answers stop requests. Saves if it is time, if asked to stop, or if this is a training's
        `last` step; `state()` is what to save.
        """
        self.bar.update()
        minutes = self.config.checkpoint_minutes
        due = self.rank == 0 and time.monotonic() - self.last_save > 60 * minutes > 0
        stop, save = distributed.any_rank([self.requests.received is not None, due])
        if stop or save or last:
            self.save(state())
        if stop:
            self.stop("saved")

    def stop(self, how: str) -> None:
        self.bar.close()
        name = self.requests.received.name if self.requests.received else "another rank"
        self.say(f"stopped by {name}, {how}; start the same command again to continue")
        distributed.stop()
        raise Stopped

    def save(self, state: dict[str, Any]) -> None:
        self.store.save(seconds=self.seconds(), state=state)
        self.last_save = time.monotonic()

    def seconds(self) -> float:
        """Returns the seconds spent on this evaluation, over all its starts."""
        return self.seconds_before + time.monotonic() - self.started

    def log(self, values: dict[str, Any]) -> None:
        """Writes one line of metrics.jsonl."""
        if self.rank == 0:
            metrics.write(self.folder / metrics.NAME, [values])

    def cut_log(self, step: int) -> None:
        """Drops what was logged after `step`, so that a continued evaluation logs it once."""
        if self.rank == 0:
            metrics.cut(self.folder / metrics.NAME, step, "log")

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    # -- the record -----------------------------------------------------------------------------

    def write_record(
        self,
        protocol: str,
        values: Sequence[float],
        hyperparameters: dict[str, Any],
        others: dict[str, Any],
        assumed: bool,
        note: str = "",
        file: str = RECORD,
        metric: str = "top1",
        scores: Sequence[dict[str, Any]] = (),
    ) -> Path:
        """Writes the record of `values` in percent, one for each seed, and warns if its schema
        refuses it; `scores` are further numbers with a protocol and a metric of their own. Returns
        its path.
        """
        config = self.config
        seeds = [*range(config.seed, config.seed + len(values))]
        found = self.encoder_fields()
        if self.own_settings:
            found["settings"] = found.get("settings", {}) | {**self.own_settings}
        hyperparameters = hyperparameters | {
            "evaluation": {
                "commit": self.store.commit,
                "dirty": self.store.dirty,
                "seeds": seeds,
                "hardware": f"{self.environment['devices']['name']} x {self.ranks}",
                "precision": config.precision,
            }
        }
        if hasattr(config, "image_size"):
            hyperparameters["evaluation"]["image_size"] = config.image_size
        if len(values) > 1:
            hyperparameters["evaluation"]["pretraining_seeds"] = found["seeds"]
            found |= {"seeds": seeds, "seeds_of": "evaluation"}
        elif found["seeds_of"] == "evaluation":
            found["seeds"] = seeds
        found |= {
            "dataset": self.dataset_fields(),
            "protocol": protocol,
            "assumed": assumed,
            "metric": metric,
            "hyperparameters": hyperparameters,
            "others": others,
            "dirty": found["dirty"] or self.store.dirty is not False,
            "command": [*found["command"], self.command],
            "evaluation_hours": round(self.seconds() / 3600, 4),
        }
        found = record.with_values(record.noted(found, note), values)
        if scores:
            found["scores"] = [record.with_values(score, score["values"]) for score in scores]
        path = self.folder / file
        if self.rank == 0:
            write(path, record.text_of(found))
            for problem in record.problems(found):
                self.warn(f"{path} cannot be stored as it is: {problem}")
            if file == RECORD:  # the evaluation is complete: nobody continues its training
                checkpoint.forget(self.folder)
        return path

    def encoder_fields(self) -> dict[str, Any]:
        """Returns the record's fields about the encoder."""
        return record_fields(self.facts, self.config, self.environment)

    def dataset_fields(self) -> dict[str, Any]:
        """Returns what data set the encoder was evaluated on, and what is missing of it."""
        name, copy = record.dataset_of(self.config.dataset, self.train.name)
        if name == "other":
            name, copy = documents.expanded(self.config.data).resolve().name, None
        missing = []
        if self.config.dataset == "imagenet":
            found = {"training": len(self.train), "validation": len(self.test)}
            missing = [
                f"{n} of {IMAGENET_IMAGES[split]} {split} images"
                for split, n in found.items()
                if n != IMAGENET_IMAGES[split]
            ]
        missing += [f"{n} unreadable {what} images left out" for what, n in self.unreadable.items()]
        return {"name": name, "copy": copy, "incomplete": ", ".join(missing) or None}

    def finish(self, text: str, paths: Sequence[Path]) -> None:
        """Says the last lines."""
        self.say(f"{text}, {duration(self.seconds())}")
        for path in paths:
            self.say(f"record: {path} (python results/record.py add stores it)")


def correct_in_top(scores: Tensor, labels: Tensor) -> Tensor:
    """Counts in (…, len(TOP)) the rows that have their label among the k best classes.

    scores (N,…,C), labels (N,). With fewer classes than k every row has. Ties, and scores that are
    not numbers, count against the label.
    """
    scores = scores.movedim(0, -2)  # (…,N,C)
    own = scores.gather(-1, labels.expand(scores.shape[:-1])[..., None])
    better = (~(scores < own)).sum(-1)  # the label itself, ties, and what is not a number
    return torch.stack([(better <= k).sum(-1) for k in TOP], dim=-1)


def held_out(labels: np.ndarray, imagenet: bool, seed: int) -> tuple[np.ndarray, np.ndarray, str]:
    """Returns (samples to train on, samples held out, a description); the held-out samples are to
    choose hyper-parameters by.

    They are class-balanced and drawn from `seed`: 10 per class on ImageNet; elsewhere 10 %, and at
    least 1 000 images if the training set has twice as many.
    """
    if imagenet:
        kept, held = split_classes(labels, lambda count: IMAGENET_PER_CLASS, seed)
        words = f"{IMAGENET_PER_CLASS} training images per class"
    else:
        share = HELD_OUT_SHARE
        if len(labels) >= 2 * HELD_OUT_LEAST:
            share = max(share, HELD_OUT_LEAST / len(labels))
        kept, held = split_classes(labels, lambda count: share * count, seed)
        words = f"{len(held)} of {len(labels)} training images"
    if not len(held):
        raise UserError(
            "no training image can be held out to choose a setting by, since every class has only "
            "one: give one setting instead of several"
        )
    return kept, held, words


def linear_weights(classes: int, dim: int, init: str, seed: int) -> Tensor:
    """Draws (classes, dim) float32 first weights of a classifier from `seed`; its bias is 0.

    "normal 0.01": the code of MoCo-v3, SimSiam, Barlow Twins, VICReg and SimCLR. "haiku": BYOL's
    code, a normal distribution of standard deviation 1/sqrt(dim) cut off at two of them. "torch":
    PyTorch's default, which SwAV's code leaves, uniform within 1/sqrt(dim). "zeros": SimCLR's
    command for linear evaluation.
    """
    weight = torch.zeros(classes, dim)
    if init == "zeros":
        return weight
    generator = torch.Generator().manual_seed(seed)
    if init == "haiku":
        std = dim**-0.5
        return nn.init.trunc_normal_(weight, 0.0, std, -2 * std, 2 * std, generator=generator)
    if init == "torch":
        return nn.init.uniform_(weight, -(dim**-0.5), dim**-0.5, generator=generator)
    return nn.init.normal_(weight, 0.0, 0.01, generator=generator)


def parse_numbers(text: str, flag: str) -> list[float]:
    """Parses numbers: "0.1,0.3" gives [0.1, 0.3]; raises UserError for anything else."""
    try:
        numbers = [float(word) for word in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(0 <= n < float("inf") for n in numbers):
        raise UserError(f"{flag} {text}: give numbers with commas between them, like 0.1,0.3")
    return list(dict.fromkeys(numbers))
