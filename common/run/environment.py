"""What a run ran on and from: commit, versions, devices, command."""

import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from common.errors import UserError
from common.files import write
from common.run import documents

if TYPE_CHECKING:
    import torch

NAME = "environment.json"
NO_CODE = (":!results", ":!runs", ":!README.md")  # what results/report.py writes, and runs
REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("torch", "torchvision", "timm", "numpy", "pillow", "scikit-learn", "safetensors")


def commit() -> tuple[str, bool | None]:
    """Returns (commit, dirty) of the checkout, or of the file .commit that a launcher wrote, else
    ("unknown", None). Dirty means changes outside NO_CODE. A launcher's snapshot may lie within a
    checkout, so only a checkout with these very files at its root counts.
    """
    if (REPOSITORY / ".git").exists():
        try:
            head = git("rev-parse", "HEAD")
            return head, bool(git("status", "--porcelain", "--", ".", *NO_CODE))
        except (OSError, subprocess.CalledProcessError):
            pass
    stored = REPOSITORY / ".commit"
    if stored.is_file() and (words := stored.read_text(errors="replace").split()):
        return words[0], "dirty" in words[1:]
    return "unknown", None


def untraceable(head: str, dirty: bool | None) -> str:
    """Says why results/record.py will refuse what this code makes, and what helps; "" if it will
    not. A run says so at its start, since nothing can fix it later.
    """
    refused = "results/record.py will refuse its numbers"
    if dirty is False:
        return ""
    if dirty and not (REPOSITORY / ".git").exists():
        return f"this code was copied from a tree with uncommitted changes: {refused}"
    if dirty:
        changed = git("status", "--porcelain", "--", ".", *NO_CODE).splitlines()
        names = [line.split(maxsplit=1)[-1] for line in changed]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return f"uncommitted changes ({', '.join(names[:3])}{more}): {refused}; commit them first"
    try:
        git("rev-parse", "HEAD"), git("status", "--porcelain")
        why = f"{REPOSITORY} is no git checkout"
    except OSError as error:
        why = f"git cannot be started ({error.strerror})"
    except subprocess.CalledProcessError as error:
        why = "git does not tell it: " + " ".join(error.stderr.split())
    return f"the commit of this code is unknown ({why}): {refused}"


def git(*arguments: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def describe(device: "torch.device", ranks: int) -> dict[str, Any]:
    """Describes one start of a run, as it is stored in environment.json."""
    import torch  # who only asks for the commit need not wait for it

    head, dirty = commit()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu_name()
    return {
        "started": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "commit": head,
        "dirty": dirty,
        "versions": {"python": platform.python_version(), **versions()},
        "devices": {"name": name, "ranks": ranks, "threads": torch.get_num_threads()},
        "cuda": torch.version.cuda if device.type == "cuda" else None,
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }


def versions() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        return f"{names[0]}, {len(names)} cores"
    except (OSError, IndexError):
        return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def last_start(folder: Path) -> dict[str, Any]:
    """Reads the description of a run's last start; raises UserError if it lacks its steps."""
    path = folder / NAME
    starts = documents.read_json(path, "environment")
    last = [starts, *starts.get("restarts", [])][-1]
    if "steps" not in last:
        raise UserError(f"{path} does not say the steps of the run's last start")
    return last


def note_start(folder: Path, description: dict[str, Any]) -> None:
    """Writes environment.json at the first start; later starts go into its list `restarts`."""
    path = folder / NAME
    if path.exists():
        try:
            first = documents.read_json(path, "environment")
            first.setdefault("restarts", []).append(description)
            description = first
        except UserError:  # a power cut may leave an empty file
            damaged = path.with_name(f"{path.stem}.damaged.json")
            path.replace(damaged)
            description["earlier starts"] = f"unreadable, kept as {damaged.name}"
    write(path, json.dumps(description, indent=2) + "\n")
