"""A run of the lab beside the same run by lightly: from the command to its last step.

    pip install lightly==1.6.0
    python benchmarks/lab.py --cifar10 PATH        # the lab's own images; without, photos

Ours is SimCLR as the lab runs it (results/plan.yaml, `lab-simclr`), for a few epochs: start, k-NN
of the random encoder, training, monitors, k-NN and geometry at the end. lightly's is its SimCLR
example with our encoder, head sizes, batch, epochs and SGD: its transform and its dataset on the
same images in memory, PyTorch's loader, NTXentLoss; no evaluation. Each whole run is a process of
its own, timed from outside, in turns; lightly's with 0, 1 and 2 workers, of which the best counts.
Then apart, in one process each: input (views without a step) and step (the same batches again and
again). Medians over rounds, in images per second; a run alone is ours without k-NN and geometry.
`--where simclr` (or nnclr) says instead where the time of our run goes, part by part.
"""

import argparse
import contextlib
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn

from common.data.loaders import RankBatches, view_loader
from common.data.sets import load_dataset
from common.data.splits import parts
from common.fast.micro_batch import Pieces
from common.models import build_encoder
from common.run import run
from common.run.environment import describe
from common.run.help import in_80_columns
from common.support_set import SupportSet
from recipes import simclr
from slurm import plan

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
PLANNED = "lab-simclr"
WORKERS = (0, 1, 2)  # of lightly's loader
STEPS = 60  # of a step's measurement, after WARM_UP
WARM_UP = 10
QUIET = ["--knn-every", "0", "--geometry-points", "0"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cifar10", default="", metavar="PATH", help="as the recipes' --data")
    parser.add_argument("--epochs", type=int, default=4, help="of each whole run")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of ours")
    parser.add_argument("--json", type=Path, default=RESULTS / "lab.json", help="for the figures")
    parser.add_argument("--where", choices=("simclr", "nnclr"), help="where our run's time goes")
    parser.add_argument("--part", default="", help=argparse.SUPPRESS)  # a process of its own
    arguments = parser.parse_args()
    if arguments.where:
        torch.set_num_threads(arguments.threads)
        return print(where(arguments))
    if importlib.util.find_spec("lightly") is None:
        sys.exit("error: lightly is not installed: pip install lightly==1.6.0")
    torch.set_num_threads(arguments.threads)
    config = simclr.parse_arguments(flags := flags_of(arguments))
    if arguments.part:
        print(json.dumps(PARTS[arguments.part](config, flags)))
        return
    found: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):
        for name, seconds in one_round(arguments):
            found.setdefault(name, []).append(seconds)
            print(f"{name}: {seconds:.1f} s", flush=True)
    images = {"whole": config.epochs * (10_000 if arguments.cifar10 else patches(config))}
    rates = {name: [images["whole"] / s for s in values] for name, values in found.items()}
    for part in PARTS:
        if not part.startswith("whole"):
            rates[part] = [alone(arguments, part) for _ in range(arguments.rounds)]
    print(table(rates))
    figures = {"arguments": vars(arguments), "images_per_second": rates}
    figures |= describe(torch.device("cpu"), 1)
    arguments.json.write_text(json.dumps(figures, indent=1, default=str) + "\n")


def flags_of(arguments: argparse.Namespace, name: str = PLANNED) -> list[str]:
    """Returns the plan's flags of the run, with this benchmark's length, images and precision."""
    flags = [*plan.load(ROOT / "results" / "plan.yaml")[name].flags, "--seed", "0"]
    flags += ["--epochs", str(arguments.epochs), "--warmup-epochs", "0"]
    flags += ["--precision", arguments.precision]
    if arguments.cifar10:
        return [*flags, "--data", arguments.cifar10]
    flags[flags.index("--dataset") + 1] = "photos"
    return [*flags, "--train-images", "0"]


def images_of(config: simclr.Config):
    how = config.train_images, config.validation_share, config.subset_seed, config.scored_on
    return parts(*load_dataset(config.dataset, config.data), *how)[0]


def patches(config: simclr.Config) -> int:
    return len(images_of(config)) // config.batch_size * config.batch_size


# -- whole runs -----------------------------------------------------------------------------------


