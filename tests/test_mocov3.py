"""MoCo-v3 step by step: a plain replay in float64 on the views that the recipe saw; SNCLR without
neighbours, which is the same; its constants.

Written from the facts about the released code: encoder calls view by view, torch's own batch norms,
the momentum encoder moved after the queries and before the keys, LARS and AdamW by hand.
"""

import copy
import math

import pytest
import torch
from replay import BATCH, EPOCHS, STEPS, STEPS_PER_EPOCH, watched_run, with_torchs_batch_norms
from test_micro_batch import tiny_vit
from torch import nn

from common.errors import UserError
from recipes import mocov3, snclr

SMALL = ["--image-size", "32", "--warmup-epochs", "1"]
SMALL += ["--output-dim", "8", "--projector-hidden", "32", "--predictor-hidden", "16"]


class Lars:
    """LARS: u = g + wd w, times 0.001 |w| / |u|, for tensors of two or more dimensions; v = 0.9 v +
    u, w = w - rate v.
    """

    def __init__(self, parameters, decay):
        self.decay, self.steps = decay, 0
        self.state = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in parameters}

    @torch.no_grad()
    def step(self, rate):
        self.steps += 1
        for w, state in self.state.items():
            if w.grad is not None:
                self.move(w, w.grad, rate, *state)

    def move(self, w, u, rate, v, _):
        if w.ndim > 1:
            u = u + self.decay * w
            u = u * 0.001 * w.norm() / u.norm()
        v.copy_(0.9 * v + u)
        w.copy_(w - rate * v)


class AdamW(Lars):
    def move(self, w, g, rate, first, second):
        w.copy_(w - rate * self.decay * w)  # every tensor, biases and norms too
        first.copy_(0.9 * first + 0.1 * g)
        second.copy_(0.999 * second + 0.001 * g * g)
        mean, square = first / (1 - 0.9**self.steps), second / (1 - 0.999**self.steps)
        w.copy_(w - rate * mean / (square.sqrt() + 1e-8))


def info_nce(q, k, temperature):
    q, k = q / q.norm(dim=1, keepdim=True), k / k.norm(dim=1, keepdim=True)
    logits = q @ k.T / temperature
    return 2 * temperature * (logits.logsumexp(dim=1) - logits.diagonal()).mean()


CASES = {
    "resnet": (["--arch", "tiny", "--lr", "2"], Lars, 2.0, 1.0, 1.5e-6, 0.99),
    "vit": (["--arch", "vit_small_mocov3", "--lr", "0.01"], AdamW, 0.01, 0.2, 0.1, 0.99),
}


@pytest.mark.parametrize("case", CASES)
def test_a_run_is_its_replay(case, tmp_path, monkeypatch):
    flags, optimizer, base, temperature, decay, momentum = CASES[case]
    if case == "vit":
        monkeypatch.setattr(mocov3, "build_encoder", tiny_vit)
    else:  # of 1000 epochs
        flags = [*flags, "--weight-decay", str(decay), "--momentum", str(momentum)]
    seen = watched_run(mocov3, [*SMALL, *flags], tmp_path / "run", monkeypatch)
    before, after = seen["before"], seen["after"]
    model = copy.deepcopy(before["model"])
    f = with_torchs_batch_norms(nn.Sequential(model.encoder, model.projector))
    g = with_torchs_batch_norms(model.predictor)
    target = with_torchs_batch_norms(copy.deepcopy(before["target"]))
    for t, w in zip(target.parameters(), f.parameters(), strict=True):
        assert torch.equal(t, w)
    frozen = [n for n, p in f[0].named_parameters() if not p.requires_grad]
    wanted = ["patch_embed.proj.weight", "patch_embed.proj.bias"] if case == "vit" else []
    assert frozen == wanted
    optimizer = optimizer([*f.parameters(), *g.parameters()], decay)
    base, total = base * BATCH / 256, STEPS_PER_EPOCH * EPOCHS
    assert len(seen["views"]) == STEPS
    for step, (x1, x2) in enumerate(seen["views"]):
        epoch = step / STEPS_PER_EPOCH
        rate = base * epoch
        if epoch >= 1:
            rate = base * 0.5 * (1 + math.cos(math.pi * (epoch - 1) / (EPOCHS - 1)))
        m = 1 - 0.5 * (1 + math.cos(math.pi * step / total)) * (1 - momentum)
        q1, q2 = g(f(x1)), g(f(x2))
        with torch.no_grad():
            for t, w in zip(target.parameters(), f.parameters(), strict=True):
                t.copy_(m * t + (1 - m) * w)
            k1, k2 = target(x1), target(x2)
        loss = info_nce(q1, k2, temperature) + info_nce(q2, k1, temperature)
        for w in optimizer.state:
            w.grad = None
        loss.backward()
        optimizer.step(rate)
        logged = seen["logged"][step]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-8)
        assert logged["lr"] == pytest.approx(rate, rel=1e-12)
        assert logged["momentum"] == pytest.approx(m, rel=1e-12)
    model = after["model"]
    ours = (model.encoder, model.projector, model.predictor, after["target"])
    for a, b in zip(ours, (f[0], f[1], g, target), strict=True):
        for (n, x), (_, y) in zip(a.state_dict().items(), b.state_dict().items(), strict=True):
            torch.testing.assert_close(x, y, rtol=1e-6, atol=1e-8, msg=n)
    start = dict(before["model"].encoder.named_parameters())
    for name, w in model.encoder.named_parameters():
        assert torch.equal(w, start[name]) == (name in frozen), name
    assert all(t.grad is None and not t.requires_grad for t in after["target"].parameters())


