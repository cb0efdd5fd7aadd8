"""Jobs on a real Slurm: the one-node one that tests/slurm_node.sh boots, never another.

Skipped, with the reason, if it does not run; with REQUIRE_SLURM=1, as .ci/run sets, a failure.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, SMALL, only_error
from slurm_repo import START, call, commit_all, last_step, logs, make_repository, states, wait_until
from test_resume import assert_same_runs

from slurm.status import Queue, noted_state, state_of
from slurm.task import read_notes

CPU = ["--gpus-per-node", "0", "--signal-delay", "30"]
SNCLR = ["recipes/snclr.py", *SMALL, "--queue-size", "128"]


def missing() -> str:
    """Says why there is no Slurm to test on, or nothing."""
    try:
        told = ["scontrol", "show", "config"]
        done = subprocess.run(told, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        done = None
    if done is None or done.returncode:
        return "no Slurm answers: bash tests/slurm_node.sh install; … start FOLDER (Debian, root)"
    if not re.search(r"ClusterName\s*= one-node-test\n", done.stdout):
        return "this Slurm is not the tests' own (tests/slurm_node.sh): no jobs are sent to it"
    return ""


REASON = missing()
needs_slurm = pytest.mark.skipif(
    bool(REASON) and os.environ.get("REQUIRE_SLURM") != "1", reason=REASON or "it runs"
)
pytestmark = [needs_slurm, pytest.mark.long, pytest.mark.timeout(700)]


@pytest.fixture
def repository(tmp_path) -> Path:
    assert not REASON, f"REQUIRE_SLURM=1, but {REASON}"
    return make_repository(tmp_path / "code")


def scontrol(*words: str) -> None:
    done = subprocess.run(["scontrol", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def ended(scratch: Path, name: str, seconds: float) -> dict:
    """Returns the states of all runs, once none is live."""

    def condition():
        now = states(scratch, name)
        return None if any(state.live for state in now.values()) else now

    return wait_until(condition, seconds, scratch)


def test_one_run_of_two_tasks_at_the_commit_it_was_submitted_with(repository):
    """It is submitted from the checkout itself, which becomes unusable while the job waits."""
    submitted = commit_all(add_note(repository))
    cluster = repository / "slurm" / "cluster.yaml"  # git ignores it
    cluster.write_text("options: {hold: true}\nenvironment: ['export FROM_CLUSTER_FILE=1']\n")
    flags = [*CPU, "--tasks-per-node", "2", "--time", "5m", "--", *SNCLR, "--max-steps", "3"]
    done = call(repository, repository, "launch.py", *flags)
    assert done.returncode == 0, done.stderr
    scratch, name = repository / "runs" / "slurm", "snclr-photos-tiny-0"
    job = states(scratch, name)[name].job
    assert f"job {job}: {name}" in done.stdout
    table = call(repository, repository, "status.py")
    assert "PENDING" in table.stdout and "JobHeldUser" in table.stdout
    for path in ("common/__init__.py", "slurm/task.py", "recipes/snclr.py"):
        (repository / path).write_text("raise SystemExit('this is the tree, not the snapshot')\n")
    commit_all(repository)
    scontrol("release", job)
    assert ended(scratch, name, 120)[name].state == "FINISHED", logs(scratch)
    folder = repository / "runs" / "snclr" / "photos-tiny-0"
    assert json.loads((folder / "results.json").read_text())["step"] == 3
    start = json.loads((folder / "environment.json").read_text())
    assert (start["commit"], start["dirty"]) == (submitted, False)
    assert start["devices"]["ranks"] == 2 and start["slurm_job"] == job
    script = (scratch / name / "1" / "jobs" / f"{job}_submission.sh").read_text()
    assert "export FROM_CLUSTER_FILE=1" in script


def add_note(repository: Path) -> Path:
    (repository / "NOTE").write_text("so that this commit is no other\n")
    return repository


def test_an_array_of_three_interrupted_or_not_ends_alike(repository, tmp_path):
    """Each has two tasks: one is undisturbed, one meets its time limit, one `scontrol requeue`."""
    (tmp_path / "three.yaml").write_text(
        "script: recipes/snclr.py\n"
        "slurm: {gpus_per_node: 0, tasks_per_node: 2, time: 9m, signal_delay: 110}\n"
        "flags: {dataset: photos, batch_size: 36, workers: 1, knn_every: 0, queue_size: 128,\n"
        "  max_steps: 60}\n"
        "runs: [{name: whole}, {name: limit}, {name: requeued}]\n"
    )
    done = call(repository, tmp_path, "sweep.py", "three.yaml", "--max-parallel", "3")
    assert done.returncode == 0, done.stderr
    scratch, folder = tmp_path / "runs" / "slurm", tmp_path / "runs" / "three"
    jobs = {name: state.job for name, state in states(scratch, "three").items()}
    assert [job.split("_")[1] for job in jobs.values()] == ["0", "1", "2"]
    numbers = wait_until(lambda: job_numbers([*jobs.values()]), 60, scratch)

    notes = scratch / "three" / "1" / "notes"
    wait_until(lambda: last_step(folder / "limit") >= 3, START, scratch)
    frozen = [pid for rank in (0, 1) for pid in processes_of_rank(numbers[1], rank)]
    # Slurm looks at time limits twice a minute and shall find the run at work; with its signal
    # it sends SIGCONT
    for pid in frozen:
        os.kill(pid, signal.SIGSTOP)
    passed = time.time() - read_notes(notes, "limit")[0]["time"]
    scontrol("update", f"jobid={jobs['limit']}", f"timelimit={int(passed + 45) // 60 + 1}")
    wait_until(lambda: last_step(folder / "requeued") >= 3, START, scratch)
    scontrol("requeue", jobs["requeued"])
    wait_until(lambda: "signal" in events(notes, "limit"), 120, scratch)
    wait_until(lambda: states(scratch, "three")["limit"].state != "RUNNING", 60, scratch)
    scontrol("update", f"jobid={jobs['limit']}", "timelimit=9")

    now = ended(scratch, "three", 240)
    assert {name: state.state for name, state in now.items()} == dict.fromkeys(jobs, "FINISHED")
    assert {name: state.job for name, state in now.items()} == jobs  # requeued, not sent again
    assert now["whole"].restarts == 0, events(notes, "whole")
    assert now["limit"].restarts >= 1 and now["requeued"].restarts >= 1
    for name in ("limit", "requeued"):
        log = (scratch / "three" / "1" / "jobs" / f"{jobs[name]}_0_log.out").read_text()
        number = "SIGUSR2" if name == "limit" else "SIGTERM"
        assert re.search(rf"stopped by {number} at step \d+ of 60, saved", log), log
        assert re.search(r"continues from step \d+ of 60", log), log
        assert_same_runs(folder / name, folder / "whole")
    table = call(repository, tmp_path, "status.py", "three").stdout.splitlines()
    assert [line.split()[:3] for line in table[1 : 1 + len(jobs)]] == [
        [name, job, "FINISHED"] for name, job in jobs.items()
    ]
    again = call(repository, tmp_path, "sweep.py", "three.yaml")
    assert "all 3 runs are finished or in the queue" in again.stdout, again.stderr


def job_numbers(jobs: list[str]) -> list[str] | None:
    """Returns the numbers of their own that an array's jobs get when they start."""
    words = ["squeue", "--noheader", "--array", "--states", "running", "--format", "%i %A"]
    lines = subprocess.run(words, capture_output=True, text=True, check=True).stdout.splitlines()
    known = dict(line.split() for line in lines)
    return [known[job] for job in jobs] if set(jobs) <= set(known) else None


