"""Linear probe: the heads against separate trainings and plain loops, controls, ranks, resume."""

import dataclasses
import json
import math
import shutil
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import run_ranks, run_script, start_ranks
from paper_views import crop_view

from common.augment import view_rng
from common.data import photos
from common.data.images import subset
from common.data.loaders import RankBatches
from common.data.sets import load_dataset
from common.errors import UserError, command
from common.fast.center import center_view
from common.knn import knn_accuracy
from eval.encoders import load_encoder
from eval.evaluation import correct_in_top, held_out, linear_weights, parse_numbers
from eval.linear_probe import run as script
from eval.linear_probe.heads import Heads, HeadsSGD, losses
from eval.linear_probe.protocols import GRID, PROTOCOLS, schedule
from eval.linear_probe.run import assert_unchanged, best, stored_batches
from recipes import nnclr
from results.record import problems

SCRIPT = "eval/linear_probe/run.py"
FLAGS = ["--dataset", "photos", "--workers", "0"]
RANDOM = ["--backbone", "random", "--arch", "tiny", "--image-size", "32"]
RUN_FLAGS = ["--dataset", "photos", "--knn-every", "0", "--workers", "0", "--max-steps"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Trains a short run of NNCLR on photos."""
    return trained(tmp_path_factory.mktemp("runs") / "run", 60)


@pytest.fixture(scope="module")
def shortest(tmp_path_factory):
    """Trains a run of two steps, of which only its files matter."""
    return trained(tmp_path_factory.mktemp("runs") / "run", 2)


def trained(folder, steps):
    done = run_script("recipes/nnclr.py", *RUN_FLAGS, steps, "--output", folder)
    assert done.returncode == 0, done.stderr
    return folder


def record_of(folder, name="record.json"):
    return json.loads((folder / name).read_text())


def probe(folder, *flags):
    """Returns the record of a probe in this very process."""
    assert in_process([*FLAGS, *flags, "--output", folder]) == 0
    return record_of(folder)


def in_process(flags):
    return command(lambda: script.main([str(flag) for flag in flags]))


# -- heads ----------------------------------------------------------------------------------------


def batches(steps=6, rows=20, dim=7, classes=4):
    torch.manual_seed(0)
    return [
        (torch.randn(rows, dim, dtype=torch.float64), torch.randint(classes, (rows,)))
        for _ in range(steps)
    ]


def plain_training(data, weight, lr, momentum, decay, nesterov, larc):
    """Trains one classifier in nested lists of floats, with gradients of cross-entropy by hand."""
    W, b = weight.tolist(), [0.0] * len(weight)
    classes, dim = len(W), len(W[0])
    vW, vb = [[0.0] * dim for _ in W], [0.0] * classes
    for x, y in data:
        gW, gb = [[0.0] * dim for _ in W], [0.0] * classes
        for row, label in zip(x.tolist(), y.tolist(), strict=True):
            z = [sum(w * v for w, v in zip(W[c], row, strict=True)) + b[c] for c in range(classes)]
            total = sum(math.exp(v) for v in z)
            for c in range(classes):
                error = (math.exp(z[c]) / total - (c == label)) / len(x)
                gb[c] += error
                for d in range(dim):
                    gW[c][d] += error * row[d]
        flat_w, flat_g = [v for r in W for v in r], [v for r in gW for v in r]
        uW, ub = larc_update(flat_w, flat_g, decay, larc), larc_update(b, gb, decay, larc)
        for c in range(classes):
            for d in range(dim):
                u = uW[c * dim + d]
                vW[c][d] = momentum * vW[c][d] + u
                W[c][d] -= lr * (u + momentum * vW[c][d] if nesterov else vW[c][d])
            vb[c] = momentum * vb[c] + ub[c]
            b[c] -= lr * (ub[c] + momentum * vb[c] if nesterov else vb[c])
    return torch.tensor(W, dtype=torch.float64), torch.tensor(b, dtype=torch.float64)


def larc_update(w, g, decay, larc):
    """Follows You et al. 2017, as apex without clipping: trust |w| / (|g| + decay |w| + 1e-8)."""
    if not larc:
        return [gi + decay * wi for wi, gi in zip(w, g, strict=True)]
    size, slope = math.sqrt(sum(v * v for v in w)), math.sqrt(sum(v * v for v in g))
    if size == 0 or slope == 0:
        return g
    rate = 0.001 * size / (slope + decay * size + 1e-8)
    return [rate * (gi + decay * wi) for wi, gi in zip(w, g, strict=True)]


def train(lrs, data, weight, **how):
    heads = Heads(len(lrs), weight)
    optimizer = HeadsSGD(heads, **how)
    for x, y in data:
        optimizer.zero_grad()
        losses(heads(x), y).sum().backward()
        optimizer.step(torch.tensor(lrs, dtype=torch.float64))
    return heads


HOW = {
    "sgd": {},
    "sgd with decay": {"weight_decay": 0.01},
    "nesterov": {"nesterov": True},
    "larc": {"larc": True},
    "larc with decay": {"larc": True, "weight_decay": 0.01},
}


@pytest.mark.parametrize("case", HOW)
def test_heads_together_equal_separate_trainings_and_a_plain_loop(case):
    lrs = [0.01, 0.3, 30.0] if "larc" in case else [0.001, 0.1, 2.0]
    data, weight = batches(), 0.1 * torch.randn(4, 7, dtype=torch.float64)
    together = train(lrs, data, weight, **HOW[case])
    for place, lr in enumerate(lrs):
        alone = train([lr], data, weight, **HOW[case])
        torch.testing.assert_close(together.weight[place], alone.weight[0], rtol=0, atol=1e-6)
        torch.testing.assert_close(together.bias[place], alone.bias[0], rtol=0, atol=1e-6)
        how = {"momentum": 0.9, "decay": 0.0, "nesterov": False, "larc": False}
        how |= {"decay" if n == "weight_decay" else n: v for n, v in HOW[case].items()}
        expected, bias = plain_training(data, weight, lr, **how)
        torch.testing.assert_close(together.weight[place], expected, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(together.bias[place], bias, rtol=1e-9, atol=1e-9)
    assert (together.weight[0] - together.weight[2]).abs().max() > 1e-3


@pytest.mark.parametrize("nesterov", [False, True])
def test_plain_heads_are_torch_sgd(nesterov):
    data, weight = batches(), 0.1 * torch.randn(4, 7, dtype=torch.float64)
    ours = train([0.2], data, weight, nesterov=nesterov)
    layer = torch.nn.Linear(7, 4).double()
    layer.weight.data, layer.bias.data = weight.clone(), torch.zeros(4, dtype=torch.float64)
    sgd = torch.optim.SGD(layer.parameters(), 0.2, momentum=0.9, nesterov=nesterov)
    for x, y in data:
        sgd.zero_grad()
        F.cross_entropy(layer(x), y).backward()
        sgd.step()
    torch.testing.assert_close(ours.weight[0], layer.weight, rtol=0, atol=1e-12)
    torch.testing.assert_close(ours.bias[0], layer.bias, rtol=0, atol=1e-12)


def test_a_head_that_diverges_leaves_the_others_alone():
    data, weight = batches(), 0.1 * torch.randn(4, 7, dtype=torch.float64)
    data = [(1e4 * x, y) for x, y in data]
    together = train([1e-9, 1e308], data, weight)
    assert not torch.isfinite(together.weight[1]).all()
    torch.testing.assert_close(together.weight[0], train([1e-9], data, weight).weight[0])
    assert best([50.0, 99.0, 50.0], [1.0, math.inf, 0.5]) == 0
    with pytest.raises(UserError, match="every head diverged"):
        best([1.0], [math.nan])


def test_learning_rates_follow_the_papers():
    """The cosine goes by epoch (moco-v3, simsiam) and by step (BYOL's code)."""
    for step in range(12):
        epoch = step // 3
        assert schedule("epoch", step, 3, 4) == (1 + math.cos(math.pi * epoch / 4)) / 2
        assert schedule("step", step, 3, 4) == (1 + math.cos(math.pi * step / 12)) / 2
    assert PROTOCOLS["snclr"].rates("vit_small_mocov3") == (3.0,)
    assert PROTOCOLS["snclr"].rates("resnet50") == (0.1,)
    assert sorted(PROTOCOLS["nnclr"].lrs) == [0.05, 0.1, 0.2, 0.3, 0.4]
    assert PROTOCOLS["nnclr"].assumed and not PROTOCOLS["byol"].assumed
    simclr = PROTOCOLS["simclr"]  # App. B.6: 1.6 at batch 4096
    assert (simclr.optimizer, simclr.lrs, simclr.batch, simclr.epochs) == (
        "nesterov",
        (0.1,),
        4096,
        90,
    )
    assert (simclr.schedule, simclr.weight_decay, simclr.assumed) == ("step", 0.0, False)
    fnc, code = PROTOCOLS["fnc"], PROTOCOLS["fnc-code"]
    assert fnc.assumed and replace(fnc, assumed=False) == simclr
    assert code.lrs[0] * code.batch / 256 == pytest.approx(0.005 * math.sqrt(1024))
    assert (code.batch, code.view(224).scale, code.assumed) == (1024, (0.2, 1.0), False)
    assert replace(code, lrs=simclr.lrs, batch=simclr.batch, crop_min=0.08) == simclr
    twist, own = PROTOCOLS["twist"], PROTOCOLS["twist-code"]
    assert twist.assumed and (twist.lrs, twist.batch, twist.init) == ((0.1,), 4096, "zeros")
    assert own.lrs[0] * own.batch / 256 == 0.2 and (own.epochs, own.weight_decay) == (100, 0.0)
    assert len(GRID) == 10 and 1.0 in GRID
    for name, lr, crop_min in (
        ("vicreg", 0.02, 0.2),
        ("vicreg-code", 0.02, 0.08),
        ("barlow", 0.3, 0.08),
        ("swav", 0.3, 0.08),
    ):
        protocol = PROTOCOLS[name]
        assert (protocol.optimizer, protocol.lrs) == ("sgd", (lr,))
        assert protocol.view(224).scale == (crop_min, 1.0)
        assert (protocol.batch, protocol.epochs, protocol.weight_decay) == (256, 100, 1e-6)
        assert (protocol.schedule, protocol.view(224).interpolation) == ("epoch", "bilinear")
    others = ("vicreg", "fnc-code")
    assert all(p.view(32).scale == (0.08, 1.0) for n, p in PROTOCOLS.items() if n not in others)


def test_the_triplets_warm_up_multiplies_its_cosine():
    """As in mmcv, a line per step over 10 epochs, from 1e-4, multiplies the epoch's rate."""
    for name, lr in (("triplet", 0.04), ("triplet-short", 0.15)):
        protocol = PROTOCOLS[name]
        assert (protocol.optimizer, protocol.lrs, protocol.batch) == ("sgd", (lr,), 256)
        assert (protocol.epochs, protocol.weight_decay, protocol.warmup_epochs) == (100, 0.0, 10)
        assert (protocol.schedule, protocol.assumed) == ("epoch", False)
    for step in (0, 1, 29, 30, 31, 299):
        epoch = step // 3
        expected = (1 + math.cos(math.pi * epoch / 100)) / 2
        if epoch < 10:
            expected *= 1 - (1 - step / 30) * (1 - 1e-4)
        assert schedule("epoch", step, 3, 100, 10) == pytest.approx(expected, rel=1e-12)
    assert schedule("epoch", 0, 3, 100, 10) == pytest.approx(1e-4)


def test_first_weights():
    normal = linear_weights(1000, 200, "normal 0.01", 3)
    assert normal.std() == pytest.approx(0.01, rel=0.02)
    assert torch.equal(normal, linear_weights(1000, 200, "normal 0.01", 3))
    haiku = linear_weights(1000, 200, "haiku", 3)  # cut off at 2: 0.8796 of the deviation is left
    assert haiku.std() == pytest.approx(0.8796 / math.sqrt(200), rel=0.02)
    assert haiku.abs().max() <= 2 / math.sqrt(200)
    zeros = linear_weights(10, 20, PROTOCOLS["simclr"].init, 3)
    assert zeros.shape == (10, 20) and not zeros.any()
    uniform = linear_weights(1000, 200, "torch", 3)
    layer = torch.nn.Linear(200, 1000)
    assert uniform.std() == pytest.approx(layer.weight.std().item(), rel=0.02)


# -- accuracies, splits ---------------------------------------------------------------------------


def test_top_k_is_a_plain_count():
    torch.manual_seed(0)
    scores, labels = torch.randn(50, 3, 9), torch.randint(9, (50,))
    for head in range(3):
        for place, k in enumerate((1, 5)):
            right = 0
            for i in range(50):
                order = sorted(range(9), key=lambda c: -scores[i, head, c].item())
                right += labels[i].item() in order[:k]
            assert correct_in_top(scores, labels)[head, place] == right


def test_top_5_of_fewer_classes_than_5():
    scores, labels = torch.tensor([[0.0, 1.0, 2.0], [2.0, 1.0, 0.0]]), torch.tensor([2, 2])
    assert correct_in_top(scores, labels).tolist() == [1, 2]


def test_a_constant_or_broken_head_is_not_right():
    assert correct_in_top(torch.zeros(4, 9), torch.arange(4)).tolist() == [0, 0]
    assert correct_in_top(torch.full((4, 9), math.nan), torch.arange(4)).tolist() == [0, 0]


def test_held_out_images():
    labels = np.repeat(np.arange(20), 1300)
    kept, held, words = held_out(labels, True, 0)
    assert np.bincount(labels[held]).tolist() == [10] * 20 and "10" in words
    assert sorted([*kept, *held]) == [*range(26000)]
    kept, held, _ = held_out(labels, False, 0)
    assert np.bincount(labels[held]).tolist() == [130] * 20  # 10 %
    assert not np.array_equal(held, held_out(labels, False, 1)[1])
    assert np.array_equal(held, held_out(labels, False, 0)[1])
    labels = np.repeat(np.arange(4), 1000)
    assert len(held_out(labels, False, 0)[1]) == 1000  # at least 1 000 if there are twice as many
    assert len(held_out(labels[::10], False, 0)[1]) == 40  # else 10 %


def test_crops_change_nothing_but_place_and_side():
    """A crop and a flip are all: every channel keeps its own values, no colour, no grey."""
    images, _ = load_dataset("photos", "")
    view = crop_view(32)
    picture = images.load(0)
    for sample in range(40):
        draw = view.draw(view_rng(0, 0, sample, 0), 32, 32)
        assert draw.colour_order is None and not draw.grey
        assert draw.blur is None and not draw.solarize
        left, top, width, height = draw.box
        assert width * height > 0.07 * 1024
        pixels = view.apply(picture, draw).numpy()
        expected = picture.crop((left, top, left + width, top + height)).resize((32, 32), 2)
        expected = np.asarray(expected).transpose(2, 0, 1)
        assert np.array_equal(pixels, expected[:, :, ::-1] if draw.flip else expected)


@pytest.mark.parametrize("square", [False, True])
def test_evaluation_views_are_torchvisions(square):
    """They are Resize(256) and CenterCrop(224), and GSG's Resize([256, 256]), on a wide image."""
    from torchvision import transforms

    picture = photos.read_photo("rocket")
    assert picture.width > 1.2 * picture.height
    for interpolation in ("bilinear", "bicubic"):
        mode = transforms.InterpolationMode(interpolation)
        resize = transforms.Resize([256, 256] if square else 256, mode)
        expected = transforms.CenterCrop(224)(resize(picture))
        view = center_view(picture, 224, interpolation, square)
        assert np.array_equal(view.numpy(), np.asarray(expected).transpose(2, 0, 1))


def test_stored_batches_are_those_of_the_loader():
    samples = np.array([3, 5, 8, 13, 21, 34, 55, 70])
    features = torch.arange(100.0)[:, None]
    labels = torch.arange(100) % 7
    images = subset(load_dataset("photos", "")[0], samples)
    order = [[s for _, s in b] for b in RankBatches(len(images), 3, 4, 1, 5, 0, 1)]
    got = [*stored_batches(features, labels, samples, 4, 1, 5, 3)]
    assert [x[:, 0].tolist() for x, _ in got] == [samples[o].tolist() for o in order]
    assert [y.tolist() for _, y in got] == [(samples[o] % 7).tolist() for o in order]


def test_numbers_of_flags():
    assert parse_numbers("0.1,3,1e-3", "--lrs") == [0.1, 3.0, 0.001]
    for text in ("", "a,b", "0.1;3", "-1", "nan", "inf"):
        with pytest.raises(UserError, match="--lrs"):
            parse_numbers(text, "--lrs")


# -- the frozen encoder ---------------------------------------------------------------------------


def test_a_changed_encoder_is_noticed():
    encoder, _ = load_encoder("random", "tiny", 32)
    before = {n: t.clone() for n, t in encoder.state_dict().items()}
    assert_unchanged(encoder, before)
    encoder.train()(torch.randn(4, 3, 32, 32))  # only batch-norm statistics move
    with pytest.raises(AssertionError, match="running_mean"):
        assert_unchanged(encoder, before)


# -- end to end -----------------------------------------------------------------------------------


@pytest.mark.long
def test_trained_beats_random_and_both_have_whole_records(run, tmp_path):
    """On stored features a trained encoder beats a random one, pixels, and chance."""
    flags = ["--protocol", "snclr", "--lrs", "0.03,0.3,3", "--cache-features", "--epochs", "30"]
    trained = probe(tmp_path / "trained", "--backbone", run, *flags, "--lrs", "grid")
    random = probe(tmp_path / "random", *RANDOM, *flags)
    pixels = probe(tmp_path / "pixels", "--backbone", "pixels", "--image-size", "32", *flags)
    values = [r["value"] for r in (trained, random, pixels)]
    assert values[0] > values[1] + 5 and values[0] > values[2] + 5, values
    assert min(values) > 2 * 100 / 18, values
    # SNCLR states its protocol for ImageNet, not for these images
    assert trained["assumed"] and trained["hyperparameters"]["protocol"] == "snclr"
    for found, name in ((trained, "trained"), (random, "random"), (pixels, "pixels")):
        assert problems(found) == [] or found["commit"] == "unknown"
        knn = record_of(tmp_path / name, "record-knn.json")
        assert problems(knn) == [] or knn["commit"] == "unknown"
        assert set(knn["others"]) == {"k10", "k20", "k100", "k200"}
        assert knn["protocol"] == "kNN (k200,t.1)" and knn["value"] == knn["others"]["k200"]
        assert found["others"]["top5"][0] >= found["value"]
        what = found["hyperparameters"]
        assert len(what["tried"]["lr"]) == (10 if name == "trained" else 3)
        held = found["others"]["held-out top1 of each lr"]
        assert held[what["tried"]["lr"].index(what["lr"])] == max(held)
    assert trained["recipe"] == "nnclr" and trained["protocol"] == "linear (stored features)"
    assert random["recipe"] is None and random["arch"] == "tiny" and random["hours"] is None
    # k-NN against the function itself
    encoder, facts = load_encoder(run)
    assert trained["backbone_sha256"] == [facts["sha256"]]
    knn = record_of(tmp_path / "trained", "record-knn.json")
    expected = knn_by_hand(encoder)
    assert knn["value"] == pytest.approx(100 * expected, abs=1e-3)


def knn_by_hand(encoder):
    x = {}
    for split in ("train", "test"):
        pixels, labels = photos.patches(split)
        inputs = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy()).float() / 255
        mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
        std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
        with torch.no_grad():
            x[split] = encoder((inputs - mean) / std), torch.from_numpy(labels)
    return knn_accuracy(*x["train"], *x["test"], k=200, temperature=0.1)


@pytest.mark.long
def test_assumed_protocol_of_a_run_by_crops(run, tmp_path, capsys):
    """With no flag but the run it is NNCLR's, which is BYOL's, on random crops, with 2 seeds."""
    flags = ["--backbone", run, "--measure", "linear", "--seeds", "2"]
    found = probe(tmp_path / "a", *flags, "--epochs", "2")
    what = found["hyperparameters"]
    assert found["assumed"] is True and what["protocol"] == "nnclr"
    assert found["protocol"] == "linear" and what["training_views"] == "crop, flip"
    assert sorted(what["tried"]["lr"]) == [0.05, 0.1, 0.2, 0.3, 0.4]
    assert found["seeds"] == [0, 1] and found["seeds_of"] == "evaluation"
    assert len(found["values"]) == 2 and found["spread"] is not None
    assert problems(found) == [] or found["commit"] == "unknown"
    assert not (tmp_path / "a" / "checkpoint.pt").exists()
    capsys.readouterr()
    assert probe(tmp_path / "a", *flags, "--epochs", "2") == found  # has finished: says it again
    assert f"{found['value']:.2f}" in capsys.readouterr().out
    assert in_process([*FLAGS, *flags, "--epochs", "3", "--output", tmp_path / "a"]) == 2
    assert "epochs was 2, is 3" in capsys.readouterr().err


def test_the_first_features_alone_are_a_smaller_encoder():
    encoder, _ = load_encoder("random", "tiny", 32)
    first, images = script.FirstFeatures(encoder, 11).eval(), torch.randn(5, 3, 32, 32)
    assert first.embed_dim == 11
    assert torch.equal(first(images), encoder.eval()(images)[:, :11])
    with pytest.raises(UserError, match="--first-features 65: the encoder has 64"):
        script.FirstFeatures(encoder, 65)


@pytest.mark.long
@pytest.mark.parametrize("cached", [["--cache-features"], []])
def test_probe_and_k_nn_of_the_first_features(cached, shortest, tmp_path):
    """Both are those of an encoder without other features; both records name the setting."""
    flags = ["--protocol", "simclr", "--lrs", "0.3", "--epochs", "1", *cached]
    found = probe(tmp_path / "a", "--backbone", shortest, *flags, "--first-features", "11")
    whole = probe(tmp_path / "b", "--backbone", shortest, *flags)
    assert found["settings"] == whole["settings"] | {"first_features": 11}
    assert found["value"] != whole["value"]
    assert problems(found) == [] or found["commit"] == "unknown"
    knn = record_of(tmp_path / "a", "record-knn.json")
    assert knn["settings"] == found["settings"]
    encoder, _ = load_encoder(shortest)
    expected = knn_by_hand(lambda images: encoder(images)[:, :11])
    assert knn["value"] == pytest.approx(100 * expected, abs=1e-3)


@pytest.mark.long
def test_without_an_output_it_lies_in_the_run(shortest):
    flags = ["--backbone", shortest, "--epochs", "1", "--lrs", "0.1", "--protocol", "gsg"]
    done = run_script(SCRIPT, "--workers", "0", *flags, "--knn-transform", "gsg")
    assert done.returncode == 0, done.stderr
    folder = shortest / "eval" / "linear_probe-gsg-photos"
    found = record_of(folder)
    assert found["hyperparameters"]["chosen_on"] is None  # nothing to choose
    assert found["hyperparameters"]["optimizer"] == "larc"
    assert found["command"][1].startswith("eval/linear_probe/run.py --workers 0 --backbone")
    assert record_of(folder, "record-knn.json")["protocol"] == "kNN (k200,t.2)"
    assert yaml.safe_load((folder / "config.yaml").read_text())["protocol"] == "gsg"


@pytest.mark.long
def test_an_unfinished_run_is_evaluated_and_the_record_says_its_epoch(shortest, tmp_path, capsys):
    done = {"backbone.safetensors", "results.json"}
    folder = tmp_path / "run"
    shutil.copytree(shortest, folder, ignore=lambda _, names: done & {*names})
    command_line = ["--backbone", folder, "--workers", "0", "--output", tmp_path / "out"]
    assert in_process([*command_line, "--measure", "knn"]) == 0
    found = record_of(tmp_path / "out", "record-knn.json")
    assert found["epoch"] == f"{found['pretraining']['epochs']:g} of 10 scheduled epochs"
    assert found["recipe"] == "nnclr" and found["pretraining"]["dataset"] == "photos"
    assert f"backbone: epoch {found['epoch']}" in capsys.readouterr().out


def test_a_checkpoint_that_changes_between_ranks_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("common.distributed.from_rank_zero", lambda value: "another")
    assert in_process([*FLAGS, *RANDOM, "--output", tmp_path]) == 2
    assert "random changed while the ranks read it: start again" in capsys.readouterr().err


@pytest.mark.long
def test_two_ranks_are_one(tmp_path):
    """401 test and 1 499 training images do not divide over 2 ranks: one has an image more."""
    flags = [*FLAGS, *RANDOM, "--protocol", "byol", "--epochs", "1", "--precision", "fp64"]
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        run_ranks(ranks, "tests/probe_driver.py", folder, *flags, "--output", folder / "out")
        seen = [torch.load(folder / f"rank{r}.pt", weights_only=True) for r in range(ranks)]
        found[ranks] = record_of(folder / "out"), record_of(folder / "out", "record-knn.json"), seen
    one, two = found[1], found[2]
    assert one[0]["value"] == two[0]["value"] and one[0]["others"] == two[0]["others"]
    assert one[1]["others"] == two[1]["others"]
    for name, expected in one[2][0].items():
        for seen in two[2]:
            torch.testing.assert_close(seen[name], expected, rtol=0, atol=1e-6)
    assert {len(one[2][0][n]) for n in ("train", "test")} == {1499, 401}


@pytest.mark.long
def test_stops_on_request_and_continues_to_the_same_numbers(tmp_path):
    flags = [*FLAGS, *RANDOM, "--protocol", "gsg", "--cache-features", "--epochs", "100"]
    flags += ["--lrs", "0.1,1", "--measure", "linear", "--seeds", "2"]
    whole = run_script(SCRIPT, *flags, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    (process,) = start_ranks(1, SCRIPT, *flags, "--output", tmp_path / "cut")
    assert process.said("epoch 20 of 100")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "stopped by SIGTERM, saved" in output, output
    assert not (tmp_path / "cut" / "record.json").exists()
    rest = run_script(SCRIPT, *flags, "--output", tmp_path / "cut")
    assert rest.returncode == 0 and "epoch 10 of 100" not in rest.stdout.split("seed 1")[0]
    one, two = record_of(tmp_path / "whole"), record_of(tmp_path / "cut")
    assert one["values"] == two["values"] and one["others"] == two["others"]
    lines = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "cut")]
    assert lines[0] == lines[1] and len(lines[0].splitlines()) == 200


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ([], "--backbone RUN_OR_FILE is missing"),
        (["--backbone", "random", "--arch", "tiny"], "give --protocol"),
        ([*RANDOM, "--protocol", "snclr", "--lrs", "fast"], "--lrs fast"),
        ([*RANDOM, "--protocol", "snclr", "--batch-size", "9999"], "--batch-size below 9999"),
        ([*RANDOM, "--protocol", "snclr", "--seeds", "0"], "--seeds 0"),
        ([*RANDOM, "--protcol", "snclr"], "did you mean --protocol"),
        (["--backbone", "nowhere.pth"], "nowhere.pth: no such file"),
    ],
)
def test_mistakes(flags, text, capsys, tmp_path):
    flags = [*FLAGS, *flags, "--output", str(tmp_path / "out")]
    assert in_process(flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and text in errors[0]


@pytest.mark.long
def test_a_run_that_has_trained_further_is_said(shortest, tmp_path, capsys):
    further = tmp_path / "run"
    shutil.copytree(shortest, further)
    flags = ["--workers", "0", "--measure", "knn", "--backbone", further]
    assert in_process(flags) == 0
    more = [*RUN_FLAGS, "3", "--output", str(further)]
    assert command(lambda: nnclr.main(more)) == 0
    capsys.readouterr()
    assert in_process(flags) == 2
    error = capsys.readouterr().err
    assert "has trained further since" in error and "another --output, or --resume never" in error
    assert "sha256" not in error and "same flags" not in error
    assert in_process([*flags, "--seed", "1"]) == 2  # another seed is another evaluation, too
    assert "seed was 0, is 1" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [b"a: [1", b"- 1", b"\xff\xfe\x00"])
def test_a_damaged_configuration_is_named(damage, shortest, tmp_path, capsys):
    (tmp_path / "config.yaml").write_bytes(damage)
    flags = [
        "--workers",
        "0",
        "--measure",
        "knn",
        "--backbone",
        shortest,
        "--output",
        str(tmp_path),
    ]
    assert in_process(flags) == 2
    assert f"{tmp_path / 'config.yaml'} is damaged" in capsys.readouterr().err


def test_every_flag_has_its_line_of_help(capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    for field in dataclasses.fields(script.ProbeConfig):
        assert "--" + field.name.replace("_", "-") in text
    assert "All train at once" in text and "never guessed" in text
