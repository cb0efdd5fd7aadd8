"""NNCLR's training step beside lightly's, and beside the least that the method needs.

    pip install lightly==1.6.0
    python benchmarks/step.py                          # ResNet-18, 32 pixels, batch 64, queue 4096
    python benchmarks/step.py --queue-sizes 4096,16384

Three steps over the same batches, in turn:

ours     the body of recipes/nnclr.py's own loop, as `main()` runs it: input, forward, look-up,
         loss, backward, optimizer, monitors, queue, metrics; decoding and views are left out
needed   forward and backward of encoders and heads, and the optimizer, of the same modules, called
         in the same way: what no implementation can do without
lightly  its NNCLR example built of its own modules: memory bank, heads, NTXentLoss, SGD; on float
         batches, normalised and contiguous as its loader gives them

All three have the sizes of lightly's example: heads 512-512-512-128 and 128-512-128, SGD. They are
measured twice. Apart: each is a process of its own, asleep while it is another's turn; what users
of each get, with what a run sets for its process (on CPU common/run/allocator.py). Together: all
three within one process of the recipe, so that what it sets serves all; what the code alone gives.
Medians of the step times, and medians over turns of the ratios.
"""

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import multiprocessing
import os
import re
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from common.data.images import Images
from common.data.loaders import RankBatches, view_loader
from common.data.sets import load_dataset
from common.fast.micro_batch import Pieces
from common.fast.pixels import to_input
from common.run import run
from common.run.environment import describe
from common.run.help import in_80_columns
from recipes import nnclr

WARM_UP = 4  # turns that are not counted: allocation, the first kernels
BATCHES = 4  # different ones, again and again
PAUSE = 0.005  # seconds between turns of processes: OpenMP's threads spin on for a while
PEERS = ("ours", "needed", "lightly")
RESULTS = Path(__file__).resolve().parent / "results"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", default="resnet18", help="ours; lightly's is resnet18 always")
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--queue-sizes", default="4096", help="two table rows each, with commas")
    parser.add_argument("--turns", type=int, default=30, help="turns counted per row")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--json", type=Path, help="for the figures (results/step[FLAGS].json)")
    arguments, flags = parser.parse_known_args()
    if importlib.util.find_spec("lightly") is None:
        sys.exit("error: lightly is not installed: pip install lightly==1.6.0")
    torch.set_num_threads(arguments.threads)
    rows = []
    for size in map(int, arguments.queue_sizes.split(",")):
        for processes, groups in (("apart", [(p,) for p in PEERS]), ("together", [PEERS])):
            figures = measure(arguments, size, flags, groups)
            rows.append({"queue_size": size, "processes": processes} | figures)
    print(table(arguments, rows))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    figures = {"arguments": vars(arguments), "flags": flags, "rows": rows, **describe(device, 1)}
    name = re.sub(r"\W+", "-", " ".join(flags))  # -compile, -arch-resnet50
    path = arguments.json or RESULTS / f"step{name}.json"
    path.write_text(json.dumps(figures, indent=1, default=str) + "\n")


def measure(
    arguments: argparse.Namespace, queue_size: int, flags: list[str], groups: list[tuple[str, ...]]
) -> dict:
    """Returns each peer's median step in seconds, the ratios, and each process's peak memory."""
    seconds: dict[str, list[float]] = {name: [] for name in PEERS}
    pipes = [start(arguments, queue_size, flags, group) for group in groups]
    for pipe in pipes:
        pipe.recv()  # ready
    for _ in range(arguments.turns + WARM_UP):
        for pipe in pipes:
            time.sleep(PAUSE)
            pipe.send("go")
            for name, value in pipe.recv().items():
                seconds[name].append(value)
    counted = {name: values[WARM_UP:] for name, values in seconds.items()}
    figures = {name: statistics.median(values) for name, values in counted.items()}
    for name in ("needed", "lightly"):
        ratios = (a / b for a, b in zip(counted["ours"], counted[name], strict=True))
        figures[f"ours / {name}"] = statistics.median(ratios)
    memory = {"+".join(group): pipe.recv() for group, pipe in zip(groups, pipes, strict=True)}
    return figures | {"peak memory, MB": memory}


