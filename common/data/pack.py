"""Packs ImageNet, or any folder of images, into few large files for slow file systems.

    python -m common.data.pack --data /path/to/imagenet --output /scratch/imagenet-packed
    python recipes/nnclr.py --data /scratch/imagenet-packed

The shards are plain tar files of the original files, in the order of the folder, with an index of
their places: the same images in the same keyed order with the same labels, so that a run may be
continued from either. Interrupted, the same command goes on after the last finished shard.
--resize SIDE keeps larger images at that shorter side instead (JPEG, quality 95): a smaller set,
but other pixels, and a run cannot go over to it.
"""

import argparse
import io
import itertools
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from common.config import MAX_PIXELS
from common.data import shards
from common.data.images import SKIP_HINT, FolderImages
from common.data.sets import load_dataset
from common.errors import UserError, command, make_folder
from common.files import replacing, write
from common.progress import Progress
from common.run import documents
from common.run.help import in_80_columns

BLOCK = 512  # tar's


def shard_starts(sizes: np.ndarray, limit: int) -> list[int]:
    """Returns the first image of each shard; a shard ends before it would exceed `limit` bytes."""
    starts, total = [0], 0
    for number, size in enumerate(sizes.tolist()):
        if total and total + size > limit:
            starts.append(number)
            total = 0
        total += size
    return starts


