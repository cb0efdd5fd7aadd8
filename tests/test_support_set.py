"""The support set against a plain list, and its search against brute force in float64.

The contract is DESIGN.md's. Nothing here looks at where in the buffer a row lies: first in, first
out shows in which rows are still there after each batch.
"""

import copy
import io
import math

import numpy as np
import pytest
import torch

from common.support_set import SupportSet


def draw(seed, *shape, spread=2.0):
    """Draws Gaussian float32 rows of lengths over 2 * spread orders of magnitude."""
    rng = np.random.default_rng([seed, *shape])
    scale = 10 ** rng.uniform(-spread, spread, (*shape[:-1], 1))
    return torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))


def filled(size, dim, ids=None, seed=0, dtype=torch.float32, shared=True):
    """Returns a queue whose every row was enqueued once, under ids 0 to size-1 unless given."""
    queue = SupportSet(size, dim, seed=seed, shared=shared).to(dtype)
    ids = torch.arange(size) if ids is None else torch.tensor(ids)
    queue.enqueue(draw(50 + seed, size, dim).to(dtype), ids)
    return queue


def unit(row):
    length = math.sqrt(sum(x * x for x in row))
    return [x / length for x in row]


def brute_force(queue, z, k, own_ids=None):
    """Returns positions of the k best rows for each row of z: sorts all cosines, in float64."""
    rows, ids = queue.embeddings.double().tolist(), queue.ids.tolist()
    found = []
    for n, query in enumerate(z.double().tolist()):
        cosines = []
        for position, row in enumerate(rows):
            if own_ids is not None and ids[position] == own_ids[n]:
                continue
            cosine = sum(a * b for a, b in zip(unit(query), unit(row), strict=True))
            cosines.append((-cosine, position))
        found.append([position for _, position in sorted(cosines)[:k]])
    return found


# -- the queue ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("size", "batches"),
    [
        (10, [3] * 14),  # four laps, never aligned
        (7, [2, 5, 3, 1, 7, 4, 6, 7, 7, 1]),
        (8, [8, 8, 4, 4]),
        (5, [13, 1, 1, 2, 5, 1]),  # above the queue's length: the last 5 stay, the oldest go first
        (6, [2, 12, 1, 18, 5, 7, 1]),
        (4, [9, 9, 9, 1]),
        (1, [1, 3, 1]),
        (5, [2, 0, 4, 0, 1]),
    ],
)
def test_the_queue_keeps_the_last_rows_with_their_ids(size, batches):
    queue = SupportSet(size, 3, seed=1)
    start = {tuple(row) for row in queue.embeddings.tolist()}
    line, number = [], 0  # the oracle: one line of all (id, row), of which the last `size` stay
    for batch in batches:
        z, ids = draw(number, batch, 3), torch.arange(number, number + batch)
        queue.enqueue(z, ids)
        line += zip(ids.tolist(), map(tuple, z.tolist()), strict=True)
        number += batch
        held = sorted(zip(queue.ids.tolist(), map(tuple, queue.embeddings.tolist()), strict=True))
        old = [row for i, row in held if i < 0]
        assert held[len(old) :] == sorted(line[-size:])
        assert len(old) == max(0, size - number)
        assert len(set(old)) == len(old) and set(old) <= start


def test_rows_without_ids_are_marked_unknown():
    queue = filled(6, 3)
    queue.enqueue(draw(2, 4, 3))
    assert sorted(queue.ids.tolist()) == [-1, -1, -1, -1, 4, 5]


def test_the_queue_keeps_no_graph_and_no_view_of_the_batch():
    queue = SupportSet(4, 3)
    z = draw(3, 4, 3).requires_grad_() * 1.0
    queue.enqueue(z, torch.arange(4))
    assert not queue.embeddings.requires_grad
    kept = queue.embeddings.clone()
    with torch.no_grad():
        z.zero_()
    assert torch.equal(queue.embeddings, kept)


@pytest.mark.parametrize(("size", "dim"), [(50, 7), (3, 64), (4, 1)])
def test_the_start_is_unit_rows_with_unknown_ids(size, dim):
    queue = SupportSet(size, dim, seed=5)
    assert queue.embeddings.shape == (size, dim) and queue.embeddings.dtype == torch.float32
    assert queue.ids.tolist() == [-1] * size
    for row in queue.embeddings.double().tolist():
        assert math.sqrt(sum(x * x for x in row)) == pytest.approx(1, abs=1e-6)


def test_the_start_is_gaussian():
    """Normalised Gaussian rows are uniform on the sphere: mean 0, E[x^2] = 1/D, E[x^4] =
    3/(D(D+2)). Normalised uniform numbers, of one sign or of both, have other moments.
    """
    d = 16
    x = SupportSet(8192, d, seed=6).embeddings.double()
    assert x.mean(dim=0).abs().max().item() < 0.02
    assert (x**4).mean().item() * d * (d + 2) == pytest.approx(3, rel=0.03)
    second = x.T @ x / len(x) * d
    assert (second - torch.eye(d)).abs().max().item() < 0.08


