"""The GSG recipes step by step: a plain replay in float64 on the views that the recipe saw.

Written from Algorithm 1 and section 1.3 of the facts about the released code: encoder calls view
by view on permuted inputs, torch's own batch norms, a momentum encoder that is updated before the
forward, the rate set once per epoch, SGD with weight decay on everything.
"""

import copy
import importlib
import math

import pytest
import torch
from replay import BATCH, EPOCHS, IMAGES, RUN, STEPS, watched_run, with_torchs_batch_norms
from test_resume import images
from torch import nn

from common.errors import UserError
from common.models import build_encoder
from common.pairs import draw_pairs
from common.run import checkpoint

IMAGENET = ["--lr", "0.05", "--lr-batch", "256", "--weight-decay", "1e-4", "--fixed-predictor-lr"]
IMAGENET += ["--no-output-affine", "--projector-layers", "3", "--projector-hidden", "32"]
FLAGS = [*IMAGENET, "--output-dim", "24", "--predictor-hidden", "8"]


def cosine(a, b):
    return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))


def losses_of_pairs(p, z):
    """Follows Algorithm 1 for rows that are paired already: p11 p12 p21 p22, z11 z12 z21 z22."""
    branches = [
        ((z[0] - z[2]).norm(dim=1), -cosine(p[0], z[1]) - cosine(p[2], z[3])),
        ((z[0] - z[3]).norm(dim=1), -cosine(p[0], z[1]) - cosine(p[3], z[2])),
        ((z[1] - z[2]).norm(dim=1), -cosine(p[1], z[0]) - cosine(p[2], z[3])),
        ((z[1] - z[3]).norm(dim=1), -cosine(p[1], z[0]) - cosine(p[3], z[2])),
    ]
    least = torch.stack([d for d, _ in branches]).argmin(dim=0)
    losses = torch.stack([loss for _, loss in branches])
    return 0.5 * losses[least, torch.arange(len(least))], least


REPLAYED = ["", "--pairing derangement", "--no-gsg", "--no-predictor", "--no-predictor --no-gsg"]
# the abstract's small batches; of two images global pairs are one image with itself half the time
REPLAYED += ["--batch-size 2", "--batch-size 2 --pairing derangement", "--batch-size 16"]
CASES = [(name, flags) for name in ("simsiam_gsg", "byol_gsg") for flags in REPLAYED]
CASES.append(("simsiam_gsg", "--no-gsg --no-stop-gradient"))


