"""The loop around a recipe: set-up, metrics, progress, signals, export.

What is not the paper's is here, so that a recipe's `main()` is the algorithm:

    run = Run("nnclr", config)
    model = run.place(...)
    run.begin(model.encoder, model=model, optimizer=optimizer, queue=queue)
    for step, (x1, x2), ids in run.batches(views):
        ...                                  # the paper
        run.log(loss=loss, lr=lr, z=z1)
    run.finish(...)
"""

import contextlib
import dataclasses
import functools
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from common import cards, distributed
from common.augment import View
from common.data.images import Images
from common.data.loaders import RankBatches, default_workers, view_loader
from common.data.sets import load_dataset
from common.data.splits import parts
from common.errors import PeerFailed, Stopped, UserError, say_error
from common.fast.batch_norm import rank_batch_norm
from common.fast.device_views import DeviceViews
from common.fast.pixels import to_input
from common.fast.small_maps import small_map_convolutions
from common.knn import knn_of_encoder
from common.optim import grad_norm
from common.progress import Progress, duration, on_terminal
from common.run import (
    backbone,
    checkpoint,
    environment,
    geometry,
    metrics,
    model_card,
    neighbours,
    pictures,
    results,
)
from common.run.allocator import keep_freed_memory
from common.run.calibrate import calibrated
from common.run.flags import config_hash, gpu_is_there, snapshot_epochs
from common.run.folder import Folder, choose, facts_of_run
from common.run.monitors import effective_rank, embedding_std, neighbour_purity, self_matches
from common.run.ranks import start
from common.run.readable import readable
from common.run.signals import StopRequests
from common.support_set import SupportSet

FLUSH_SECONDS = 1.0  # metrics wait at most so long on the device before they are read
# steps between the slower monitors: the effective rank's eigenvalues make the host wait for a GPU
MONITOR_STEPS = 20
SHOWN_QUERIES, SHOWN_NEIGHBOURS = 8, 8  # of neighbours.png


def check_batch(batch: int, ranks: int, micro_batch: int = 0) -> None:
    """Raises UserError unless the global batch divides into at least 2 images for each rank, and so
    does each piece of --micro-batch.
    """
    if batch % ranks:
        below, above = batch - batch % ranks, batch + ranks - batch % ranks
        raise UserError(
            f"--batch-size {batch} is the global batch and does not divide over {ranks} "
            f"ranks: take {below or above} or {above}",
        )
    if batch // ranks < 2:
        raise UserError(f"--batch-size {batch}: each of {ranks} ranks needs at least 2 images")
    if not micro_batch:
        return
    fits = [size for size in range(2 * ranks, batch + 1, ranks) if batch % size == 0]
    if micro_batch not in fits:
        below, above = ([m for m in fits if (m > micro_batch) == more] for more in (False, True))
        near = below[-1:] + above[:1]
        raise UserError(
            f"--micro-batch {micro_batch} must cut --batch-size {batch} into equal pieces of 2 or "
            f"more images for each of {ranks} ranks: take {' or '.join(map(str, near))}",
        )


