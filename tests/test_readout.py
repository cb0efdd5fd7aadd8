"""The lab's read-out: against scikit-learn, its choice, its images, and the record of a run."""

import json

import numpy as np
import pytest
import torch
import yaml
from conftest import only_error, run_script, small

from common.data.sets import load_dataset
from common.data.splits import balanced, held_out_share
from common.run import results
from eval.readout import run as readout
from eval.transfer.classifier import Split
from results import record


def overlapping(n, seed):
    """Draws rows of 5 features of any scale around 3 centres that overlap, and a constant one."""
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 3, n)
    rows = rng.normal(size=(n, 5)) + np.eye(3, 5)[labels]
    rows = np.hstack([rows * [1, 10, 100, 0.1, 1] + 7, np.full((n, 1), 3.0)])
    return Split(torch.from_numpy(rows).float(), torch.from_numpy(labels))


def test_the_linear_read_out_is_scikit_learns_on_standardised_features():
    from sklearn.linear_model import LogisticRegression
    from sklearn.preprocessing import StandardScaler

    train, held = overlapping(400, 0), overlapping(200, 1)
    scaler = StandardScaler().fit(train.features.double())
    for part in (train, held):
        ours = readout.standardised(part, train.features).features
        torch.testing.assert_close(ours.numpy(), scaler.transform(part.features.double()))
    both = [readout.standardised(part, train.features) for part in (train, held)]
    fit, tried = readout.choose(*both, 3)
    scores = {}
    for row in tried:
        theirs = LogisticRegression(C=1 / row["penalty"], tol=1e-8, max_iter=5000)
        theirs.fit(both[0].features.numpy(), train.targets.numpy())
        scores[row["penalty"]] = 100 * theirs.score(both[1].features.numpy(), held.targets.numpy())
        assert row["held_out_top1"] == pytest.approx(scores[row["penalty"]], abs=0.51)
    best = max(row["held_out_top1"] for row in tried)
    equals = [row["penalty"] for row in tried if row["held_out_top1"] == best]
    assert fit.decay == pytest.approx(max(equals), rel=1e-3)  # the largest penalty of equals


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("readout") / "run"
    flags = ["--train-images", "900", "--subset-seed", "1", "--validation-share", "0.1"]
    flags += ["--scored-on", "test", "--epochs", "1", "--batch-size", "180", "--knn-every", "1"]
    flags += [
        "--snapshot-epochs",
        "0",
        "--geometry-points",
        "1",
        "--workers",
        "0",
        "--output",
        folder,
    ]
    done = run_script("recipes/nnclr.py", *small("nnclr"), *flags)
    assert done.returncode == 0, done.stderr
    assert "held-out" not in done.stdout  # its k-NN is of the test images
    return folder


@pytest.mark.long
def test_a_run_is_read_on_its_own_images_and_scored_on_every_test_image(run):
    done = run_script("eval/readout/run.py", "--backbone", run, "--workers", "0")
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "eval" / "readout-photos" / "record.json").read_text())
    assert record.problems(found) == [] or found["commit"] == "unknown"
    ours = results.read(run)
    assert found["scores"][0]["value"] == pytest.approx(100 * ours["knn"], abs=1e-3)
    assert found["others"]["random encoder"] == [pytest.approx(100 * ours["knn_before"], abs=1e-3)]
    assert found["protocol"] == "linear (L-BFGS), standardised"
    assert found["pretraining"]["incomplete"] == "900 images of it (draw 1), without 10 % held out"
    assert found["hyperparameters"]["read"] == "900 training images"
    assert 2 * 100 / 18 < found["value"] <= 100
    assert found["history"][0]["epoch"] == [0, 1]
    (lay,) = found["geometry"]
    assert lay[0]["epoch"] == 1 and len(lay[0]["embedding"]["singular_values"]) > 10
    again = run_script("eval/readout/run.py", "--backbone", run, "--workers", "0")
    assert again.returncode == 0 and f"linear {found['value']:.2f} %" in again.stdout


@pytest.mark.long
def test_the_first_features_alone_are_read(run):
    flags = ["--backbone", run, "--workers", "0", "--first-features"]
    done = run_script("eval/readout/run.py", *flags, "5")
    assert done.returncode == 0, done.stderr
    found = json.loads((run / "eval" / "readout-first5-photos" / "record.json").read_text())
    assert record.problems(found) == [] or found["commit"] == "unknown"
    assert found["protocol"] == "linear (L-BFGS), standardised, first 5 features"
    assert found["settings"]["first_features"] == 5
    assert "--first-features 999" in only_error(run_script("eval/readout/run.py", *flags, "999"))
    done = run_script("eval/readout/run.py", *flags, "5", "--untrained")
    assert "leave --first-features out" in only_error(done)


def test_what_is_read_and_what_is_held_out_are_the_runs_own(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    job = readout.Readout(readout.parse_arguments(["--backbone", str(run), "--workers", "0"]))
    train, held = held_out_share(load_dataset("photos", "")[0], config["validation_share"])
    chosen = balanced(train, 900, 1)
    assert np.array_equal(job.train.labels, train.labels[chosen]) and len(job.held) == len(held)
    assert len(job.test) == len(load_dataset("photos", "")[1])


@pytest.mark.long
def test_pixels_are_a_control(tmp_path):
    flags = ["--backbone", "pixels", "--image-size", "32", "--dataset", "photos", "--workers", "0"]
    flags += ["--train-images", "900", "--output", tmp_path]
    assert "--validation-share" in only_error(run_script("eval/readout/run.py", *flags))
    done = run_script("eval/readout/run.py", *flags, "--validation-share", "0.1")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "record.json").read_text())
    assert "geometry" not in found and "random encoder" not in found["others"]


@pytest.mark.long
def test_what_a_run_began_from_is_read_as_the_run_itself_read_it(run, tmp_path):
    done = run_script("eval/readout/run.py", "--backbone", run, "--untrained", "--workers", "0")
    assert done.returncode == 0, done.stderr
    folder = run / "eval" / "readout-untrained-photos"
    found = json.loads((folder / "record.json").read_text())
    assert found["protocol"] == "linear (L-BFGS), standardised, untrained"
    before = 100 * results.read(run)["knn_before"]
    assert found["scores"][0]["value"] == pytest.approx(before, abs=1e-3)  # calibrated alike
    others = found["others"]
    assert others["random encoder"] == [pytest.approx(before, abs=1e-3)]
    assert others["as initialised"] != others["pixels"] != others["random encoder"]
    assert {"as initialised, linear", "pixels, linear", "k-NN k20"} <= set(others)
    flags = ["--backbone", "pixels", "--image-size", "32", "--dataset", "photos", "--untrained"]
    flags += ["--validation-share", "0.1", "--output", tmp_path]
    assert "--snapshot-epochs 0" in only_error(run_script("eval/readout/run.py", *flags))
