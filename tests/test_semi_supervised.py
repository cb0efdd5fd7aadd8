"""Fine-tuning on few labels: lists, draws, the papers' settings, training against a plain one."""

import hashlib
import json
import math
import signal
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import run_ranks, run_script, start_ranks
from PIL import Image

from common.augment import two_views
from common.data import photos
from common.data.images import subset
from common.data.loaders import RankBatches
from common.data.sets import load_dataset
from common.errors import UserError, command
from common.models import build_encoder
from common.run import checkpoint
from common.run.calibrate import calibrated
from eval.semi_supervised import lists
from eval.semi_supervised import run as script
from eval.semi_supervised.lists import SHA256, balanced_subset, read_list, simclr_list
from eval.semi_supervised.protocols import PROTOCOLS, schedule
from eval.semi_supervised.run import Classifier, best_of
from results.record import problems

SCRIPT = "eval/semi_supervised/run.py"
RANDOM = ["--backbone", "random", "--arch", "tiny", "--image-size", "32", "--workers", "0"]
QUICK = ["--dataset", "photos", "--batch-size", "54", "--epochs", "3"]


def record_of(folder):
    return json.loads((folder / "record.json").read_text())


def tune(folder, *flags):
    """Returns the record of a fine-tuning in this very process."""
    assert in_process([*RANDOM, *flags, "--output", folder]) == 0
    return record_of(folder)


def in_process(flags):
    return command(lambda: script.main([str(flag) for flag in flags]))


# -- which images are labelled --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Writes ImageNet's layout: two classes of twelve small JPEGs in train/ and in val/."""
    pixels, _ = photos.patches("train")
    for split in ("train", "val"):
        for number, name in enumerate(("n01440764", "n02102040")):
            (tmp_path / "data" / split / name).mkdir(parents=True)
            for i in range(12):
                path = tmp_path / "data" / split / name / f"{name}_{i}.JPEG"
                Image.fromarray(pixels[300 * number + i]).save(path)
    return tmp_path / "data"


def test_list_names_images_in_its_own_order(folder, tmp_path):
    images, _ = load_dataset("imagenet", str(folder))
    path = tmp_path / "list.txt"
    path.write_text("n02102040_3.JPEG\nn01440764/n01440764_11.JPEG\n\nn02102040_10.JPEG\n")
    samples = read_list(path, images)
    names = [images.path(i).rsplit("/", 1)[1] for i in samples]
    assert names == ["n02102040_3.JPEG", "n01440764_11.JPEG", "n02102040_10.JPEG"]
    assert images.labels[samples].tolist() == [1, 0, 1]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("n02102040_3.JPEG\nn02102040_99.JPEG\nn0_1.JPEG", "2 of the 3 images .*n02102040_99.JPEG"),
        ("\n\n", "names no image"),
        ("n02102040_3.JPEG\nn02102040_3.JPEG", "n02102040_3.JPEG twice"),
        (None, "cannot be read"),
    ],
)
def test_lists_that_do_not_fit(folder, tmp_path, text, error):
    images, _ = load_dataset("imagenet", str(folder))
    if text is not None:
        (tmp_path / "list.txt").write_text(text)
    with pytest.raises(UserError, match=error):
        read_list(tmp_path / "list.txt", images)


