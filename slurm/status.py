"""A table of runs: state, epoch, score, time left, restarts, last line of the log.

    python slurm/status.py              # everything in the scratch folder
    python slurm/status.py SWEEP        # one launch or sweep
    python slurm/status.py --watch

Below the table stand the folder of the logs and how a job is ended. States are Slurm's own while
it knows the job (squeue, then sacct where there is accounting), and what the tasks noted later.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    from common.errors import EXIT_STOPPED, UserError, command, nearest_name
    from common.run import documents, environment, metrics, results
    from slurm.ledger import ledgers_in, log_path
    from slurm.resources import OneLineParser, cluster_layer, resources_of, scratch_folder
    from slurm.task import first_failure, read_notes
except ModuleNotFoundError as error:  # the system's python, say
    sys.exit(
        f"error: no module {error.name}: activate the environment first, `. .venv/bin/activate` in "
        "the checkout (make demo or make test makes it)"
    )

LIVE = {"PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "REQUEUE_HOLD"}
LIVE |= {
    "REQUEUE_FED",
    "RESIZING",
    "SIGNALING",
    "STAGE_OUT",
    "STOPPED",
    "SUSPENDED",
    "SPECIAL_EXIT",
}
TAIL = 1 << 18  # bytes of metrics.jsonl that are read at a time, from its end
MOST = 1 << 24  # bytes from its end in which k-NN is looked for
# what Slurm and submitit write into a log, even after a line that has no end yet
SCHEDULERS = re.compile(r"(?:^(?:submitit |srun: )|slurm(?:step)?d\S*: ).*")
RECORD = re.compile(r"record: (.+?\.json)(?: \(.*)?$")  # an evaluation's last lines
RECENT = 50  # steps over which the speed is measured


@dataclass
class State:
    """What is known of a run. `state` is Slurm's word, or FINISHED, STOPPED, LOST, NOT STARTED."""

    job: str
    cluster: str
    state: str
    live: bool
    reason: str = ""
    restarts: int = 0


class Queue:
    """What Slurm says of this user's jobs, asked once."""

    def __init__(self) -> None:
        self.known: dict[str, tuple[str, str]] | None = None
        self.accounted: dict[str, str] = {}

    def state(self, job: str) -> tuple[str, str]:
        """Returns (state, reason), or ("", "") if Slurm knows nothing of the job."""
        if self.known is None:
            words = [
                "squeue",
                "--noheader",
                "--array",
                "--states",
                "all",
                "--user",
                str(os.getuid()),
            ]
            lines = answer([*words, "--format", "%i|%T|%r"], needed=True)
            fields = [line.split("|", 2) for line in lines]
            self.known = {f[0]: (f[1], f[2]) for f in fields if len(f) == 3}
        if job in self.known:
            return self.known[job]
        array = job.split("_")[0]
        if array not in self.accounted:
            self.accounted[array] = ""
            words = ["sacct", "--noheader", "--parsable2", "--allocations", "--jobs", array]
            for line in answer([*words, "--format", "JobID,State"]):
                if line.count("|") == 1:
                    identity, state = line.split("|")
                    self.accounted[identity] = state.split(" ")[0]  # "CANCELLED by 1000"
        return self.accounted.get(job, ""), ""


def answer(words: list[str], needed: bool = False) -> list[str]:
    """Returns a Slurm command's lines; none if it is missing or, unless it is `needed`, fails."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=60)
    except OSError:
        return []
    except subprocess.TimeoutExpired:
        done = None
    if done is not None and done.returncode == 0:
        return done.stdout.splitlines()
    if needed:  # a job that is not listed would look as if it had ended
        said = done.stderr.strip().split("\n")[0] if done else "no answer within 60 s"
        raise UserError(f"Slurm does not tell the state of jobs, try again: {said}")
    return []


def state_of(folder: Path, ledger: dict[str, Any], run: dict[str, Any], queue: Queue) -> State:
    """Returns the state of a run's latest job."""
    submission = submission_of(ledger, run["name"])
    if submission is None:
        return State("", "", "NOT STARTED", live=False)
    job, cluster = submission["jobs"][run["name"]], submission["cluster"]
    notes = read_notes(folder / str(submission["number"]) / "notes", run["name"])
    starts = [n for n in notes if n["event"] == "start"]
    state = State(job, cluster, "", live=False, restarts=max(0, len(starts) - 1))
    said, reason = queue.state(job) if cluster == "slurm" else (local_state(submission, job), "")
    if said in LIVE:
        state.state, state.live = said, True
        state.reason = reason if said != "RUNNING" and reason != "None" else ""
    elif said and said != "COMPLETED":
        state.state = said
    else:
        state.state = noted_state(notes, said)
        if cluster == "local" and state.state == "CANCELLED":
            state.state = "STOPPED"
    return state


def submission_of(ledger: dict[str, Any], name: str) -> dict[str, Any] | None:
    """Returns the latest submission that a run was part of."""
    parts = [s for s in ledger["submissions"] if name in s["jobs"]]
    return parts[-1] if parts else None


