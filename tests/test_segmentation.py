"""Segmentation: data, scores against plain ones, and UPerNet on a miniature of ADE20K."""

import json
import re
import signal

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import interrupted, only_error, run_script
from dense_miniatures import HEIGHT, WIDTH, ade20k
from PIL import Image

from common.errors import UserError, command
from common.models import build_encoder
from common.run import metrics
from eval.segmentation import ade20k as scenes
from eval.segmentation import model, picture, run
from results.record import problems

SCRIPT = "eval/segmentation/run.py"
QUICK = ["--backbone", "random", "--arch", "resnet18", "--workers", "0"]
QUICK += ["--sizes", "48,64", "--test-sizes", "64", "--iterations", "11"]


@pytest.fixture(scope="module")
def miniature(tmp_path_factory):
    return ade20k(tmp_path_factory.mktemp("segmentation"))


def run_in_process(*arguments):
    return command(lambda: run.main([str(a) for a in arguments]))


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


# -- data -----------------------------------------------------------------------------------------


def test_sizes_are_ssl_transfers():
    """The shorter side is as asked, the longer one at most 1000, cut to whole pixels."""
    assert scenes.resized(683, 512, 300, 1000) == (400, 300)
    assert scenes.resized(512, 683, 600, 1000) == (600, 800)
    assert scenes.resized(2000, 500, 600, 1000) == (1000, 250)
    assert [scenes.up_to_multiple(n, 32) for n in (1, 32, 33, 400)] == [32, 32, 64, 416]


def test_a_batch_is_padded_and_every_fourth_label_stays(miniature):
    train = scenes.load(str(miniature), "training")
    batches = scenes.TrainingBatches(train, 2, [72], 1000, 0, slice(0, 2))
    flips = set()
    for step in range(6):
        x, y = batches[step]
        assert x.shape == (2, 3, 96, 96) and y.shape == (2, 24, 24)
        assert (x[:, :, 72:] == 0).all() and (y[:, 18:] == scenes.IGNORED).all()
        assert set(y[:, :18].unique().tolist()) == {-1, 0, 12, 149}
        # labels are at the same places as their colours
        red = F.avg_pool2d(x[:, 0] - x[:, 2], 4)
        assert red[y == 12].min() > red[y == 149].max()
        flips.add(bool((y[0, :18, 0] == -1).all()))  # the unlabelled column, or the right edge
    assert flips == {True, False}
    again = batches[3]
    assert all(torch.equal(a, b) for a, b in zip(again, batches[3], strict=True))
    halves = [scenes.TrainingBatches(train, 2, [72], 1000, 0, slice(i, i + 1))[3] for i in range(2)]
    assert torch.equal(torch.cat([h[1] for h in halves]), again[1])


def test_an_epoch_takes_every_image_once(miniature, monkeypatch):
    train = scenes.load(str(miniature), "training")
    taken = []
    load = train.load
    monkeypatch.setattr(train, "load", lambda number: taken.append(number) or load(number))
    batches = scenes.TrainingBatches(train, 2, [32, 64], 1000, 0, slice(0, 2))
    for step in range(6):
        batches.build(step)
    assert sorted(taken[:6]) == sorted(taken[6:]) == [*range(6)] and taken[:6] != taken[6:]


def test_test_images_have_every_size_and_whole_labels(miniature):
    part = scenes.load(str(miniature), "validation")
    views, labels = scenes.TestScenes(part, [0, 1, 2], [48, 96], 1000)[1]
    assert [tuple(v.shape) for v in views] == [(1, 3, 64, 64), (1, 3, 96, 128)]
    assert labels.shape == (HEIGHT, WIDTH) and set(labels.unique().tolist()) == {-1, 0, 12, 149}


def test_what_is_no_pair_is_counted(tmp_path, capsys):
    folder = ade20k(tmp_path, 2, 1)
    for name in ("images/training/ADE_1.JPG", "images/training/ADE_2.png"):
        (folder / name).write_bytes(b"")
    (folder / "annotations" / "training" / "ADE_3.png").write_bytes(b"")
    assert len(scenes.load(str(tmp_path), "training")) == 2
    images, labels = capsys.readouterr().out.splitlines()
    assert f"{folder}/images/training: left out are 2 files (as 'ADE_1.JPG')" in images
    assert f"{folder}/annotations/training: left out are 1 files (as 'ADE_3.png')" in labels


def test_pairs_that_do_not_fit_are_named_before_training(tmp_path, capsys):
    folder = ade20k(tmp_path, 3, 1)
    first, second, _ = sorted((folder / "annotations" / "training").glob("*.png"))
    Image.new("L", (WIDTH, HEIGHT + 1)).save(first)
    Image.new("RGB", (WIDTH, HEIGHT)).save(second)
    assert run_in_process(*QUICK, "--data", tmp_path, "--output", tmp_path / "run") == 2
    printed = capsys.readouterr().err
    assert f"2 of 3 pairs of ADE20K are not image and labels, the first: {first} is L" in printed
    part = scenes.load(str(tmp_path), "training", WIDTH * HEIGHT - 1)
    with pytest.raises(UserError, match="more than --max-pixels"):
        part.check()


