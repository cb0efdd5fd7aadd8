"""The keyed order of samples, and loaders of views and of evaluation images."""

import functools
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.augment import Draw, View, crop_only, draw_row, view_rng
from common.data.images import ArrayImages, CenterView, Images, PackedImages
from common.distributed import variable
from common.errors import UserError
from common.fast import pixels
from common.fast.center import center_view

SKIP_LIMIT = 100  # unreadable images in a row before --on-bad-image skip gives up


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """Returns the order of the samples in an epoch, a permutation keyed by (seed, epoch)."""
    bits = np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, 1])  # counter 1: not a view's
    return np.random.Generator(bits).permutation(images)


class RankBatches:
    """One rank's part of the global batches from step `first` to before step `last`.

    Yields lists of (epoch, sample). The global batch of a step is cut into equal runs in rank
    order, so that gathers give the order of one process; the incomplete batch at an epoch's end
    is dropped.
    """

    def __init__(
        self, images: int, batch: int, seed: int, first: int, last: int, rank: int, ranks: int
    ):
        self.images, self.batch, self.seed = images, batch, seed
        self.first, self.last, self.rank, self.ranks = first, last, rank, ranks

    def __len__(self) -> int:
        return max(0, self.last - self.first)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        steps_per_epoch = self.images // self.batch
        local = self.batch // self.ranks
        order, order_epoch = None, -1
        for step in range(self.first, self.last):
            epoch, place = divmod(step, steps_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = epoch_order(self.images, self.seed, epoch), epoch
            start = place * self.batch + self.rank * local
            yield [(epoch, int(sample)) for sample in order[start : start + local]]


def load_or_next(
    images: Images,
    sample: int,
    skip: bool,
    load: Callable[[int], Any] | None = None,
) -> tuple[Any | None, int, list[str]]:
    """Returns (image, its number, error texts). If an image is unreadable, `skip` gives the next
    readable one in its place; else the image is None. `load` takes the place of `images.load`.
    """
    problems: list[str] = []
    while True:
        try:
            return (load or images.load)(sample), sample, problems
        except UserError as error:
            problems.append(str(error))
            if not skip or len(problems) > SKIP_LIMIT:
                return None, sample, problems
            sample = (sample + 1) % len(images)


class ImageDataset(torch.utils.data.Dataset):
    """A dataset of `self.images` that learns of a batch before its first item is asked for, so that
    what lies in shards is read ahead.
    """

    images: Images

    def __getitems__(self, keys: list) -> list:
        if isinstance(self.images, PackedImages):
            self.images.expect([self.sample(key) for key in keys])
        return [self[key] for key in keys]

    def sample(self, key: Any) -> int:
        """Returns the number of the image that a key asks for."""
        return int(key[-1])


class ViewDataset(ImageDataset):
    """Maps (epoch, sample) to the sample's views, its number, and what went wrong.

    An unreadable image gives an error text instead of an exception, so that the loop can name the
    file in one line; with `skip` the next readable image takes its place. `input` is that of
    `config.RunConfig`.
    """

    def __init__(
        self, images: Images, views: Sequence[View], seed: int, skip: bool, input: str = "exact"
    ):
        self.images, self.views, self.seed, self.skip = images, views, seed, skip
        self.input = input
        if input != "reference":
            pixels.compile_kernels()

    def __getitem__(self, key: tuple[int, int]):
        epoch, sample = key
        load = self.exact if self.input == "exact" else self.reference
        views, sample, problems = load_or_next(
            self.images, sample, self.skip, functools.partial(load, epoch)
        )
        return views, sample, problems

    def draws(self, epoch: int, sample: int, width: int, height: int) -> list[Draw]:
        return [
            view.draw(view_rng(self.seed, epoch, sample, number), width, height)
            for number, view in enumerate(self.views)
        ]

    def make(self, draws: list[Draw], render: Callable[[View, Draw], Tensor]) -> list:
        return [render(view, draw) for view, draw in zip(self.views, draws, strict=True)]

    def reference(self, epoch: int, sample: int) -> list:
        image = self.images.load(sample)
        draws = self.draws(epoch, sample, *image.size)
        return self.make(draws, lambda view, draw: view.apply(image, draw))

    def exact(self, epoch: int, sample: int) -> list:
        array = self.images.load_array(sample)
        draws = self.draws(epoch, sample, array.shape[1], array.shape[0])
        return self.make(draws, lambda view, draw: pixels.render(view, array, draw))


class CropDataset(ViewDataset):
    """A ViewDataset that gives of each view its crop, uint8 (3,size,size), and its draw, (16,):
    `common.fast.device_views` does the rest.
    """

    def make(self, draws: list[Draw], render: Callable[[View, Draw], Tensor]) -> list:
        crops = super().make([crop_only(draw) for draw in draws], render)
        return [*zip(crops, map(torch.from_numpy, map(draw_row, draws)), strict=True)]


class DrawDataset(ViewDataset):
    """A CropDataset for images of one size in memory, which `common.fast.device_views` crops too:
    it gives the draws alone, with nothing for the pixels.
    """

    def __getitem__(self, key: tuple[int, int]):
        epoch, sample = key
        height, width = self.images.pixels.shape[1:3]
        rows = map(draw_row, self.draws(epoch, sample, width, height))
        return [(torch.empty(0), torch.from_numpy(row)) for row in rows], sample, []


STAGES = {"views": ViewDataset, "crops": CropDataset, "draws": DrawDataset}


def collate(items: list) -> tuple[list, Tensor, list[str], bool]:
    """Returns per view uint8 (N,3,H,W), or a tuple of that and the draws (N,16); then samples (N,),
    problems, and whether a problem must stop the run.
    """
    problems = [text for _, _, texts in items for text in texts]
    if any(views is None for views, _, _ in items):
        return [], torch.empty(0), problems, True
    views = [stack(column) for column in zip(*(views for views, _, _ in items), strict=True)]
    return views, torch.tensor([sample for _, sample, _ in items]), problems, False


def stack(column: tuple) -> Tensor | tuple[Tensor, ...]:
    if isinstance(column[0], tuple):
        return tuple(torch.stack(part) for part in zip(*column, strict=True))
    return torch.stack(column)


def view_loader(
    images: Images,
    views: Sequence[View],
    batches: RankBatches,
    workers: int,
    skip_bad_images: bool = False,
    pin_memory: bool = False,
    stage: str = "views",
    input: str = "exact",
) -> torch.utils.data.DataLoader:
    """Returns a loader over all steps of the run: workers start once and prefetch across epochs.
    `stage` is how far they go: whole views, or what `device_views` finishes (crops, draws).
    """
    return torch.utils.data.DataLoader(
        STAGES[stage](images, views, batches.seed, skip_bad_images, input),
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=pin_memory,
        worker_init_fn=ignore_stop_signals,
    )


class CenterDataset(ImageDataset):
    """Maps a sample to its evaluation view, uint8 (3,size,size), or what is wrong with its file."""

    def __init__(self, images: Images, samples: np.ndarray, size: int, view: CenterView):
        self.images, self.samples, self.size, self.view = images, samples, size, view

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, key: int) -> int:
        return int(self.samples[key])

    def __getitem__(self, index: int) -> Tensor | str:
        try:
            return self.view(self.images.load(self.sample(index)), self.size)
        except UserError as error:
            return str(error)


