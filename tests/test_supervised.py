"""The supervised control: a plain float64 replay of its run, where --init starts, its record, and
that a kill or a second rank changes nothing.
"""

import copy
import json
import shutil

import pytest
import torch
from conftest import Script, only_error, run_ranks, run_script
from replay import BATCH, RUN, assert_states_are_close, watched_run, with_torchs_batch_norms
from test_ranks import state_of, step_losses
from test_resume import assert_same_runs, images, wait_for_step

from common.data.sets import load_dataset
from common.run.backbone import load_backbone
from common.run.run import Run
from eval import supervised
from results import record

SCRIPT = "eval/supervised.py"
PHOTOS = ["--dataset", "photos", "--workers", "0", "--batch-size", "90", "--train-images", "180"]
PHOTOS += ["--epochs", "1", "--knn-every", "0", "--warmup-epochs", "0"]
FOLDERS = ["--dataset", "imagefolder", "--arch", "tiny", "--image-size", "16", "--batch-size", "16"]
FOLDERS += ["--epochs", "2", "--knn-every", "0", "--warmup-epochs", "0.5", "--lr", "0.4"]


def test_a_run_is_the_plain_replay_of_its_views_and_labels(tmp_path, monkeypatch):
    """Cross-entropy is written out, with torch's batch norms and SGD by hand; the labels are read
    from the images' own set.
    """
    numbers, batches = [], Run.batches

    def noting(self, views):
        for step, pixels, ids in batches(self, views):
            numbers.append(ids.clone())
            yield step, pixels, ids

    monkeypatch.setattr(Run, "batches", noting)
    steps, decay, lr = 4, 0.01, 0.05
    flags = ["--max-steps", str(steps), "--lr", str(lr), "--lr-batch", "0", "--warmup-epochs", "0"]
    flags += ["--sgd-momentum", "0.8", "--weight-decay", str(decay)]
    seen = watched_run(supervised, flags, tmp_path, monkeypatch)
    labels = torch.from_numpy(load_dataset("imagefolder", str(images()))[0].labels).long()
    model = with_torchs_batch_norms(copy.deepcopy(seen["before"]["model"]))
    assert len({int(v) for ids in numbers for v in labels[ids]}) == 8
    speed = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    for (x1, x2), ids, said in zip(seen["views"], numbers, seen["logged"], strict=True):
        model.zero_grad()
        scores = model.encoder(torch.cat([x1, x2])) @ model.head.weight.T + model.head.bias
        own = [int(labels[n]) for n in [*ids, *ids]]
        rows = [row.exp().sum().log() - row[y] for row, y in zip(scores, own, strict=True)]
        loss = sum(rows) / (2 * BATCH)
        loss.backward()
        assert said["loss"] == pytest.approx(loss.item(), rel=1e-9)
        right = sum(int(row.argmax()) == y for row, y in zip(scores, own, strict=True))
        assert said["train_accuracy"] == pytest.approx(right / (2 * BATCH))
        with torch.no_grad():
            for name, p in model.named_parameters():
                speed[name] = 0.8 * speed[name] + p.grad + decay * p
                p -= said["lr"] * speed[name]
    assert seen["logged"][0]["lr"] == lr
    assert_states_are_close([(seen["after"]["model"], model)])


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a run of the control itself, with how its features lay."""
    folder = tmp_path_factory.mktemp("supervised") / "run"
    supervised.main([*PHOTOS, "--geometry-points", "1", "--output", str(folder)])
    return folder


def test_its_record_is_whole_and_made_anew_without_training(trained, tmp_path):
    found = json.loads((trained / "record.json").read_text())
    assert record.problems(found | {"commit": "0" * 40}) == []
    assert (found["method"], found["recipe"], found["protocol"]) == (
        *("supervised", "supervised", "classifier"),
    )
    assert found["dataset"] == {"name": "photos", "copy": None, "incomplete": None}
    assert found["pretraining"]["incomplete"] == "180 images of it"
    assert len(found["geometry"][0][0]["embedding"]["singular_values"]) == 18  # logits
    again = tmp_path / "again"
    shutil.copytree(trained, again)
    (again / "record.json").unlink()
    flags = [*PHOTOS, "--geometry-points", "1", "--output", str(again)]
    supervised.main(flags)
    anew = json.loads((again / "record.json").read_text())
    assert anew["value"] == found["value"]
    lines = (again / "metrics.jsonl").read_bytes()
    assert lines == (trained / "metrics.jsonl").read_bytes()
    (again / "record.json").unlink()
    for saved in again.glob("checkpoint*"):
        saved.unlink()
    assert "neither its record nor the checkpoint" in only_error(run_script(SCRIPT, *flags))


def test_the_accuracy_is_a_plain_count(trained):
    """The count goes over the test images one by one, from the saved encoder and head."""
    config = supervised.parse_arguments([*PHOTOS, "--output", str(trained)])
    head = state_of(trained)["model"]
    encoder, _ = load_backbone(trained)
    run = Run("supervised", config)
    rows = supervised.extract_features(encoder, run.test, range(len(run.test)), 32)
    scores = rows @ head["head.weight"].T + head["head.bias"]
    right = [int(s.argmax()) == y for s, y in zip(scores, run.test.labels, strict=True)]
    found = json.loads((trained / "record.json").read_text())
    assert found["value"] == pytest.approx(100 * sum(right) / len(right), abs=1e-3)


def test_init_starts_from_the_very_tensors(trained, tmp_path, monkeypatch):
    begun, begin = {}, Run.begin

    def noting(self, encoder, **state):
        begun.update({n: v.clone() for n, v in encoder.state_dict().items()})
        return begin(self, encoder, **state)

    monkeypatch.setattr(Run, "begin", noting)
    flags = ["--init", str(trained), "--max-steps", "1", "--output", str(tmp_path / "run")]
    supervised.main([*PHOTOS, *flags])
    expected = load_backbone(trained)[0].state_dict()
    assert begun.keys() == expected.keys()
    assert all(torch.equal(begun[name], value) for name, value in expected.items())
    found = json.loads((tmp_path / "run" / "record.json").read_text())
    results = json.loads((trained / "results.json").read_text())
    assert found["hyperparameters"]["started_from_sha256"] == results["backbone_sha256"]
    assert found["settings"]["init"] == str(trained)


def test_another_arch_a_missing_run_or_no_labels_are_one_line(trained, tmp_path):
    output = ["--output", str(tmp_path / "run")]
    other = run_script(SCRIPT, *PHOTOS, *output, "--arch", "resnet_lab", "--init", trained)
    assert "its encoder is a tiny, --arch is resnet_lab" in only_error(other)
    missing = run_script(SCRIPT, *PHOTOS, *output, "--init", tmp_path / "nothing")
    assert "no finished run is there" in only_error(missing)
    (tmp_path / "flat" / "train").mkdir(parents=True)
    for number, path in enumerate(sorted((images() / "train").rglob("*.png"))[:32]):
        shutil.copy(path, tmp_path / "flat" / "train" / f"{number}.png")
    flat = run_script(SCRIPT, *FOLDERS, *output, "--data", tmp_path / "flat")
    assert "has no labels" in only_error(flat)


@pytest.mark.long
def test_killed_and_started_again_it_ends_the_same(trained, tmp_path):
    flags = [*FOLDERS, "--data", str(images()), "--workers", "1"]
    assert run_script(SCRIPT, *flags, "--output", tmp_path / "whole").returncode == 0
    often = ["--checkpoint-minutes", "0.001", "--output", tmp_path / "run"]
    process = Script(SCRIPT, *flags, *often, merged=True)
    wait_for_step(tmp_path / "run", 7, process)
    process.kill()
    process.wait()
    assert run_script(SCRIPT, *flags, *often).returncode == 0
    assert_same_runs(tmp_path / "whole", tmp_path / "run")
    values = [
        json.loads((tmp_path / n / "record.json").read_text())["value"] for n in ("whole", "run")
    ]
    assert values[0] == values[1]


@pytest.mark.long
@pytest.mark.parametrize("more", [[], ["--micro-batch", "8"]])
def test_two_ranks_are_one(more, tmp_path):
    flags = [*RUN, "--data", str(images()), "--max-steps", "3", *more]
    for ranks in (1, 2):
        run_ranks(ranks, SCRIPT, *flags, "--output", tmp_path / str(ranks))
    one, two = tmp_path / "1", tmp_path / "2"
    assert step_losses(two) == pytest.approx(step_losses(one), rel=1e-10)
    ours, theirs = (state_of(run)["model"] for run in (one, two))
    for name, value in ours.items():
        torch.testing.assert_close(theirs[name], value, rtol=1e-8, atol=1e-8, msg=name)
    values = [json.loads((run / "record.json").read_text())["value"] for run in (one, two)]
    assert values[0] == values[1]
