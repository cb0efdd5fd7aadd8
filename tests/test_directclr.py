"""DirectCLR: its loss against loops written from Eq. 2 and from the code, its projectors, d0 and
presets, and whole runs against a plain float64 replay on the views that the recipe saw.
"""

import copy
import math

import pytest
import torch
from conftest import small
from replay import (
    BATCH,
    EPOCHS,
    STEPS_PER_EPOCH,
    assert_states_are_close,
    watched_run,
    with_torchs_batch_norms,
)
from test_losses import cosine, draw
from test_ranks import two_ranks_are_one
from torch import nn

from common import cards
from common.augment import two_views
from common.errors import UserError
from eval.linear_probe.protocols import PROTOCOLS
from recipes import directclr
from recipes.directclr import RandomFeatures, SubVector, directclr_loss, draw_features

FORMS = ["paper", "official"]

# -- the loss -------------------------------------------------------------------------------------


def log_of_sum(scores):
    most = max(scores)
    return most + math.log(sum(math.exp(s - most) for s in scores))


def infonce_of_the_code(r1, r2, d0, temperature):
    """Follows main.py: rows of one view, columns of the other, diagonal targets, both ways / 2."""
    a, b = ([row[:d0] for row in r.tolist()] for r in (r1, r2))
    total = 0.0
    for rows, columns in ((a, b), (b, a)):
        for i, row in enumerate(rows):
            scores = [cosine(row, column) / temperature for column in columns]
            total += log_of_sum(scores) - scores[i]
    return total / (2 * len(a))


def equation_2(r1, r2, d0, temperature):
    """Takes -log exp(z_i z_i') / (sum over j != i of exp(z_i z_j) + exp(z_i z_i')), unit z."""
    a, b = ([row[:d0] for row in r.tolist()] for r in (r1, r2))
    total = 0.0
    for i, row in enumerate(a):
        positive = cosine(row, b[i]) / temperature
        negatives = [cosine(row, a[j]) / temperature for j in range(len(a)) if j != i]
        total += log_of_sum([*negatives, positive]) - positive
    return total / len(a)


ORACLES = {"paper": equation_2, "official": infonce_of_the_code}


@pytest.mark.parametrize("temperature", [0.003, 0.1, 40.0])
@pytest.mark.parametrize(("n", "d", "d0"), [(1, 3, 2), (2, 5, 5), (7, 4, 1), (16, 9, 4)])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_its_equation(form, n, d, d0, temperature):
    r1, r2 = draw(1, n, d), draw(2, n, d)
    value = directclr_loss(r1, r2, d0, temperature, form)
    expected = ORACLES[form](r1, r2, d0, temperature)
    assert value.dtype == torch.float64 and value.shape == ()
    assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_defaults_are_the_codes():
    r1, r2 = draw(3, 4, 400), draw(4, 4, 400)
    expected = infonce_of_the_code(r1, r2, 360, 0.1)
    assert directclr_loss(r1, r2).item() == pytest.approx(expected, rel=1e-11)


def test_analytic_cases():
    same = torch.ones(5, 3, dtype=torch.float64)
    for form in FORMS:
        assert directclr_loss(same, 7 * same, 2, 0.2, form).item() == pytest.approx(math.log(5))
    axes = torch.eye(4, dtype=torch.float64)
    for form in FORMS:  # the positive at 1/t, three negatives at 0
        expected = math.log1p(3 * math.exp(-10))
        assert directclr_loss(axes, axes, 4, 0.1, form).item() == pytest.approx(expected)
    r1 = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    r2 = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    # images alike in view 1 repel each other there; in the other view they are told apart
    paper = (math.log(2) + math.log1p(math.e)) / 2
    assert directclr_loss(r1, r2, 2, 1.0, "paper").item() == pytest.approx(paper)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("temperature", [0.05, 20.0])
