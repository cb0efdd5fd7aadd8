"""SimCLR: its loss against loops written from Eq. 1, its head, rates and presets, and whole runs
against a plain float64 replay on the views that the recipe saw.
"""

import copy
import dataclasses
import math

import pytest
import torch
from replay import BATCH, EPOCHS, RUN, STEPS_PER_EPOCH, watched_run, with_torchs_batch_norms
from test_losses import cosine, draw
from torch import nn

from common.errors import UserError
from common.run.flags import changed_fields
from recipes import simclr
from recipes.simclr import contrastive_accuracy, nt_xent, simclr_loss

# -- the loss -------------------------------------------------------------------------------------


def product(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def equation_1(z1, z2, temperature, similarity=cosine):
    """Computes (1/2N) sum over k of l(2k-1, 2k) + l(2k, 2k-1), an image's views side by side."""
    z = [row for pair in zip(z1.tolist(), z2.tolist(), strict=True) for row in pair]
    losses = []
    for i in range(len(z)):
        j = i + 1 if i % 2 == 0 else i - 1
        scores = {k: similarity(z[i], z[k]) / temperature for k in range(len(z)) if k != i}
        most = max(scores.values())
        total = most + math.log(sum(math.exp(s - most) for s in scores.values()))
        losses.append(total - scores[j])
    return sum(losses) / len(losses)


@pytest.mark.parametrize("temperature", [0.003, 0.1, 0.5, 40.0])
@pytest.mark.parametrize("shape", [(1, 3), (2, 5), (7, 4), (16, 9)])
def test_nt_xent_is_equation_1(shape, temperature):
    z1, z2 = draw(1, *shape), draw(2, *shape)
    value = nt_xent(z1, z2, temperature)
    assert value.dtype == torch.float64
    assert value.item() == pytest.approx(equation_1(z1, z2, temperature), rel=1e-11, abs=1e-13)


def test_default_temperature_is_that_of_imagenet():
    z1, z2 = draw(3, 6, 4), draw(4, 6, 4)
    assert nt_xent(z1, z2).item() == pytest.approx(equation_1(z1, z2, 0.1), rel=1e-11)


@pytest.mark.parametrize("temperature", [10.0, 100.0])
def test_without_the_norm_scores_are_products(temperature):
    z1, z2 = draw(5, 6, 4, spread=1.0), draw(6, 6, 4, spread=1.0)
    expected = equation_1(z1, z2, temperature, product)
    assert nt_xent(z1, z2, temperature, l2_norm=False).item() == pytest.approx(expected, rel=1e-11)
    assert expected != pytest.approx(equation_1(z1, z2, temperature), rel=1e-3)


def test_holds_in_float32():
    z1, z2 = draw(7, 8, 6), draw(8, 8, 6)
    z1[0] = 3 * z2[0]
    value = nt_xent(z1.float(), z2.float(), 0.005)  # exp(200) does not fit float32
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(equation_1(z1, z2, 0.005), rel=1e-4)


def test_analytic_cases():
    same = torch.ones(5, 3, dtype=torch.float64)
    assert nt_xent(same, 7 * same, 0.2).item() == pytest.approx(math.log(9))  # ties
    axes = torch.eye(2, dtype=torch.float64)
    # the positive at 1/t, the two embeddings of the other image at 0
    assert nt_xent(3 * axes, axes, 0.1).item() == pytest.approx(math.log1p(2 * math.exp(-10)))
    # the positive and one negative at 0, the other negative at 1/t
    swapped = 10 + math.log1p(2 * math.exp(-10))
    assert nt_xent(axes, axes.flip(0), 0.1).item() == pytest.approx(swapped)
    assert nt_xent(axes[:1], axes[1:], 0.1).item() == 0  # one image has no negative


def loop(z1, z2, temperature, l2_norm=True):
    """Computes the same as a tensor that autograd goes through, one anchor at a time."""
    z = torch.cat([z1, z2])
    if l2_norm:
        z = torch.stack([row / row.square().sum().sqrt() for row in z])
    n, total = len(z1), 0
    for i in range(2 * n):
        others = [z[i] @ z[k] / temperature for k in range(2 * n) if k != i]
        total = total + torch.stack(others).logsumexp(0) - z[i] @ z[(i + n) % (2 * n)] / temperature
    return total / (2 * n)


@pytest.mark.parametrize("l2_norm", [True, False])
@pytest.mark.parametrize("temperature", [0.05, 0.5, 20.0])
@pytest.mark.parametrize("shape", [(2, 5), (9, 3)])
def test_gradients_are_those_of_the_loop(shape, temperature, l2_norm):
    tensors = [draw(seed, *shape, spread=0.3).requires_grad_() for seed in (11, 12)]
    ours = torch.autograd.grad(nt_xent(*tensors, temperature, l2_norm), tensors)
    expected = torch.autograd.grad(loop(*tensors, temperature, l2_norm), tensors)
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)
    assert all((g.norm(dim=1) > 0).all() for g in ours)  # each embedding is an anchor and a column


