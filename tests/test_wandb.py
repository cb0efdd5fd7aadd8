"""What --wandb writes, by the real package offline: its files are read back."""

import json
import struct
import time
from pathlib import Path

import pytest
from conftest import SMALL, run_script
from wandb.proto import wandb_internal_pb2

from common.run import metrics
from common.run.flags import config_hash
from recipes import snclr

BLOCK = 1 << 15


def sent(folder: Path) -> list[wandb_internal_pb2.Record]:
    """Returns all records of a run folder's offline runs, oldest first."""
    found = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for data in chunks(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            found.append(record)
    return found


def chunks(content: bytes):
    """Yields records in LevelDB's log format, which follow a header of 7 bytes: blocks of chunks
    with checksum, length and type (1 whole, 2 first, 3 middle, 4 last).
    """
    place, whole = 7, b""
    while place + 7 <= len(content):
        if BLOCK - place % BLOCK < 7:
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", content[place : place + 7])
        whole += content[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield whole
            whole = b""


def rows(folder: Path) -> list[dict]:
    """Returns the rows of the history that were sent, with wandb's own `_step`."""
    found = []
    for record in sent(folder):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({i.key or i.nested_key[0]: json.loads(i.value_json) for i in items})
    return found


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def start(folder: Path, *flags: str) -> metrics.Wandb:
    config = vars(snclr.parse_arguments(["--dataset", "photos", "--wandb", *flags]))
    return metrics.Wandb(True, folder, "snclr", config)


def step(number: int) -> dict:
    return {"kind": "step", "epoch": 1, "step": number, "loss": 1 / (number + 1)}


def epoch(number: int, at: int) -> dict:
    return {"kind": "epoch", "epoch": number, "step": at, "knn": number / 10}


def test_each_step_is_sent_once_at_its_number_with_epochs_on_their_own_axis(tmp_path, capsys):
    """This holds for a run that was killed and goes on from before its last step, too."""
    first = start(tmp_path)
    first.log([epoch(0, 0)])
    first.log([step(1), step(2)])
    first.log([epoch(1, 2)])
    first.log([step(3), step(4)])
    first.run.finish()  # killed: ours is not called
    second = start(tmp_path)
    assert second.identity == first.identity
    second.log([step(3)])
    second.log([step(4)])
    second.log([epoch(2, 4)])
    second.log([step(5)])
    second.finish()
    assert "wandb failed" not in capsys.readouterr().err
    history = rows(tmp_path)
    assert [(r["_step"], r["step/step"]) for r in history if "step/step" in r] == [
        (n, n) for n in (1, 2, 3, 4, 5)
    ]
    epochs = [(r["_step"], r["epoch/epoch"], r["epoch/knn"]) for r in history if "epoch/knn" in r]
    assert epochs == [(0, 0, 0.0), (2, 1, 0.1), (4, 2, 0.2)]
    axes = {r.metric.glob_name: r.metric.step_metric for r in sent(tmp_path)}
    assert axes["epoch/*"] == "epoch/epoch"


def test_project_entity_group_and_tags_are_flags_that_change_no_hash(tmp_path):
    flags = ["--wandb-project", "p", "--wandb-entity", "e", "--wandb-group", "g"]
    flags += ["--wandb-tags", "a, b"]
    start(tmp_path, *flags).finish()
    deadline, runs = time.monotonic() + 20, []
    while not runs and time.monotonic() < deadline:  # wandb's own process writes the file
        runs = [r.run for r in sent(tmp_path) if r.WhichOneof("record_type") == "run"]
        time.sleep(0.1)
    run = runs[0]
    assert (run.project, run.entity, run.run_group) == ("p", "e", "g")
    assert [*run.tags] == ["a", "b"]
    plain = snclr.parse_arguments(["--dataset", "photos"])
    given = snclr.parse_arguments(["--dataset", "photos", *flags])
    assert config_hash(plain) == config_hash(given)


def test_the_id_of_a_folder_from_before_stays(tmp_path):
    (tmp_path / "wandb_id").write_text("abcd1234")
    before = start(tmp_path)
    before.log([step(1)])
    before.finish()
    assert before.identity == "abcd1234"
    assert (tmp_path / "wandb_id").read_text() == "abcd1234 1 -1\n"


@pytest.mark.long
def test_a_run_sends_what_its_metrics_say_and_says_no_failure(tmp_path):
    flags = [*SMALL, "--knn-every", "1", "--train-images", "180", "--max-steps", "7", "--wandb"]
    done = run_script("recipes/nnsiam.py", *flags, "--output", tmp_path / "run")
    assert done.returncode == 0 and "wandb failed" not in done.stderr, done.stderr
    written = metrics.read(tmp_path / "run" / "metrics.jsonl")
    history = rows(tmp_path / "run")
    for kind in ("step", "epoch"):
        steps = [r["step"] for r in written if r["kind"] == kind]
        assert steps and steps == [r["_step"] for r in history if f"{kind}/step" in r]
