"""Images per second from a folder of files and from its shards (`python -m common.data.pack`),
where your data lies.

    python benchmarks/packing.py --scratch /lustre/me/try                 # 5 000 files of 110 kB
    python benchmarks/packing.py --scratch /lustre/me/try --cold          # page cache dropped
    python benchmarks/packing.py --scratch /nfs/me/try --images /nfs/imagenet --decode

Files and shards lie below --scratch and stay there for the next time; with --images, which holds
train/, --limit of its files stand for the folder and only shards are written. Both are read in the
recipes' keyed order, by the loader's own processes, batch by batch, in turns; what is timed goes
from the start of these processes to the last batch. *shards, one by one* is what shards give
without the reading ahead of common/data/shards.py. --decode also decodes, as the recipes do. Before
anything is timed every image is compared, file with shard.

--cold tells the system to forget the pages of all files before each turn (no root needed) and
looks whether it did: a server's memory, and names and sizes that the client holds, stay. --before
COMMAND runs a command before each turn instead, one that mounts anew for example. --per-worker 768
makes turns short where files are slow: every turn goes on where the one before ended.
"""

import argparse
import ctypes
import io
import json
import mmap
import os
import statistics
import subprocess
import sys
import time
import warnings
import zlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from common.data import pack, shards
from common.data.images import FolderImages, PackedImages, subset
from common.data.loaders import ImageDataset, RankBatches, ignore_stop_signals
from common.data.photos import PHOTOS, read_photo
from common.data.sets import load_dataset
from common.errors import UserError, command, make_folder
from common.fast import pixels
from common.run.environment import describe
from common.run.help import in_80_columns

OUTPUT = Path(__file__).resolve().parent / "results" / "packing.json"
NAMES = {"files": "files", "single": "shards, one by one", "shards": "shards"}
PER_CLASS = 100  # files in a folder
SHARD_MB = 64  # so that 5 000 files make several shards
LOOKED_AT = 50  # files whose pages are counted


class OneByOne(torch.utils.data.Dataset):
    """Maps (epoch, sample) to the bytes of its file, or with `decode` to those of its pixels."""

    def __init__(self, images: FolderImages, decode: bool):
        self.images, self.decode = images, decode
        if decode:
            pixels.compile_kernels()

    def __getitem__(self, key: tuple[int, int]) -> int:
        read = self.images.load_array if self.decode else self.images.read
        return memoryview(read(key[1])).nbytes


class Reading(ImageDataset, OneByOne):
    """Reads the same as recipes ask for it: a batch is known before its first image is read."""


class Checksums(OneByOne):
    """Maps (epoch, sample) to the CRC-32 of its file."""

    def __getitem__(self, key: tuple[int, int]) -> int:
        return zlib.crc32(self.images.read(key[1]))


def through(dataset: OneByOne, batches: Iterable, workers: int) -> list[int]:
    """Returns what the dataset gives, in order, by the loader that recipes use."""
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=list,
        worker_init_fn=ignore_stop_signals,
    )
    return [value for batch in loader for value in batch]


# -- files and shards ----------------------------------------------------------------------------


def write_files(root: Path, count: int, size: int) -> None:
    """Writes JPEG files of photographs, brought to `size` bytes by noise after their end. All are
    different: a file system that compresses or finds doubles gains nothing.
    """
    photos = [as_jpeg(name, size) for name in PHOTOS]
    rng = np.random.default_rng(0)
    beside = root.with_name(f"{root.name}.partial")
    for number in range(count):
        data = photos[number % len(photos)]
        path = beside / "train" / f"{number // PER_CLASS:04}" / f"{number:06}-{size}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data + rng.bytes(size - len(data)))
    beside.rename(root)


def as_jpeg(name: str, size: int) -> bytes:
    """Returns a photograph at 500 pixels, or at fewer if that takes more than `size` bytes."""
    photo = read_photo(name)
    side = 500
    while True:
        scale = side / max(photo.size)
        written = io.BytesIO()
        small = photo.resize([max(1, round(s * scale)) for s in photo.size])
        small.save(written, "JPEG", quality=85)
        if len(written.getvalue()) <= size:
            return written.getvalue()
        if side < 8:
            raise UserError(f"--size {size}: no JPEG file is as small as that")
        side //= 2


