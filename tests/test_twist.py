"""TWIST: its loss and its batch norm against loops on Python floats, also over ranks, and its steps
against a plain replay on the views that the recipe saw.
"""

import copy
import math
import statistics

import pytest
import torch
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
from thread_ranks import on_ranks
from torch import nn

from common.augment import two_views
from common.errors import UserError
from recipes import twist
from recipes.twist import normalize_logits, twist_loss, twist_terms

# -- the loss -------------------------------------------------------------------------------------


def softmax(row, tau=1.0):
    most = max(row) / tau
    parts = [math.exp(x / tau - most) for x in row]
    return [part / math.fsum(parts) for part in parts]


def entropy(p, eps):
    return -math.fsum(x * math.log(x + eps) for x in p)


def terms_by_hand(logits1, logits2, tau=1.0, eps=1e-5):
    """Computes objective.py's EntLoss on lists of rows, one process."""
    kl = eh = he = 0.0
    n = len(logits1)
    for a, b in ((logits1, logits2), (logits2, logits1)):
        for x, y in zip(a, b, strict=True):
            p, q = softmax(x), softmax(y)
            kl += math.fsum(
                u * (math.log(u + eps) - math.log(v + eps)) for u, v in zip(p, q, strict=True)
            ) / (2 * n)
        sharpened = [softmax(x, tau) for x in a]
        eh += math.fsum(entropy(p, eps) for p in sharpened) / (2 * n)
        he += entropy([math.fsum(c) / n for c in zip(*sharpened, strict=True)], eps) / 2
    return kl, eh, he


def by_hand(logits1, logits2, lam1=0.0, lam2=1.0, tau=1.0, eps=1e-5):
    kl, eh, he = terms_by_hand(logits1.tolist(), logits2.tolist(), tau, eps)
    return kl + (1 + lam1) * eh - lam2 * he


@pytest.mark.parametrize("how", [{}, {"lam1": -0.6, "lam2": 0.3, "tau": 0.4}, {"eps": 1e-3}])
@pytest.mark.parametrize("spread", [0.3, 3.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 5), (7, 4), (16, 9)])
def test_the_loss_is_the_codes(shape, spread, how):
    """The two agree on logits of some thousands, too, whose softmax is one class."""
    logits = draw(1, *shape, spread=spread), draw(2, *shape, spread=spread)
    value = twist_loss(*logits, **how)
    assert value.dtype == torch.float64 and value.shape == ()
    assert value.item() == pytest.approx(by_hand(*logits, **how), rel=1e-10, abs=1e-12)


def test_up_to_eps_consistency_and_sharpness_are_the_cross_entropy_of_the_views():
    a, b = draw(3, 6, 4, spread=0.3), draw(4, 6, 4, spread=0.3)
    consistency, sharpness, _ = twist_terms(a, b, eps=0.0)
    both = -(a.softmax(1) * b.log_softmax(1) + b.softmax(1) * a.log_softmax(1)).sum(1).mean() / 2
    assert (consistency + sharpness).item() == pytest.approx(both.item(), rel=1e-12)


def test_known_answers():
    ties = torch.zeros(5, 4, dtype=torch.float64)
    consistency, sharpness, diversity = (t.item() for t in twist_terms(ties, ties, eps=0.0))
    assert consistency == 0
    assert sharpness == pytest.approx(math.log(4)) and diversity == pytest.approx(math.log(4))
    sure = 1000 * torch.eye(4, dtype=torch.float64)  # each image its own class
    assert twist_loss(sure, sure).item() == pytest.approx(-math.log(4), abs=1e-4)
    one = 1000 * torch.eye(4, dtype=torch.float64)[[2, 2, 2, 2]]  # one class for all
    assert twist_loss(one, one).item() == pytest.approx(0, abs=1e-4)
    assert twist_loss(one, one, lam2=0.0) <= twist_loss(ties, ties, lam2=0.0)


