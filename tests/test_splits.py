"""Balanced subsets and held-out shares of a training set, and what a run does with them."""

import dataclasses
import json

import numpy as np
import pytest
import yaml
from conftest import SMALL, only_error, run_script, small

from common.data.images import ArrayImages
from common.data.sets import load_dataset
from common.data.splits import parts
from common.errors import UserError
from results import record


def images(counts, labelled=True) -> ArrayImages:
    """Makes images whose only pixel value is their number, in an order that mixes the classes."""
    labels = np.random.default_rng(5).permutation(np.repeat(np.arange(len(counts)), counts))
    pixels = np.arange(len(labels), dtype=np.uint16)[:, None, None, None].repeat(3, axis=3)
    names = [f"class {n}" for n in range(len(counts))]
    return ArrayImages(pixels, labels if labelled else None, names, "numbers")


def numbers(of: ArrayImages) -> set[int]:
    return {int(n) for n in of.pixels[:, 0, 0, 0]}


@pytest.mark.parametrize("wanted", [3, 30, 57])
def test_a_subset_has_equally_many_of_each_class_and_keeps_their_labels(wanted):
    whole = images([19, 40, 23])
    small, test = parts(whole, whole, wanted, 0.0)
    assert len(small) == len(numbers(small)) == wanted and test is whole
    assert np.bincount(small.labels).tolist() == [wanted // 3] * 3
    assert all(whole.labels[p] == y for p, y in zip(small.pixels[:, 0, 0, 0], small.labels))  # noqa: B905
    again, _ = parts(images([19, 40, 23]), None, wanted, 0.0)
    assert numbers(again) == numbers(small)


@pytest.mark.parametrize(
    ("share", "held"), [(0.2, [2, 8, 4]), (0.5, [5, 20, 10]), (0.01, [1, 1, 1])]
)
def test_a_held_out_share_is_of_each_class_and_apart_from_what_is_trained_on(share, held):
    whole, test = images([10, 40, 20]), images([7, 7, 7])
    train, validation = parts(whole, test, 0, share)
    assert np.bincount(validation.labels).tolist() == held
    assert not numbers(train) & numbers(validation)
    assert numbers(train) | numbers(validation) == numbers(whole)


def test_a_subset_of_what_is_left_never_meets_what_is_held_out():
    train, validation = parts(images([50, 50]), None, 40, 0.2)
    assert len(train) == 40 and len(validation) == 20
    assert not numbers(train) & numbers(validation)


def test_without_labels_any_images_are_taken():
    assert len(parts(images([30, 30], labelled=False), None, 7, 0.0)[0]) == 7


@pytest.mark.parametrize(
    ("wanted", "share", "labelled", "says"),
    [
        (61, 0.0, True, "--train-images 61: there are 60"),
        (7, 0.0, True, "not the same number of each of 2 classes: take 6"),
        (1, 0.0, True, "take 2"),
        (40, 0.0, True, "class 0 has 10: take 20 or fewer"),
        (61, 0.0, False, "there are 60"),
        (0, 0.2, False, "--validation-share needs class folders"),
    ],
)
def test_what_cannot_be_drawn_is_said(wanted, share, labelled, says):
    with pytest.raises(UserError) as caught:
        parts(images([10, 50], labelled), None, wanted, share)
    assert says in str(caught.value)


def test_a_share_of_classes_of_one_image_is_refused():
    with pytest.raises(UserError, match="every class has one image"):
        parts(images([1, 1, 1]), None, 0, 0.5)


def test_nothing_asked_leaves_the_images_as_they_are():
    train, test = load_dataset("photos", "")
    assert all(a is b for a, b in zip(parts(train, test, 0, 0.0), (train, test), strict=True))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("held-out") / "run"
    flags = ["--validation-share", "0.2", "--train-images", "864", "--knn-every", "1"]
    done = run_script(
        "recipes/nnclr.py", *small("nnclr"), *flags, "--epochs", "1", "--output", str(folder)
    )
    assert done.returncode == 0, done.stderr
    assert "k-NN is scored on 1,080 held-out training images" in done.stdout
    return folder


def test_a_run_trains_on_the_subset_and_its_record_says_so(run):
    config = yaml.safe_load((run / "config.yaml").read_text())
    environment = json.loads((run / "environment.json").read_text())
    assert environment["steps"]["per_epoch"] == 864 // config["batch_size"]
    one = record.knn_record([run])
    assert one["pretraining"]["incomplete"] == "864 images of it, without 20 % held out"
    assert one["dataset"]["incomplete"] == (
        "20 % of the training images, held out, votes of 864 images"
    )


def test_a_record_keeps_what_the_monitors_said_after_each_epoch(run):
    (history,) = record.knn_record([run])["history"]
    results = json.loads((run / "results.json").read_text())
    assert history["epoch"] == [0, 1]
    assert history["knn"] == pytest.approx([results["knn_before"], results["knn"]], rel=1e-4)
    assert history["loss"][0] is None and history["loss"][1] > 0
    assert 0 <= history["neighbour_purity"][1] <= 1


def test_the_k_nn_of_a_run_is_that_of_the_held_out_images(run):
    """The exported encoder gives the same accuracy again, by the definition."""
    import torch

    from common.data.loaders import center_batches
    from common.fast.pixels import to_input
    from common.run import backbone

    train, validation = parts(*load_dataset("photos", ""), 864, 0.2)
    encoder = backbone.load_backbone(run / "backbone.safetensors")[0].eval()

    def features(of):
        with torch.no_grad():
            views = torch.cat([*center_batches(of, np.arange(len(of)), 32)])
            out = encoder(to_input(views, torch.device("cpu"), torch.float32)).double()
        return out / out.norm(dim=1, keepdim=True)

    bank, labels = features(train), torch.from_numpy(train.labels)
    cosines, nearest = (features(validation) @ bank.T).topk(200)
    votes = torch.zeros(len(validation), 18, dtype=torch.float64)
    votes.scatter_add_(1, labels[nearest], (cosines / 0.1).exp())
    expected = (votes.argmax(1) == torch.from_numpy(validation.labels)).double().mean()
    results = json.loads((run / "results.json").read_text())
    assert results["knn"] == pytest.approx(expected.item(), abs=2 / len(validation))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--train-images", "-1"], "--train-images -1: must not be negative"),
        (["--validation-share", "1"], "must be 0 or more and below 1"),
        (["--validation-share", "-0.1"], "must be 0 or more and below 1"),
        (["--train-images", "50"], "not the same number of each of 18 classes: take 36"),
    ],
)
def test_a_wrong_part_is_refused_in_one_line(flags, says, tmp_path):
    done = run_script("recipes/nnclr.py", *SMALL, *flags, "--output", str(tmp_path / "run"))
    assert done.returncode != 0
    assert says in only_error(done)


