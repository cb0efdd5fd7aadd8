"""Every script end to end on `photos`, and each mistake with its one clear line."""

import errno
import functools
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
import yaml
from conftest import (
    BY_FAMILY,
    DEFAULTS,
    METHODS,
    SMALL,
    long_unless,
    only_error,
    run_fresh,
    run_ranks,
    run_script,
    small,
    smallest,
)
from PIL import Image

from common import cards
from common.data import photos
from common.data.images import ArrayImages
from common.errors import UserError, command
from common.run import checkpoint, metrics, results
from common.run.backbone import load_backbone
from eval.figures import ablation, tsne
from eval.linear_probe import run as linear_probe
from recipes import snclr

ARTEFACTS = {
    "config.yaml",
    "environment.json",
    "metrics.jsonl",
    "checkpoint.pt",
    "backbone.safetensors",
    "MODEL_CARD.md",
    "results.json",
}
STEP_KEYS = {"epoch", "step", "loss", "lr", "grad_norm", "images_per_second", "data_wait"}
STEP_KEYS |= {"memory_gb", "embedding_std"}


def in_process(capsys, recipe, *flags):
    """Returns exit code and error lines of a recipe's command, without starting a new process."""
    main = importlib.import_module(f"recipes.{recipe}").main
    code = command(lambda: main([str(flag) for flag in flags]))
    captured = capsys.readouterr()
    return code, [line for line in captured.err.splitlines() if line.startswith("error: ")]


def error_of(capsys, recipe, *flags):
    code, lines = in_process(capsys, recipe, *flags)
    assert code == 2 and len(lines) == 1, (code, lines)
    return lines[0]


def has_queue(run):
    return "queue" in checkpoint.load(run / "checkpoint.pt")["state"]


@pytest.mark.parametrize("method", BY_FAMILY)
def test_runs_end_to_end(method, run_of):
    recipe, run = METHODS[method][0], run_of(method)
    assert {p.name for p in run.iterdir()} >= ARTEFACTS
    records = metrics.read(run / "metrics.jsonl")
    steps = [r for r in records if r["kind"] == "step"]
    assert [r["step"] for r in steps] == [1, 2, 3]
    for record in steps:
        assert set(record) >= STEP_KEYS
        assert 0.9 <= record.get("momentum", 1) <= 1
    assert records[0]["kind"] == "epoch" and records[0]["knn"] > 1 / 18
    assert ("self_matches" in steps[-1]) == has_queue(run)
    encoder, metadata = load_backbone(run)
    assert encoder.embed_dim == 64 and metadata["recipe"] == recipe
    environment = json.loads((run / "environment.json").read_text())
    assert {"commit", "dirty", "versions", "devices", "command"} <= set(environment)
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert config["recipe"] == recipe and config["method"] == method


def test_what_a_recipe_logs_beside_the_others_is_on_its_card(run_of):
    for recipe, card in cards.load().items():
        method = next(name for name in DEFAULTS if METHODS[name][0] == recipe)
        logged = {n for r in metrics.read(run_of(method) / "metrics.jsonl") for n in r}
        for name in card.metrics:
            assert any(n == name or (name[-1] == "_" and n.startswith(name)) for n in logged), name


@pytest.mark.pictures
@pytest.mark.parametrize("method", long_unless(["SNCLR"]))
def test_pictures_of_a_run(method, tmp_path):
    recipe, flags = smallest(method)
    flags = [*flags, "--max-steps", "2", "--output", tmp_path / "run"]
    done = run_script(f"recipes/{recipe}.py", *flags)
    assert done.returncode == 0, done.stderr
    for picture in ("curves.png", "neighbours.png")[: 1 + has_queue(tmp_path / "run")]:
        with Image.open(tmp_path / "run" / picture) as image:
            assert min(image.size) > 200
            assert np.asarray(image.convert("L")).std() > 5  # not an empty page


