"""LARS against float64 loops written from DESIGN.md's contract; optimizers; schedules."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

from common.models import build_encoder, mlp
from common.optim import (
    LARC,
    LARS,
    ClassicLARS,
    UnguardedLARS,
    build_optimizer,
    momentum_to_one,
    scaled_lr,
    set_lr,
    warmup_cosine,
    weights_and_biases,
)

SHAPES = [(4, 3), (3,), (2, 3, 2, 2), (1, 5), (6,)]


def draw(seed, shapes=SHAPES):
    rng = np.random.default_rng(seed)
    return [torch.from_numpy(rng.standard_normal(s) * 10 ** rng.uniform(-1, 1)) for s in shapes]


def norm(x):
    return math.sqrt(sum(v * v for v in x.ravel().tolist()))


class ByHand:
    """One tensor under LARS, as the contract defines it."""

    def __init__(self, weight):
        self.w, self.v = weight.numpy().copy(), np.zeros(weight.shape)

    def step(self, g, lr, momentum, wd, trust):
        g = g.numpy()
        if self.w.ndim >= 2:
            u = g + wd * self.w
            w_norm, u_norm = norm(self.w), norm(u)
            g = u * (trust * w_norm / u_norm if w_norm != 0 and u_norm != 0 else 1.0)
        self.v = momentum * self.v + g
        self.w = self.w - lr * self.v


def test_a_group_that_is_not_adapted_is_plain_momentum():
    """Its matrices are, too, like the head in SimCLR's fine-tuning, next to an adapted group."""
    start, gradients = draw(1), draw(2)
    for kind in (LARS, ClassicLARS):
        weights = [nn.Parameter(w.clone()) for w in start * 2]
        own, other = weights[: len(start)], weights[len(start) :]
        groups = [{"params": own, "adapted": False}, {"params": other}]
        optimizer = kind(groups, 0.1, momentum=0.9, weight_decay=0.3)
        give(weights, gradients * 2)
        optimizer.step()
        optimizer.step()
        for w, g, before in zip(own, gradients, start, strict=True):
            torch.testing.assert_close(w.detach(), before - 0.1 * (1 + 1.9) * g)
        matrix = next(n for n, w in enumerate(start) if w.ndim > 1)
        assert not torch.allclose(own[matrix], other[matrix])


def give(weights, gradients):
    for weight, gradient in zip(weights, gradients, strict=True):
        weight.grad = gradient.clone()


def compare(weights, hands):
    for weight, hand in zip(weights, hands, strict=True):
        np.testing.assert_allclose(weight.detach().numpy(), hand.w, rtol=1e-12, atol=1e-15)


