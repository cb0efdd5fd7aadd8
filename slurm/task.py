"""One task of a job: runs the script as a child process, and has it stop, save and continue.

submitit pickles a `Task`, runs it once on every rank, and on SIGUSR2 (before the time limit, or at
a preemption) calls `checkpoint` on rank 0, in the middle of whatever it does; then the job is
requeued, and all ranks start the same command again. What must survive is in the run's folder.

Every run leaves notes, one JSON object per line, in `<notes>/<run>.<rank>.jsonl`: of rank 0, and
of a rank that failed. `slurm/status.py` reads them where Slurm has forgotten the job.
"""

import contextlib
import dataclasses
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import zlib
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

from common.errors import EXIT_STOPPED, UserError, say_error
from common.run import documents

STOP = signal.SIGUSR2  # it asks the script to stop
CHILD_POLL, PEER_POLL = 0.2, 5.0  # seconds between looks at the child, at the other ranks' notes
PEER_GRACE = 15.0  # seconds that a script has to end by itself after another rank failed
KILL_PATIENCE = 600.0  # seconds to wait for Slurm's own end of a job after the script has stopped
SECONDARY = "another rank ended"  # a rank says it if the failure was not its own


class Ended(Exception):  # noqa: N818, it may be a success
    """The script has ended by itself while it was asked to stop."""

    def __init__(self, code: int):
        super().__init__(code)
        self.code = code


