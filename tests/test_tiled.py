"""SNCLR's loss in tiles against all logits at once: value, gradients, memory, ranks."""

import json

import pytest
import torch
from conftest import run_ranks, run_script
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.fast import tiled
from recipes.snclr import snclr_loss

TAU = 0.2


def snclr_inputs(n, k, d=6, dtype=torch.float64):
    """Draws z1, y1 (with gradient), y2 and NN(y2), of very different lengths."""
    torch.manual_seed(n * 100 + k)
    draw = [torch.randn(n, d, dtype=torch.float64) for _ in range(3)]
    draw.append(torch.randn(n, k, d, dtype=torch.float64))
    lengths = [torch.exp(2 * torch.randn(*t.shape[:-1], 1)) for t in draw]
    draw = [(t * length).to(dtype) for t, length in zip(draw, lengths, strict=True)]
    return [t.requires_grad_(i < 2) for i, t in enumerate(draw)]


def unit(x):
    return x / x.pow(2).sum(dim=-1, keepdim=True).sqrt()


def all_at_once(z1, y1, y2, neighbours, form):
    """Computes Eq. 2 and 4, and the code's cross-entropy, image by image, in the dtype given."""
    n, k = neighbours.shape[:2]
    columns = unit(torch.cat([y2[:, None], neighbours], dim=1))  # NN(y2)_0..K
    losses = []
    for i in range(n):
        w = (unit(neighbours[i]) @ unit(y1[i])).softmax(dim=0)
        w = torch.cat([torch.ones(1, dtype=w.dtype), w])
        own = (columns[i] @ unit(z1[i])) / TAU
        everything = (columns.reshape(n * (k + 1), -1) @ unit(z1[i])) / TAU
        if form == "paper":
            losses.append(-torch.log((w * own.exp()).sum() / everything.exp().sum()))
        else:
            losses.append((w * (everything.exp().sum().log() - own)).sum() * 2 * TAU)
    return torch.stack(losses).mean()


def value_and_gradients(loss, tensors):
    for tensor in tensors[:2]:
        tensor.grad = None
    value = loss(*tensors)
    value.backward()
    return value.detach(), [torch.zeros_like(t) if t.grad is None else t.grad for t in tensors[:2]]


# 7 images of 1, 4 or 6 columns: tiles of 1 image, of 2 or 3 with a last one that is smaller, of all
@pytest.mark.parametrize("tile", [1, 60, 7 * 6 * 3, 10**6])
@pytest.mark.parametrize("k", [0, 3, 5])
@pytest.mark.parametrize("form", ["paper", "official"])
def test_tiles_change_neither_value_nor_gradients(form, k, tile, monkeypatch):
    monkeypatch.setitem(tiled.TILE, "cpu", tile)
    tensors = snclr_inputs(7, k)
    expected, gradients = value_and_gradients(lambda *t: all_at_once(*t, form), tensors)
    value, ours = value_and_gradients(lambda *t: snclr_loss(*t, TAU, form), tensors)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    for mine, grad in zip(ours, gradients, strict=True):
        torch.testing.assert_close(mine, grad, rtol=0, atol=1e-10 * grad.abs().max().item() + 1e-16)


@pytest.mark.parametrize("form", ["paper", "official"])
def test_gradients_in_float32(form, monkeypatch):
    """They agree to 1e-5 of the largest, in 33 tiles of 3 images and one of 1, the paper's D, K."""
    monkeypatch.setitem(tiled.TILE, "cpu", 3 * 100 * 31 + 5)
    exact = snclr_inputs(100, 30, 256)
    _, gradients = value_and_gradients(lambda *t: all_at_once(*t, form), exact)
    single = [t.detach().float().requires_grad_(i < 2) for i, t in enumerate(exact)]
    _, ours = value_and_gradients(lambda *t: snclr_loss(*t, TAU, form), single)
    for mine, grad in zip(ours, gradients, strict=True):
        assert (mine - grad).abs().max() <= 1e-5 * grad.abs().max()


