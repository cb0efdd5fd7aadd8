"""How features lie: against plain sums in float64, at the epochs that are asked for, once each."""

import copy
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from conftest import only_error, run_script, small
from torch import nn

from common.data.images import subset
from common.data.sets import load_dataset
from common.knn import extract_features
from common.models import build_encoder
from common.run import geometry


def plain(rows):
    """Computes spread, rank and singular values from their definitions."""
    rows = rows.double().numpy()
    unit = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    spread = np.mean([np.std(column) for column in unit.T]) * rows.shape[1] ** 0.5
    shares = np.linalg.svd(unit, compute_uv=False)
    shares = shares / shares.sum()
    rank = np.exp(-sum(s * np.log(s) for s in shares if s > 1e-12))
    covariance = np.cov(rows.T, bias=True)
    return spread, rank, np.sqrt(np.linalg.eigvalsh(covariance).clip(0))[::-1]


@pytest.mark.parametrize(("n", "d"), [(40, 7), (12, 30), (300, 200)])
def test_described_is_its_definition(n, d):
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(0)) * torch.arange(1.0, d + 1)
    found = geometry.described(rows + 3)
    spread, rank, values = plain(rows + 3)
    assert found["std"] == pytest.approx(spread, rel=1e-3)
    assert found["effective_rank"] == pytest.approx(rank, rel=1e-3)
    kept = found["singular_values"]
    assert len(kept) == min(n, d, 128)
    assert kept[: n - 1] == pytest.approx(values[: min(len(kept), n - 1)], rel=1e-3, abs=1e-6)


def test_rows_spread_over_the_sphere_and_rows_that_are_one():
    rows = torch.randn(2000, 64, generator=torch.Generator().manual_seed(0))
    found = geometry.described(rows)
    assert found["std"] == pytest.approx(1, abs=0.01) and found["effective_rank"] > 60
    found = geometry.described(rows[:1].expand(100, 64))
    assert found["std"] < 1e-6 and found["effective_rank"] == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize(
    ("epochs", "points", "expected"),
    [(25, 10, [3, 5, 8, 10, 13, 15, 18, 20, 23, 25]), (3, 10, [1, 2, 3]), (7, 0, []), (9, 1, [9])],
)
def test_points_are_spread_over_the_run(epochs, points, expected):
    config = SimpleNamespace(epochs=epochs, geometry_points=points)
    assert sorted(geometry.epochs_of(config)) == expected


def test_a_run_measures_and_a_run_that_goes_on_measures_once(tmp_path):
    flags = [*small("simsiam_gsg"), "--no-gsg", "--geometry-points", "2", "--train-images", "144"]
    flags += ["--batch-size", "72", "--epochs", "2", "--output", tmp_path, "--workers", "0"]
    assert run_script("recipes/simsiam_gsg.py", *flags, "--max-steps", "3").returncode == 0
    assert run_script("recipes/simsiam_gsg.py", *flags).returncode == 0
    lines = [json.loads(li) for li in (tmp_path / "geometry.jsonl").read_text().splitlines()]
    assert [(li["epoch"], li["step"]) for li in lines] == [(1, 2), (2, 4)]
    width = yaml.safe_load((tmp_path / "config.yaml").read_text())["output_dim"]
    assert len(lines[0]["embedding"]["singular_values"]) == min(width, 128)
    assert lines[0] != lines[1]


def test_without_test_images_it_is_one_line(tmp_path):
    from PIL import Image

    for name in range(8):
        (tmp_path / "data" / "train").mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (name, 0, 0)).save(tmp_path / "data" / "train" / f"{name}.png")
    flags = ["--dataset", "imagefolder", "--data", tmp_path / "data", "--arch", "tiny"]
    flags += ["--batch-size", "4", "--geometry-points", "1", "--output", tmp_path / "run"]
    flags += ["--image-size", "32", "--epochs", "1"]
    assert "--geometry-points measures test" in only_error(run_script("recipes/nnclr.py", *flags))


def test_both_are_taken_in_eval_mode_and_the_model_stays_as_it_was():
    train, _ = load_dataset("photos", "")
    model = nn.Module()
    model.encoder = build_encoder("tiny", 32)
    model.projector = nn.Sequential(nn.Linear(model.encoder.embed_dim, 6), nn.BatchNorm1d(6))
    model.projector[1].running_mean.fill_(3)
    model.train()
    before = copy.deepcopy(model.state_dict())
    few = subset(train, np.arange(0, len(train), 50))
    found = geometry.measure(model, few, 32)
    assert model.encoder.training and model.projector.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    rows = extract_features(model.encoder, few, np.arange(len(few)), 32)
    assert found["representation"] == geometry.described(rows)
    with torch.no_grad():
        assert found["embedding"] == geometry.described(model.projector.eval()(rows))