def test_gradient_at_ties_is_finite():
    z = torch.ones(3, 4, dtype=torch.float64, requires_grad=True)
    nt_xent(z, z, 0.001).backward()
    assert torch.isfinite(z.grad).all()


def objective_of_the_code(z1, z2, temperature):
    """Computes cross-entropy of view 1's rows over [view 2, view 1] with the own column lowered by
    1e9, plus that of view 2's rows: objective.py, one replica.
    """
    a, b = (z / z.norm(dim=1, keepdim=True) for z in (z1, z2))
    lowered = 1e9 * torch.eye(len(a), dtype=a.dtype)
    total = 0
    for x, y in ((a, b), (b, a)):
        rows = torch.cat([x @ y.T / temperature, x @ x.T / temperature - lowered], dim=1)
        total = total - rows.log_softmax(dim=1).diagonal().mean()
    return total.item()


def test_official_loss_is_the_codes_and_twice_the_papers():
    z1, z2 = draw(13, 6, 5), draw(14, 6, 5)
    official = simclr_loss(z1, z2, 0.1, form="official").item()
    assert official == pytest.approx(objective_of_the_code(z1, z2, 0.1), rel=1e-9)
    assert simclr_loss(z1, z2, 0.1).item() == pytest.approx(official / 2, rel=1e-12)
    with pytest.raises(ValueError, match="unknown form code"):
        simclr_loss(z1, z2, form="code")


def test_contrastive_accuracy_is_a_plain_count():
    z1, z2 = draw(15, 40, 3), draw(16, 40, 3)
    for l2_norm, similarity in ((True, cosine), (False, product)):
        right = 0
        for i, row in enumerate(z1.tolist()):
            scores = [similarity(row, column) for column in z2.tolist()]
            right += scores.index(max(scores)) == i
        assert contrastive_accuracy(z1, z2, l2_norm).item() == right / 40
    assert contrastive_accuracy(z1, 5 * z1).item() == 1


# -- runs -----------------------------------------------------------------------------------------

FLAGS = ["--max-steps", str(STEPS_PER_EPOCH + 3)]
FLAGS += ["--warmup-epochs", "1", "--output-dim", "24", "--lr", "2.4", "--weight-decay", "1e-3"]
READINGS = [
    ["--temperature", "0.3"],
    ["--follow", "official", "--lr-scaling", "sqrt", "--lr", "0.2"],
]
OTHERS = [
    ["--projector", "linear", "--no-l2-norm", "--temperature", "10"],
    ["--projector", "none", "--optimizer", "lars"],
    ["--no-projector-norm"],
    ["--second-arch", "same"],
    ["--second-arch", "resnet_lab"],
]
READINGS += [pytest.param(flags, marks=pytest.mark.long, id=" ".join(flags)) for flags in OTHERS]


class LARSByHand:
    """LARS of lars_optimizer.py, classic momentum; not `inside`: the rate is after it (BYOL)."""

    def __init__(self, parameters, inside=True):
        self.parameters, self.inside = parameters, inside
        self.velocities = [torch.zeros_like(p) for p in parameters]

    @torch.no_grad()
    def step(self, gradients, rate):
        for p, g, v in zip(self.parameters, gradients, self.velocities, strict=True):
            if p.ndim > 1:
                g = g + 1e-3 * p
                g = g * (0.001 * p.norm() / g.norm())
            v.mul_(0.9).add_(rate * g if self.inside else g)
            p.sub_(v if self.inside else rate * v)


