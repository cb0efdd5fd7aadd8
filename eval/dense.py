"""What detection and segmentation share: a backbone with feature maps in a larger model, trained
for a number of iterations and continued at any of them.
"""

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor, nn

from common import distributed
from common.config import MAX_PIXELS, free
from common.data.images import UNREADABLE, open_image, said
from common.errors import UserError
from common.progress import Progress, duration
from common.run import backbone
from eval.encoders import PIXELS
from eval.evaluation import Evaluation, TrainingConfig

RESNETS = ("resnet50", "resnet18")
LOG_EVERY = 20  # iterations between lines of metrics.jsonl, as detectron2 and ssl-transfer
THREADS = 16  # they read the headers of files
SAY_TIMES = 20  # lines on the screen in a whole training


@dataclass(frozen=True)
class DenseConfig(TrainingConfig):
    """The flags that detection and segmentation share."""

    data: str = free("")  # folder of the data set, in its own layout: see README.md
    # papers and detectron2: fp32; bf16 autocasts the model on a GPU
    precision: Literal["fp32", "bf16"] = "fp32"


class DenseEvaluation(Evaluation):
    """An evaluation whose encoder is a ResNet of torchvision's layout. Subclasses define
    `load_images`, `dataset_fields`, `trained` and `conclude`.
    """

    calibrates = False  # a random encoder is trained here, or its norms' statistics are a setting
    tf32 = True  # PyTorch's default for convolutions, which detectron2 leaves as it is

    def __init__(self, config: Any):
        super().__init__(config)
        arch = self.facts["arch"]
        if arch not in RESNETS:
            what = "raw pixels have" if arch == PIXELS else f"{arch} has"
            raise UserError(
                f"{config.backbone}: {what} no pyramid of feature maps: dense transfer takes "
                f"{' and '.join(RESNETS)}",
            )

    def with_defaults(self, config: Any) -> Any:
        return dataclasses.replace(config, arch=self.facts["arch"])

    def evaluate(self, name: str) -> None:
        """Runs the whole evaluation in the folder of this name: the subclass's `trained` gives what
        its `conclude` scores and writes as the record.
        """
        self.begin(name)
        with self.working():
            if not self.is_written():
                self.conclude(self.trained())
        self.say_result()
        distributed.stop()

    def over_ranks(self, model: nn.Module) -> nn.Module:
        """Gives batch norms the statistics of all ranks. Images differ in size from rank to rank,
        and only CUDA's SyncBatchNorm weights them rightly. UserError on several ranks without GPUs.
        """
        if self.ranks == 1:
            return model
        if self.device.type != "cuda":
            raise UserError("several ranks need a GPU each here: start one process")
        return nn.SyncBatchNorm.convert_sync_batchnorm(model)

    def check_body(self, body: nn.Module, features: Callable[[Tensor], Tensor]) -> None:
        """Raises AssertionError unless `body` holds exactly the encoder's tensors, and UserError
        unless it computes the encoder's features.

        `features` maps (1,3,S,S) to the pooled last feature map of `body` in eval mode.
        """
        mine, theirs = self.encoder.state_dict(), body.state_dict()
        counted = "num_batches_tracked"  # frozen batch norms count nothing
        wrong = [n for n in mine if n not in theirs and not n.endswith(counted)]
        wrong += [n for n in theirs if n not in mine]
        wrong += [
            n for n in mine if n in theirs and not torch.equal(mine[n], theirs[n].to(mine[n]))
        ]
        if wrong:
            raise AssertionError(f"the backbone did not arrive: {', '.join(wrong)}")
        same_features(self.encoder, features, self.device)

    def train_steps(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        total: int,
        batches: Callable[[int, int], Iterable],
        loss_of: Callable[[Any], dict[str, Tensor]],
        rate: Callable[[int], float],
    ) -> None:
        """Runs the iterations up to `total` that the checkpoint, if any, leaves. Saves by the
        clock, if asked to stop, and at the end.

        `batches` gives those of the iterations (first, last), `loss_of` maps one to its losses,
        `rate` an iteration to the learning rate. Everything random in an iteration follows from
        (seed, iteration, rank), so a continued training is the same one.
        """
        first = 0
        if saved := self.restore():
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            first = saved["step"]
        if first == total:
            return
        self.cut_log(first)
        self.bar = self.progress_bar(total, "training", initial=first)
        begun, last_log = time.monotonic(), (first, time.monotonic())
        say_every = max(1, total // SAY_TIMES)
        said = first // say_every
        model.train()
        for step, batch in enumerate(batches(first, total), first):
            for group in optimizer.param_groups:
                group["lr"] = rate(step)
            torch.manual_seed(step_seed(self.config.seed, step, self.rank))
            with self.autocast():
                losses = loss_of(batch)
            loss = sum(losses.values())
            if not math.isfinite(loss.item()):
                raise UserError(
                    f"the loss is {loss.item()} at iteration {step + 1}: lower the learning rate; "
                    "the previous checkpoint is kept"
                )
            optimizer.zero_grad()
            loss.backward()
            distributed.average_gradients(model)
            optimizer.step()
            done = step + 1
            if done % LOG_EVERY == 0 or done in (1, total):
                seconds = (time.monotonic() - last_log[1]) / (done - last_log[0])
                last_log = (done, time.monotonic())
                values = {"loss": loss, **losses}
                values = {n: distributed.mean_over_ranks(v).item() for n, v in values.items()}
                values |= {"lr": rate(step), "seconds_per_iteration": round(seconds, 4)}
                self.log({"kind": "step", "step": done, **values})
                if done == total or done // say_every > said:
                    said = done // say_every
                    left = (time.monotonic() - begun) * (total - done) / (done - first)
                    self.say(
                        f"iteration {done:,} of {total:,}: loss {values['loss']:.4f}, "
                        f"{seconds:.2f} s each, {duration(left)} left"
                    )
            self.after_step(
                lambda done=done: {
                    "step": done,
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                last=done == total,
            )
        self.bar.close()


def same_features(
    encoder: nn.Module, features: Callable[[Tensor], Tensor], device: torch.device
) -> None:
    """Raises UserError unless both give the same features (1,D) for the fixed input of
    common/run/backbone.py: a network with its stride elsewhere has the same names and shapes.
    """
    with torch.no_grad():
        x = backbone.fixed_input(64).to(device)
        ours, theirs = encoder(x.to(next(encoder.parameters()).dtype)).float(), features(x).float()
    worst = (ours - theirs).abs().max().item()
    if not worst <= backbone.TOLERANCE * ours.abs().max().item():
        raise UserError(
            "the detector computes other features than the backbone, though its tensors are equal: "
            "the stride belongs in the 3x3 convolutions (MODEL.RESNETS.STRIDE_IN_1X1 False)",
        )


def step_seed(seed: int, step: int, rank: int) -> int:
    """Returns the seed of everything random in one iteration of one rank."""
    return int(np.random.SeedSequence([seed, step, rank]).generate_state(1, np.uint64)[0] >> 1)


def load_image(path: str | Path, upright: bool = True, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Returns an RGB image, `upright` as its camera says; raises UserError if the file cannot be
    read.
    """
    try:
        with open_image(path, max_pixels) as image:
            return (ImageOps.exif_transpose(image) if upright else image).convert("RGB")
    except UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read ({said(error, path)}): mend it or fetch it again"
        ) from None


def check_each(items: Sequence, problem: Callable[[Any], str | None], what: str) -> None:
    """Raises UserError if `problem` says something of any item: it tells how many, and the first.
    Each rank checks its share by threads, which wait for the file system.
    """
    own = [items[i] for i in per_rank(len(items))]
    bar = Progress(len(own), "checking files", "file", silent=distributed.rank() != 0)
    wrong = []
    with bar, ThreadPoolExecutor(THREADS) as pool:
        for text in pool.map(problem, own):
            wrong += [text] if text else []
            bar.update()
    if wrong := gathered(wrong):
        raise UserError(
            f"{len(wrong):,} of {len(items):,} {what}, the first: {wrong[0]}: fetch them again"
        )


def or_error(load: Callable[[], Any]) -> Any:
    """Returns what `load` gives, or the text of its UserError: a loader's process says one line."""
    try:
        return load()
    except UserError as error:
        return str(error)


def raise_errors(items: list[Any]) -> list[Any]:
    """Returns the items; raises UserError if one of them is an error's text."""
    for item in items:
        if isinstance(item, str):
            raise UserError(item)
    return items


def per_rank(number: int) -> range:
    """Returns the numbers of this rank's share of `number` test images."""
    return range(distributed.rank(), number, distributed.world_size())


def gathered(items: list[Any]) -> list[Any]:
    """Returns the lists of all ranks, one after the other."""
    if distributed.world_size() == 1:
        return items
    import torch.distributed as dist

    parts: list[list[Any] | None] = [None] * distributed.world_size()
    dist.all_gather_object(parts, items)
    return [item for part in parts for item in part]
