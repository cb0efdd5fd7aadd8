"""Datasets by name, the deterministic order of samples, and loaders."""

import contextlib
import dataclasses
import functools
import hashlib
import os
import re
import signal
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common import photos, pixels, shards
from common.augment import Draw, View, center_view, crop_only, draw_row, view_rng
from common.errors import UserError, is_disk_error, nearest_path

IMAGE_ENDINGS = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
SKIP_LIMIT = 100  # unreadable images in a row before --on-bad-image skip gives up


Halve = Callable[[int, int], bool]  # width, height of an image -> whether half its size will do


@dataclass
class ArrayImages:
    """Images of one size held in memory: `pixels` uint8 (N,H,W,3), `labels` (N,) or None."""

    pixels: np.ndarray
    labels: np.ndarray | None
    classes: list[str]
    name: str
    per_image: ClassVar = ("pixels",)

    def __len__(self) -> int:
        return len(self.pixels)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.pixels[index])

    def load_array(self, index: int, halve: Halve | None = None) -> np.ndarray:
        """uint8 (H,W,4), see common/pixels.py."""
        return pixels.four_channels(self.pixels[index])

    def fingerprint(self) -> str:
        """A hash of all pixels: a continued run must see the same images."""
        return hashlib.sha256(np.ascontiguousarray(self.pixels)).hexdigest()[:12]


