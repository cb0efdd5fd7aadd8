"""Guided stop-gradient against a literal loop over Algorithm 1, and the pairings it is given."""

import dataclasses
import itertools
import math

import numpy as np
import pytest
import torch
from conftest import run_ranks
from test_losses import cosine, draw
from test_ranks import STEPS, run_on, step_losses, two_ranks_are_one

from common.errors import UserError
from common.fast.micro_batch import Pieces
from common.pairs import draw_pairs
from common.run import metrics
from recipes import byol_gsg, simsiam_gsg
from recipes.simsiam_gsg import gsg_loss

BOTH = pytest.mark.parametrize("recipe", [simsiam_gsg, byol_gsg])
NAMES = ("p11", "p12", "p21", "p22", "z11", "z12", "z21", "z22")


def distance(a, b):
    return math.sqrt(sum((x - y) ** 2 for x, y in zip(a, b, strict=True)))


def algorithm_1(p11, p12, p21, p22, z11, z12, z21, z22, pairs, taken=None):
    """Follows the paper's pseudo-code, line by line: one pair after another, on Python floats."""
    lists = [t.tolist() for t in (p11, p12, p21, p22, z11, z12, z21, z22)]
    losses = []
    for i, j in enumerate(pairs):
        first = [t[i] for t in lists]
        second = [t[j] for t in lists]
        p11, p12, _, _, z11, z12, _, _ = first  # of x1
        _, _, p21, p22, _, _, z21, z22 = second  # of x2
        d1121, d1122 = distance(z11, z21), distance(z11, z22)
        d1221, d1222 = distance(z12, z21), distance(z12, z22)
        m = min(d1121, d1122, d1221, d1222)
        if d1121 == m:
            branch, loss = 0, -cosine(p11, z12) - cosine(p21, z22)
        elif d1122 == m:
            branch, loss = 1, -cosine(p11, z12) - cosine(p22, z21)
        elif d1221 == m:
            branch, loss = 2, -cosine(p12, z11) - cosine(p21, z22)
        else:
            branch, loss = 3, -cosine(p12, z11) - cosine(p22, z21)
        losses.append(0.5 * loss)
        if taken is not None:
            taken.append(branch)
    return sum(losses) / len(losses)


def views(n, d, seed=0, spread=1.0):
    return [draw(seed + i, n, d, spread=spread) for i in range(8)]


def permutation(n, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).permutation(n))


# -- the loss -------------------------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 5), (7, 2), (40, 6)])
def test_gsg_loss_is_algorithm_1(recipe, n, d):
    tensors = views(n, d)
    for pairs in (permutation(n), permutation(n, 1), torch.arange(n).roll(1)):
        expected = algorithm_1(*tensors, pairs.tolist())
        assert recipe.gsg_loss(*tensors, pairs).item() == pytest.approx(expected, rel=1e-11)
    expected = algorithm_1(*tensors, range(n))
    assert recipe.gsg_loss(*tensors).item() == pytest.approx(expected, rel=1e-11)


@BOTH
def test_all_four_branches_are_taken_and_told_apart(recipe):
    tensors, pairs = views(40, 6), permutation(40)
    taken = []
    algorithm_1(*tensors, pairs.tolist(), taken)
    assert set(taken) == {0, 1, 2, 3}
    distances = recipe.guiding_distances(*tensors[4:], pairs)
    assert distances.argmin(dim=1).tolist() == taken
    for branch in range(4):  # pair by pair, so that errors of two branches cannot cancel
        i = taken.index(branch)
        places = [i, i, pairs[i], pairs[i]] * 2
        row = [t[None, place] for t, place in zip(tensors, places, strict=True)]
        assert recipe.gsg_loss(*row).item() == pytest.approx(algorithm_1(*row, [0]), rel=1e-11)


# z11, z12, z21, z22 in a plane, and the branch; none is at zero, which has no cosine
TIES = {
    "all": ([0.0, 0.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0], 0),
    "11,21 and 12,22": ([0.0, 0.0], [5.0, 0.0], [1.0, 0.0], [6.0, 0.0], 0),
    "11,22 and 12,21": ([0.0, 0.0], [5.0, 0.0], [6.0, 0.0], [1.0, 0.0], 1),
    "11,22 and 12,22": ([0.0, 0.0], [2.0, 0.0], [1.0, 9.0], [1.0, 0.0], 1),
    "12,21 and 12,22": ([9.0, 0.0], [0.0, 0.0], [0.0, 1.0], [0.0, -1.0], 2),
}