def events(notes: Path, name: str) -> list[str]:
    return [note["event"] for note in read_notes(notes, name)]


def test_a_rank_that_fails_ends_the_job_with_its_own_error(repository, tmp_path):
    """The other rank would wait for ever, and takes no SIGTERM."""
    flags = [*CPU, "--tasks-per-node", "2", "--time", "9m", "--name", "waits"]
    done = call(repository, tmp_path, "launch.py", *flags, "--", "eval/waits/run.py")
    assert done.returncode == 0, done.stderr
    scratch = tmp_path / "runs" / "slurm"
    notes = scratch / "waits" / "1" / "notes"
    wait_until(lambda: "end" in events(notes, "waits"), 60, scratch)
    failed = time.time()
    assert ended(scratch, "waits", 60)["waits"].state == "FAILED", logs(scratch)
    assert time.time() - failed < 60
    line = call(repository, tmp_path, "status.py", "waits").stdout.splitlines()[1]
    assert re.search(r"FAILED .* rank 1 on \S+: rank 1 cannot go on$", line), line


def test_a_rank_that_is_killed_ends_the_job(repository, tmp_path):
    flags = [*CPU, "--tasks-per-node", "2", "--time", "9m", "--", *SNCLR, "--max-steps", "900"]
    done = call(repository, tmp_path, "launch.py", *flags)
    assert done.returncode == 0, done.stderr
    scratch, name = tmp_path / "runs" / "slurm", "snclr-photos-tiny-0"
    folder = tmp_path / "runs" / "snclr" / "photos-tiny-0"
    wait_until(lambda: last_step(folder) >= 2, START, scratch)
    for pid in processes_of_rank(states(scratch, name)[name].job, 1):
        os.kill(pid, signal.SIGKILL)
    assert ended(scratch, name, 60)[name].state == "FAILED", logs(scratch)
    line = call(repository, tmp_path, "status.py").stdout.splitlines()[1]
    assert re.search(r"FAILED .* rank 1 on \S+: killed by SIGKILL", line), line


