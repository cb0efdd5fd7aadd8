"""A training step whole and in pieces (--micro-batch): peak memory and time.

    python benchmarks/micro_batch.py                               # ResNet-18 at 224, batch 32
    python benchmarks/micro_batch.py --arch vit_small --batch-size 16 --pieces 0 8 2
    python benchmarks/micro_batch.py --recipe snclr --arch vit_small --batch-size 1024 \
        --pieces 0 256 64 --dataset imagenet --data /path/to/imagenet          # for a GPU

Runs the recipe as a user would, once for each piece size (0 is whole), each in a process of its
own, and reads its metrics: peak memory is the GPU's, or on a CPU that of the whole process, which
is several hundred MB before the first image (the first row: a batch of 2). Time is the median of
the counted steps, waiting for data left out. Other flags go to the recipe.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from common.run import metrics
from common.run.help import in_80_columns

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP = 1  # steps that are not counted: allocation, the first kernels


def run(recipe: str, flags: list[str], batch: int, micro_batch: int, steps: int) -> dict:
    """Runs the recipe once; returns memory in GB, seconds per step, the losses."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"recipes/{recipe}.py"), *flags]
        command += ["--batch-size", str(batch), "--micro-batch", str(micro_batch)]
        command += ["--max-steps", str(steps + WARM_UP), "--knn-every", "0", "--output", folder]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr.strip() or done.stdout)
        records = metrics.read(Path(folder) / metrics.NAME)
    records = [r for r in records if r["kind"] == "step"]
    seconds = [batch / r["images_per_second"] * (1 - r["data_wait"]) for r in records[WARM_UP:]]
    return {
        "batch": batch,
        "micro_batch": micro_batch,
        "memory_gb": records[-1]["memory_gb"],
        "seconds": statistics.median(seconds),
        "losses": [r["loss"] for r in records],
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--recipe", default="nnclr")
    parser.add_argument("--arch", default="resnet18")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--pieces", type=int, nargs="+", default=[0, 32, 8], help="0: whole")
    parser.add_argument("--steps", type=int, default=1, help="steps counted per run")
    parser.add_argument("--output", type=Path, help="JSON; default: results/micro_batch-ARCH.json")
    arguments, flags = parser.parse_known_args()
    if "--dataset" not in flags:
        queue = [] if arguments.recipe.endswith("gsg") else ["--queue-size", "1024"]
        flags = ["--dataset", "photos", *queue, "--workers", "1", *flags]
    flags += ["--arch", arguments.arch, "--image-size", str(arguments.image_size)]
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{arguments.recipe}, {arguments.arch} at {arguments.image_size}, batch "
        f"{arguments.batch_size}, {device}, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':>12} {'peak GB':>8} {'s / step':>9} {'first loss':>11}")
    rows = []
    sizes = [(2, 0), *((arguments.batch_size, size) for size in arguments.pieces)]
    for batch, size in sizes:
        row = run(arguments.recipe, flags, batch, size, arguments.steps)
        rows.append(row)
        name = "batch of 2" if batch == 2 else f"pieces of {size}" if size else "whole"
        print(
            f"{name:>12} {row['memory_gb']:8.2f} {row['seconds']:9.2f} {row['losses'][0]:11.6f}",
            flush=True,
        )
    about = {n: v for n, v in vars(arguments).items() if n not in ("output", "pieces")}
    about |= {"flags": flags, "device": device, "threads": torch.get_num_threads()}
    about |= {"torch": torch.__version__, "python": platform.python_version()}
    output = arguments.output or RESULTS / f"micro_batch-{arguments.arch}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps({"about": about, "runs": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
