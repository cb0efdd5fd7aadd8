"""FNC: what it finds and its loss against loops written from the contract and against the released
code's matrices; its memory; whole runs against a plain float64 replay on the views that they saw.
"""

import copy
import math

import pytest
import torch
from replay import (
    BATCH,
    EPOCHS,
    STEPS,
    STEPS_PER_EPOCH,
    assert_states_are_close,
    watched_run,
    with_torchs_batch_norms,
)
from test_losses import draw
from test_ranks import two_ranks_are_one
from test_resume import assert_equal
from torch import nn

from common.errors import UserError
from common.run import checkpoint
from common.run.monitors import shares_found
from recipes import fnc
from recipes.fnc import Memory, false_negatives, fnc_loss
from recipes.simclr import nt_xent

FORMS = ["attract", "eliminate", "none"]


def cosine(a, b):
    """Returns the cosine of two rows, 0 for a row of zeros."""
    lengths = math.sqrt(math.fsum(x * x for x in a)) * math.sqrt(math.fsum(x * x for x in b))
    return math.fsum(x * y for x, y in zip(a, b, strict=True)) / lengths if lengths else 0.0


def unit(rows):
    return rows / rows.norm(dim=-1, keepdim=True)


def rows_of(views, keys=None):
    """Returns the columns as lists: views one after another, each with all its images."""
    return [row for view in views.tolist() for row in view] if keys is None else keys.tolist()


# -- what is found --------------------------------------------------------------------------------


def found_by_hand(views, keys=None, top_k=10, threshold=0.7, aggregate="max", key_views=None):
    """Sorts, image by image, the other images' columns by score, the first of equals first."""
    views, columns = views.tolist(), rows_of(views, keys)
    images, key_views = len(views[0]), key_views or len(views)
    mask = []
    for i in range(images):
        scores = {}
        for c, column in enumerate(columns):
            if c < key_views * images and c % images == i:
                continue
            cosines = [cosine(view[i], column) for view in views]
            scores[c] = max(cosines) if aggregate == "max" else math.fsum(cosines) / len(cosines)
        best = sorted(scores, key=lambda c: (-scores[c], c))[:top_k]
        mask.append([c in best and scores[c] > threshold for c in range(len(columns))])
    return torch.tensor(mask)


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize("top_k", [1, 3, 10, 1000])
@pytest.mark.parametrize("threshold", [-1.0, 0.2, 0.7])
def test_false_negatives_are_those_of_the_loop(threshold, top_k, aggregate):
    how = top_k, threshold, aggregate
    for shape in ((1, 5, 2), (2, 7, 3), (4, 6, 5), (10, 3, 4)):
        views = draw(1, *shape)
        keys = torch.cat([draw(2, shape[0] * shape[1], shape[2]), draw(3, 9, shape[2])])
        keys[-4:] = 0  # a memory that is not full
        for columns in (None, keys):
            ours = false_negatives(views, columns, *how)
            assert ours.dtype == torch.bool
            assert torch.equal(ours, found_by_hand(views, columns, *how)), shape
            assert ours.sum(dim=1).max() <= top_k


@pytest.mark.parametrize("aggregate", ["max", "mean"])
@pytest.mark.parametrize("threshold", [-1.0, -0.5, 0.0, 0.5, 1.0])
def test_of_equal_scores_the_first_columns_are_taken_and_the_threshold_is_not(threshold, aggregate):
    """Rows lie along few axes: all cosines are -1, 0 or 1, and so exact."""
    generator = torch.Generator().manual_seed(7)
    axes = torch.cat([torch.eye(3), -torch.eye(3), torch.zeros(2, 3)]).double()
    lengths = torch.tensor([0.25, 1.0, 8.0]).double()

    def drawn(*shape):
        row = torch.randint(len(axes), shape, generator=generator)
        return axes[row] * lengths[torch.randint(3, (*shape, 1), generator=generator)]

    for top_k in (1, 2, 5, 40):
        views, keys = drawn(2, 9), drawn(25)
        for columns in (None, keys):
            how = top_k, threshold, aggregate
            ours = false_negatives(views, columns, *how)
            assert torch.equal(ours, found_by_hand(views, columns, *how))
            assert threshold < 1 or not ours.any()