def processes_of_rank(job: str, rank: int) -> list[int]:
    """Returns the recipe's own processes of a rank, not the task that started them."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        own = {f"SLURM_JOB_ID={job}".encode(), f"SLURM_PROCID={rank}".encode()}
        if own <= {*variables} and len(words) > 1 and words[1].endswith(b"recipes/snclr.py"):
            found.append(int(folder.name))
    assert found
    return found


def test_a_cancelled_job_is_shown_as_such_and_can_be_continued(repository, tmp_path):
    flags = [*CPU, "--time", "9m", "--", *SNCLR]
    done = call(repository, tmp_path, "launch.py", *flags, "--max-steps", "900")
    assert done.returncode == 0, done.stderr
    scratch, name = tmp_path / "runs" / "slurm", "snclr-photos-tiny-0"
    folder = tmp_path / "runs" / "snclr" / "photos-tiny-0"
    wait_until(lambda: last_step(folder) >= 2, START, scratch)
    job = states(scratch, name)[name].job
    line = call(repository, tmp_path, "status.py").stdout.splitlines()[1]
    assert re.search(rf"{name} +{job} +RUNNING +\S+ of 6 ", line), line
    error = only_error(call(repository, tmp_path, "launch.py", *flags, "--max-steps", "900"))
    assert f"is being written by job {job} (RUNNING)" in error and f"scancel {job}" in error

    subprocess.run(["scancel", job], check=True)
    assert ended(scratch, name, 60)[name].state == "CANCELLED", logs(scratch)
    line = call(repository, tmp_path, "status.py").stdout.splitlines()[1]
    assert re.search(r"CANCELLED .* stopped by SIGTERM at step \d+ of 900, saved", line), line
    notes = read_notes(scratch / name / "1" / "notes", name)
    assert noted_state(notes, "") in ("CANCELLED", "STOPPED")  # when Slurm has forgotten it

    step = last_step(folder)
    done = call(repository, tmp_path, "launch.py", *flags, "--max-steps", str(step + 2))
    assert done.returncode == 0, done.stderr
    assert ended(scratch, name, 120)[name].state == "FINISHED", logs(scratch)
    assert f"continues from step {step} of {step + 2}" in logs(scratch)


def test_a_job_cancelled_in_the_queue_and_one_that_slurm_refuses(repository, tmp_path):
    (tmp_path / "held.yaml").write_text("options: {hold: true}\n")
    flags = [*CPU, "--cluster", "held.yaml", "--name", "held", "--", "eval/where/run.py"]
    assert call(repository, tmp_path, "launch.py", *flags).returncode == 0
    scratch = tmp_path / "runs" / "slurm"
    subprocess.run(["scancel", states(scratch, "held")["held"].job], check=True)
    assert ended(scratch, "held", 30)["held"].state == "CANCELLED"
    record = json.loads((scratch / "held" / "runs.json").read_text())
    forgotten = Queue()
    forgotten.known, forgotten.accounted = {}, {record["submissions"][0]["jobs"]["held"]: ""}
    assert state_of(scratch / "held", record, record["runs"][0], forgotten).state == "CANCELLED"

    flags = [*CPU, "--partition", "nowhere", "--name", "no", "--", "eval/where/run.py"]
    error = only_error(call(repository, tmp_path, "launch.py", *flags))
    assert "Slurm refuses the job" in error and "invalid partition" in error
    assert not (scratch / "no" / "1").exists()


def test_the_readme_word_by_word(repository):
    """The commands that slurm/README.md says to try work in a fresh checkout."""
    section = (ROOT / "slurm" / "README.md").read_text()
    block = section.split("```\n")[1]
    commands = [line for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    assert len(commands) >= 3
    for line in commands:
        words = shlex.split(line, comments=True)
        assert words[:1] == ["python"], line
        done = call(repository, repository, Path(words[1]).name, *words[2:])
        assert done.returncode == 0, f"{line}: {done.stderr}"
    scratch = repository / "runs" / "slurm"
    names = [path.parent.name for path in scratch.glob("*/runs.json")]
    assert len(names) == 2
    for name in names:
        now = ended(scratch, name, 240)
        assert {state.state for state in now.values()} == {"FINISHED"}, logs(scratch)
