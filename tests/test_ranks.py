"""One process against two: the same global batch gives the same run (gloo, float64 and float32)."""

import json

import numpy as np
import pytest
import torch
from conftest import run_ranks, small
from test_gsg import algorithm_1

from common.pairs import draw_pairs
from common.run import checkpoint, metrics

RECIPES = {
    "nnclr": [],
    "nnclr momentum": ["--momentum-encoder", "--symmetric-loss"],
    "nnsiam": ["--output-dim", "64"],
    "snclr": ["--neighbours", "5", "--neighbour-free-epochs", "0"],
    "simsiam_gsg": ["--output-dim", "64"],
    "simsiam_gsg derangement": ["--output-dim", "64", "--pairing", "derangement"],
    "simsiam_gsg plain": ["--output-dim", "64", "--no-gsg"],
    "byol_gsg": ["--output-dim", "64"],
    "byol_gsg derangement": ["--output-dim", "64", "--pairing", "derangement"],
}
STEPS = 5


def run_on(ranks, folder, case, *flags):
    """A run's folder, and what each of its ranks saw."""
    folder = folder / f"{ranks}"
    folder.mkdir()
    recipe = case.split()[0]
    arguments = [*small(recipe), "--resume", "never", "--output", str(folder / "run")]
    run_ranks(ranks, "tests/rank_driver.py", folder, recipe, *arguments, *RECIPES[case], *flags)
    seen = [torch.load(folder / f"rank{r}.pt", weights_only=False) for r in range(ranks)]
    return folder / "run", seen


def step_losses(run):
    return [r["loss"] for r in metrics.read(run / "metrics.jsonl") if r["kind"] == "step"]


def state_of(run):
    return checkpoint.load(run / "checkpoint.pt")["state"]


@pytest.mark.parametrize("case", RECIPES)
def test_two_ranks_train_as_one_in_float64(case, tmp_path):
    flags = ["--precision", "fp64", "--max-steps", str(STEPS)]
    if case == "nnclr":
        flags += ["--knn-every", "1"]
    one, (seen_one,) = run_on(1, tmp_path, case, *flags)
    two, seen_two = run_on(2, tmp_path, case, *flags)
    assert len(step_losses(one)) == STEPS
    np.testing.assert_allclose(step_losses(two), step_losses(one), rtol=1e-10, atol=0)
    assert len(seen_one["positions"]) == STEPS * (1 if "gsg" in case else 2) * ("plain" not in case)
    for seen in seen_two:
        for a, b in zip(seen_one["positions"], seen["positions"], strict=True):
            assert torch.equal(a, b)
    if "gsg" in case:  # the pairs are those of the flag, the seed and the step
        pairing = case.split()[1] if "derangement" in case else "global"
        drawn = [draw_pairs(pairing, 36, 1, 0, step) for step in range(STEPS)]
        for seen in (seen_one, *seen_two):
            used = [pairs for _, pairs, _ in seen["terms"]]
            assert all(map(torch.equal, used, drawn)) and len(used) == STEPS * ("plain" not in case)
    if case == "nnclr":  # spread over ranks, merged: the same accuracy
        for name in ("knn_before", "knn"):
            accuracies = [json.loads((r / "results.json").read_text())[name] for r in (one, two)]
            assert accuracies[0] == accuracies[1] > 1 / 18
    state_one, state_two = state_of(one), state_of(two)
    if "queue" in state_one:
        queue_one, queue_two = (s.pop("queue")["ranks"][0] for s in (state_one, state_two))
        for name, value in queue_one.items():
            torch.testing.assert_close(queue_two[name], value, rtol=1e-8, atol=1e-8)
    for part in set(state_one) - {"optimizer"}:
        for name, value in state_one[part].items():
            torch.testing.assert_close(
                state_two[part][name], value, rtol=1e-8, atol=1e-8, msg=f"{part} {name}"
            )


@pytest.mark.parametrize("case", ["nnclr", "nnsiam", "snclr", "simsiam_gsg", "byol_gsg"])
def test_first_step_gradients_agree_in_float32(case, tmp_path):
    flags = ["--precision", "fp32", "--max-steps", "1"]
    one, (seen_one,) = run_on(1, tmp_path, case, *flags)
    two, seen_two = run_on(2, tmp_path, case, *flags)
    np.testing.assert_allclose(step_losses(two), step_losses(one), rtol=1e-5, atol=1e-7)
    assert seen_one["gradients"]
    for name, expected in seen_one["gradients"].items():
        bound = 1e-5 * expected.abs().max() + 1e-7
        for seen in seen_two:
            worst = (seen["gradients"][name] - expected).abs().max()
            assert worst <= bound, f"{name}: off by {worst}, allowed {bound}"