@pytest.mark.parametrize("how", [{}, {"lam1": -0.6, "lam2": 0.3, "tau": 0.4}])
def test_gradients_are_those_of_differences(how):
    logits = [draw(seed, 4, 3, spread=0.3).requires_grad_() for seed in (5, 6)]
    assert torch.autograd.gradcheck(lambda *f: twist_loss(*f, **how), logits)
    twist_loss(*logits, **how).backward()
    assert all((f.grad.norm(dim=1) > 0).all() for f in logits)


def test_gradients_of_ties_and_of_certainty_are_finite():
    for logits in (torch.zeros(3, 4), 1e4 * torch.eye(4)[:3]):
        logits = logits.double().requires_grad_()
        twist_loss(logits, logits).backward()
        assert logits.grad.isfinite().all()


def test_the_loss_is_never_computed_in_less_than_float32():
    logits = [draw(seed, 6, 5, spread=0.5).bfloat16() for seed in (7, 8)]
    expected = twist_loss(*(f.float() for f in logits))
    with torch.autocast("cpu", torch.bfloat16):
        value = twist_loss(*logits)
        normed = normalize_logits(*logits)
    assert value.dtype == torch.float32 and torch.equal(value, expected)
    assert {f.dtype for f in normed} == {torch.float32}


# -- the batch norm before the softmax ------------------------------------------------------------


def columns_by_hand(logits1, logits2, bunch):
    """Normalises both views' rows of each bunch of images, column by column."""
    out = [[], []]
    for first in range(0, len(logits1), bunch):
        views = [f[first : first + bunch] for f in (logits1, logits2)]
        rows = [*views[0], *views[1]]
        columns = [[row[c] for row in rows] for c in range(len(rows[0]))]
        means = [statistics.fmean(column) for column in columns]
        deviations = [math.sqrt(statistics.pvariance(column) + 1e-5) for column in columns]
        for view, side in zip(views, out, strict=True):
            side += [
                [(x - m) / d for x, m, d in zip(row, means, deviations, strict=True)]
                for row in view
            ]
    return [torch.tensor(side, dtype=torch.float64) for side in out]


@pytest.mark.parametrize("bunch", [0, 12, 6, 4, 1])
def test_the_batch_norm_takes_the_statistics_of_a_bunch_of_images(bunch):
    logits = draw(9, 12, 3, spread=0.5), draw(10, 12, 3, spread=0.5)
    expected = columns_by_hand(*(f.tolist() for f in logits), bunch or 12)
    torch.testing.assert_close([*normalize_logits(*logits, bunch)], expected, rtol=1e-9, atol=1e-11)


