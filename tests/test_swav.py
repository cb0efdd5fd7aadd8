"""SwAV: Sinkhorn and the loss against loops on Python floats, its steps against a plain replay on
the views that the recipe saw.
"""

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
from thread_ranks import on_ranks
from torch import nn

from common.augment import View
from common.errors import UserError
from common.run import checkpoint
from recipes import swav
from recipes.swav import code_entropy, prototype_usage, sinkhorn, swav_loss

# -- Sinkhorn -------------------------------------------------------------------------------------


def cosines(seed, n, k):
    generator = torch.Generator().manual_seed(seed)
    return 2 * torch.rand(n, k, generator=generator, dtype=torch.float64) - 1


def balanced(scores, epsilon, iterations):
    """Computes main_swav.py's distributed_sinkhorn on lists of rows, one process."""
    M, K = len(scores), len(scores[0])
    Q = [[math.exp(s / epsilon) for s in row] for row in scores]
    total = math.fsum(q for row in Q for q in row)
    Q = [[q / total for q in row] for row in Q]
    for _ in range(iterations):
        sums = [math.fsum(row[k] for row in Q) for k in range(K)]
        Q = [[q / sums[k] / K for k, q in enumerate(row)] for row in Q]
        Q = [[q / math.fsum(row) / M for q in row] for row in Q]
    return torch.tensor([[M * q for q in row] for row in Q], dtype=torch.float64)


@pytest.mark.parametrize("iterations", [0, 1, 3, 10])
@pytest.mark.parametrize("epsilon", [0.004, 0.05, 2.0])
@pytest.mark.parametrize("shape", [(1, 1), (1, 3), (2, 5), (7, 4), (16, 9)])
def test_sinkhorn_is_the_codes(shape, epsilon, iterations):
    scores = cosines(1, *shape)
    codes = sinkhorn(scores.clone().requires_grad_(), epsilon, iterations)
    assert codes.dtype == torch.float64 and not codes.requires_grad
    expected = balanced(scores.tolist(), epsilon, iterations)
    torch.testing.assert_close(codes, expected, rtol=1e-9, atol=1e-300)
    if iterations:
        torch.testing.assert_close(codes.sum(1), torch.ones(shape[0], dtype=torch.float64))


def test_sinkhorns_defaults_are_the_codes():
    scores = cosines(2, 6, 4)
    torch.testing.assert_close(sinkhorn(scores), balanced(scores.tolist(), 0.05, 3))


def test_sinkhorn_holds_in_float32_where_its_exponentials_do_not():
    """exp(1 / 0.004) is beyond float32, and exp(-1 / 0.004) is 0 in it."""
    scores = cosines(3, 12, 5)
    scores[:, 0] = -1
    codes = sinkhorn(scores.float(), 0.004)
    assert codes.dtype == torch.float32
    torch.testing.assert_close(
        codes.double(), balanced(scores.tolist(), 0.004, 3), rtol=1e-3, atol=1e-6
    )
    assert sinkhorn(scores.bfloat16()).dtype == torch.float32


def test_equal_scores_are_assigned_to_all_prototypes_alike():
    """This is the README's collapse: 1/K is the only code that uses all alike."""
    for iterations in (0, 1, 3):
        codes = sinkhorn(torch.full((6, 4), 0.3, dtype=torch.float64), 0.05, iterations)
        torch.testing.assert_close(codes, torch.full_like(codes, 0.25))


def test_many_iterations_use_every_prototype_alike_and_few_only_nearly():
    scores = cosines(4, 60, 6)
    shares = [sinkhorn(scores, 0.5, n).mean(0) for n in (1, 200)]
    assert (shares[1] - 1 / 6).abs().max() < 1e-9 < (shares[0] - 1 / 6).abs().max()


@pytest.mark.parametrize("iterations", [0, 1, 3])
def test_codes_of_two_ranks_are_those_of_one(iterations, monkeypatch):
    """Parts may differ in size, as a queue's shares may."""
    scores = cosines(5, 13, 6)
    whole = sinkhorn(scores, 0.05, iterations)
    halves = [scores[:6], scores[6:]]
    parts = on_ranks(monkeypatch, swav, lambda s: sinkhorn(s, 0.05, iterations), halves)
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-12, atol=1e-300)


# -- the loss -------------------------------------------------------------------------------------