def test_a_copy_of_an_image_is_found_at_any_threshold_below_1():
    views = draw(4, 3, 5, 6)
    views[1, 2] = 1e3 * views[0, 4]
    mask = false_negatives(views, threshold=1 - 1e-12)
    assert mask.nonzero().tolist() == [[2, 4], [4, 5 + 2]]
    assert not false_negatives(views, threshold=1.0).any()


def test_defaults_are_the_codes():
    views = draw(5, 10, 6, 3)
    assert torch.equal(false_negatives(views), found_by_hand(views, None, 10, 0.7, "max"))


def test_support_views_search_among_columns_of_fewer_or_more_views():
    for support, main in ((8, 2), (1, 2)):
        views, keys = draw(6, support, 5, 3), draw(7, main * 5 + 4, 3)
        ours = false_negatives(views, keys, 4, 0.1, key_views=main)
        assert torch.equal(ours, found_by_hand(views, keys, 4, 0.1, "max", main))
        own = torch.arange(5)
        assert ours.any() and not ours[own, own].any() and not ours[own, 5 + own].any()


def test_what_cannot_be_searched_is_refused():
    views = draw(8, 2, 4, 3)
    with pytest.raises(ValueError, match="not median of 10"):
        false_negatives(views, aggregate="median")
    with pytest.raises(ValueError, match="max of 0"):
        false_negatives(views, top_k=0)
    with pytest.raises(ValueError, match="7 keys do not begin with 2 views of 4 images"):
        false_negatives(views, draw(9, 7, 3))
    assert not false_negatives(views.requires_grad_()).requires_grad


# -- the loss -------------------------------------------------------------------------------------


def loss_by_hand(views, mask, temperature, form, keys=None):
    """Computes the loss anchor by anchor, on lists."""
    columns, mask = rows_of(views, keys), mask.tolist()
    views, losses = views.tolist(), []
    number, images = len(views), len(views[0])
    for v in range(number):
        for i in range(images):
            own = v * images + i
            s = {c: cosine(views[v][i], column) for c, column in enumerate(columns)}
            pulled = [u * images + i for u in range(number) if u != v]
            found = [c for c in s if mask[i][c] and form != "none"]
            among = [c for c in s if c != own and not (form == "eliminate" and c in found)]
            if form == "attract":
                pulled += found
            most = max(s[c] / temperature for c in among)
            total = math.log(math.fsum(math.exp(s[c] / temperature - most) for c in among))
            losses.append(
                most + total - math.fsum(s[c] / temperature for c in pulled) / len(pulled)
            )
    return math.fsum(losses) / len(losses)


