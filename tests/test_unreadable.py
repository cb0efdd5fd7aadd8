"""Images that cannot be read leave features and labels alike, and are named and counted."""

import json

import numpy as np
import pytest
import torch
from conftest import run_ranks, run_script
from PIL import Image

from common.data.loaders import center_batches
from common.data.sets import load_dataset
from common.errors import UserError
from common.knn import knn_of_encoder
from common.run.readable import readable

GREY = {"dark": 30, "light": 220}


@pytest.fixture
def two_classes(tmp_path):
    """Writes two classes that pixels separate; both test images of "dark" are cut short, and one
    training image of "light".
    """
    rng = np.random.default_rng(0)
    root = tmp_path / "images"
    for split, count in (("train", 12), ("val", 2)):
        for name, grey in GREY.items():
            folder = root / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(-9, 10, (40, 40, 3)) + grey
                Image.fromarray(noise.astype(np.uint8)).save(folder / f"{number}.jpg")
    cut = [*(root / "val" / "dark").glob("*.jpg"), root / "train" / "light" / "3.jpg"]
    for path in cut:
        path.write_bytes(path.read_bytes()[:300])
    return root, cut


class Mean(torch.nn.Module):
    """A network whose features separate the classes: (mean, 1)."""

    embed_dim = 2

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(1))

    def forward(self, x):
        return torch.stack([x.mean((1, 2, 3)), torch.ones(len(x))], dim=1)


@pytest.mark.parametrize("workers", [0, 2])
def test_no_other_image_is_scored_in_its_place(two_classes, capsys, workers):
    root, cut = two_classes
    train, test = load_dataset("imagefolder", str(root))
    kept = [readable(i, w, workers) for i, w in ((train, "training"), (test, "test"))]
    assert [len(images) for images in kept] == [23, 2]
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    for path in cut:
        assert sum(str(path) in line and "is left out" in line for line in said) == 1
    classes = [train.classes[label] for label in kept[1].labels]
    assert classes == ["light", "light"]
    assert knn_of_encoder(Mean(), *kept, 32, k=5) == 1.0
    with pytest.raises(UserError, match=r"cannot be read"):
        [*center_batches(test, np.arange(len(test)), 32)]


def test_nothing_left_is_one_line(two_classes):
    root, _ = two_classes
    for path in (root / "val").glob("*/*.jpg"):
        path.write_bytes(b"")
    _, test = load_dataset("imagefolder", str(root))
    with pytest.raises(UserError, match="none of the 4 test images can be read"):
        readable(test, "test")


def test_a_whole_set_is_itself():
    images, _ = load_dataset("photos", "")
    assert readable(images, "training") is images


def flags_of(root):
    flags = ["--dataset", "imagefolder", "--data", root, "--on-bad-image", "skip"]
    return [*flags, "--image-size", "32", "--workers", "1"]


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_run_counts_them(two_classes, tmp_path, ranks):
    flags = ["--arch", "tiny", "--batch-size", "8", "--max-steps", "1", "--epochs", "1"]
    flags += ["--knn-every", "1", "--queue-size", "64", "--precision", "fp32"]
    flags += ["--output", tmp_path / "run"]
    run_ranks(ranks, "recipes/nnsiam.py", *flags_of(two_classes[0]), *flags)
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert results["unreadable"] == {"training": 1, "test": 2}


def test_an_evaluation_says_how_many_in_its_record(two_classes, tmp_path):
    flags = ["--backbone", "pixels", "--measure", "knn", "--protocol", "gsg"]
    flags += ["--output", tmp_path / "out"]
    done = run_script("eval/linear_probe/run.py", *flags_of(two_classes[0]), *flags)
    assert done.returncode == 0, done.stderr
    for path in two_classes[1]:
        assert done.stderr.count(str(path)) == 1
    found = json.loads((tmp_path / "out" / "record-knn.json").read_text())
    assert found["value"] == 100.0
    left = found["dataset"]["incomplete"]
    assert "1 unreadable training images left out, 2 unreadable test images left out" in left


def test_the_default_is_to_stop(two_classes, tmp_path):
    flags = ["--backbone", "pixels", "--measure", "knn", "--protocol", "gsg", "--on-bad-image"]
    flags += ["stop", "--output", tmp_path / "out"]
    done = run_script("eval/linear_probe/run.py", *flags_of(two_classes[0])[:4], *flags)
    assert done.returncode != 0 and "cannot be read" in done.stderr
    assert not (tmp_path / "out" / "record-knn.json").exists()