def test_gradients_are_those_of_central_differences(form, temperature):
    r = [draw(seed, 5, 4, spread=0.3).requires_grad_() for seed in (11, 12)]
    directclr_loss(*r, 3, temperature, form).backward()
    h = 1e-6
    for view in range(2):
        assert not r[view].grad[:, 3].any()  # r[d0:] gets none
        for i in range(5):
            for j in range(3):
                ends = []
                for step in (h, -h):
                    moved = [x.detach().clone() for x in r]
                    moved[view][i, j] += step
                    ends.append(ORACLES[form](*moved, 3, temperature))
                slope = (ends[0] - ends[1]) / (2 * h)
                assert r[view].grad[i, j].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_gradient_at_ties_is_finite_and_float32_holds():
    r = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    for form in FORMS:
        (gradient,) = torch.autograd.grad(directclr_loss(r, r, 4, 0.001, form), r)
        assert gradient.isfinite().all()
        r1, r2 = draw(7, 8, 6), draw(8, 8, 6)
        value = directclr_loss(r1.float(), r2.float(), 5, 0.005, form)  # exp(200) does not fit
        assert value.dtype == torch.float32
        assert value.item() == pytest.approx(ORACLES[form](r1, r2, 5, 0.005), rel=1e-4)
        with torch.autocast("cpu", torch.bfloat16):
            again = directclr_loss(r1.float(), r2.float(), 5, 0.005, form)
        assert torch.equal(again, value)


def test_mistakes_are_value_errors():
    r = draw(0, 3, 4)
    for d0 in (0, 5):
        with pytest.raises(ValueError, match=f"d0 {d0} of 4 features"):
            directclr_loss(r, r, d0)
    with pytest.raises(ValueError, match="papre"):
        directclr_loss(r, r, 2, form="papre")


# -- what the loss sees ---------------------------------------------------------------------------


def test_random_features_are_a_draw_of_seed_and_step():
    first = draw_features(128, 22, 3, 5)
    assert first.dtype == torch.int64 and len({*first.tolist()}) == 22
    assert first.min() >= 0 and first.max() < 128
    assert torch.equal(first, draw_features(128, 22, 3, 5))
    for seed, step in ((3, 6), (4, 5)):
        assert not torch.equal(first, draw_features(128, 22, seed, step))
    seen = torch.zeros(64, dtype=torch.int64)
    for step in range(400):  # 400 draws of 16 of 64: each feature 100 times, within 5 deviations
        seen[draw_features(64, 16, 0, step)] += 1
    assert seen.sum() == 6400 and (seen - 100).abs().max() < 5 * math.sqrt(400 * 3 / 16)


def test_random_features_are_all_features_in_eval_mode():
    layer, r = RandomFeatures(), torch.arange(8.0).view(2, 4)
    layer.features = torch.tensor([3, 1])
    assert layer(r).tolist() == [[3, 1], [7, 5]]
    assert torch.equal(layer.eval()(r), r)


def head(*flags):
    model = directclr.DirectCLR(directclr.parse_arguments(["--arch", "resnet18", *flags]))
    described = []
    for layer in model.projector:
        if isinstance(layer, nn.Linear):
            assert layer.bias is None
            described.append((layer.in_features, layer.out_features))
        else:
            described.append(type(layer).__name__)
    return described, model.dim


def test_heads_are_the_codes():
    """They are main.py's, with 512, not 2048; the last batch norm has scale and offset."""
    mlp = [(512, 512), "BatchNorm1d", "ReLU", (512, 128), "BatchNorm1d"]
    assert head("--projector", "mlp") == (mlp, 128)
    narrow = [(512, 64), "BatchNorm1d", "ReLU", (64, 32), "BatchNorm1d"]
    flags = ["--projector-hidden", "64", "--output-dim", "32"]
    assert head("--projector", "mlp", *flags) == (narrow, 32)
    assert head("--projector", "linear") == ([(512, 128)], 128)
    for name, layer, dim in (
        ("none", nn.Identity, 512),
        ("directclr", SubVector, 90),
        ("random", RandomFeatures, 90),
    ):
        config = directclr.parse_arguments(["--arch", "resnet18", "--projector", name])
        model = directclr.DirectCLR(config)
        assert type(model.projector) is layer and model.dim == dim
        assert not [*model.projector.parameters()]
        assert not model.encoder.layer2[0].bn2.weight.any()


