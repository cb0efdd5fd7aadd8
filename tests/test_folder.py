"""The folder of a run or an evaluation: which, of what, finished or not."""

import dataclasses
import hashlib
import json

import pytest
import torch
import yaml

from common.config import RunConfig
from common.errors import UserError
from common.run import checkpoint, folder, lock, results
from common.run.folder import Folder

RUN = {"recipe": "snclr"}


def test_resume_never_takes_the_next_name(tmp_path):
    assert folder.choose(tmp_path / "run", "never") == tmp_path / "run"
    for name in ("run", "run-2"):
        (tmp_path / name).mkdir()
    assert folder.choose(tmp_path / "run", "never") == tmp_path / "run-3"
    assert folder.choose(tmp_path / "run", "auto") == tmp_path / "run"


def test_what_enters_the_numbers_is_refused_and_the_rest_may_change(tmp_path):
    config = RunConfig(arch="tiny", workers=1)
    Folder(tmp_path, RUN, config).write_config(method="SNCLR")
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    assert [*saved][:3] == ["recipe", "method", "dataset"] and saved["arch"] == "tiny"
    Folder(tmp_path, RUN, dataclasses.replace(config, workers=3)).refuse_changes()
    with pytest.raises(UserError, match="seed was 0, is 1"):
        Folder(tmp_path, RUN, dataclasses.replace(config, seed=1)).refuse_changes()
    other = Folder(tmp_path, {"recipe": "nnclr"}, dataclasses.replace(config, seed=1))
    with pytest.raises(UserError, match=r"\(recipe was snclr, is nnclr\)"):  # it names no flags
        other.refuse_changes()


def test_what_a_killed_process_had_half_saved_goes_once_the_folder_is_locked(tmp_path):
    for name in ("checkpoint.pt.1.partial", "checkpoint.pt"):
        (tmp_path / name).write_bytes(b"x")
    Folder(tmp_path, RUN, RunConfig()).lock()
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint.pt", lock.NAME}


def test_facts_are_added_once_and_never_at_the_price_of_an_error(tmp_path, monkeypatch):
    path = tmp_path / "config.yaml"
    path.write_text("recipe: snclr\n")
    facts = {"method": "SNCLR", "plan": None}
    place = Folder(tmp_path, RUN, RunConfig())

    def read_only(*_):
        raise PermissionError

    with monkeypatch.context() as patched:
        patched.setattr(folder, "write", read_only)
        place.complete_config(**facts)
    assert path.read_text() == "recipe: snclr\n"
    place.complete_config(**facts)
    assert yaml.safe_load(path.read_text())["method"] == "SNCLR"
    before = path.stat().st_mtime_ns
    Folder(tmp_path, RUN, RunConfig()).complete_config(**facts)
    assert path.stat().st_mtime_ns == before


def test_settings_are_those_that_no_flag_of_the_card_explains():
    config = RunConfig()
    object.__setattr__(config, "settings", {"follow": "official", "neighbours": 5})
    facts = folder.facts_of_run("snclr", config, {"plan": "cifar10-snclr"})
    expected = {"method": "SNCLR", "plan": "cifar10-snclr", "settings": {"neighbours": 5}}
    assert facts == expected
    assert folder.facts_of_run("unknown", config)["settings"] == config.settings


def test_a_checkpoint_of_something_else_is_refused(tmp_path, capsys):
    place = Folder(tmp_path, RUN, RunConfig())
    assert place.restore() is None
    place.save(step=3, ranks=2, state={"w": torch.ones(2)})
    assert place.restore()["step"] == 3
    assert "written with ranks 2, this is 1" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"checkpoint\.pt holds something else \(seed was 0, is 1"):
        Folder(tmp_path, RUN, RunConfig(seed=1)).restore()
    evaluation = Folder(tmp_path, {"evaluation": "linear", "images": "a"}, RunConfig())
    with pytest.raises(UserError, match="evaluation was None, is linear"):
        evaluation.restore()
    # evaluations from before saved their state alone: their config.yaml says what they are
    checkpoint.save(tmp_path, {"seconds": 1.0, "commit": place.commit, "state": {"step": 7}})
    assert evaluation.restore()["state"] == {"step": 7}


def finished(path, step=30, last=30):
    path.mkdir()
    (path / "backbone.safetensors").write_bytes(b"weights")
    what = {"step": step, "backbone_sha256": hashlib.sha256(b"weights").hexdigest()}
    (path / "results.json").write_text(json.dumps(what))
    starts = {"steps": {"last": 1}, "restarts": [{"steps": {"last": last}}]}
    (path / "environment.json").write_text(json.dumps(starts))
    return path


def test_finished_is_the_last_step_with_its_backbone(tmp_path):
    run = finished(tmp_path / "run")
    assert results.is_finished(run) and results.is_finished(run, 30)
    assert not results.is_finished(run, 40) and not results.is_finished(tmp_path / "nothing")
    assert not results.is_finished(finished(tmp_path / "longer", last=60))
    for name, content in {
        "backbone.safetensors": b"other",
        "results.json": b"[]",
        "environment.json": b"{}",
    }.items():
        other = finished(tmp_path / name)
        (other / name).write_bytes(content)
        assert not results.is_finished(other), name
        (other / name).unlink()
        assert not results.is_finished(other), name


def test_a_record_counts_if_it_is_whole_and_of_this_backbone(tmp_path):
    path = tmp_path / "record.json"
    assert folder.finished_record(path, "ab") is None
    path.write_text('{"backbone_sha256": ["ab"], "value": 1}')
    assert folder.finished_record(path, "ab")["value"] == 1
    assert folder.finished_record(path, "cd") is None
    for content in ("", "[]", "{}"):
        path.write_text(content)
        assert folder.finished_record(path, "ab") is None