def random_mask(seed, views, images, columns, share=0.4):
    """Draws a mask of other images' columns; one row is empty."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(images, columns, generator=generator) < share
    for v in range(views):
        mask[torch.arange(images), v * images + torch.arange(images)] = False
    mask[0] = False
    return mask


def cases(shape):
    """Yields (views, mask, keys) without keys and with them, whose last rows are zeros."""
    views, images, dim = shape
    z, own = draw(1, *shape), views * images
    keys = torch.cat([draw(2, own, dim), draw(3, 6, dim), torch.zeros(3, dim).double()])
    yield z, random_mask(1, views, images, own), None
    yield z, random_mask(2, views, images, len(keys)), keys


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.003, 0.1, 0.5, 40.0])
def test_loss_is_that_of_the_loop(temperature, form):
    for shape in ((2, 1, 3), (2, 6, 4), (3, 5, 2), (10, 4, 7)):
        for z, mask, keys in cases(shape):
            value = fnc_loss(z, mask, temperature, form, keys)
            assert value.dtype == torch.float64
            expected = loss_by_hand(z, mask, temperature, form, keys)
            assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-11), shape


def test_defaults_attract_at_a_tenth():
    z, mask, _ = next(cases((3, 5, 4)))
    assert fnc_loss(z, mask).item() == pytest.approx(loss_by_hand(z, mask, 0.1, "attract"))
    assert fnc_loss(z, mask).item() != pytest.approx(
        fnc_loss(z, mask, form="none").item(), rel=0.01
    )


@pytest.mark.parametrize("temperature", [0.05, 0.1, 2.0])
def test_two_views_without_false_negatives_are_simclr(temperature):
    z = draw(4, 2, 7, 5)
    expected = nt_xent(*z, temperature).item()
    nothing = torch.zeros(7, 14, dtype=torch.bool)
    for form in FORMS:
        assert fnc_loss(z, nothing, temperature, form).item() == pytest.approx(expected, rel=1e-12)
    assert fnc_loss(z, None, temperature, "none").item() == pytest.approx(expected, rel=1e-12)


def test_attracted_columns_stay_in_the_denominator_and_eliminated_ones_do_not():
    """Images are orthogonal; one column is masked, at cosine 0 to its anchors."""
    z = torch.eye(3).double().expand(2, 3, 3)
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 4] = True
    e = math.exp(10)
    plain = math.log(e + 4) - 10  # of the images without a false negative
    attract = (2 * (math.log(e + 4) - 10 / 2) + 4 * plain) / 6
    eliminate = (2 * (math.log(e + 3) - 10) + 4 * plain) / 6
    assert fnc_loss(z, mask, 0.1, "attract").item() == pytest.approx(attract, rel=1e-12)
    assert fnc_loss(z, mask, 0.1, "eliminate").item() == pytest.approx(eliminate, rel=1e-9)


def loss_as_tensors(views, mask, temperature, form, keys=None):
    """Computes the same for autograd, one anchor at a time."""
    z = torch.stack([torch.stack([r / r.square().sum().sqrt() for r in view]) for view in views])
    columns = z.flatten(0, 1)
    if keys is not None:
        lengths = keys.square().sum(dim=1, keepdim=True).sqrt()
        columns = torch.where(lengths > 0, keys / lengths, keys).detach()
    number, images = z.shape[:2]
    total = 0
    for v in range(number):
        for i in range(images):
            s = [z[v, i] @ column / temperature for column in columns]
            found = mask[i].nonzero()[:, 0].tolist() if form != "none" else []
            among = {*range(len(s))} - {v * images + i} - {*(found if form == "eliminate" else [])}
            pulled = [u * images + i for u in range(number) if u != v]
            pulled += found if form == "attract" else []
            among = torch.stack([s[c] for c in sorted(among)]).logsumexp(0)
            total = total + among - torch.stack([s[c] for c in pulled]).mean()
    return total / (number * images)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.05, 2.0])
@pytest.mark.parametrize("shape", [(2, 4, 5), (4, 3, 2)])
def test_gradients_are_those_of_the_loop(shape, temperature, form):
    for z, mask, keys in cases(shape):
        z = 0.3 * z / z.norm(dim=2, keepdim=True)
        z.requires_grad_()
        tracked = None if keys is None else keys.requires_grad_()
        ours = torch.autograd.grad(fnc_loss(z, mask, temperature, form, tracked), z)[0]
        keys = None if keys is None else keys.detach()
        expected = torch.autograd.grad(loss_as_tensors(z, mask, temperature, form, keys), z)[0]
        torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-12)
        assert (ours.norm(dim=2) > 0).all()  # each view is an anchor


def test_keys_get_no_gradient():
    z, mask, keys = [*cases((2, 4, 5))][1]
    fnc_loss(z.requires_grad_(), mask, keys=keys.requires_grad_()).backward()
    assert keys.grad is None and z.grad.any()


def test_gradient_at_ties_is_finite():
    z = torch.ones(3, 4, 5, dtype=torch.float64, requires_grad=True)
    for form in FORMS:
        fnc_loss(z, random_mask(3, 3, 4, 12), 0.001, form).backward()
    assert torch.isfinite(z.grad).all()


def test_loss_and_search_are_never_computed_in_less_than_float32():
    z, mask, _ = next(cases((3, 6, 5)))
    z = (z / z.norm(dim=2, keepdim=True)).bfloat16()
    expected, found = fnc_loss(z.float(), mask), false_negatives(z.float(), threshold=0.1)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(fnc_loss(z, mask), expected)
        assert torch.equal(false_negatives(z, threshold=0.1), found)
    assert expected.dtype == torch.float32
    exact = fnc_loss(z.double(), mask, 0.004).item()  # exp(250) does not fit float32
    assert fnc_loss(z.float(), mask, 0.004).item() == pytest.approx(exact, rel=1e-5)


def test_what_is_no_loss_is_refused():
    z, mask, _ = next(cases((2, 4, 3)))
    with pytest.raises(ValueError, match="unknown form attraction"):
        fnc_loss(z, mask, form="attraction")
    with pytest.raises(ValueError, match="needs two views"):
        fnc_loss(z[:1], mask)
    with pytest.raises(ValueError, match=r"a mask \(4, 7\) of 4 images, 8 columns"):
        fnc_loss(z, mask[:, :7])
    with pytest.raises(ValueError, match="5 keys do not begin with 2 views of 4 images"):
        fnc_loss(z, mask, keys=draw(1, 5, 3))


LARGE = 1e9  # objective.py's LARGE_NUM


def searched_in_matrices(searching, columns, top_k, threshold, aggregate, key_views):
    """Computes objective.py's mask for one replica, of unit rows (V,N,D), (C,D)."""
    images = searching.shape[1]
    own = torch.zeros(images, len(columns), dtype=columns.dtype)
    own[:, : key_views * images] = torch.eye(images, dtype=columns.dtype).repeat(1, key_views)
    scores = torch.einsum("vnd,cd->vnc", searching, columns)
    scores = (scores.amax(0) if aggregate == "max" else scores.mean(0)) - LARGE * own
    ranks = scores.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    return (ranks < top_k) & (scores > threshold)


