"""Truncated triplet: its loss against loops written from the code, its parameter groups, rates,
sizes and presets, and whole runs against a plain float64 replay on the views that the recipe saw.
"""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from conftest import run_ranks, small
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
from common.models import build_encoder
from common.run import metrics
from eval.linear_probe.protocols import PROTOCOLS
from recipes import truncated_triplet
from recipes.truncated_triplet import draw_sides, own_block, parameter_groups, rate_at, triplet_loss

# -- the loss -------------------------------------------------------------------------------------


def smoothed_triplet(p, z, gamma=2.0, ranks=(2, 10), margin=100.0, block=0):
    """Follows triplet_loss_head.py: the deputy is the mean of the sorted negatives' ranks."""
    p, z = p.tolist(), z.tolist()
    size = block or len(z)
    losses = []
    for i, row in enumerate(p):
        first = i // size * size
        d = sorted(-2 * cosine(row, z[j]) for j in range(first, first + size) if j != i)
        chosen = d[ranks[0] - 1 : ranks[1]]
        deputy = sum(chosen) / (ranks[1] - ranks[0] + 1)
        losses.append(max(0.0, gamma * -2 * cosine(row, z[i]) - deputy + margin))
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    ("n", "d", "ranks", "block"),
    [
        (11, 3, (2, 10), 0),
        (2, 4, (1, 1), 0),
        (12, 5, (1, 1), 4),
        (12, 5, (2, 3), 6),
        (12, 5, (3, 5), 12),
        (16, 2, (15, 15), 0),
    ],
)
@pytest.mark.parametrize(("gamma", "margin"), [(2.0, 100.0), (1.0, 0.3), (0.5, -1.0), (3.0, 0.0)])
def test_the_loss_is_that_of_the_code(n, d, ranks, block, gamma, margin):
    p, z = draw(1, n, d), draw(2, n, d)
    value = triplet_loss(p, z, gamma, ranks, margin, block)
    expected = smoothed_triplet(p, z, gamma, ranks, margin, block)
    assert value.dtype == torch.float64 and value.shape == ()
    assert value.item() == pytest.approx(expected, rel=1e-11, abs=1e-12)


def test_defaults_are_the_codes():
    p, z = draw(3, 20, 6), draw(4, 20, 6)
    assert triplet_loss(p, z).item() == pytest.approx(smoothed_triplet(p, z), rel=1e-12)
    # a hinge that never acts: linear in the cosines
    cosines = [[cosine(a, b) for b in z.tolist()] for a in p.tolist()]
    pulls = sum(cosines[i][i] for i in range(20)) / 20
    top = [
        sorted((c for j, c in enumerate(row) if j != i))[-10:-1] for i, row in enumerate(cosines)
    ]
    pushes = sum(sum(row) / 9 for row in top) / 20
    assert triplet_loss(p, z).item() == pytest.approx(100 - 4 * pulls + 2 * pushes, rel=1e-12)


def test_ties_and_analytic_cases():
    same = torch.ones(5, 3, dtype=torch.float64)
    assert triplet_loss(same, 7 * same, 2.0, (2, 4), 1.0).item() == pytest.approx(0)  # -4 + 2 + 1
    assert triplet_loss(same, 7 * same, 2.0, (1, 1), 3.0).item() == pytest.approx(1)
    axes = torch.eye(4, dtype=torch.float64)  # the positive at -2, all negatives at 0
    assert triplet_loss(axes, axes, 1.0, (1, 3), 2.5).item() == pytest.approx(0.5)
    p = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.0]], dtype=torch.float64)
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
    # negatives at (0, 2), (-2, 2), (-2, 0); positives at -2, 0, 2
    assert triplet_loss(p, z, 1.0, (1, 1), 10.0).item() == pytest.approx((8 + 12 + 14) / 3)
    assert triplet_loss(p, z, 1.0, (2, 2), 10.0).item() == pytest.approx((6 + 8 + 12) / 3)