def swapped(scores, codes, temperature):
    """Computes the loss on Python floats; crop v predicts the code of each other crop s."""
    total = 0.0
    for s, of_code in enumerate(codes):
        for v, of_crop in enumerate(scores):
            if v == s:
                continue
            rows = []
            for q, row in zip(of_code, of_crop, strict=True):
                most = max(row) / temperature
                norm = most + math.log(math.fsum(math.exp(x / temperature - most) for x in row))
                rows.append(-math.fsum(a * (x / temperature - norm) for a, x in zip(q, row)))  # noqa: B905
            total += math.fsum(rows) / len(rows) / (len(scores) - 1)
    return total / len(codes)


def crops(seed, number, n, k):
    return [cosines(10 * seed + v, n, k) for v in range(number)]


@pytest.mark.parametrize("temperature", [0.004, 0.1, 30.0])
@pytest.mark.parametrize("numbers", [(2, 2), (2, 1), (3, 3), (8, 2)])
@pytest.mark.parametrize("shape", [(1, 2), (3, 1), (6, 5)])
def test_the_loss_is_the_swapped_prediction(shape, numbers, temperature):
    scores = crops(1, numbers[0], *shape)
    codes = [sinkhorn(s) for s in scores[: numbers[1]]]
    value = swav_loss(scores, codes, temperature)
    assert value.dtype == torch.float64 and value.shape == ()
    expected = swapped([s.tolist() for s in scores], [q.tolist() for q in codes], temperature)
    assert value.item() == pytest.approx(expected, rel=1e-10, abs=1e-13)


def test_two_crops_give_half_the_sum_of_both_directions():
    scores = crops(2, 2, 7, 4)
    codes = [sinkhorn(s) for s in scores]
    there = -(codes[0] * (scores[1] / 0.1).log_softmax(1)).sum(1).mean()
    back = -(codes[1] * (scores[0] / 0.1).log_softmax(1)).sum(1).mean()
    assert swav_loss(scores, codes).item() == pytest.approx((there + back).item() / 2, rel=1e-12)


def test_gradients_are_those_of_differences_and_codes_get_none():
    scores = [s.requires_grad_() for s in crops(3, 3, 4, 3)]
    codes = [sinkhorn(s).requires_grad_() for s in scores[:2]]
    assert torch.autograd.gradcheck(lambda *s: swav_loss(s, codes, 0.3), scores)
    swav_loss(scores, codes, 0.3).backward()
    assert all(q.grad is None for q in codes) and all(s.grad.abs().min() > 0 for s in scores)
    # the gradient of crop v is (S' softmax - sum of the others' codes) / (t N S (V - 1))
    share = (scores[2] / 0.3).softmax(1) * 2 - codes[0] - codes[1]
    torch.testing.assert_close(scores[2].grad, (share / (0.3 * 4 * 2 * 2)).detach())


def test_ties_and_collapse_cost_ln_k():
    """The code's README says so: a run is stuck at ln 3000 = 8.006."""
    same = [torch.full((3, 3000), 0.2, dtype=torch.float64) for _ in range(2)]
    codes = [sinkhorn(s) for s in same]
    assert swav_loss(same, codes).item() == pytest.approx(math.log(3000), rel=1e-12)
    assert code_entropy(codes[0]).item() == pytest.approx(1, rel=1e-12)
    assert prototype_usage(same[0]).item() == 0


def test_the_loss_is_never_computed_in_less_than_float32():
    scores = [s.bfloat16() for s in crops(4, 2, 5, 4)]
    codes = [sinkhorn(s) for s in scores]
    expected = swav_loss([s.float() for s in scores], codes)
    with torch.autocast("cpu", torch.bfloat16):
        value = swav_loss(scores, codes)
    assert value.dtype == torch.float32 and torch.equal(value, expected)


@pytest.mark.parametrize("numbers", [(1, 1), (2, 0), (2, 3)])
def test_crops_and_codes_that_do_not_fit_are_refused(numbers):
    scores = crops(5, 3, 2, 3)
    with pytest.raises(ValueError, match="2 or more crops"):
        swav_loss(scores[: numbers[0]], scores[: numbers[1]])


def test_what_is_watched(monkeypatch):
    codes = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    assert code_entropy(codes).item() == pytest.approx(0.25)  # ln 2 of ln 4, half the time
    scores = torch.eye(4, dtype=torch.float64)
    assert prototype_usage(scores).item() == pytest.approx(1)
    assert prototype_usage(torch.eye(4, 9)).item() == pytest.approx(1)  # 4 images can use no more
    assert prototype_usage(scores[[0, 0, 1, 1]]).item() == pytest.approx(0.5)
    halves = on_ranks(monkeypatch, swav, prototype_usage, [scores[[0, 0]], scores[[1, 1]]])
    assert [h.item() for h in halves] == pytest.approx([0.5, 0.5])