# -- runs -----------------------------------------------------------------------------------------

FLAGS = ["--max-steps", str(STEPS_PER_EPOCH + 2), "--warmup-epochs", "1"]
FLAGS += ["--weight-decay", "1e-3", "--lr", "2.4"]
READINGS = [["--d0", "20"], ["--follow", "official", "--temperature", "0.3"]]
OTHERS = [
    ["--arch", "resnet_lab"],
    ["--projector", "random", "--d0", "7"],
    ["--projector", "none", "--lr-batch", "64", "--follow", "official"],
    ["--projector", "linear", "--output-dim", "12"],
    ["--projector", "mlp", "--output-dim", "12", "--projector-hidden", "24"],
]
READINGS += [pytest.param(flags, marks=pytest.mark.long, id=" ".join(flags)) for flags in OTHERS]


def plain_loss(z1, z2, temperature, form):
    """Computes it as tensors that autograd goes through, one anchor at a time."""
    z1, z2 = (torch.stack([row / row.square().sum().sqrt() for row in z]) for z in (z1, z2))
    total = 0
    for i in range(len(z1)):
        positive = z1[i] @ z2[i] / temperature
        if form == "paper":
            others = [z1[i] @ z1[j] / temperature for j in range(len(z1)) if j != i]
            total = total + torch.stack([positive, *others]).logsumexp(0) - positive
        else:
            for rows, columns in ((z1, z2), (z2, z1)):
                total = total + (columns @ rows[i] / temperature).logsumexp(0) / 2 - positive / 2
    return total / len(z1)


def lars_step(weights, velocities, rate):
    """Writes one update out: tensors of one dimension are neither decayed nor adapted."""
    with torch.no_grad():
        for weight, velocity in zip(weights, velocities, strict=True):
            update = weight.grad.clone()
            if weight.ndim > 1:
                update += 1e-3 * weight
                update *= 0.001 * weight.norm() / update.norm()
            velocity.mul_(0.9).add_(update)
            weight.sub_(rate * velocity)
            weight.grad = None


@pytest.mark.parametrize("flags", READINGS, ids=" ".join)
def test_a_run_is_its_replay(flags, tmp_path, monkeypatch):
    """Each view has a forward, the loss sees a sub-vector, the rate goes from 0 to a thousandth."""
    seen = watched_run(directclr, [*FLAGS, *flags], tmp_path / "run", monkeypatch)
    config = directclr.parse_arguments(["--arch", "tiny", *FLAGS, *flags])
    model, after = copy.deepcopy(seen["before"]["model"]), seen["after"]["model"]
    encoder, projector = map(with_torchs_batch_norms, (model.encoder, model.projector))
    weights = [*encoder.parameters(), *projector.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    base = 2.4 * BATCH / 64 if "--lr-batch" in flags else 2.4
    assert len(seen["views"]) == STEPS_PER_EPOCH + 2
    for step, (x1, x2) in enumerate(seen["views"]):
        assert not torch.equal(x1, x2)
        rate = base * step / STEPS_PER_EPOCH
        if step >= STEPS_PER_EPOCH:
            done = (step - STEPS_PER_EPOCH) / (STEPS_PER_EPOCH * (EPOCHS - 1))
            share = (1 + math.cos(math.pi * done)) / 2
            rate = base * share + 0.001 * base * (1 - share)
        r1, r2 = encoder(x1), encoder(x2)  # batch norms see one view at a time
        if config.projector == "random":
            columns = draw_features(r1.shape[1], 7, 3, step)
            z1, z2 = r1[:, columns], r2[:, columns]
        elif config.projector == "directclr":
            z1, z2 = (r.split([config.d0, r.shape[1] - config.d0], dim=1)[0] for r in (r1, r2))
        else:
            z1, z2 = projector(r1), projector(r2)
        loss = plain_loss(z1, z2, config.temperature, config.loss)
        loss.backward()
        lars_step(weights, velocities, rate)
        logged = seen["logged"][step]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-8)
        assert logged["lr"] == pytest.approx(rate, rel=1e-12)
    assert_states_are_close([(after.encoder, encoder), (after.projector, projector)])


