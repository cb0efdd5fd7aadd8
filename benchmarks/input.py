"""Images per second and core, from JPEG files to two views as uint8 tensors.

    python benchmarks/input.py --images imagenet_sample_200.tar      # or a folder of JPEG files
    python benchmarks/input.py                                       # photographs of scikit-image
    python benchmarks/input.py --patches --limit 1000        # the views of photos, 32 pixels

BYOL's augmentations (App. B). Every pipeline takes the same files, read into memory before, in
one thread; they take turns, a round of all images each, and the ratios are medians over rounds of
the time beside torchvision's PIL pipeline in the same round. torchvision's PIL pipeline is composed
as moco-v3 composes it, with PILToTensor at its end; torchvision v2 has the same list on tensors;
lightly is its BYOLTransform without normalisation (shown where lightly is installed; it is no
requirement). Of ours, what `--input` calls reference and exact, through the loader's own
dataset; draws included.
"""

import argparse
import glob
import io
import json
import os
import statistics
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import v2

from common.augment import two_views
from common.config import MAX_PIXELS
from common.data.images import ArrayImages, FolderImages, Images
from common.data.loaders import ViewDataset
from common.data.photos import PHOTOS, SIDE, patches, read_photo
from common.data.sets import as_bytes
from common.fast import pixels
from common.run.environment import describe
from common.run.help import in_80_columns

RESULTS = Path(__file__).resolve().parent / "results"
PEER = "torchvision, PIL, as moco-v3"


class Files(FolderImages):
    """Files that are kept in memory, so that no disk is timed."""

    def __init__(self, data: list[bytes]):
        super().__init__("", as_bytes([str(n) for n in range(len(data))]), None, [], "")
        self.data = data

    def read(self, index: int) -> bytes:
        return self.data[index]

    def source(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.data[index])


def read_files(where: str | None, limit: int) -> list[bytes]:
    """Reads JPEG files of a folder or tar file, else scikit-image's photographs at 500 pixels."""
    if where is None:
        photos = [read_photo(name) for name in PHOTOS]
        data = []
        for number in range(limit):
            photo = photos[number % len(photos)]
            scale = 500 / max(photo.size)
            side = [round(s * scale) for s in photo.size]
            written = io.BytesIO()
            photo.resize(side).save(written, "JPEG", quality=95 - number % 5)
            data.append(written.getvalue())
        return data
    if tarfile.is_tarfile(where) if Path(where).is_file() else False:
        with tarfile.open(where) as tar:
            data = [tar.extractfile(m).read() for m in tar if m.isfile()]
    else:
        paths = sorted(p for p in glob.glob(f"{where}/**", recursive=True) if os.path.isfile(p))
        data = [Path(path).read_bytes() for path in paths]
    return [d for d in data if d[:2] == b"\xff\xd8"][:limit]


class MocoBlur:
    """moco-v3's GaussianBlur: Pillow's, with a sigma from 0.1 to 2."""

    def __call__(self, image: Image.Image) -> Image.Image:
        sigma = float(torch.empty(1).uniform_(0.1, 2.0))
        return image.filter(ImageFilter.GaussianBlur(sigma))


def torchvision_pil(size: int) -> list[Callable]:
    """Returns moco-v3's two lists (its BYOL augmentations), to uint8, not to normalised floats."""
    t = torchvision.transforms

    def compose(blur: float, solarize: float) -> Callable:
        steps = [
            t.RandomResizedCrop(size, (0.08, 1.0), interpolation=t.InterpolationMode.BICUBIC),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            t.RandomGrayscale(p=0.2),
            t.RandomApply([MocoBlur()], p=blur),
        ]
        if solarize:
            steps.append(t.RandomApply([t.Lambda(ImageOps.solarize)], p=solarize))
        return t.Compose([*steps, t.RandomHorizontalFlip(), t.PILToTensor()])

    return [compose(1.0, 0.0), compose(0.1, 0.2)]


def torchvision_tensors(size: int) -> list[Callable]:
    def compose(blur: float, solarize: float) -> Callable:
        bicubic = v2.InterpolationMode.BICUBIC
        return v2.Compose(
            [
                v2.RandomResizedCrop(size, (0.08, 1.0), interpolation=bicubic, antialias=True),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=blur),
                v2.RandomSolarize(128, p=solarize),
                v2.RandomHorizontalFlip(),
            ]
        )

    return [compose(1.0, 0.0), compose(0.1, 0.2)]


def lightly(size: int) -> Callable | None:
    """Returns lightly's BYOLTransform, PIL image -> two tensors; None if it is not installed."""
    try:
        from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    except ImportError:
        return None
    settings = {"input_size": size, "normalize": None}
    return BYOLTransform(BYOLView1Transform(**settings), BYOLView2Transform(**settings))


