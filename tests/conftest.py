"""Helpers that several tests share: running a script, and a recipe on one or several ranks."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHARED_IMAGES = ROOT.parent / "shared" / "data"  # on the project's own machines only

# the smallest photos run: every test that starts a process uses it
SMALL = ["--dataset", "photos", "--batch-size", "36", "--workers", "1", "--knn-every", "0"]
QUEUE = ["--queue-size", "128"]


def small(recipe: str) -> list[str]:
    """The smallest run of a recipe, with its queue where it has one."""
    return SMALL if recipe.endswith("gsg") else [*SMALL, *QUEUE]


def environment(**extra: str) -> dict[str, str]:
    """This environment with one thread and no GPU, so that runs are comparable and cheap."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | extra


def run_script(script: str, *flags: str, timeout: float = 240, **extra: str):
    """The finished process of `python script flags`, with its output as text."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def start_ranks(ranks: int, script: str, *flags: str) -> list[subprocess.Popen]:
    """A process for each rank of one gloo group, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(ranks):
        extra = {"RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
        extra |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(
            subprocess.Popen(
                [sys.executable, str(ROOT / script), *map(str, flags)],
                env=environment(**(extra if ranks > 1 else {})),
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    return processes


def run_ranks(ranks: int, script: str, *flags: str, timeout: float = 240) -> None:
    """Runs a script on several ranks; fails with the first rank's output."""
    processes = start_ranks(ranks, script, *flags)
    outputs = [process.communicate(timeout=timeout)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


def only_error(process) -> str:
    """The one line that a mistake gets: no traceback, and an exit code that is not 0."""
    assert process.returncode not in (0, None), process.stdout
    assert "Traceback" not in process.stderr, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, process.stderr
    return lines[0]


@pytest.fixture
def shared_images() -> Path:
    if not SHARED_IMAGES.is_dir():
        pytest.skip("the project's shared images are not on this machine")
    return SHARED_IMAGES
