"""Helpers that several tests share: running a script, and a recipe on one or several ranks."""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from common.augment import View, two_views

if sys.argv[0] == "-c":  # xdist's workers: the recorded command of what runs in this process
    sys.argv = ["pytest", *sys.argv[1:]]
ROOT = Path(__file__).resolve().parent.parent
SHARED_IMAGES = ROOT.parent / "shared" / "data"  # on the project's own machines only

# the smallest photos run: every test that starts a process uses it
SMALL = ["--dataset", "photos", "--batch-size", "36", "--workers", "1", "--knn-every", "0"]
QUEUE = ["--queue-size", "128"]


def small(recipe: str) -> list[str]:
    """The smallest run of a recipe, with its queue where it has one."""
    return SMALL if recipe.endswith("gsg") else [*SMALL, *QUEUE]


def byol_views(size: int) -> tuple[View, View]:
    return two_views("byol", size, interpolation="bicubic")


def simsiam_view(size: int) -> View:
    return two_views("simsiam", size, 0.2)[0]


def cifar_view(size: int, crop_min: float = 0.08) -> View:
    return two_views("cifar", size, crop_min)[0]


def crop_view(size: int) -> View:
    return two_views("crop-flip", size)[0]


def environment(**extra: str) -> dict[str, str]:
    """This environment with one thread and no GPU, so that runs are comparable and cheap."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | extra


def run_script(script: str, *flags: str, timeout: float = 240, **extra: str):
    """The finished process of `python script flags`, with its output as text.

    Forked from a server that has imported PyTorch already, which saves 4 s of a core each time;
    `run_fresh` is the same from a new interpreter.
    """
    line = [str(ROOT / script), *map(str, flags)]
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "err")]
        process = FORKS.Process(target=as_script, args=(line, files, environment(**extra)))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(line, timeout, files[0].read_text())
        texts = [file.read_text(errors="replace") for file in files]
        return subprocess.CompletedProcess(line, process.exitcode, *texts)


def as_script(line: list[str], files: list[Path], variables: dict[str, str]) -> None:
    """In the forked process: what a new interpreter would do with this command line."""
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin = open(os.devnull)  # noqa: SIM115, open until the process ends, as these two
    sys.stdout, sys.stderr = (open(n, "w", buffering=1, closefd=False) for n in (1, 2))  # noqa: SIM115
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    sys.argv = line
    sys.path[0] = str(Path(line[0]).parent)
    try:
        runpy.run_path(line[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torchvision", "timm", "tyro", "recipes.snclr"])
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the fork server: threads do not survive a fork


def run_fresh(script: str, *flags: str, timeout: float = 240, **extra: str):
    """As run_script, by a new interpreter: what a user would start."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def interruptible() -> None:
    """For Popen's preexec_fn: a shell's background jobs, CI's perhaps, ignore SIGINT, and so would
    their children.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


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


def interrupted(script: str, flags, has_begun, number=signal.SIGTERM) -> tuple[int, str]:
    """Exit code and output of a script that gets a signal once it `has_begun`."""
    process = subprocess.Popen(
        [sys.executable, str(ROOT / script), *flags],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=interruptible,
    )
    end = time.monotonic() + 200
    while not has_begun() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(timeout=200)
    return process.returncode, output


def only_error(process) -> str:
    """The one line that a mistake gets: no traceback, and an exit code that is not 0."""
    assert process.returncode not in (0, None), process.stdout
    assert "Traceback" not in process.stderr, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, process.stderr
    return lines[0]


@pytest.fixture(autouse=True)
def same_environment():
    """What a test or the code under test puts into this process's environment ends with it: a
    left-over RANK would make every later run in this process wait for others.
    """
    before = dict(os.environ)
    yield
    for name in {*before, *os.environ} - {"PYTEST_CURRENT_TEST"}:
        if name not in before:
            del os.environ[name]
        elif os.environ.get(name) != before[name]:
            os.environ[name] = before[name]


@pytest.fixture
def shared_images() -> Path:
    if not SHARED_IMAGES.is_dir():
        pytest.skip("the project's shared images are not on this machine")
    return SHARED_IMAGES
