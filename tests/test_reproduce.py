"""The plan of runs: states, what comes next, a budget on a fake clock, a run that dies half-way."""

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import yaml
from conftest import ROOT, environment, only_error, run_script

from common import metrics
from common.errors import Stopped, UserError
from results import record, reproduce
from results.reproduce import Piece, Work

RUN = {
    "name": "photos-nnclr",
    "recipe": "nnclr",
    "flags": {"dataset": "photos", "epochs": 1, "queue-size": 128, "batch-size": 108,
              "output-dim": 32, "projector-hidden": 64, "predictor-hidden": 64, "workers": 0},
    "seeds": [0, 1],
    "evaluations": ["knn"],
    "hours": 0.01,
    "device": "CPU",
    "basis": "estimated",
}  # fmt: skip
OTHER = RUN | {"name": "cifar", "flags": {"dataset": "cifar10"}, "seeds": [0]}


@pytest.fixture
def work(tmp_path, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return Work(tmp_path / "runs", tmp_path / "records")


def test_the_stored_plan_is_whole_and_its_flags_are_the_recipes():
    plan = reproduce.load_plan()
    names = {run["name"] for run in plan}
    assert {"simsiam", "simsiam-gsg", "byol", "byol-gsg", "nnsiam", "nnclr", "snclr"} <= names
    assert {"imagenet-nnclr", "imagenet-snclr-vit-small", "imagenet-snclr-vit-base"} <= names
    import importlib

    from common.config import parse

    for run in plan:
        module = importlib.import_module(f"recipes.{run['recipe']}")
        line = reproduce.training_command(Piece(run, 1), ROOT / "x", "data")
        resolve = getattr(module, "resolve", None) or module.check
        config = parse(module.Config, module.PRESETS, line[2:], resolve)
        assert config.seed == 1 and config.dataset == run["flags"]["dataset"]


def test_first_seeds_of_all_runs_come_first():
    names = [piece.name for piece in reproduce.pieces([RUN, OTHER])]
    assert names == ["photos-nnclr-0", "cifar-0", "photos-nnclr-1"]


def test_unfinished_first_then_to_evaluate_then_missing_with_data(work):
    plan = [OTHER, RUN]

    def next_name(*data):
        piece = reproduce.choose(plan, work, lambda name: name in ("photos", *data))
        return piece and piece.name

    assert next_name() == "photos-nnclr-0" and next_name("cifar10") == "cifar-0"
    trained, begun = work.runs / "photos-nnclr-0", work.runs / "photos-nnclr-1"
    for folder in (trained, begun):
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text("{}")
    (trained / "results.json").write_text(json.dumps({"backbone_sha256": "c" * 64}))
    assert work.state(Piece(RUN, 0)) == "trained" and work.state(Piece(RUN, 1)) == "unfinished"
    assert next_name("cifar10") == "photos-nnclr-1"
    (begun / reproduce.LOCK).write_text(str(os.getppid()))  # another process is at it
    assert work.state(Piece(RUN, 1)) == "running"
    assert next_name("cifar10") == "photos-nnclr-0"
    (begun / reproduce.LOCK).write_text("999999999")  # that process is gone
    assert work.state(Piece(RUN, 1)) == "unfinished"


STOPS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"
STOPS += "print('ready', flush=True); time.sleep(60)"


class Clock:
    """Time that passes only when it is told to."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_at_the_budget_the_run_is_asked_to_stop(tmp_path):
    clock = Clock()
    ready = tmp_path / "ready"
    code = STOPS.replace("print('ready', flush=True)", f"open({str(ready)!r}, 'w').close()")

    def pass_time():
        while not ready.exists():
            time.sleep(0.05)
        clock.now = 541.0

    thread = threading.Thread(target=pass_time)
    thread.start()
    began = time.monotonic()
    with pytest.raises(Stopped):
        reproduce.until([sys.executable, "-c", code], 540.0, clock)
    thread.join()
    assert time.monotonic() - began < 30  # not the 60 s that it would have slept


def test_a_run_that_does_not_answer_is_killed(monkeypatch):
    clock = Clock()
    ignores = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"

    def ticking():
        clock.now += 50.0
        return clock.now

    began = time.monotonic()
    with pytest.raises(Stopped):
        reproduce.until([sys.executable, "-c", ignores], 500.0, ticking)
    assert time.monotonic() - began < 30


def test_a_command_that_fails_is_a_mistake_that_names_it():
    with pytest.raises(UserError, match=r"ended with exit code 3"):
        reproduce.until([sys.executable, "-c", "import sys; sys.exit(3)"], float("inf"))


def test_a_run_that_dies_half_way_is_continued_and_recorded(work):
    piece = Piece(RUN, 0)
    folder = work.folder(piece)
    line = [*reproduce.training_command(piece, folder, None), "--checkpoint-minutes", "0.001"]
    process = subprocess.Popen(line, stdout=subprocess.DEVNULL)
    for _ in range(1200):
        if len(metrics.read(folder / "metrics.jsonl")) > 5 and (folder / "checkpoint.pt").exists():
            break
        assert process.poll() is None
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert work.state(piece) == "unfinished"
    with pytest.raises(Stopped):  # the budget is spent before it gets far
        reproduce.work_on(piece, work, None, time.monotonic() + 5.0, allow_dirty=True)
    assert work.state(piece) == "unfinished" and not record.load_all(work.records)
    assert reproduce.choose([OTHER, RUN], work, lambda name: True).name == piece.name
    reproduce.work_on(piece, work, None, float("inf"), allow_dirty=True)
    assert work.state(piece) == "recorded"
    [(_, stored)] = record.load_all(work.records)
    results = json.loads((folder / "results.json").read_text())
    assert stored["backbone_sha256"] == [results["backbone_sha256"]]
    assert stored["value"] == pytest.approx(100 * results["knn"], abs=1e-3)
    assert len(json.loads((folder / "environment.json").read_text())["restarts"]) >= 1
    # known by its name where the folder is on another machine
    assert Work(work.runs / "elsewhere", work.records).state(piece) == "recorded"
    listed = reproduce.listing([RUN], work)[0]
    assert listed["state"] == {"seed 0": "recorded", "seed 1": "missing"}
    assert listed["hours left"] == RUN["hours"]


def test_the_probes_of_a_run_are_recorded_too(work, monkeypatch):
    """A run of one step, then the linear probe that the plan would start, but a short one."""
    quick = [*reproduce.EVALUATIONS["linear"], "--epochs", "1"]
    monkeypatch.setitem(reproduce.EVALUATIONS, "linear", quick)
    run = RUN | {"evaluations": ["linear", "knn"], "flags": RUN["flags"] | {"max-steps": 1}}
    piece = Piece(run, 0)
    reproduce.work_on(piece, work, None, float("inf"), allow_dirty=True)
    stored = {one["protocol"]: one for _, one in record.load_all(work.records)}
    assert set(stored) == {"linear", "kNN (k200,t.1)"} and work.state(piece) == "recorded"


def test_the_command(tmp_path):
    done = run_script("results/reproduce.py", "--list", "--runs", tmp_path)
    assert done.returncode == 0, done.stderr
    listed = yaml.safe_load(done.stdout)
    assert {run["name"] for run in listed} == {run["name"] for run in reproduce.load_plan()}
    error = only_error(run_script("results/reproduce.py", "--list", "--only", "nnclrr"))
    assert "did you mean nnclr" in error
    done = run_script("results/reproduce.py", "--next", "--only", "nnclr", "--runs", tmp_path)
    assert done.returncode == 0 and "--cifar10 PATH" in done.stdout


@pytest.mark.parametrize(("text", "expected"), [("540", 540), ("9m", 540), ("1.5h", 5400)])
def test_times(text, expected):
    assert reproduce.seconds(text) == expected


@pytest.mark.parametrize("damage", ["field", "evaluation", "recipe", "twice"])
def test_a_broken_plan_is_a_mistake(damage, tmp_path):
    broken = dict(RUN)
    if damage == "field":
        del broken["hours"]
    elif damage == "evaluation":
        broken["evaluations"] = ["magic"]
    elif damage == "recipe":
        broken["recipe"] = "simclr"
    runs = [broken, broken] if damage == "twice" else [broken]
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump({"runs": runs}))
    with pytest.raises(UserError):
        reproduce.load_plan(tmp_path / "plan.yaml")
