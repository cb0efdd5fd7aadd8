"""VICReg: its loss against loops written from Eq. 1 to 6, its steps against a plain replay."""

import math
import statistics

import pytest
import torch
from conftest import small
from replay import (
    BATCH,
    EPOCHS,
    STEPS,
    STEPS_PER_EPOCH,
    assert_states_are_close,
    watched_run,
    with_torchs_batch_norms,
)
from safetensors.torch import load_file
from test_losses import draw
from torch import nn

from common.augment import two_views
from common.errors import UserError
from recipes import vicreg
from recipes.vicreg import vicreg_loss, vicreg_terms

FORMS = ["paper", "official"]

# -- the loss -------------------------------------------------------------------------------------


def covariance_of(a, b):
    """Returns the covariance of two columns, over n - 1 (Eq. 3)."""
    mean_a, mean_b = statistics.fmean(a), statistics.fmean(b)
    return sum((x - mean_a) * (y - mean_b) for x, y in zip(a, b, strict=True)) / (len(a) - 1)


def eq_6(z1, z2, sim=25.0, std=25.0, cov=1.0, form="paper"):
    """Computes Eq. 6 on lists of rows; s as in Algorithm 1 (mse_loss), variance by `form`."""
    n, d = len(z1), len(z1[0])
    squares = [(a - b) ** 2 for x, y in zip(z1, z2, strict=True) for a, b in zip(x, y, strict=True)]
    s = math.fsum(squares) / (n * d)
    v = c = 0.0
    for z in (z1, z2):
        columns = [[row[j] for row in z] for j in range(d)]
        deviations = [math.sqrt(covariance_of(x, x) + 1e-4) for x in columns]
        v += sum(max(0.0, 1 - deviation) for deviation in deviations) / d
        for i in range(d):
            for j in range(d):
                if i != j:
                    c += covariance_of(columns[i], columns[j]) ** 2 / d
    return sim * s + std * (v if form == "paper" else v / 2) + cov * c


@pytest.mark.parametrize("coefficients", [(25.0, 25.0, 1.0), (1.0, 0.0, 0.0), (0.0, 10.0, 3.0)])
@pytest.mark.parametrize(("n", "d"), [(2, 1), (2, 3), (7, 4), (4, 9), (16, 5)])
@pytest.mark.parametrize("form", FORMS)
def test_the_loss_is_eq_6(form, n, d, coefficients):
    for spread in (0.3, 2.0):
        z1, z2 = draw(1, n, d, spread=spread), draw(2, n, d, spread=spread)
        expected = eq_6(z1.tolist(), z2.tolist(), *coefficients, form)
        value = vicreg_loss(z1, z2, *coefficients, form)
        assert value.dtype == torch.float64 and value.shape == ()
        assert value.item() == pytest.approx(expected, rel=1e-11)


def test_the_defaults_are_those_of_sec_4_2():
    z1, z2 = draw(3, 6, 4, spread=0.3), draw(4, 6, 4, spread=0.3)
    assert vicreg_loss(z1, z2).item() == pytest.approx(eq_6(z1.tolist(), z2.tolist()), rel=1e-11)


@pytest.mark.parametrize("form", FORMS)
def test_the_gradient_is_that_of_eq_6(form):
    """Central differences of the loops agree; both embeddings get gradient."""
    z = [draw(5, 5, 3, spread=0.3).requires_grad_(), draw(6, 5, 3, spread=0.3).requires_grad_()]
    vicreg_loss(*z, 2.0, 3.0, 0.5, form).backward()
    h = 1e-6
    for view in range(2):
        for i in range(5):
            for j in range(3):
                ends = []
                for step in (h, -h):
                    moved = [x.detach().tolist() for x in z]
                    moved[view][i][j] += step
                    ends.append(eq_6(*moved, 2.0, 3.0, 0.5, form))
                slope = (ends[0] - ends[1]) / (2 * h)
                assert z[view].grad[i, j].item() == pytest.approx(slope, rel=1e-5, abs=1e-7)


def test_a_constant_embedding_costs_the_whole_hinge_and_still_has_a_gradient():
    """sqrt(0 + 1e-4) is 0.01; the covariance and the invariance see nothing."""
    same = torch.full((8, 3), 5.0, dtype=torch.float64)
    assert vicreg_loss(same, same).item() == pytest.approx(25 * 2 * 0.99, rel=1e-12)
    assert vicreg_loss(same, same, form="official").item() == pytest.approx(25 * 0.99, rel=1e-12)
    near = (same + 1e-3 * draw(7, 8, 3, spread=0.3)).requires_grad_()
    vicreg_loss(near, near.detach()).backward()
    assert near.grad.isfinite().all() and near.grad.norm() > 0.1


