"""A run killed at any moment and started again ends as one never killed."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
import yaml
from conftest import BY_FAMILY, METHODS, ROOT, SMALL, Script, environment, only_error, run_script
from PIL import Image

from common import cards
from common.data import photos
from common.run import checkpoint, metrics
from common.run.signals import StopRequests

# 160 images in batches of 16 are 10 steps per epoch
FLAGS = ["--dataset", "imagefolder", "--arch", "tiny", "--image-size", "16", "--batch-size", "16"]
FLAGS += ["--epochs", "3", "--knn-every", "2"]
PASSING = ("images_per_second", "data_wait", "memory_gb")  # not of the numbers


def flags_of(recipe, folder, workers, *more):
    given = ["--output", folder, "--workers", workers, *more]
    own = cards.load()[recipe].smallest
    return [str(flag) for flag in [*FLAGS, "--data", images(), *own, *given]]


@functools.cache
def images():
    """Writes a folder of 160 small training patches of 8 photographs and 32 test patches."""
    folder = Path(tempfile.mkdtemp(prefix="images-"))
    for split, own, count in (("train", "train", 20), ("val", "test", 4)):
        pixels, labels = photos.patches(own)
        for label in range(8):
            (folder / split / f"photo{label}").mkdir(parents=True)
            for number, patch in enumerate(pixels[labels == label][:count]):
                path = folder / split / f"photo{label}" / f"{number:03}.png"
                Image.fromarray(patch).resize((20, 18)).save(path)
    return folder


def start(recipe, folder, workers, *more):
    return Script(f"recipes/{recipe}.py", *flags_of(recipe, folder, workers, *more), merged=True)


def logged(folder):
    """Returns metrics without times, throughput and memory."""
    records = metrics.read(folder / "metrics.jsonl")
    return [{n: v for n, v in r.items() if n not in PASSING} for r in records]


def assert_same_runs(a, b):
    assert logged(a) == logged(b)
    state_a, state_b = (checkpoint.load(f / "checkpoint.pt")["state"] for f in (a, b))
    assert_equal(state_a, state_b, "state")
    assert (a / "backbone.safetensors").read_bytes() == (b / "backbone.safetensors").read_bytes()


def assert_equal(a, b, where):
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            assert_equal(a[key], b[key], f"{where} {key}")
    elif isinstance(a, list):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_equal(x, y, f"{where}[{i}]")
    else:
        assert a == b, where


def wait_for_step(folder, step, process):
    """Returns once the run has logged this step."""
    path = folder / "metrics.jsonl"
    for _ in range(3000):
        records = [r for r in metrics.read(path) if r["kind"] == "step"]
        if records and records[-1]["step"] >= step:
            return
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.02)
    raise AssertionError(f"step {step} was never logged")


@pytest.fixture(scope="session")
def whole(made_once):
    """Returns a function that trains a recipe without disturbing it, with more flags perhaps."""

    def train(folder, recipe, flags):
        process = start(recipe, folder, 1, *flags)
        assert process.wait(timeout=240) == 0, process.communicate()[0]

    def of(recipe, *flags):
        name = " ".join(["whole", recipe, *flags])
        return made_once(name, lambda folder: train(folder, recipe, flags))

    return of


@pytest.mark.parametrize("method", BY_FAMILY)
def test_killed_at_random_and_started_again(method, whole, tmp_path):
    (recipe, flags), folder = METHODS[method], tmp_path / "run"
    pick = random.Random()  # a new moment each time; the failing one is shown
    step, pause = pick.randrange(2, 27), pick.random() * 0.3
    print(f"killed {pause:.2f} s after step {step}")
    # a checkpoint at nearly every step, so that the kill lands between two of them
    process = start(recipe, folder, 2, *flags, "--checkpoint-minutes", "0.005")
    wait_for_step(folder, step, process)
    time.sleep(pause)
    process.kill()
    process.wait()
    again = start(recipe, folder, 0, *flags)  # another number of workers
    assert again.wait(timeout=240) == 0, again.communicate()[0]
    assert_same_runs(folder, whole(recipe, *flags))


KILL_AT = """
import os, signal, sys
import common.run.checkpoint as checkpoint
from pathlib import Path
count, real = 0, getattr(os, {call!r})
def dying(*arguments, **more):
    global count
    count += "checkpoint" in str(arguments[0]) if {call!r} != "fsync" else 1
    if count == {number}:
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*arguments, **more)
setattr(checkpoint.os, {call!r}, dying)
from recipes import snclr
snclr.main(sys.argv[1:])
"""


@pytest.mark.parametrize(
    ("call", "number"),
    [
        pytest.param("fsync", 2, id="written", marks=pytest.mark.long),
        pytest.param("link", 1, id="before it is kept", marks=pytest.mark.long),
        pytest.param("replace", 2, id="kept, not named", marks=pytest.mark.long),
        pytest.param("replace", 3, id="before it is named"),
    ],
)
def test_killed_during_the_save(call, number, whole, tmp_path):
    folder = tmp_path / "run"
    (tmp_path / "dies.py").write_text(KILL_AT.format(call=call, number=number))
    process = run_script(tmp_path / "dies.py", *flags_of("snclr", folder, 1))
    assert process.returncode == -signal.SIGKILL, process.stderr
    assert checkpoint.load(folder / "checkpoint.pt")["step"] in (10, 20)
    again = start("snclr", folder, workers=1)
    assert again.wait(timeout=240) == 0, again.communicate()[0]
    assert_same_runs(folder, whole("snclr"))
    assert not [*folder.glob("*.partial")]  # gigabytes, if each kill left one


OTHERS = [signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, signal.SIGHUP, *(pytest.param(n, marks=pytest.mark.long) for n in OTHERS)],
)
def test_stop_signals_save_end_with_75_and_continue(number, whole, tmp_path):
    if signal.getsignal(number) == signal.SIG_IGN:
        pytest.skip("the tests themselves ignore it, as under nohup: so do their runs")
    folder = tmp_path / "run"
    process = start("snclr", folder, 2)
    wait_for_step(folder, 3, process)
    process.send_signal(number)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    assert "start the same command again to continue" in output
    step = checkpoint.load(folder / "checkpoint.pt")["step"]
    assert 3 <= step < 30
    again = start("snclr", folder, workers=1)
    output = again.communicate(timeout=240)[0]
    assert again.returncode == 0, output
    assert f"continues from step {step} of 30" in output
    assert_same_runs(folder, whole("snclr"))


@pytest.mark.long
def test_a_signal_to_the_whole_group_leaves_no_process_behind(tmp_path):
    """Schedulers signal the loader's workers too: they must neither die nor stay."""
    folder = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "recipes/snclr.py"), *flags_of("snclr", folder, 2)],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    wait_for_step(folder, 2, process)
    os.killpg(process.pid, signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75, output
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_an_ignored_sighup_stays_ignored_as_under_nohup():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.received is None
        signal.signal(signal.SIGHUP, signal.default_int_handler)
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGHUP)
            assert requests.received == signal.SIGHUP
        assert signal.getsignal(signal.SIGHUP) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.long