def test_a_whole_bunch_is_torchs_batch_norm_of_both_views():
    logits = [draw(seed, 8, 5, spread=0.5).requires_grad_() for seed in (11, 12)]
    norm = nn.BatchNorm1d(5, affine=False).double()
    expected = norm(torch.cat(logits))
    ours = torch.cat(normalize_logits(*logits))
    torch.testing.assert_close(ours, expected)
    weights = draw(13, 16, 5, spread=0.3)
    for a, b in zip(
        torch.autograd.grad((weights * ours).sum(), logits),
        torch.autograd.grad((weights * expected).sum(), logits),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_a_constant_answer_is_no_constant_answer_after_it():
    """The equation's minimum without diversity, one class for all, cannot be reached."""
    one = torch.tensor([[9.0, 0.0, 0.0]] * 6, dtype=torch.float64)
    assert twist_loss(one, one, lam2=0.0).item() < 0.01
    assert twist_loss(*normalize_logits(one, one), lam2=0.0).item() == pytest.approx(
        math.log(3), 1e-4
    )


# -- ranks ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bunch", [0, 8, 4, 2])
@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_have_the_value_and_the_gradient_of_one(ranks, bunch, monkeypatch):
    """Bunches may be of several ranks, and several bunches on one."""
    whole = [draw(seed, 8, 5, spread=0.3).requires_grad_() for seed in (14, 15)]

    def loss(logits):
        return twist_loss(*normalize_logits(*logits, bunch), -0.3, 0.8, 0.7)

    value = loss(whole)
    expected = torch.autograd.grad(value, whole)

    def on_one(part):
        logits = [f.detach()[part].requires_grad_() for f in whole]
        own = loss(logits)
        return own.item(), torch.autograd.grad(own, logits)

    n = 8 // ranks
    found = on_ranks(monkeypatch, twist, on_one, [slice(n * r, n * r + n) for r in range(ranks)])
    assert statistics.fmean(v for v, _ in found) == pytest.approx(value.item(), rel=1e-12)
    for view in (0, 1):
        mean = torch.cat([gradients[view] for _, gradients in found]) / ranks
        torch.testing.assert_close(mean, expected[view], rtol=1e-9, atol=1e-12)


# -- a run, step by step --------------------------------------------------------------------------

FLAGS = ["--projector-hidden", "24", "--output-dim", "12", "--lr", "8", "--weight-decay", "0.01"]
RUNS = {
    "LARS, bunches": "--bunch-size 8 --warmup-epochs 0.4",
    "other weights": "--bunch-size 0 --lam1 -0.6 --lam2 0.7 --tau 0.5",
    "no norm, SGD": "--no-logit-norm --optimizer sgd --projector-layers 2 --warmup-epochs 1",
}


class LARSByHand:
    """LARS of lars.py: the ratio has the norms' sum, without a guard; the rate is in the buffer."""

    def __init__(self, parameters, decay):
        self.parameters, self.decay = parameters, decay
        self.velocities = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients, rate):
        for p, g, v in zip(self.parameters, gradients, self.velocities, strict=True):
            if p.ndim > 1:
                ratio = 0.001 * p.norm() / (g.norm() + self.decay * p.norm())
                g = ratio * (g + self.decay * p)
            v.mul_(0.9).add_(rate * g)
            p.sub_(v)


class SGDByHand(LARSByHand):
    @torch.no_grad()
    def step(self, gradients, rate):
        for p, g, v in zip(self.parameters, gradients, self.velocities, strict=True):
            v.mul_(0.9).add_(g + self.decay * p)
            p.sub_(rate * v)


def plain_terms(p, q, tau):
    """Computes the terms with torch's own functions: softmax apart, EPS inside every log."""
    kl, eh, he = 0, 0, 0
    for a, b in ((p, q), (q, p)):
        x, y, t = a.softmax(1), b.softmax(1), (a / tau).softmax(1)
        kl = kl + (x * ((x + 1e-5).log() - (y + 1e-5).log())).sum(1).mean() / 2
        eh = eh - (t * (t + 1e-5).log()).sum(1).mean() / 2
        he = he - (t.mean(0) * (t.mean(0) + 1e-5).log()).sum() / 2
    return kl, eh, he


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_its_replay(name, tmp_path, monkeypatch):
    """Both views share a forward of encoder and projector; the batch norm sees bunches."""
    flags = [*FLAGS, *RUNS[name].split()]
    config = twist.parse_arguments([*RUN, *flags])
    seen = watched_run(twist, flags, tmp_path / "run", monkeypatch)
    model, after = copy.deepcopy(seen["before"]["model"]), seen["after"]["model"]
    network = with_torchs_batch_norms(nn.Sequential(model.encoder, model.projector))
    parameters = [*network.parameters()]
    optimizer = (SGDByHand if "sgd" in flags else LARSByHand)(parameters, 0.01)
    base, total = 8 * BATCH / 256, STEPS_PER_EPOCH * EPOCHS
    warmup = {"LARS, bunches": 2, "other weights": 15, "no norm, SGD": 5}[name]  # 3 epochs
    bunch = {"LARS, bunches": 8, "other weights": BATCH, "no norm, SGD": 0}[name]
    assert len(seen["views"]) == STEPS
    for step, (x1, x2) in enumerate(seen["views"]):
        rate = base * step / warmup
        if step >= warmup:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
            rate = base * cosine + 0.001 * base * (1 - cosine)
        logits = network(torch.cat([x1, x2])).chunk(2)
        if bunch:
            pieces = []
            for first in range(0, BATCH, bunch):
                rows = torch.cat([f[first : first + bunch] for f in logits])
                pieces.append(nn.functional.batch_norm(rows, None, None, training=True).chunk(2))
            logits = [torch.cat(view) for view in zip(*pieces, strict=True)]
        kl, eh, he = plain_terms(*logits, config.tau)
        loss = kl + (1 + config.lam1) * eh - config.lam2 * he
        logged = seen["logged"][step]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert logged["lr"] == pytest.approx(rate, rel=1e-12)
        assert logged["consistency"] == pytest.approx(kl.item(), rel=1e-8, abs=1e-12)
        assert logged["sharpness"] == pytest.approx(eh.item() / math.log(12), rel=1e-9)
        assert logged["diversity"] == pytest.approx(he.item() / math.log(12), rel=1e-9)
        optimizer.step(torch.autograd.grad(loss, parameters), rate)
    assert_states_are_close([(after.encoder, network[0]), (after.projector, network[1])])
    assert not torch.equal(after.encoder[0].weight, seen["before"]["model"].encoder[0].weight)