def table(arguments: argparse.Namespace, rows: list[dict]) -> str:
    lines = [
        f"NNCLR, {arguments.arch}, {arguments.image_size} pixels, batch {arguments.batch_size}, "
        f"{arguments.threads} threads, torch {torch.__version__}",
        "",
        "| queue | processes | ours, ms | needed, ms | lightly, ms | ours / needed "
        "| ours / lightly | peak memory, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        times = " | ".join(f"{1e3 * row[name]:.1f}" for name in PEERS)
        ratios = " | ".join(f"{row[f'ours / {name}']:.3f}" for name in ("needed", "lightly"))
        memory = ", ".join(f"{megabytes:.0f}" for megabytes in row["peak memory, MB"].values())
        cells = (str(row["queue_size"]), row["processes"], times, ratios, memory)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


# -- a process and its turns ----------------------------------------------------------------------


def start(*what) -> Connection:
    """Starts a process and returns the pipe to it. The process says when it is ready, takes a turn
    for each message, answers with the seconds of each of its peers, and ends with its peak memory
    in MB.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    context.Process(target=take_turns, args=(there, *what), daemon=True).start()
    there.close()  # so that a process that fails is noticed here
    return here


def take_turns(
    pipe: Connection,
    arguments: argparse.Namespace,
    queue_size: int,
    flags: list[str],
    peers: tuple[str, ...],
) -> None:
    torch.set_num_threads(arguments.threads)
    turns = arguments.turns + WARM_UP
    command = f"--dataset photos --arch {arguments.arch} --image-size {arguments.image_size} "
    command += f"--batch-size {arguments.batch_size} --queue-size {queue_size} "
    command += "--projector-hidden 512 --predictor-hidden 512 --output-dim 128 --knn-every 0 "
    command += f"--max-steps {turns} --epochs 1000 --workers 0"
    with contextlib.ExitStack() as stack:
        nowhere = stack.enter_context(open(os.devnull, "w"))
        stack.enter_context(contextlib.redirect_stdout(nowhere))  # what three runs say
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        command = [*command.split(), "--output", folder, *flags]
        if "ours" in peers:
            others = [name for name in peers if name != "ours"]
            run.Run.batches = in_turn(run.Run.batches, pipe, others)
            nnclr.main(command)
        else:
            take_turns_alone(pipe, command, turns, *peers)
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6)


def in_turn(loop: Callable, pipe: Connection, others: list[str]) -> Callable[..., Iterator]:
    """Replaces Run.batches: it waits for each turn, and after each step gives the others theirs."""

    def batches(this: run.Run, views):
        steps = {name: STEPS[name](this.config, this.device, this) for name in others}
        # views are made once, before: the loader is not measured
        prepared = [*prepare(this.config, this.train)]
        inputs = {n: inputs_of(n, prepared, this.device, this.dtype) for n in others}
        run.view_loader = lambda *_, **__: repeat(prepared, this.last_step)
        this.config = dataclasses.replace(this.config, augment_device="cpu")
        source = iter(loop(this, views))
        pipe.send("ready")
        for number in repeat(range(BATCHES), this.last_step):
            pipe.recv()
            started = now(this.device)
            item = next(source)  # the last step's metrics, this step's input
            yield item
            seconds = {"ours": now(this.device) - started}
            for name, step in steps.items():
                started = now(this.device)
                step(*inputs[name][number])
                seconds[name] = now(this.device) - started
            pipe.send(seconds)
        yield from source  # the end of the last step; no further one

    return batches


def take_turns_alone(pipe: Connection, command: list[str], turns: int, name: str) -> None:
    """Runs needed or lightly in a process without the recipe's loop; lightly even without a run."""
    config = nnclr.parse_arguments(command)
    if name == "needed":
        this = run.Run("nnclr", config)
        device, dtype, images = this.device, this.dtype, this.train
    else:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        this, dtype, (images, _) = None, torch.float32, load_dataset(config.dataset, config.data)
    step = STEPS[name](config, device, this)
    inputs = inputs_of(name, prepare(config, images), device, dtype)
    pipe.send("ready")
    for batch in repeat(inputs, turns):
        pipe.recv()
        started = now(device)
        step(*batch)
        pipe.send({name: now(device) - started})


def prepare(config: nnclr.Config, images: Images) -> Iterator[tuple]:
    """Yields what the loader gives for a few steps: pixels of each view, ids, no problems."""
    order = RankBatches(len(images), config.batch_size, 0, 0, BATCHES, 0, 1)
    for pixels, ids, *_ in view_loader(images, nnclr.views_of(config), order, 0):
        yield pixels, ids, [], False


def inputs_of(
    name: str, batches: Iterable, device: torch.device, dtype: torch.dtype
) -> list[list[Tensor]]:
    """Returns a peer's normalised views of each batch: channels last for needed, as in a run."""
    views = [[to_input(view, device, dtype) for view in pixels] for pixels, *_ in batches]
    return views if name == "needed" else [[x.contiguous() for x in batch] for batch in views]


def repeat(items: Sequence, times: int) -> Iterator:
    return itertools.islice(itertools.cycle(items), times)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


# -- the peers' steps -----------------------------------------------------------------------------


def needed_step(
    config: nnclr.Config, device: torch.device, this: run.Run
) -> Callable[[Tensor, Tensor], None]:
    """Steps the same modules without look-up, loss, queue and monitors: a mean is nearly free."""
    model = this.place(nnclr.NNCLR(config))
    encode = Pieces(model.encoder, config)
    optimizer = nnclr.build_optimizer("sgd", model.parameters(), 0.01, 0.9, 5e-4)

    def step(x1: Tensor, x2: Tensor) -> None:
        with this.autocast():
            z1, z2 = map(model.projector, encode(x1, x2))
            p1, p2 = model.predictor(z1), model.predictor(z2)
        optimizer.zero_grad()
        (p1.float().mean() + p2.float().mean()).backward()
        encode.replay()
        optimizer.step()

    return step


def lightly_step(
    config: nnclr.Config, device: torch.device, _: run.Run | None
) -> Callable[[Tensor, Tensor], None]:
    """Returns one step of lightly's NNCLR as its example has it (examples/pytorch/nnclr.py), in the
    recipe's precision.
    """
    from lightly.loss import NTXentLoss
    from lightly.models.modules import NNMemoryBankModule
    from lightly.models.modules.heads import NNCLRPredictionHead, NNCLRProjectionHead

    backbone = nn.Sequential(*list(torchvision.models.resnet18().children())[:-1], nn.Flatten())
    projector = NNCLRProjectionHead(512, 512, 128)
    predictor = NNCLRPredictionHead(128, 512, 128)
    model = nn.ModuleList([backbone, projector, predictor]).to(device)
    bank = NNMemoryBankModule(size=(config.queue_size, 128)).to(device)
    criterion = NTXentLoss()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.06)
    bf16 = config.precision == "bf16"

    def step(x1: Tensor, x2: Tensor) -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            z0, z1 = projector(backbone(x1)), projector(backbone(x2))
            p0, p1 = predictor(z0), predictor(z1)
        z0, z1, p0, p1 = z0.float(), z1.float(), p0.float(), p1.float()
        z0, z1 = bank(z0.detach(), update=False), bank(z1.detach(), update=True)
        loss = 0.5 * (criterion(z0, p1) + criterion(z1, p0))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


STEPS = {"needed": needed_step, "lightly": lightly_step}

if __name__ == "__main__":
    main()