def test_images_of_a_list_that_cannot_be_read_are_said_to_be_so(folder, tmp_path, capsys):
    for name in ("n02102040_3", "n01440764_11"):
        (folder / "train" / name.split("_")[0] / f"{name}.JPEG").write_bytes(b"")
    path, out = tmp_path / "list.txt", tmp_path / "out"
    path.write_text("n02102040_3.JPEG\nn01440764_1.JPEG\nn01440764_11.JPEG\nn02102040_10.JPEG\n")
    flags = ["--dataset", "imagenet", "--data", folder, "--list", path, "--percent", "1"]
    flags += ["--protocol", "small", "--epochs", "1", "--batch-size", "2", "--head-lrs", "1"]
    flags += ["--encoder-lrs", "0.1", "--on-bad-image", "skip"]
    record = tune(out, *flags)
    assert record["hyperparameters"]["labelled"]["images"] == 2
    assert "2 unreadable training images left out" in record["dataset"]["incomplete"]
    printed = capsys.readouterr()
    assert f"{path}: left out are 2 of its 4 images, which cannot be read" in printed.out
    assert "complete the data set" not in printed.err
    path.write_text("n02102040_3.JPEG\nn02102040_99.JPEG\n")  # 99 is on no disk: complete it
    with pytest.raises(UserError, match=r"1 of the 2 images .*n02102040_99.JPEG: complete"):
        images, _ = load_dataset("imagenet", str(folder))
        keep = [i for i in range(len(images)) if "n02102040_3." not in images.path(i)]
        read_list(path, subset(images, np.array(keep)), {"n02102040/n02102040_3.JPEG"})


def test_a_list_needs_files(tmp_path):
    with pytest.raises(UserError, match="needs image files"):
        read_list(tmp_path / "list.txt", load_dataset("photos", "")[0])


