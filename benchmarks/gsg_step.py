"""What guided stop-gradient costs: a training step with it against one without.

    python benchmarks/gsg_step.py                                  # photos, tiny
    python benchmarks/gsg_step.py --steps 8 --arch resnet18_cifar --batch-size 128

Runs both recipes as a user would, with and without --no-gsg in turn, and takes the median time of
a step from their metrics, waiting for data left out (four views instead of two also cost the
loaders twice). Prints a table and stores every step's time. On a GPU kernels are launched one by
one, so that a step's time is its own. Flags that are not of this script go to the recipes.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml

from common.run import metrics
from common.run.environment import describe
from common.run.help import in_80_columns

ROOT = Path(__file__).resolve().parent.parent
RESULTS = Path(__file__).resolve().parent / "results"
WARM_UP = 3  # steps that are not counted: allocation, the first kernels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=20, help="steps counted per run")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each, in turn")
    default = RESULTS / "gsg_step.json"
    parser.add_argument("--output", type=Path, default=default, help="JSON (%(default)s)")
    arguments, flags = parser.parse_known_args()
    if "--dataset" not in flags:
        flags = ["--dataset", "photos", *flags]
    rows = []
    print("| recipe | with GSG, ms | without, ms | ratio |\n|---|---|---|---|")
    for recipe in ("simsiam_gsg", "byol_gsg"):
        seconds: dict[str, list[float]] = {"--gsg": [], "--no-gsg": []}
        for _ in range(arguments.repeats):
            for choice in seconds:
                seconds[choice] += step_seconds(recipe, [choice, *flags], arguments.steps)
        gsg, plain = (statistics.median(seconds[choice]) for choice in seconds)
        rows.append({"recipe": recipe, "ratio": gsg / plain, "seconds": seconds})
        cells = (recipe, f"{1e3 * gsg:.1f}", f"{1e3 * plain:.1f}", f"{gsg / plain:.3f}")
        print(f"| {' | '.join(cells)} |", flush=True)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    about = {"flags": flags, "load": os.getloadavg()[0], **describe(device, 1)}
    arguments.output.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")


def step_seconds(recipe: str, flags: list[str], steps: int) -> list[float]:
    """Returns the time of each counted step of one run, without waiting for data."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, str(ROOT / f"recipes/{recipe}.py"), *flags]
        command += ["--max-steps", str(steps + WARM_UP), "--knn-every", "0", "--output", folder]
        own = os.environ | {"CUDA_LAUNCH_BLOCKING": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=own)
        if done.returncode:
            sys.exit(done.stderr.strip() or done.stdout)
        batch = yaml.safe_load((Path(folder) / "config.yaml").read_text())["batch_size"]
        records = metrics.read(Path(folder) / metrics.NAME)
    steps_only = [r for r in records if r["kind"] == "step"][WARM_UP:]
    return [batch / r["images_per_second"] * (1 - r["data_wait"]) for r in steps_only]


if __name__ == "__main__":
    main()
