"""Images per second of whole training runs, waiting for data included, and what share of the
device's matrix rate that is.

    python benchmarks/throughput.py --cifar10 PATH        # on a GPU: the three settings
    python benchmarks/throughput.py --only resnet50 --steps 60
    python benchmarks/throughput.py --only tiny --processes 1,2    # scaling, on CPU too

Each row is a run of a recipe as a user starts it, from the loader to the queue; its own metrics
give the rate, the share of time that waited for data and the peak memory. GPU busy is the share of
time in which any kernel ran, as nvidia-smi samples it over the counted steps. The matrix rate is
that of a square product in the run's precision, measured after each row; the share counts what the
encoder's forward and backward passes multiply, both views, nothing else. Photographs are JPEG files
of 500x375 made once from those inside scikit-image: as many pixels to decode as ImageNet's.
"""

import argparse
import contextlib
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from common.data.photos import PHOTOS, read_photo
from common.models import build_encoder
from common.run import metrics
from common.run.environment import describe
from common.run.help import in_80_columns

ROOT = Path(__file__).resolve().parent.parent
WARM_UP = 10  # steps that are not counted: allocation, kernels, the loader's first batches
FILES = 2048  # photographs on disk, in 16 class folders; further names are links to them
CIFAR_IMAGES = 50_000
RESULT = Path(__file__).resolve().parent / "results" / "throughput.json"
NVIDIA_SMI = "nvidia-smi --query-gpu=utilization.gpu --format=csv,noheader,nounits -lms 100"


@dataclass
class Setting:
    """One row: a recipe with an encoder on images of a kind."""

    name: str
    recipe: str
    arch: str
    image_size: int
    batch: int
    dataset: str  # cifar10: given by --cifar10; jpeg: made photographs; photos: as for the demo


SETTINGS = {
    s.name: s
    for s in (
        Setting("cifar", "nnclr", "resnet18_cifar", 32, 512, "cifar10"),
        Setting("resnet50", "nnclr", "resnet50", 224, 512, "jpeg"),
        Setting("vit_small", "snclr", "vit_small", 224, 512, "jpeg"),
        Setting("tiny", "nnclr", "tiny", 32, 64, "photos"),
    )
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="cifar,resnet50,vit_small", help=", ".join(SETTINGS))
    parser.add_argument("--steps", type=int, default=100, help="steps counted per row")
    parser.add_argument("--batch-size", type=int, default=0, help="default: the row's own")
    parser.add_argument("--processes", default="1", help="ranks, one run each, with commas")
    parser.add_argument("--cifar10", default="", help="folder of CIFAR-10, for that row")
    parser.add_argument(
        "--images", default="", help="folder for the made photographs, to keep them"
    )
    parser.add_argument("--json", type=Path, default=RESULT, help="for the figures (%(default)s)")
    arguments, flags = parser.parse_known_args()
    unknown = set(arguments.only.split(",")) - set(SETTINGS)
    if unknown:
        parser.error(f"--only {','.join(unknown)}: one of {', '.join(SETTINGS)}")
    if "cifar" in arguments.only and not arguments.cifar10:
        parser.error("the row cifar needs --cifar10 FOLDER; or choose rows by --only")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        images = Path(arguments.images or folder)
        for name in arguments.only.split(","):
            for processes in map(int, arguments.processes.split(",")):
                rows.append(measure(SETTINGS[name], arguments, processes, images, flags))
                print(line_of(rows[-1]), flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {"flags": flags, "rows": rows, **describe(device, 1)}
    arguments.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")


def measure(
    setting: Setting, arguments: argparse.Namespace, processes: int, images: Path, flags: list[str]
) -> dict:
    batch = arguments.batch_size or setting.batch
    steps = arguments.steps + WARM_UP
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}"]
        command += [str(ROOT / f"recipes/{setting.recipe}.py"), "--arch", setting.arch]
        command += ["--image-size", str(setting.image_size), "--batch-size", str(batch)]
        command += [
            *data_flags(setting, images, arguments.cifar10, batch * steps),
            "--knn-every",
            "0",
            "--output",
            folder,
        ]
        command += ["--epochs", "1000", "--max-steps", str(steps), *flags]
        with gpu_use(processes) as samples:
            done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
        if done.returncode:
            sys.exit(done.stderr.strip() or done.stdout)
        config = yaml.safe_load((Path(folder) / "config.yaml").read_text())
        path = Path(folder) / metrics.NAME
        records = [r for r in metrics.read(path) if r["kind"] == "step"]
        ended = path.stat().st_mtime  # when the last step was written
    counted = records[WARM_UP:]
    # launches run ahead of a GPU and catch up at each reading of the metrics: single steps' times
    # say little, their sum is true
    seconds = np.array([batch / r["images_per_second"] for r in counted])
    waited = np.array([r["data_wait"] for r in counted]) * seconds
    per_second = batch * len(counted) / seconds.sum()
    devices = processes if torch.cuda.is_available() else 1  # ranks on a CPU share it
    rate = matrix_rate(config["precision"]) * devices
    flops = 2 * encoder_flops(setting.arch, setting.image_size) * per_second
    return asdict(setting) | {
        "batch": batch,
        "processes": processes,
        "precision": config["precision"],
        "images_per_second": per_second,
        "views_per_second": 2 * per_second,
        "seconds_per_50000_images": CIFAR_IMAGES / per_second,
        "data_wait": waited.sum() / seconds.sum(),
        "gpu_busy": mean_use(samples, ended - seconds.sum(), ended),
        "memory_gb": counted[-1]["memory_gb"],
        "matrix_tflops": rate / 1e12,
        "share_of_matrix_rate": flops / rate,
    }