def test_simclrs_list_is_checked_and_downloaded_once(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = tmp_path / "source.txt"
    monkeypatch.setattr(lists, "URL", f"file://{source}")
    with pytest.raises(UserError, match=r"cannot be downloaded.*--list FILE"):
        simclr_list(1)
    source.write_text("n02102040_3.JPEG\n")
    with pytest.raises(UserError, match=r"is not SimCLR's 1percent"):
        simclr_list(1)
    assert not (tmp_path / "cache" / "selfsup-recipes" / "1percent.txt").exists()
    digest = hashlib.sha256(source.read_bytes()).hexdigest()
    monkeypatch.setitem(SHA256, "1percent.txt", digest)
    path = simclr_list(1)
    source.unlink()
    assert simclr_list(1) == path and path.read_text() == "n02102040_3.JPEG\n"
    path.write_text("changed")
    with pytest.raises(UserError, match="is not SimCLR's"):
        simclr_list(1)


def test_classes_that_nothing_is_drawn_of_are_counted(capsys):
    labels = np.array([0] * 40 + [1] + [2] * 40 + [3])
    assert set(labels[balanced_subset(labels, 10, 3)]) == {0, 2}
    assert "2 of 4 classes have a single image" in capsys.readouterr().out


def test_draws_are_balanced_and_keyed():
    labels = np.concatenate([np.repeat(np.arange(10), 500), np.full(30, 10)])
    for percent, each in ((1, 5), (10, 50)):
        drawn = balanced_subset(labels, percent, 3)
        counts = np.bincount(labels[drawn]).tolist()
        assert counts == [each] * 10 + [max(1, 30 * percent // 100)]
        assert len(set(drawn.tolist())) == len(drawn)
        assert np.array_equal(drawn, balanced_subset(labels, percent, 3))
        assert not np.array_equal(drawn, balanced_subset(labels, percent, 4))


# -- the papers' settings -------------------------------------------------------------------------


def test_settings_of_the_papers():
    assert PROTOCOLS["simclr"].head_lrs[1] == (0.05,)  # times 4096 / 256: 0.8
    assert PROTOCOLS["simclr"].epochs == {1: (60,), 10: (30,)}
    assert sorted(PROTOCOLS["byol"].head_lrs[10]) == [0.005, 0.01, 0.02, 0.05, 0.1]
    assert PROTOCOLS["byol"].tied and PROTOCOLS["byol"].epochs[1] == (30, 50)
    assert (PROTOCOLS["barlow"].head_lrs, PROTOCOLS["barlow"].encoder_lrs) == (
        {1: (0.5,)},
        {1: (0.005,)},
    )
    assert PROTOCOLS["snclr"].assumed and PROTOCOLS["nnclr"].assumed
    fnc = PROTOCOLS["fnc"]  # 1 %; 10 %: SimCLR's
    assert (fnc.head_lrs, fnc.encoder_lrs, fnc.epochs) == ({1: (0.04,)}, {1: (0.04,)}, {1: (60,)})
    assert 0.04 * fnc.batch[1] / 256 == pytest.approx(0.005 * math.sqrt(1024))
    assert (fnc.lars, fnc.projector_layers, fnc.init, fnc.assumed) == (True, 1, "zeros", False)
    assert replace(fnc.others[10], assumed=False) == PROTOCOLS["simclr"] and fnc.others[10].assumed
    twist = PROTOCOLS["twist"]
    assert twist.head_lrs == {1: (0.2,), 10: (0.2,)}
    assert twist.encoder_lrs == {1: (0.04,), 10: (0.02,)}
    assert (twist.epochs[10], twist.batch[1], twist.assumed) == ((20,), 256, False)
    for name, crop_min in (("vicreg", 0.2), ("vicreg-code", 0.08)):
        protocol = PROTOCOLS[name]
        assert protocol.head_lrs == {1: (0.08,), 10: (0.1,)}
        assert protocol.encoder_lrs == {1: (0.03,), 10: (0.01,)}
        assert (protocol.epochs[1], protocol.batch[10]) == ((20,), 256)
        assert protocol.view(224).scale == (crop_min, 1.0)
    others = ("vicreg", "fnc")
    assert all(p.view(32).scale == (0.08, 1.0) for n, p in PROTOCOLS.items() if n not in others)


def test_schedules():
    for step in range(40):
        epoch = step // 2
        factor = 1.0 if epoch < 12 else 0.2 if epoch < 16 else 0.2 * 0.2
        assert schedule("steps", step, 2, 20) == pytest.approx(factor)
        cosine = (1 + math.cos(math.pi * epoch / 20)) / 2
        assert schedule("cosine per epoch", step, 2, 20) == cosine
        assert schedule("cosine per step", step, 2, 20) == (1 + math.cos(math.pi * step / 40)) / 2


def test_best_of():
    assert best_of([1.0, None, 3.0, 3.0]) == (2, 3.0)
    assert best_of([None, None]) == (0, -1.0) and best_of([]) == (0, -1.0)


# -- training -------------------------------------------------------------------------------------


@pytest.mark.long
def test_training_is_a_plain_loop_of_two_rates(tmp_path):
    """Three epochs in float64 are those of torch's layers and optimizer, written out."""
    flags = [*QUICK, "--percent", "10", "--protocol", "vicreg", "--precision", "fp64"]
    done = run_script("tests/semi_driver.py", tmp_path, *RANDOM, *flags, "--output", tmp_path / "a")
    assert done.returncode == 0, done.stderr + done.stdout
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        encoder = build_encoder("tiny", 32).double()
    images, crops = load_dataset("photos", "")[0], two_views("crop-flip", 32)
    encoder = calibrated(encoder, images, crops, 0)  # as every random encoder is
    weight = torch.empty(18, 64).normal_(0, 0.01, generator=torch.Generator().manual_seed(0))
    model = Classifier(encoder, weight).double().train()
    base = {"head": 0.1 * 54 / 256, "encoder": 0.01 * 54 / 256}  # VICReg's 10 %
    sgd = torch.optim.SGD(
        [{"params": getattr(model, n).parameters(), "lr": lr} for n, lr in base.items()],
        momentum=0.9,
    )
    order = [[s for _, s in b] for b in RankBatches(540, 54, 0, 0, 30, 0, 1)]
    assert [b.tolist() for b in seen["ids"]] == order
    for step, (x, y) in enumerate(zip(seen["inputs"], seen["labels"], strict=True)):
        factor = (1 + math.cos(math.pi * (step // 10) / 3)) / 2
        for group, lr in zip(sgd.param_groups, base.values(), strict=True):
            group["lr"] = lr * factor
        sgd.zero_grad()
        F.cross_entropy(model(x), y).backward()
        sgd.step()
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(seen["model"][name], expected, rtol=1e-7, atol=1e-9, msg=name)
    labels = load_dataset("photos", "")[0].labels
    drawn = balanced_subset(labels, 10, 0)
    for ids, y in zip(seen["ids"], seen["labels"], strict=True):
        assert y.tolist() == labels[drawn[ids]].tolist()


@pytest.mark.long
def test_lars_from_within_the_projector_is_a_plain_loop(run_of, tmp_path):
    """In FNC's 1 % the first layer of its run's projector stays, LARS leaves out biases, norms and
    the head, and has the rate inside the momentum.
    """
    run = run_of("FNC")
    flags = ["--backbone", run, "--workers", "0", *QUICK, "--protocol", "fnc"]
    flags += ["--percent", "1", "--precision", "fp64", "--head-lrs", "3", "--encoder-lrs", "30"]
    done = run_script("tests/semi_driver.py", tmp_path, *flags, "--output", tmp_path / "a")
    assert done.returncode == 0, done.stderr + done.stdout
    seen = torch.load(tmp_path / "seen.pt", weights_only=True)
    saved = checkpoint.load(run / "checkpoint.pt")["state"]["model"]
    encoder, linear = build_encoder("tiny", 32), torch.nn.Linear(64, 64, bias=False)
    norm = torch.nn.BatchNorm1d(64)
    for prefix, part in (("encoder", encoder), ("projector.0", linear), ("projector.1", norm)):
        cut = len(prefix) + 1
        part.load_state_dict({n[cut:]: t for n, t in saved.items() if n.startswith(f"{prefix}.")})
    body = torch.nn.Sequential(encoder, linear, norm, torch.nn.ReLU())
    model = Classifier(body, torch.zeros(18, 64)).double().train()
    velocities = {n: torch.zeros_like(p) for n, p in model.named_parameters()}
    assert len(seen["inputs"]) == 3
    for step, (x, y) in enumerate(zip(seen["inputs"], seen["labels"], strict=True)):
        factor = (1 + math.cos(math.pi * step / 3)) / 2 * 54 / 256
        model.zero_grad()
        F.cross_entropy(model(x), y).backward()
        with torch.no_grad():
            for name, p in model.named_parameters():
                head, g = name.startswith("head."), p.grad
                if p.ndim > 1 and not head and g.any():  # none at first: the head is zeros
                    g = g * 0.001 * p.norm() / g.norm()
                velocities[name].mul_(0.9).add_((3 if head else 30) * factor * g)
                p.sub_(velocities[name])
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(seen["model"][name], expected, rtol=1e-7, atol=1e-9, msg=name)
    what = record_of(tmp_path / "a")["hyperparameters"]
    assert (what["optimizer"], what["projector_layers"]) == ("lars", 1)


@pytest.mark.long
def test_sweep_chooses_on_held_out_images_and_repeats(tmp_path, capsys):
    flags = [*QUICK, "--percent", "1", "--head-lrs", "1e-9,3", "--encoder-lrs", "0.03"]
    flags += ["--epochs", "8", "--seeds", "2"]
    found = tune(tmp_path / "a", *flags)
    what = found["hyperparameters"]
    assert found["protocol"] == "semi-sup 1%" and what["protocol"] == "small"
    assert [t["head_lr"] for t in what["tried"]] == [1e-9, 3.0]
    assert what["chosen"]["head_lr"] == 3.0  # the other one learns nothing
    assert what["tried"][1]["held_out_top1"] > what["tried"][0]["held_out_top1"]
    assert what["labelled"]["images"] == 54 and "unlabelled" in what["chosen_on"]
    assert found["seeds"] == [0, 1] and len(found["values"]) == 2
    assert found["spread"] is not None and found["values"][0] != found["values"][1]
    assert min(found["values"]) > 100 / 18
    assert problems(found) == [] or found["commit"] == "unknown"
    assert not (tmp_path / "a" / "checkpoint.pt").exists()
    capsys.readouterr()
    assert tune(tmp_path / "a", *flags) == found  # has finished: says it again
    assert f"{found['value']:.2f}" in capsys.readouterr().out


def test_given_list_on_image_folders(folder, tmp_path, capsys):
    path = tmp_path / "mine.txt"
    names = [f"{n}_{i}.JPEG" for n in ("n01440764", "n02102040") for i in range(4)]
    path.write_text("\n".join(names))
    flags = ["--dataset", "imagefolder", "--data", folder, "--list", path, "--batch-size", "4"]
    flags += ["--epochs", "2", "--head-lrs", "1,3", "--encoder-lrs", "0.01"]
    found = tune(tmp_path / "a", *flags)
    about = found["hyperparameters"]["labelled"]
    assert about["images"] == 8 and about["list"] == "mine.txt"
    assert about["list_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert found["others"]["top5"] == [100.0]  # fewer classes than 5
    (folder / "train" / "n02102040" / "n02102040_1.JPEG").unlink()
    assert in_process([*RANDOM, *flags, "--output", tmp_path / "b"]) == 2
    error = capsys.readouterr().err
    assert "1 of the 8 images" in error and "Traceback" not in error


@pytest.mark.long
def test_two_ranks_are_one(tmp_path):
    flags = [*RANDOM, *QUICK, "--percent", "10", "--precision", "fp64"]
    flags += ["--head-lrs", "0.3,3", "--encoder-lrs", "0.03", "--epochs", "2"]
    for ranks in (1, 2):
        run_ranks(ranks, SCRIPT, *flags, "--output", tmp_path / str(ranks))
    one, two = record_of(tmp_path / "1"), record_of(tmp_path / "2")
    assert one["values"] == two["values"] and one["others"] == two["others"]
    assert one["hyperparameters"]["tried"] == two["hyperparameters"]["tried"]


@pytest.mark.long
def test_stops_on_request_and_continues_to_the_same_numbers(tmp_path):
    flags = [*RANDOM, *QUICK, "--percent", "10", "--epochs", "5"]
    flags += ["--head-lrs", "0.3,1,3", "--encoder-lrs", "0.03"]
    whole = run_script(SCRIPT, *flags, "--output", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    (process,) = start_ranks(1, SCRIPT, *flags, "--output", tmp_path / "cut")
    assert process.said("setting 1 of 3")
    process.send_signal(signal.SIGTERM)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 75 and "stopped by SIGTERM" in output, output
    rest = run_script(SCRIPT, *flags, "--output", tmp_path / "cut")
    assert rest.returncode == 0 and "setting 1 of 3" not in rest.stdout, rest.stderr
    one, two = record_of(tmp_path / "whole"), record_of(tmp_path / "cut")
    assert one["values"] == two["values"]
    assert one["hyperparameters"]["tried"] == two["hyperparameters"]["tried"]
    logs = [(tmp_path / n / "metrics.jsonl").read_text() for n in ("whole", "cut")]
    assert logs[0] == logs[1] and len(logs[0].splitlines()) == 15


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        (["--dataset", "imagenet", "--data", "FOLDER"], "give --protocol"),
        (["--dataset", "photos", "--percent", "10", "--protocol", "barlow"], "no source for 10 %"),
        (["--dataset", "photos", "--protocol", "simclr"], "fewer than one batch"),
        (["--dataset", "photos", "--protocol", "fnc"], "1 of the projector's layers, of which"),
        (["--dataset", "photos", "--epochs", "1.5"], "--epochs 1.5"),
        (["--dataset", "photos", "--list", "list.txt"], "--list needs image files"),
    ],
)
def test_mistakes(flags, text, capsys, tmp_path, folder):
    flags = [str(folder) if f == "FOLDER" else f for f in flags]
    flags = [*RANDOM, *flags, "--output", str(tmp_path / "out")]
    assert in_process(flags) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and text in errors[0]
