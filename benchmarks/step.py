"""NNCLR's training step beside lightly's, and beside the least that the method needs.

    pip install lightly==1.6.0
    python benchmarks/step.py                          # ResNet-18, 32 pixels, batch 64, queue 4096
    python benchmarks/step.py --queue-sizes 4096,16384,98304 --json step.json

Three steps over the same batches, in turn within one process:

ours     the body of recipes/nnclr.py's own loop, as `main()` runs it: input, forward, look-up,
         loss, backward, optimizer, monitors, queue, metrics; decoding and views are left out
needed   forward and backward of encoders and heads, and the optimizer, of the same modules, called
         in the same way: what no implementation can do without
lightly  its NNCLR example built of its own modules: memory bank, heads, NTXentLoss, SGD

All three have the sizes of lightly's example: heads 512-512-512-128 and 128-512-128, SGD. Medians
of the step times, and medians over turns of the ratios.
"""

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator

import torch
import torchvision
from torch import Tensor, nn

from common import run
from common.environment import describe
from common.micro_batch import Pieces
from recipes import nnclr

WARM_UP = 4  # turns that are not counted: allocation, the first kernels


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet18", help="ours; lightly's is resnet18 always")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--queue-sizes", default="4096", help="one table row each, with commas")
    parser.add_argument("--turns", type=int, default=30, help="turns counted per queue size")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", default="", help="file for the figures")
    arguments, flags = parser.parse_known_args()
    torch.set_num_threads(arguments.threads)
    rows = [measure(arguments, int(size), flags) for size in arguments.queue_sizes.split(",")]
    print(table(arguments, rows))
    if arguments.json:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        figures = {"arguments": vars(arguments), "flags": flags, "rows": rows}
        figures |= describe(device, 1)
        with open(arguments.json, "w") as file:
            json.dump(figures, file, indent=1, default=str)


def measure(arguments: argparse.Namespace, queue_size: int, flags: list[str]) -> dict:
    """Median seconds of each step at one queue length, and the ratios."""
    with tempfile.TemporaryDirectory() as folder:
        command = f"--dataset photos --arch {arguments.arch} --image-size {arguments.image_size} "
        command += f"--batch-size {arguments.batch_size} --queue-size {queue_size} "
        command += "--projector-hidden 512 --predictor-hidden 512 --output-dim 128 --knn-every 0 "
        command += f"--max-steps {arguments.turns + WARM_UP} --epochs 1000 --workers 0 "
        turns = Turns(arguments, queue_size)
        loop = run.Run.batches
        run.Run.batches = turns.batches(loop)
        try:
            nnclr.main([*command.split(), "--output", folder, *flags])
        finally:
            run.Run.batches = loop
    return {"queue_size": queue_size} | turns.figures()


class Turns:
    """Ours, needed, lightly, again and again, driven from within the recipe's own loop."""

    def __init__(self, arguments: argparse.Namespace, queue_size: int):
        self.arguments, self.queue_size = arguments, queue_size
        self.seconds: dict[str, list[float]] = {"ours": [], "needed": [], "lightly": []}

    def batches(self, loop: Callable) -> Callable[..., Iterator]:
        def timed(this: run.Run, views):
            peers = {
                "needed": needed_step(this),
                "lightly": lightly_step(self.queue_size, this),
            }
            # views once, before: the loader is not what is measured
            batches = [*prepare(this, views, 4)]
            steps = this.last_step - this.step
            original, run.view_loader = run.view_loader, lambda *_, **__: repeat(batches, steps)
            this.config = dataclasses.replace(this.config, augment_device="cpu")
            try:
                source = iter(loop(this, views))
                while True:
                    started = now(this.device)
                    try:
                        item = next(source)  # the last step's metrics, this step's input
                    except StopIteration:
                        return
                    before = now(this.device) - started
                    started = now(this.device)
                    yield item
                    self.seconds["ours"].append(before + now(this.device) - started)
                    for name, step in peers.items():
                        started = now(this.device)
                        step(*item[1])
                        self.seconds[name].append(now(this.device) - started)
            finally:
                run.view_loader = original

        return timed

    def figures(self) -> dict:
        counted = {name: values[WARM_UP:] for name, values in self.seconds.items()}
        ratios = {
            f"ours / {name}": statistics.median(
                a / b for a, b in zip(counted["ours"], counted[name], strict=True)
            )
            for name in ("needed", "lightly")
        }
        return {name: statistics.median(values) for name, values in counted.items()} | ratios


def prepare(this: run.Run, views, count: int) -> Iterator[tuple[list[Tensor], Tensor]]:
    order = run.RankBatches(len(this.train), this.config.batch_size, 0, 0, count, 0, 1)
    for pixels, ids, _, _ in run.view_loader(this.train, views, order, 0):
        yield pixels, ids


def repeat(batches: list, steps: int) -> Iterator:
    for pixels, ids in itertools.islice(itertools.cycle(batches), steps):
        yield pixels, ids, [], False


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def needed_step(this: run.Run) -> Callable[[Tensor, Tensor], None]:
    """The same modules without look-up, loss, queue and monitors: a mean costs next to nothing."""
    model = this.place(nnclr.NNCLR(this.config))
    encode, projector = Pieces(model.f[0], this.config), model.f[1]
    optimizer = nnclr.build_optimizer("sgd", model.parameters(), 0.01, 0.9, 5e-4)

    def step(x1: Tensor, x2: Tensor) -> None:
        with this.autocast():
            z1, z2 = map(projector, encode(x1, x2))
            p1, p2 = model.g(z1), model.g(z2)
        optimizer.zero_grad()
        (p1.float().mean() + p2.float().mean()).backward()
        encode.replay()
        optimizer.step()

    return step


def lightly_step(queue_size: int, this: run.Run) -> Callable[[Tensor, Tensor], None]:
    """One step of lightly's NNCLR as its example has it (examples/pytorch/nnclr.py), in this run's
    precision.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import NNMemoryBankModule
    from lightly.models.modules.heads import NNCLRPredictionHead, NNCLRProjectionHead

    backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1], nn.Flatten())
    projector = NNCLRProjectionHead(512, 512, 128)
    predictor = NNCLRPredictionHead(128, 512, 128)
    model = nn.ModuleList([backbone, projector, predictor]).to(this.device)
    bank = NNMemoryBankModule(size=(queue_size, 128)).to(this.device)
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)

    def step(x1: Tensor, x2: Tensor) -> None:
        with this.autocast():
            z0, z1 = projector(backbone(x1)), projector(backbone(x2))
            p0, p1 = predictor(z0), predictor(z1)
        z0, z1, p0, p1 = z0.float(), z1.float(), p0.float(), p1.float()
        z0, z1 = bank(z0.detach(), update=False), bank(z1.detach(), update=True)
        loss = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def table(arguments: argparse.Namespace, rows: list[dict]) -> str:
    lines = [
        f"NNCLR, {arguments.arch}, {arguments.image_size} pixels, batch {arguments.batch_size}, "
        f"{arguments.threads} threads, torch {torch.__version__}",
        "",
        "| queue | ours, ms | needed, ms | lightly, ms | ours / needed | ours / lightly |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(f"{1e3 * row[name]:.1f}" for name in ("ours", "needed", "lightly"))
        ratios = " | ".join(f"{row[f'ours / {name}']:.3f}" for name in ("needed", "lightly"))
        lines.append(f"| {row['queue_size']} | {times} | {ratios} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