@pytest.mark.long
@pytest.mark.parametrize("recipe", cards.load())
@pytest.mark.parametrize(
    "flags",
    [["--precision", "bf16"], ["--arch", "vit_small_mocov3"], ["--follow", "official"]],
    ids=["half precision", "frozen positions", "official"],
)
def test_no_recipe_stops_at(recipe, flags, tmp_path, capsys):
    if flags[0] == "--follow" and "follow" not in cards.load()[recipe].chooses:
        pytest.skip("it has no --follow")
    flags = [*small(recipe), "--batch-size", "4", "--max-steps", "1", *flags]
    code, lines = in_process(capsys, recipe, *flags, "--output", tmp_path)
    assert code == 0, lines


@pytest.mark.long
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_demo_learns(seed, tmp_path):
    """k-NN gains 8 points or more over its own random encoder, calibrated, and over raw pixels."""
    done = run_fresh("eval/demo.py", "--seed", seed, "--output", tmp_path / "demo", timeout=600)
    assert done.returncode == 0, done.stderr
    table = {}
    for line in done.stdout.splitlines():
        for name in ("raw pixels", "random encoder", "SNCLR"):
            if line.startswith(name) and line.endswith("%"):
                knn, linear = line[len(name) :].split()
                table[name] = float(knn.rstrip("%")), float(linear.rstrip("%"))
    knn_pixels, knn_random, knn_trained = (table[name][0] for name in table)
    assert knn_trained >= max(knn_random, knn_pixels) + 8, done.stdout
    gained = float(done.stdout.split("Training gained ")[1].split()[0])
    assert gained == pytest.approx(knn_trained - knn_random, abs=0.11)
    assert table["SNCLR"][1] > table["random encoder"][1], done.stdout
    results = json.loads((tmp_path / "demo" / "results.json").read_text())
    assert round(100 * results["knn"], 1) == knn_trained
    # the random encoder that the demo rebuilds is the run's own
    assert round(100 * results["knn_before"], 1) == knn_random


@pytest.mark.long
def test_a_run_goes_on_where_wandb_fails(tmp_path):
    flags = [*SMALL, "--max-steps", "2", "--wandb", "--output"]
    failing = run_script("recipes/nnsiam.py", *flags, tmp_path / "b", WANDB_MODE="nonsense")
    assert failing.returncode == 0, failing.stderr
    assert "wandb failed" in failing.stderr and "goes on without it" in failing.stderr


@pytest.mark.long
def test_heavy_libraries_wait_until_they_are_needed():
    """The plan asks every script in it for its flags, so that eval/supervised.py is one of them."""
    heavy = {"wandb", "submitit", "matplotlib", "sklearn"}
    code = f"import sys, recipes.snclr, eval.supervised; print({{*sys.modules}} & {heavy})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


# -- mistakes -----------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    """Writes train/ and val/ with two classes of twelve small JPEGs."""
    pixels, _ = photos.patches("train")
    for split in ("train", "val"):
        for number in range(2):
            (tmp_path / "data" / split / f"class{number}").mkdir(parents=True)
            for i in range(12):
                path = tmp_path / "data" / split / f"class{number}" / f"{i:02}.jpg"
                Image.fromarray(pixels[300 * number + i]).resize((40, 40)).save(path)
    return tmp_path / "data"


TINY = ["--dataset", "imagefolder", "--arch", "tiny", "--image-size", "32", "--batch-size", "8"]
TINY += ["--queue-size", "16", "--neighbours", "3", "--workers", "0", "--epochs", "2"]
TINY += ["--warmup-epochs", "0"]


def test_no_data(capsys):
    assert "needs --data FOLDER" in error_of(capsys, "snclr")


def test_folder_without_train(capsys, tmp_path):
    error = error_of(capsys, "snclr", "--data", tmp_path)
    assert str(tmp_path) in error and "train/" in error


def test_empty_class(capsys, folder, tmp_path):
    (folder / "train" / "empty").mkdir()
    error = error_of(capsys, "snclr", *TINY, "--data", folder, "--output", tmp_path / "run")
    assert str(folder / "train" / "empty") in error


@pytest.mark.parametrize("workers", [0, 1])
def test_truncated_jpeg_stops_or_is_skipped(capsys, folder, tmp_path, workers):
    path = folder / "train" / "class0" / "00.jpg"  # also a query of neighbours.png
    path.write_bytes(path.read_bytes()[:400])
    flags = [*TINY, "--data", folder, "--output", tmp_path / "run", "--workers", workers]
    flags += ["--knn-every", "1"]  # the monitor reads the image too
    error = error_of(capsys, "snclr", *flags)
    assert str(path) in error and "--on-bad-image skip" in error
    flags += ["--on-bad-image", "skip"]
    code, lines = in_process(capsys, "snclr", *flags)
    assert code == 0 and lines and all(str(path) in line for line in lines)


