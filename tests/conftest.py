"""Helpers that several tests share: running a script, and a recipe on one or several ranks."""

import fcntl
import functools
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

import pytest

from common import cards  # what is heavy waits, since xdist's first process runs no test

if sys.argv[0] == "-c":  # xdist's workers: the recorded command of what runs in this process
    sys.argv = ["pytest", *sys.argv[1:]]
ROOT = Path(__file__).resolve().parent.parent
SHARED_IMAGES = ROOT.parent / "shared" / "data"  # on the project's own machines only

# the smallest photos run: every test that starts a process uses it
SMALL = ["--dataset", "photos", "--batch-size", "36", "--workers", "1", "--knn-every", "0"]


def small(recipe: str) -> list[str]:
    """Returns the flags of a recipe's smallest run, as its card has it."""
    return [*SMALL, *map(str, cards.load()[recipe].smallest)]


def smallest(method: str) -> tuple[str, list[str]]:
    """Returns the recipe of a method, and the flags of its smallest run."""
    recipe, flags = METHODS[method]
    return recipe, [*small(recipe), *flags]


def flags_of(values: dict[str, object]) -> list[str]:
    """Turns a card's values into flags: {"gsg": False} becomes --no-gsg."""
    flags = []
    for name, value in values.items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    return flags


# every method of every card, with its recipe and the flags that make it
METHODS = {
    method: (recipe, flags_of(values))
    for recipe, card in cards.load().items()
    for method, values in card.methods.items()
}


# a recipe's method without flags, or else the last one of its card
DEFAULTS = [
    next((method for method, flags in card.methods.items() if not flags), [*card.methods][-1])
    for card in cards.load().values()
]
FIRST = {cards.load()[METHODS[m][0]].family: m for m in reversed(DEFAULTS)}


def long_unless(quick: Iterable[str]) -> list:
    """Returns every method as a parameter of a test; those that are not among `quick` are long."""
    return [m if m in quick else pytest.param(m, marks=pytest.mark.long) for m in METHODS]


# for parametrize: in `make test` the first recipe of each family runs, as it is by default
BY_FAMILY = long_unless(FIRST.values())

DRAWS = {"runs": True}


@functools.cache
def drawing() -> list[tuple[object, str, Callable]]:
    """Returns where a run looks up its pictures' functions, their names, and these functions."""
    from common.run import pictures
    from common.run.run import Run

    places = [(pictures, "draw_curves"), (Run, "draw_neighbours")]
    return [(place, name, getattr(place, name)) for place, name in places]


def draw(runs: bool) -> None:
    """Sets whether the runs of this process, and of the scripts that it starts, draw pictures."""
    DRAWS["runs"] = runs
    for place, name, function in drawing():
        setattr(place, name, function if runs else lambda *_: None)


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Lets only tests marked `pictures` draw them: pictures are half of a small run's time."""
    draw("pictures" in item.keywords)


def environment(**extra: str) -> dict[str, str]:
    """Returns this environment with one thread and no GPU: runs are then comparable and cheap."""
    drop = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return kept | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | extra


class Script:
    """A script in a process of its own, with what subprocess.Popen offers.

    It is forked from a server that has imported PyTorch already, which saves 4 s of a core each
    time; `run_fresh` starts a new interpreter.
    """

    def __init__(
        self, script: str, *flags: object, merged: bool = False, root: Path = ROOT, **extra: str
    ):
        self.args = [str(root / script), *map(str, flags)]
        self.folder = tempfile.TemporaryDirectory()
        names = ("out", "out") if merged else ("out", "err")
        self.files = [Path(self.folder.name) / name for name in names]
        for file in self.files:
            file.touch()
        arguments = (self.args, self.files, environment(**extra), DRAWS["runs"], root)
        start_fork_server()
        self.process = FORKS.Process(target=as_script, args=arguments)
        self.process.start()

    def poll(self) -> int | None:
        return self.process.exitcode

    returncode = property(poll)

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        if self.poll() is None:
            self.kill()
            self.process.join()
            raise subprocess.TimeoutExpired(self.args, timeout, self.files[0].read_text())
        return self.process.exitcode

    def communicate(self, timeout: float | None = None) -> list[str]:
        self.wait(timeout)
        return [file.read_text(errors="replace") for file in self.files]

    def said(self, text: str, timeout: float = 200) -> bool:
        """Tells whether it says `text` before it ends; returns as soon as it has."""
        end = time.monotonic() + timeout
        while text not in self.files[0].read_text() and time.monotonic() < end:
            if self.poll() is not None:
                break
            time.sleep(0.02)
        return text in self.files[0].read_text()

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def as_script(
    line: list[str], files: list[Path], variables: dict[str, str], draws: bool, root: Path
) -> None:
    """Does, in the forked process, what a new interpreter would do with this command line."""
    draw(draws)
    if root != ROOT:
        move_to(root)
    for number, file in enumerate(files, 1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdin = open(os.devnull)  # noqa: SIM115, open until the process ends, as these two
    sys.stdout, sys.stderr = (  # in UTF-8, by Python's name for it: --help looks at the name
        open(n, "w", buffering=1, encoding="utf-8", closefd=False)  # noqa: SIM115
        for n in (1, 2)
    )
    os.environ.clear()
    os.environ.update(variables)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # the fork server ignores it
    multiprocessing.set_start_method("fork", force=True)  # Linux's default, for loader workers
    sys.argv = line
    sys.path[0] = str(Path(line[0]).parent)
    try:
        runpy.run_path(line[0], run_name="__main__")
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def move_to(root: Path) -> None:
    """Forgets, in the forked process, this project's modules for those of a copy of it."""
    ours = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    for name in [name for name in sys.modules if name.split(".")[0] in ours]:
        del sys.modules[name]
    sys.path[1:1] = [str(root)]
    os.chdir(root)


FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["warm"])