# -- LARS -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trust", [0.001, 0.02])
@pytest.mark.parametrize("wd", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_lars_is_its_contract_over_several_steps(momentum, wd, trust):
    weights = [nn.Parameter(w) for w in draw(0)]
    hands = [ByHand(w.detach()) for w in weights]
    optimizer = LARS(weights, 0.5, momentum=momentum, weight_decay=wd, trust_coefficient=trust)
    for step, lr in enumerate((0.5, 2.0, 0.1, 1.0, 3.0)):
        # another rate at each step: momentum holds updates, not updates times an old rate
        set_lr(optimizer, lr)
        gradients = draw(10 + step)
        give(weights, gradients)
        optimizer.step()
        for hand, gradient in zip(hands, gradients, strict=True):
            hand.step(gradient, lr, momentum, wd, trust)
        compare(weights, hands)


def test_lars_defaults_are_the_contracts():
    weights = [nn.Parameter(w) for w in draw(1)]
    hands = [ByHand(w.detach()) for w in weights]
    optimizer = LARS(weights, 0.7)
    for step in range(3):
        gradients = draw(20 + step)
        give(weights, gradients)
        optimizer.step()
        for hand, gradient in zip(hands, gradients, strict=True):
            hand.step(gradient, 0.7, momentum=0.9, wd=0.0, trust=0.001)
    compare(weights, hands)


def test_lars_groups_have_their_own_numbers():
    numbers = [
        {"lr": 0.5, "momentum": 0.9, "weight_decay": 0.1, "trust_coefficient": 0.001},
        {"lr": 2.0, "momentum": 0.0, "weight_decay": 0.0, "trust_coefficient": 0.01},
        {"lr": 0.1, "momentum": 0.5, "weight_decay": 1.0, "trust_coefficient": 0.1},
    ]
    groups = [[nn.Parameter(w) for w in draw(30 + i)] for i in range(3)]
    hands = [[ByHand(w.detach()) for w in group] for group in groups]
    optimizer = LARS([{"params": g, **n} for g, n in zip(groups, numbers, strict=True)], lr=9.0)
    for step in range(3):
        for i, (group, n) in enumerate(zip(groups, numbers, strict=True)):
            gradients = draw(100 * step + i)
            give(group, gradients)
            for hand, g in zip(hands[i], gradients, strict=True):
                hand.step(g, n["lr"], n["momentum"], n["weight_decay"], n["trust_coefficient"])
        optimizer.step()
    for group, hand in zip(groups, hands, strict=True):
        compare(group, hand)


def test_lars_with_zero_gradient_still_decays():
    """u = wd * w, whose scaled length is trust * |w|: the decay drops out but for its direction."""
    weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
    weight.grad = torch.zeros_like(weight)
    LARS([weight], 0.5, weight_decay=0.2, trust_coefficient=0.1).step()
    np.testing.assert_allclose(weight.detach().numpy(), [[3 * 0.95, 4 * 0.95]], rtol=1e-12)


def test_lars_with_zero_update_stands_still():
    """|g + wd*w| = 0 would divide by zero; it occurs here without decay, and by cancellation."""
    for gradient, wd in (([0.0, 0.0], 0.0), ([-1.5, -2.0], 0.5)):
        weight = nn.Parameter(torch.tensor([[3.0, 4.0]], dtype=torch.float64))
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        LARS([weight], 0.5, weight_decay=wd).step()
        assert weight.tolist() == [[3.0, 4.0]]


def test_lars_with_zero_weight_takes_the_plain_gradient():
    """A ratio of 0 would keep a zero-initialised tensor at zero for ever."""
    weight = nn.Parameter(torch.zeros(1, 2, dtype=torch.float64))
    weight.grad = torch.tensor([[3.0, -4.0]], dtype=torch.float64)
    LARS([weight], 0.5, weight_decay=0.2).step()
    assert weight.tolist() == [[-1.5, 2.0]]


def test_lars_neither_decays_nor_scales_one_dimension():
    bias = nn.Parameter(torch.tensor([3.0, 4.0], dtype=torch.float64))
    optimizer = LARS([bias], 0.5, weight_decay=10.0)
    for expected in ([2.0, 4.5], [0.1, 5.45]):  # w - 0.5 g, then w - 0.5 (0.9 g + g)
        bias.grad = torch.tensor([2.0, -1.0], dtype=torch.float64)
        optimizer.step()
        assert bias.tolist() == pytest.approx(expected)


def test_lars_leaves_tensors_without_gradient():
    moved, left = (nn.Parameter(torch.ones(2, 2)) for _ in range(2))
    optimizer = LARS([moved, left], 0.5, weight_decay=0.1)
    moved.grad = torch.ones(2, 2)
    optimizer.step()
    assert (moved != 1).all() and (left == 1).all()


def test_lars_changes_no_gradient():
    """Gradient norms are logged after the step."""
    weights, gradients = [nn.Parameter(w) for w in draw(2)], draw(3)
    give(weights, gradients)
    LARS(weights, 0.5, weight_decay=0.1).step()
    assert all(torch.equal(w.grad, g) for w, g in zip(weights, gradients, strict=True))


def test_lars_state_dict_continues_identically():
    def step(weights, optimizer, seed):
        give(weights, draw(seed))
        optimizer.step()

    weights = [nn.Parameter(w) for w in draw(4)]
    optimizer = LARS(weights, 0.5, weight_decay=0.1)
    for seed in (40, 41):
        step(weights, optimizer, seed)
    copied = [nn.Parameter(w.detach().clone()) for w in weights]
    restored = LARS(copied, 9.0, momentum=0.1, trust_coefficient=1.0)
    restored.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for seed in (42, 43):
        step(weights, optimizer, seed)
        step(copied, restored, seed)
        assert all(torch.equal(a, b) for a, b in zip(weights, copied, strict=True))


# -- what differs between the papers' LARS ---------------------------------------------------------


class SimCLRByHand(ByHand):
    """SimCLR's code (lars_optimizer.py, classic momentum): the rate is inside the buffer."""

    def step(self, g, lr, momentum, wd, trust):
        g = g.numpy()
        rate = lr
        if self.w.ndim >= 2:
            g = g + wd * self.w
            w_norm, g_norm = norm(self.w), norm(g)
            rate = lr * (trust * w_norm / g_norm if w_norm != 0 and g_norm != 0 else 1.0)
        self.v = momentum * self.v + rate * g
        self.w = self.w - self.v


@pytest.mark.parametrize("wd", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_classic_lars_is_simclrs_code_while_the_rate_moves(momentum, wd):
    weights = [nn.Parameter(w) for w in [*draw(0), torch.zeros(2, 2, dtype=torch.float64)]]
    hands = [SimCLRByHand(w.detach()) for w in weights]
    optimizer = build_optimizer("classic_lars", weights, 0.5, momentum, wd)
    assert type(optimizer) is ClassicLARS
    for step in range(8):
        rate = warmup_cosine(step, 8, 3, 4.8)  # from a rate of 0
        set_lr(optimizer, rate)
        gradients = draw(10 + step, [*SHAPES, (2, 2)])
        gradients[0] *= step != 2  # no gradient, as in a part that is frozen for a while
        give(weights, gradients)
        optimizer.step()
        for hand, gradient in zip(hands, gradients, strict=True):
            hand.step(gradient, rate, momentum, wd, 0.001)
        compare(weights, hands)


class OpenSelfSupByHand:
    """One tensor under OpenSelfSup's optimizers.py: lars_exclude is `not adapted`, with decay 0."""

    def __init__(self, weight, adapted):
        self.w, self.v, self.adapted = weight.numpy().copy(), np.zeros(weight.shape), adapted

    def step(self, g, lr, momentum, wd, trust=0.001):
        g, rate = g.numpy(), lr
        if self.adapted:
            below = norm(g) + wd * norm(self.w)
            rate = lr * trust * norm(self.w) / below if below else 0.0  # the code stops there
            g = g + wd * self.w
        self.v = momentum * self.v + rate * g
        self.w = self.w - self.v


@pytest.mark.parametrize("adapted", [None, True, False])
@pytest.mark.parametrize("wd", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_unguarded_lars_is_openselfsups_while_the_rate_moves(momentum, wd, adapted):
    zeros = [torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    weights = [nn.Parameter(w) for w in [*draw(0), *zeros]]
    adapts = [w.ndim > 1 if adapted is None else adapted for w in weights]
    hands = [OpenSelfSupByHand(w.detach(), a) for w, a in zip(weights, adapts, strict=True)]
    group = {"params": weights} | ({} if adapted is None else {"adapted": adapted})
    optimizer = build_optimizer("unguarded_lars", [group], 0.5, momentum, wd)
    assert type(optimizer) is UnguardedLARS
    for step in range(8):
        rate = warmup_cosine(step, 8, 3, 4.8, start=4.8e-4)
        set_lr(optimizer, rate)
        gradients = draw(10 + step, [*SHAPES, (2, 2), (3,)])
        gradients[0] *= step != 2  # no gradient: the decay alone, or nothing
        give(weights, gradients)
        optimizer.step()
        for hand, gradient in zip(hands, gradients, strict=True):
            hand.step(gradient, rate, momentum, wd)
        compare(weights, hands)
    for weight, a in zip(weights[-2:], adapts[-2:], strict=True):
        assert weight.any() != a  # zeros never move, if they are adapted
    assert all(torch.equal(w.grad, g) for w, g in zip(weights, gradients, strict=True))


def test_unguarded_lars_stands_still_where_all_is_zero():
    weight = nn.Parameter(torch.zeros(2, 2))
    weight.grad = torch.zeros(2, 2)
    UnguardedLARS([weight], 0.5, weight_decay=0.1).step()
    assert not weight.any()


class LARCByHand(ByHand):
    """apex's LARC.py without clipping around torch.optim.SGD, as SwAV's main_swav.py has them."""

    def step(self, g, lr, momentum, wd, trust):
        g = g.numpy()
        w_norm, g_norm = norm(self.w), norm(g)
        if w_norm != 0 and g_norm != 0:
            g = (g + wd * self.w) * (trust * w_norm / (g_norm + wd * w_norm + 1e-8))
        self.v = momentum * self.v + g
        self.w = self.w - lr * self.v


@pytest.mark.parametrize("wd", [0.0, 1e-6, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_larc_is_apexs_around_sgd_while_the_rate_moves(momentum, wd):
    """Every tensor is decayed and adapted; zero weights and zero gradients are not."""
    shapes = [*SHAPES, (2, 2), (3,)]
    start = [*draw(0), torch.zeros(2, 2, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]
    weights = [nn.Parameter(w) for w in start]
    hands = [LARCByHand(w.detach()) for w in weights]
    optimizer = build_optimizer("larc", weights, 0.5, momentum, wd)
    assert type(optimizer) is LARC
    for step in range(8):
        rate = warmup_cosine(step, 8, 3, 4.8, start=0.3, end=0.0048)
        set_lr(optimizer, rate)
        gradients = draw(10 + step, shapes)
        gradients[0] *= step != 2
        gradients[1] *= 1e-9 if step == 3 else 1  # so small that 1e-8 counts
        give(weights, gradients)
        optimizer.step()
        for hand, gradient in zip(hands, gradients, strict=True):
            hand.step(gradient, rate, momentum, wd, 0.001)
        compare(weights, hands)
        assert all(torch.equal(w.grad, g) for w, g in zip(weights, gradients, strict=True))


def test_where_the_rate_stands_matters_only_while_it_moves():
    def train(kind, rates):
        weights = [nn.Parameter(w) for w in draw(5)]
        optimizer = kind(weights, 1.0, weight_decay=0.1)
        for step, rate in enumerate(rates):
            set_lr(optimizer, rate)
            give(weights, draw(50 + step))
            optimizer.step()
        return torch.cat([w.detach().flatten() for w in weights])

    constant, falling = [0.7] * 4, [0.7, 0.5, 0.3, 0.1]
    torch.testing.assert_close(train(LARS, constant), train(ClassicLARS, constant))
    difference = train(LARS, falling) - train(ClassicLARS, falling)
    assert difference.abs().max() > 1e-2


@pytest.mark.parametrize("name", ["lars", "classic_lars"])
def test_biases_with_a_rate_of_their_own_are_barlow_twins(name):
    """Weights start at .2 and 1-d tensors at .0048, times batch / 256. Both are warmed up and then
    brought to a thousandth by half a cosine, per step; 1-d ones have no decay and no adaptation.
    """
    batch, total, warmup, wd = 2048, 9, 2, 1.5e-6
    model = small_model()
    hands = [
        (ByHand if name == "lars" else SimCLRByHand)(p.detach().clone()) for p in model.parameters()
    ]
    base = scaled_lr(0.2, batch, 256)
    groups = weights_and_biases(model, 0.0048 / 0.2)
    optimizer = build_optimizer(name, groups, base, 0.9, wd)
    rng = np.random.default_rng(0)
    for step in range(total):
        set_lr(optimizer, warmup_cosine(step, total, warmup, base, end=0.001 * base))
        for parameter, hand in zip(model.parameters(), hands, strict=True):
            parameter.grad = torch.from_numpy(rng.standard_normal(parameter.shape))
            peak = (0.2 if parameter.ndim == 2 else 0.0048) * 8
            if step < warmup:
                rate = peak * step / warmup
            else:  # barlowtwins main.py, adjust_learning_rate
                q = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
                rate = peak * q + peak * 0.001 * (1 - q)
            hand.step(parameter.grad, rate, 0.9, wd, 0.001)
        optimizer.step()
        compare([*model.parameters()], hands)


def test_groups_of_weights_and_biases_hold_every_tensor_once():
    model = small_model()
    wide, thin = weights_and_biases(model, 0.5)
    assert len(wide["params"]) == 2 and len(thin["params"]) == 4 and thin["lr_factor"] == 0.5
    held = {id(p) for group in (wide, thin) for p in group["params"]}
    assert held == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("arch", ["tiny", "resnet_lab", "resnet18_cifar", "resnet50"])
def test_excluding_by_name_as_simclr_and_byol_do_is_excluding_one_dimension(arch):
    """SimCLR's code leaves out what is called bias or batch_normalization, BYOL's the biases and
    norms: with our encoders and heads these are the tensors of one dimension.
    """
    with torch.device("meta"):
        model = nn.ModuleList([build_encoder(arch), mlp([8, 8, 4], True, True, output_norm=True)])
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    by_name = {id(p) for m in norms for p in m.parameters()}
    by_name |= {id(p) for name, p in model.named_parameters() if name.endswith("bias")}
    thin = weights_and_biases(model)[1]["params"]
    assert by_name == {id(p) for p in thin} and len(thin) > 8


# -- build_optimizer and set_lr -------------------------------------------------------------------

NAMES = ["lars", "classic_lars", "unguarded_lars", "larc", "sgd", "adamw"]


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)).double()


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_frozen_tensors_are_left_out(name, grouped):
    model = small_model()
    for parameter in model[0].parameters():
        parameter.requires_grad = False
        parameter.grad = torch.ones_like(parameter)  # a left-over gradient must not move it either
    before = copy.deepcopy(model)
    parts = [{"params": part.parameters()} for part in model] if grouped else model.parameters()
    optimizer = build_optimizer(name, parts, 0.1, 0.9, 0.5)
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad}
    model(torch.randn(5, 3, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        assert torch.equal(old, new) != new.requires_grad


@pytest.mark.parametrize("name", NAMES)
def test_weight_decay_falls_on_the_right_tensors(name):
    """With zero gradients one step shows the decay alone. It is lr * wd of every tensor for sgd and
    adamw, biases and norms included; for lars lr * trust of matrices, nothing of vectors; for larc
    nothing at all.
    """
    model = small_model()
    nn.init.ones_(model[1].bias)
    before = copy.deepcopy(model)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    build_optimizer(name, model.parameters(), 0.2, 0.9, 0.3).step()
    for old, new in zip(before.parameters(), model.parameters(), strict=True):
        shrink = 0.2 * 0.001 * (old.ndim > 1) if "lars" in name else 0.2 * 0.3
        shrink = 0 if name == "larc" else shrink
        np.testing.assert_allclose(new.detach(), old.detach() * (1 - shrink), rtol=1e-12)


def test_sgd_has_plain_momentum():
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = build_optimizer("sgd", [w], 0.1, 0.8, 0.0)
    for expected in (0.8, 0.44, -0.048):  # gradient 2: v = 2, then 3.6, then 4.88
        w.grad = torch.full_like(w, 2.0)
        optimizer.step()
        assert w.item() == pytest.approx(expected)


def test_adamw_has_its_usual_betas():
    w = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = build_optimizer("adamw", [w], 0.1, 0.8, 0.0)
    expected, m, v = 1.0, 0.0, 0.0
    for t, g in enumerate((2.0, -0.5, 1.0), start=1):
        w.grad = torch.full_like(w, g)
        optimizer.step()
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
        expected -= 0.1 * (m / (1 - 0.9**t)) / (math.sqrt(v / (1 - 0.999**t)) + 1e-8)
        assert w.item() == pytest.approx(expected, rel=1e-10)


def test_unknown_optimizer_is_an_error():
    with pytest.raises(ValueError):
        build_optimizer("larz", [nn.Parameter(torch.ones(2))], 0.1, 0.9, 0.0)


@pytest.mark.parametrize("name", NAMES)
def test_set_lr_leaves_fixed_rates_alone_and_keeps_factors(name):
    """SimSiam's predictor keeps its rate while the others follow the schedule, also on resuming."""
    a, b, c = (nn.Parameter(torch.ones(2, 2)) for _ in range(3))
    groups = [{"params": [a]}, {"params": [b], "fixed_lr": 0.7}]
    groups.append({"params": [c], "lr_factor": 0.25})
    optimizer = build_optimizer(name, groups, 0.5, 0.9, 0.0)
    for rate in (0.0, 0.3):
        set_lr(optimizer, rate)
        assert [g["lr"] for g in optimizer.param_groups] == [rate, 0.7, rate / 4]
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    set_lr(optimizer, 0.2)
    assert [g["lr"] for g in optimizer.param_groups] == [0.2, 0.7, 0.05]


# -- schedules ------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", [0.99, 0.996, 0.0])
def test_momentum_rises_to_one_as_byol_writes_it(start):
    for k, total in ((0, 10), (3, 10), (10, 10), (7, 1000)):
        expected = 1 - (1 - start) * (math.cos(math.pi * k / total) + 1) / 2  # its Sec. 3.3
        assert momentum_to_one(k, total, start) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(("start", "end"), [(0.0, 0.0), (1e-6, 0.0), (0.3, 0.05), (5.0, 7.0)])
@pytest.mark.parametrize("base", [4.8, 0.1])
def test_warmup_cosine_at_its_landmarks(base, start, end):
    def value(step):
        return warmup_cosine(step, 110, 10, base, start, end)

    quarter = math.cos(math.pi / 4)
    landmarks = {
        0: start,
        1: start + 0.1 * (base - start),
        5: (start + base) / 2,
        10: base,
        35: end + (base - end) * (1 + quarter) / 2,
        60: (base + end) / 2,
        85: end + (base - end) * (1 - quarter) / 2,
        110: end,
        111: end,  # beyond the end the cosine must not turn up again
        310: end,
    }
    for step, expected in landmarks.items():
        assert value(step) == pytest.approx(expected, rel=1e-12, abs=1e-15), step


def test_warmup_cosine_starts_and_ends_at_zero_unless_told():
    assert warmup_cosine(0, 20, 5, 0.4) == 0
    assert warmup_cosine(20, 20, 5, 0.4) == pytest.approx(0, abs=1e-15)


def test_no_warmup_starts_at_the_base():
    assert warmup_cosine(0, 20, 0, 0.4, start=0.1) == pytest.approx(0.4)
    assert warmup_cosine(10, 20, 0, 0.4, start=0.1) == pytest.approx(0.2)


def test_warmup_as_long_as_the_run_has_no_cosine():
    for step in range(11):
        assert warmup_cosine(step, 10, 10, 0.4) == pytest.approx(0.04 * step)
    for step in range(10):  # and a warm-up that is longer than the run
        assert warmup_cosine(step, 10, 40, 0.4) == pytest.approx(0.01 * step)


@pytest.mark.parametrize("m0", [0.99, 0.996])
def test_byols_momentum_schedule(m0):
    for k in (0, 1, 7, 50, 99, 100):
        byol = 1 - (1 - m0) * (math.cos(math.pi * k / 100) + 1) / 2
        assert warmup_cosine(k, 100, 0, base=m0, end=1.0) == pytest.approx(byol, rel=1e-14)


@pytest.mark.parametrize(
    ("batch", "lr_batch", "expected"), [(512, 256, 0.12), (128, 256, 0.03), (512, 0, 0.06)]
)
def test_the_linear_rule_and_no_rule(batch, lr_batch, expected):
    assert scaled_lr(0.06, batch, lr_batch) == pytest.approx(expected)