@BOTH
@pytest.mark.parametrize("case", TIES)
def test_a_tie_goes_to_the_first_branch(recipe, case):
    *z, branch = TIES[case]
    z = [torch.tensor([row], dtype=torch.float64) + torch.tensor([3.0, 7.0]) for row in z]
    p = views(1, 2, seed=50)[:4]
    taken = []
    expected = algorithm_1(*p, *z, [0], taken)
    assert taken == [branch]
    assert recipe.guiding_distances(*z).argmin(dim=1).tolist() == [branch]
    assert recipe.gsg_loss(*p, *z).item() == pytest.approx(expected, rel=1e-11)


@BOTH
def test_distances_are_of_unnormalised_projections(recipe):
    """Nearest in angle and nearest in space differ here: 11,21 by angle, 12,22 in space."""
    z11, z12 = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    z21, z22 = torch.tensor([[100.0, 1.0]]), torch.tensor([[0.5, 1.0]])
    distances = recipe.guiding_distances(z11, z12, z21, z22)
    assert distances[0].tolist() == pytest.approx([math.hypot(99, 1), math.hypot(0.5, 1), 100, 0.5])
    assert distances.argmin(dim=1).item() == 3


@BOTH
def test_gradient_reaches_the_chosen_predictions_only(recipe):
    tensors, pairs = [t.requires_grad_() for t in views(12, 4)], permutation(12)
    p, z = tensors[:4], tensors[4:]
    taken = []
    algorithm_1(*tensors, pairs.tolist(), taken)
    assert set(taken) == {0, 1, 2, 3}
    recipe.gsg_loss(*tensors, pairs).backward()
    assert all(t.grad is None for t in z)
    inverse = pairs.argsort()
    for i in range(12):
        of_x1, of_x2 = taken[i], taken[inverse[i]]
        chosen = (of_x1 < 2, of_x1 >= 2, of_x2 % 2 == 0, of_x2 % 2 == 1)
        for t, is_source in zip(p, chosen, strict=True):
            assert (t.grad[i].norm() > 1e-6) == is_source
    assert torch.autograd.gradcheck(lambda *p: recipe.gsg_loss(*p, *z, pairs), p)


@BOTH
def test_distances_already_known_change_nothing(recipe):
    tensors, pairs = views(9, 3), permutation(9)
    known = recipe.guiding_distances(*tensors[4:], pairs)
    assert recipe.gsg_loss(*tensors, pairs, known).item() == recipe.gsg_loss(*tensors, pairs).item()


@BOTH
@pytest.mark.parametrize("length", [3, 5])
def test_pairs_of_another_length_are_refused(recipe, length):
    with pytest.raises(ValueError, match="one number for each"):
        recipe.gsg_loss(*views(4, 3), torch.arange(length))


@BOTH
@pytest.mark.parametrize("pairs", [[0, 0, 1], [1, 2, 3]])
def test_pairs_that_are_no_permutation_are_refused(recipe, pairs):
    with pytest.raises(ValueError, match="no permutation"):
        recipe.gsg_loss(*torch.randn(8, 3, 5), pairs=torch.tensor(pairs))


@BOTH
def test_symmetric_loss_of_the_baselines(recipe):
    p1, p2, z1, z2 = (t.requires_grad_() for t in views(6, 4)[:4])
    lists = [t.tolist() for t in (p1, p2, z1, z2)]
    terms = [-cosine(a, d) / 2 - cosine(b, c) / 2 for a, b, c, d in zip(*lists, strict=True)]
    loss = recipe.symmetric_loss(p1, p2, z1, z2)
    assert loss.item() == pytest.approx(sum(terms) / 6, rel=1e-11)
    loss.backward()
    assert z1.grad is None and z2.grad is None and (p1.grad.norm(dim=1) > 1e-6).all()


def test_without_the_stop_gradient_targets_get_gradient_too():
    p1, p2, z1, z2 = (t.requires_grad_() for t in views(6, 4)[:4])
    with_stop = simsiam_gsg.symmetric_loss(p1, p2, z1, z2)
    loss = simsiam_gsg.symmetric_loss(p1, p2, z1, z2, stop_gradient=False)
    assert loss.item() == with_stop.item()
    loss.backward()
    assert all((t.grad.norm(dim=1) > 1e-6).all() for t in (p1, p2, z1, z2))


def test_gsg_without_a_stop_gradient_is_refused():
    with pytest.raises(UserError, match="--no-stop-gradient needs --no-gsg"):
        simsiam_gsg.parse_arguments(["--no-stop-gradient"])
    assert not simsiam_gsg.parse_arguments(["--no-gsg", "--no-stop-gradient"]).stop_gradient