@pytest.mark.parametrize("closed", ["pipe", "terminal", "stdout"])
def test_a_closed_pipe_or_terminal_does_not_end_a_run(closed, tmp_path):
    """It runs to its end, and so does what says a mistake after that."""
    reader, writer = os.openpty() if closed == "terminal" else os.pipe()
    folder, flags = tmp_path / "run", [*SMALL, "--max-steps", "12"]
    words = [sys.executable, str(ROOT / "recipes/nnsiam.py"), *flags, "--output", str(folder)]
    if closed == "stdout":
        words = ["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *words]
    process = subprocess.Popen(
        words, env=environment(), stdout=writer, stderr=writer, start_new_session=True
    )
    os.close(writer)
    wait_for_step(folder, 2, process)
    os.close(reader)
    assert process.wait(timeout=200) == 0
    assert json.loads((folder / "results.json").read_text())["step"] == 12


def test_a_mistake_behind_a_closed_pipe_keeps_its_exit_code():
    reader, writer = os.pipe()
    os.close(reader)
    code = """
import sys
from common.errors import UserError, command
from common.run.output import outlast_readers
def main():
    outlast_readers()
    print("x" * 10**6)
    raise UserError("wrong")
sys.exit(command(main))
"""
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, env=environment(), stdout=writer, stderr=writer, cwd=ROOT)
    os.close(writer)
    assert done.returncode == 2