@pytest.mark.long
@pytest.mark.parametrize("flags", [["--follow", "official"], ["--projector", "random"]], ids=str)
def test_two_ranks_train_as_one(flags, tmp_path):
    two_ranks_are_one(tmp_path, "directclr", *flags)


# -- settings -------------------------------------------------------------------------------------

PAPER = dict(
    arch="resnet50",
    epochs=100,
    batch_size=4096,
    lr=4.8,
    lr_batch=0,
    optimizer="lars",
    sgd_momentum=0.9,
    weight_decay=1e-6,
    warmup_epochs=10,
    lr_end=0.001,
    temperature=0.1,
    projector="directclr",
    d0=360,
    loss="paper",
    views="byol",
    zero_init_residual=True,
)
SMALL = PAPER | dict(image_size=32, views="cifar", zero_init_residual=False)
CASES = {
    "": PAPER,
    "--follow official": PAPER | dict(loss="official"),
    "--dataset cifar10": SMALL
    | dict(arch="resnet18_cifar", batch_size=512, epochs=200, d0=90)
    | dict(lr_batch=4096, temperature=0.5),
    "--dataset photos": SMALL
    | dict(arch="resnet_lab", batch_size=64, epochs=10, d0=22)
    | dict(lr_batch=64, optimizer="sgd", weight_decay=5e-4, warmup_epochs=1)
    | {n: directclr.PRESETS["photos"][n] for n in ("lr",)},
}


@pytest.mark.parametrize("case", CASES)
def test_presets(case):
    config = directclr.parse_arguments(case.split())
    assert {name: getattr(config, name) for name in CASES[case]} == CASES[case]
    assert config.settings == {}
    if "dataset" not in case:
        assert directclr.views_of(config) == [*two_views("byol", 224, 0.08, "bicubic")]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--loss official", {"loss": "official"}),
        ("--projector none", {"projector": "none"}),
        ("--d0 360", {}),
        ("--d0 100 --projector random", {"projector": "random", "d0": 100}),
        ("--arch resnet18", {}),
    ],
)
def test_what_a_record_says_of_a_run(flags, settings):
    assert directclr.parse_arguments(flags.split()).settings == settings


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--d0 2049", "--d0 2049: resnet50 has 2048 features"),
        ("--d0 0", "--d0 0: must be above 0"),
        ("--projector mlp --d0 90", "--d0 90: --projector mlp does not read it, leave it out"),
        ("--projector none --d0 2048", "--d0 2048: --projector none does not read it"),
        ("--projector single", "single"),
    ],
)
def test_mistakes_are_one_line(flags, said):
    with pytest.raises(UserError, match=said):
        directclr.parse_arguments(flags.split())


def test_its_protocols():
    card = cards.load()["directclr"]
    assert (card.linear, card.finetune) == ("directclr", None)
    ours, simclr = PROTOCOLS["directclr"], PROTOCOLS["simclr"]
    assert ours.assumed and not simclr.assumed
    assert (ours.optimizer, ours.lrs, ours.batch) == (simclr.optimizer, simclr.lrs, simclr.batch)


def test_its_smallest_run_has_features_that_the_loss_does_not_see():
    config = directclr.parse_arguments(small("directclr"))
    assert (config.arch, config.d0) == ("tiny", 11)