def one_round(arguments: argparse.Namespace) -> Iterator[tuple[str, float]]:
    """Yields (what, seconds) of every whole run."""
    flags, environment = flags_of(arguments), dict(os.environ)
    environment |= {"OMP_NUM_THREADS": str(arguments.threads), "PYTHONPATH": str(ROOT)}
    for name, more in (("whole, ours", []), ("alone, ours", QUIET)):
        with tempfile.TemporaryDirectory() as folder:
            line = [sys.executable, "recipes/simclr.py", *flags, *more, "--output", folder]
            yield name, seconds_of(line, environment)
    for workers in WORKERS:
        line = [sys.executable, *sys.argv, "--part", f"whole, lightly, {workers} workers"]
        yield f"whole, lightly, {workers} workers", seconds_of(line, environment)


def seconds_of(line: list[str], environment: dict[str, str]) -> float:
    started = time.monotonic()
    subprocess.run(line, cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def alone(arguments: argparse.Namespace, part: str) -> float:
    """Returns images per second of one part, in a process of its own."""
    line = [sys.executable, *sys.argv, "--part", part]
    environment = {**os.environ, "OMP_NUM_THREADS": str(arguments.threads), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(line, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(done.stdout.splitlines()[-1])


# -- lightly --------------------------------------------------------------------------------------


class InMemory(torch.utils.data.Dataset):
    """PIL images and labels, to which lightly gives its transform as to torchvision's CIFAR10."""

    def __init__(self, images):
        self.images = [images.load(number) for number in range(len(images))]
        self.labels, self.transform = images.labels, None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def loader_of(config: simclr.Config, workers: int) -> torch.utils.data.DataLoader:
    """Loads lightly's dataset by its transform, with views as in GSG's App. B.2, which are ours."""
    from lightly.data import LightlyDataset
    from lightly.transforms import SimCLRTransform

    transform = SimCLRTransform(
        input_size=config.image_size, cj_strength=0.5, gaussian_blur=0.0, min_scale=config.crop_min
    )
    dataset = LightlyDataset.from_torch_dataset(InMemory(images_of(config)), transform)
    return torch.utils.data.DataLoader(
        dataset,
        batch_size=config.batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
        persistent_workers=workers > 0,
    )


def lightly_step(config: simclr.Config):
    """Returns a step of lightly's modules on our encoder: forward, loss, backward and SGD."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import SimCLRProjectionHead

    torch.manual_seed(0)
    encoder = build_encoder(config.arch, config.image_size, config.zero_init_residual)
    head = SimCLRProjectionHead(encoder.embed_dim, config.projector_hidden, config.output_dim)
    model = nn.Sequential(encoder, head).train()
    criterion = NTXentLoss(temperature=config.temperature)
    optimizer = torch.optim.SGD(
        model.parameters(), config.lr, config.sgd_momentum, weight_decay=config.weight_decay
    )

    def step(x0: Tensor, x1: Tensor) -> None:
        loss = criterion(model(x0), model(x1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        loss.item()

    return step


def whole_of_lightly(workers: int):
    def whole(config: simclr.Config, _: list[str]) -> float:
        loader, step = loader_of(config, workers), lightly_step(config)
        for _ in range(config.epochs):
            for (x0, x1), *_ in loader:
                step(x0, x1)
        return 0.0

    return whole


def input_of_lightly(workers: int):
    def views(config: simclr.Config, _: list[str]) -> float:
        loader = loader_of(config, workers)
        next(iter(loader))  # starts the workers
        started = time.monotonic()
        steps = sum(1 for _ in loader)
        return steps * config.batch_size / (time.monotonic() - started)

    return views


def step_of_lightly(config: simclr.Config, _: list[str]) -> float:
    batches = [views for views, *_ in itertools.islice(loader_of(config, 0), 4)]
    step, started = lightly_step(config), 0.0
    for number, (x0, x1) in enumerate(itertools.islice(itertools.cycle(batches), STEPS + WARM_UP)):
        if number == WARM_UP:
            started = time.monotonic()
        step(x0, x1)
    return STEPS * config.batch_size / (time.monotonic() - started)


# -- ours, apart ----------------------------------------------------------------------------------


def prepared(config: simclr.Config, steps: int) -> Iterator[tuple[Any, ...]]:
    """Yields batches as a run's loader gives them."""
    images = images_of(config)
    order = RankBatches(len(images), config.batch_size, 0, 0, steps, 0, 1)
    return view_loader(images, simclr.views_of(config), order, 0)


def input_of_ours(config: simclr.Config, _: list[str]) -> float:
    steps = 10_000 // config.batch_size
    for _ in prepared(config, 2):
        pass  # kernels are compiled
    started = time.monotonic()
    for _ in prepared(config, steps):
        pass
    return steps * config.batch_size / (time.monotonic() - started)


def step_of_ours(config: simclr.Config, flags: list[str]) -> float:
    """Measures the recipe's own loop over a few batches, again and again."""
    batches = [(pixels, ids, [], False) for pixels, ids, *_ in prepared(config, 4)]
    times = []

    def again(*_, **__) -> Iterator:
        for batch in itertools.islice(itertools.cycle(batches), STEPS + WARM_UP):
            times.append(time.monotonic())
            yield batch

    run.view_loader = again
    with tempfile.TemporaryDirectory() as folder:
        more = [*QUIET, "--max-steps", str(STEPS + WARM_UP), "--epochs", "10"]
        with contextlib.redirect_stdout(sys.stderr):
            simclr.main([*flags, *more, "--workers", "0", "--output", folder])
    return (STEPS - 1) * config.batch_size / (times[-1] - times[WARM_UP])


def where(arguments: argparse.Namespace) -> str:
    """Returns seconds and share of each part of a whole run in this process, also of its loader."""
    recipe = importlib.import_module(f"recipes.{arguments.where}")
    spent: dict[str, float] = {}
    began = time.monotonic()

    def timed(name: str, function: Callable) -> Callable:
        def call(*args, **kwargs):
            started = time.monotonic()
            try:
                return function(*args, **kwargs)
            finally:
                spent[name] = spent.get(name, 0.0) + time.monotonic() - started

        return call

    def loader(*args, **kwargs) -> Iterator:
        batches = iter(view_loader(*args, **kwargs))
        spent.setdefault("start, k-NN of the random encoder included", time.monotonic() - began)
        following = timed("input, waited for", lambda: next(batches, None))
        while (batch := following()) is not None:
            yield batch

    for name, owner, method in TIMED:
        setattr(owner, method, timed(name, getattr(owner, method)))
    run.view_loader = loader
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        recipe.main([*flags_of(arguments, f"lab-{arguments.where}"), "--output", folder])
    whole = time.monotonic() - began
    spent["heads, loss and the rest"] = whole - sum(spent.values())
    lines = ["| part | seconds | share |", "|---|---|---|"]
    for name, seconds in sorted(spent.items(), key=lambda item: -item[1]):
        lines.append(f"| {name} | {seconds:.1f} | {seconds / whole:.0%} |")
    return "\n".join([*lines, f"| whole | {whole:.1f} | |"])


TIMED = (
    ("encoder, forward", Pieces, "__call__"),
    ("backward", Tensor, "backward"),
    ("optimizer", torch.optim.SGD, "step"),
    ("monitors", run.Run, "log"),
    ("k-NN after epochs", run.Run, "end_epoch"),
    ("look-ups and queue", SupportSet, "nearest"),
    ("look-ups and queue", SupportSet, "enqueue"),
    ("end: export, pictures", run.Run, "finish"),
)
PARTS = {f"whole, lightly, {n} workers": whole_of_lightly(n) for n in WORKERS}
PARTS |= {"input, ours": input_of_ours}
PARTS |= {f"input, lightly, {n} workers": input_of_lightly(n) for n in WORKERS}
PARTS |= {"step, ours": step_of_ours, "step, lightly": step_of_lightly}


NAMES = {"whole": "whole run", "alone": "whole run, without k-NN and geometry"}


def table(rates: dict[str, list[float]]) -> str:
    """Returns a row for the whole run, its training alone, input and step."""
    middle = {name: statistics.median(values) for name, values in rates.items()}
    lines = ["| part | ours, images/s | lightly, images/s | ratio |", "|---|---|---|---|"]
    for part, ours in (("whole", "whole"), ("whole", "alone"), ("input",) * 2, ("step",) * 2):
        theirs = {n: v for n, v in middle.items() if n.startswith(f"{part}, lightly")}
        best = max(theirs, key=theirs.get)
        words = best.removeprefix(f"{part}, lightly").strip(", ")
        own = middle[f"{ours}, ours"]
        name = NAMES.get(ours, ours)
        lines.append(
            f"| {name} | {own:.0f} | {theirs[best]:.0f}{f' ({words})' if words else ''} "
            f"| {own / theirs[best]:.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
