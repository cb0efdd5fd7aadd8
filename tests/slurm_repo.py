"""A git repository with this project's code and a few small scripts, to submit jobs from."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

from conftest import ROOT, environment

from slurm.ledger import read_ledger
from slurm.status import Queue, state_of

# seconds for a run's first steps: each copy of the code compiles its kernels, and six ranks at once
# on two slow cores have taken over 120
START = 300

# what the scripts share: no torch, so that they start at once
SCRIPTS = {
    # ends by itself, or on SIGUSR2 or SIGTERM with 75; the attempts are lines of a file
    "eval/stops/run.py": """
import signal, sys, time
folder, seconds = sys.argv[1], float(sys.argv[2])
def stop(number, frame):
    with open(folder, "a") as file:
        print("stopped by", signal.Signals(number).name, file=file)
    sys.exit(75)
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, stop)
with open(folder) as file:
    again = "stopped" in file.read()
with open(folder, "a") as file:
    print("started", file=file)
time.sleep(0.5 if again else seconds)
""",
    # rank 1 fails; the others wait for it for ever, as in a collective, deaf to SIGTERM
    "eval/waits/run.py": """
import os, signal, sys, time
for number in (signal.SIGUSR2, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
if os.environ.get("RANK", os.environ.get("SLURM_PROCID")) == "1":
    print("error: rank 1 cannot go on", file=sys.stderr)
    sys.exit(3)
time.sleep(600)
""",
    # says which packages a script gets
    "eval/where/run.py": """
import sys
import common
print("common is", common.__file__)
print("flags are", sys.argv[1:])
""",
    "eval/parses/run.py": """
import argparse, sys
def parse_arguments(argv):
    parser = argparse.ArgumentParser()
    parser.add_argument("--backbone", required=True)
    return parser.parse_args(argv)
if __name__ == "__main__":
    print("backbone is", parse_arguments(sys.argv[1:]).backbone)
""",
}


def make_repository(folder: Path) -> Path:
    """Makes a repository of its own with this tree's code, all of it committed."""
    for name in ("common", "recipes", "slurm"):
        ignore = shutil.ignore_patterns("__pycache__", "cluster.yaml")
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    for name in ("README.md", ".gitignore"):
        shutil.copy(ROOT / name, folder / name)
    for path, text in SCRIPTS.items():
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    git(folder, "init", "--quiet")
    commit_all(folder)
    return folder


def git(folder: Path, *arguments: str) -> str:
    who = ["-c", "user.name=tests", "-c", "user.email=tests@localhost"]
    done = subprocess.run(
        ["git", "-C", str(folder), *who, *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def commit_all(folder: Path) -> str:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", "state")
    return git(folder, "rev-parse", "HEAD")


def command(repository: Path, script: str, *flags: object) -> list[str]:
    return [sys.executable, str(repository / "slurm" / script), *map(str, flags)]


def call(repository: Path, cwd: Path, script: str, *flags: object, timeout: float = 240):
    """Runs slurm/<script> of a repository in the folder `cwd`; returns the finished process."""
    return subprocess.run(
        command(repository, script, *flags),
        cwd=cwd,
        env=environment(PYTHONPATH=str(repository)),
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def states(scratch: Path, name: str) -> dict:
    """Returns the state of each run of a launch or sweep, as status.py sees it."""
    folder, queue = scratch / name, Queue()
    record = read_ledger(folder)
    return {run["name"]: state_of(folder, record, run, queue) for run in record["runs"]}


def logs(scratch: Path) -> str:
    """Returns all logs below a scratch folder, to be shown when a test fails."""
    return "\n".join(f"== {p}\n{p.read_text()}" for p in sorted(scratch.rglob("*_log.out")))


def wait_until(condition, seconds: float, scratch: Path):
    """Returns the first true value of `condition()`; fails with the logs if it never comes."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, logs(scratch)
        time.sleep(0.2)
    return value


def last_step(folder: Path) -> int:
    """Returns the last step that a run has logged."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    steps = [0]
    for line in lines:
        try:
            steps.append(json.loads(line)["step"])
        except json.JSONDecodeError:
            break
    return steps[-1]