@pytest.mark.parametrize("flags", READINGS, ids=str)
def test_a_run_is_its_replay(flags, tmp_path, monkeypatch):
    """Batch statistics are joint, both directions count, the rate from 0 is inside the momentum."""
    seen = watched_run(simclr, [*FLAGS, *flags], tmp_path / "run", monkeypatch)
    untied = "--second-arch" in flags

    def network_of(model):
        parts = [model.encoder, model.projector]
        if untied:
            parts += [model.second_encoder, model.second_projector]
        return nn.Sequential(*parts)

    network = network_of(copy.deepcopy(seen["before"]["model"]))
    trained = {n for n, p in network.named_parameters() if p.requires_grad}
    network = with_torchs_batch_norms(network)
    has_norm = "none" not in flags and "--no-projector-norm" not in flags
    without = {n for n, _ in network.named_parameters()} - trained
    assert len(without) == has_norm * (1 + untied)  # the last batch norms' offsets
    parameters = [p for n, p in network.named_parameters() if n in trained]
    optimizer = LARSByHand(parameters, inside="lars" not in flags)
    config = simclr.parse_arguments([*RUN, *FLAGS, *flags])
    base = 0.2 * math.sqrt(BATCH) if "sqrt" in flags else 2.4 * BATCH / 256
    factor = 2 if "official" in flags else 1
    temperature = config.temperature
    assert len(seen["views"]) == STEPS_PER_EPOCH + 3
    for step, (x1, x2) in enumerate(seen["views"]):
        assert not torch.equal(x1, x2)
        rate = base * step / STEPS_PER_EPOCH
        if step >= STEPS_PER_EPOCH:
            done = (step - STEPS_PER_EPOCH) / (STEPS_PER_EPOCH * (EPOCHS - 1))
            rate = base * (1 + math.cos(math.pi * done)) / 2
        if untied:  # each sees one view
            z1, z2 = network[:2](x1), network[2:](x2)
        else:
            z = network(torch.cat([x1, x2]))
            z1, z2 = z[:BATCH], z[BATCH:]
        loss = factor * loop(z1, z2, temperature, "--no-l2-norm" not in flags)
        logged = seen["logged"][step]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-8)
        assert logged["lr"] == pytest.approx(rate, rel=1e-12)
        accuracy = contrastive_accuracy(z1, z2, "--no-l2-norm" not in flags)
        assert logged["contrastive_accuracy"] == accuracy
        optimizer.step(torch.autograd.grad(loss, parameters), rate)
    ours = network_of(seen["after"]["model"]).state_dict()
    for name, expected in network.state_dict().items():
        torch.testing.assert_close(ours[name], expected, rtol=1e-7, atol=1e-9, msg=name)
    moved = seen["before"]["model"].encoder[0].weight
    assert not torch.equal(moved, seen["after"]["model"].encoder[0].weight)


# -- constants ------------------------------------------------------------------------------------

IMAGENET = dict(
    arch="resnet50",
    image_size=224,
    epochs=1000,
    batch_size=4096,
    lr=0.3,
    lr_scaling="linear",
    lr_batch=256,
    optimizer="classic_lars",
    sgd_momentum=0.9,
    weight_decay=1e-6,
    warmup_epochs=10,
    temperature=0.1,
    l2_norm=True,
    projector="mlp",
    output_dim=128,
    zero_init_residual=True,
    loss="paper",
)
README = dict(  # of the code, for CIFAR-10
    arch="resnet18_cifar",
    image_size=32,
    epochs=1000,
    batch_size=512,
    lr=1.0,
    weight_decay=1e-6,
    temperature=0.5,
)
PHOTOS = README | dict(
    arch="tiny",
    epochs=10,
    batch_size=64,
    lr=0.06,
    lr_batch=64,
    optimizer="sgd",
    weight_decay=5e-4,
    warmup_epochs=1,
)
CASES = {
    "imagenet": ([], IMAGENET),
    "official": (["--follow", "official"], IMAGENET | {"loss": "official"}),
    "cifar10": (["--dataset", "cifar10"], IMAGENET | README),
    "photos": (["--dataset", "photos"], IMAGENET | PHOTOS),
}


@pytest.mark.parametrize("case", CASES)
def test_presets(case):
    flags, expected = CASES[case]
    config = simclr.parse_arguments(flags)
    assert {n: getattr(config, n) for n in expected} == expected
    assert config.settings == {}
    small = config.views == "cifar"
    assert small == (case in ("cifar10", "photos"))
    strength = 0.5 if small else 1.0  # and no blur there
    first, second = simclr.views_of(config)
    assert first == second
    assert first.jitter == tuple(strength * s for s in (0.8, 0.8, 0.8, 0.2))
    assert (first.jitter_p, first.grey_p, first.flip_p, first.solarize_p) == (0.8, 0.2, 0.5, 0)
    assert first.blur_p == (0 if small else 0.5)
    assert (first.scale, first.interpolation) == ((0.08, 1.0), "bicubic")