@dataclass
class Task:
    """What each rank of a job runs, the same on all. It can be pickled, without the child.

    `code`: folder of the snapshot, put first on PYTHONPATH. `script` is relative to it.
    """

    name: str
    script: str
    flags: list[str]
    code: str
    notes: str
    attempt: int = 0

    child = None  # of this process, never pickled
    signalled = False

    def __call__(self) -> int:
        """Runs the script to its end. Returns 0, or raises SystemExit with the job's exit code."""
        from submitit import JobEnvironment

        self.job = JobEnvironment()
        self.rank, self.ranks = self.job.global_rank, self.job.num_tasks
        self.on_slurm = self.job.cluster == "slurm"
        if self.on_slurm:  # also counts what was requeued without us
            self.attempt = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        handlers = {signal.SIGTERM: signal.signal(signal.SIGTERM, self.pass_on)}
        if self.rank != 0:  # rank 0 keeps submitit's, which ends in `checkpoint`
            handlers[STOP] = signal.signal(STOP, self.pass_on)
        try:
            self.start()
            try:
                code = self.wait()
            except Ended as ended:
                code = ended.code
            return self.end(code)
        except Exception as error:  # submitit's, when it does not requeue
            self.note("end", code=1, error=f"{type(error).__name__}: {error}")
            raise
        finally:
            self.send(signal.SIGKILL)
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def checkpoint(self) -> Any:
        """Makes the script stop and save, at a preemption or before the time limit: rank 0's script
        agrees with the other ranks on a step and exits with 75. Then it asks for a requeue.

        submitit's signal handler calls it, so it runs on top of `wait`. A script that does not
        answer signals dies of this one and begins again.
        """
        from submitit.helpers import DelayedSubmission

        if self.child is not None:
            self.note("signal", signal=STOP.name)
            self.pass_on(STOP)
            code = self.wait()
            if not self.has_stopped(code):
                raise Ended(code)  # it had finished, or failed: nothing to continue
            self.note("requeue", code=code)
        return DelayedSubmission(dataclasses.replace(self, attempt=self.attempt + 1))

    __submitit_checkpoint__ = checkpoint  # its newer name; 1.5.4 looks for both

    # -- the child ------------------------------------------------------------------------------

    def start(self) -> None:
        if self.rank == 0:
            self.note("start", ranks=self.ranks, job=self.job.job_id)
        command = [sys.executable, str(Path(self.code) / self.script), *self.flags]
        self.child = subprocess.Popen(command, env=self.environment(), stderr=subprocess.PIPE)
        self.last_error = ""
        self.reader = threading.Thread(target=self.read_errors, daemon=True)
        self.reader.start()

    def environment(self) -> dict[str, str]:
        """Returns the child's environment: the snapshot first in PYTHONPATH, the rank's number."""
        env = dict(os.environ)
        env.pop("PYTHONSAFEPATH", None)  # ours, so that this process does not import the tree
        env["PYTHONPATH"] = python_path(self.code)
        env["PYTHONUNBUFFERED"] = "1"
        if not self.on_slurm and self.ranks > 1:  # common.run.ranks knows Slurm's own variables
            env |= {"RANK": str(self.rank), "WORLD_SIZE": str(self.ranks)}
            env |= {"LOCAL_RANK": str(self.job.local_rank), "LOCAL_WORLD_SIZE": str(self.ranks)}
            port = 20000 + zlib.crc32(f"{self.job.job_id} {self.attempt}".encode()) % 12000
            env |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        return env

    def read_errors(self) -> None:
        """Passes the child's stderr on and keeps the line that says why it ended."""
        for line in self.child.stderr:
            sys.stderr.buffer.write(line)
            sys.stderr.flush()
            text = line.decode(errors="replace").strip()
            if text and (text.startswith("error: ") or not self.last_error.startswith("error: ")):
                self.last_error = text

    def exit_code(self) -> int | None:
        """Returns the child's exit code, -N if signal N ended it, None while it runs.

        waitid leaves the child as it is, and takes no lock: Popen.wait could not be called on top
        of an interrupted Popen.wait, as `checkpoint` must.
        """
        ended = os.waitid(os.P_PID, self.child.pid, os.WEXITED | os.WNOWAIT | os.WNOHANG)
        if ended is None:
            return None
        return ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status

    def wait(self) -> int:
        """Returns the child's exit code; ends a child that waits for a rank that has failed."""
        looked, failed_at = time.monotonic(), None
        while (code := self.exit_code()) is None:
            time.sleep(CHILD_POLL)
            now = time.monotonic()
            if failed_at is not None and now - failed_at > PEER_GRACE:
                self.send(signal.SIGKILL)
            elif self.ranks > 1 and failed_at is None and now - looked > PEER_POLL:
                looked = now
                failed_at = now if self.failure_elsewhere() else None
        return code

    def pass_on(self, number: int, frame: FrameType | None = None) -> None:
        """Handles a signal: what asks this task to stop asks the script."""
        if number == signal.SIGTERM and not self.signalled and self.rank == 0:
            self.note("signal", signal="SIGTERM")
        self.signalled = True
        self.send(number)

    def send(self, number: int) -> None:
        """Signals the child, if it runs. (Popen's own method would collect a child that ended.)"""
        if self.child is not None and self.exit_code() is None:
            os.kill(self.child.pid, number)

    # -- the end --------------------------------------------------------------------------------

    def end(self, code: int) -> int:
        if code == 0:
            if self.rank == 0:
                self.note("end", code=0)
            return 0
        if self.has_stopped(code):
            self.stopped()
        self.failed(code)

    def has_stopped(self, code: int) -> bool:
        """Tells whether the script stopped because it was asked to. It then exits with 75. While
        it starts or ends it answers no signals: then the signal kills it, or it fails since the
        signal has killed another rank.
        """
        self.reader.join(timeout=5)  # a loader's worker may hold the pipe a little longer
        if code == EXIT_STOPPED:
            return True
        if code in (-STOP, -signal.SIGTERM):
            return self.signalled
        lost = self.signalled and code != 0 and SECONDARY in self.last_error
        return lost and self.failure_elsewhere() is None

    def stopped(self) -> NoReturn:
        """Ends this rank after the script has saved without a request to its `checkpoint`."""
        if self.rank != 0:
            raise SystemExit(0)  # rank 0 has the job requeued; any other code would end it first
        until = time.monotonic() + KILL_PATIENCE
        while self.on_slurm and self.is_running() and time.monotonic() < until:
            if self.failure_elsewhere():
                break
            time.sleep(5)  # a preemption with a grace time: Slurm requeues what it ends itself
        self.note("end", code=EXIT_STOPPED)
        raise SystemExit(EXIT_STOPPED)

    def is_running(self) -> bool:
        """Tells whether Slurm has the job running, neither cancelled nor being requeued."""
        job = os.environ["SLURM_JOB_ID"]
        command = ["squeue", "--noheader", "--jobs", job, "--format", "%T"]
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            done = subprocess.run(command, capture_output=True, text=True, timeout=30)
            return done.stdout.strip() == "RUNNING"
        return False

    def failed(self, code: int) -> NoReturn:
        """Says whose error ended the job: this rank's, or that of the rank that failed first."""
        error = self.last_error.removeprefix("error: ")
        if code < 0:
            name = signal.Signals(-code).name
            why = " (memory ran out?)" if name == "SIGKILL" else ""
            error = f"killed by {name}{why}"
        first = None
        # an error that all ranks meet is said by rank 0 alone
        if self.ranks > 1 and (code == -signal.SIGKILL or SECONDARY in error or not error):
            deadline = time.monotonic() + 3
            while (first := self.failure_elsewhere()) is None and time.monotonic() < deadline:
                time.sleep(CHILD_POLL)
        if first:
            error = f"{SECONDARY}: {first}"
        error = error or f"exit code {code} without a word"
        self.note("end", code=code, error=error)
        where = f"rank {self.rank} of {self.ranks} on {socket.gethostname()}"
        say_error(f"{where} ended with exit code {code}: {error}")
        raise SystemExit(code if code > 0 else 128 - code)

    # -- notes ----------------------------------------------------------------------------------

    def note(self, event: str, **facts: Any) -> None:
        line = {"time": time.time(), "event": event, "attempt": self.attempt, **facts}
        line |= {"rank": self.rank, "host": socket.gethostname()}
        path = Path(self.notes) / f"{self.name}.{self.rank}.jsonl"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:  # a full disk: the run matters more
            say_error(f"no note in {path}: {error.strerror}")

    def failure_elsewhere(self) -> str | None:
        """Returns the error of the other rank that failed first in this attempt, None without."""
        try:
            lines = read_notes(Path(self.notes), self.name)
        except UserError:  # the run matters more than what is noted of it
            return None
        return first_failure([e for e in lines if e["rank"] != self.rank], self.attempt)


