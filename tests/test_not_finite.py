"""What is no number is never a measurement."""

import json
import math

import numpy as np
import pytest
import torch
from conftest import only_error, run_script
from golden_set import good

from common.data.sets import load_dataset
from common.errors import UserError
from common.knn import extract_features
from common.models import build_encoder
from eval.evaluation import held_out
from results import record


@pytest.fixture
def diverged(tmp_path):
    """Returns a backbone whose features are not finite."""
    encoder = build_encoder("tiny", 32)
    with torch.no_grad():
        next(encoder.parameters()).fill_(1e38)
    return encoder


def test_features_that_are_not_finite_are_one_line(diverged):
    images, _ = load_dataset("photos", "")
    with pytest.raises(UserError, match="features are not finite"):
        extract_features(diverged, images, np.arange(40), 32)


def test_a_record_with_nan_is_refused_and_named():
    one = good()
    assert record.problems(one) == []
    one["others"] = {"path": [{"validation": math.nan}]}
    assert record.problems(one) == ["others.path.0.validation: nan is no number"]
    assert json.loads(record.text_of(one))["others"] == {"path": [{"validation": None}]}
    one = record.with_values(good(), [math.inf])
    with pytest.raises(UserError, match="is inf: nothing was measured, so there is no record"):
        record.text_of(one)
    one = good() | {"scores": [record.with_values(good(), [math.nan])]}
    with pytest.raises(UserError, match="is nan"):
        record.text_of(one)


def test_record_add_refuses_a_file_with_nan(tmp_path):
    text = json.dumps(good() | {"others": {"best": math.nan}})
    (tmp_path / "record.json").write_text(text)
    done = run_script("results/record.py", "add", tmp_path / "record.json")
    assert "others.best: nan is no number" in only_error(done)


def test_nothing_to_choose_by_is_one_line():
    with pytest.raises(UserError, match="no training image can be held out"):
        held_out(np.arange(10), False, 0)


def test_one_class_is_one_line(tmp_path):
    from PIL import Image

    for split in ("train", "val"):
        folder = tmp_path / split / "only"
        folder.mkdir(parents=True)
        for number in range(4):
            Image.new("RGB", (40, 40), (number, 0, 0)).save(folder / f"{number}.png")
    flags = ["--backbone", "pixels", "--dataset", "imagefolder", "--data", tmp_path]
    flags += ["--image-size", "32", "--protocol", "gsg", "--workers", "0"]
    done = run_script("eval/linear_probe/run.py", *flags, "--output", tmp_path / "out")
    assert "has one class: there is nothing to tell apart" in only_error(done)