@pytest.mark.parametrize("arch", ["tiny", "vit_small_mocov3"])
def test_snclr_as_its_code_without_neighbours_is_a_run_of_mocov3(arch, tmp_path, monkeypatch):
    """First weights, views, losses, rates and final weights are the same."""
    for recipe in (mocov3, snclr):
        if arch.startswith("vit"):
            monkeypatch.setattr(recipe, "build_encoder", tiny_vit)
    shared = ["--arch", arch, "--lr", "0.01", "--weight-decay", "0.1", "--temperature", "0.2"]
    shared += ["--momentum", "0.99", "--crop-min", "0.08"]
    extra = ["--follow", "official", "--neighbours", "0", "--queue-size", "64"]
    (tmp_path / "a").mkdir()
    with monkeypatch.context() as patch:
        one = watched_run(mocov3, [*SMALL, *shared], tmp_path / "a" / "run", patch)
    with monkeypatch.context() as patch:
        other = watched_run(snclr, [*SMALL, *shared, *extra], tmp_path / "run", patch)
    for a, b in zip(one["logged"], other["logged"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)
        assert a["lr"] == pytest.approx(b["lr"], rel=1e-12)
    ours, theirs = (run["after"]["model"].state_dict() for run in (one, other))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-7, atol=1e-9, msg=name)


# -- constants ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (100, (0.6, 1e-6, 0.99)),
        (300, (0.3, 1e-6, 0.99)),
        (1000, (0.3, 1.5e-6, 0.996)),
        (800, (0.3, 1.5e-6, 0.996)),  # App. A, and as the next longer training
        (200, (0.3, 1e-6, 0.99)),  # no source states it: as the next longer training
    ],
)
def test_a_resnets_rate_decay_and_momentum_are_those_of_the_length(epochs, expected):
    config = mocov3.parse_arguments(["--epochs", str(epochs)])
    assert (config.lr, config.weight_decay, config.momentum) == expected
    assert config.settings == {}


def test_a_resnet_has_no_patch_embedding_to_freeze():
    said = "^--freeze-patch-embedding: resnet50 has none, leave it out$"
    with pytest.raises(UserError, match=said):
        mocov3.parse_arguments(["--freeze-patch-embedding"])
    config = mocov3.parse_arguments(["--arch", "vit_small", "--no-freeze-patch-embedding"])
    assert config.settings == {"freeze_patch_embedding": False}


SHARED = dict(batch_size=4096, momentum_schedule="cosine", crop_interpolation="bilinear")
RESNET = SHARED | dict(optimizer="lars", warmup_epochs=10, temperature=1.0, crop_min=0.2)
RESNET |= dict(epochs=1000, freeze_patch_embedding=False, zero_init_residual=True)
VIT = SHARED | dict(optimizer="adamw", warmup_epochs=40, temperature=0.2, crop_min=0.08)
VIT |= dict(epochs=300, freeze_patch_embedding=True, lr=1.5e-4, weight_decay=0.1, momentum=0.99)


@pytest.mark.parametrize(
    ("arch", "expected"),
    [("resnet50", RESNET), ("vit_small_mocov3", VIT), ("vit_base_mocov3", VIT)],
)
def test_presets(arch, expected):
    config = mocov3.parse_arguments(["--arch", arch])
    assert {n: getattr(config, n) for n in expected} == expected
    for view, own in zip(mocov3.views_of(config), ((1.0, 0.0), (0.1, 0.2)), strict=True):
        assert (view.size, view.scale) == (224, (expected["crop_min"], 1.0))
        assert (view.jitter, view.jitter_p, view.grey_p) == ((0.4, 0.4, 0.2, 0.1), 0.8, 0.2)
        assert (view.flip_p, view.interpolation) == (0.5, "bilinear")
        assert (view.blur_p, view.solarize_p) == own


def layers(head):
    described = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            assert layer.bias is None
            described.append((layer.in_features, layer.out_features))
        else:
            described.append("relu" if isinstance(layer, nn.ReLU) else layer.affine)
    return described


def test_heads_are_those_of_the_code(monkeypatch):
    model = mocov3.MoCo(mocov3.parse_arguments(["--arch", "resnet18"]))
    hidden = [(256, 4096), True, "relu", (4096, 256)]
    assert layers(model.projector) == [(512, 4096), True, "relu", (4096, 256), False]
    assert layers(model.predictor) == hidden
    assert not any(block.bn2.weight.any() for block in model.encoder.layer1)
    monkeypatch.setattr(mocov3, "build_encoder", tiny_vit)
    model = mocov3.MoCo(mocov3.parse_arguments(["--arch", "vit_small_mocov3"]))
    wide = [(32, 4096), True, "relu", (4096, 4096), True, "relu", (4096, 256), False]
    assert layers(model.projector) == wide
    assert layers(model.predictor) == [*hidden, False]
    flags = ["--arch", "vit_small_mocov3", "--no-predictor", "--no-freeze-patch-embedding"]
    model = mocov3.MoCo(mocov3.parse_arguments(flags))
    assert not [*model.predictor.parameters()]
    assert all(p.requires_grad for p in model.encoder.parameters())