class LargestTensor(TorchDispatchMode):
    """Notes how many bytes the largest new storage had that an operation returned."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = tree_leaves((args, kwargs))
        known = {t.untyped_storage().data_ptr() for t in leaves if torch.is_tensor(t)}
        for t in filter(torch.is_tensor, tree_leaves(out)):
            if t.untyped_storage().data_ptr() not in known:
                self.largest = max(self.largest, t.untyped_storage().nbytes())
        return out


def test_neither_the_logits_nor_a_copy_of_the_neighbours_is_ever_held(monkeypatch):
    n, k, d = 64, 15, 32
    monkeypatch.setitem(tiled.TILE, "cpu", n * n * (1 + k) // 20)
    tensors = snclr_inputs(n, k, d)
    with LargestTensor() as plain:
        all_at_once(*tensors, "paper").backward()
    with LargestTensor() as ours:
        snclr_loss(*tensors, TAU).backward()
    assert plain.largest >= tensors[3].nbytes  # the measure sees a copy
    assert n * d * 8 <= ours.largest <= n * n * (1 + k) * 8 // 20 < tensors[3].nbytes


def test_without_gradient_there_is_none():
    z1, y1, y2, neighbours = snclr_inputs(5, 2)
    with torch.no_grad():
        value = snclr_loss(z1, y1, y2, neighbours, TAU)
    assert not value.requires_grad
    torch.testing.assert_close(value, all_at_once(z1, y1, y2, neighbours, "paper").detach())


RANKS = """
import sys, torch, torch.distributed as dist
from common.fast import tiled
from recipes.snclr import snclr_loss
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
cases = torch.load(sys.argv[1])
results = []
for tensors, form, tile in cases:
    tiled.TILE["cpu"] = tile
    own = [t.chunk(ranks)[rank].clone().requires_grad_(i < 2) for i, t in enumerate(tensors)]
    loss = snclr_loss(*own, 0.2, form)
    loss.backward()
    results.append((loss.detach(), [t.grad for t in own[:2]]))
torch.save(results, f"{sys.argv[1]}.{rank}")
dist.barrier()
dist.destroy_process_group()
"""


def test_the_mean_over_two_ranks_is_the_value_and_gradient_of_one_process(tmp_path):
    cases = []
    for form in ("paper", "official"):
        for k in (0, 3):
            for tile in (1, 90, 10**6):  # of each rank's 5 images: 1, 2 or 4 or all in one tile
                tensors = [t.detach() for t in snclr_inputs(10, k)]
                cases.append((tensors, form, tile))
    (tmp_path / "ranks.py").write_text(RANKS)
    torch.save(cases, tmp_path / "inputs")
    run_ranks(2, tmp_path / "ranks.py", tmp_path / "inputs")
    ranks = [torch.load(tmp_path / f"inputs.{rank}") for rank in range(2)]
    for number, (tensors, form, _) in enumerate(cases):
        whole = [t.clone().requires_grad_(i < 2) for i, t in enumerate(tensors)]
        expected, gradients = value_and_gradients(lambda *t: all_at_once(*t, form), whole)  # noqa: B023
        found = [results[number] for results in ranks]
        value = torch.stack([loss for loss, _ in found]).mean()
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        for part, grad in enumerate(gradients):
            mine = torch.cat([g[part] for _, g in found]) / 2
            torch.testing.assert_close(mine, grad, rtol=0, atol=1e-10 * grad.abs().max() + 1e-16)


@pytest.mark.parametrize("form", ["paper", "official"])
def test_the_benchmark_compares_equal_work(form):
    from benchmarks.snclr_loss import plain_loss

    tensors = snclr_inputs(6, 4)
    expected, gradients = value_and_gradients(lambda *t: all_at_once(*t, form), tensors)
    value, found = value_and_gradients(lambda *t: plain_loss(*t, TAU, form), tensors)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
    for mine, grad in zip(found, gradients, strict=True):
        torch.testing.assert_close(mine, grad, rtol=0, atol=1e-10)


@pytest.mark.long
def test_the_benchmark_runs_and_stores_its_numbers(tmp_path):
    sizes = ["--images", "64", "--neighbours", "3", "--dim", "16", "--queue", "200"]
    sizes += ["--forms", "plain", "tiled"]
    done = run_script("benchmarks/snclr_loss.py", *sizes, "--output", tmp_path / "out.json")
    assert done.returncode == 0, done.stderr
    forms = json.loads((tmp_path / "out.json").read_text())["forms"]
    assert forms["plain"]["loss"] == pytest.approx(forms["tiled"]["loss"], rel=1e-5)
    norms = [forms[form]["gradient_norms"] for form in ("plain", "tiled")]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)
    assert set(norms[0]) == {"z1", "z2", "y1", "y2"}
    assert "SNCLR, in tiles" in done.stdout
