"""SNCLR's loss at batch 4096 with 30 neighbours: peak memory and time, plain and in tiles.

    python benchmarks/snclr_loss.py                                # 4096 x 126 976 columns, D 256
    python benchmarks/snclr_loss.py --images 512 --neighbours 5 --repeats 3

Both directions, forward and backward, as a step of the recipe does, each form in a process of its
own; "plain" is the equation with all logits at once. The bound is 1.2 times what MoCo-v3 needs at
the same batch, plus the queue (128 000 x 256, 131 MB). Of the two readings of "MoCo-v3's step" this
takes the strict one: its loss part, that is the InfoNCE of 4096 x 4096 logits in both directions,
with its inputs (queries and keys of two views), without the encoder: a whole step holds the
activations of 2 x 4096 images beside, which would make the bound easy.

Memory is counted the same way for all three: everything held at the peak, inputs included, above
the process without them. SNCLR's inputs are then the queue, projections, predictions, keys, and the
neighbours that were looked up in both directions (2 x 126 MB here). On a CPU it is the peak of the
resident memory, with an allocator (glibc's) that gives blocks above 1 MB back at once, for all
three alike: without, what is left over in its heap adds 10 to 35 MB, from run to run differently.
On a GPU it is torch.cuda.max_memory_allocated.
"""

import argparse
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from common.run.help import in_80_columns
from recipes.snclr import positiveness, snclr_loss

NAMES = {"plain": "SNCLR, plain", "tiled": "SNCLR, in tiles", "mocov3": "MoCo-v3's loss"}
TEMPERATURE = 0.2
MB = 1e6
AT_ONCE = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
OUTPUT = Path(__file__).resolve().parent / "results" / "snclr_loss.json"


def plain_loss(
    predictions: Tensor,
    projections: Tensor,
    keys: Tensor,
    neighbours: Tensor,
    temperature: float,
    form: str = "paper",
) -> Tensor:
    """Computes recipes.snclr.snclr_loss on one rank with all its logits at once; same arguments."""
    n, k = neighbours.shape[:2]
    weights = torch.cat([keys.new_ones(n, 1), positiveness(projections, neighbours)], dim=1)
    columns = F.normalize(torch.cat([keys[:, None], neighbours], dim=1), dim=2)
    logits = F.normalize(predictions, dim=1) @ columns.flatten(0, 1).T / temperature
    total = logits.logsumexp(dim=1)
    images = torch.arange(n, device=logits.device)
    positives = logits.view(n, n, 1 + k)[images, images]
    if form == "paper":
        return (total - (weights.log() + positives).logsumexp(dim=1)).mean()
    return (weights * (total[:, None] - positives)).sum(dim=1).mean() * 2 * temperature


def mocov3_loss(queries: Tensor, keys: Tensor, temperature: float) -> Tensor:
    """Computes MoCo-v3's Algorithm 1: cross-entropy over the batch, times 2 tau; (N,D) each."""
    logits = F.normalize(queries, dim=1) @ F.normalize(keys, dim=1).T / temperature
    labels = torch.arange(len(logits), device=logits.device)
    return F.cross_entropy(logits, labels) * 2 * temperature


def inputs_of(what: str, arguments: argparse.Namespace, device: torch.device) -> dict:
    """Makes the loss's inputs: all are (N,D) but the neighbours (N,K,D) and the queue (Q,D)."""
    n, k, d = arguments.images, arguments.neighbours, arguments.dim
    torch.manual_seed(0)
    names = ["z1", "z2", "key1", "key2"] + (["y1", "y2"] if what != "mocov3" else [])
    made = {name: torch.randn(n, d, device=device) for name in names}
    for name in ("z1", "z2", "y1", "y2"):
        if name in made:
            made[name].requires_grad_()
    if what != "mocov3":
        made["queue"] = F.normalize(torch.randn(arguments.queue, d, device=device), dim=1)
        for name in ("near1", "near2"):
            positions = torch.randint(arguments.queue, (n, k), device=device)
            made[name] = made["queue"][positions]
    return made