Picture = bytes | np.ndarray  # a JPEG file, or a patch (32,32,3) that needs no decoding


def pil(data: Picture) -> Image.Image:
    if isinstance(data, bytes):
        return Image.open(io.BytesIO(data)).convert("RGB")
    return Image.fromarray(data)


def tensor(data: Picture) -> torch.Tensor:
    if isinstance(data, bytes):
        coded = torch.from_numpy(np.frombuffer(data, np.uint8).copy())
        return torchvision.io.decode_jpeg(coded, torchvision.io.ImageReadMode.RGB)
    return torch.from_numpy(data).permute(2, 0, 1)


def images_of(data: Sequence[Picture]) -> Images:
    if isinstance(data[0], bytes):
        return Files(data)
    return ArrayImages(np.stack(data), None, [], "patches")


def pipelines(data: Sequence[Picture], size: int) -> dict[str, Callable[[int, int], object]]:
    """Returns each pipeline by name, as a function of (round, image number)."""
    as_pil, as_tensors, peer = torchvision_pil(size), torchvision_tensors(size), lightly(size)
    found = {PEER: lambda epoch, n: [view(image) for image in [pil(data[n])] for view in as_pil]}

    found["torchvision v2, tensors"] = lambda epoch, n: [
        view(image) for image in [tensor(data[n])] for view in as_tensors
    ]
    if peer is not None:
        found["lightly, BYOLTransform"] = lambda epoch, n: peer(pil(data[n]))
    images = images_of(data)
    for name in ("reference", "exact"):
        dataset = ViewDataset(
            images, two_views("byol", size, interpolation="bicubic"), 0, False, name
        )
        found[f"ours, --input {name}"] = lambda epoch, n, d=dataset: d[epoch, n]
    if not isinstance(data[0], bytes):
        return found
    found["decoding alone, Pillow"] = lambda epoch, n: pil(data[n])
    found["decoding alone, ours"] = lambda epoch, n: pixels.decode_jpeg(data[n], MAX_PIXELS)
    return found


def differences(data: Sequence[Picture], size: int) -> dict[str, dict[str, float]]:
    """Measures how far the values of exact are from the reference's, in levels of 255."""
    images, views, table = images_of(data), two_views("byol", size, interpolation="bicubic"), {}
    names = ("reference", "exact")
    sets = {name: ViewDataset(images, views, 0, False, name) for name in names}
    for name in ("exact",):
        off = []
        for n in range(min(50, len(data))):
            ours, theirs = (torch.stack(sets[k][0, n][0]).short() for k in (name, "reference"))
            off.append((ours - theirs).abs().float())
        all_ = torch.cat([o.flatten() for o in off])
        table[name] = {
            "mean": all_.mean().item(),
            "within_2": (all_ <= 2).float().mean().item(),
            "largest": all_.max().item(),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="folder or tar file of JPEG files")
    parser.add_argument("--limit", type=int, default=100, help="images at most (100)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--patches", action="store_true", help="of photos, views of 32 pixels")
    parser.add_argument("--output", type=Path, help="JSON; default: results/input[-patches].json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data: Sequence[Picture] = [*patches("train")[0][: arguments.limit]]
    if not arguments.patches:
        data = read_files(arguments.images, arguments.limit)
    if not data:
        parser.error(f"{arguments.images} holds no JPEG files")
    size = SIDE if arguments.patches else 224
    runs = pipelines(data, size)
    for run in runs.values():  # a first turn: imports, compiled kernels, caches
        run(0, 0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for epoch in range(arguments.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            for n in range(len(data)):
                run(epoch, n)
            seconds[name].append(time.perf_counter() - started)
    off = differences(data, size)
    rows = []
    print(f"{len(data)} images, {arguments.rounds} rounds, load {os.getloadavg()[0]:.1f}\n")
    print(f"| {'pipeline':30} | images/s | times {PEER} |\n|---|---|---|")
    for name, times in seconds.items():
        ratio = statistics.median(p / t for p, t in zip(seconds[PEER], times, strict=True))
        rate = len(data) / statistics.median(times)
        rows.append({"pipeline": name, "images_per_second": rate, "ratio": ratio, "seconds": times})
        print(f"| {name:30} | {rate:8.0f} | {ratio:.2f} |")
    print("\nlevels (of 255) from the reference: mean, share within 2, largest")
    for name, row in off.items():
        print(f"{name}: {row['mean']:.3f}, {row['within_2']:.4f}, {row['largest']:.0f}")
    about = {"images": len(data), "size": size, "load": os.getloadavg()[0]}
    about |= describe(torch.device("cpu"), 1)
    text = json.dumps({"about": about, "rows": rows, "differences": off}, indent=1)
    name = "input-patches.json" if arguments.patches else "input.json"
    (arguments.output or RESULTS / name).write_text(text + "\n")


if __name__ == "__main__":
    main()