def data_flags(setting: Setting, images: Path, cifar10: str, names: int) -> list[str]:
    if setting.dataset == "photos":
        return ["--dataset", "photos"]
    if setting.dataset == "cifar10":
        return ["--dataset", "cifar10", "--data", cifar10]
    make_photographs(images, names)
    # its schedules are as long as the method's on ImageNet, and stop after some steps
    return ["--dataset", "imagefolder", "--data", str(images), "--epochs", "100"]


def make_photographs(folder: Path, names: int) -> None:
    """Writes JPEG files of 500x375 pixels, quality 90: crops of the photographs inside
    scikit-image. There are at least so many names that a run ends within its first epoch (an
    epoch's end is not a step).
    """
    rng, photos = np.random.default_rng(0), [read_photo(name) for name in PHOTOS]
    for number in range(FILES, names):
        link = folder / "train" / f"{number % 16:02}" / f"{number}.jpg"
        link.parent.mkdir(parents=True, exist_ok=True)
        if not link.is_symlink():
            link.symlink_to(f"{number % FILES}.jpg")
    for number in range(FILES):
        if (folder / "train" / f"{number % 16:02}" / f"{number}.jpg").exists():
            continue
        photo = photos[number % len(photos)]
        left, top = rng.integers(0, photo.width // 2), rng.integers(0, photo.height // 2)
        crop = photo.crop((left, top, left + photo.width // 2, top + photo.height // 2))
        path = folder / "train" / f"{number % 16:02}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        crop.resize((500, 375), Image.Resampling.BICUBIC).save(path, quality=90)


@contextlib.contextmanager
def gpu_use(processes: int) -> Iterator[list[tuple[float, float]]]:
    """Yields (time, percent of the time before it in which a kernel ran) of the GPUs of so many
    ranks, while the block runs; an empty list if there is no nvidia-smi.
    """
    samples: list[tuple[float, float]] = []
    if shutil.which("nvidia-smi") is None:
        yield samples
        return
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(processes)))
    command = [*NVIDIA_SMI.split(), "-i", visible]
    watch = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    def read() -> None:
        for line in watch.stdout:
            with contextlib.suppress(ValueError):  # "[N/A]"
                samples.append((time.time(), float(line)))

    reader = threading.Thread(target=read)
    reader.start()
    try:
        yield samples
    finally:
        watch.terminate()
        reader.join()


def mean_use(samples: list[tuple[float, float]], start: float, end: float) -> float | None:
    """Returns the mean share of the samples between two times; None without any."""
    shares = [percent / 100 for when, percent in samples if start <= when <= end]
    return statistics.fmean(shares) if shares else None


def matrix_rate(precision: str, side: int = 0, repeats: int = 10) -> float:
    """Measures operations per second of a square matrix product in the precision of a run."""
    gpu = torch.cuda.is_available()
    side = side or (8192 if gpu else 1024)
    kind = {"dtype": {"bf16": torch.bfloat16, "fp64": torch.float64}.get(precision)}
    kind["device"] = "cuda" if gpu else "cpu"
    a, b = torch.randn(side, side, **kind), torch.randn(side, side, **kind)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        a @ b
        if gpu:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 / best


def encoder_flops(arch: str, image_size: int) -> float:
    """Counts operations of the encoder's forward and backward pass for one view of one image."""
    encoder = build_encoder(arch, image_size)
    # the counter misses fused attention on CPU, but not plain products
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        encoder(torch.randn(2, 3, image_size, image_size)).sum().backward()
    return counter.get_total_flops() / 2


def line_of(row: dict) -> str:
    return (
        f"{row['recipe']}, {row['arch']}, {row['image_size']} pixels, batch {row['batch']}, "
        f"{row['precision']}, {row['processes']} x: {row['images_per_second']:.0f} images/s "
        f"({row['views_per_second']:.0f} views/s, 50 000 images in "
        f"{row['seconds_per_50000_images']:.1f} s), {row['share_of_matrix_rate']:.0%} of "
        f"{row['matrix_tflops']:.3g} TFLOP/s, {row['data_wait']:.1%} waiting for data, "
        + (f"GPU busy {row['gpu_busy']:.1%}, " if row["gpu_busy"] is not None else "")
        + f"{row['memory_gb']:.1f} GB"
    )


if __name__ == "__main__":
    main()