@pytest.mark.parametrize(("ranks", "block"), [((2, 4), 0), ((1, 1), 3), ((2, 2), 6)])
@pytest.mark.parametrize("margin", [100.0, 0.4])
def test_gradients_are_those_of_central_differences(ranks, block, margin):
    p, z = draw(5, 6, 4, spread=0.3).requires_grad_(), draw(6, 6, 4, spread=0.3).requires_grad_()
    triplet_loss(p, z, 2.0, ranks, margin, block).backward()
    assert z.grad is None  # the target
    h = 1e-6
    for i in range(6):
        for j in range(4):
            ends = []
            for step in (h, -h):
                moved = p.detach().clone()
                moved[i, j] += step
                ends.append(smoothed_triplet(moved, z, 2.0, ranks, margin, block))
            slope = (ends[0] - ends[1]) / (2 * h)
            assert p.grad[i, j].item() == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_holds_in_float32_and_never_in_less():
    p, z = draw(7, 12, 6), draw(8, 12, 6)
    value = triplet_loss(p.float(), z.float(), 2.0, (2, 5), 1.0)
    assert value.dtype == torch.float32
    assert value.item() == pytest.approx(smoothed_triplet(p, z, 2.0, (2, 5), 1.0), rel=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(triplet_loss(p.float(), z.float(), 2.0, (2, 5), 1.0), value)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        (dict(block=5), "a block of 5 does not divide the global batch of 12"),
        (dict(block=24), "a block of 24 does not divide"),
        (dict(ranks=(2, 12)), "ranks 2 to 12 of 11 negatives"),
        (dict(ranks=(2, 4), block=4), "ranks 2 to 4 of 3 negatives"),
        (dict(ranks=(0, 3)), "ranks 0 to 3"),
        (dict(ranks=(3, 2)), "ranks 3 to 2"),
    ],
)
def test_mistakes_are_value_errors(how, said):
    x = draw(0, 12, 4)
    with pytest.raises(ValueError, match=said):
        triplet_loss(x, x, **how)


# -- parameter groups, rates, sizes ---------------------------------------------------------------


@pytest.mark.parametrize(("arch", "missed"), [("resnet50", 4), ("resnet_lab", 3), ("tiny", 0)])
def test_the_codes_expression_misses_the_scales_of_shortcut_norms(arch, missed):
    """It searches (bn|gn)(\\d+)?.(weight|bias) and bias in its names, which are torchvision's."""
    import re

    with torch.device("meta"):
        model = nn.ModuleDict({"encoder": build_encoder(arch)})
    named = dict(model.named_parameters())
    everywhere, paper = parameter_groups(model, True), parameter_groups(model, False)
    for groups in (everywhere, paper):
        assert [group["adapted"] for group in groups] == [True, False]
        assert sum(len(group["params"]) for group in groups) == len(named)
    more = {id(p) for p in everywhere[0]["params"]} - {id(p) for p in paper[0]["params"]}
    assert len(more) == missed
    assert all(p.ndim > 1 for p in paper[0]["params"])
    if arch == "tiny":  # no names of its own
        return
    excluded = r"(bn|gn)(\d+)?.(weight|bias)|bias"
    by_name = {id(p) for name, p in named.items() if not re.search(excluded, name)}
    assert by_name == {id(p) for p in everywhere[0]["params"]}


