"""Barlow Twins: its loss against loops written from Eq. 1 and 2, its steps against a plain replay,
and its rates against the released code's rule on two ranks.
"""

import math
import statistics

import pytest
import torch
from conftest import run_ranks, small
from replay import (
    BATCH,
    EPOCHS,
    RUN,
    STEPS,
    STEPS_PER_EPOCH,
    assert_states_are_close,
    watched_run,
    with_torchs_batch_norms,
)
from test_losses import draw
from torch import nn

from common.augment import two_views
from common.errors import UserError
from recipes import barlow_twins
from recipes.barlow_twins import barlow_twins_loss

# -- the loss -------------------------------------------------------------------------------------


def standardised(z, j):
    """Returns column j, less its mean, over the root of its biased variance and 1e-5."""
    column = [row[j] for row in z]
    mean = statistics.fmean(column)
    scale = math.sqrt(math.fsum((x - mean) ** 2 for x in column) / len(column) + 1e-5)
    return [(x - mean) / scale for x in column]


def eq_1(z1, z2, lambd=0.005, terms="both"):
    """Computes Eq. 1 on lists of rows."""
    n, d = len(z1), len(z1[0])
    a, b = [standardised(z1, j) for j in range(d)], [standardised(z2, j) for j in range(d)]
    invariance = redundancy = 0.0
    for i in range(d):
        for j in range(d):
            c = math.fsum(x * y for x, y in zip(a[i], b[j], strict=True)) / n
            if i == j:
                invariance += (1 - c) ** 2
            else:
                redundancy += c**2
    return (terms != "redundancy") * invariance + (terms != "invariance") * lambd * redundancy


@pytest.mark.parametrize("terms", ["both", "invariance", "redundancy"])
@pytest.mark.parametrize("lambd", [0.0, 0.005, 2.0])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 3), (7, 4), (4, 9), (16, 5)])
def test_the_loss_is_eq_1(n, d, lambd, terms):
    for spread in (0.3, 2.0):
        z1, z2 = draw(1, n, d, spread=spread), draw(2, n, d, spread=spread)
        value = barlow_twins_loss(z1, z2, lambd, terms)
        assert value.dtype == torch.float64 and value.shape == ()
        expected = eq_1(z1.tolist(), z2.tolist(), lambd, terms)
        assert value.item() == pytest.approx(expected, rel=1e-10, abs=1e-14)


def test_lambda_is_that_of_sec_2_2():
    z1, z2 = draw(3, 6, 4, spread=0.3), draw(4, 6, 4, spread=0.3)
    expected = eq_1(z1.tolist(), z2.tolist(), 0.005)
    assert barlow_twins_loss(z1, z2).item() == pytest.approx(expected, rel=1e-11)


@pytest.mark.parametrize("terms", ["both", "invariance", "redundancy"])
def test_the_gradient_is_that_of_eq_1(terms):
    """Central differences of the loops agree, through mean and variance too, for both views."""
    z = [draw(5, 5, 3, spread=0.3).requires_grad_(), draw(6, 5, 3, spread=0.3).requires_grad_()]
    barlow_twins_loss(*z, 0.3, terms).backward()
    h = 1e-6
    for view in range(2):
        for i in range(5):
            for j in range(3):
                ends = []
                for step in (h, -h):
                    moved = [x.detach().tolist() for x in z]
                    moved[view][i][j] += step
                    ends.append(eq_1(*moved, 0.3, terms))
                slope = (ends[0] - ends[1]) / (2 * h)
                assert z[view].grad[i, j].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_analytic_cases():
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    big = 1000 * signs + 7  # so large that the 1e-5 added to the variance does not count
    assert barlow_twins_loss(big, 3 * big - 1).item() == pytest.approx(0, abs=1e-9)
    assert barlow_twins_loss(big, -big).item() == pytest.approx(3 * 4, rel=1e-9)
    same = big[:, :1].expand(4, 3)
    assert barlow_twins_loss(same, same, 0.5).item() == pytest.approx(6 * 0.5, rel=1e-9)
    constant = torch.full((4, 3), 5.0, dtype=torch.float64)  # nothing to correlate: C is 0
    assert barlow_twins_loss(constant, constant, 0.5).item() == pytest.approx(3, rel=1e-12)


