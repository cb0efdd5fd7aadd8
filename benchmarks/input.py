"""Images per second and core, from JPEG files to two views of 224 as uint8 tensors.

    python benchmarks/input.py --images imagenet_sample_200.tar      # or a folder of JPEG files
    python benchmarks/input.py                                       # photographs of scikit-image

BYOL's augmentations (its Table 6). Every pipeline takes the same files, read into memory before, in
one thread; they take turns, a round of all images each, and the ratios are medians over rounds of
the time beside torchvision's PIL pipeline in the same round. torchvision's PIL pipeline is composed
as moco-v3 composes it, with PILToTensor at its end; torchvision v2 has the same list on tensors;
lightly is its BYOLTransform without normalisation (shown where lightly is installed; it is no
requirement). Of ours, what `--input` calls reference, exact and fast, through the loader's own
dataset; draws included.
"""

import argparse
import glob
import io
import json
import os
import platform
import statistics
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image, ImageFilter, ImageOps
from torchvision.transforms import v2

from common import pixels
from common.augment import byol_views
from common.data import FolderImages, ViewDataset, as_bytes

SIZE = 224
PEER = "torchvision, PIL, as moco-v3"


class Files(FolderImages):
    """Files in memory, so that no disk is timed."""

    def __init__(self, data: list[bytes]):
        super().__init__("", as_bytes([str(n) for n in range(len(data))]), None, [], "")
        self.data = data

    def read(self, index: int) -> bytes:
        return self.data[index]

    def source(self, index: int) -> io.BytesIO:
        return io.BytesIO(self.data[index])


def read_files(where: str | None, limit: int) -> list[bytes]:
    """JPEG files of a folder or tar file, else of scikit-image's photographs at 500 pixels."""
    if where is None:
        from common.photos import PHOTOS, read_photo

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


def torchvision_pil() -> list[Callable]:
    """moco-v3's two lists (its BYOL augmentations), to uint8 instead of normalised floats."""
    t = torchvision.transforms

    def compose(blur: float, solarize: float) -> Callable:
        steps = [
            t.RandomResizedCrop(SIZE, (0.08, 1.0), interpolation=t.InterpolationMode.BICUBIC),
            t.RandomApply([t.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
            t.RandomGrayscale(p=0.2),
            t.RandomApply([MocoBlur()], p=blur),
        ]
        if solarize:
            steps.append(t.RandomApply([t.Lambda(ImageOps.solarize)], p=solarize))
        return t.Compose([*steps, t.RandomHorizontalFlip(), t.PILToTensor()])

    return [compose(1.0, 0.0), compose(0.1, 0.2)]


def torchvision_tensors() -> list[Callable]:
    def compose(blur: float, solarize: float) -> Callable:
        bicubic = v2.InterpolationMode.BICUBIC
        return v2.Compose(
            [
                v2.RandomResizedCrop(SIZE, (0.08, 1.0), interpolation=bicubic, antialias=True),
                v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                v2.RandomGrayscale(p=0.2),
                v2.RandomApply([v2.GaussianBlur(23, (0.1, 2.0))], p=blur),
                v2.RandomSolarize(128, p=solarize),
                v2.RandomHorizontalFlip(),
            ]
        )

    return [compose(1.0, 0.0), compose(0.1, 0.2)]


def lightly() -> Callable | None:
    """lightly's BYOLTransform, PIL image -> two tensors; None where it is not installed."""
    try:
        from lightly.transforms import BYOLTransform, BYOLView1Transform, BYOLView2Transform
    except ImportError:
        return None
    settings = {"input_size": SIZE, "normalize": None}
    return BYOLTransform(BYOLView1Transform(**settings), BYOLView2Transform(**settings))


def pil(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data)).convert("RGB")


def pipelines(data: list[bytes]) -> dict[str, Callable[[int, int], object]]:
    """Name -> function of (round, image number)."""
    as_pil, as_tensors, peer = torchvision_pil(), torchvision_tensors(), lightly()
    found = {PEER: lambda epoch, n: [view(image) for image in [pil(data[n])] for view in as_pil]}

    def tensors(epoch: int, n: int) -> list[torch.Tensor]:
        coded = torch.from_numpy(np.frombuffer(data[n], np.uint8).copy())
        image = torchvision.io.decode_jpeg(coded, torchvision.io.ImageReadMode.RGB)
        return [view(image) for view in as_tensors]

    found["torchvision v2, tensors"] = tensors
    if peer is not None:
        found["lightly, BYOLTransform"] = lambda epoch, n: peer(pil(data[n]))
    images = Files(data)
    for name in ("reference", "exact", "fast"):
        dataset = ViewDataset(images, byol_views(SIZE), 0, False, name)
        found[f"ours, --input {name}"] = lambda epoch, n, d=dataset: d[epoch, n]
    found["decoding alone, Pillow"] = lambda epoch, n: pil(data[n])
    found["decoding alone, ours"] = lambda epoch, n: pixels.decode_jpeg(data[n])
    return found


def differences(data: list[bytes]) -> dict[str, dict[str, float]]:
    """How far the values of exact and fast are from the reference's, in levels of 255."""
    images, table = Files(data), {}
    sets = {n: ViewDataset(images, byol_views(SIZE), 0, False, n) for n in ("reference", "exact")}
    sets["fast"] = ViewDataset(images, byol_views(SIZE), 0, False, "fast")
    for name in ("exact", "fast"):
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
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", help="folder or tar file of JPEG files")
    parser.add_argument("--limit", type=int, default=100, help="images at most (100)")
    parser.add_argument("--rounds", type=int, default=5)
    beside = Path(__file__).with_suffix(".json")
    parser.add_argument("--output", type=Path, default=beside, help="JSON with every time")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    data = read_files(arguments.images, arguments.limit)
    if not data:
        parser.error(f"{arguments.images} holds no JPEG files")
    runs = pipelines(data)
    for run in runs.values():  # imports, compiled kernels, caches
        run(0, 0)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for epoch in range(arguments.rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            for n in range(len(data)):
                run(epoch, n)
            seconds[name].append(time.perf_counter() - started)
    off = differences(data)
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
    about: dict[str, object] = {"images": len(data), "python": platform.python_version()}
    about |= {"torch": torch.__version__, "torchvision": torchvision.__version__}
    text = json.dumps({"about": about, "rows": rows, "differences": off}, indent=1)
    arguments.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
