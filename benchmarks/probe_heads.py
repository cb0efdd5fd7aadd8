"""What a grid of learning rates costs in a linear probe: ten heads against one.

    python benchmarks/probe_heads.py                       # photos, tiny, 2 epochs, 5 in turn
    python benchmarks/probe_heads.py --arch resnet18

Times the training of eval/linear_probe as it is, with ten rates and with one in turn, (a) by the
protocol: random crops, one forward of the encoder per image; (b) as --cache-features does it, the
one forward per image included; (c) the heads alone, on features that are already there. Medians.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from common.config import parse
from eval.linear_probe.protocols import GRID
from eval.linear_probe.run import Probe, ProbeConfig

STORED_EPOCHS = 90  # SNCLR's and SimSiam's number, for (b) and (c)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="tiny", help="encoder with random weights")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of (a)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn")
    arguments = parser.parse_args()
    rates = [0.1 * factor for factor in GRID]
    cases = {"(a) crops": [], "(b) stored features": ["--cache-features"], "(c) heads alone": None}
    with tempfile.TemporaryDirectory() as folder:
        for case, extra in cases.items():
            epochs = arguments.epochs if case.startswith("(a)") else STORED_EPOCHS
            flags = ["--backbone", "random", "--arch", arguments.arch, "--image-size", "32"]
            flags += ["--dataset", "photos", "--protocol", "snclr", "--workers", "0"]
            flags += ["--epochs", str(epochs), "--output", str(Path(folder) / case[1])]
            flags += ["--cache-features"] if extra is None else extra
            probe = Probe(parse(ProbeConfig, {}, flags))
            probe.job.say = lambda text: None
            probe.job.begin(case)
            seconds: dict[int, list[float]] = {len(rates): [], 1: []}
            for turn in range(arguments.repeats + 1):
                for number, times in seconds.items():
                    taken = train(probe, rates[:number] if number > 1 else [0.1], extra is not None)
                    if turn:  # the first of each is a warm-up
                        times.append(taken)
            ten, one = (statistics.median(times) for times in seconds.values())
            images = len(probe.job.train)
            print(
                f"{case}, {images} images x {probe.job.encoder.embed_dim}, {epochs} epochs: "
                f"{ten:.3f} s with {len(rates)} rates, {one:.3f} s with one, ratio {ten / one:.2f}",
                flush=True,
            )


def train(probe: Probe, rates: list[float], forget: bool) -> float:
    """Seconds of one training; `forget` drops the features of the training before."""
    if forget:
        probe.stored.clear()
        (probe.job.folder / "features.safetensors").unlink(missing_ok=True)
    samples = np.arange(len(probe.job.train))
    started = time.perf_counter()
    probe.train_heads(samples, rates, {"seeds": [], "chosen": None})
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
