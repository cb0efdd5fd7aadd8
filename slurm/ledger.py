"""The ledger of what was submitted, in a scratch folder that all nodes see.

<scratch>/<name>/runs.json       the runs of a launch or sweep, and which jobs they became
<scratch>/<name>/<n>/code        the snapshot that the n-th submission runs
<scratch>/<name>/<n>/jobs        submitit's files: sbatch script, pickles, a log for each task
<scratch>/<name>/<n>/notes       what the tasks noted (see task.py)
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import write
from common.run import documents

NAME = "runs.json"


@dataclass
class Job:
    """One run as it is submitted: `folder` is its run folder, None if the script has none."""

    name: str
    script: str
    flags: list[str]
    folder: str | None = None


def check_name(name: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._+=-]*", name):
        raise UserError(f"{name!r} is no name for a folder: letters, digits, . _ + = and - only")
    return name


def read_ledger(folder: Path) -> dict[str, Any]:
    path = folder / NAME
    if not path.exists():
        return {"name": folder.name, "runs": [], "submissions": []}
    return documents.read_json(path, "ledger")


def ledgers_in(scratch: Path) -> list[tuple[Path, dict[str, Any]]]:
    """Returns (folder, ledger) of every launch and sweep in a scratch folder, oldest first."""
    paths = sorted(scratch.glob(f"*/{NAME}"), key=lambda path: path.stat().st_mtime)
    return [(path.parent, read_ledger(path.parent)) for path in paths]


def write_ledger(folder: Path, ledger: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder / NAME, json.dumps(ledger, indent=1) + "\n")


def log_path(folder: Path, submission: dict[str, Any], run: str, rank: int = 0) -> Path:
    """Returns the path of the log of one task of a run."""
    job = submission["jobs"][run]
    return folder / str(submission["number"]) / "jobs" / f"{job}_{rank}_log.out"