def test_the_start_depends_on_the_seed_and_on_nothing_else():
    torch.manual_seed(1)
    first, state = SupportSet(9, 4, seed=3).embeddings, torch.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)  # draws nothing from the global generator
    torch.manual_seed(2)
    assert torch.equal(SupportSet(9, 4, seed=3).embeddings, first)
    assert not torch.equal(SupportSet(9, 4, seed=4).embeddings, first)
    assert torch.equal(SupportSet(9, 4).embeddings, SupportSet(9, 4, seed=0).embeddings)


# -- the search -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("size", "n", "dim", "k"), [(40, 6, 5, 1), (40, 6, 5, 7), (3, 2, 4, 3)])
def test_nearest_is_brute_force_best_first(size, n, dim, k, dtype):
    queue, z = filled(size, dim, dtype=dtype), draw(7, n, dim).to(dtype)
    neighbours, positions = queue.nearest(z, k)
    expected = brute_force(queue, z, k)
    assert positions.tolist() == expected
    assert neighbours.shape == (n, k, dim) and neighbours.dtype == dtype
    rows = [[unit(queue.embeddings[p].double().tolist()) for p in line] for line in expected]
    tolerance = 1e-6 if dtype == torch.float32 else 1e-14
    np.testing.assert_allclose(neighbours.numpy(), rows, rtol=0, atol=tolerance)


def test_nearest_finds_one_neighbour_unless_asked_for_more():
    queue, z = filled(20, 4), draw(8, 5, 4)
    neighbours, positions = queue.nearest(z)
    assert neighbours.shape == (5, 1, 4) and positions.tolist() == brute_force(queue, z, 1)


def test_nearest_in_float64_tells_apart_what_float32_cannot():
    queue = SupportSet(3, 2).double()
    angles = torch.tensor([2e-5, 1e-5, 3e-5], dtype=torch.float64)  # cosines differ by 2e-10
    queue.enqueue(torch.stack([angles.cos(), angles.sin()], dim=1))
    assert queue.embeddings.dtype == torch.float64 and queue.ids.dtype == torch.int64
    _, positions = queue.nearest(torch.tensor([[1.0, 0.0]], dtype=torch.float64), 3)
    order = queue.embeddings[positions[0], 1].tolist()
    assert order == pytest.approx([1e-5, 2e-5, 3e-5])


def test_nearest_gives_no_gradient_and_no_view_of_the_queue():
    queue, z = filled(10, 4), draw(9, 3, 4).requires_grad_()
    neighbours, _ = queue.nearest(z, 2)
    assert not neighbours.requires_grad and neighbours.grad_fn is None
    kept = neighbours.clone()
    queue.enqueue(draw(10, 10, 4))  # the loss may still need what was looked up before
    assert torch.equal(neighbours, kept)


def test_nearest_changes_neither_queue_nor_query():
    queue, z = filled(10, 4), draw(11, 3, 4)
    before, query = copy.deepcopy(queue.state_dict()), z.clone()
    queue.nearest(z, 3, exclude_ids=torch.tensor([0, 1, 2]))
    assert torch.equal(z, query)
    assert all(torch.equal(v, before[name]) for name, v in queue.state_dict().items())


@pytest.mark.parametrize("query_dtype", [torch.float32, torch.bfloat16])
def test_the_search_is_in_full_precision_inside_autocast(query_dtype):
    """Rows are 0.01 radians apart: the cosines differ by 1e-4 and more, which float32 resolves;
    bf16, which steps by 4e-3 below 1, cannot rank them.
    """
    angles = 0.01 * torch.from_numpy(np.random.default_rng(12).permutation(30) + 1)
    queue = SupportSet(30, 2)
    queue.enqueue(torch.stack([angles.cos(), angles.sin()], dim=1))
    z = torch.tensor([[1.0, 0.0], [30.0, -3.0], [0.1, -0.03]]).to(query_dtype)
    expected = brute_force(queue, z, 5)
    with torch.autocast("cpu", torch.bfloat16):
        neighbours, positions = queue.nearest(z, 5)
    assert neighbours.dtype == torch.float32
    assert positions.tolist() == expected
    torch.testing.assert_close(neighbours, queue.nearest(z.float(), 5)[0], rtol=0, atol=0)


# -- excluded images ------------------------------------------------------------------------------

IDS = [4, 0, 4, 2, 1, 4, -1, -1, 3, 0]  # image 4 three times, two rows of unknown images