def local_state(submission: dict[str, Any], job: str) -> str:
    """Returns RUNNING while a local run's controlling process lives, if that is on this machine."""
    with contextlib.suppress(OSError):
        words = Path(f"/proc/{job}/cmdline").read_bytes()
        here = submission["host"] == os.uname().nodename
        if here and b"submitit.local" in words:
            return "RUNNING"
    return ""


def noted_state(notes: list[dict[str, Any]], said: str) -> str:
    """Returns the state by a run's own notes, if Slurm has forgotten it or says COMPLETED."""
    if said == "COMPLETED":
        return "FINISHED"
    if not notes:
        return "CANCELLED"  # it left the queue before it started
    attempt = max(note["attempt"] for note in notes)
    last = [note for note in notes if note["attempt"] == attempt]
    if first_failure(last, attempt):
        return "FAILED"
    ends = [note["code"] for note in last if note["event"] == "end" and note["rank"] == 0]
    if ends:
        return "FINISHED" if ends[-1] == 0 else "STOPPED" if ends[-1] == EXIT_STOPPED else "FAILED"
    events = [note["event"] for note in last]
    signals = [note.get("signal") for note in last]
    if "requeue" in events or "SIGTERM" in signals:
        return "CANCELLED"  # asked to end, and never started again
    return "LOST"


# -- what a run has reached ----------------------------------------------------------------------


def progress(folder: str | None) -> dict[str, Any]:
    """Returns epochs, k-NN and seconds left of a run folder, as far as its files tell."""
    facts: dict[str, Any] = {}
    if folder is None or not Path(folder).is_dir():
        return facts
    path = Path(folder)
    with contextlib.suppress(UserError):
        steps = environment.last_start(path)["steps"]
        facts |= {"steps": steps} if "per_epoch" in steps else {}
    steps = []
    for line in backwards(path / metrics.NAME):
        if line["kind"] == "step" and len(steps) < RECENT:
            steps.append(line)
        if "knn" in line and line.get("epoch") != 0:  # that of epoch 0 is the random encoder's
            facts["knn"] = line["knn"]
            break
    if not steps:
        return facts
    facts["step"] = steps[0]["step"]
    with contextlib.suppress(UserError):
        found = results.read(path, ("step", "knn"))
        if found["step"] == facts["step"] and found["knn"] is not None:
            facts["knn"] = found["knn"]
    if "steps" in facts:
        rates = [s["images_per_second"] for s in steps if s.get("images_per_second", 0) > 0]
        left = facts["steps"]["last"] - facts["step"]
        with contextlib.suppress(UserError):
            config = documents.read_yaml(path / "config.yaml", "config", ["batch_size"])
            if rates and left > 0:
                seconds = sum(1 / rate for rate in rates) / len(rates) * config["batch_size"]
                facts["seconds_left"] = left * seconds
    return facts


def backwards(path: Path) -> Iterator[dict[str, Any]]:
    """Yields a metrics file's whole lines from its end, while a run may just be writing it."""
    try:
        file = documents.opened(path)
    except UserError:
        return
    with file:
        size = end = os.fstat(file.fileno()).st_size
        rest, known = b"", set()
        while end > max(0, size - MOST):
            start = max(0, end - TAIL)
            file.seek(start)
            lines = (file.read(end - start) + rest).split(b"\n")
            rest, end = (lines.pop(0), start) if start else (b"", 0)
            for line in reversed(lines):
                with contextlib.suppress(ValueError, UserError):
                    found = documents.parsed_json(line.decode(), strict=False)
                    documents.check_shape(found, "metrics", str(path), known)
                    yield found


def last_line(folder: Path, ledger: dict[str, Any], run: dict[str, Any], state: State) -> str:
    """Says why a run failed, else the last line of rank 0's log that is not submitit's own."""
    submission = submission_of(ledger, run["name"])
    if submission is None:
        return ""
    notes = read_notes(folder / str(submission["number"]) / "notes", run["name"])
    attempt = max((note["attempt"] for note in notes), default=0)
    if not state.live and (failure := first_failure(notes, attempt)):
        return failure
    if lines := log_lines(log_path(folder, submission, run["name"])):
        return lines[-1]
    return f"waits: {state.reason}" if state.reason else "no log"


def log_lines(path: Path) -> list[str]:
    """Returns the script's own lines at the end of a log, without submitit's and Slurm's."""
    try:
        with documents.opened(path) as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - TAIL))
            lines = file.read().decode(errors="replace").splitlines()
    except (OSError, UserError):
        return []
    lines = [SCHEDULERS.sub("", line).strip() for line in lines]
    return [line for line in lines if line]


def scores(lines: list[str]) -> str:
    """Says what the records in an evaluation's log hold: `linear 68.20, kNN (k200,t.1) 61.05`."""
    found = []
    for line in lines:
        if named := RECORD.match(line):
            with contextlib.suppress(UserError):
                record = documents.read_json(named[1], "record")
                found.append(f"{record['protocol']} {record['value']:.2f}")
    return ", ".join(dict.fromkeys(found))