def loss_in_matrices(z, columns, mask, temperature, form):
    """Computes objective.py's loss for one replica, as the mean over anchors; of unit rows."""
    views, images = z.shape[:2]
    eye, mask = torch.eye(images, dtype=z.dtype), mask.to(z.dtype)
    pulled, total = mask if form == "attract" else 0 * mask, 0
    for v in range(views):
        anchor, own = torch.zeros_like(mask), torch.zeros_like(mask)
        anchor[:, v * images : (v + 1) * images] = eye
        own[:, : views * images] = eye.repeat(1, views)
        logits = z[v] @ columns.T / temperature
        numerator = (logits * (own - anchor + pulled)).sum(1) / (views - 1 + pulled.sum(1))
        left_out = anchor + mask if form == "eliminate" else anchor
        total = total + ((logits - LARGE * left_out).logsumexp(1) - numerator).mean()
    return total / views


def test_search_and_loss_are_the_released_codes():
    """Many views lie near each other, so that a part of them is found."""
    centres = draw(1, 1, 6, 4, spread=0)[0]
    z, ema = (unit(centres + 0.8 * draw(seed, 10, 6, 4, spread=0)) for seed in (2, 3))
    older = unit(draw(4, 24, 4))
    older[-8:] = 0
    for searching, keys in ((z, None), (ema, torch.cat([ema.flatten(0, 1), older]))):
        columns = z.flatten(0, 1) if keys is None else keys
        mask = false_negatives(searching, keys)
        assert torch.equal(mask, searched_in_matrices(searching, columns, 10, 0.7, "max", 10))
        assert 6 < mask.sum() <= 60 and (keys is None or mask[:, 60:].any())
        assert keys is None or not mask[:, -8:].any()
        for form in FORMS:
            expected = loss_in_matrices(z, columns, mask, 0.1, form).item()
            ours = fnc_loss(5 * z, mask, 0.1, form, None if keys is None else 5 * keys)
            assert ours.item() == pytest.approx(expected, rel=1e-9)