def test_a_run_from_before_these_flags_goes_on(tmp_path):
    from common.run.flags import changed_fields, config_hash
    from recipes import nnclr

    config = nnclr.Config(dataset="photos")
    before = dataclasses.asdict(config)
    del before["train_images"], before["validation_share"]
    assert changed_fields(config, before) == []
    assert config_hash(config) != config_hash(dataclasses.replace(config, train_images=90))


def test_draws_of_a_subset_have_no_image_in_common():
    whole = images([19, 40, 23])
    draws = [parts(whole, None, 18, 0.0, n)[0] for n in range(3)]
    assert [np.bincount(d.labels).tolist() for d in draws] == [[6, 6, 6]] * 3
    assert len(set().union(*map(numbers, draws))) == 3 * 18
    assert numbers(draws[0]) == numbers(parts(whole, None, 18, 0.0)[0])  # as before draws existed
    with pytest.raises(UserError, match="--subset-seed 3: only 3 draws"):
        parts(whole, None, 18, 0.0, 3)
    with pytest.raises(UserError, match="chooses the images of --train-images"):
        parts(whole, None, 0, 0.0, 1)


def test_held_out_images_may_be_kept_apart_and_the_test_images_scored():
    whole, test = images([50, 50]), images([7, 7])
    train, scored = parts(whole, test, 20, 0.2, 1, "test")
    _, held = parts(whole, test, 20, 0.2, 1)
    assert scored is test and len(held) == 20 and not numbers(train) & numbers(held)