def collate_center(items: list[Tensor | str]) -> Tensor | str:
    """Returns a batch, or what is wrong with its first unreadable image."""
    return next((text for text in items if isinstance(text, str)), None) or torch.stack(items)


def center_batches(
    images: Images,
    samples: np.ndarray,
    size: int,
    batch: int = 256,
    workers: int = 0,
    view: CenterView = center_view,
) -> Iterator[Tensor]:
    """Yields evaluation views of the given samples, uint8 (N,3,size,size), in order. Raises
    UserError for an unreadable image; `common.run.readable` leaves these out before.
    """
    if isinstance(images, ArrayImages) and images.pixels.shape[1:3] == (size, size):
        for first in range(0, len(samples), batch):
            pixels = images.pixels[samples[first : first + batch]]
            yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        return
    loader = torch.utils.data.DataLoader(
        CenterDataset(images, samples, size, view),
        batch_size=batch,
        num_workers=workers,
        collate_fn=collate_center,
        worker_init_fn=ignore_stop_signals,
    )
    for views in loader:
        if isinstance(views, str):
            raise UserError(views, this_rank=True)
        yield views


def default_workers(ranks_here: int) -> int:
    """Returns how many loader processes to start: one per CPU core of this rank, at most 16. Slurm
    may have given this task its own cores already, and then says how many.
    """
    own = variable("SLURM_CPUS_PER_TASK")
    return max(1, min(16, own or len(os.sched_getaffinity(0)) // ranks_here))


def ignore_stop_signals(worker: int) -> None:
    """Ignores the signals by which schedulers stop a job: they send them to every process, but only
    the training process answers. (`command` ends workers that an error leaves behind.)
    """
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