# -- memory and metrics ---------------------------------------------------------------------------


def test_the_memory_has_the_latest_batch_in_front():
    memory, put = Memory(7, 2).double(), draw(1, 3, 4, 2)
    assert not memory.rows.any() and memory.ids.tolist() == [-1] * 7
    for number, rows in enumerate(put):
        memory.put(rows, torch.arange(4) + 10 * number)
    assert torch.equal(memory.rows, torch.cat([put[2], put[1, :3]]))
    assert memory.ids.tolist() == [20, 21, 22, 23, 10, 11, 12]
    again = Memory(7, 2).double()
    again.load_state_dict(copy.deepcopy(memory.state_dict()))
    assert torch.equal(again.rows, memory.rows) and torch.equal(again.ids, memory.ids)


def test_shares_found_are_plain_counts():
    labels = torch.tensor([0, 0, 1, 1, 2])
    ids, columns = torch.tensor([0, 2]), torch.tensor([0, 2, 1, 3, 4, -1])
    others = torch.tensor([[0, 1, 1, 1, 1, 0], [1, 0, 1, 1, 1, 0]]).bool()
    mask = torch.tensor([[0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 0, 1]]).bool()
    shares = shares_found(mask, others, ids, columns, labels)
    # of 8 columns 3 are found, of which images 1 and 3 are of the label; chance: 1 of 4 each
    expected = {"found_share": 3 / 8, "found_precision": 2 / 3, "found_chance": 2 / 8}
    assert {n: v.item() for n, v in shares.items()} == pytest.approx(expected)
    assert [*shares_found(mask, others, ids, columns, None)] == ["found_share"]
    nothing = shares_found(mask & False, others, ids, columns, labels)
    assert nothing["found_share"] == 0 and math.isnan(nothing["found_precision"])


# -- runs -----------------------------------------------------------------------------------------

FLAGS = ["--warmup-epochs", "1", "--output-dim", "12", "--lr", "0.3", "--weight-decay", "1e-3"]
FLAGS += ["--projector-hidden", "24", "--support-views", "2", "--threshold", "0.4", "--top-k", "5"]
MORE = ["--momentum", "0.9"]
CASES = {  # flags; anchors, memory, form, aggregate, factor
    "paper": ([], 2, 0, "attract", "max", 1),
    "official": (["--follow", "official", "--memory", "5", *MORE], 4, 5, "attract", "max", 2),
    "eliminate": (["--cancel", "eliminate", "--aggregate", "mean"], 2, 0, "eliminate", "mean", 1),
    "memory": (["--memory", "3", "--cancel", "eliminate", *MORE], 2, 3, "eliminate", "max", 1),
    "all": (["--anchors", "all"], 4, 0, "attract", "max", 1),
    "none": (["--cancel", "none"], 2, 0, "none", "max", 1),
}
LONG = ("eliminate", "memory", "all", "none")


def projections(network, views):
    """Runs one forward: batch norms see all views together."""
    return network(torch.cat(views)).unflatten(0, (len(views), -1))