def test_spread_uncorrelated_equal_embeddings_cost_nothing():
    signs = torch.tensor([[1, 1, 1], [1, -1, -1], [-1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    for scale in (1.0, 30.0):  # beyond a deviation of 1 the hinge is silent
        assert vicreg_loss(scale * signs, scale * signs).item() == pytest.approx(0, abs=1e-20)
    s, v, c = vicreg_terms(signs, -signs)
    assert (s.item(), v.item(), c.item()) == (4.0, 0.0, 0.0)


def test_the_branches_are_regularised_each_by_itself():
    """Nothing but the invariance joins them: a rotated second branch keeps v and c."""
    z1, z2 = draw(8, 9, 4, spread=0.3), draw(9, 9, 4, spread=0.3)
    shuffled = z2[torch.randperm(9, generator=torch.manual_seed(0))]
    (s, v, c), (s_other, v_other, c_other) = vicreg_terms(z1, z2), vicreg_terms(z1, shuffled)
    torch.testing.assert_close([v, c], [v_other, c_other], rtol=1e-12, atol=0)
    assert abs(s - s_other) > 1e-3


def test_the_loss_is_never_computed_in_less_than_float32():
    z1, z2 = draw(10, 6, 5, spread=0.5).bfloat16(), draw(11, 6, 5, spread=0.5).bfloat16()
    expected = vicreg_loss(z1.float(), z2.float())
    with torch.autocast("cpu", torch.bfloat16):
        values = [vicreg_loss(z1, z2), vicreg_loss(z1.float(), z2.float())]
    for value in (*values, vicreg_loss(z1, z2)):
        assert value.dtype == torch.float32 and torch.equal(value, expected)


def test_an_unknown_form_is_refused():
    x = draw(0, 3, 4)
    with pytest.raises(ValueError, match="papre"):
        vicreg_loss(x, x, form="papre")


# -- a run, step by step --------------------------------------------------------------------------

FLAGS = ["--projector-hidden", "24", "--output-dim", "12", "--warmup-epochs", "0.4", "--lr", "20"]


def plain_loss(z1, z2, form):
    """Follows Algorithm 1 with torch's own functions; the mean of two hinges for "official"."""
    loss = 25 * (z1 - z2).pow(2).mean()
    for z in (z1, z2):
        hinge = (1 - (z.var(0) + 1e-4).sqrt()).clamp(min=0).mean()
        off = torch.cov(z.T)[~torch.eye(z.shape[1], dtype=torch.bool)]
        loss = (
            loss + 25 * hinge * (0.5 if form == "official" else 1) + off.pow(2).sum() / z.shape[1]
        )
    return loss


def lars_step(weights, velocities, rate, decay):
    """Writes one update out: tensors of one dimension are neither decayed nor adapted."""
    with torch.no_grad():
        for weight, velocity in zip(weights, velocities, strict=True):
            update = weight.grad.clone()
            if weight.ndim > 1:
                update += decay * weight
                if weight.norm() > 0 and update.norm() > 0:
                    update *= 0.001 * weight.norm() / update.norm()
            velocity.mul_(0.9).add_(update)
            weight.sub_(rate * velocity)
            weight.grad = None


@pytest.mark.parametrize("second", ["shared", "same", "resnet_lab"])
@pytest.mark.parametrize("form", FORMS)
def test_a_run_is_its_replay(form, second, tmp_path, monkeypatch):
    flags = ["--follow", form, "--second-arch", second]
    seen = watched_run(vicreg, [*FLAGS, *flags], tmp_path / "run", monkeypatch)
    model, after = seen["before"]["model"], seen["after"]["model"]
    for name, expert in model.named_modules():
        if "projector" in name and isinstance(expert, nn.Linear):
            assert (expert.bias is not None) == (expert.out_features != 12), name
    first = with_torchs_batch_norms(nn.Sequential(model.encoder, model.projector))
    other = first
    if second != "shared":
        other = with_torchs_batch_norms(nn.Sequential(model.second_encoder, model.second_projector))
    weights = [*first.parameters(), *(other.parameters() if other is not first else [])]
    velocities = [torch.zeros_like(w) for w in weights]
    base, last = 20 * BATCH / 256, {"paper": 0.00125, "official": 0.001}[form]
    steps = STEPS_PER_EPOCH * EPOCHS
    assert len(seen["views"]) == STEPS
    for step, (x1, x2) in enumerate(seen["views"]):
        rate = base * step / 2  # two steps of warm-up
        if step >= 2:
            cosine = 0.5 * (1 + math.cos(math.pi * (step - 2) / (steps - 2)))
            rate = base * cosine + last * base * (1 - cosine)
        loss = plain_loss(first(x1), other(x2), form)  # batch norms see one view at a time
        loss.backward()
        lars_step(weights, velocities, rate, 1e-6)
        logged = seen["logged"][step]
        assert logged["loss"] == pytest.approx(loss.item(), rel=1e-9)
        assert logged["lr"] == pytest.approx(rate, rel=1e-12)
    pairs = [(after.encoder, first[0]), (after.projector, first[1])]
    if second != "shared":
        pairs += [(after.second_encoder, other[0]), (after.second_projector, other[1])]
    assert_states_are_close(pairs)
    exported = load_file(tmp_path / "run" / "backbone.safetensors")  # the first branch's
    torch.testing.assert_close(
        exported["0.weight"], first[0].state_dict()["0.weight"].float(), rtol=1e-5, atol=1e-7
    )


# -- settings -------------------------------------------------------------------------------------

PAPER = dict(
    arch="resnet50",
    epochs=1000,
    batch_size=2048,
    lr=0.2,
    lr_batch=256,
    optimizer="lars",
    weight_decay=1e-6,
    warmup_epochs=10,
    sim_coeff=25.0,
    std_coeff=25.0,
    cov_coeff=1.0,
    loss="paper",
    views="vicreg",
    lr_end=0.00125,
    projector_layers=3,
    projector_hidden=8192,
    output_dim=8192,
    second_arch="shared",
)
OFFICIAL = PAPER | dict(loss="official", views="byol", lr_end=0.001)


@pytest.mark.parametrize(("follow", "expected"), [("paper", PAPER), ("official", OFFICIAL)])
def test_presets(follow, expected):
    config = vicreg.parse_arguments(["--follow", follow])
    assert {name: getattr(config, name) for name in expected} == expected
    assert config.settings == {}
    views = [*two_views(expected["views"], 224, 0.08, "bicubic")]
    assert vicreg.views_of(config) == views
    assert (views[0] == views[1]) == (follow == "paper")


@pytest.mark.parametrize(
    ("flag", "value"), [("loss", "official"), ("views", "byol"), ("lr_end", 0.001)]
)
def test_each_difference_can_be_set_alone(flag, value):
    config = vicreg.parse_arguments(["--" + flag.replace("_", "-"), str(value)])
    assert config.settings == {flag: value}


def test_a_second_encoder_that_cannot_take_the_images_is_one_line():
    with pytest.raises(UserError, match=r"--second-arch vit_small: --image-size .* not 100"):
        vicreg.parse_arguments(["--second-arch", "vit_small", "--image-size", "100"])
    with pytest.raises(UserError, match="second-arch"):
        vicreg.parse_arguments(["--second-arch", "resnet"])


@pytest.mark.parametrize(
    ("second", "named"),
    [("shared", False), ("same", False), ("vit_base", False), ("resnet50", True)],
)
def test_pieces_are_a_setting_if_any_encoder_has_batch_norms(second, named):
    flags = ["--arch", "vit_small", "--second-arch", second, "--micro-batch", "256"]
    assert ("micro_batch" in vicreg.parse_arguments(flags).settings) == named


def test_both_branches_in_pieces_are_replayed(tmp_path):
    """Pieces as large as the batch change nothing, in neither encoder."""
    flags = [*small("vicreg"), "--precision", "fp64", "--second-arch", "same", "--max-steps", "3"]
    runs = []
    for pieces in ("0", "36"):
        folder = tmp_path / pieces
        vicreg.main([*flags, "--micro-batch", pieces, "--output", str(folder)])
        runs.append(torch.load(folder / "checkpoint.pt", weights_only=True)["state"]["model"])
    for name, value in runs[0].items():
        torch.testing.assert_close(runs[1][name], value, rtol=1e-7, atol=1e-9, msg=name)