def test_unknown_arch_and_flag_name_the_nearest(capsys):
    error = error_of(capsys, "nnclr", "--arch", "resnet51")
    assert "resnet51" in error and "did you mean resnet5" in error
    error = error_of(capsys, "nnclr", "--epocs", "3")
    assert "--epocs" in error and "did you mean --epochs?" in error


def test_mistakes_of_a_real_process_have_no_traceback():
    assert "--epocs" in only_error(run_script("recipes/nnsiam.py", "--epocs", "3"))


def test_batch_that_does_not_divide_over_ranks():
    flags = [*SMALL, "--batch-size", "35", "--max-steps", "1"]
    with pytest.raises(AssertionError, match="error: --batch-size 35 is the global batch and does"):
        run_ranks(2, "recipes/nnclr.py", *flags)


def test_batch_longer_than_the_training_set(capsys, folder):
    error = error_of(
        capsys, "nnclr", *TINY[:6], "--batch-size", "64", "--epochs", "1", "--data", folder
    )
    assert "24 training images" in error and "--batch-size 64" in error


def test_more_neighbours_than_the_queue_can_give(capsys, folder, tmp_path):
    flags = [*TINY, "--data", folder, "--output", tmp_path / "run", "--neighbour-free-epochs", "0"]
    error = error_of(capsys, "snclr", *flags, "--neighbours", "17")
    assert "--neighbours 17" in error and "--queue-size 16" in error
    # as many as there are, but an image's own entries do not count: found while training
    error = error_of(capsys, "snclr", *flags, "--neighbours", "16", "--knn-every", "0")
    assert "come from other images" in error


def test_loss_that_is_not_finite_stops_before_anything_is_saved(capsys, folder, tmp_path):
    flags = [*TINY, "--data", folder, "--output", tmp_path / "run", "--optimizer", "sgd"]
    flags += ["--knn-every", "0"]
    error = error_of(capsys, "snclr", *flags, "--lr", "1e30")
    assert "the loss is" in error and "--lr" in error
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_other_images_under_the_same_name_are_refused(capsys, folder, tmp_path):
    flags = [*TINY, "--data", folder, "--output", tmp_path / "run", "--knn-every", "0"]
    assert in_process(capsys, "snclr", *flags, "--max-steps", "1")[0] == 0
    shutil.move(folder / "train" / "class0" / "00.jpg", folder / "train" / "class0" / "other.jpg")
    assert "the images in --data are not those" in error_of(capsys, "snclr", *flags)


def test_flat_folder_without_labels_trains_and_says_no_knn(folder, tmp_path, capsys):
    flat = tmp_path / "flat" / "train"
    flat.mkdir(parents=True)
    for i, path in enumerate(sorted((folder / "train").glob("*/*.jpg"))):
        shutil.copy(path, flat / f"{i}.jpg")
    flags = [*TINY, "--data", flat.parent, "--output", tmp_path / "run", "--max-steps", "2"]
    code = command(lambda: snclr.main([str(flag) for flag in flags]))
    out = capsys.readouterr().out
    assert code == 0 and out.count("no k-NN accuracy") == 1
    assert "neighbour_purity" not in (tmp_path / "run" / "metrics.jsonl").read_text()


def test_a_run_of_one_class_has_no_knn(folder, tmp_path, capsys):
    for split in ("train", "val"):
        shutil.rmtree(folder / split / "class1")
    flags = [*TINY, "--data", folder, "--output", tmp_path / "run", "--max-steps", "1"]
    code = command(lambda: snclr.main([str(flag) for flag in flags]))
    assert code == 0 and "no second class: no k-NN accuracy" in capsys.readouterr().out
    assert results.read(tmp_path / "run")["knn"] is None