def test_a_second_sigint_quits_at_once(tmp_path):
    code = (
        "import os, signal, time\n"
        "from common.run.signals import StopRequests\n"
        "with StopRequests() as requests:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    assert requests.received == signal.SIGINT\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(30)\n"
    )
    process = subprocess.run([sys.executable, "-c", code], timeout=20)
    assert process.returncode == -signal.SIGINT


def test_a_finished_run_prints_its_results_and_changes_nothing(whole):
    folder = whole("snclr")
    before = {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.glob("*.p*")}
    again = start("snclr", folder, 1)
    output = again.communicate(timeout=60)[0]
    assert again.returncode == 0, output
    results = json.loads((folder / "results.json").read_text())
    assert f"k-NN {results['knn_before']:.1%} -> {results['knn']:.1%}" in output
    assert before == {p.name: (p.stat().st_mtime_ns, p.stat().st_ino) for p in folder.glob("*.p*")}


def test_results_without_a_checkpoint_are_not_trained_anew(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole("snclr"), folder)
    for path in folder.glob("checkpoint*.pt"):
        path.unlink()
    before = (folder / "metrics.jsonl").read_bytes()
    again = start("snclr", folder, 1)
    output = again.communicate(timeout=60)[0]
    assert again.returncode == 0 and "k-NN" in output, output
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_a_finished_run_is_not_written_to(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole("snclr"), folder)
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    again = start("snclr", folder, 1)
    assert again.wait(timeout=60) == 0, again.communicate()[0]
    assert before == {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}  # nothing is written


@pytest.mark.parametrize("finished", [True, False])
def test_a_folder_from_before_says_what_it_is_once_it_is_continued(finished, whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole("snclr"), folder)
    path = folder / "config.yaml"
    now = path.read_text()
    names = [*yaml.safe_load(now)]
    assert names[:4] == ["recipe", "method", "plan", "settings"] and "plan_name" not in names
    old = {n: v for n, v in yaml.safe_load(now).items() if n not in ("method", "plan", "settings")}
    path.write_text(yaml.safe_dump(old, sort_keys=False))
    if not finished:
        (folder / "results.json").unlink()
    again = start("snclr", folder, 1)
    assert again.wait(timeout=60) == 0, again.communicate()[0]
    found = yaml.safe_load(path.read_text())
    places = {"output": str(folder), "data": found["data"]}  # of this process's images
    expected = yaml.safe_load(now) | places
    assert found == expected and [*expected] == names
    assert expected["method"] == "SNCLR" and expected["plan"] is None