@pytest.mark.parametrize(
    "case", [pytest.param(c, marks=pytest.mark.long) if c in LONG else c for c in CASES]
)
def test_a_run_is_its_replay(case, tmp_path, monkeypatch):
    """The replay shows which views are anchors, search and are columns; the joint batch statistics
    of each forward; the momentum encoder's own start; the memory; the rate inside the momentum.
    """
    flags, anchors, size, form, aggregate, factor = CASES[case]
    seen = watched_run(fnc, [*FLAGS, *flags], tmp_path / "run", monkeypatch)
    before, after = (seen[n] for n in ("before", "after"))
    network = nn.Sequential(before["model"].encoder, before["model"].projector)
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    assert {n for n, _ in network.named_parameters()} - trained == {"1.7.bias"}
    network = with_torchs_batch_norms(network)
    weights = [p for n, p in network.named_parameters() if n in trained]
    velocities = [torch.zeros_like(w) for w in weights]
    target = before.get("target")
    assert (target is None) == (size == 0) == ("memory" not in before)
    if target:
        assert not torch.equal(target.encoder[0].weight, network[0][0].weight)  # no copy
        target = with_torchs_batch_norms(target)
        memory = torch.zeros(size * BATCH, 12).double()
    base = 0.3 * math.sqrt(BATCH)
    assert len(seen["views"]) == STEPS
    for step, views in enumerate(seen["views"]):
        assert len(views) == (2 if case == "none" else 4)
        rate = base * step / STEPS_PER_EPOCH
        if step >= STEPS_PER_EPOCH:
            done = (step - STEPS_PER_EPOCH) / (STEPS_PER_EPOCH * (EPOCHS - 1))
            rate = base * (1 + math.cos(math.pi * done)) / 2
        z = unit(projections(network, views[:anchors]))
        keys = None
        with torch.no_grad():
            if target:
                searching = unit(projections(target, views))
                memory = torch.cat([*searching[:anchors], memory])[: size * BATCH]
                keys = memory
                searching = searching if anchors == 4 else searching[2:]
            elif anchors == 4 or case == "none":
                searching = z
            else:
                searching = unit(projections(network, views[2:]))
        columns = torch.cat([*z]) if keys is None else keys
        how = 5, 0.4, aggregate, anchors
        mask = searched_in_matrices(searching.detach(), columns.detach(), *how)
        loss = factor * loss_in_matrices(z, columns, mask, 0.1, form)
        logged = seen["logged"][step]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-8)
        assert logged["lr"] == pytest.approx(rate, rel=1e-12)
        if form == "none":
            assert "found_share" not in logged
        else:
            known = len(columns) if keys is None else int((keys != 0).any(dim=1).sum())
            share = mask.sum().item() / (BATCH * (known - anchors))
            assert logged["found_share"] == pytest.approx(share, rel=1e-12) and share > 0
            assert logged["found_precision"] > logged["found_chance"] > 0
        for w, g, v in zip(weights, torch.autograd.grad(loss, weights), velocities, strict=True):
            with torch.no_grad():
                if w.ndim > 1:
                    g = g + 1e-3 * w
                    g = g * (0.001 * w.norm() / g.norm())
                v.mul_(0.9).add_(rate * g)
                w.sub_(v)
        if target:
            with torch.no_grad():
                online = dict(network.named_parameters())
                for (_, w), o in zip(target.named_parameters(), online.values(), strict=True):
                    w.mul_(0.9).add_(0.1 * o)
    pairs = [(nn.Sequential(after["model"].encoder, after["model"].projector), network)]
    assert_states_are_close(pairs + ([(after["target"], target)] if target else []))
    if target:
        torch.testing.assert_close(unit(after["memory"].rows), memory, rtol=1e-7, atol=1e-9)


OFFICIAL = ["--follow", "official", "--memory", "6", "--top-k", "3", "--momentum", "0.9"]


@pytest.mark.long
@pytest.mark.parametrize("flags", [OFFICIAL, [*OFFICIAL, "--anchors", "main"]], ids=str)
def test_memory_and_momentum_on_two_ranks(flags, tmp_path):
    two_ranks_are_one(tmp_path, "fnc", *flags)


@pytest.mark.long
def test_all_views_as_anchors_on_two_ranks(tmp_path):
    two_ranks_are_one(tmp_path, "fnc", "--anchors", "all", "--cancel", "eliminate")


@pytest.mark.long
def test_memory_and_momentum_go_on_after_a_stop(tmp_path):
    """They do so within an epoch: seven steps at once are three and then four more."""
    small = ["--dataset", "photos", "--batch-size", "36", "--workers", "0", "--knn-every", "0"]
    small += ["--output-dim", "12", "--projector-hidden", "16", *OFFICIAL]
    for name, steps in (("whole", [7]), ("cut", [3, 7])):
        for number in steps:
            fnc.main([*small, "--max-steps", str(number), "--output", str(tmp_path / name)])
    whole, cut = (
        checkpoint.load(tmp_path / n / "checkpoint.pt")["state"] for n in ("whole", "cut")
    )
    assert whole["memory"]["rows"].any() and (whole["memory"]["ids"] >= 0).all()
    assert_equal(whole, cut, "state")