def folder_images(arguments: argparse.Namespace) -> FolderImages:
    """Returns the files: --limit of --images, evenly over its classes, or those made here."""
    root = arguments.images
    if root is None:
        root = arguments.scratch / f"files-{arguments.limit}-{arguments.size}"
        if not root.is_dir():
            write_files(root, arguments.limit, arguments.size)
    images = load_dataset("imagefolder", str(root))[0]
    if isinstance(images, PackedImages):
        raise UserError(f"--images {root} is packed: give the folder that it was packed of")
    if len(images) > arguments.limit:
        chosen = np.linspace(0, len(images) - 1, arguments.limit).astype(int)
        images = subset(images, chosen)
    if len(images) < arguments.batch_size:
        raise UserError(f"{root} holds {len(images)} images: fewer than --batch-size")
    return images


def packed_images(images: FolderImages, scratch: Path) -> PackedImages:
    """Returns the same images in shards below `scratch`, packed if they are not there yet."""
    output = scratch / f"shards-{images.fingerprint()}"
    if not (output / shards.NAME).is_file():
        flags = ["--data", str(Path(images.root).parent), "--output", str(output)]
        flags += ["--dataset", "imagefolder", "--shard-mb", str(SHARD_MB)]
        pack.pack_splits({"train": images}, pack.parse(flags))
    return load_dataset("imagefolder", str(output))[0]


def files_of(images: FolderImages) -> list[str]:
    if isinstance(images, PackedImages):
        return [os.path.join(images.packed, name) for name in images.files]
    return [images.path(number) for number in range(len(images))]


def check_same(files: FolderImages, packed: PackedImages, batch: int, workers: int) -> None:
    """Raises UserError unless every image has the same bytes in both."""
    keys = [(0, sample) for sample in range(len(files))]
    batches = [keys[first : first + batch] for first in range(0, len(keys), batch)]
    same = len(files) == len(packed) and through(Checksums(files, False), batches, workers) == (
        through(Checksums(packed, False), batches, workers)
    )
    if not same:
        raise UserError(f"{packed.packed} holds other images than {files.root}: remove it")


# -- cold ----------------------------------------------------------------------------------------


def write_back(paths: list[str]) -> None:
    """Writes these files to disk: before that, their pages cannot be dropped."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.fsync(file)
        os.close(file)


def forget(paths: list[str]) -> None:
    """Asks the system to drop these files' pages."""
    for path in paths:
        file = os.open(path, os.O_RDONLY)
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(file)


