"""The plan of runs: states, what comes next, a budget on a fake clock, a run that dies half-way."""

import json
import os
import re
import subprocess
import sys
import threading
import time

import pytest
import yaml
from conftest import ROOT, environment, only_error, run_script
from test_record import good

from common import record as common_record
from common.errors import Stopped, UserError
from common.run import metrics
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
    (begun := work.folder(Piece(RUN, 1))).mkdir()
    (begun / "config.yaml").write_text("{}")
    _, line, last = reproduce.listing([RUN], work).splitlines()
    assert line.split() == ["photos-nnclr", "CPU", "1/2", "(1", "unfinished)", "0.01", "estimated"]
    assert last == "1 of 2 seeds are recorded; left to train: 0.01 h on CPU"


def test_the_probes_of_a_run_are_recorded_too(work, monkeypatch):
    """A run of one step, then the linear probe that the plan would start, but a short one."""
    quick = [*reproduce.EVALUATIONS["linear"], "--epochs", "1"]
    monkeypatch.setitem(reproduce.EVALUATIONS, "linear", quick)
    run = RUN | {"evaluations": ["linear", "knn"], "flags": RUN["flags"] | {"max-steps": 1}}
    piece = Piece(run, 0)
    reproduce.work_on(piece, work, None, float("inf"), allow_dirty=True)
    stored = {one["protocol"]: one for _, one in record.load_all(work.records)}
    assert set(stored) == {"linear", "kNN (k200,t.1)"} and work.state(piece) == "recorded"


def test_the_list_is_a_table_with_hours_and_the_papers_numbers(tmp_path):
    done = run_script("results/reproduce.py", "--list", "--runs", tmp_path)
    assert done.returncode == 0, done.stderr
    head, *lines, last = done.stdout.splitlines()
    assert re.split("  +", head)[:4] == ["name", "for", "seeds", "hours left"]
    rows = {line.split()[0]: line for line in lines}
    plan = {run["name"]: run for run in reproduce.load_plan()}
    assert [*rows] == [*plan] and max(map(len, lines)) < 140
    assert re.split("  +", rows["photos-nnclr"]) == ["photos-nnclr", "2 CPU cores", "3/3", "0"]
    columns = re.split("  +", rows["imagenet-snclr-vit-small-k0"])
    assert columns[1:] == ["H200", "0/1", "71", "estimated", "linear 71.17"]
    assert "linear 75.6" in rows["imagenet-nnclr-multi-crop"]
    assert rows["imagenet-simsiam"].endswith("linear 68.1")
    assert rows["imagenet-simsiam-gsg"].endswith("linear not at hand")
    assert rows["snclr"].endswith("estimated")  # no paper has it
    states = [seeds.split("/") for seeds in re.findall(r"\d+/\d+", "\n".join(lines))]
    done, of = (sum(int(pair[i]) for pair in states) for i in (0, 1))
    assert last.startswith(f"{done} of {of} seeds are recorded; left to train: ")
    left = [
        plan[name]["hours"] * (int(of) - int(done))
        for (done, of), name in zip(states, plan, strict=True)
        if plan[name]["device"] == "H200"
    ]
    assert f"{sum(left):.4g} h on H200" in last


def test_what_one_run_lacks_is_said(tmp_path):
    def only(name, *flags):
        line = ["--next", "--only", name, "--runs", tmp_path, *flags]
        return run_script("results/reproduce.py", *line)

    done = only("photos-nnclr")
    assert done.returncode == 0, done.stderr
    assert "photos-nnclr is recorded already (seeds 0, 1, 2)" in done.stdout
    assert "--again" in done.stdout
    assert "simsiam needs --cifar10 PATH" in only_error(only("simsiam"))
    assert "is not recorded yet" in only_error(only("simsiam", "--again"))
    assert "did you mean nnclr" in only_error(only("nnclrr"))
    error = only_error(run_script("results/reproduce.py", "--next", "--again"))
    assert "--again needs --only" in error


def test_nothing_to_do_without_data_is_no_mistake(work, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "load_plan", lambda: [OTHER])
    monkeypatch.setattr(reproduce, "is_for_here", lambda run: True)
    monkeypatch.setattr(record, "RECORDS", work.records)
    reproduce.main(["--next", "--runs", str(work.runs)])
    assert "what is missing needs --cifar10 PATH" in capsys.readouterr().out


def test_again_runs_what_is_recorded_beside_it(work, monkeypatch, capsys):
    """Its folders and records are its own: the stored record and the first run stay."""

    def stored(piece, value, folder):
        flags = " ".join(reproduce.flags_of(piece.run))
        line = f"nnclr.py {flags} --seed {piece.seed} --output runs/plan/{piece.name}"
        one = good(recipe="nnclr", protocol="kNN (k200,t.1)", command=[line], settings={})
        one |= {"seeds": [piece.seed], "value": value, "values": [value], "spread": None}
        one["settings"] = common_record.settings_of(reproduce.config_of(piece.run))
        one["pretraining"]["epochs"] = 1
        record.add(one | {"config_hash": f"{round(value):012x}"}, folder=folder)

    began = []

    def work_on(piece, at, data, deadline, allow_dirty):
        began.append(at.folder(piece))
        stored(piece, 51.0, at.records)

    monkeypatch.setattr(reproduce, "load_plan", lambda: [RUN])
    monkeypatch.setattr(reproduce, "work_on", work_on)
    monkeypatch.setattr(record, "RECORDS", work.records)
    stored(Piece(RUN, 0), 50.0, work.records)
    line = ["--next", "--only", "photos-nnclr", "--again", "--runs", str(work.runs)]
    reproduce.main(line)
    assert began == [work.runs / "again" / "photos-nnclr-0"]
    said = capsys.readouterr().out
    assert re.search(r"photos-nnclr-0, kNN \(k200,t.1\): 51.00 .*; recorded: 50.00 ", said)
    assert [one["value"] for _, one in record.load_all(work.records)] == [50.0]
    reproduce.main(line)  # seed 1 is not recorded, so not run again
    assert "was run again already (seed 0)" in capsys.readouterr().out and len(began) == 1


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