def test_the_loss_is_never_computed_in_less_than_float32():
    z1, z2 = draw(10, 6, 5, spread=0.5).bfloat16(), draw(11, 6, 5, spread=0.5).bfloat16()
    expected = barlow_twins_loss(z1.float(), z2.float())
    with torch.autocast("cpu", torch.bfloat16):
        values = [barlow_twins_loss(z1, z2), barlow_twins_loss(z1.float(), z2.float())]
    for value in (*values, barlow_twins_loss(z1, z2)):
        assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_unknown_terms_are_refused():
    x = draw(0, 3, 4)
    with pytest.raises(ValueError, match="redundant"):
        barlow_twins_loss(x, x, terms="redundant")


# -- a run, step by step --------------------------------------------------------------------------

FLAGS = ["--projector-hidden", "24", "--output-dim", "12", "--warmup-epochs", "0.4"]
FLAGS += ["--lr", "20", "--lr-biases", "0.5"]
HARD = ["--weight-decay", "0.03", "--lambd", "0.1"]  # so large that a wrong value would show


def rates(step):
    """Returns the rates of weights and biases: two steps of warm-up, then a cosine to 1/1000."""
    if step < 2:
        factor = step / 2
    else:
        last = STEPS_PER_EPOCH * EPOCHS
        cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / (last - 2)))
        factor = cosine + 0.001 * (1 - cosine)
    return 20 * BATCH / 256 * factor, 0.5 * BATCH / 256 * factor


def plain_loss(z1, z2, lambd, terms):
    z1, z2 = ((z - z.mean(0)) / (z.var(0, unbiased=False) + 1e-5).sqrt() for z in (z1, z2))
    c = torch.einsum("ni,nj->ij", z1, z2) / len(z1)
    eye = torch.eye(len(c), dtype=torch.bool)
    invariance, redundancy = (c[eye] - 1).pow(2).sum(), c[~eye].pow(2).sum()
    return (terms != "redundancy") * invariance + (terms != "invariance") * lambd * redundancy


def step_by_hand(weights, velocities, rates, decay, optimizer):
    """Does a step of LARS, or SGD; biases and norms have a rate of their own and no decay."""
    with torch.no_grad():
        for weight, velocity in zip(weights, velocities, strict=True):
            update = weight.grad.clone()
            if weight.ndim > 1:
                update += decay * weight
                if optimizer == "lars":
                    update *= 0.001 * weight.norm() / update.norm()
            velocity.mul_(0.9).add_(update)
            weight.sub_(rates[0 if weight.ndim > 1 else 1] * velocity)
            weight.grad = None


