"""From runs to Slurm jobs: flags checked, code snapshot, sbatch script, ledger."""

import argparse
import contextlib
import dataclasses
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest import mock

from common.errors import UserError, nearest_path
from common.run import documents
from slurm import local, snapshot
from slurm.ledger import Job, ledgers_in, log_path, read_ledger, write_ledger
from slurm.resources import Resources, scratch_folder
from slurm.status import Queue, state_of
from slurm.task import Task, python_path

REPOSITORY = Path(__file__).resolve().parent.parent


def script_path(text: str) -> str:
    """Returns the path of this repository's script, relative to its root; raises UserError for
    others.
    """
    for path in (REPOSITORY / documents.expanded(text), Path(text).absolute()):
        path = path.resolve()
        if path.is_file() and path.suffix == ".py" and path.is_relative_to(REPOSITORY):
            return path.relative_to(REPOSITORY).as_posix()
    scripts = sorted(p.relative_to(REPOSITORY).as_posix() for p in REPOSITORY.glob("recipes/*.py"))
    scripts = [s for s in scripts if not s.endswith("__init__.py")]
    hint = nearest_path(text, scripts) or f"; recipes are {', '.join(scripts)}"
    raise UserError(f"{text}: no such script in {REPOSITORY}{hint}")


def flags_of(values: dict[str, Any], name: str) -> list[str]:
    """Turns `{queue_size: 5, symmetric: true}` into flags; of two spellings the later wins."""
    flags: dict[str, list[str]] = {}
    for key, value in values.items():
        flag = f"--{str(key).replace('_', '-')}"
        if isinstance(value, dict):
            raise UserError(f"{name}: {key}: {value} is no value for a flag")
        if value is None:
            flags.pop(flag, None)
        elif isinstance(value, bool):
            flags[flag] = [flag if value else f"--no-{flag[2:]}"]
        elif isinstance(value, list):
            flags[flag] = [flag, *map(str, value)]
        else:
            flags[flag] = [flag, str(value).replace("{name}", name)]
    return [part for parts in flags.values() for part in parts]


def ask(questions: Sequence[Sequence[Any]]) -> list[dict[str, Any]]:
    """Returns what slurm/check.py answers, in a process of its own."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "slurm" / "check.py")],
        input=json.dumps(questions),
        env=os.environ | {"PYTHONPATH": python_path(REPOSITORY)},
        stdout=subprocess.PIPE,
        text=True,
    )
    if done.returncode:
        raise SystemExit(done.returncode)  # it has said why
    return json.loads(done.stdout.splitlines()[-1])


def check_flags(jobs: list[Job], ranks: int) -> list[dict[str, Any]]:
    """Returns what each run will do, by the scripts' own parsers; fills in folders and --output."""
    facts = ask([[job.script, job.flags, ranks] for job in jobs])
    for job, fact in zip(jobs, facts, strict=True):
        job.folder = fact["folder"] or job.folder
        given = any(flag.split("=")[0] == "--output" for flag in job.flags)
        if fact["folder"] and not given:
            job.flags = [*job.flags, "--output", job.folder]
    for script in sorted({j.script for j, f in zip(jobs, facts, strict=True) if not f["checked"]}):
        print(f"note: the flags of {script} cannot be checked before it runs")
    for flag in dict.fromkeys(flag for fact in facts for flag in fact["absent"]):
        print(f"warning: {flag} does not exist on this machine: it must where the jobs run")
    return facts


def submit(
    name: str,
    jobs: list[Job],
    resources: Resources,
    arguments: argparse.Namespace,
    max_parallel: int | None = None,
) -> int:
    """Submits checked runs, with a snapshot and a note in the ledger; returns the exit code."""
    folder = scratch_folder(resources) / name
    ledger = read_ledger(folder)
    number = 1 + max((s["number"] for s in ledger["submissions"]), default=0)
    own = folder / str(number)
    tasks = [
        Task(job.name, job.script, job.flags, str(own / "code"), str(own / "notes")) for job in jobs
    ]
    if arguments.dry_run:
        head, dirty = snapshot.check(REPOSITORY, arguments.allow_dirty)
        for job in jobs:
            print(f"# {job.name}: {shlex.join([job.script, *job.flags])}")
        print(f"# code: {head}{' with uncommitted changes' if dirty else ''}")
        print(sbatch_script(name, own, len(jobs), resources, max_parallel))
        return 0
    if arguments.local and resources.nodes > 1:
        raise UserError("--local has one machine: leave --nodes out")
    refuse_live(jobs, resources)
    snapshot.check(REPOSITORY, arguments.allow_dirty)
    try:
        own.mkdir(parents=True)
        line = snapshot.take(REPOSITORY, own / "code", arguments.allow_dirty)
    except OSError as error:
        raise UserError(f"{own}: {error.strerror}; set another --scratch") from None
    except UserError:
        remove(own)
        raise
    known = {run["name"]: run for run in ledger["runs"]}
    known |= {job.name: dataclasses.asdict(job) for job in jobs}
    ledger["runs"] = [*known.values()]
    submission = {"number": number, "submitted": time.time(), "commit": line}
    submission |= {"cluster": "local" if arguments.local else "slurm", "jobs": {}}
    submission |= {"host": os.uname().nodename, "ranks": resources.ranks}
    ledger["submissions"].append(submission)
    if arguments.local:
        return local.run(folder, ledger, tasks, resources, max_parallel or 1)
    try:
        identities = submit_to_slurm(name, own, tasks, resources, max_parallel)
    except UserError:
        remove(own)
        raise
    submission["jobs"] = {job.name: job_id for job, job_id in zip(jobs, identities, strict=True)}
    write_ledger(folder, ledger)
    for job, job_id in zip(jobs, identities, strict=True):
        print(f"job {job_id}: {job.name}" + (f" -> {job.folder}" if job.folder else ""))
    print(f"log: {log_path(folder, submission, jobs[0].name)}")
    print(f"state: python slurm/status.py {name}")
    return 0