# -- the table -----------------------------------------------------------------------------------

COLUMNS = ("run", "job", "state", "epoch", "score", "left", "restarts", "last line")


def rows_of(folder: Path, ledger: dict[str, Any], queue: Queue) -> list[list[str]]:
    rows = []
    for run in ledger["runs"]:
        state, facts = state_of(folder, ledger, run, queue), progress(run["folder"])
        epoch, left = "", ""
        if "step" in facts and "steps" in facts:
            per_epoch = facts["steps"]["per_epoch"]
            epochs = facts["steps"]["last"] / per_epoch
            epoch = f"{facts['step'] / per_epoch:.3g} of {epochs:.3g}"
        if "seconds_left" in facts:
            left = how_long(facts["seconds_left"])
        score = f"k-NN {facts['knn']:.1%}" if "knn" in facts else ""
        if submission := None if score else submission_of(ledger, run["name"]):
            score = scores(log_lines(log_path(folder, submission, run["name"])))
        line = last_line(folder, ledger, run, state)
        rows.append(
            [run["name"], state.job, state.state, epoch, score, left, str(state.restarts), line]
        )
    return rows


def how_long(seconds: float) -> str:
    """Says a time in words: 5400 gives '1 h 30'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    total = round(seconds / 60)
    if total >= 48 * 60:
        return f"{total // 1440} d {total % 1440 // 60} h"
    return f"{total // 60} h {total % 60:02}" if total >= 60 else f"{total} min"


def table(rows: list[list[str]], width: int) -> str:
    """Aligns columns; cuts the last one at the width."""
    rows = [[*COLUMNS], *rows]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS) - 1)]
    lines = []
    for row in rows:
        cells = [cell.ljust(w) for cell, w in zip(row, [*widths, 0], strict=True)]
        lines.append("  ".join(cells).rstrip()[:width])
    return "\n".join(lines)


def show(scratch: Path, name: str, width: int) -> None:
    ledgers = [(f, r) for f, r in ledgers_in(scratch) if not name or f.name == name]
    if name and not ledgers:
        names = sorted(folder.name for folder, _ in ledgers_in(scratch))
        hint = nearest_name(name, names) or f"; there are {', '.join(names) or 'none'}"
        raise UserError(f"no launch or sweep {name} in {scratch}{hint}")
    if not ledgers:
        raise UserError(f"nothing was submitted from {scratch}: see --cluster and --scratch")
    queue = Queue()
    rows = [row for folder, ledger in ledgers for row in rows_of(folder, ledger, queue)]
    print(table(rows, width))
    for folder, ledger in ledgers:
        print(f"\n{where_logs_lie(folder, ledger)}")
    print(how_to_end({s["cluster"] for _, ledger in ledgers for s in ledger["submissions"]}))
    sys.stdout.flush()


def where_logs_lie(folder: Path, ledger: dict[str, Any]) -> str:
    """Says where the logs of a launch's or sweep's latest jobs are: one for each rank."""
    latest = [submission_of(ledger, run["name"]) for run in ledger["runs"]]
    numbers = sorted({submission["number"] for submission in latest if submission})
    folders = [str(folder / str(number) / "jobs") for number in numbers]
    return f"logs of {folder.name}: JOB_RANK_log.out in {', '.join(folders)}"


def how_to_end(clusters: set[str]) -> str:
    """Says which commands end a job of these kinds, and what then happens."""
    kinds = {"slurm": "scancel JOB", "local": "kill JOB"}
    ways = " or ".join(way for kind, way in kinds.items() if kind in clusters)
    return f"to end one: {ways}; it saves first, and the same command again continues it"


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("sweep", nargs="?", default="", help="a launch or sweep (default: all)")
    parser.add_argument("--watch", action="store_true", help="show it anew until Ctrl-C")
    parser.add_argument(
        "--every", type=float, default=10.0, metavar="N", help="seconds for --watch (default 10)"
    )
    parser.add_argument(
        "--cluster", default="", metavar="FILE", help="as for launch.py: its scratch"
    )
    parser.add_argument("--scratch", default=None, metavar="FOLDER", help="instead of the file's")
    arguments = parser.parse_args(argv)
    if arguments.every < 1:
        raise UserError("--every: give at least 1 second, to spare the cluster")
    layer = cluster_layer(arguments.cluster)
    given = {} if arguments.scratch is None else {"scratch": arguments.scratch}
    resources = resources_of(layer, ("the command line", given))
    terminal = sys.stdout.isatty()
    while True:
        width = os.get_terminal_size().columns if terminal else 10**6
        if arguments.watch:
            print("\033[2J\033[H" if terminal else "", end="")
            print(time.strftime("%H:%M:%S"))
        show(scratch_folder(resources), arguments.sweep, width)
        if not arguments.watch:
            return
        time.sleep(arguments.every)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # status.py | head
    sys.exit(command(main))