CASES = {  # flags, and what they mean: ranks of the code, lambda, weight decay
    "paper": ([], 32, 0.005, 1.5e-6),
    "official": (["--follow", "official"], 16, 0.0051, 1e-6),
    "exact": ([*HARD, "--code-ranks", "1", "--terms", "redundancy"], 1, 0.1, 0.03),
    "sgd": ([*HARD, "--optimizer", "sgd", "--lr", "0.2", "--lr-biases", "0.005"], 32, 0.1, 0.03),
    "untied": ([*HARD, "--second-arch", "same"], 32, 0.1, 0.03),
    "other": ([*HARD, "--second-arch", "resnet_lab", "--terms", "invariance"], 32, 0.1, 0.03),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_its_replay(case, tmp_path, monkeypatch):
    flags, ranks, lambd, decay = CASES[case]
    seen = watched_run(barlow_twins, [*FLAGS, *flags], tmp_path / "run", monkeypatch)
    model, after = seen["before"]["model"], seen["after"]["model"]
    linears = [m for m in model.projector if isinstance(m, nn.Linear)]
    assert len(linears) == 3 and all(m.bias is None for m in linears)
    first = with_torchs_batch_norms(nn.Sequential(model.encoder, model.projector))
    other = first
    if "--second-arch" in flags:
        other = with_torchs_batch_norms(nn.Sequential(model.second_encoder, model.second_projector))
    weights = [*first.parameters(), *(other.parameters() if other is not first else [])]
    velocities = [torch.zeros_like(w) for w in weights]
    terms = flags[-1] if "--terms" in flags else "both"
    scale = 0.01 if case == "sgd" else 1
    for step, (x1, x2) in enumerate(seen["views"]):
        loss = plain_loss(first(x1), other(x2), lambd, terms)  # batch norms see one view at a time
        (loss / ranks).backward()
        now = [scale * rate for rate in rates(step)]
        step_by_hand(weights, velocities, now, decay, "sgd" if case == "sgd" else "lars")
        assert seen["logged"][step]["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert seen["logged"][step]["lr"] == pytest.approx(now[0], rel=1e-12)
    assert step == STEPS - 1
    pairs = [(after.encoder, first[0]), (after.projector, first[1])]
    if other is not first:
        pairs += [(after.second_encoder, other[0]), (after.second_projector, other[1])]
    assert_states_are_close(pairs)


@pytest.mark.long
def test_code_ranks_on_one_process_are_the_released_codes_ranks(tmp_path, monkeypatch):
    """--code-ranks 2 on one process is the released rule on two, --code-ranks 1 is not."""
    hard = [*FLAGS, *HARD]
    for ranks in (2, 1):
        flags = [*hard, "--code-ranks", str(ranks)]
        seen = watched_run(barlow_twins, flags, tmp_path / f"{ranks}", monkeypatch)
        if ranks == 2:
            start = {"flags": [*RUN, *hard], "model": seen["before"]["model"].state_dict()}
            start["views"] = seen["views"]
            start["rates"] = [rates(step) for step in range(len(seen["views"]))]
            torch.save(start, tmp_path / "start.pt")
            run_ranks(2, "tests/released_barlow.py", tmp_path)
            theirs = torch.load(tmp_path / "end.pt", weights_only=True)
        ours = seen["after"]["model"].state_dict()
        off = max((ours[n] - v).abs().max() / v.abs().max() for n, v in theirs.items() if v.ndim)
        assert (off < 1e-7) == (ranks == 2), off


# -- settings -------------------------------------------------------------------------------------

PAPER = dict(
    arch="resnet50",
    epochs=1000,
    batch_size=2048,
    lr=0.2,
    lr_biases=0.0048,
    lr_batch=256,
    lr_end=0.001,
    optimizer="lars",
    weight_decay=1.5e-6,
    warmup_epochs=10,
    lambd=0.005,
    code_ranks=32,
    terms="both",
    views="byol",
    projector_layers=3,
    projector_hidden=8192,
    output_dim=8192,
    second_arch="shared",
)
OFFICIAL = PAPER | dict(lambd=0.0051, weight_decay=1e-6, code_ranks=16)


@pytest.mark.parametrize(("follow", "expected"), [("paper", PAPER), ("official", OFFICIAL)])
def test_presets(follow, expected):
    config = barlow_twins.parse_arguments(["--follow", follow])
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.settings == {}
    assert barlow_twins.views_of(config) == [*two_views("byol", 224, 0.08, "bicubic")]


@pytest.mark.parametrize("dataset", ["cifar10", "photos"])
@pytest.mark.parametrize("follow", ["paper", "official"])
def test_small_images_take_the_exact_gradient(dataset, follow):
    config = barlow_twins.parse_arguments(["--dataset", dataset, "--follow", follow])
    assert config.code_ranks == 1


@pytest.mark.parametrize(
    ("flag", "value"), [("lambd", 0.0051), ("weight_decay", 1e-6), ("code_ranks", 16)]
)
def test_each_difference_can_be_set_alone(flag, value):
    config = barlow_twins.parse_arguments(["--" + flag.replace("_", "-"), str(value)])
    assert config.settings == {flag: value}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--second-arch", "vit_small", "--image-size", "100"], "multiple of 16, not 100"),
        (["--code-ranks", "0"], "--code-ranks 0: must be above 0"),
        (["--lr", "0"], "--lr 0.0: must be above 0"),
        (["--terms", "invariant"], "terms"),
    ],
)
def test_a_mistake_is_one_line(flags, said):
    with pytest.raises(UserError, match=said):
        barlow_twins.parse_arguments(flags)


def test_both_branches_in_pieces_are_replayed(tmp_path):
    """Pieces as large as the batch change nothing, in neither encoder."""
    flags = [*small("barlow_twins"), "--precision", "fp64", "--second-arch", "same"]
    runs = []
    for pieces in ("0", "36"):
        folder = tmp_path / pieces
        more = ["--max-steps", "3", "--micro-batch", pieces, "--output", str(folder)]
        barlow_twins.main([*flags, *more])
        runs.append(torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["model"])
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-7, atol=1e-9, msg=name)
