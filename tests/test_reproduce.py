"""Doing the plan: states, what comes next, a budget on a fake clock, a run that dies half-way."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import threading
import time

import golden_set
import pytest
from conftest import ROOT, environment

from common.errors import Stopped, UserError
from common.run import metrics
from results import record, reproduce
from results.reproduce import Work
from slurm import plan
from slurm.plan import Piece


@pytest.fixture
def work(tmp_path, monkeypatch):
    for name, value in environment().items():
        monkeypatch.setenv(name, value)
    return Work(tmp_path / "runs", tmp_path / "records")


@pytest.fixture
def planned():
    return golden_set.planned()


def finished(folder):
    """Makes a folder as a finished run leaves it, as far as it is looked at."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    (folder / "environment.json").write_text(json.dumps({"steps": {"last": 3}}))
    (folder / "backbone.safetensors").write_bytes(b"")
    results = {"step": 3, "backbone_sha256": hashlib.sha256(b"").hexdigest()}
    (folder / "results.json").write_text(json.dumps(results))


def test_unfinished_first_then_to_evaluate_then_missing_with_data(work, planned):
    runs = [planned["simsiam"], planned["photos-nnclr"]]

    def next_name(*data):
        piece = reproduce.choose(runs, work, lambda name: name in ("photos", *data))
        return piece and piece.name

    assert next_name() == "photos-nnclr-0" and next_name("cifar10") == "simsiam-0"
    trained, begun = (Piece(runs[1], seed) for seed in (0, 1))
    finished(work.folder(trained))
    work.folder(begun).mkdir()
    (work.folder(begun) / "config.yaml").write_text("{}")
    assert work.state(trained) == "trained" and work.state(begun) == "unfinished"
    assert next_name("cifar10") == "photos-nnclr-1"
    lock = work.folder(begun) / reproduce.LOCK
    lock.write_text(str(os.getppid()))  # another process is at it
    assert work.state(begun) == "running"
    assert next_name("cifar10") == "photos-nnclr-0"
    lock.write_text("999999999")  # that process is gone
    assert work.state(begun) == "unfinished"


def test_two_processes_never_take_the_same_piece(work, planned, monkeypatch):
    runs, choose = [planned["photos-nnclr"]], reproduce.choose

    def slowly(*arguments):
        piece = choose(*arguments)
        time.sleep(0.5)
        return piece

    monkeypatch.setattr(reproduce, "choose", slowly)
    context = multiprocessing.get_context("fork")
    taken = context.Queue()

    def process():
        taken.put(reproduce.take(runs, work, lambda name: True)[0].name)
        time.sleep(2)  # the mark is of a living process

    both = [context.Process(target=process) for _ in range(2)]
    for one in both:
        one.start()
    names = {taken.get(timeout=10) for _ in both}
    for one in both:
        one.join()
    assert names == {"photos-nnclr-0", "photos-nnclr-1"}


STOPS = "import signal, sys, time; signal.signal(signal.SIGTERM, lambda *_: sys.exit(75));"
STOPS += "print('ready', flush=True); time.sleep(60)"


class Clock:
    """A clock on which time passes only when it is told to."""

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


def test_sigterm_stops_the_run_below_too(tmp_path):
    """Its child answers SIGTERM by a file and code 75, as a run that saves does."""
    child = "import pathlib, signal, sys, time;"
    child += f"saved = pathlib.Path({str(tmp_path / 'saved')!r});"
    child += "signal.signal(signal.SIGTERM, lambda *_: (saved.touch(), sys.exit(75)));"
    child += f"pathlib.Path({str(tmp_path / 'ready')!r}).touch(); time.sleep(60)"
    code = "import sys; from common.errors import command; from results import reproduce;"
    code += "reproduce.interrupt_on_sigterm();"
    code += f"line = [sys.executable, '-c', {child!r}];"
    code += "sys.exit(command(lambda: reproduce.until(line, float('inf'))))"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT)
    while not (tmp_path / "ready").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.terminate()
    assert process.wait(30) == 75 and (tmp_path / "saved").exists()


def test_a_command_that_fails_is_a_mistake_that_names_it():
    with pytest.raises(UserError, match=r"ended with exit code 3"):
        reproduce.until([sys.executable, "-c", "import sys; sys.exit(3)"], float("inf"))


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """Returns a run of the plan that takes seconds, with two seeds."""
    flags = {"queue-size": 128, "batch-size": 108, "output-dim": 32, "projector-hidden": 64}
    flags |= {"predictor-hidden": 64, "workers": 0, "epochs": 1}
    run = {"recipe": "nnclr", "flags": flags, "hours": 0.01}
    tier = {"dataset": "photos", "seeds": [0, 1], "evaluations": ["linear", "knn"]}
    tier |= {"device": "CPU", "basis": "estimated", "runs": {"photos-small": run}}
    path = tmp_path_factory.mktemp("plan") / "plan.yaml"
    path.write_text(json.dumps({"tiers": {"small": tier}}))
    return plan.load(path)["photos-small"]