# -- settings -------------------------------------------------------------------------------------

CODE = dict(  # train.py with the README's command for ResNet-50 without small crops
    arch="resnet50",
    epochs=800,
    batch_size=2048,
    lr=0.5,
    lr_batch=256,
    lr_end=0.001,
    optimizer="unguarded_lars",
    sgd_momentum=0.9,
    weight_decay=1.5e-6,
    warmup_epochs=10,
    lam1=0.0,
    lam2=1.0,
    tau=1.0,
    bunch_size=256,
    logit_norm=True,
    projector_layers=3,
    projector_hidden=4096,
    output_dim=32768,
)


def test_without_flags_it_is_the_command_of_the_readme():
    config = twist.parse_arguments([])
    assert {name: getattr(config, name) for name in CODE} == CODE and config.settings == {}
    assert twist.views_of(config) == [*two_views("byol", 224, 0.08, "bicubic")]
    assert not hasattr(config, "follow")


@pytest.mark.parametrize(("epochs", "warmup"), [(800, 10), (51, 10), (50, 5), (21, 5), (20, 3)])
def test_short_runs_warm_up_for_less(epochs, warmup):
    config = twist.parse_arguments(["--epochs", str(epochs)])
    assert config.warmup_epochs == warmup and config.settings == {}
    given = twist.parse_arguments(["--epochs", str(epochs), "--warmup-epochs", "7"])
    assert given.settings == {"warmup_epochs": 7.0}


def test_the_projector_is_the_codes():
    config = twist.parse_arguments(["--arch", "resnet18", "--output-dim", "9"])
    model = twist.TWIST(config)
    linears = [layer for layer in model.projector if isinstance(layer, nn.Linear)]
    sizes = [(layer.in_features, layer.out_features) for layer in linears]
    assert sizes == [(512, 4096), (4096, 4096), (4096, 9)]
    assert all(layer.bias is not None for layer in linears)
    assert [type(layer) for layer in model.projector][1:3] == [nn.BatchNorm1d, nn.ReLU]
    assert len(model.projector) == 7  # nothing after the logits
    assert all(block.bn2.weight.all() for block in model.encoder.layer2)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--bunch-size 300", r"--bunch-size 300 must divide --batch-size 2048; 0 is the whole"),
        ("--batch-size 128", r"--bunch-size 256 must divide --batch-size 128"),
        ("--no-logit-norm --bunch-size 64", r"--no-logit-norm leaves nothing that reads it"),
        ("--tau 0", r"--tau 0.0: must be above 0"),
    ],
)
def test_bunches_that_cannot_be_are_one_line(flags, said):
    with pytest.raises(UserError, match=said):
        twist.parse_arguments(flags.split())


def test_without_the_norm_bunches_need_not_fit():
    config = twist.parse_arguments(["--no-logit-norm", "--batch-size", "128"])
    assert config.settings == {"logit_norm": False}
