"""BYOL with its own heads and LARS, step by step: a plain replay in float64 on the views that the
recipe saw; its constants.

Written from Sec. 3 and the facts about the released code: encoder calls view by view, torch's own
batch norms, LARS by hand, the target moved after the step with that step's momentum.
"""

import copy
import math

import pytest
import torch
from replay import BATCH, EPOCHS, STEPS, STEPS_PER_EPOCH, watched_run, with_torchs_batch_norms
from torch import nn

from common.errors import UserError
from recipes import byol

SMALL = ["--output-dim", "8", "--projector-hidden", "32", "--predictor-hidden", "16"]
SMALL += ["--lr", "2.0", "--weight-decay", "0.01", "--warmup-epochs", "1"]


class Lars:
    """LARS of Sec. 3.3 and the code: u = g + wd w, times 0.001 |w| / |u|, for tensors that are no
    biases and no norms; v = 0.9 v + u, w = w - rate v.
    """

    def __init__(self, parameters):
        self.velocities = {p: torch.zeros_like(p) for p in parameters}

    @torch.no_grad()
    def step(self, rate):
        for w, v in self.velocities.items():
            u = w.grad
            if w.ndim > 1:
                u = u + 0.01 * w
                norms = math.sqrt((w * w).sum()), math.sqrt((u * u).sum())
                u = u * (0.001 * norms[0] / norms[1] if min(norms) > 0 else 1.0)
            v.copy_(0.9 * v + u)
            w.copy_(w - rate * v)


class Sgd(Lars):
    @torch.no_grad()
    def step(self, rate):
        for w, v in self.velocities.items():
            v.copy_(0.9 * v + w.grad + 0.01 * w)
            w.copy_(w - rate * v)


def unit(x):
    return x / x.norm(dim=1, keepdim=True)


CASES = {
    "lars": [],
    "sgd": ["--optimizer", "sgd", "--lr", "0.1"],
    "the target is a copy at first": ["--target-start", "online"],
    "no predictor": ["--no-predictor"],
    "no target": ["--momentum", "0", "--momentum-schedule", "fixed"],
    "frozen target": ["--momentum", "1", "--momentum-schedule", "fixed", "--no-predictor"],
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_its_replay(case, tmp_path, monkeypatch):
    flags = CASES[case]
    momentum = float(flags[flags.index("--momentum") + 1]) if "--momentum" in flags else 0.97
    seen = watched_run(byol, [*SMALL, *flags], tmp_path / "run", monkeypatch)
    before, after = seen["before"], seen["after"]
    model = copy.deepcopy(before["model"])
    f = with_torchs_batch_norms(nn.Sequential(model.encoder, model.projector))
    q = with_torchs_batch_norms(model.predictor)
    target = copy.deepcopy(before["target"])
    copies = [*zip(target.parameters(), f.parameters(), strict=True)]
    assert all(torch.equal(t, w) for t, w in copies) == ("--target-start" in flags)
    target = with_torchs_batch_norms(target)
    base = (0.1 if case == "sgd" else 2.0) * BATCH / 256
    optimizer = (Sgd if case == "sgd" else Lars)([*f.parameters(), *q.parameters()])
    total = STEPS_PER_EPOCH * EPOCHS
    assert len(seen["views"]) == STEPS
    for step, (x1, x2) in enumerate(seen["views"]):
        assert not torch.equal(x1, x2)
        if step < STEPS_PER_EPOCH:  # an epoch of warm-up
            rate = base * step / STEPS_PER_EPOCH
        else:
            part = (step - STEPS_PER_EPOCH) / (total - STEPS_PER_EPOCH)
            rate = base * 0.5 * (1 + math.cos(math.pi * part))
        tau = momentum
        if "--momentum-schedule" not in flags:
            tau = 1 - (1 - momentum) * (math.cos(math.pi * step / total) + 1) / 2
        p1, p2 = q(f(x1)), q(f(x2))
        with torch.no_grad():
            z1, z2 = target(x1), target(x2)
        loss = ((unit(p1) - unit(z2)) ** 2 + (unit(p2) - unit(z1)) ** 2).sum(dim=1).mean()
        for w in optimizer.velocities:
            w.grad = None
        loss.backward()
        optimizer.step(rate)
        with torch.no_grad():
            for t, w in zip(target.parameters(), f.parameters(), strict=True):
                t.copy_(tau * t + (1 - tau) * w)
        logged = seen["logged"][step]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert logged["lr"] == pytest.approx(rate, rel=1e-12)
        assert logged["momentum"] == pytest.approx(tau, rel=1e-12)
    model = after["model"]
    ours = (model.encoder, model.projector, model.predictor, after["target"])
    for a, b in zip(ours, (f[0], f[1], q, target), strict=True):
        for (n, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-7, atol=1e-9, msg=n)
    assert all(t.grad is None and not t.requires_grad for t in after["target"].parameters())
    start = [*before["target"].parameters()]
    online = [*model.encoder.parameters(), *model.projector.parameters()]
    if case == "no target":  # the target is the online network, bit for bit
        assert all(map(torch.equal, after["target"].parameters(), online))
    if case == "frozen target":
        assert all(map(torch.equal, after["target"].parameters(), start))
        assert not any(map(torch.equal, before["model"].parameters(), model.parameters()))


# -- constants ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (40, (0.45, 1e-6, 0.97)),
        (100, (0.45, 1e-6, 0.99)),
        (300, (0.3, 1e-6, 0.99)),
        (1000, (0.2, 1.5e-6, 0.996)),
        (200, (0.3, 1e-6, 0.99)),  # no source states it: as the next longer training
        (2000, (0.2, 1.5e-6, 0.996)),
    ],
)
def test_rate_decay_and_momentum_are_those_of_the_length(epochs, expected):
    config = byol.parse_arguments(["--epochs", str(epochs)])
    assert (config.lr, config.weight_decay, config.momentum) == expected
    assert config.settings == {}
    config = byol.parse_arguments(["--epochs", str(epochs), "--momentum", "0", "--lr", "7"])
    assert (config.lr, config.weight_decay, config.momentum) == (7.0, expected[1], 0.0)
    assert config.settings == {"momentum": 0.0, "lr": 7.0}