@pytest.mark.long
def test_a_run_that_dies_half_way_is_continued_evaluated_and_recorded(work, small, monkeypatch):
    piece = Piece(small, 0)
    folder = work.folder(piece)
    quick = [*reproduce.EVALUATIONS["linear"], "--epochs", "1"]
    monkeypatch.setitem(reproduce.EVALUATIONS, "linear", quick)
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
    assert reproduce.choose([small], work, lambda name: True).name == piece.name
    reproduce.work_on(piece, work, None, float("inf"), allow_dirty=True)
    assert work.state(piece) == "recorded"
    stored = {one["protocol"]: one for _, one in record.load_all(work.records)}
    assert set(stored) == {"linear", "kNN (k200,t.1)"}
    results = json.loads((folder / "results.json").read_text())
    of_knn = stored["kNN (k200,t.1)"]
    assert of_knn["plan"] == "photos-small" == stored["linear"]["plan"]
    assert of_knn["backbone_sha256"] == [results["backbone_sha256"]]
    assert of_knn["value"] == pytest.approx(100 * results["knn"], abs=1e-3)
    assert len(json.loads((folder / "environment.json").read_text())["restarts"]) >= 1
    # known by what it says if the folder is on another machine
    assert Work(work.runs / "elsewhere", work.records).state(piece) == "recorded"
    (begun := work.folder(Piece(small, 1))).mkdir()
    (begun / "config.yaml").write_text("{}")
    _, line, last = reproduce.listing([small], work).splitlines()
    assert line.split() == ["photos-small", "CPU", "1/2", "(1", "unfinished)", "0.01", "estimated"]
    assert last == "1 of 2 seeds are recorded; left to train: 0.01 h on CPU"


def test_the_list_is_a_table_with_hours_and_the_papers_numbers(tmp_path, capsys):
    reproduce.main(["--list", "--runs", str(tmp_path)])
    head, *lines, last = capsys.readouterr().out.splitlines()
    assert re.split("  +", head)[:4] == ["name", "for", "seeds", "hours left"]
    rows = {line.split()[0]: line for line in lines}
    planned = plan.load(reproduce.PLAN)
    assert [*rows] == [*planned] and max(map(len, lines)) < 140
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
        planned[name].hours * (int(of) - int(done))
        for (done, of), name in zip(states, planned, strict=True)
        if planned[name].device == "H200"
    ]
    assert f"{sum(left):.4g} h on H200" in last


@pytest.fixture
def golden(work, monkeypatch):
    """Returns the command on the golden plan, with records of its own."""
    monkeypatch.setattr(reproduce, "PLAN", golden_set.GOLDEN / "plan.yaml")
    monkeypatch.setattr(record, "RECORDS", work.records)
    return lambda *flags: reproduce.main(["--next", "--runs", str(work.runs), *flags])


def stored(work, name, seeds, value=50.0):
    for seed in seeds:
        _, one = golden_set.of_run(name, seed, value, config_hash=f"{round(value):012x}")
        record.add(one, folder=work.records)


def test_a_run_of_the_lab_waits_for_its_rate(work, planned):
    base = planned["photos-nnclr"]

    def named(name, lr):
        return dataclasses.replace(base, name=name, config=base.config | {"lr": lr}, seeds=[0])

    rates = {f"rate-a-x{f:g}": named(f"rate-a-x{f:g}", 0.06 * f) for f in (0.25, 1, 4)}
    right, wrong, other = named("lab-a", 0.24), named("lab-a", 0.06), named("lab-a-double", 0.06)
    assert reproduce.waiting([right, other], rates, work) == [right]  # nothing is recorded
    for n, name in enumerate(rates):
        own = {"plan": name, "backbone_sha256": [f"{n}" * 64]}
        _, one = golden_set.of_run("photos-nnclr", 0, 40.0 + n, **own)
        record.add(one, folder=work.records)
    assert reproduce.waiting([right, wrong, other, *rates.values()], rates, work) == [wrong]