def remove(own: Path) -> None:
    """Takes back a submission that came to nothing."""
    shutil.rmtree(own)
    with contextlib.suppress(OSError):  # other submissions may be next to it
        own.parent.rmdir()


def slurm_executor(
    name: str, own: Path, resources: Resources, max_parallel: int | None, check: bool = True
) -> Any:
    """Returns submitit's executor with these resources; `check`: UserError if there is no Slurm."""
    import submitit

    if check and submitit.SlurmExecutor.affinity() < 0:
        raise UserError(
            "no srun on this machine: submit from a login node of the cluster, or give --local or "
            "--dry-run"
        )

    left_out = [n for n, value in resources.options.items() if value is None or value is False]

    class Executor(submitit.SlurmExecutor):
        @classmethod
        def affinity(cls) -> int:  # a script can be written anywhere
            return 2

        def _make_submission_file_text(self, command: str, uid: str) -> str:
            return without(super()._make_submission_file_text(command, uid), left_out)

    executor = Executor(own / "jobs", max_num_timeout=resources.max_timeouts)
    srun = ["--kill-on-bad-exit=1", "--wait=0"]  # a failing rank ends all; a finished one does not
    if resources.cpus_per_task:  # since Slurm 22.05 a step does not inherit it
        srun.append(f"--cpus-per-task={resources.cpus_per_task}")
    code = shlex.quote(str(own / "code"))
    values = {
        "job_name": name,
        "time": resources.minutes,
        "nodes": resources.nodes,
        "ntasks_per_node": resources.tasks,
        "gpus_per_node": resources.gpus_per_node if resources.gpus else None,
        "cpus_per_task": resources.cpus_per_task,
        "mem": f"{round(1024 * resources.mem_gb)}MB" if resources.mem_gb else None,
        "partition": resources.partition,
        "account": resources.account,
        "qos": resources.qos,
        "constraint": resources.constraint,
        "signal_delay_s": resources.signal_delay,
        "array_parallelism": max_parallel,
        "stderr_to_stdout": True,
        "srun_args": srun,
        "setup": [
            *resources.environment,
            f'export PYTHONPATH={code}"${{PYTHONPATH:+:$PYTHONPATH}}"',
            "export PYTHONSAFEPATH=1  # not the folder that the job was submitted from",
        ],
        "additional_parameters": {
            "requeue": True,  # in submitit's spelling, so that it is not there twice
            **{n.replace("-", "_"): v for n, v in resources.options.items() if n not in left_out},
        },
    }
    try:
        executor.update_parameters(**{n: v for n, v in values.items() if v is not None})
    except (ValueError, AssertionError) as error:
        raise UserError(f"submitit refuses these resources: {error}") from None
    return executor


def without(script: str, options: Sequence[str]) -> str:
    """Returns an sbatch script without the lines of these options, whoever wrote them."""
    names = "|".join(map(re.escape, options))
    return re.sub(rf"(?m)^#SBATCH --(?:{names})(?:=.*)?\n", "", script) if names else script


def sbatch_script(
    name: str, own: Path, count: int, resources: Resources, max_parallel: int | None
) -> str:
    """Returns the script that `submit` would give to sbatch, for an array if runs are several."""
    executor = slurm_executor(name, own, resources, max_parallel, check=False)
    if count > 1:
        executor.parameters["map_count"] = count
    return executor._make_submission_file_text(executor._submitit_command_str, "")


def submit_to_slurm(
    name: str, own: Path, tasks: list[Task], resources: Resources, max_parallel: int | None
) -> list[str]:
    """Submits tasks; returns job numbers, A_0, A_1, … of an array if there are several."""
    import submitit
    from submitit.core.utils import FailedJobError, FailedSubmissionError
    from submitit.helpers import clean_env

    executor = slurm_executor(name, own, resources, max_parallel)
    configuration = {n: os.environ[n] for n in ("SLURM_CONF",) if n in os.environ}
    try:
        # a job may submit jobs; what sbatch says is said below, once
        with clean_env(), contextlib.redirect_stderr(io.StringIO()):
            os.environ.update(configuration)  # clean_env takes this away too
            # submitit makes an array by a new executor of its own class
            with mock.patch.object(submitit.slurm.slurm, "SlurmExecutor", type(executor)):
                jobs = executor.submit_array(tasks)
    except (FailedJobError, FailedSubmissionError) as error:
        raise UserError(f"Slurm refuses the job: {' '.join(str(error).split())}") from None
    return [job.job_id for job in jobs]


def refuse_live(jobs: list[Job], resources: Resources) -> None:
    """Raises UserError if two jobs would write into one run folder."""
    folders = Counter(job.folder for job in jobs if job.folder)
    if twice := [folder for folder, count in folders.items() if count > 1]:
        raise UserError(f"{twice[0]} would be the run folder of several runs: vary --output too")
    queue = Queue()
    for folder, ledger in ledgers_in(scratch_folder(resources)):
        for run in ledger["runs"]:
            if run["folder"] not in folders:
                continue
            state = state_of(folder, ledger, run, queue)
            if state.live:
                end = "kill" if state.cluster == "local" else "scancel"
                raise UserError(
                    f"{run['folder']} is being written by job {state.job} ({state.state}) of "
                    f"{ledger['name']}: wait for it, or end it with {end} {state.job}"
                )