@BOTH
def test_without_a_predictor_the_projections_are_the_predictions(recipe):
    name = "SimSiam" if recipe is simsiam_gsg else "BYOL"
    small = ["--dataset", "photos", "--projector-hidden", "16", "--output-dim", "8"]
    with_one, without = (
        getattr(recipe, name)(recipe.parse_arguments([*small, *flags]))
        for flags in ([], ["--no-predictor"])
    )
    z = torch.randn(4, 8)
    assert without.predictor(z) is z
    shapes = [
        {n: t.shape for n, t in model.state_dict().items() if not n.startswith("predictor")}
        for model in (with_one, without)
    ]
    assert shapes[0] == shapes[1] and "projector.4.weight" in shapes[1]  # its output batch norm


@BOTH
def test_statistics_count_the_choices(recipe):
    distances = torch.tensor([[1.0, 2, 3, 4], [2, 1, 3, 4], [5, 2, 3, 4], [4, 3, 2, 1]])
    statistics = recipe.choice_statistics(distances)
    assert [statistics[f"choice_{n}"].item() for n in recipe.CHOICES] == [0.25, 0.5, 0, 0.25]
    assert [statistics[f"distance_{n}"].item() for n in recipe.CHOICES] == [3, 2, 2.75, 3.25]


@pytest.mark.parametrize("method", ["SimSiam-GSG", "BYOL-GSG"])
def test_a_run_logs_the_choices(method, run_of):
    steps = [r for r in metrics.read(run_of(method) / "metrics.jsonl") if r["kind"] == "step"]
    for step in steps:
        shares = [step[f"choice_{name}"] for name in ("11_21", "11_22", "12_21", "12_22")]
        assert sum(shares) == pytest.approx(1) and step["distance_11_21"] > 0


# -- pairings -------------------------------------------------------------------------------------