def test_all_goes_on_seed_by_seed_until_none_is_left(golden, monkeypatch, capsys):
    done = []
    monkeypatch.setattr(reproduce, "work_on", lambda piece, *_, **__: done.append(piece.name))
    state = lambda _, piece: "recorded" if piece.name in done else "missing"  # noqa: E731
    monkeypatch.setattr(Work, "state", state)
    monkeypatch.setattr(reproduce, "is_for_here", lambda run: run.tier == "photos")
    reproduce.main(["--next"])
    assert len(done) == 1
    reproduce.main(["--all"])
    planned = [run for run in golden_set.planned().values() if run.tier == "photos"]
    assert done == [piece.name for piece in plan.pieces(planned)] and len(done) > 4
    said = capsys.readouterr().out
    assert f"{done[0]} is recorded; {len(done) - 1} left, " in said and "; 0 left, 0 h" in said
    reproduce.main(["--all"])
    assert "nothing left to do here" in capsys.readouterr().out


def test_what_one_run_lacks_is_said(golden, work, capsys):
    stored(work, "photos-nnclr", (0, 1, 2))
    golden("--only", "photos-nnclr")
    said = capsys.readouterr().out
    assert "photos-nnclr is recorded already (seeds 0, 1, 2)" in said and "--again" in said
    for flags, expected in (
        (["--only", "simsiam"], "simsiam needs --cifar10 PATH"),
        (["--only", "simsiam", "--again"], "is not recorded yet"),
        (["--only", "photos-nnclrr"], "did you mean photos-nnclr"),
        (["--again"], "--again needs --only"),
    ):
        with pytest.raises(UserError, match=expected):
            golden(*flags)


def test_nothing_to_do_without_data_is_no_mistake(golden, work, monkeypatch, capsys):
    monkeypatch.setattr(reproduce, "is_for_here", lambda run: run.tier == "cifar5k")
    golden()
    said = capsys.readouterr().out
    assert "what is missing needs --cifar10 PATH" in said
    assert "the rest is planned for 2 CPU cores and H200" in said


def test_again_runs_what_is_recorded_beside_it(golden, work, monkeypatch, capsys):
    """Its folders and records are its own: the stored record and the first run stay."""
    began = []

    def work_on(piece, at, data, deadline, allow_dirty):
        began.append(at.folder(piece))
        stored(at, piece.run.name, [piece.seed], 51.0)

    monkeypatch.setattr(reproduce, "work_on", work_on)
    stored(work, "photos-nnclr", [0])
    golden("--only", "photos-nnclr", "--again")
    assert began == [work.runs / "again" / "photos-nnclr-0"]
    said = capsys.readouterr().out
    assert re.search(r"photos-nnclr-0, kNN \(k200,t.1\): 51.00 .*; recorded: 50.00 ", said)
    assert [one["value"] for _, one in record.load_all(work.records)] == [50.0]
    golden("--only", "photos-nnclr", "--again")  # seed 1 is not recorded, so not run again
    assert "was run again already (seed 0)" in capsys.readouterr().out and len(began) == 1


def test_records_of_the_plan_name_no_folder_outside_the_repository(planned):
    folder, data = ROOT / "runs/plan/simsiam-0", ROOT / "data/cifar10"
    line = reproduce.training_command(Piece(planned["simsiam"], 0), folder, str(data))
    assert line[line.index("--data") + 1] == "data/cifar10"
    assert line[line.index("--output") + 1] == "runs/plan/simsiam-0"
    assert line[line.index("--plan-name") + 1] == "simsiam"
    assert json.dumps(line[2:]).count(str(ROOT)) == 0


@pytest.mark.parametrize(("text", "expected"), [("540", 540), ("9m", 540), ("1.5h", 5400)])
def test_times(text, expected):
    assert reproduce.seconds(text) == expected


@pytest.mark.long
def test_a_run_that_diverges_is_recorded_and_not_tried_again(work, small, monkeypatch):
    piece = Piece(dataclasses.replace(small, flags=[*small.flags, "--lr", "1e30"]), 0)
    wanted = piece.run.config | {"lr": 1e30}
    wanted["settings"] = wanted["settings"] | {"lr": 1e30}
    piece = Piece(dataclasses.replace(piece.run, config=wanted), 0)
    reproduce.work_on(piece, work, None, float("inf"), allow_dirty=True)
    assert work.state(piece) == "recorded" and not record.load_all(work.records)
    ((name, one),) = record.load_failures(work.records)
    assert name == "failed/photos-small-0.json" and one["seeds"] == [0]
    assert re.match(r"the loss is \S+ and its gradient \S+ at step \d+", one["error"])
    (work.folder(piece) / "failed.json").unlink()
    with pytest.raises(UserError, match="ended with exit code"):  # any other mistake must be fixed
        reproduce.work_on(
            Piece(dataclasses.replace(piece.run, flags=["--dataset", "nothing"]), 1),
            work,
            None,
            float("inf"),
            allow_dirty=True,
        )
