"""The random encoder is read with the statistics of images: common/run/calibrate.py."""

import copy
import json

import pytest
import torch
from conftest import SMALL, run_ranks, run_script
from safetensors.torch import load_file
from torch import nn

from common.augment import two_views, view_rng
from common.data.loaders import epoch_order
from common.data.sets import load_dataset
from common.fast.pixels import to_input
from common.knn import knn_of_encoder
from common.models import build_encoder
from common.run import calibrate
from common.run.calibrate import calibrated
from eval.encoders import is_random, load_encoder
from results import record

VIEWS = two_views("byol", 32, interpolation="bicubic")


@pytest.fixture(scope="module")
def photos():
    return load_dataset("photos", "")


def test_statistics_are_the_mean_over_batches_of_the_first_epochs_views(photos, monkeypatch):
    """A plain float64 reading of one batch norm on the pixels themselves gives the same."""
    monkeypatch.setattr(calibrate, "IMAGES", 150)
    monkeypatch.setattr(calibrate, "BATCH", 50)
    train, _ = photos
    norm = nn.BatchNorm2d(3)
    found = calibrated(norm, train, VIEWS, seed=3)
    means, variances = [], []
    for samples in epoch_order(len(train), 3, 0)[:150].reshape(3, 50):
        for number, view in enumerate(VIEWS):
            rows = []
            for sample in samples:
                image = train.load(int(sample))
                rng = view_rng(3, 0, int(sample), number)
                rows.append(view.apply(image, view.draw(rng, *image.size)))
            x = to_input(torch.stack(rows), torch.device("cpu"), torch.float32).double()
            means.append(x.mean((0, 2, 3)))
            variances.append(x.var((0, 2, 3)))
    torch.testing.assert_close(found.running_mean.double(), sum(means) / 6, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found.running_var.double(), sum(variances) / 6, rtol=1e-4, atol=1e-5)
    assert not found.training


def test_nothing_else_moves(photos, monkeypatch):
    monkeypatch.setattr(calibrate, "IMAGES", 256)
    torch.manual_seed(5)
    encoder = build_encoder("tiny", 32).train()
    before, drawn = copy.deepcopy(encoder.state_dict()), torch.get_rng_state()
    found = calibrated(encoder, photos[0], VIEWS, 0)
    assert torch.equal(torch.get_rng_state(), drawn) and encoder.training
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, before[name]), name
    for (name, weight), other in zip(found.named_parameters(), encoder.parameters(), strict=True):
        assert torch.equal(weight, other) and weight is not other, name
    assert found.state_dict().keys() == before.keys()


def test_an_encoder_without_statistics_is_as_drawn(photos):
    torch.manual_seed(0)
    vit = build_encoder("vit_small", 32).train()
    found = calibrated(vit, photos[0], VIEWS, 0)
    assert not found.training
    for name, value in vit.state_dict().items():
        assert torch.equal(found.state_dict()[name], value), name


def test_which_encoders_were_never_trained():
    named = {"layout": "ours", "arch": "tiny"}
    assert is_random(named | {"epoch": 0.0}) and not is_random(named | {"epoch": 0.5})
    assert not is_random(named | {"layout": "moco", "epoch": 0})  # MoCo counts from 0
    assert is_random(load_encoder("random", "tiny", 32)[1])
    assert not is_random(load_encoder("pixels", None, 32)[1])


def first_line(folder):
    return json.loads((folder / "metrics.jsonl").read_text().splitlines()[0])


@pytest.mark.long
def test_a_run_says_the_calibrated_number_and_trains_as_without_it(tmp_path, photos):
    flags = [*SMALL[:-2], "--max-steps", "2", "--queue-size", "128", "--seed", "1"]
    for name, knn in (("with", 1), ("without", 0)):
        output = tmp_path / name
        done = run_script("recipes/nnsiam.py", *flags, "--knn-every", knn, "--output", output)
        assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / n / "backbone.safetensors") for n in ("with", "without"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    line = first_line(tmp_path / "with")
    assert line["calibrated"] is True
    results = json.loads((tmp_path / "with" / "results.json").read_text())
    torch.manual_seed(1)  # a run draws its encoder first
    encoder = build_encoder("tiny", 32)
    raw = knn_of_encoder(encoder.eval(), *photos, 32)
    assert results["knn_before"] == line["knn"] > raw + 0.1


@pytest.mark.long
def test_two_ranks_calibrate_as_one(tmp_path):
    flags = [*SMALL[:-2], "--max-steps", "1", "--queue-size", "128", "--knn-every", "1"]
    for ranks in (1, 2):
        run_ranks(ranks, "recipes/nnsiam.py", *flags, "--output", tmp_path / str(ranks))
    one, two = (first_line(tmp_path / str(ranks))["knn"] for ranks in (1, 2))
    assert one == pytest.approx(two, abs=2 / 1080)


def test_a_line_from_before_is_no_yardstick(tmp_path):
    from common.run import metrics, results

    lines = [{"kind": "epoch", "epoch": 0, "step": 0, "knn": 0.2}]
    metrics.write(tmp_path / metrics.NAME, lines)
    (tmp_path / results.BACKBONE).write_bytes(b"")
    results.write(tmp_path, {})
    assert results.read(tmp_path, ["knn_before"])["knn_before"] is None
    # nor does it come back when the run goes on, or in a record's history
    (line,) = metrics.cut(tmp_path / metrics.NAME, 0)
    assert line == {"kind": "epoch", "epoch": 0, "step": 0, "knn_as_initialised": 0.2}
    assert "knn" not in record.history([line])


@pytest.mark.long
def test_a_random_backbone_is_calibrated_by_the_evaluation(tmp_path, photos):
    flags = ["--backbone", "random", "--arch", "tiny", "--image-size", "32", "--dataset", "photos"]
    flags += ["--workers", "0", "--measure", "knn", "--protocol", "gsg", "--output", tmp_path]
    done = run_script("eval/linear_probe/run.py", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "record-knn.json").read_text())
    encoder, facts = load_encoder("random", "tiny", 32)
    assert found["backbone_sha256"] == [facts["sha256"]]
    encoder = calibrated(encoder, photos[0], two_views("crop-flip", 32), 0)
    value = 100 * knn_of_encoder(encoder, *photos, 32)
    assert found["value"] == pytest.approx(value, abs=0.1)  # a test image may lie on the border


@pytest.mark.long
def test_the_snapshot_of_epoch_0_is_calibrated_by_the_evaluation(tmp_path, photos):
    flags = [*SMALL, "--max-steps", "1", "--queue-size", "128", "--snapshot-epochs", "0"]
    done = run_script("recipes/nnsiam.py", *flags, "--seed", "1", "--output", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    flags = ["--backbone", tmp_path / "run" / "snapshots" / "epoch-0000.pt", "--workers", "0"]
    flags += ["--measure", "knn", "--output", tmp_path / "out"]
    done = run_script("eval/linear_probe/run.py", *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out" / "record-knn.json").read_text())
    assert found["epoch"] == "0 of 10 scheduled epochs"
    torch.manual_seed(1)  # a run draws its encoder first
    encoder = calibrated(build_encoder("tiny", 32), photos[0], two_views("crop-flip", 32), 0)
    value = 100 * knn_of_encoder(encoder, *photos, 32)
    assert found["value"] == pytest.approx(value, abs=0.1)