def resident(paths: list[str]) -> float | None:
    """Returns the share of these files' pages in memory; None if the system does not tell, as for
    files that this user may not write.
    """
    mincore = ctypes.CDLL(None, use_errno=True).mincore
    held = pages = 0
    for path in paths:
        if not os.access(path, os.W_OK):
            return None
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
            view = np.frombuffer(mapped, np.uint8)
            state = np.zeros(-(-len(view) // mmap.PAGESIZE), np.uint8)
            asked = ctypes.c_void_p(view.ctypes.data), ctypes.c_size_t(len(view))
            failed = mincore(*asked, ctypes.c_void_p(state.ctypes.data))
            del view  # the mapping cannot be closed before
            if failed:
                return None
            held, pages = held + int((state & 1).sum()), pages + len(state)
    return held / pages


def cool(sources: dict[str, FolderImages], arguments: argparse.Namespace) -> float | None:
    """Does what --cold or --before asks for; returns the share of pages that stayed in memory."""
    if arguments.before:
        done = subprocess.run(arguments.before, shell=True, capture_output=True, text=True)
        if done.returncode:
            raise UserError(f"--before ended with {done.returncode}: {done.stderr.strip()}")
    if not arguments.cold:
        return None
    lists = [files_of(sources["files"]), files_of(sources["shards"])]
    for paths in lists:
        forget(paths)
    shares = [resident(paths[:: max(1, len(paths) // LOOKED_AT)]) for paths in lists]
    return None if None in shares else max(shares)


def verdict(stayed: list[float | None]) -> str:
    """Says in words what became of --cold."""
    if None in stayed:
        return "the system does not tell whether it dropped the pages"
    share = f"{100 * max(stayed):.0f} % of the pages stayed in memory"
    return f"{share}: NO EFFECT, the times are of a warm cache" if max(stayed) > 0.05 else share


# -- turns ---------------------------------------------------------------------------------------


def measure(
    sources: dict[str, FolderImages], workers: int, arguments: argparse.Namespace
) -> tuple[dict, list[float | None]]:
    """Returns a row of seconds, and for every turn what `cool` found."""
    row: dict = {"workers": workers} | {name: [] for name in sources}
    stayed, images = [], len(sources["files"])
    steps = min(arguments.per_worker * workers or images, images) // arguments.batch_size
    for turn in range(arguments.rounds):
        first = turn * steps
        for name, source in sources.items():
            batches = RankBatches(images, arguments.batch_size, 0, first, first + steps, 0, 1)
            dataset = (OneByOne if name == "single" else Reading)(source, arguments.decode)
            stayed.append(cool(sources, arguments))
            started = time.perf_counter()
            read = through(dataset, batches, workers)
            row[name].append(time.perf_counter() - started)
            assert len(read) == steps * arguments.batch_size
    row["rates"] = {
        name: steps * arguments.batch_size / statistics.median(row[name]) for name in sources
    }
    row["ratios"] = {
        name: statistics.median(f / s for f, s in zip(row["files"], row[name], strict=True))
        for name in sources
    }
    return row, stayed


def line(row: dict) -> str:
    rates = " | ".join(f"{row['rates'][name]:.0f}" for name in NAMES)
    return f"| {row['workers']} | {rates} | {row['ratios']['shards']:.2f} |"


def file_system(path: Path) -> str:
    """Returns a path's file system, as the system names its type."""
    best = ("", "unknown")
    for entry in Path("/proc/mounts").read_text().splitlines():
        mount, kind = entry.split()[1:3]
        mount = mount.replace("\\040", " ")
        if path.resolve().is_relative_to(mount) and len(mount) >= len(best[0]):
            best = (mount, kind)
    return best[1]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--scratch", type=Path, required=True, help="folder on that file system")
    parser.add_argument("--images", type=Path, help="folder with train/ instead of files made here")
    parser.add_argument("--limit", type=int, default=5000, help="images (5000)")
    parser.add_argument("--size", type=int, default=110_000, help="bytes of a file made here")
    parser.add_argument("--workers", default="1,8", help="loader processes, with commas (1,8)")
    parser.add_argument("--batch-size", type=int, default=64, help="images that one asks for")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--per-worker", type=int, default=0, help="of each, in a turn (all images)")
    parser.add_argument("--decode", action="store_true", help="decode, not only read")
    parser.add_argument("--cold", action="store_true", help="drop their pages before each turn")
    parser.add_argument("--before", default="", metavar="COMMAND", help="run before each turn")
    parser.add_argument("--json", type=Path, default=OUTPUT, help="file for the figures")
    arguments = parser.parse_args()
    try:
        arguments.workers = [int(number) for number in arguments.workers.split(",")]
    except ValueError:
        parser.error("--workers takes numbers with commas between them")
    smallest = min(arguments.limit, arguments.batch_size, arguments.rounds, *arguments.workers)
    if smallest < 1:
        parser.error("--limit, --batch-size, --rounds and --workers must be above 0")
    if 0 != arguments.per_worker < arguments.batch_size:
        parser.error("--per-worker must not be below --batch-size")
    return arguments


def main() -> None:
    arguments = parse()
    arguments.scratch = arguments.scratch.expanduser()
    make_folder(arguments.scratch, "--scratch")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message="This DataLoader will create")  # they wait, mostly
    files = folder_images(arguments)
    packed = packed_images(files, arguments.scratch)
    check_same(files, packed, arguments.batch_size, max(arguments.workers))
    sources = {"files": files, "single": packed, "shards": packed}
    kind = file_system(Path(files.root)), file_system(arguments.scratch)
    size = int(packed.length.mean())
    if arguments.cold:
        write_back(files_of(files) + files_of(packed))
    print(
        f"{len(files)} images of {size / 1000:.0f} kB on {kind[0]}, shards on {kind[1]}, "
        f"{'decoded' if arguments.decode else 'read'}, {arguments.rounds} rounds, "
        f"load {os.getloadavg()[0]:.1f}\n"
    )
    print(f"| workers | {' | '.join(NAMES.values())} | shards / files |")
    print("|---|" + "---|" * len(NAMES) + "---|")
    rows, stayed = [], []
    for workers in arguments.workers:
        row, cooled = measure(sources, workers, arguments)
        rows.append(row)
        stayed += cooled
        print(line(row), flush=True)
    about: dict = {"images": len(files), "bytes": size, "rounds": arguments.rounds}
    about |= {"per_worker": arguments.per_worker, "batch_size": arguments.batch_size}
    about |= {"file_systems": kind, "decoded": arguments.decode, "load": os.getloadavg()[0]}
    if arguments.cold:
        about["cold"] = verdict(stayed)
        print(f"\n--cold: {about['cold']}")
    about |= describe(torch.device("cpu"), 1)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(command(main))