# -- a run, step by step --------------------------------------------------------------------------

FLAGS = ["--prototypes", "11", "--projector-hidden", "24", "--output-dim", "12"]
FLAGS += ["--lr", "30", "--weight-decay", "0.01", "--freeze-prototypes-steps", "2"]
RUNS = {
    "multi-crop": "--multi-crop --small-crops 3 --small-crop-size 8 --warmup-epochs 0.4",
    "queue": "--no-multi-crop --queue-size 50 --queue-start-epoch 0 --warmup-epochs 0"
    " --epsilon 0.1",
    "late queue": "--no-multi-crop --queue-size 32 --queue-start-epoch 1 --warmup-epochs 0"
    " --sinkhorn-iterations 2",
}


class LARCByHand:
    """LARC of apex's LARC.py with clip off, around torch's SGD with momentum 0.9."""

    def __init__(self, parameters, decay):
        self.parameters, self.decay = parameters, decay
        self.velocities = {}

    @torch.no_grad()
    def step(self, rate):
        for number, p in enumerate(self.parameters):
            if p.grad is None:
                continue
            g = p.grad
            if p.norm() != 0 and g.norm() != 0:
                ratio = 0.001 * p.norm() / (g.norm() + self.decay * p.norm() + 1e-8)
                g = (g + self.decay * p) * ratio
            before = self.velocities.get(number, torch.zeros_like(p))
            self.velocities[number] = 0.9 * before + g
            p.sub_(rate * self.velocities[number])
            p.grad = None


@pytest.mark.parametrize("name", RUNS)
def test_a_run_is_its_replay(name, tmp_path, monkeypatch):
    """Each resolution has one forward, and the head one. The queue is in Sinkhorn alone, once it is
    full; prototypes have length 1 before each forward, fixed at first; LARC is on every tensor.
    """
    flags = RUNS[name].split()
    seen = watched_run(swav, [*FLAGS, *flags], tmp_path / "run", monkeypatch)
    model, after = seen["before"]["model"], seen["after"]["model"]
    encoder, projector = model.encoder, model.projector
    prototypes = model.prototypes.weight
    with_torchs_batch_norms(nn.ModuleList([encoder, projector]))
    both = nn.ModuleList([with_torchs_batch_norms(encoder), with_torchs_batch_norms(projector)])
    optimizer = LARCByHand([*both.parameters(), prototypes], 0.01)
    epsilon = 0.1 if name == "queue" else 0.05
    iterations = 2 if name == "late queue" else 3
    begins, length = {"multi-crop": (99, 0), "queue": (0, 50), "late queue": (5, 32)}[name]
    past = [[], []]
    for step, (x1, x2, *small) in enumerate(seen["views"]):
        assert len(small) == (3 if name == "multi-crop" else 0)
        rate, total = 30.0, STEPS_PER_EPOCH * EPOCHS
        warmup = 2 if name == "multi-crop" else 0
        if step < warmup:
            rate = 30 * (1 / 16 + 15 / 16 * step / 2)
        else:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))
            rate = 30 * (0.001 + 0.999 * cosine)
        with torch.no_grad():
            prototypes.div_(prototypes.norm(dim=1, keepdim=True))
        features = [encoder(torch.cat([x1, x2]))]
        features += [encoder(torch.cat(small))] if small else []
        z = projector(torch.cat(features))
        z = (z / z.norm(dim=1, keepdim=True)).split(BATCH)
        scores = [part @ prototypes.T for part in z]
        loss, codes = 0, []
        for s in (0, 1):
            with torch.no_grad():
                older = torch.cat([*past[s], z[s][:0]])
                joined = scores[s]
                if length and len(older) >= length:
                    joined = torch.cat([older[-length:] @ prototypes.T, scores[s]])
                Q = (joined / epsilon).exp()
                Q = Q / Q.sum()
                for _ in range(iterations):
                    Q = Q / Q.sum(0) / Q.shape[1]
                    Q = Q / Q.sum(1, keepdim=True) / Q.shape[0]
                q = (Q * Q.shape[0])[-BATCH:]
                codes.append(q)
            for v in range(len(z)):
                if v != s:
                    p = (scores[v] / 0.1).log_softmax(1)
                    loss = loss - (q * p).sum(1).mean() / (len(z) - 1) / 2
        loss.backward()
        if step < 2:
            prototypes.grad = None
        optimizer.step(rate)
        logged = seen["logged"][step]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert logged["lr"] == pytest.approx(rate, rel=1e-12)
        entropy = -(codes[0] * codes[0].log()).sum(1).mean().item() / math.log(11)
        assert logged["code_entropy"] == pytest.approx(entropy, rel=1e-9)
        assert 0 <= logged["prototype_usage"] <= 1
        if step >= begins:
            for s in (0, 1):
                past[s].append(z[s].detach())
    assert len(seen["views"]) == STEPS
    assert len(torch.cat([*past[0], z[0][:0]])) >= length  # so the queue was full, and used
    assert_states_are_close([(after.encoder, encoder), (after.projector, projector)])
    torch.testing.assert_close(after.prototypes.weight, prototypes, rtol=1e-7, atol=1e-9)
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt")["state"]
    assert ("past" in state) == (length > 0)
    if length:
        held = state["past"]["ranks"][0]["embeddings"]
        expected = torch.cat([torch.cat(side)[-length:] for side in past], dim=1)
        order = held[:, 0].argsort(), expected[:, 0].argsort()
        torch.testing.assert_close(held[order[0]], expected[order[1]], rtol=1e-7, atol=1e-9)