def test_presets():
    config = byol.parse_arguments([])
    assert (config.arch, config.epochs, config.batch_size, config.optimizer) == (
        "resnet50",
        1000,
        4096,
        "lars",
    )
    assert (config.warmup_epochs, config.momentum_schedule, config.lr_batch) == (10, "cosine", 256)
    first, second = byol.views_of(config)
    for view in (first, second):
        assert (view.size, view.scale, view.interpolation) == (224, (0.08, 1.0), "bicubic")
        assert (view.jitter, view.jitter_p, view.grey_p) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
        assert (view.flip_p, view.blur_sigma) == (0.5, (0.1, 2.0))
    assert [(v.blur_p, v.solarize_p) for v in (first, second)] == [(1.0, 0.0), (0.1, 0.2)]
    small = byol.parse_arguments(["--dataset", "cifar10"])
    # 0.24 of lightly, whose loss is a quarter of this one
    assert (small.lr * small.batch_size / small.lr_batch) == pytest.approx(0.24 / 4)
    assert (small.optimizer, small.momentum, small.weight_decay) == ("sgd", 0.99, 5e-4)


def test_heads_are_those_of_section_3_3():
    config = byol.parse_arguments(["--arch", "resnet18"])
    model = byol.BYOL(config)
    for head, inputs in ((model.projector, 512), (model.predictor, 256)):
        first, norm, relu, last = head
        assert (first.in_features, first.out_features) == (inputs, 4096)
        assert first.bias is not None and norm.affine and isinstance(relu, nn.ReLU)
        assert (last.in_features, last.out_features, last.bias) == (4096, 256, None)
    assert all(block.bn2.weight.all() for block in model.encoder.layer1)
    flags = ["--arch", "resnet18", "--zero-init-residual", "--no-predictor"]
    model = byol.BYOL(byol.parse_arguments(flags))
    assert not any(block.bn2.weight.any() for block in model.encoder.layer1)
    assert not [*model.predictor.parameters()]


@pytest.mark.parametrize("value", ["-0.1", "1.5"])
def test_a_momentum_beyond_0_and_1_is_a_mistake(value):
    with pytest.raises(UserError, match=r"--momentum .*: must lie between 0 and 1"):
        byol.parse_arguments(["--momentum", value])
