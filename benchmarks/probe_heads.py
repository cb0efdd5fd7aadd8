"""What a grid of learning rates costs in a linear probe: ten heads against one.

    python benchmarks/probe_heads.py                       # photos, tiny, 2 epochs, 5 in turn
    python benchmarks/probe_heads.py --arch resnet18

Times the training of eval/linear_probe as it is, with ten rates and with one in turn, (a) by the
protocol: random crops, one forward of the encoder per image; (b) as --cache-features does it, the
one forward per image included; (c) the heads alone, on features that are already there. Medians;
prints a table, stores every time.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from common.run.environment import describe
from common.run.flags import parse
from common.run.help import in_80_columns
from eval.linear_probe.protocols import GRID
from eval.linear_probe.run import Probe, ProbeConfig

RESULT = Path(__file__).resolve().parent / "results" / "probe_heads.json"
STORED_EPOCHS = 90  # SNCLR's and SimSiam's number, for (b) and (c)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="tiny", help="encoder with random weights")
    parser.add_argument("--epochs", type=int, default=2, help="epochs of (a)")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each, in turn")
    parser.add_argument("--json", type=Path, default=RESULT, help="for the figures (%(default)s)")
    arguments = parser.parse_args()
    load, rows = os.getloadavg()[0], []
    rates = [0.1 * factor for factor in GRID]
    cases = {"(a) crops": [], "(b) stored features": ["--cache-features"], "(c) heads alone": None}
    print(
        f"| | images | epochs | {len(rates)} rates, s | one, s | ratio |\n|---|---|---|---|---|---|"
    )
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
            images = f"{len(probe.job.train)} x {probe.job.encoder.embed_dim}"
            cells = (case, images, str(epochs), f"{ten:.3f}", f"{one:.3f}", f"{ten / one:.2f}")
            print(f"| {' | '.join(cells)} |", flush=True)
            rows.append({"case": case, "images": images, "epochs": epochs, "seconds": seconds})
    about = {"arch": arguments.arch, "load": load, **describe(probe.job.device, 1)}
    arguments.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def train(probe: Probe, rates: list[float], forget: bool) -> float:
    """Returns the seconds of one training; `forget` drops the features of the training before."""
    if forget:
        probe.stored.clear()
        (probe.job.folder / "features.safetensors").unlink(missing_ok=True)
    samples = np.arange(len(probe.job.train))
    started = time.perf_counter()
    probe.train_heads(samples, rates, {"seeds": [], "chosen": None})
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
