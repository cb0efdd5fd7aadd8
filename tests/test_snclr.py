"""SNCLR's own: its monitors, and one private queue for each rank, as its released code has it."""

import signal

import numpy as np
import pytest
import torch
from conftest import run_ranks, small, start_ranks
from test_ranks import run_on, state_of, step_losses
from test_resume import assert_same_runs, flags_of, wait_for_step

from common.run import checkpoint, metrics

STEPS = 3


def test_official_snclr_has_one_private_queue_per_rank(tmp_path):
    """Each rank looks up as a NumPy queue of its own batches does; the loss is that of a plain loop
    over the keys and neighbours of both ranks.
    """
    flags = ["--follow", "official", "--precision", "fp64", "--max-steps", str(STEPS)]
    flags += ["--queue-size", "128", "--output-dim", "256", "--neighbours", "5"]
    run, ranks = run_on(2, tmp_path, "snclr", *flags)
    saved = state_of(run)["queue"]
    assert not saved["shared"] and len(saved["ranks"]) == 2
    losses = np.zeros((2, STEPS))
    # per rank: calls of the loss come in pairs (z1, y1, key2, near2), (z2, y2, key1, near1)
    for step in range(STEPS):
        for direction in (0, 1):
            calls = [seen["losses"][2 * step + direction][1] for seen in ranks]
            keys = np.concatenate([c[2].numpy() for c in calls])
            near = np.concatenate([c[3].numpy() for c in calls])
            columns = np.concatenate([keys[:, None], near], axis=1)
            for r, (z, y, *_) in enumerate(calls):
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
                _, _, key, near = seen["losses"][2 * step + direction][1][:4]
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
    """Returns the k rows of largest cosine with the key, best first, l2-normalised."""
    cosines = [unit(key) @ unit(row) for row in rows]
    best = sorted(range(len(rows)), key=lambda i: -cosines[i])[:k]
    return np.stack([unit(rows[i]) for i in best])


def official_loss(z, y, columns, first, temperature=0.2):
    """Computes soft-label cross-entropy x 2 tau of one rank: z, y (N,D), columns (M,1+K,D) of all
    ranks, `first` the column of this rank's first image.
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
    arguments = [*small("snclr"), "--output", run, *flags, "2"]
    with pytest.raises(AssertionError, match="one private queue for each of 2 ranks"):
        run_ranks(1, "recipes/snclr.py", *arguments)


@pytest.mark.long
def test_two_ranks_agree_on_a_stop_and_resume_with_their_private_queues(tmp_path):
    """One rank alone gets the signal; both save the same step and end with 75."""
    a, b = tmp_path / "a", tmp_path / "b"

    def flags(folder):
        more = ["--follow", "official", "--knn-every", "0", "--max-steps", "20"]
        return ["recipes/snclr.py", *flags_of("snclr", folder, 1, *more)]

    run_ranks(2, *flags(a))
    processes = start_ranks(2, *flags(b))
    wait_for_step(b, 3, processes[0])
    processes[1].send_signal(signal.SIGTERM)
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [75, 75], outputs
    assert 3 <= checkpoint.load(b / "checkpoint.pt")["step"] < 20
    run_ranks(2, *flags(b))
    assert_same_runs(a, b)


def test_the_mean_positiveness_is_one_over_the_neighbours(run_of):
    last = metrics.read(run_of("SNCLR") / "metrics.jsonl")[-1]
    assert last["positiveness_mean"] == pytest.approx(1 / 5, rel=1e-5)
    assert last["positiveness_std"] >= 0 and 0.5 < last["positiveness_auc"] <= 1