def test_a_label_beyond_the_classes_is_named(tmp_path):
    folder = ade20k(tmp_path, 1, 1)
    (path,) = (folder / "annotations" / "training").glob("*.png")
    Image.new("L", (WIDTH, HEIGHT), 151).save(path)
    with pytest.raises(UserError, match=f"{path} has label 151: ADE20K's are 0 to 150"):
        scenes.load(str(tmp_path), "training").load(0)


# -- scores ---------------------------------------------------------------------------------------


def plain_scores(truth, prediction, classes):
    """Computes intersection over union and accuracies by sets of pixels, class by class."""
    counted = truth >= 0
    truth, prediction = truth[counted], prediction[counted]
    overlaps, accuracies = [], []
    for c in range(classes):
        both = np.sum((truth == c) & (prediction == c))
        either = np.sum((truth == c) | (prediction == c))
        if either:
            overlaps.append(both / either)
        if np.any(truth == c):
            accuracies.append(both / np.sum(truth == c))
    return {
        "mIoU": 100 * np.mean(overlaps),
        "mean accuracy": 100 * np.mean(accuracies),
        "pixel accuracy": 100 * np.mean(truth == prediction),
    }


def test_scores_are_those_of_the_definition():
    rng = np.random.default_rng(0)
    confusion, maps = scenes.Confusion(9, torch.device("cpu")), []
    for shape in ((5, 7), (8, 3)):
        truth = rng.integers(-1, 7, shape)  # two classes never occur, one only as prediction
        prediction = np.where(rng.random(shape) < 0.5, truth.clip(0), rng.integers(0, 8, shape))
        confusion.add(torch.from_numpy(truth), torch.from_numpy(prediction))
        maps.append((truth.ravel(), prediction.ravel()))
    whole = [np.concatenate(column) for column in zip(*maps, strict=True)]
    assert confusion.scores() == pytest.approx(plain_scores(*whole, 9))


def test_loss_counts_labelled_pixels_only():
    scores, labels = torch.randn(1, 4, 2, 3), torch.tensor([[[0, -1, 3], [-1, -1, 2]]])
    log = scores.double().log_softmax(1)
    expected = -(log[0, 0, 0, 0] + log[0, 3, 0, 2] + log[0, 2, 1, 2]) / 3
    assert run.cross_entropy(scores, labels).item() == pytest.approx(expected.item(), rel=1e-6)
    assert run.cross_entropy(scores, torch.full_like(labels, -1)).item() == 0


# -- model ----------------------------------------------------------------------------------------


def test_upernet_on_a_backbone():
    net = model.build("resnet18", 150, True, 0)
    encoder = build_encoder("resnet18")
    net.net.encoder.load_state_dict(encoder.state_dict())
    x = torch.randn(2, 3, 64, 64)
    assert torch.allclose(model.features_of(net.eval(), x), encoder.eval()(x), atol=1e-5)
    scores, side = net.train()(torch.randn(2, 3, 64, 96))
    assert scores.shape == side.shape == (2, 150, 16, 24)
    assert net.eval()(torch.randn(1, 3, 64, 64))[1] is None
    # the head on layer3 teaches no layer after it
    net.train()
    net(torch.randn(2, 3, 64, 64))[1].square().mean().backward()
    with_gradient = {n.split(".")[2] for n, p in net.named_parameters() if p.grad is not None}
    assert "layer3" in with_gradient and "layer4" not in with_gradient


def test_norms_and_biases_do_not_decay():
    net = model.build("resnet18", 150, True, 0)
    decayed, others = model.parameter_groups(net, 1e-4)
    assert decayed["weight_decay"] == 1e-4 and "weight_decay" not in others
    assert all(p.ndim == 4 for p in decayed["params"])
    assert all(p.ndim == 1 for p in others["params"])
    both = {id(p) for p in [*decayed["params"], *others["params"]]}
    assert both == {id(p) for p in net.parameters()}


def test_the_rate_falls_as_the_paper_says():
    job = run.Segmentation.__new__(run.Segmentation)
    job.config = run.SegmentationConfig()
    assert job.learning_rate(0) == 0.02
    assert job.learning_rate(75_000) == pytest.approx(0.02 * 0.5**0.9)
    assert job.learning_rate(149_999) == pytest.approx(0.02 * (500 / 150_000) ** 0.9)
    assert job.learning_rate(999) == job.learning_rate(500) < job.learning_rate(499) == 0.02
    job.config = run.SegmentationConfig(decay_every=1)  # as ssl-transfer
    assert job.learning_rate(149_999) == pytest.approx(0.02 * (1 / 150_000) ** 0.9)