@pytest.mark.parametrize("k", [1, 3, 7])
def test_exclude_ids_skips_a_rows_own_image_only(k):
    queue, z = filled(10, 4, ids=IDS), draw(15, 5, 4)
    own = [4, 0, 1, 9, 4]
    _, positions = queue.nearest(z, k, exclude_ids=torch.tensor(own))
    assert positions.tolist() == brute_force(queue, z, k, own)


def test_exclude_ids_takes_the_nearest_away():
    queue = filled(10, 4)
    z, ids = queue.embeddings.clone(), queue.ids.clone()
    assert queue.ids[queue.nearest(z)[1][:, 0]].tolist() == ids.tolist()  # each finds itself
    assert not (queue.ids[queue.nearest(z, 1, exclude_ids=ids)[1][:, 0]] == ids).any()


@pytest.mark.parametrize("kind", [torch.uint8, torch.int16, torch.int32])
def test_ids_of_any_integer_type(kind):
    queue = SupportSet(5, 3)
    z = torch.randn(3, 3)
    queue.enqueue(z, torch.tensor([1, 2, 3], dtype=kind))
    assert queue.ids.tolist() == [1, 2, 3, -1, -1]
    _, found = queue.nearest(z, 1, exclude_ids=torch.tensor([1, 2, 9], dtype=kind))
    assert found[2] == 2 and found[0] != 0 and found[1] != 1


@pytest.mark.parametrize("k", [1, 5])
def test_the_search_makes_no_copy_of_the_queue(k):
    from torch.utils._python_dispatch import TorchDispatchMode

    queue, made = SupportSet(2000, 64), []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if not isinstance(tensor, torch.Tensor):
                    continue
                memory = tensor.untyped_storage()
                if memory.data_ptr() != queue.embeddings.untyped_storage().data_ptr():
                    made.append(memory.nbytes())
            return out

    with Watch():
        queue.nearest(torch.randn(3, 64), k, exclude_ids=torch.tensor([1, 2, 3]))
    assert len(made) > 5 and max(made) < queue.embeddings.nbytes / 5


def test_exclude_ids_must_be_one_for_each_row():
    with pytest.raises(ValueError, match="one for each"):
        SupportSet(5, 3).nearest(torch.randn(2, 3), exclude_ids=torch.tensor([1]))


def test_an_unknown_image_excludes_nothing():
    """-1 is no id: a query without one must not lose the random rows of the start."""
    queue, z = filled(10, 4, ids=IDS), draw(16, 3, 4)
    _, positions = queue.nearest(z, 10, exclude_ids=torch.tensor([-1, -1, -1]))
    assert positions.tolist() == brute_force(queue, z, 10)


def test_too_few_remaining_entries_are_an_error():
    queue, z = filled(5, 3, ids=[0, 0, 1, 0, 2]), draw(17, 3, 3)
    own = torch.tensor([7, 0, 1])  # the second query has 2 entries left
    assert queue.nearest(z, 2, exclude_ids=own)[1].tolist() == brute_force(queue, z, 2, [7, 0, 1])
    with pytest.raises(ValueError):
        queue.nearest(z, 3, exclude_ids=own)


@pytest.mark.parametrize("exclude", [None, torch.tensor([7, 8])])
def test_more_neighbours_than_entries_are_an_error(exclude):
    queue = filled(4, 3)
    with pytest.raises(ValueError):
        queue.nearest(draw(18, 2, 3), 5, exclude_ids=exclude)


# -- saving ---------------------------------------------------------------------------------------


def assert_continues_alike(one, other):
    """Asserts equal contents now, and after enqueues that wrap: so the position is right too."""
    for step, batch in enumerate((3, 5, 4)):
        z, ids = draw(60 + step, batch, one.dim), torch.arange(batch) + 100 * step
        for a, b in zip(one.nearest(z, 4), other.nearest(z, 4), strict=True):
            assert torch.equal(a, b)
        for queue in (one, other):
            queue.enqueue(z, ids)
        assert torch.equal(one.embeddings, other.embeddings) and torch.equal(one.ids, other.ids)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_state_dict_continues_identically(dtype):
    queue = filled(7, 3, dtype=dtype)
    queue.enqueue(draw(19, 4, 3), torch.arange(4) + 30)
    state = copy.deepcopy(queue.state_dict())
    restored = SupportSet(7, 3, seed=9).to(dtype)
    restored.load_state_dict(state)
    assert_continues_alike(queue, restored)


@pytest.mark.parametrize("shared", [True, False])
def test_checkpoint_state_continues_identically(shared):
    queue = filled(7, 3, shared=shared)
    queue.enqueue(draw(20, 4, 3), torch.arange(4) + 30)
    file = io.BytesIO()
    torch.save(queue.checkpoint_state(), file)
    file.seek(0)
    restored = SupportSet(7, 3, seed=9, shared=shared)
    restored.load_checkpoint_state(torch.load(file, weights_only=True))
    assert_continues_alike(queue, restored)