@pytest.mark.parametrize("pairing", ["global", "local", "derangement"])
@pytest.mark.parametrize(("batch", "ranks"), [(2, 1), (8, 1), (8, 2), (24, 3)])
def test_pairs_are_a_permutation_of_their_own_step(pairing, batch, ranks):
    drawn = [draw_pairs(pairing, batch, ranks, 3, step) for step in range(50)]
    for step, pairs in enumerate(drawn):
        assert sorted(pairs.tolist()) == [*range(batch)]
        assert torch.equal(pairs, draw_pairs(pairing, batch, ranks, 3, step))
        if pairing == "derangement":
            assert (pairs != torch.arange(batch)).all()
        if pairing == "local":
            assert torch.equal(pairs // (batch // ranks), torch.arange(batch) // (batch // ranks))
    if batch > 2:
        assert len({tuple(pairs.tolist()) for pairs in drawn}) > 5
        other_seed = [draw_pairs(pairing, batch, ranks, 4, step) for step in range(50)]
        assert sum(torch.equal(a, b) for a, b in zip(drawn, other_seed, strict=True)) < 25


@pytest.mark.parametrize("pairing", ["global", "derangement"])
def test_pairs_do_not_depend_on_the_number_of_ranks(pairing):
    drawn = [draw_pairs(pairing, 24, ranks, 0, 7).tolist() for ranks in (1, 2, 3)]
    assert drawn[0] == drawn[1] == drawn[2]


@pytest.mark.parametrize(("pairing", "kinds"), [("global", 24), ("local", 24), ("derangement", 9)])
def test_every_permutation_is_as_likely(pairing, kinds):
    """4 images have 24 permutations, 9 of them derangements: chi-square holds at 1 in 10 000."""
    counts: dict = dict.fromkeys(itertools.permutations(range(4)), 0)
    for step in range(4800):
        counts[tuple(draw_pairs(pairing, 4, 1, 0, step).tolist())] += 1
    seen = [count for count in counts.values() if count]
    expected = 4800 / kinds
    assert len(seen) == kinds
    assert sum((count - expected) ** 2 / expected for count in seen) < {24: 55, 9: 32}[kinds]


def test_mistakes_of_a_pairing():
    with pytest.raises(ValueError, match="needs two"):
        draw_pairs("derangement", 1, 1, 0, 0)
    with pytest.raises(ValueError, match="does not divide"):
        draw_pairs("local", 7, 2, 0, 0)
    with pytest.raises(ValueError, match="unknown pairing"):
        draw_pairs("random", 8, 2, 0, 0)


# -- one forward or several -----------------------------------------------------------------------


@BOTH
@pytest.mark.parametrize("arch", ["tiny", "vit_small"])
def test_projections_have_batch_norm_statistics_per_view(recipe, arch):
    """The views of a ViT go through its encoder together, those of a CNN do not."""
    config = dataclasses.replace(
        recipe.Config(), arch=arch, image_size=32, projector_hidden=16, output_dim=8
    )
    network = recipe.SimSiam if recipe is simsiam_gsg else recipe.BYOL
    model = network(config)
    forwards = []
    model.encoder.register_forward_hook(lambda *_: forwards.append(1))
    x = [torch.randn(6, 3, 32, 32) * (i + 1) for i in range(4)]
    projections = [model.projector(y) for y in Pieces(model.encoder)(*x)]
    assert len(forwards) == (1 if arch == "vit_small" else 4)
    for view, z in zip(x, projections, strict=True):
        alone = model.projector(model.encoder(view))
        torch.testing.assert_close(z, alone, rtol=1e-3, atol=1e-4)


# -- over ranks -----------------------------------------------------------------------------------

RANKS = """
import sys, torch, torch.distributed as dist
from recipes.simsiam_gsg import gsg_loss
dist.init_process_group("gloo")
rank, ranks = dist.get_rank(), dist.get_world_size()
tensors, pairs = torch.load(sys.argv[1])
own = [t.chunk(ranks)[rank].clone().requires_grad_() for t in tensors]
loss = gsg_loss(*own, pairs)
loss.backward()
torch.save((loss.detach(), [t.grad for t in own]), f"{sys.argv[1]}.{rank}")
dist.barrier()
dist.destroy_process_group()
"""


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mean_over_ranks_is_the_value_and_gradient_of_one_process(ranks, tmp_path):
    tensors, pairs = views(12, 5), permutation(12)
    (tmp_path / "ranks.py").write_text(RANKS)
    torch.save((tensors, pairs), tmp_path / "inputs")
    run_ranks(ranks, tmp_path / "ranks.py", tmp_path / "inputs")
    results = [torch.load(tmp_path / f"inputs.{rank}") for rank in range(ranks)]
    whole = [t.clone().requires_grad_() for t in tensors]
    loss = gsg_loss(*whole, pairs)
    loss.backward()
    assert torch.stack([r[0] for r in results]).mean().item() == pytest.approx(loss.item(), 1e-12)
    assert loss.item() == pytest.approx(algorithm_1(*tensors, pairs.tolist()), rel=1e-11)
    for number, t in enumerate(whole):
        parts = [r[1][number] for r in results]
        if t.grad is None:
            assert parts == [None] * ranks, NAMES[number]
        else:  # each rank's own rows; the mean over ranks divides by their number
            torch.testing.assert_close(torch.cat(parts) / ranks, t.grad, msg=NAMES[number])


def recipe_name(recipe):
    return recipe.__name__.removeprefix("recipes.")


@pytest.mark.parametrize("recipe", [simsiam_gsg, pytest.param(byol_gsg, marks=pytest.mark.long)])
def test_local_pairing_is_algorithm_1_in_each_ranks_own_batch(recipe, tmp_path):
    flags = ["--follow", "official", "--precision", "fp64", "--max-steps", STEPS]
    run, ranks = run_on(2, tmp_path, recipe_name(recipe), *flags)
    losses = np.zeros((2, STEPS))
    for r, seen in enumerate(ranks):
        assert len(seen["losses"]) == STEPS
        for step, (_, (*tensors, pairs, _), loss) in enumerate(seen["losses"]):
            assert torch.equal(pairs, draw_pairs("local", 36, 2, 0, step))
            own = pairs[18 * r : 18 * (r + 1)] - 18 * r
            assert sorted(own.tolist()) == [*range(18)]
            losses[r, step] = algorithm_1(*tensors, own.tolist())
            np.testing.assert_allclose(loss, losses[r, step], rtol=1e-10)
    np.testing.assert_allclose(step_losses(run), losses.mean(axis=0), rtol=1e-10)


@pytest.mark.long
@pytest.mark.parametrize("pairing", ["global", "derangement"])
@BOTH
def test_two_ranks_pair_the_images_that_one_process_pairs(recipe, pairing, tmp_path):
    ranks = two_ranks_are_one(tmp_path, recipe_name(recipe), "--pairing", pairing)
    drawn = [draw_pairs(pairing, 36, 1, 0, step) for step in range(STEPS)]
    for seen in ranks:
        used = [pairs for _, (*_, pairs, _), _ in seen["losses"]]
        assert all(map(torch.equal, used, drawn)) and len(used) == STEPS