def step(what: str, t: dict) -> Tensor:
    """Returns the loss in both directions, after its backward pass."""
    if what == "mocov3":
        loss = mocov3_loss(t["z1"], t["key2"], TEMPERATURE)
        loss = loss + mocov3_loss(t["z2"], t["key1"], TEMPERATURE)
    else:
        one = plain_loss if what == "plain" else snclr_loss
        loss = one(t["z1"], t["y1"], t["key2"], t["near2"], TEMPERATURE)
        loss = loss + one(t["z2"], t["y2"], t["key1"], t["near1"], TEMPERATURE)
    loss.backward()
    return loss.detach()


def resident(name: str) -> float:
    """Returns VmRSS (now) or VmHWM (the peak) of this process in bytes."""
    return 1024 * int(re.search(rf"{name}:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def child(arguments: argparse.Namespace) -> None:
    """Runs one form; prints memory, time, loss and the gradients' norms as JSON."""
    torch.set_num_threads(arguments.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = device.type == "cuda"
    small = argparse.Namespace(images=8, neighbours=2, dim=4, queue=16)
    step(arguments.form, inputs_of(arguments.form, small, device))  # libraries are loaded
    if gpu:
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated()
    else:
        before = resident("VmRSS")
    tensors = inputs_of(arguments.form, arguments, device)
    if gpu:
        inputs = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        inputs = resident("VmRSS")
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts again (Linux)
    seconds = []
    for _ in range(arguments.repeats):
        for tensor in tensors.values():
            tensor.grad = None
        started = time.monotonic()
        loss = step(arguments.form, tensors).item()
        seconds.append(time.monotonic() - started)
    peak = torch.cuda.max_memory_allocated() if gpu else resident("VmHWM")
    gradients = {n: t.grad.norm().item() for n, t in tensors.items() if t.grad is not None}
    print(
        json.dumps(
            {
                "inputs_mb": (inputs - before) / MB,
                "loss_mb": (peak - inputs) / MB,
                "total_mb": (peak - before) / MB,
                "seconds": statistics.median(seconds),
                "loss": loss,
                "gradient_norms": gradients,
            }
        )
    )


def run(form: str, arguments: argparse.Namespace) -> dict:
    """Runs one form in a process of its own."""
    command = [sys.executable, __file__, "--form", form]
    for name in ("images", "neighbours", "dim", "queue", "threads", "repeats"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, env=os.environ | AT_ONCE, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{form}: {done.stderr.strip() or f'ended with {done.returncode}'}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--images", type=int, default=4096)
    parser.add_argument("--neighbours", type=int, default=30)
    parser.add_argument("--dim", type=int, default=256)
    parser.add_argument("--queue", type=int, default=128_000)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=1, help="steps per form, the median counts")
    parser.add_argument("--forms", nargs="+", choices=NAMES, default=[*NAMES])
    parser.add_argument("--output", type=Path, default=OUTPUT, help="JSON file for the numbers")
    parser.add_argument("--form", choices=NAMES, help="one form only, for the processes above")
    arguments = parser.parse_args()
    if arguments.form:
        child(arguments)
        return
    columns = arguments.images * (1 + arguments.neighbours)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(
        f"{arguments.images} x {columns} columns, D {arguments.dim}, float32, {device}, "
        f"{arguments.threads} threads, load {os.getloadavg()[0]:.1f}"
    )
    print(f"{'':18} {'inputs MB':>9} {'loss MB':>9} {'all MB':>9} {'seconds':>8} {'loss':>10}")
    found = {}
    for form in arguments.forms:
        found[form] = row = run(form, arguments)
        print(
            f"{NAMES[form]:18} {row['inputs_mb']:9.0f} {row['loss_mb']:9.0f} "
            f"{row['total_mb']:9.0f} {row['seconds']:8.2f} {row['loss']:10.5f}",
            flush=True,
        )
    about = {n: v for n, v in vars(arguments).items() if n not in ("form", "output", "forms")}
    about |= {"device": device, "torch": torch.__version__, "python": platform.python_version()}
    result = {"about": about, "forms": found}
    if {"tiled", "mocov3"} <= set(found):
        bound = 1.2 * found["mocov3"]["total_mb"] + 4 * arguments.queue * arguments.dim / MB
        result["bound_mb"] = bound
        verdict = "below" if found["tiled"]["total_mb"] < bound else "ABOVE"
        print(f"in tiles {found['tiled']['total_mb']:.0f} MB, {verdict} the bound {bound:.0f} MB")
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