@dataclass
class FolderImages:
    """Image files below `root`: `paths` relative to it (bytes), `labels` (N,) or None."""

    root: str
    paths: np.ndarray  # fixed-width bytes: 1.3 million str objects would be copied per worker
    labels: np.ndarray | None
    classes: list[str]
    name: str
    per_image: ClassVar = ("paths",)

    def __len__(self) -> int:
        return len(self.paths)

    def path(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(self.paths[index]))

    def read(self, index: int) -> bytes:
        """The file as it is."""
        with open(self.path(index), "rb") as file:
            return file.read()

    def load(self, index: int) -> Image.Image:
        """The image as RGB; UserError that names the file where it cannot be read."""
        path = self.path(index)
        try:
            with Image.open(self.source(index)) as image:
                return as_rgb(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            text = re.sub(r" <_io.BytesIO object at \w+>", "", str(error)).replace(f" {path!r}", "")
            raise UserError(
                f"{path} cannot be read ({text}): mend or remove it, or use --on-bad-image skip"
            ) from None

    def source(self, index: int) -> str | BytesIO:
        """What Pillow opens."""
        return self.path(index)

    def load_array(self, index: int, halve: Halve | None = None) -> np.ndarray:
        """The image of `load` as uint8 (H,W,4), see common/pixels.py; at half its size where
        `halve` allows and the format can. Whatever is odd about a file, Pillow judges.
        """
        try:
            array = pixels.decode_jpeg(self.read(index), halve)
        except OSError:
            array = None
        if array is None:
            array = pixels.four_channels(np.asarray(self.load(index)))
        return array

    def fingerprint(self) -> str:
        """A hash of all file names: a continued run must see the same images."""
        return hashlib.sha256(b"\n".join(self.paths.tolist())).hexdigest()[:12]


def as_rgb(image: Image.Image) -> Image.Image:
    """8 bits per channel; of 16-bit grey the upper ones, which Pillow would clip to white."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"{image.mode} pixels of 32 bits: store it with 8 or 16")
    return image.convert("RGB")


@dataclass
class PackedImages(FolderImages):
    """The same files inside shards that common/pack.py wrote: tar files, read at known places."""

    packed: str  # the folder of the shards
    shard: np.ndarray  # (N,) number of the file in `files`
    offset: np.ndarray  # (N,) bytes
    length: np.ndarray  # (N,) bytes
    files: list[str]
    resized: int  # shorter side that larger images were brought to, 0: original files
    handles: shards.Handles = field(default_factory=shards.Handles, compare=False)
    per_image: ClassVar = ("paths", "shard", "offset", "length")

    def path(self, index: int) -> str:
        """Shard and name, for messages."""
        return f"{self.shard_path(index)}: {os.fsdecode(self.paths[index])}"

    def shard_path(self, index: int) -> str:
        return os.path.join(self.packed, self.files[self.shard[index]])

    def place(self, index: int) -> shards.Place:
        return self.shard_path(index), int(self.offset[index]), int(self.length[index])

    def expect(self, samples: Iterable[int]) -> None:
        """These are read next, in this order, see `shards.Handles`."""
        self.handles.expect(map(self.place, samples))

    def read(self, index: int) -> bytes:
        return self.handles.read(*self.place(index))

    def source(self, index: int) -> BytesIO:
        return BytesIO(self.read(index))

    def fingerprint(self) -> str:
        """That of the folder which was packed, if its files are unchanged."""
        if not self.resized:
            return super().fingerprint()
        names = b"\n".join([*self.paths.tolist(), b"resized to %d" % self.resized])
        return hashlib.sha256(names).hexdigest()[:12]


Images = ArrayImages | FolderImages
CenterView = Callable[[Image.Image, int], Tensor]  # (image, size) -> uint8 (3,size,size)


def subset(images: Images, samples: np.ndarray) -> Images:
    """The images of these numbers, in this order, with their labels."""
    labels = None if images.labels is None else images.labels[samples]
    parts = {name: getattr(images, name)[samples] for name in images.per_image}
    return dataclasses.replace(images, **parts, labels=labels)


def load_dataset(name: str, data: str, download: bool = False) -> tuple[Images, Images | None]:
    """Training images and labelled test images (None where there are none).

    `photos` needs no folder. `imagenet` is train/ and val/ with class folders, `imagefolder`
    train/ and optional val/, in class folders or flat (no labels). `cifar10` is torchvision's
    python batches or train/ and test/ with class folders. A folder that common/pack.py wrote stands
    for the `imagenet` or `imagefolder` it was made of. Raises UserError for a wrong layout.
    """
    if name == "photos":
        return photo_patches("train"), photo_patches("test")
    if not data:
        hint = " (with --download it is fetched there)" if name == "cifar10" else ""
        raise UserError(
            f"--dataset {name} needs --data FOLDER{hint}; --dataset photos needs no data",
            every_rank=True,
        )
    root = Path(data).expanduser()
    if name == "cifar10":
        return load_cifar10(root, download)
    if shards.is_packed(root):
        check_packed(root, name)
        read, splits = packed_split, shards.splits(root)
    else:
        check_folder(root)
        read, splits = scan_folder, [s for s in ("train", "val") if (root / s).is_dir()]
    train = read(root, "train", flat_allowed=name == "imagefolder", name=name)
    if "val" not in splits:
        if name == "imagenet":
            raise UserError(f"{root} has no folder val/: ImageNet is train/ and val/", True)
        return train, None
    val = read(root, "val", flat_allowed=name == "imagefolder", name=name)
    if val.labels is None or train.labels is None:
        return train, None
    check_same_classes(root, train, val, "val")
    return train, val


def check_same_classes(root: Path, train: Images, test: Images, split: str) -> None:
    if test.classes != train.classes:
        odd = sorted(set(test.classes) ^ set(train.classes))
        raise UserError(f"{root}: train/ and {split}/ differ in class folders: {odd[:3]}", True)


def photo_patches(split: str) -> ArrayImages:
    pixels, labels = photos.patches(split)
    return ArrayImages(pixels, labels, list(photos.PHOTOS), "photos")


def check_folder(root: Path) -> None:
    check_exists(root)
    if not (root / "train").is_dir():
        raise UserError(
            f"--data {root} has no folder train/: expected {root}/train/CLASS/IMAGE",
            every_rank=True,
        )


def check_exists(root: Path) -> None:
    if root.is_dir():
        return
    if root.exists():
        raise UserError(f"--data {root} is a file: name the folder of the images", every_rank=True)
    folders = []
    with contextlib.suppress(OSError):  # none above it, or none that may be listed
        folders = [path.name for path in root.parent.iterdir() if path.is_dir()]
    near = nearest_path(root.name, folders)
    raise UserError(f"--data {root}: no such folder{near}", every_rank=True)


def scan_folder(root: Path, split: str, flat_allowed: bool, name: str) -> FolderImages:
    """The images of root/split: class folders in sorted order, files sorted within each."""
    folder = root / split
    found = entries_of(folder)
    classes = [e.name for e in found if e.is_dir() and not e.name.startswith(".")]
    broken = [e.path for e in found if e.is_symlink() and not os.path.exists(e.path)]
    if classes and broken:
        raise UserError(f"{broken[0]} is a link to nothing: mend or remove it", every_rank=True)
    if not classes:
        files = [e.name for e in found if is_image(e.name)]
        if not files:
            raise UserError(f"{folder} holds neither class folders nor images", every_rank=True)
        if not flat_allowed:
            raise UserError(
                f"{folder} has no class folders: use --dataset imagefolder for unlabelled images",
                every_rank=True,
            )
        return FolderImages(str(folder), as_bytes(files), None, [], f"{root.name} ({name})")
    paths: list[str] = []
    labels: list[int] = []
    for label, class_name in enumerate(classes):
        files = [e.name for e in entries_of(folder / class_name) if is_image(e.name)]
        if not files:
            raise UserError(
                f"{folder / class_name} holds no images: remove the folder or fill it",
                every_rank=True,
            )
        paths += [f"{class_name}/{file}" for file in files]
        labels += [label] * len(files)
    title = "ImageNet" if name == "imagenet" else f"{root.name} ({name})"
    return FolderImages(str(folder), as_bytes(paths), np.array(labels), classes, title)


def entries_of(folder: Path) -> list[os.DirEntry]:
    """What a folder holds, by name."""
    try:
        with os.scandir(folder) as entries:
            return sorted(entries, key=lambda e: e.name)
    except OSError as error:
        raise UserError(f"{folder} cannot be read ({error.strerror})", every_rank=True) from None


def check_packed(root: Path, name: str) -> None:
    if "train" not in shards.splits(root):
        raise UserError(f"{root} holds no packed train/", every_rank=True)


def packed_split(root: Path, split: str, flat_allowed: bool, name: str) -> PackedImages:
    """The images of root/split as they were before they were packed, in the same order."""
    index = shards.read_index(root, split)
    if not index.classes and not flat_allowed:
        raise UserError(
            f"{root}: its {split}/ has no class folders: use --dataset imagefolder for unlabelled "
            "images",
            every_rank=True,
        )
    title = "ImageNet" if name == "imagenet" else f"{index.source} ({name})"
    return PackedImages(
        os.path.join(root, split),
        index.paths,
        index.labels if index.classes else None,
        index.classes,
        title,
        str(root),
        index.shard,
        index.offset,
        index.length,
        index.files,
        index.resized,
    )


def is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in IMAGE_ENDINGS and not name.startswith(".")


def as_bytes(paths: Sequence[str]) -> np.ndarray:
    return np.array([os.fsencode(p) for p in paths])


def load_cifar10(root: Path, download: bool) -> tuple[ArrayImages, ArrayImages]:
    """CIFAR-10 in memory, from the python batches or from class folders of 32x32 images."""
    if download or (root / "cifar-10-batches-py").is_dir():
        return cifar10_batches(root, train=True, download=download), cifar10_batches(root, False)
    check_exists(root)
    lacking = [f"{split}/" for split in ("train", "test") if not (root / split).is_dir()]
    if lacking:
        raise UserError(
            f"--data {root} has neither cifar-10-batches-py/ nor train/CLASS/IMAGE and "
            f"test/CLASS/IMAGE ({' and '.join(lacking)} missing): a recipe's --download fetches "
            "the former",
            every_rank=True,
        )
    train, test = cifar10_folder(root, "train", 50_000), cifar10_folder(root, "test", 10_000)
    check_same_classes(root, train, test, "test")
    return train, test


def cifar10_batches(root: Path, train: bool, download: bool = False) -> ArrayImages:
    from torchvision.datasets import CIFAR10

    try:
        source = CIFAR10(root, train=train, download=download)
    except (RuntimeError, OSError, EOFError) as error:
        if is_disk_error(error):
            raise
        raise UserError(f"CIFAR-10 in {root}: {error}", every_rank=True) from None
    return ArrayImages(source.data, np.array(source.targets), source.classes, "CIFAR-10")


def cifar10_folder(root: Path, split: str, expected: int) -> ArrayImages:
    files = scan_folder(root, split, flat_allowed=False, name="cifar10")
    copy = "JPEG copy" if files.path(0).lower().endswith((".jpg", ".jpeg")) else "image folders"
    if len(files) != expected:
        copy += f", {len(files)} of {expected} {split} images"
    pixels = np.empty((len(files), 32, 32, 3), dtype=np.uint8)
    for index in range(len(files)):
        try:
            image = files.load(index)
        except UserError as error:  # all ranks read all of CIFAR-10 at the start
            text = str(error).removesuffix(", or use --on-bad-image skip")
            raise UserError(text, every_rank=True) from None
        if image.size != (32, 32):
            raise UserError(
                f"{files.path(index)} is {image.width}x{image.height}: CIFAR-10's images are 32x32",
                every_rank=True,
            )
        pixels[index] = image
    return ArrayImages(pixels, files.labels, files.classes, f"CIFAR-10 ({copy})")


def epoch_order(images: int, seed: int, epoch: int) -> np.ndarray:
    """The order of the samples in an epoch, a permutation keyed by (seed, epoch)."""
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
    """(image, its number, error texts): with `skip` the next readable image in place of an
    unreadable one, else None for it. `load` takes the place of `images.load`.
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
        """The number of the image that a key asks for."""
        return int(key[-1])


class ViewDataset(ImageDataset):
    """(epoch, sample) -> the sample's views, its number, and what went wrong.

    An unreadable image gives an error text instead of an exception, so that the loop can name the
    file in one line; with `skip` the next readable image takes its place. `input` as in
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
        load = {"exact": self.exact, "reference": self.reference, "fast": self.fast}[self.input]
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
        return self.make(draws, lambda view, draw: view.render(array, draw))

    def fast(self, epoch: int, sample: int) -> list:
        """At half scale where no crop is smaller than its view, with fused colour."""
        full: list[int] = []

        def halve(width: int, height: int) -> bool:
            full[:] = width, height
            draws = self.draws(epoch, sample, width, height)
            crops = zip(self.views, draws, strict=True)
            return all(min(draw.box[2:]) >= view.size for view, draw in crops)

        array = self.images.load_array(sample, halve)
        here = array.shape[1], array.shape[0]
        draws = self.draws(epoch, sample, *(full or here))
        if full and tuple(full) != here:
            draws = [dataclasses.replace(d, box=pixels.halved(d.box, *here)) for d in draws]
        return self.make(draws, lambda view, draw: view.render(array, draw, fused=True))


class CropDataset(ViewDataset):
    """As ViewDataset, but of each view its crop, uint8 (3,size,size), and its draw, (16,):
    `common.device_views` does the rest.
    """

    def make(self, draws: list[Draw], render: Callable[[View, Draw], Tensor]) -> list:
        crops = super().make([crop_only(draw) for draw in draws], render)
        return [*zip(crops, map(torch.from_numpy, map(draw_row, draws)), strict=True)]


class DrawDataset(ViewDataset):
    """As CropDataset for images of one size in memory, which `common.device_views` crops too: the
    draws alone, with nothing for the pixels.
    """

    def __getitem__(self, key: tuple[int, int]):
        epoch, sample = key
        height, width = self.images.pixels.shape[1:3]
        rows = map(draw_row, self.draws(epoch, sample, width, height))
        return [(torch.empty(0), torch.from_numpy(row)) for row in rows], sample, []


STAGES = {"views": ViewDataset, "crops": CropDataset, "draws": DrawDataset}


def collate(items: list) -> tuple[list, Tensor, list[str], bool]:
    """-> per view uint8 (N,3,H,W), or a tuple of that and the draws (N,16); samples (N,), problems,
    and whether a problem must stop.
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
    """A loader over all steps of the run: workers start once and prefetch across epochs. `stage`
    is how far they go: whole views, or what `common.device_views` finishes (crops, draws).
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
    """Sample -> its evaluation view, uint8 (3,size,size), and what went wrong; an unreadable
    image is an error text, with `skip` the next readable one takes its place.
    """

    def __init__(
        self, images: Images, samples: np.ndarray, size: int, skip: bool, view: CenterView
    ):
        self.images, self.samples, self.size, self.skip = images, samples, size, skip
        self.view = view

    def __len__(self) -> int:
        return len(self.samples)

    def sample(self, key: int) -> int:
        return int(self.samples[key])

    def __getitem__(self, index: int) -> tuple[Tensor | None, list[str]]:
        image, _, problems = load_or_next(self.images, self.sample(index), self.skip)
        return (None if image is None else self.view(image, self.size)), problems


def collate_center(items: list) -> tuple[Tensor | None, list[str]]:
    problems = [text for _, texts in items for text in texts]
    if any(view is None for view, _ in items):
        return None, problems
    return torch.stack([view for view, _ in items]), problems


def center_batches(
    images: Images,
    samples: np.ndarray,
    size: int,
    batch: int = 256,
    workers: int = 0,
    skip_bad_images: bool = False,
    view: CenterView = center_view,
) -> Iterator[Tensor]:
    """Evaluation views of the given samples, uint8 (N,3,size,size), in order. An unreadable image
    raises UserError, or with `skip_bad_images` the next readable one takes its place.
    """
    if isinstance(images, ArrayImages) and images.pixels.shape[1:3] == (size, size):
        for first in range(0, len(samples), batch):
            pixels = images.pixels[samples[first : first + batch]]
            yield torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
        return
    loader = torch.utils.data.DataLoader(
        CenterDataset(images, samples, size, skip_bad_images, view),
        batch_size=batch,
        num_workers=workers,
        collate_fn=collate_center,
        worker_init_fn=ignore_stop_signals,
    )
    for views, problems in loader:
        if views is None:
            raise UserError(problems[-1])
        yield views


def default_workers(ranks_here: int) -> int:
    """One loader process per CPU core of this rank, at most 16. Slurm may have given this task its
    own cores already, and then says how many.
    """
    own = int(os.environ.get("SLURM_CPUS_PER_TASK", "0"))
    return max(1, min(16, own or len(os.sched_getaffinity(0)) // ranks_here))


def ignore_stop_signals(worker: int) -> None:
    """Schedulers signal every process of a job; only the training process answers. (`command`
    ends workers that an error leaves behind, since they ignore the usual request.)
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