def python_path(first: Path | str) -> str:
    """Returns PYTHONPATH with a folder before what is there already."""
    inherited = os.environ.get("PYTHONPATH", "").split(":")
    return ":".join(dict.fromkeys(p for p in [str(first), *inherited] if p))


def read_notes(folder: Path, name: str) -> list[dict[str, Any]]:
    """Returns all notes of a run, of all ranks, in order of time."""
    lines = []
    for path in folder.glob(f"{name}.*.jsonl"):
        if not path.name[len(name) + 1 : -len(".jsonl")].isdigit():
            continue  # the note of a run with a longer name
        for number, text in enumerate(documents.read_text(path).splitlines(), 1):
            with contextlib.suppress(ValueError):  # just being written, or cut off by a full disk
                line = documents.parsed_json(text)
                documents.check(line, "note", f"{path}: line {number}")
                lines.append(line)
    return sorted(lines, key=lambda line: line["time"])


def first_failure(lines: list[dict[str, Any]], attempt: int) -> str | None:
    """Says `rank 1 on node: its error`, of the rank that stopped the others; None if all ran."""
    ends = [e for e in lines if e["event"] == "end" and e["attempt"] == attempt]
    bad = [e for e in ends if e["code"] not in (0, EXIT_STOPPED)]
    bad.sort(key=lambda e: (not e.get("error"), SECONDARY in e.get("error", ""), e["time"]))
    return f"rank {bad[0]['rank']} on {bad[0]['host']}: {reason(bad[0])}" if bad else None


def reason(end: dict[str, Any]) -> str:
    return end.get("error") or f"exit code {end['code']} without a word"