def file_sizes(images: FolderImages, split: str) -> np.ndarray:
    """Returns the bytes that each file takes in a tar file."""
    sizes = np.empty(len(images), np.int64)
    with Progress(len(images), f"{split}: sizes", "image", leave=True) as progress:
        for number in range(len(images)):
            path = images.path(number)
            try:
                sizes[number] = BLOCK + -(-os.path.getsize(path) // BLOCK) * BLOCK
            except OSError as error:
                raise UserError(f"{path} cannot be read ({error.strerror})") from None
            progress.update()
    return sizes


def content(images: FolderImages, number: int, resize: int) -> bytes:
    """Returns the file of an image, or a smaller JPEG if its shorter side is above `resize`."""
    try:
        data = images.read(number)
    except OSError as error:
        raise UserError(f"{images.path(number)} cannot be read ({error.strerror})") from None
    if not resize:
        return data
    try:
        image = images.load(number)
    except UserError as error:  # the hint names a recipe's flag
        raise UserError(str(error).removesuffix(SKIP_HINT)) from None
    if min(image.size) <= resize:
        return data
    scale = resize / min(image.size)
    size = tuple(max(resize, round(side * scale)) for side in image.size)
    written = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(written, "JPEG", quality=95)
    return written.getvalue()


def write_shard(
    path: Path, images: FolderImages, numbers: range, split: str, resize: int, bar: Progress
) -> None:
    """Writes one tar file and, beside it, the places of its images; renames it when complete."""
    offset, length = np.empty((2, len(numbers)), np.int64)
    with replacing(path) as beside:  # last: a shard of this name is complete
        with tarfile.open(beside, "w", format=tarfile.PAX_FORMAT) as tar:
            for place, number in enumerate(numbers):
                data = content(images, number, resize)
                entry = tarfile.TarInfo(f"{split}/{os.fsdecode(images.paths[number])}")
                entry.size = len(data)
                tar.addfile(entry, io.BytesIO(data))
                offset[place] = tar.offset - -(-len(data) // BLOCK) * BLOCK
                length[place] = len(data)
                bar.update()
        own = images.paths[numbers.start : numbers.stop]
        save_arrays(path.with_suffix(".npz"), paths=own, offset=offset, length=length)


def save_arrays(path: Path, **arrays: np.ndarray) -> None:
    with replacing(path) as beside, open(beside, "wb") as file:
        np.savez(file, **arrays)


def is_done(path: Path, images: FolderImages, numbers: range) -> bool:
    """Tells whether an earlier start finished a shard; raises UserError if its images differ."""
    part = path.with_suffix(".npz")
    if not path.is_file() or not part.is_file():
        return False
    try:
        with np.load(part) as places:
            paths, end = places["paths"], int(places["offset"][-1] + places["length"][-1])
    except shards.DAMAGED:
        return False  # so the shard is written anew
    if not np.array_equal(paths, images.paths[numbers.start : numbers.stop]):
        raise UserError(
            f"{path} holds other images than --data now has there: remove it, or use another "
            "--output"
        )
    return path.stat().st_size >= end + BLOCK  # if its end is missing, it is written anew


def pack_split(
    images: FolderImages, sizes: np.ndarray, split: str, arguments: argparse.Namespace
) -> dict:
    """Writes a split's shards and index; returns what packed.json says of it."""
    output = arguments.output
    starts = [*shard_starts(sizes, arguments.shard_mb << 20), len(images)]
    paths = [output / f"{split}-{number:05}.tar" for number in range(len(starts) - 1)]
    ranges = [range(*pair) for pair in itertools.pairwise(starts)]
    with Progress(len(images), split, "image", leave=True) as bar:
        for path, numbers in zip(paths, ranges, strict=True):
            if is_done(path, images, numbers):
                bar.update(len(numbers))
            else:
                write_shard(path, images, numbers, split, arguments.resize, bar)
    parts = [np.load(path.with_suffix(".npz")) for path in paths]
    places = {name: np.concatenate([part[name] for part in parts]) for name in ("offset", "length")}
    labels = np.zeros(len(images), np.int64) if images.labels is None else images.labels
    shard = np.repeat(np.arange(len(paths)), [len(numbers) for numbers in ranges])
    save_arrays(output / f"{split}.npz", paths=images.paths, labels=labels, shard=shard, **places)
    return {
        "images": len(images),
        "classes": images.classes,
        "shards": {path.name: path.stat().st_size for path in paths},
    }


def check_space(output: Path, needed: int) -> None:
    """Raises UserError if what is still to be written does not fit."""
    there = sum(p.stat().st_size for p in output.glob("*.tar"))
    free, missing = shutil.disk_usage(output).free, needed - there
    if missing > free:
        raise UserError(
            f"{output} has {free / 1e9:.1f} GB free, packing takes {missing / 1e9:.1f} GB more: "
            "free space or use another --output"
        )


def pack(arguments: argparse.Namespace) -> None:
    """Packs the folder --data."""
    if shards.is_packed(documents.expanded(arguments.data)):
        raise UserError(f"--data {arguments.data} is packed already")
    limit = arguments.max_pixels
    train, val = load_dataset(arguments.dataset, str(arguments.data), max_pixels=limit)
    pack_splits({"train": train} if val is None else {"train": train, "val": val}, arguments)


def pack_splits(splits: dict[str, FolderImages], arguments: argparse.Namespace) -> None:
    """Checks everything that can be checked, then writes."""
    output = arguments.output
    make_folder(output)
    about = {
        "version": shards.VERSION,
        "source": documents.expanded(arguments.data).name,
        "resized": arguments.resize,
        "shard_mb": arguments.shard_mb,
        "images": {split: images.fingerprint() for split, images in splits.items()},
    }
    settings = output / "packing.json"
    if settings.is_file() and begun(settings) != about:
        raise UserError(
            f"{output} was begun with other images, --resize or --shard-mb: use the same, or "
            "another --output"
        )
    sizes = {split: file_sizes(images, split) for split, images in splits.items()}
    if not arguments.resize:
        check_space(output, sum(int(s.sum()) for s in sizes.values()))
    write(settings, json.dumps(about))
    about["splits"] = {
        split: pack_split(images, sizes[split], split, arguments)
        for split, images in splits.items()
    }
    write(output / shards.NAME, json.dumps(about, indent=1))
    for part in output.glob("*-?????.npz"):
        part.unlink()
    settings.unlink()
    counts = ", ".join(f"{len(images):,} {split} images" for split, images in splits.items())
    total = sum(sum(entry["shards"].values()) for entry in about["splits"].values())
    print(f"{output}: {counts}, {total / 1e9:.2f} GB; use it as --data {output}")


def begun(settings: Path) -> dict:
    """Returns what an interrupted start wrote of itself."""
    try:
        return documents.read_json(settings, "block")
    except UserError:
        raise UserError(f"{settings} is damaged: remove it, or use another --output") from None


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m common.data.pack",
        description=in_80_columns(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="folder with train/ and val/")
    parser.add_argument("--output", type=Path, required=True, help="folder for the shards")
    parser.add_argument(
        "--dataset",
        choices=["imagenet", "imagefolder"],
        default="imagenet",
        help="layout of --data",
    )
    parser.add_argument("--shard-mb", type=int, default=1024, help="size of a shard in MiB (1024)")
    parser.add_argument(
        "--resize", type=int, default=0, help="shorter side of larger images; 0: original files"
    )
    parser.add_argument(
        "--max-pixels", type=int, default=MAX_PIXELS, help="--resize refuses a larger image"
    )
    arguments = parser.parse_args(argv)
    if arguments.shard_mb < 1 or arguments.resize < 0:
        parser.error("--shard-mb must be above 0 and --resize not negative")
    arguments.output = documents.expanded(arguments.output)
    return arguments


def main() -> None:
    arguments = parse()
    if (arguments.output / shards.NAME).is_file():
        print(f"{arguments.output} is packed already")
        return
    pack(arguments)


if __name__ == "__main__":
    sys.exit(command(main))