def test_rates_are_those_of_mmcv():
    """Half a cosine by epochs starts at the first; in the warm-up a line per step multiplies it."""
    config = truncated_triplet.parse_arguments(["--warmup-epochs", "2"])
    for step in range(40):
        expected = 4.8 * (1 + math.cos(math.pi * (step // 4) / 10)) / 2
        if step < 8:
            expected *= 1 - (1 - step / 8) * (1 - 1e-4)
        assert rate_at(config, 4.8, step, 4, 40) == pytest.approx(expected, rel=1e-12)
    assert rate_at(config, 4.8, 0, 4, 40) == pytest.approx(4.8e-4)
    config = truncated_triplet.parse_arguments(["--warmup-epochs", "0", "--cosine-per", "step"])
    for step in range(40):
        expected = (1 + math.cos(math.pi * step / 40)) / 2
        assert rate_at(config, 1.0, step, 4, 40) == pytest.approx(expected, abs=1e-15)


def test_sides_are_draws_of_seed_step_block_and_view():
    first = draw_sides(3, 5, 0, 224)
    assert first == draw_sides(3, 5, 0, 224) and len(first) == 4
    for other in ((4, 5, 0), (3, 6, 0), (3, 5, 1)):
        assert draw_sides(*other, 224) != first
    drawn = [draw_sides(0, step, 2, 224) for step in range(3000)]
    for view, (low, values) in enumerate([(96, 129), (96, 129), (128, 97), (128, 97)]):
        sides = [row[view] for row in drawn]
        assert (min(sides), max(sides)) == (low, 224)  # both ends, which 3000 draws meet
        assert len({*sides}) == values
        assert sum(sides) / 3000 == pytest.approx((low + 224) / 2, abs=3.5)
    assert all(
        14 <= a <= 32 and 18 <= b <= 32
        for a, _, b, _ in (draw_sides(0, s, 0, 32) for s in range(99))
    )


@pytest.mark.parametrize(
    ("batch", "block", "ranks", "fits"),
    [(64, 0, 1, True), (64, 0, 4, True), (64, 32, 2, True), (64, 32, 4, True), (64, 32, 1, False)],
)
def test_random_sizes_need_one_block_for_a_rank(batch, block, ranks, fits):
    flags = ["--batch-size", str(batch), "--block", str(block), "--random-resize"]
    config = truncated_triplet.parse_arguments(flags)
    if fits:
        assert own_block(config, ranks) == 0
        return
    said = "--random-resize with --block 32 on 1 ranks: the 64 images of a rank .* or 2 ranks"
    with pytest.raises(UserError, match=said):
        own_block(config, ranks)


# -- runs -----------------------------------------------------------------------------------------

FLAGS = ["--max-steps", str(STEPS_PER_EPOCH + 2), "--warmup-epochs", "1.4", "--momentum", "0.8"]
FLAGS += ["--weight-decay", "1e-3", "--lr", "2.4", "--projector-hidden", "24"]
FLAGS += ["--predictor-hidden", "20", "--output-dim", "12", "--batch-size", str(BATCH)]
LAB = ["--arch", "resnet_lab"]
READINGS = [
    ["--ranks", "1", "--margin", "0.5"],
    ["--follow", "official", "--block", "16"],
]
OTHERS = [
    ["--follow", "official", "--block", "16", *LAB, "--zero-init-residual"],
    ["--random-resize", "--ranks", "2-4", "--cosine-per", "step"],
    ["--optimizer", "lars", "--gamma", "1", "--block", "8", "--ranks", "3-7"],
]
READINGS += [pytest.param(flags, marks=pytest.mark.long, id=" ".join(flags)) for flags in OTHERS]


def plain_loss(p, z, gamma, ranks, margin, block):
    """Computes it as tensors that autograd goes through, one image at a time."""
    p, z = (torch.stack([row / row.square().sum().sqrt() for row in x]) for x in (p, z.detach()))
    losses = []
    for i in range(len(p)):
        first = i // block * block
        d = torch.stack([-2 * p[i] @ z[j] for j in range(first, first + block) if j != i])
        deputy = d.sort().values[ranks[0] - 1 : ranks[1]].mean()
        losses.append((gamma * -2 * p[i] @ z[i] - deputy + margin).clamp(min=0))
    return torch.stack(losses).mean()


class LARSByHand:
    """LARS of OpenSelfSup, with the names that the code's regular expression does not match."""

    def __init__(self, named, official, inside=True):
        self.named, self.official, self.inside = named, official, inside
        self.velocities = {name: torch.zeros_like(p) for name, p in named.items()}

    @torch.no_grad()
    def step(self, rate):
        for name, p in self.named.items():
            g, v, own = p.grad, self.velocities[name], 1.0
            if p.ndim > 1 or (self.official and "downsample" in name and name.endswith("weight")):
                below = g.norm() + 1e-3 * p.norm() if self.inside else (g + 1e-3 * p).norm()
                own = 0.001 * p.norm() / below
                g = g + 1e-3 * p
            v.mul_(0.9).add_(own * g * (rate if self.inside else 1))
            p.sub_(v * (1 if self.inside else rate))
            p.grad = None


@pytest.mark.parametrize("flags", READINGS, ids=" ".join)
def test_a_run_is_its_replay(flags, tmp_path, monkeypatch):
    """Each view has a forward, the rate is inside the momentum, the target moves after the step."""
    seen = watched_run(truncated_triplet, [*FLAGS, *flags], tmp_path / "run", monkeypatch)
    config = truncated_triplet.parse_arguments(["--arch", "tiny", *FLAGS, *flags])
    ranks = tuple(map(int, config.ranks.split("-")))
    how = config.gamma, ranks, config.margin, config.block or BATCH
    before, after = copy.deepcopy(seen["before"]), seen["after"]
    online = nn.ModuleDict(
        {n: getattr(before["model"], n) for n in ("encoder", "projector", "predictor")}
    )
    target = nn.ModuleDict({n: getattr(before["target"], n) for n in ("encoder", "projector")})
    for part in ("encoder", "projector"):  # a copy at the start
        for a, b in zip(online[part].parameters(), target[part].parameters(), strict=True):
            assert torch.equal(a, b)
    online, target = map(with_torchs_batch_norms, (online, target))
    official = "official" in flags
    optimizer = LARSByHand(dict(online.named_parameters()), official, "lars" not in flags)
    total = STEPS_PER_EPOCH * EPOCHS
    for step, views in enumerate(seen["views"]):
        moved = step if "step" in flags else step // STEPS_PER_EPOCH * STEPS_PER_EPOCH
        rate = 2.4 * (1 + math.cos(math.pi * moved / total)) / 2
        if step < 1.4 * STEPS_PER_EPOCH:
            rate *= 1 - (1 - step / (1.4 * STEPS_PER_EPOCH)) * (1 - 1e-4)
        sizes = [16] * 4
        if config.random_resize:
            sizes = draw_sides(3, step, 0, 16)
            assert sizes != [16] * 4
        inputs = [
            F.interpolate(x, size=[side, side], mode="bilinear")
            for x, side in zip([*views, *views], sizes, strict=True)
        ]
        p1, p2 = (
            online["predictor"](online["projector"](online["encoder"](x))) for x in inputs[:2]
        )
        with torch.no_grad():
            z1, z2 = (target["projector"](target["encoder"](x)) for x in inputs[2:])
        loss = plain_loss(p1, z2, *how) + plain_loss(p2, z1, *how)
        loss.backward()
        optimizer.step(rate)
        m = 1 - 0.2 * (math.cos(math.pi * step / total) + 1) / 2  # triplet_hook.py
        with torch.no_grad():
            for part in ("encoder", "projector"):
                for a, b in zip(target[part].parameters(), online[part].parameters(), strict=True):
                    a.copy_(m * a + (1 - m) * b)
        logged = seen["logged"][step]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert logged["lr"] == pytest.approx(rate, rel=1e-12)
        assert logged["momentum"] == pytest.approx(m, rel=1e-12)
    assert len(seen["views"]) == STEPS_PER_EPOCH + 2
    pairs = [(getattr(after["model"], n), online[n]) for n in online]
    assert_states_are_close([*pairs, *((getattr(after["target"], n), target[n]) for n in target)])
    if config.zero_init_residual:  # the scales of bn2 are excluded, so that they move
        assert after["model"].encoder.layer1[0].bn2.weight.any()


@pytest.mark.long
@pytest.mark.parametrize(
    "flags", [["--block", "12", "--ranks", "2-5"], ["--block", "18", "--ranks", "1"]], ids=" ".join
)
def test_two_ranks_train_as_one(flags, tmp_path):
    """A block may lie across two ranks' images."""
    two_ranks_are_one(tmp_path, "truncated_triplet", *flags)


@pytest.mark.long
def test_two_ranks_resize_alike_within_a_block(tmp_path):
    two_ranks_are_one(tmp_path, "truncated_triplet", "--random-resize")


SIZES = """
import torch
from torch import nn
from common import distributed
from common.fast.batch_norm import RankBatchNorm, count_values
from common.run.ranks import start

start()
rank = distributed.rank()
images = [torch.arange(48.0).view(2, 3, 2, 4).sin(), torch.arange(90.0).view(2, 3, 3, 5).cos()]
values = torch.cat([x.transpose(0, 1).flatten(1) for x in images], dim=1).double()
norm = RankBatchNorm.of(nn.BatchNorm2d(3)).double()
count_values(norm)
x = images[rank].double().requires_grad_()
(norm(x) ** 3).sum().backward()
plain, y = nn.BatchNorm1d(3).double(), values.T.clone().requires_grad_()
(plain(y) ** 3).sum().backward()
own = slice(0, 16) if rank == 0 else slice(16, 46)
expected = y.grad[own].T.reshape(3, 2, *x.shape[2:]).transpose(0, 1)
torch.testing.assert_close(x.grad, expected, rtol=1e-9, atol=1e-12)
for name in ("running_mean", "running_var"):
    torch.testing.assert_close(getattr(norm, name), getattr(plain, name))
distributed.stop()
"""


@pytest.mark.long
def test_batch_norms_over_ranks_count_the_values_of_each(tmp_path):
    """Two images of 2 x 4 pixels on one rank, of 3 x 5 on the other, are as all values in one."""
    (tmp_path / "sizes.py").write_text(SIZES)
    run_ranks(2, tmp_path / "sizes.py")


@pytest.mark.long
def test_two_ranks_with_a_block_each_have_sizes_of_their_own(tmp_path):
    flags = [*small("truncated_triplet"), "--block", "18", "--random-resize", "--max-steps", "2"]
    run_ranks(2, "recipes/truncated_triplet.py", *flags, "--output", tmp_path / "run")
    losses = [r["loss"] for r in metrics.read(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert len(losses) >= 2 and all(math.isfinite(loss) for loss in losses)
    with pytest.raises(AssertionError, match="error: --random-resize with --block 18 on 1 ranks"):
        run_ranks(1, "recipes/truncated_triplet.py", *flags, "--output", tmp_path / "other")


# -- settings -------------------------------------------------------------------------------------

PAPER = dict(
    arch="resnet50",
    epochs=1000,
    batch_size=4096,
    lr=4.8,
    lr_batch=0,
    optimizer="unguarded_lars",
    sgd_momentum=0.9,
    weight_decay=1e-6,
    warmup_epochs=10,
    momentum=0.99,
    ranks="2-10",
    gamma=2.0,
    margin=100.0,
    block=0,
    random_resize=False,
    adapt_shortcuts=False,
    zero_init_residual=False,
    projector_hidden=4096,
    predictor_hidden=4096,
    output_dim=256,
    views="byol",
)
SMALL = PAPER | dict(image_size=32, views="cifar", optimizer="sgd", warmup_epochs=0)
SMALL |= dict(projector_hidden=2048, predictor_hidden=2048, weight_decay=5e-4)
SMALL |= {n: v for n, v in truncated_triplet.PRESETS["cifar10"].items() if n == "lr"}
OFFICIAL = dict(block=196, adapt_shortcuts=True, batch_size=6272)
PHOTOS = SMALL | dict(arch="tiny", batch_size=64, epochs=10, lr_batch=64, block=0)
PHOTOS |= {n: truncated_triplet.PRESETS["photos"][n] for n in ("lr", "momentum")}
CASES = {
    "": PAPER,
    "--follow official": PAPER | OFFICIAL,
    "--dataset cifar10": SMALL
    | dict(arch="resnet18_cifar", batch_size=512, epochs=200, lr_batch=512),
    "--dataset photos": PHOTOS,
    "--dataset photos --follow official": PHOTOS,
}


@pytest.mark.parametrize("case", CASES)
def test_presets(case):
    config = truncated_triplet.parse_arguments(case.split())
    assert {name: getattr(config, name) for name in CASES[case]} == CASES[case]
    assert config.settings == {}
    if "dataset" not in case:
        assert truncated_triplet.views_of(config) == [*two_views("byol", 224, 0.08, "bicubic")]


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        ("--block 256", {"block": 256}),
        ("--adapt-shortcuts", {"adapt_shortcuts": True}),
        ("--random-resize", {"random_resize": True}),
        ("--ranks 1", {"ranks": "1-1"}),
        ("--ranks 2-10", {}),
        ("--follow official --batch-size 392", {}),
        ("--follow official --batch-size 4096 --block 256", {"block": 256}),
    ],
)
def test_each_difference_can_be_set_alone(flags, settings):
    assert truncated_triplet.parse_arguments(flags.split()).settings == settings


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--block 196", "--block 196: must divide the global batch, --batch-size 4096"),
        ("--follow official --batch-size 4096", "--block 196: must divide the global batch"),
        ("--block -1", "--block -1: must not be negative"),
        ("--ranks 2,10", "--ranks 2,10: give the first and the last rank, like 2-10"),
        ("--ranks 0-3", "--ranks 0-3: give the first and the last"),
        ("--ranks 5-3", "--ranks 5-3: give the first and the last"),
        ("--ranks 2-8 --block 8", "--ranks 2-8: an image has 7 negatives"),
        ("--ranks 2-10 --batch-size 8", "--ranks 2-10: an image has 7 negatives"),
        ("--random-resize --arch vit_small", "--random-resize: vit_small takes images of one size"),
    ],
)
def test_mistakes_are_one_line(flags, said):
    with pytest.raises(UserError, match=said):
        truncated_triplet.parse_arguments(flags.split())


def test_heads_start_as_the_codes():
    config = truncated_triplet.parse_arguments(["--arch", "resnet18"])
    model = truncated_triplet.Triplet(config)
    first, last = model.projector[0], model.projector[-1]
    assert (first.in_features, first.out_features, last.out_features) == (512, 4096, 256)
    assert first.weight.std().item() == pytest.approx(math.sqrt(2 / 512), rel=0.01)
    assert last.weight.std().item() == pytest.approx(math.sqrt(2 / 4096), rel=0.01)
    for layer in (model.predictor[0], model.predictor[-1]):
        assert layer.weight.std().item() == pytest.approx(0.01, rel=0.01)
    for head in (model.projector, model.predictor):
        kinds = [type(layer).__name__ for layer in head]
        assert kinds == ["Linear", "BatchNorm1d", "ReLU", "Linear"]
        assert not head[0].bias.any() and not head[-1].bias.any()
    assert model.encoder.layer2[0].bn2.weight.all()


def test_its_protocols():
    card = cards.load()["truncated_triplet"]
    assert (card.linear, card.finetune) == ("triplet", None)
    assert not PROTOCOLS["triplet"].assumed