def test_official_snclr_has_one_private_queue_per_rank(tmp_path):
    """Each rank against a NumPy queue of its own batches; the loss against a plain loop over the
    keys and neighbours of both ranks.
    """
    flags = ["--follow", "official", "--precision", "fp64", "--max-steps", str(STEPS)]
    flags += ["--neighbours", "5"]
    run, ranks = run_on(2, tmp_path, "snclr", *flags)
    saved = state_of(run)["queue"]
    assert not saved["shared"] and len(saved["ranks"]) == 2
    losses = np.zeros((2, STEPS))
    # per rank: calls of the loss come in pairs (z1, y1, key2, near2), (z2, y2, key1, near1)
    for step in range(STEPS):
        for direction in (0, 1):
            calls = [seen["terms"][2 * step + direction][0] for seen in ranks]
            keys = np.concatenate([c[2].numpy() for c in calls])
            near = np.concatenate([c[3].numpy() for c in calls])
            columns = np.concatenate([keys[:, None], near], axis=1)
            for r, (z, y, _, _) in enumerate(calls):
                losses[r, step] += official_loss(z.numpy(), y.numpy(), columns, r * len(z))
    np.testing.assert_allclose(step_losses(run), losses.mean(axis=0), rtol=1e-10)
    for r, seen in enumerate(ranks):
        start = torch.nn.functional.normalize(
            torch.randn(128, 256, generator=torch.Generator().manual_seed(0)), dim=1
        ).double()
        fifo = [*start.numpy()]  # slots, oldest overwritten first
        slot = 0
        for step in range(STEPS):
            for direction in (0, 1):
                (_, _, key, near), _, _ = seen["terms"][2 * step + direction]
                for i in range(len(key)):
                    np.testing.assert_allclose(near[i], brute_force(key[i].numpy(), fifo, 5))
            for row in seen["enqueued"][step][0].numpy():
                fifo[slot], slot = row, (slot + 1) % 128
        np.testing.assert_allclose(saved["ranks"][r]["embeddings"], np.stack(fifo))
    first, second = (rank["ids"] for rank in saved["ranks"])
    assert not set(first[first >= 0].tolist()) & set(second[second >= 0].tolist())


def unit(x):
    return x / np.sqrt((x**2).sum(axis=-1, keepdims=True))


def brute_force(key, rows, k):
    """The k rows of largest cosine with the key, best first, l2-normalised."""
    cosines = [unit(key) @ unit(row) for row in rows]
    best = sorted(range(len(rows)), key=lambda i: -cosines[i])[:k]
    return np.stack([unit(rows[i]) for i in best])


def official_loss(z, y, columns, first, temperature=0.2):
    """Soft-label cross-entropy x 2 tau of one rank: z, y (N,D), columns (M,1+K,D) of all ranks,
    `first` the column of this rank's first image.
    """
    total = 0.0
    for i in range(len(z)):
        logits = [[unit(z[i]) @ unit(c) / temperature for c in image] for image in columns]
        attention = np.array([np.exp(unit(y[i]) @ unit(c)) for c in columns[first + i][1:]])
        labels = [1.0, *(attention / attention.sum())]
        log_sum = np.log(sum(np.exp(v) for image in logits for v in image))
        own = logits[first + i]
        total += sum(w * (log_sum - s) for w, s in zip(labels, own, strict=True))
    return total / len(z) * 2 * temperature


def test_private_queues_refuse_another_number_of_ranks(tmp_path):
    flags = ["--follow", "official", "--neighbours", "5", "--max-steps"]
    run, _ = run_on(2, tmp_path, "snclr", *flags, "1")
    arguments = [*small("snclr"), "--output", str(run), *RECIPES["snclr"], *flags, "2"]
    with pytest.raises(AssertionError, match="one private queue for each of 2 ranks"):
        run_ranks(1, "recipes/snclr.py", *arguments)


@pytest.mark.parametrize("recipe", ["simsiam_gsg", "byol_gsg"])
def test_local_pairing_is_algorithm_1_in_each_ranks_own_batch(recipe, tmp_path):
    flags = ["--follow", "official", "--precision", "fp64", "--max-steps", str(STEPS)]
    run, ranks = run_on(2, tmp_path, recipe, *flags)
    losses = np.zeros((2, STEPS))
    for r, seen in enumerate(ranks):
        assert len(seen["terms"]) == STEPS
        for step, (tensors, pairs, loss) in enumerate(seen["terms"]):
            assert torch.equal(pairs, draw_pairs("local", 36, 2, 0, step))
            own = pairs[18 * r : 18 * (r + 1)] - 18 * r
            assert sorted(own.tolist()) == [*range(18)]
            losses[r, step] = algorithm_1(*tensors, own.tolist())
            np.testing.assert_allclose(loss, losses[r, step], rtol=1e-10)
    np.testing.assert_allclose(step_losses(run), losses.mean(axis=0), rtol=1e-10)
