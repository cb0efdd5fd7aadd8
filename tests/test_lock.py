"""Two processes never write in one run's folder."""

import json
import signal

import pytest
from conftest import SMALL, Script, only_error, run_script

from common.errors import UserError
from common.run import lock

FLAGS = [*SMALL, "--queue-size", "128"]


@pytest.mark.long
def test_a_second_start_says_who_writes_and_loses_nothing(tmp_path):
    first = Script("recipes/nnsiam.py", *FLAGS, "--output", tmp_path, merged=True)
    try:
        assert first.said("run folder"), first.communicate(5)
        error = only_error(run_script("recipes/nnsiam.py", *FLAGS, "--output", tmp_path))
    finally:
        first.send_signal(signal.SIGTERM)
    assert f"{tmp_path} is written by process {first.process.pid} on " in error
    assert " since 20" in error and "another --output" in error
    assert first.wait(200) == 75
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    steps = [line["step"] for line in map(json.loads, lines) if line["kind"] == "step"]
    assert steps == [*range(1, len(steps) + 1)]


def test_a_crash_leaves_no_lock(tmp_path):
    flags = [*FLAGS, "--max-steps", "400", "--output", tmp_path]
    first = Script("recipes/nnsiam.py", *flags, merged=True)
    assert first.said("run folder"), first.communicate(5)
    first.kill()
    first.wait(60)
    second = Script("recipes/nnsiam.py", *flags, merged=True)
    assert second.said("run folder"), second.communicate(5)
    second.kill()
    second.wait(60)


@pytest.mark.long
def test_of_two_evaluations_one_says_who_writes(tmp_path):
    flags = [
        "--backbone",
        "pixels",
        "--image-size",
        "32",
        "--dataset",
        "photos",
        "--protocol",
        "gsg",
    ]
    flags += ["--workers", "0", "--epochs", "2000", "--lrs", "0.1", "--cache-features"]
    flags += ["--output", tmp_path, "--measure", "linear"]
    first = Script("eval/linear_probe/run.py", *flags, merged=True)
    try:
        assert first.said("folder:"), first.communicate(5)
        error = only_error(run_script("eval/linear_probe/run.py", *flags))
    finally:
        first.send_signal(signal.SIGTERM)
    assert "is written by process" in error
    first.wait(200)


def test_a_job_that_still_ends_is_waited_for(tmp_path, monkeypatch):
    """The lock is free again within the time that a start waits."""
    monkeypatch.setattr(lock, "WAIT", 60.0)
    flags = [*FLAGS, "--max-steps", "2", "--output", tmp_path]
    first = Script("recipes/nnsiam.py", *flags, merged=True)
    assert first.said("run folder"), first.communicate(5)
    held = lock.take(tmp_path)
    assert held is not None and first.wait(60) == 0
    held.close()


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / lock.NAME).mkdir()
    with pytest.raises(UserError, match=r"\.lock cannot be written \(Is a directory\)"):
        lock.take(tmp_path)


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch, capsys):
    def refuse(*_):
        raise OSError(lock.errno.ENOLCK, "no locks available")

    monkeypatch.setattr(lock.fcntl, "lockf", refuse)
    assert lock.take(tmp_path) is None
    assert "without locks" in capsys.readouterr().out