def check_memory(config: Any, ranks: int) -> None:
    """Raises UserError if one batch's views, or the queue, alone need more memory than there is."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    images = config.batch_size // ranks
    flags = f"--batch-size {config.batch_size} --image-size {config.image_size}"
    needed = {flags: 2 * images * 3 * config.image_size**2}
    if hasattr(config, "queue_size"):
        flags = f"--queue-size {config.queue_size} --output-dim {config.output_dim}"
        needed[flags] = 4 * config.queue_size * config.output_dim
    for flags, least in needed.items():
        if least > there:
            raise UserError(
                f"{flags}: {least / 1e9:.4g} GB at least, and this machine has {there / 1e9:.4g} GB"
            )


def check_name(recipe: str, script: Path) -> None:
    """Raises UserError for a script of recipes/ that runs under the name of another: its numbers
    would be that one's.
    """
    if script.parent.name == "recipes" and script.stem != recipe:
        raise UserError(f'{script} runs as {recipe}: write Run("{script.stem}", config) there')


def default_folder(recipe: str, config: Any) -> Path:
    """Returns --output or runs/<recipe>/<dataset>-<arch>-<seed>, a new one with --resume never."""
    name = f"{config.dataset}-{config.arch}-{config.seed}"
    return choose(config.output or f"runs/{recipe}/{name}", config.resume)


class Run:
    """One training run of a recipe. Every rank makes one; rank 0 writes and speaks."""

    def __init__(self, recipe: str, config: Any):
        check_name(recipe, Path(sys.argv[0]))
        self.recipe, self.config = recipe, config
        self.device = start()
        if self.device.type == "cpu":
            keep_freed_memory()
        self.rank, self.ranks = distributed.rank(), distributed.world_size()
        if config.augment_device == "cuda" and not gpu_is_there():
            text = "--augment-device cuda: no GPU is visible here; use cpu"
            raise UserError(text)
        self.dtype = torch.float64 if config.precision == "fp64" else torch.float32
        check_batch(config.batch_size, self.ranks, config.micro_batch)
        check_memory(config, self.ranks)
        self.train, self.test = self.load_images()
        self.steps_per_epoch = len(self.train) // config.batch_size
        if self.steps_per_epoch == 0:
            raise UserError(
                f"{self.train.name} has {len(self.train)} training images, fewer than "
                f"--batch-size {config.batch_size}",
            )
        self.total_steps = self.steps_per_epoch * config.epochs
        self.last_step = min(self.total_steps, config.max_steps or self.total_steps)
        warmup = getattr(config, "warmup_epochs", 0)
        if 0 < config.epochs <= warmup:
            self.warn(f"the lr warm-up of {warmup:g} epochs covers the whole run")
        self.workers = config.workers
        if self.workers < 0:
            self.workers = default_workers(distributed.ranks_on_this_machine())
        self.folder = distributed.from_rank_zero(default_folder(recipe, config))
        self.snapshots = snapshot_epochs(config)
        self.geometry_epochs = geometry.epochs_of(config)
        if self.geometry_epochs and self.test is None:
            raise UserError("--geometry-points measures test images, and there are none")
        self.step, self.seconds = 0, 0.0
        self.last_saved_step, self.last_knn = 0, None
        self.waiting: list[dict[str, Any]] = []  # logged, not yet read from the device
        self.epoch_records: list[dict[str, Any]] = []  # step records of the present epoch
        self.unsaid: list[dict[str, Any]] = []  # step records since the last line of progress
        self.seed_everything()

    # -- set-up ---------------------------------------------------------------------------------

    def load_images(self) -> tuple[Images, Images | None]:
        """Loads the dataset, or the parts of it that are asked for; what is to be downloaded comes
        first, by rank 0 alone.
        """
        config, error = self.config, None
        if config.download and self.rank == 0:
            try:
                load_dataset(config.dataset, config.data, download=True)
            except UserError as problem:
                error = str(problem)
        if (error := distributed.from_rank_zero(error)) is not None:
            raise UserError(error)
        images = load_dataset(config.dataset, config.data, max_pixels=config.max_pixels)
        how = config.train_images, config.validation_share, config.subset_seed, config.scored_on
        return parts(*images, *how)

    def seed_everything(self) -> None:
        """Seeds initialisation in this very process (data order and views have their own keys)."""
        random.seed(self.config.seed)
        np.random.seed(self.config.seed % 2**32)
        torch.manual_seed(self.config.seed)
        torch.backends.cudnn.benchmark = False  # bit-identity after a restart
        torch.backends.cudnn.deterministic = True
        if self.config.precision == "fp32":
            torch.backends.cudnn.allow_tf32 = False  # PyTorch's default for convolutions is True

    def place(self, module: nn.Module) -> nn.Module:
        """Puts a module on this run's device, in its precision, with batch norms over all ranks."""
        module = module.to(self.device, self.dtype).to(memory_format=torch.channels_last)
        module = small_map_convolutions(rank_batch_norm(module, self.device), self.device)
        distributed.same_on_all_ranks(module)
        return module

    def autocast(self) -> contextlib.AbstractContextManager:
        """Returns a context in which networks run in bf16, if --precision asks for it."""
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.config.precision == "bf16"
        )

    def warn(self, text: str) -> None:
        if self.rank == 0:
            print(f"warning: {text}", flush=True)

    def say(self, text: str) -> None:
        if self.rank == 0:
            tqdm.write(text)  # above the bar, if there is one

    # -- begin: a new run or an exact continuation ----------------------------------------------

    def begin(self, encoder: nn.Module, **state: Any) -> None:
        """Restores what the folder's checkpoint holds, if any. `state` names everything that the
        next step depends on: modules, optimizer, support set.
        """
        self.encoder, self.state = encoder, state
        self.labels = None  # of the training images on the device, for the monitors of look-ups
        for name, item in state.items():
            if isinstance(item, SupportSet) and name == "queue":  # neighbours are looked up in it
                self.warn_of_long_queue(item.size)
                if self.train.labels is not None:
                    self.labels = torch.from_numpy(self.train.labels).to(self.device)
        self.fingerprint = self.train.fingerprint()
        self.store = Folder(self.folder, {"recipe": self.recipe}, self.config)
        self.store.refuse_changes()
        finished = self.is_finished()
        if not finished:
            self.store.lock()
            finished = self.is_finished()  # the process that had the lock may have done it
        saved = self.store.restore()
        if saved is not None:
            self.restore(saved)
        elif finished:
            self.step = self.last_step  # results without a checkpoint: nothing is trained anew
        elif distributed.from_rank_zero((self.folder / results.NAME).exists()):
            raise UserError(
                f"{self.folder} holds the results of another length or a damaged backbone, and no "
                "checkpoint to go on from: use another --output",
            )
        if self.step > self.last_step:
            raise UserError(
                f"{self.folder} is at step {self.step}, beyond --max-steps {self.last_step}"
            )
        description = environment.describe(self.device, self.ranks)
        description["steps"] = {"per_epoch": self.steps_per_epoch, "last": self.last_step}
        distributed.barrier()  # all ranks have read the folder before rank 0 writes in it
        facts = facts_of_run(self.recipe, self.config, self.store.saved)
        if self.rank == 0 and finished:
            self.store.complete_config(**facts)
            print(f"{self.folder} is finished, its results again; --resume never trains anew")
        elif self.rank == 0:
            self.store.write_config(**facts)
            kept = metrics.cut(self.folder / metrics.NAME, self.step or -1)
            if self.geometry_epochs:
                metrics.cut(self.folder / geometry.NAME, self.step or -1, "geometry")
            epoch = self.epoch_of(self.step)
            self.epoch_records = [
                r for r in kept if r["kind"] == "step" and r.get("epoch") == epoch
            ]
            environment.note_start(self.folder, description)
            (self.folder / results.FAILED).unlink(missing_ok=True)  # it is tried again
        self.wandb = metrics.Wandb(
            self.config.wandb and self.rank == 0 and not finished,
            self.folder,
            self.recipe,
            dataclasses.asdict(self.config),
        )
        self.tensorboard = metrics.TensorBoard(
            self.config.tensorboard and self.rank == 0 and not finished, self.folder, self.step
        )
        self.introduce(description)

    def is_finished(self) -> bool:
        """Tells whether the folder holds the results of this run's very last step."""
        done = self.rank == 0 and results.is_finished(self.folder, self.last_step)
        return distributed.from_rank_zero(done)

    def restore(self, saved: dict[str, Any]) -> None:
        """Puts a checkpoint's state into this run; raises UserError if it does not fit."""
        where = f"the checkpoint in {self.folder}"
        try:
            if saved["images"] != self.fingerprint:
                raise UserError(
                    f"the images in --data are not those of {where} "
                    f"(was {saved['images']}, is {self.fingerprint})",
                )
            for name, item in self.state.items():
                if isinstance(item, SupportSet):
                    item.load_checkpoint_state(saved["state"][name])
                else:
                    item.load_state_dict(saved["state"][name])
            self.step, self.seconds = saved["step"], saved["seconds"]
        except (LookupError, AttributeError, RuntimeError, ValueError, TypeError) as error:
            text = str(error).split("\n")[0]
            raise UserError(f"{where} does not fit this run: {text}") from None
        self.last_saved_step = self.step

    def introduce(self, description: dict[str, Any]) -> None:
        config = self.config
        self.say(
            f"{self.recipe} · {config.arch} · {self.train.name}: {len(self.train):,} images · "
            f"batch {config.batch_size} · {config.epochs} epochs of {self.steps_per_epoch} steps · "
            f"{config.precision} · {description['devices']['name']} x {self.ranks}"
        )
        if config.validation_share and config.scored_on == "held-out":
            self.say(f"k-NN is scored on {len(self.test):,} held-out training images")
        if config.knn_every and not self.measures_knn:
            lack = "labelled test images" if self.test is None else "second class"
            self.say(f"no {lack}: no k-NN accuracy")
        if self.step and self.step < self.last_step:
            self.say(f"continues from step {self.step} of {self.last_step}")
        if self.last_step < self.total_steps:
            self.say(f"stops at step {self.last_step} of {self.total_steps} (--max-steps)")
        self.say(f"run folder: {self.folder}")
        if why := environment.untraceable(self.store.commit, self.store.dirty):
            self.warn(why)

    def warn_of_long_queue(self, size: int) -> None:
        if size > len(self.train) / 2:
            self.warn(
                f"a queue of {size} is longer than half of the {len(self.train)} training images: "
                "look-ups will often find the query's own image (self_matches in metrics.jsonl); "
                f"--queue-size {len(self.train) // 2} or less would not"
            )

    # -- the loop -------------------------------------------------------------------------------

    def epoch_of(self, step: int) -> int:
        """Returns the epoch, counted from 1, that the step of this number (from 0) belongs to."""
        return step // self.steps_per_epoch + 1

    def batches(self, views: Sequence[View]) -> Iterator[tuple[int, list[Tensor], Tensor]]:
        """Yields (step from 0, a normalised (N,3,H,W) per view, image numbers (N,)) for each step.

        After the body of each step left come metrics, k-NN, checkpoint and stop requests.
        """
        if self.step >= self.last_step:
            return
        config = self.config
        order = RankBatches(
            len(self.train),
            config.batch_size,
            config.seed,
            self.step,
            self.last_step,
            self.rank,
            self.ranks,
        )
        on_device = None
        if config.augment_device == "cuda":
            on_device = DeviceViews(self.train, views, self.device)
        loader = view_loader(
            self.train,
            views,
            order,
            self.workers,
            skip_bad_images=config.on_bad_image == "skip",
            pin_memory=self.device.type == "cuda",
            stage=on_device.stage if on_device else "views",
            input=config.input,
        )
        with StopRequests() as self.requests, self.progress_bar() as self.bar:
            self.evaluate_at_start(views)
            self.started = self.last_flush = self.last_save = time.monotonic()
            asked = time.monotonic()
            for pixels, ids, problems, must_stop in loader:
                self.waited, self.step_seconds = time.monotonic() - asked, 0.0
                report_problems(problems, must_stop)
                if on_device:
                    pixels = on_device(pixels, ids)
                inputs = [to_input(view, self.device, self.dtype) for view in pixels]
                self.ids = ids.to(self.device, non_blocking=True)
                yield self.step, inputs, self.ids
                self.time_step(time.monotonic() - asked)
                self.after_step()
                asked = time.monotonic()

    def progress_bar(self) -> Progress:
        return Progress(
            self.last_step,
            self.recipe,
            initial=self.step,
            leave=True,
            silent=self.rank != 0,
            every=self.config.log_every,
        )

    def log(
        self,
        loss: Tensor,
        lr: float,
        z: Tensor,
        retrieved: Tensor | None = None,
        **own: Tensor | float,
    ) -> None:
        """Notes this step's metrics: loss and rate, the norm of the model's gradient, whether the
        embedding z (N,D) collapses, and the recipe's own values. Of `retrieved` (N,k), the numbers
        of the images that were looked up for the batch, it notes the share with the query's label
        and the share that is the query itself. Tensors stay on the device until the next flush.
        """
        values = {"lr": lr, **own, "embedding_std": embedding_std(z)}
        if self.step % MONITOR_STEPS == 0:
            values["effective_rank"] = effective_rank(z)
        if retrieved is not None:
            values["self_matches"] = self_matches(self.ids, retrieved)
            if self.labels is not None:
                values["neighbour_purity"] = neighbour_purity(self.ids, retrieved, self.labels)
        self.waiting.append(
            {"kind": "step", "epoch": self.epoch_of(self.step), "step": self.step + 1}
            | {"loss": loss.detach(), "grad_norm": grad_norm(self.state["model"]).detach()}
            | {n: v.detach() if isinstance(v, Tensor) else v for n, v in values.items()}
        )

    def time_step(self, seconds: float) -> None:
        """Adds to the time of the step that was logged last."""
        self.seconds += seconds
        self.step_seconds += seconds
        if self.waiting:
            self.waiting[-1] |= {
                "images_per_second": round(self.config.batch_size / self.step_seconds, 2),
                "data_wait": round(self.waited / self.step_seconds, 4),
                "memory_gb": round(self.memory_gb(), 3),
            }

    def memory_gb(self) -> float:
        """Returns the peak memory in GB: of the GPU, or of this process on CPU."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e9
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9

    def after_step(self) -> None:
        self.step += 1
        self.bar.advance()
        every = self.config.log_every
        line_due = bool(every) and self.step % every == 0  # the same on all ranks
        now, first = time.monotonic(), self.rank == 0
        stop, save, flush = distributed.any_rank(
            [
                self.requests.received is not None,
                first and now - self.last_save > 60 * self.config.checkpoint_minutes > 0,
                first and now - self.last_flush > FLUSH_SECONDS,
            ]
        )
        epoch_ends, done = self.step % self.steps_per_epoch == 0, self.step == self.last_step
        if flush or line_due or save or stop or epoch_ends or done:
            self.flush()
            self.say_progress()
        if epoch_ends:
            self.end_epoch()
        if save or stop or epoch_ends or done:
            self.save()
        if epoch_ends:
            self.keep_snapshot(self.step // self.steps_per_epoch)
        if stop and not done:
            name = self.requests.received.name if self.requests.received else "another rank"
            self.say(
                f"stopped by {name} at step {self.step} of {self.last_step}, saved; "
                "start the same command again to continue"
            )
            self.end_tracking()
            distributed.stop()  # left to the interpreter's exit, gloo may abort and hide code 75
            raise Stopped

    def flush(self) -> None:
        """Reads the waiting metrics from the device, as means over ranks, and writes them."""
        if self.device.type == "cuda" and self.waiting:
            # launches run ahead: what is left to compute is part of the steps' time
            started = time.monotonic()
            torch.cuda.synchronize(self.device)
            self.time_step(time.monotonic() - started)
        self.last_flush = time.monotonic()
        self.check_queues()
        records, self.waiting = self.waiting, []
        places = [(r, n) for r in records for n, v in r.items() if isinstance(v, Tensor)]
        if places:
            values = torch.stack([r[n].to(self.device).double() for r, n in places])
            for (record, name), value in zip(
                places, distributed.mean_over_ranks(values).tolist(), strict=True
            ):
                record[name] = value
        good = [r for r in map(metrics.finite, records) if {"loss", "grad_norm"} <= set(r)]
        if self.rank == 0:
            metrics.write(self.folder / metrics.NAME, good)
            self.epoch_records += good
            self.unsaid += good if self.bar.says else []
            self.track(good)
        if len(good) < len(records):
            bad = next(r for r in records if not {"loss", "grad_norm"} <= set(metrics.finite(r)))
            what = f"the loss is {bad['loss']} and its gradient {bad['grad_norm']} at step "
            what += f"{bad['step']} (epoch {bad['epoch']})"
            if self.rank == 0:
                results.write_failure(self.folder, what, bad, self.seconds)
            raise UserError(
                f"{what}: the checkpoint of step {self.last_saved_step} is kept; try a lower --lr "
                "or fp32",
            )
        if good:
            self.bar.bar.set_postfix_str(f"loss {good[-1]['loss']:.3f}", refresh=False)

    def say_progress(self) -> None:
        """Says a line of progress if one is due: means over the steps since the last one."""
        if not self.bar.due or not self.unsaid:
            return
        found = metrics.means(self.unsaid)
        left = (self.last_step - self.step) * self.seconds / max(1, self.step)
        epoch = self.epoch_of(self.step - 1)
        text = f"epoch {epoch} of {self.config.epochs}, step {self.step:,} of {self.last_step:,}: "
        text += f"loss {found['loss']:.4f}, lr {self.unsaid[-1].get('lr', 0):.3g}, "
        text += f"{found.get('images_per_second', 0):.0f} images/s, {duration(left)} left"
        self.unsaid = []
        self.bar.say(text)

    def track(self, records: list[dict[str, Any]]) -> None:
        """Sends lines of metrics to --wandb and --tensorboard."""
        self.wandb.log(records)
        self.tensorboard.log(records)

    def end_tracking(self) -> None:
        self.wandb.finish()
        self.tensorboard.finish()

    def check_queues(self) -> None:
        """Raises on all ranks if a look-up of one found too few entries, which on a GPU is known
        only here. Ranks agree on it, so that none waits for another that has stopped.
        """
        problem: UserError | None = None
        try:
            for item in self.state.values():
                if isinstance(item, SupportSet):
                    item.check()
        except UserError as error:
            problem = error
        if distributed.any_rank([problem is not None])[0]:
            raise problem or PeerFailed

    def left_out(self) -> dict[str, int]:
        """Returns how many images k-NN left out because they cannot be read, if any."""
        if not self.measures_knn or self.config.on_bad_image != "skip":
            return {}
        sizes = zip(("training", "test"), (self.train, self.test), self.knn_images, strict=True)
        counts = {what: len(whole) - len(kept) for what, whole, kept in sizes}
        return {what: count for what, count in counts.items() if count}

    def keep_snapshot(self, epoch: int) -> None:
        """Keeps the checkpoint just saved as snapshots/epoch-….pt, if --snapshot-epochs asks."""
        if self.rank == 0 and epoch in self.snapshots:
            checkpoint.keep(self.folder, self.folder / "snapshots" / f"epoch-{epoch:04}.pt")

    def evaluate_at_start(self, views: Sequence[View]) -> None:
        """Scores the random encoder, calibrated, by k-NN, so that a run says what it learned."""
        if self.step == 0 and 0 in self.snapshots:
            self.save()
            self.keep_snapshot(0)
        if self.step or not self.measures_knn:
            return
        skip = self.config.on_bad_image == "skip"
        how = self.config.seed, self.workers, self.autocast, skip
        accuracy = self.knn(calibrated(self.encoder, self.train, views, *how))
        start = {"kind": "epoch", "epoch": 0, "step": 0, "knn": accuracy, "calibrated": True}
        self.write_epoch(start)
        self.say(f"epoch 0: k-NN {accuracy:.1%} (random encoder)")

    def end_epoch(self) -> None:
        epoch = self.step // self.steps_per_epoch
        record = {"kind": "epoch", "epoch": epoch, "step": self.step}
        record |= metrics.means(self.epoch_records)
        last = self.step == self.last_step
        due = self.measures_knn and (last or epoch % self.config.knn_every == 0)
        self.last_knn = accuracy = self.knn(self.encoder) if due else None
        if accuracy is not None:
            record["knn"] = accuracy
        self.epoch_records = []
        self.write_epoch(record)
        if epoch in self.geometry_epochs:
            self.write_geometry(epoch)
        left = (self.last_step - self.step) * self.seconds / max(1, self.step)
        text = f"epoch {epoch} of {self.config.epochs}: loss {record.get('loss', 0):.4f}"
        text += f", k-NN {accuracy:.1%}" if accuracy is not None else ""
        text += f", {record.get('images_per_second', 0):.0f} images/s"
        self.say(f"{text}, {duration(left)} left")

    def write_geometry(self, epoch: int) -> None:
        """Writes a line of geometry.jsonl: how representation and embedding lie (geometry.py)."""
        how = self.config.image_size, self.workers, self.autocast
        found = geometry.measure(self.state["model"], self.test, *how)
        if self.rank == 0:
            line = {"kind": "geometry", "epoch": epoch, "step": self.step} | found
            metrics.write(self.folder / geometry.NAME, [line])

    def write_part_of_epoch(self, accuracy: float) -> None:
        """Writes the line of a run that --max-steps ends within an epoch, at a fractional number of
        epochs; a run that goes on drops it (`metrics.cut`).
        """
        record = {"kind": "epoch", "epoch": self.step / self.steps_per_epoch, "step": self.step}
        self.write_epoch(record | metrics.means(self.epoch_records) | {"knn": accuracy})

    @property
    def measures_knn(self) -> bool:
        several = len(self.train.classes) > 1  # in one class everything is right
        return bool(self.config.knn_every) and self.test is not None and several

    def knn(self, encoder: nn.Module) -> float:
        """Returns the k-NN accuracy of an encoder on the test images."""
        how = self.config.image_size, self.workers, self.autocast
        images = sum(-(-len(part) // self.ranks) for part in self.knn_images)  # of this rank
        silent = self.rank != 0 or on_terminal()  # a terminal has the run's own bar
        with Progress(images, "k-NN", "image", silent=silent) as progress:
            return knn_of_encoder(encoder, *self.knn_images, *how, after_batch=progress.update)

    @functools.cached_property
    def knn_images(self) -> tuple[Images, Images]:
        """Returns the training and test images for k-NN, unreadable ones left out if so asked."""
        if self.config.on_bad_image != "skip":
            return self.train, self.test
        parts = (self.train, "training"), (self.test, "test")
        return tuple(readable(images, what, self.workers) for images, what in parts)

    def write_epoch(self, record: dict[str, Any]) -> None:
        if self.rank == 0:
            metrics.write(self.folder / metrics.NAME, [metrics.finite(record)])
            self.track([metrics.finite(record)])

    def save(self) -> None:
        """Saves the checkpoint of this step (private queues are gathered, rank 0 writes)."""
        state = {
            name: item.checkpoint_state() if isinstance(item, SupportSet) else item.state_dict()
            for name, item in self.state.items()
        }
        self.store.save(
            step=self.step,
            epoch=self.step / self.steps_per_epoch,
            seconds=self.seconds,
            images=self.fingerprint,
            state=state,
        )
        self.last_save, self.last_saved_step = time.monotonic(), self.step

    # -- the end --------------------------------------------------------------------------------

    def finish(
        self,
        dim: int,
        queue: SupportSet | None = None,
        select: Callable[[Tensor], Tensor] | None = None,
        weigh: Callable[[Tensor, Tensor], Tensor] | None = None,
        k: int = SHOWN_NEIGHBOURS,
        marks: dict[str, float] | None = None,
    ) -> None:
        """Exports the backbone, draws pictures, writes results and prints them. `dim` is the width
        of the watched embedding. With a queue it draws neighbours.png too: `select` maps images to
        the embedding that looks neighbours up, `weigh` images and their k neighbours to the
        positiveness. `marks` are epochs at which something sets in, by its name, for the curves.
        """
        if not self.is_finished():
            accuracy = distributed.from_rank_zero(self.last_knn)
            # None: stopped within an epoch, or continued at its end
            if accuracy is None and self.measures_knn:
                accuracy = self.knn(self.encoder)
                if self.step % self.steps_per_epoch:
                    self.write_part_of_epoch(accuracy)
            if self.rank == 0:
                title = f"{self.recipe}, {self.config.arch}, {self.train.name}"
                title += f", seed {self.config.seed}"
                records = metrics.read(self.folder / metrics.NAME)
                card = cards.load().get(self.recipe)
                own = card.metrics if card else {}
                pictures.draw_curves(self.folder / "curves.png", records, title, dim, own, marks)
                try:
                    if queue is not None:
                        self.draw_neighbours(title, queue, select, weigh, k)
                except UserError as error:  # an unreadable image costs the picture, not the run
                    self.warn(f"no neighbours.png: {error}")
                self.write_results(accuracy)
                self.end_tracking()
        if self.rank == 0:
            results.say(self.folder)
        distributed.stop()

    def draw_neighbours(
        self,
        title: str,
        queue: SupportSet,
        select: Callable[[Tensor], Tensor],
        weigh: Callable[[Tensor, Tensor], Tensor] | None,
        k: int,
    ) -> None:
        """Draws neighbours.png, of a few images spread over the training set."""
        for module in self.state.values():
            if isinstance(module, nn.Module):
                module.eval()
        queries = np.linspace(0, len(self.train) - 1, min(SHOWN_QUERIES, len(self.train)))
        queries, size = queries.round().astype(int), self.config.image_size
        at = neighbours.Lookup(self.step / self.steps_per_epoch, queue, select, weigh)
        found = neighbours.look_up(at, self.train, queries, size, k).best(SHOWN_NEIGHBOURS)
        path = self.folder / "neighbours.png"
        neighbours.draw(
            path, self.train, queries, [found], size, f"neighbours in the queue: {title}"
        )

    def write_results(self, accuracy: float | None) -> None:
        """Exports the backbone, then writes results.json."""
        config = self.config
        facts = {
            "recipe": self.recipe,
            "epoch": self.step / self.steps_per_epoch,
            "commit": self.store.commit,
            "config_hash": config_hash(config),
        }
        path = self.folder / backbone.NAME
        backbone.export_backbone(path, self.encoder, config.arch, config.image_size, facts)
        numbers = {
            "dirty": self.store.dirty,
            "step": self.step,
            "dataset": self.train.name,
            "knn": accuracy,
            "unreadable": self.left_out(),
            "hours": self.seconds / 3600,
            "images_per_second": config.batch_size * self.step / max(self.seconds, 1e-9),
        }
        results.write(self.folder, facts | numbers)
        self.write_model_card(facts | numbers)

    def write_model_card(self, facts: dict[str, Any]) -> None:
        """Writes MODEL_CARD.md of the backbone just exported."""
        config, scored = self.config, self.knn_images[1] if self.measures_knn else ()
        held_out = config.validation_share and config.scored_on == "held-out"
        facts = facts | {
            "method": cards.method_of(self.recipe, dataclasses.asdict(config)),
            "embed_dim": self.encoder.embed_dim,
            "images": len(self.train),
            "epochs": config.epochs,
            "batch_size": config.batch_size,
            "seed": config.seed,
            "settings": config.settings,
            "knn_before": results.read(self.folder)["knn_before"],
            "scored": len(scored),
            "scored_on": "held-out training" if held_out else "test",
        }
        about = backbone.metadata_of(config.arch, config.image_size)
        model_card.write_card(self.folder, about, facts)


def report_problems(problems: list[str], must_stop: bool) -> None:
    """Says what a batch's unreadable images were; all ranks stop if one of them must."""
    if must_stop:
        distributed.any_rank([True])  # all ranks stop here, none waits for this one
        raise UserError(problems[-1], this_rank=True)
    for text in problems:
        say_error(f"{text.split(': mend')[0]}; the next image takes its place")
    if distributed.any_rank([False])[0]:
        raise PeerFailed