# -- settings -------------------------------------------------------------------------------------

CODE = dict(  # scripts/swav_800ep_pretrain.sh
    arch="resnet50",
    epochs=800,
    batch_size=4096,
    lr=4.8,
    lr_batch=0,
    optimizer="larc",
    sgd_momentum=0.9,
    weight_decay=1e-6,
    warmup_epochs=10,
    prototypes=3000,
    epsilon=0.05,
    sinkhorn_iterations=3,
    temperature=0.1,
    freeze_prototypes_steps=313,
    queue_size=0,
    queue_start_epoch=15,
    projector_hidden=2048,
    output_dim=128,
)


def test_without_flags_it_is_the_script_for_800_epochs():
    config = swav.parse_arguments([])
    assert {name: getattr(config, name) for name in CODE} == CODE and config.settings == {}
    assert config.lr_end * config.lr == pytest.approx(0.0048)
    assert config.warmup_start * config.lr == pytest.approx(0.3)
    assert not hasattr(config, "follow")


def test_crops_are_those_of_the_scripts():
    views = swav.views_of(swav.parse_arguments([]))
    assert [(v.size, v.scale) for v in views] == [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6
    two = swav.views_of(swav.parse_arguments(["--no-multi-crop"]))
    assert [(v.size, v.scale) for v in two] == [(224, (0.08, 1.0))] * 2
    colours = View(224, (0.08, 1.0), (0.8, 0.8, 0.8, 0.2), blur_p=0.5, interpolation="bilinear")
    assert two == [colours] * 2
    assert {(v.jitter, v.jitter_p, v.grey_p, v.blur_p, v.solarize_p) for v in views} == {
        ((0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5, 0.0)
    }


def test_the_heads_are_the_codes():
    model = swav.SwAV(swav.parse_arguments(["--arch", "resnet18"]))
    first, norm, _, last = model.projector
    assert (first.in_features, first.out_features, last.out_features) == (512, 2048, 128)
    assert first.bias is not None and last.bias is not None and isinstance(norm, nn.BatchNorm1d)
    assert model.prototypes.weight.shape == (3000, 128) and model.prototypes.bias is None
    assert all(block.bn2.weight.all() for block in model.encoder.layer2)
    model.normalize_prototypes()
    torch.testing.assert_close(model.prototypes.weight.norm(dim=1), torch.ones(3000))


def test_small_crops_that_cannot_be_are_one_line():
    assert swav.parse_arguments(["--arch", "vit_small"]).settings == {}
    assert not swav.parse_arguments(["--arch", "vit_small"]).multi_crop
    with pytest.raises(UserError, match=r"--multi-crop needs a ResNet"):
        swav.parse_arguments(["--arch", "vit_small", "--multi-crop"])
    with pytest.raises(UserError, match=r"--multi-crop-scale must lie between 0.05 and 1"):
        swav.parse_arguments(["--multi-crop-scale", "0.05"])