# -- the whole of it ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(miniature, tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "run"
    flags = [*QUICK, "--data", str(miniature), "--output", str(folder)]
    done = run_script(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr
    return folder, record_of(folder)


@pytest.mark.long
def test_it_learns_more_than_the_constant_answer(finished, miniature):
    folder, record = finished
    assert problems(record) == [] and record["metric"] == "mIoU"
    assert record["value"] == record["others"]["mIoU"]
    part = scenes.load(str(miniature), "validation")
    truth = np.concatenate([np.array(part.load(i)[1]).ravel() for i in range(3)]).astype(int) - 1
    commonest = np.bincount(truth[truth >= 0]).argmax()
    constant = plain_scores(truth, np.full_like(truth, commonest), 150)
    assert record["value"] > constant["mIoU"] + 5
    assert record["others"]["mean accuracy"] > constant["mean accuracy"]
    assert record["protocol"] == "UPerNet 150k, changed"
    assert "6 of 20210 training images" in record["dataset"]["incomplete"]
    steps = metrics.read(folder / "metrics.jsonl")
    assert {"loss_pixels", "loss_layer3", "lr"} <= set(steps[0])
    with Image.open(folder / run.PICTURE) as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    colours = picture.palette(150)
    for label in (0, 1, 13, 150):
        assert (np.abs(pixels.astype(int) - colours[label]).max(1) <= 2).sum() > 50, label


@pytest.mark.long
def test_stopped_it_continues_to_the_same_numbers(finished, miniature, tmp_path):
    folder = tmp_path / "run"
    flags = [*QUICK, "--data", str(miniature), "--output", str(folder)]
    log = folder / "metrics.jsonl"
    code, output = interrupted(
        SCRIPT, flags, lambda: log.exists() and metrics.read(log), signal.SIGUSR1
    )
    assert code == 75, output
    step = torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["step"]
    assert 0 < step < 11
    assert "lr was 0.02, is 0.1" in only_error(run_script(SCRIPT, *flags, "--lr", "0.1"))
    done = run_script(SCRIPT, *flags)
    assert done.returncode == 0, done.stderr
    whole = metrics.read(finished[0] / "metrics.jsonl")
    assert [r["loss"] for r in metrics.read(log)] == [r["loss"] for r in whole]
    assert record_of(folder)["others"] == finished[1]["others"]


@pytest.mark.long
def test_protocol_of_the_paper_is_called_so(finished, miniature, tmp_path):
    """Without a changed setting the record has the name of published.yaml."""
    job = run.Segmentation.__new__(run.Segmentation)
    job.config = run.SegmentationConfig()
    written = []
    job.write_record = lambda protocol, *_, **__: written.append(protocol)
    job.rank = 1
    job.write(finished[1]["others"])
    job.config = run.SegmentationConfig(decay_every=1)  # its code's value
    job.write(finished[1]["others"])
    for other in ({"deep_supervision": 0.0}, {"decay_every": 2}):
        job.config = run.SegmentationConfig(**other)
        job.write(finished[1]["others"])
    assert written == ["UPerNet 150k"] * 2 + ["UPerNet 150k, changed"] * 2


@pytest.mark.parametrize(
    ("more", "error"),
    [
        (["--arch", "vit_small"], "vit_small has no pyramid of feature maps"),
        (["--backbone", "pixels", "--arch", ""], "raw pixels have no pyramid"),
        (["--data", "/nowhere"], "--data /nowhere: give ADEChallengeData2016 with images/"),
        (["--data", ""], "--data is missing"),
        (["--batch-size", "64"], "--batch-size 64 is the batch over all 1 ranks"),
        (["--sizes", "30.5"], "--sizes 30.5: give whole numbers above 0"),
        (["--decay-every", "0"], "--decay-every 0: must be above 0"),
        (["--iterations", "0"], "--iterations 0: must be above 0"),
        (["--lr", "1e30"], "lower the learning rate"),
    ],
)
def test_mistakes(miniature, tmp_path, capsys, more, error):
    flags = [*QUICK, "--data", miniature, "--output", tmp_path / "run", *more]
    assert run_in_process(*flags) == 2
    lines = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(lines) == 1 and re.search(error, lines[0]), lines
    assert not (tmp_path / "run" / "record.json").exists()


def test_labels_that_are_missing_or_do_not_fit(tmp_path, capsys):
    folder = ade20k(tmp_path, 2, 1)
    path = folder / "annotations" / "training" / "ADE_train_00003000.png"
    Image.new("L", (5, 5)).save(path)
    flags = [*QUICK, "--data", tmp_path, "--output", tmp_path / "run"]
    assert run_in_process(*flags) == 2
    assert re.search(rf"{path} is L \(5, 5\)", capsys.readouterr().err)
    path.unlink()
    with pytest.raises(UserError, match=f"{path} is missing"):
        scenes.load(str(tmp_path), "training")
