"""One process against two: the same global batch gives the same run (gloo, float64 and float32);
and what two ranks say of an error.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import BY_FAMILY, SMALL, run_ranks, small, smallest, start_ranks
from test_resume import FLAGS, images

from common import cards
from common.data.loaders import RankBatches
from common.data.sets import load_dataset
from common.run import checkpoint, metrics

STEPS = 3


def run_on(ranks, folder, recipe, *flags):
    """Returns a run's folder, and what each of its ranks saw."""
    folder = folder / f"{ranks}"
    folder.mkdir()
    arguments = [*small(recipe), "--resume", "never", "--output", folder / "run", *flags]
    run_ranks(ranks, "tests/rank_driver.py", folder, recipe, *arguments)
    seen = [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(ranks)]
    return folder / "run", seen


def step_losses(run):
    return [r["loss"] for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "step"]


def state_of(run):
    return checkpoint.load(run / "checkpoint.pt")["state"]


def two_ranks_are_one(folder, recipe, *flags, steps=STEPS):
    """Trains on one process and on two, and compares losses, look-ups and the whole state; returns
    what each rank saw, first of the one process, then of the two.
    """
    flags = ["--precision", "fp64", "--max-steps", steps, *flags]
    one, (seen_one,) = run_on(1, folder, recipe, *flags)
    two, seen_two = run_on(2, folder, recipe, *flags)
    assert len(step_losses(one)) == steps
    np.testing.assert_allclose(step_losses(two), step_losses(one), rtol=1e-10, atol=0)
    for seen in seen_two:
        for a, b in zip(seen_one["positions"], seen["positions"], strict=True):
            assert torch.equal(a, b)
    state_one, state_two = state_of(one), state_of(two)
    if "queue" in state_one:
        assert len(seen_one["positions"]) >= steps
        queue_one, queue_two = (s.pop("queue")["ranks"][0] for s in (state_one, state_two))
        for name, value in queue_one.items():
            torch.testing.assert_close(queue_two[name], value, rtol=1e-8, atol=1e-8)
    for part in set(state_one) - {"optimizer"}:
        for name, value in state_one[part].items():
            torch.testing.assert_close(
                state_two[part][name], value, rtol=1e-8, atol=1e-8, msg=f"{part} {name}"
            )
    return [seen_one, *seen_two]


@pytest.mark.parametrize("method", BY_FAMILY)
def test_two_ranks_train_as_one_in_float64(method, tmp_path):
    recipe, flags = smallest(method)
    two_ranks_are_one(tmp_path, recipe, *flags)


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["vicreg", "barlow_twins", "simclr"])
def test_two_ranks_train_both_branches_as_one(recipe, tmp_path):
    seen, *_ = two_ranks_are_one(tmp_path, recipe, "--second-arch", "same")
    for part in ("encoder", "second_encoder", "projector", "second_projector"):
        own = [g for name, g in seen["gradients"].items() if name.startswith(f"{part}.")]
        assert own and any(g.any() for g in own), part


@pytest.mark.parametrize("method", BY_FAMILY)
def test_first_step_gradients_agree_in_float32(method, tmp_path):
    recipe, flags = smallest(method)
    flags = [*flags, "--precision", "fp32", "--max-steps", "1"]
    one, (seen_one,) = run_on(1, tmp_path, recipe, *flags)
    two, seen_two = run_on(2, tmp_path, recipe, *flags)
    np.testing.assert_allclose(step_losses(two), step_losses(one), rtol=1e-5, atol=1e-7)
    assert seen_one["gradients"] and seen_one["losses"]
    for name, expected in seen_one["gradients"].items():
        scale = expected.abs().max()
        weight = seen_one["gradients"].get(f"{name.removesuffix('bias')}weight")
        if name.endswith("bias") and weight is not None and weight.ndim == 2:
            largest = weight.abs().max()  # a bias's own, before a batch norm, is rounding
            scale = largest if scale < 1e-4 * largest else scale
        bound = 1e-5 * scale + 1e-7
        if name == "encoder.0.weight":  # oneDNN's is itself 1e-5 off its float64 value on one rank
            bound *= 2
        for seen in seen_two:
            worst = (seen["gradients"][name] - expected).abs().max()
            assert worst <= bound, f"{name}: off by {worst}, allowed {bound}"


@pytest.mark.long
def test_the_k_nn_of_two_ranks_is_that_of_one(tmp_path):
    """k-NN is spread over ranks and merged, with the same accuracy."""
    flags = ["--precision", "fp64", "--max-steps", "1", "--knn-every", "1", "--train-images", "180"]
    runs = [run_on(ranks, tmp_path, next(iter(cards.load())), *flags)[0] for ranks in (1, 2)]
    for name in ("knn_before", "knn"):
        accuracies = [json.loads((run / "results.json").read_text())[name] for run in runs]
        assert accuracies[0] == accuracies[1] > 1 / 18


# -- errors ---------------------------------------------------------------------------------------


def errors_of_two_ranks(*flags):
    """Returns for each rank the errors that it says; both must end, and not with 0."""
    processes = start_ranks(2, f"recipes/{next(iter(cards.load()))}.py", *flags)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    for process, output in zip(processes, outputs, strict=True):
        assert process.returncode not in (0, None) and "Traceback" not in output, output
    return [[line for line in o.splitlines() if line.startswith("error: ")] for o in outputs]


def test_an_error_of_all_ranks_is_said_by_rank_0(tmp_path):
    flags = [*SMALL, "--train-images", "50", "--output", tmp_path / "run"]
    (first,), others = errors_of_two_ranks(*flags)
    assert "not the same number of each of 18 classes" in first and others == []


def test_an_error_of_one_rank_is_said_by_that_rank(tmp_path):
    """An image that only rank 1 loads cannot be read."""
    shutil.copytree(images(), tmp_path / "images")
    train = load_dataset("imagefolder", str(tmp_path / "images"))[0]
    (_, sample), *_ = next(iter(RankBatches(len(train), 16, 0, 0, 1, 1, 2)))
    path = Path(train.path(sample))
    path.write_bytes(path.read_bytes()[:100])
    flags = [*FLAGS, "--knn-every", "0", "--workers", "1", "--max-steps", "1"]
    folders = ["--data", tmp_path / "images", "--output", tmp_path / "run"]
    first, (other,) = errors_of_two_ranks(*flags, *folders)
    assert str(path) in other and "--on-bad-image skip" in other and first == []