def test_a_damaged_backbone_is_exported_again(whole, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(whole("snclr"), folder)
    whole_file = (folder / "backbone.safetensors").read_bytes()
    (folder / "backbone.safetensors").write_bytes(whole_file[:1000])
    again = start("snclr", folder, 1)
    assert again.wait(timeout=60) == 0, again.communicate()[0]
    assert (folder / "backbone.safetensors").read_bytes() == whole_file
    (folder / "backbone.safetensors").write_bytes(whole_file[:1000])
    for path in folder.glob("checkpoint*.pt"):
        path.unlink()
    metrics_before = (folder / "metrics.jsonl").read_bytes()
    error = only_error(run_script("recipes/snclr.py", *flags_of("snclr", folder, 1)))
    assert "no checkpoint to go on from" in error
    assert (folder / "metrics.jsonl").read_bytes() == metrics_before


DAMAGED = {
    "config.yaml": (b"a: [1,\n{{{", b"- 1", b"\xff\xfe\x00"),
    "results.json": (b"[]", b"{}", b"\xff"),
    "metrics.jsonl": (b"\xff\n", b'{"a": 1}\n'),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_of_a_run_are_one_line_or_mended(name, whole, tmp_path):
    for number, content in enumerate(DAMAGED[name]):
        folder = tmp_path / str(number)
        shutil.copytree(whole("snclr"), folder)
        (folder / name).write_bytes(content)
        done = run_script("recipes/snclr.py", *flags_of("snclr", folder, 1))
        if name == "config.yaml":
            assert f"{folder / name} is damaged" in only_error(done)
        else:
            assert done.returncode == 0, done.stderr


def test_max_steps_keeps_the_schedule_of_the_whole_run(tmp_path):
    flags = flags_of("snclr", tmp_path / "run", 1, "--warmup-epochs", "0")
    assert run_script("recipes/snclr.py", *flags, "--max-steps", "2").returncode == 0
    rates = [r["lr"] for r in logged(tmp_path / "run") if r["kind"] == "step"]
    whole_run = run_script("recipes/snclr.py", *flags, "--max-steps", "4")
    assert whole_run.returncode == 0, whole_run.stderr
    rates_after = [r["lr"] for r in logged(tmp_path / "run") if r["kind"] == "step"]
    assert rates_after[:2] == rates and len(rates_after) == 4
    assert rates_after[3] > 0.9 * rates_after[0]  # far from the end of 30 steps


@pytest.mark.long
def test_the_last_knn_of_a_run_that_ends_within_an_epoch_is_logged(tmp_path):
    """The line is gone if the run goes on: the epoch then has one line, as without a stop."""

    def run(steps):
        flags = flags_of("snclr", tmp_path / "a", 1, "--knn-every", "1", "--max-steps", steps)
        assert run_script("recipes/snclr.py", *flags).returncode == 0
        epochs = [r for r in logged(tmp_path / "a") if r["kind"] == "epoch"]
        return epochs, json.loads((tmp_path / "a" / "results.json").read_text())

    epochs, results = run("2")
    per_epoch = json.loads((tmp_path / "a" / "environment.json").read_text())["steps"]["per_epoch"]
    assert [(r["epoch"], r["step"]) for r in epochs] == [(0, 0), (2 / per_epoch, 2)]
    assert epochs[-1]["knn"] == results["knn"] and "loss" in epochs[-1]
    epochs, results = run(str(per_epoch))
    assert [r["epoch"] for r in epochs] == [0, 1] and epochs[-1]["knn"] == results["knn"]


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--temperature", "0.3"], "temperature was 0.2, is 0.3"),
        (["--seed", "1"], "seed was 0, is 1"),
        (["--batch-size", "8"], "batch_size was 16, is 8"),
    ],
)
def test_a_change_that_enters_the_numbers_is_refused(flags, expected, whole):
    error = only_error(
        run_script("recipes/snclr.py", *flags_of("snclr", whole("snclr"), 1), *flags)
    )
    assert expected in error


def test_another_recipe_in_the_same_folder_is_refused(whole):
    arguments = ["--dataset", "photos", "--output", whole("snclr")]
    assert "recipe was snclr, is nnclr" in only_error(run_script("recipes/nnclr.py", *arguments))


@pytest.mark.parametrize("damage", ["truncated", "foreign", "pickle"])
def test_a_damaged_checkpoint_is_one_line_and_is_kept(damage, whole, tmp_path):
    folder = tmp_path / "run"
    run = whole("snclr")
    folder.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "checkpoint.previous.pt"):
        (folder / name).write_bytes((run / name).read_bytes())
    path = folder / "checkpoint.pt"
    if damage == "truncated":
        path.write_bytes((run / "checkpoint.pt").read_bytes()[:10_000])
    elif damage == "foreign":
        torch.save({"state_dict": {"w": torch.zeros(3)}}, path)
    else:
        torch.save({"format": object}, path)  # code, not values
    content = path.read_bytes()
    error = only_error(run_script("recipes/snclr.py", *flags_of("snclr", folder, 1)))
    assert str(path) in error and "checkpoint.previous.pt" in error
    assert path.read_bytes() == content
    checkpoint.load(folder / "checkpoint.previous.pt")


def test_a_full_disk_while_saving_keeps_the_last_checkpoint(tmp_path):
    """The limit on file size stands for the disk: it lets metrics pass, but no checkpoint."""
    folder = tmp_path / "run"
    flags = flags_of("snclr", folder, 1, "--max-steps")
    assert run_script("recipes/snclr.py", *flags, "2").returncode == 0
    content = (folder / "checkpoint.pt").read_bytes()
    (tmp_path / "full.py").write_text(
        "import resource, signal, sys; from common.errors import command;"
        "from recipes import snclr;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "sys.exit(command(lambda: snclr.main(sys.argv[1:])))"
    )
    error = only_error(run_script(tmp_path / "full.py", *flags, "4"))
    assert "cannot save" in error and "checkpoint.pt" in error
    assert (folder / "checkpoint.pt").read_bytes() == content
    assert not [*folder.glob("*.partial")]