# -- settings -------------------------------------------------------------------------------------

PAPER = dict(
    arch="resnet50",
    image_size=224,
    epochs=1000,
    batch_size=4096,
    lr=0.1,
    lr_scaling="sqrt",
    optimizer="classic_lars",
    sgd_momentum=0.9,
    weight_decay=1e-4,
    warmup_epochs=10,
    temperature=0.1,
    projector_layers=3,
    output_dim=128,
    zero_init_residual=True,
    support_views=8,
    cancel="attract",
    top_k=10,
    threshold=0.7,
    aggregate="max",
    loss="paper",
    anchors="main",
    memory=0,
)
CODE = PAPER | dict(loss="official", anchors="all", memory=16, momentum=0.999)
CIFAR10 = PAPER | dict(
    arch="resnet18_cifar",
    image_size=32,
    batch_size=512,
    lr=1.0,
    lr_scaling="linear",
    lr_batch=256,
    weight_decay=1e-6,
    temperature=0.5,
)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ([], PAPER),
        (["--follow", "official"], CODE),
        (["--dataset", "cifar10"], CIFAR10),
        (["--dataset", "photos"], dict(arch="tiny", epochs=10, batch_size=64, support_views=2)),
    ],
    ids=str,
)
def test_presets(flags, expected):
    config = fnc.parse_arguments(flags)
    assert {n: getattr(config, n) for n in expected} == expected
    assert config.settings == {}
    views = fnc.views_of(config)
    assert len(views) == 2 + config.support_views and len({*views}) == 1
    small = config.views == "cifar"
    assert views[0].jitter == tuple((0.5 if small else 1) * s for s in (0.8, 0.8, 0.8, 0.2))
    assert (views[0].blur_p, views[0].scale) == (0 if small else 0.5, (0.08, 1.0))


@pytest.mark.parametrize(
    ("flags", "views"),
    [
        ("--cancel none", 2),
        ("--cancel none --anchors all", 10),
        ("--support-views 0", 2),
        ("--views byol --support-views 3", 5),
    ],
)
def test_views_that_nobody_uses_are_not_drawn(flags, views):
    found = fnc.views_of(fnc.parse_arguments(flags.split()))
    assert len(found) == views
    assert all(view == found[number % 2] for number, view in enumerate(found))


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--memory 1", "--memory 1: it must hold the 2 views of a batch"),
        ("--follow official --memory 9", "--memory 9: it must hold the 10 views of a batch"),
        ("--lr-batch 512", r"--lr-scaling sqrt does not read it.*leave it out$"),
        ("--threshold 1.5", "--threshold 1.5: must lie between -1 and 1"),
        ("--top-k 0", "--top-k 0: must be above 0"),
    ],
)
def test_flags_that_cannot_be_meant_are_refused(flags, said):
    with pytest.raises(UserError, match=said):
        fnc.parse_arguments(flags.split())
    assert fnc.parse_arguments(["--dataset", "photos", "--lr-batch", "0"]).lr_batch == 0


def test_the_projector_is_the_codes():
    """It is model_util.py's, with 512, not 2048: three layers, and a scale alone at the end."""
    model = fnc.FNC(fnc.parse_arguments(["--arch", "resnet18"]))
    linears = [m for m in model.projector if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linears] == [
        (512, 512),
        (512, 512),
        (512, 128),
    ]
    assert all(m.bias is None for m in linears)
    assert linears[0].weight.std().item() == pytest.approx(0.01, rel=0.02)
    norms = [m for m in model.projector if isinstance(m, nn.BatchNorm1d)]
    assert [m.bias.requires_grad for m in norms] == [True, True, False]
    assert not any(block.bn2.weight.any() for block in model.encoder.layer2)