@pytest.mark.parametrize("below", ["", "x"])
def test_an_output_that_is_a_file_or_below_one(capsys, tmp_path, below):
    file = tmp_path / "README.md"
    file.write_text("mine")
    flags = ["--dataset", "photos", "--workers", "0", "--output", str(file / below)]
    assert f"{file} is a file" in error_of(capsys, "nnsiam", *SMALL, *flags)
    encoder = ["--backbone", "random", "--arch", "tiny", "--image-size", "32"]
    probe = [*encoder, "--measure", "knn", "--protocol", "snclr"]
    assert command(lambda: linear_probe.main([*probe, *flags])) == 2
    assert f"{file} is a file" in capsys.readouterr().err
    assert file.read_text() == "mine"


def test_a_picture_is_never_written_over_another_file(capsys, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("mine")
    for output, said in ((file, "name a file, like"), (file / "x.png", f"{file} is a file")):
        for main, flags in ((ablation.main, ["--over", "lr"]), (tsne.main, [])):
            flags = [str(tmp_path), *flags, "--output", str(output)]
            assert command(functools.partial(main, flags)) == 2
            assert said in capsys.readouterr().err
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("number", "said", "not_said"),
    [
        (errno.ENOSPC, "free space", "rights"),
        (errno.EDQUOT, "free space", "rights"),
        (errno.EROFS, "choose another folder", "free space"),
        (errno.EACCES, "choose another folder", "free space"),
    ],
)
def test_a_full_disk_and_a_forbidden_one_get_their_own_advice(number, said, not_said, capsys):
    def main():
        raise OSError(number, os.strerror(number), "/runs/x")

    assert command(main) == 2
    error = capsys.readouterr().err
    assert os.strerror(number) in error and "/runs/x" in error
    assert said in error and not_said not in error


@pytest.mark.parametrize(
    ("number", "advice"), [(errno.ENOSPC, "free space"), (errno.EROFS, "make it writable")]
)
def test_a_checkpoint_that_cannot_be_saved(number, advice, tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(torch, "save", refuse)
    with pytest.raises(UserError, match=rf"\({os.strerror(number)}\): {advice} and start the same"):
        checkpoint.save(tmp_path, {"step": 1})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("DataLoader worker (pid(s) 7) exited unexpectedly", "fewer --workers"),
        ("DataLoader worker (pid 7) is killed by signal: Bus error. ", "/dev/shm"),
        ("DataLoader worker (pid 7) is killed by signal: Segmentation fault. ", None),
        ("Caught RuntimeError in DataLoader worker process 0.", None),  # a bug keeps its traceback
    ],
)
def test_what_is_said_of_a_lost_worker(text, said, capsys):
    def main():
        raise RuntimeError(text)

    if said is None:
        with pytest.raises(RuntimeError):
            command(main)
    else:
        assert command(main) == 2 and said in capsys.readouterr().err


@pytest.mark.long
def test_a_killed_loader_worker_is_one_line(capsys, tmp_path, monkeypatch):
    """The kernel kills one if memory runs out; the run before it is continued."""
    flags = [*SMALL, "--output", tmp_path / "run"]
    assert in_process(capsys, "nnsiam", *flags, "--max-steps", "2")[0] == 0
    whole = ArrayImages.load_array

    def killed(*arguments):
        if torch.utils.data.get_worker_info() is not None:
            os.kill(os.getpid(), signal.SIGKILL)
        return whole(*arguments)

    monkeypatch.setattr(ArrayImages, "load_array", killed)
    error = error_of(capsys, "nnsiam", *flags, "--max-steps", "3")
    assert "a loader worker was killed, probably for memory: fewer --workers" in error
    monkeypatch.undo()
    assert in_process(capsys, "nnsiam", *flags, "--max-steps", "3")[0] == 0
    steps = [r["step"] for r in metrics.read(tmp_path / "run" / "metrics.jsonl") if "lr" in r]
    assert steps == [1, 2, 3]


def test_resume_never_takes_the_next_free_name(folder, tmp_path, capsys):
    flags = [*TINY, "--data", folder, "--output", tmp_path / "run", "--max-steps", "1"]
    flags += ["--resume", "never", "--knn-every", "0"]
    for expected in ("run", "run-2", "run-3"):
        assert in_process(capsys, "snclr", *flags)[0] == 0
        assert (tmp_path / expected / "backbone.safetensors").exists()
