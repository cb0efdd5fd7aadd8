"""Convolutions of small feature maps on CPU: common/small_maps.py beside oneDNN's.

    python benchmarks/small_maps.py                      # ResNets' widths at each side, batch 128
    python benchmarks/small_maps.py --batch-sizes 8,1024

Forward and backward of one 3x3 or 1x1 convolution, channels last, float32, in turns; medians of the
times and of the turns' ratios. `LARGEST_OUTPUT` and `FEWEST_CHANNELS` of common/small_maps.py come
from this table.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.environment import describe
from common.small_maps import FEWEST_CHANNELS, LARGEST_OUTPUT, convolve_small_map

# (channels in, channels out, kernel, stride, side of the map): ResNet-18's and -50's at 32 pixels,
# and what lies beyond on both sides
RESULT = Path(__file__).resolve().parent / "results" / "small_maps.json"
LAYERS = (
    (512, 512, 3, 1, 1),
    (256, 512, 3, 2, 2),
    (256, 512, 1, 2, 2),
    (2048, 512, 1, 1, 1),
    (1024, 256, 1, 1, 2),
    (256, 256, 3, 1, 2),
    (64, 64, 3, 1, 2),
    (256, 256, 3, 2, 3),
    (128, 256, 3, 2, 4),
    (128, 256, 1, 2, 4),
    (256, 256, 3, 1, 3),
    (64, 64, 3, 1, 3),
    (128, 128, 3, 1, 4),
    (64, 128, 3, 2, 8),
)
WARM_UP = 2  # turns that are not counted


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch-sizes", default="128", help="images, with commas")
    parser.add_argument("--turns", type=int, default=10)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, default=RESULT, help="for the figures (%(default)s)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{arguments.threads} threads, torch {torch.__version__}, forward and backward\n")
    print("| batch | channels | kernel | map | output | oneDNN, ms | ours, ms | ratio | used |")
    print("|---|---|---|---|---|---|---|---|---|")
    rows = []
    for batch in map(int, arguments.batch_sizes.split(",")):
        for layer in LAYERS:
            rows.append(row := measure(batch, *layer, arguments.turns))
            print(line(row), flush=True)
    figures = {"arguments": vars(arguments), "rows": rows} | describe(torch.device("cpu"), 1)
    arguments.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")


def measure(
    batch: int, channels: int, width: int, kernel: int, stride: int, side: int, turns: int
) -> dict:
    """Median seconds of both, and the median of the turns' ratios."""

    def leaf(*shape: int) -> Tensor:
        return torch.randn(shape).to(memory_format=torch.channels_last).requires_grad_()

    x, weight = leaf(batch, channels, side, side), leaf(width, channels, kernel, kernel)
    peers: dict[str, Callable[[], Tensor]] = {
        "onednn": lambda: F.conv2d(x, weight, stride=stride, padding=kernel // 2),
        "ours": lambda: convolve_small_map(x, weight, stride),
    }
    grad = torch.randn_like(peers["onednn"]())
    seconds: dict[str, list[float]] = {name: [] for name in peers}
    for _ in range(WARM_UP + turns):
        for name, convolve in peers.items():
            x.grad = weight.grad = None
            started = time.perf_counter()
            convolve().backward(grad)
            seconds[name].append(time.perf_counter() - started)
    counted = {name: values[WARM_UP:] for name, values in seconds.items()}
    ratios = [a / b for a, b in zip(counted["ours"], counted["onednn"], strict=True)]
    facts = {"batch": batch, "channels": channels, "width": width, "kernel": kernel}
    facts |= {"side": side, "output": grad.shape[2], "ratio": statistics.median(ratios)}
    return facts | {name: statistics.median(values) for name, values in counted.items()}


def line(row: dict) -> str:
    side, output = row["side"], row["output"]
    wide = min(row["channels"], row["width"]) >= FEWEST_CHANNELS
    used = "yes" if wide and output**2 <= LARGEST_OUTPUT else "no"
    return (
        f"| {row['batch']} | {row['channels']} to {row['width']} | {row['kernel']} "
        f"| {side}x{side} | {output}x{output} | {1e3 * row['onednn']:.2f} "
        f"| {1e3 * row['ours']:.2f} | {row['ratio']:.2f} | {used} |"
    )


if __name__ == "__main__":
    main()
