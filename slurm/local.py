"""The same jobs without Slurm: submitit's local executor, in the foreground."""

import contextlib
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from common.errors import EXIT_STOPPED, UserError
from common.run import documents
from common.run.output import outlast_readers
from slurm.ledger import log_path, write_ledger
from slurm.resources import Resources
from slurm.task import Task, first_failure, python_path, read_notes

OF_TERMINALS = (signal.SIGINT, signal.SIGHUP)
FOREVER = 60 * 24 * 365  # minutes that a run without --time has


def run(
    folder: Path,
    ledger: dict[str, Any],
    tasks: list[Task],
    resources: Resources,
    max_parallel: int,
) -> int:
    """Runs tasks on this machine, some at a time, and shows the logs of their ranks 0. Returns an
    exit code: 0 if all finished, 75 if one was stopped and can be continued, else that of a run
    that failed. At Ctrl-C, SIGTERM or a closed terminal the runs save and stop. submitit starts a
    job that has met its time limit at once again, five times at most.
    """
    import submitit

    outlast_readers()
    logging.getLogger("submitit").setLevel(logging.WARNING)
    submission = ledger["submissions"][-1]
    own = folder / str(submission["number"])
    executor = submitit.LocalExecutor(own / "jobs", max_num_timeout=resources.max_timeouts)
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    chosen = [int(number) for number in visible.split(",") if number.strip().isdigit()]
    try:
        executor.update_parameters(
            timeout_min=resources.minutes if resources.time else FOREVER,
            signal_delay_s=resources.signal_delay,
            tasks_per_node=resources.tasks,
            gpus_per_node=resources.gpus,
            visible_gpus=chosen or (),
            stderr_to_stdout=True,
        )
    except ValueError:
        raise UserError(
            f"--gpus-per-node {resources.gpus}, but CUDA_VISIBLE_DEVICES={visible}"
        ) from None
    waiting, running, codes, told = [*tasks], {}, [], 0
    with stop_requests() as asked:
        while running or (waiting and not asked):
            while waiting and len(running) < max_parallel and not asked:
                task = waiting.pop(0)
                job = start(executor, task, own)
                submission["jobs"][task.name] = job.job_id
                write_ledger(folder, ledger)
                running[task.name] = (task, job, [0])
            if len(asked) > told:
                told = len(asked)
                for _, job, _ in running.values():
                    job._process.send_signal(signal.SIGTERM)  # submitit's controller passes it on
            time.sleep(0.2)
            for name, (task, job, shown) in [*running.items()]:
                ended = job._process.poll() is not None
                prefix = f"{name}: " if len(tasks) > 1 else ""
                show_log(log_path(folder, submission, name), shown, prefix)
                if ended:
                    del running[name]
                    codes.append(outcome(task))
    codes += [EXIT_STOPPED] * len(waiting)
    return next((c for c in codes if c not in (0, EXIT_STOPPED)), max(codes))


@contextlib.contextmanager
def stop_requests() -> Iterator[list[bool]]:
    """Yields a list that gets an entry at SIGINT, SIGTERM or, unless it is ignored, SIGHUP. A
    terminal sends SIGINT and SIGHUP to every process of the foreground; only the scripts shall
    answer, so what is started meanwhile ignores them.
    """
    asked: list[bool] = []
    before = {n: signal.getsignal(n) for n in (signal.SIGTERM, *OF_TERMINALS)}
    if before[signal.SIGHUP] == signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, lambda *_: asked.append(True))
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(executor: Any, task: Task, own: Path) -> Any:
    from submitit.helpers import clean_env

    changed = {"PYTHONPATH": python_path(own / "code"), "PYTHONSAFEPATH": "1"}
    before = {name: os.environ.get(name) for name in changed}
    handlers = {number: signal.signal(number, signal.SIG_IGN) for number in OF_TERMINALS}
    try:
        with clean_env():
            os.environ.update(changed)
            return executor.submit(task)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def show_log(path: Path, shown: list[int], prefix: str) -> None:
    """Prints the whole lines that a log has got since; submitit's own are left out."""
    if not path.exists():
        return
    with documents.opened(path) as file:
        file.seek(shown[0])
        new = file.read()
    whole = new[: new.rfind(b"\n") + 1]
    shown[0] += len(whole)
    for line in whole.decode(errors="replace").splitlines():
        if not line.startswith("submitit "):
            print(f"{prefix}{line}", flush=True)


def outcome(task: Task) -> int:
    """Returns the exit code of a run that has ended, read from its notes."""
    lines = read_notes(Path(task.notes), task.name)
    last = max((line["attempt"] for line in lines), default=0)
    ends = [e for e in lines if e["event"] == "end" and e["attempt"] == last]
    failed = [e["code"] for e in ends if e["code"] not in (0, EXIT_STOPPED)]
    if failed:
        if (first := first_failure(ends, last)) and all(e["rank"] for e in ends if e["code"]):
            print(f"error: {first}", file=sys.stderr, flush=True)
        return failed[0] if failed[0] > 0 else 128 - failed[0]
    return ends[-1]["code"] if ends else EXIT_STOPPED