@pytest.mark.parametrize(
    ("flags", "rate"),
    [
        ("", 4.8),
        ("--lr-scaling sqrt", 4.8),  # App. B.1: the same at batch 4096
        ("--batch-size 256", 0.3),
        ("--lr-scaling sqrt --batch-size 256", 1.2),
        ("--lr-scaling sqrt --lr 0.1", 6.4),
        ("--lr 0.5 --lr-batch 0", 0.5),
        ("--dataset cifar10", 2.0),
        ("--dataset photos", 0.06),
        ("--dataset cifar10 --lr 0.05 --lr-scaling sqrt --batch-size 1024", 1.6),
        ("--dataset imagefolder --epochs 10 --lr-scaling sqrt --batch-size 1024", 2.4),
    ],
)
def test_rates(flags, rate):
    assert simclr.base_rate(simclr.parse_arguments(flags.split())) == pytest.approx(rate)


@pytest.mark.parametrize("dataset", ["cifar10", "photos"])
def test_a_rate_that_no_source_has_must_be_given(dataset):
    said = f"--lr-scaling sqrt: no source has such a rate for --dataset {dataset}, give --lr"
    with pytest.raises(UserError, match=said):
        simclr.parse_arguments(["--dataset", dataset, "--lr-scaling", "sqrt"])


@pytest.mark.parametrize("flags", ["--lr-batch 512", "--dataset photos --lr 0.1 --lr-batch 256"])
def test_a_batch_of_the_rate_that_sqrt_does_not_read_is_refused(flags):
    with pytest.raises(UserError, match=r"--lr-scaling sqrt does not read it.*leave it out$"):
        simclr.parse_arguments([*flags.split(), "--lr-scaling", "sqrt"])
    assert simclr.parse_arguments(flags.split()).lr_batch == int(flags.split()[-1])


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        (["--second-arch", "vit_small", "--image-size", "100"], "multiple of 16, not 100"),
        (
            ["--projector", "none", "--second-arch", "resnet18"],
            "are 512 wide, those of resnet50",
        ),
    ],
)
def test_a_second_encoder_that_does_not_fit_is_refused(flags, expected):
    with pytest.raises(UserError, match=expected):
        simclr.parse_arguments(flags)


def layers(*flags):
    model = simclr.SimCLR(simclr.parse_arguments(["--arch", "resnet18", *flags]))
    described = []
    for layer in model.projector:
        if isinstance(layer, nn.Linear):
            assert layer.bias is None
            assert layer.weight.std().item() == pytest.approx(0.01, rel=0.02)
            described.append((layer.in_features, layer.out_features))
        elif isinstance(layer, nn.BatchNorm1d):
            assert layer.weight.requires_grad and not layer.bias.any()
            described.append("scale, offset" if layer.bias.requires_grad else "scale")
        else:
            described.append(type(layer).__name__)
    zero = not any(block.bn2.weight.any() for block in model.encoder.layer2)
    return described, model.dim, zero


def test_heads_are_the_codes():
    """They are model_util.py's, with 512 in place of ResNet-50's 2048."""
    hidden = [(512, 512), "scale, offset", "ReLU"]
    assert layers() == ([*hidden, (512, 128), "scale"], 128, True)
    other = [(512, 64), "scale, offset", "ReLU", (64, 128), "scale"]
    assert layers("--projector-hidden", "64") == (other, 128, True)
    assert layers("--projector", "linear") == ([(512, 128), "scale"], 128, True)
    assert layers("--projector", "none") == ([], 512, True)
    plain = [(512, 512), "ReLU", (512, 128)]  # Sec. 2.1: W2 relu(W1 h)
    assert layers("--no-projector-norm", "--no-zero-init-residual") == (plain, 128, False)


def test_a_run_from_before_the_width_was_a_flag_goes_on():
    config = simclr.parse_arguments([])
    saved = dataclasses.asdict(config)
    del saved["projector_hidden"], saved["second_arch"]
    assert changed_fields(config, saved) == []
    narrow = dataclasses.replace(config, projector_hidden=64)
    assert changed_fields(narrow, saved) == ["projector_hidden was 0, is 64"]