@pytest.mark.parametrize(("name", "flags"), CASES)
def test_a_run_is_its_replay(name, flags, tmp_path, monkeypatch):
    flags = flags.split()
    batch = int(flags[1]) if "--batch-size" in flags else BATCH
    steps_per_epoch = IMAGES // batch
    # a batch norm makes two values about 1 and -1, so that its gradient is mostly rounding
    close = 1e-5 if batch == 2 else 1e-9
    recipe = importlib.import_module(f"recipes.{name}")
    seen = watched_run(recipe, [*FLAGS, *flags], tmp_path / "run", monkeypatch)
    before, after = seen["before"], seen["after"]
    model = copy.deepcopy(before["model"])
    f = with_torchs_batch_norms(nn.Sequential(model.encoder, model.projector))
    h = with_torchs_batch_norms(model.predictor)
    assert isinstance(h, nn.Identity) == ("--no-predictor" in flags)
    target = copy.deepcopy(f)
    base = 0.05 * batch / 256
    groups = [{"params": f.parameters()}, {"params": h.parameters()}]
    optimizer = torch.optim.SGD(groups, base, momentum=0.9, weight_decay=1e-4)
    pairing = "derangement" if "derangement" in flags else "global"
    assert len(seen["views"]) == STEPS
    for step, views in enumerate(seen["views"]):
        assert len(views) == (2 if "--no-gsg" in flags else 4)
        for i in range(len(views)):
            assert not any(torch.equal(views[i], views[j]) for j in range(i))  # fresh views
        rate = base * 0.5 * (1 + math.cos(math.pi * (step // steps_per_epoch) / EPOCHS))
        optimizer.param_groups[0]["lr"] = rate  # the predictor's stays
        if name == "byol_gsg":
            with torch.no_grad():
                for t, o in zip(target.parameters(), f.parameters(), strict=True):
                    t.copy_(0.99 * t + 0.01 * o)
        if "--no-gsg" not in flags:
            pairs = draw_pairs(pairing, batch, 1, 3, step)
            views = [*views[:2], views[2][pairs], views[3][pairs]]
        online = [f(x) for x in views]
        p = [h(y) for y in online]
        z = [target(x) for x in views] if name == "byol_gsg" else online
        if "--no-stop-gradient" not in flags:
            z = [t.detach() for t in z]
        logged = seen["logged"][step]
        if "--no-gsg" in flags:
            loss = (-cosine(p[0], z[1]) - cosine(p[1], z[0])).mean() / 2
        else:
            losses, least = losses_of_pairs(p, z)
            loss = losses.mean()
            assert logged["choice_12_21"] == (least == 2).double().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        assert logged["loss"] == pytest.approx(loss.item(), rel=close)
        assert logged["lr"] == pytest.approx(rate, rel=1e-12)
    model = after["model"]
    for ours, theirs in ((model.encoder, f[0]), (model.projector, f[1]), (model.predictor, h)):
        for (n, a), (_, b) in zip(
            ours.state_dict().items(), theirs.state_dict().items(), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=100 * close, atol=close, msg=n)
    if name == "byol_gsg":  # its batch norms ran in train mode on its own inputs, too
        ours, theirs = after["target"].state_dict(), target.state_dict()
        for a, (n, b) in zip(ours.values(), theirs.items(), strict=True):
            torch.testing.assert_close(a, b, rtol=100 * close, atol=close, msg=n)
        assert all(t.grad is None and not t.requires_grad for t in after["target"].parameters())


# -- constants ------------------------------------------------------------------------------------

IMAGENET_PRESET = dict(
    arch="resnet50",
    image_size=224,
    epochs=100,
    batch_size=512,
    lr=0.05,
    lr_batch=256,
    optimizer="sgd",
    sgd_momentum=0.9,
    weight_decay=1e-4,
    cosine_per="epoch",
    fixed_predictor_lr=True,
    zero_init_residual=True,
    projector_layers=3,
    projector_hidden=2048,
    output_dim=2048,
    output_affine=False,
    predictor_hidden=512,
    views="simsiam",
    crop_min=0.2,
    crop_interpolation="bilinear",
    gsg=True,
    pairing="global",
)
CIFAR_PRESET = IMAGENET_PRESET | dict(
    arch="resnet18_cifar",
    image_size=32,
    epochs=200,
    lr=0.06,
    lr_batch=0,
    weight_decay=5e-4,
    fixed_predictor_lr=False,
    zero_init_residual=False,
    projector_layers=2,
    output_affine=True,
    views="cifar",
    crop_min=0.08,
)
PRESETS = {
    "imagenet": ([], IMAGENET_PRESET),
    "official": (["--follow", "official"], IMAGENET_PRESET | {"pairing": "local"}),
    "cifar10": (["--dataset", "cifar10"], CIFAR_PRESET),
    "photos": (
        ["--dataset", "photos"],
        CIFAR_PRESET | dict(arch="tiny", epochs=10, batch_size=64, lr=0.02, knn_every=5),
    ),
}


@pytest.mark.parametrize("name", ["simsiam_gsg", "byol_gsg"])
@pytest.mark.parametrize("case", PRESETS)
def test_presets(case, name):
    recipe = importlib.import_module(f"recipes.{name}")
    flags, expected = PRESETS[case]
    config = recipe.parse_arguments(flags)
    if (case, name) == ("cifar10", "byol_gsg"):  # lightly scales BYOL's rate, not SimSiam's
        expected = expected | {"lr_batch": 128}
    assert {n: getattr(config, n) for n in expected} == expected
    if name == "byol_gsg":
        assert config.momentum == 0.99
    views = recipe.views_of(config)
    assert len(views) == 4 and len(set(views)) == 1
    view = views[0]
    assert (view.size, view.scale) == (config.image_size, (config.crop_min, 1.0))
    assert (view.jitter, view.jitter_p, view.grey_p) == ((0.4, 0.4, 0.4, 0.1), 0.8, 0.2)
    assert (view.blur_p, view.blur_sigma) == (0.5 if config.views == "simsiam" else 0, (0.1, 2.0))
    assert (view.flip_p, view.solarize_p) == (0.5, 0)


@pytest.mark.parametrize("name", ["simsiam_gsg", "byol_gsg"])
def test_heads_of_imagenet_and_cifar(name):
    recipe = importlib.import_module(f"recipes.{name}")
    network = recipe.SimSiam if name == "simsiam_gsg" else recipe.BYOL

    def layers(*flags):
        config = recipe.parse_arguments(flags)
        model = network(config)
        described = []
        for part in (model.projector, model.predictor):
            for layer in part:
                if isinstance(layer, nn.Linear):
                    described.append(
                        (layer.in_features, layer.out_features, layer.bias is not None)
                    )
                else:
                    described.append((type(layer).__name__, getattr(layer, "affine", None)))
        zero = all(not m.bn2.weight.any() for m in model.encoder.layer1)
        return described, zero

    norm, relu = ("BatchNorm1d", True), ("ReLU", None)
    hidden = [(2048, 512, False), norm, relu, (512, 2048, True)]
    wide = (2048, 2048, False)
    first = [(512, 2048, False), norm, relu]
    imagenet = [*first, wide, norm, relu, wide, ("BatchNorm1d", False), *hidden]
    assert layers("--arch", "resnet18") == (imagenet, True)  # 512 in place of ResNet-50's 2048
    cifar = [*first, wide, norm, *hidden]
    assert layers("--dataset", "cifar10") == (cifar, False)


def test_zero_init_is_of_the_last_batch_norm_of_each_block():
    encoder = build_encoder("resnet50", zero_init_residual=True)
    assert not any(block.bn3.weight.any() for block in encoder.layer2)
    assert all(block.bn1.weight.all() for block in encoder.layer2)


@pytest.mark.parametrize("flag", ["--output-dim", "--projector-hidden", "--predictor-hidden"])
@pytest.mark.parametrize("recipe", ["simsiam_gsg", "nnsiam", "snclr"])
def test_a_head_of_no_width_is_a_mistake(recipe, flag):
    module = importlib.import_module(f"recipes.{recipe}")
    with pytest.raises(UserError, match="must be above 0"):
        module.parse_arguments([flag, "0"])


@pytest.mark.parametrize("name", ["simsiam_gsg", "byol_gsg"])
def test_a_run_without_a_predictor_goes_on_from_its_checkpoint(name, tmp_path):
    recipe = importlib.import_module(f"recipes.{name}")
    flags = [*RUN, *FLAGS, "--no-predictor", "--data", str(images())]
    for folder, lengths in (("whole", [4]), ("parts", [2, 4])):
        for steps in lengths:
            length = ["--max-steps", str(steps), "--output", str(tmp_path / folder)]
            recipe.main([*flags, *length])
    whole, parts = (checkpoint.load(tmp_path / f / checkpoint.NAME) for f in ("whole", "parts"))
    assert whole["step"] == parts["step"] == 4
    assert whole["state"].keys() == parts["state"].keys()
    for key, value in whole["state"]["model"].items():
        assert torch.equal(parts["state"]["model"][key], value), key