@functools.cache
def start_fork_server() -> None:
    """Starts the fork server with one thread, since no other survives, and tests/ for `warm`."""
    path = os.pathsep.join([str(ROOT / "tests"), str(ROOT)])
    with mock.patch.dict(os.environ, environment(PYTHONPATH=path)):
        forkserver.ensure_running()


def run_script(script: str, *flags: object, timeout: float = 240, root: Path = ROOT, **extra: str):
    """Runs `python script flags`; returns the finished process, with its output as text.

    `root`: of a copy of this project.
    """
    process = Script(script, *flags, root=root, **extra)
    output, errors = process.communicate(timeout)
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def run_fresh(script: str, *flags: object, timeout: float = 240, **extra: str):
    """Does the same as run_script, but by a new interpreter: this is what a user would start."""
    return subprocess.run(
        [sys.executable, str(ROOT / script), *map(str, flags)],
        env=environment(**extra),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def interruptible() -> None:
    """Undoes, as Popen's preexec_fn, that a shell's background jobs, CI's perhaps, ignore SIGINT:
    their children would, too.
    """
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def start_ranks(ranks: int, script: str, *flags: object) -> list[Script]:
    """Starts a process for each rank of one gloo group, as torchrun would."""
    if ranks == 1:
        return [Script(script, *flags, merged=True)]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    group = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    own = [{"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
    return [Script(script, *flags, merged=True, **group, **names) for names in own]


def run_ranks(ranks: int, script: str, *flags: object, timeout: float = 240) -> None:
    """Runs a script on several ranks; fails with the first rank's output."""
    processes = start_ranks(ranks, script, *flags)
    outputs = [process.communicate(timeout)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode == 0, output


def interrupted(script: str, flags, has_begun, number=signal.SIGTERM) -> tuple[int, str]:
    """Returns exit code and output of a script that gets a signal once it `has_begun`."""
    process = Script(script, *flags, merged=True)
    end = time.monotonic() + 200
    while not has_begun() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    process.send_signal(number)
    output, _ = process.communicate(200)
    return process.returncode, output


def only_error(process) -> str:
    """Returns the one line that a mistake gets: no traceback, and an exit code that is not 0."""
    assert process.returncode not in (0, None), process.stdout
    assert "Traceback" not in process.stderr, process.stderr
    lines = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, process.stderr
    return lines[0]


@pytest.fixture(autouse=True)
def same_environment():
    """Undoes what a test or the code under test puts into this process's environment: a left-over
    RANK would make every later run in this process wait for others.
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


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Makes a folder once for all of xdist's workers: `made_once(name, make)` is a folder that
    `make(folder)` has filled.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def of(name: str, make: Callable[[Path], None]) -> Path:
        folder, done = root / name, root / f"{name}.done"
        with open(root / f"{name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not done.exists():
                make(folder)
                done.touch()
        return folder

    return of


@pytest.fixture(scope="session")
def run_of(made_once):
    """Returns a function that gives the folder of a method's smallest run: three steps, k-NN."""

    def train(folder, method):
        recipe, flags = smallest(method)
        flags = [*flags, "--max-steps", "3", "--knn-every", "1"]
        flags += ["--train-images", "180", "--log-every", "2", "--output", folder]
        done = run_script(f"recipes/{recipe}.py", *flags)
        assert done.returncode == 0, done.stderr
        lines = [line for line in done.stdout.splitlines() if ", step " in line]
        assert len(lines) == 1 and "step 2 of 3: loss " in lines[0], done.stdout
        assert str(folder) in done.stdout.splitlines()[-1]

    return lambda method: made_once(f"trained {method}", lambda folder: train(folder, method))
