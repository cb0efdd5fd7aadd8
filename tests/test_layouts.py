"""Other people's checkpoints: each layout gives the network that wrote it, or one line."""

import argparse
import copy
import pickle
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
import torchvision
from timm.layers import resample_abs_pos_embed
from torch import nn

from common.errors import UserError
from common.models import build_encoder
from common.run.backbone import export_backbone
from eval import weights
from eval.detection.detectron2_names import detectron2_name, torchvision_name
from eval.encoders import in_words, load_encoder

CHILDREN = ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3", "layer4")


@pytest.fixture(scope="module")
def resnet():
    return shaken(build_encoder("resnet18"))


@pytest.fixture(scope="module")
def cifar():
    return shaken(build_encoder("resnet18_cifar"))


@pytest.fixture(scope="module")
def vit():
    """Returns timm's ViT-S for 32 pixels."""
    torch.manual_seed(1)
    return build_encoder("vit_small", 32).eval()


def shaken(encoder):
    """Changes an encoder so that each tensor matters, and so do the images: its norms have no
    initial values, but the statistics of images.
    """
    torch.manual_seed(1)
    for module in encoder.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.5, 0.5)
            module.momentum = None  # the plain mean
    encoder.train()(torch.randn(8, 3, 32, 32))
    return encoder.eval()


def prefixed(tensors, prefix):
    return {prefix + name: t for name, t in tensors.items()}


def some(*names):
    """Returns tensors of what is not the encoder."""
    return {name: torch.randn(4, 4) for name in names}


def changed(body):
    """Returns a momentum encoder's tensors: the same names, other values."""
    return {name: t + 1 for name, t in body.items()}


def by_position(body):
    return {
        re.sub(r"^\w+", lambda found: str(CHILDREN.index(found[0])), n): t for n, t in body.items()
    }


FC = ("fc.0.weight", "fc.2.weight")
PROJECTOR = ("projector.0.weight", "projector.1.running_mean", "projector.3.weight")
DINO_HEAD = ("head.mlp.0.weight", "head.last_layer.weight_g", "head.last_layer.weight_v")
LIGHTLY = ("projection_head.layers.0.weight", "online_classifier.linear.weight")
SWAV = ("projection_head.0.weight", "projection_head.3.weight", "prototypes.weight")


def ddp(*parts):
    return {f"module.{n}": t for part in parts for n, t in part.items()}


def moco(body):
    query = prefixed(body | some(*FC), "encoder_q.")
    key = prefixed(changed(body) | some(*FC), "encoder_k.")
    state = ddp(query, key, some("queue", "queue_ptr"))
    return {"epoch": 200, "arch": "resnet18", "state_dict": state, "optimizer": {}}


def swav(body):
    return {"epoch": 800, "state_dict": ddp(body, some(*SWAV)), "optimizer": {}}


def dino(body):
    """Returns the full file of a ResNet: both networks wrapped, flags next to them."""
    teacher = ddp(prefixed(body, "backbone."), some(*DINO_HEAD))
    student = ddp(prefixed(changed(body), "backbone."), some(*DINO_HEAD))
    flags = argparse.Namespace(arch="resnet18", patch_size=16, lr=0.1)
    state = {"student": student, "teacher": teacher, "epoch": 100, "args": flags}
    return state | {"dino_loss": {"center": torch.zeros(1, 4)}}


def barlow_twins(body):
    parts = prefixed(body, "backbone."), some(*PROJECTOR, "bn.running_mean", "bn.running_var")
    return {"epoch": 1000, "model": ddp(*parts), "optimizer": {}}


def vicreg(body):
    return {"epoch": 100, "model": ddp(prefixed(body, "backbone."), some(*PROJECTOR))}


def solo_learn(body):
    state = prefixed(body, "backbone.") | prefixed(changed(body), "momentum_backbone.")
    state |= some(*PROJECTOR, "classifier.weight", "momentum_projector.0.weight", "queue_y")
    return {"epoch": 400, "state_dict": state, "pytorch-lightning_version": "2.1.2", "loops": {}}


def solo_learn_dino(body):
    heads = some(*DINO_HEAD, *(f"momentum_{name}" for name in DINO_HEAD), "classifier.weight")
    state = prefixed(body, "backbone.") | prefixed(changed(body), "momentum_backbone.") | heads
    return {"state_dict": state | some("dino_loss_func.center")}


def lightly(body):
    state = prefixed(body, "backbone.") | prefixed(changed(body), "teacher_backbone.")
    return {"state_dict": state | some(*LIGHTLY, "prediction_head.layers.0.weight")}


def lightly_by_position(body):
    state = prefixed(by_position(body), "backbone.") | some(*LIGHTLY)
    return {"state_dict": state | prefixed(by_position(changed(body)), "backbone_momentum.")}


def compiled(body):
    return {"model": {f"module._orig_mod.{n}": t for n, t in body.items()}}


def compiled_part(body):
    return {"state_dict": prefixed(body, "backbone._orig_mod.") | some(*LIGHTLY)}


def without_counters(body):
    return {n: t for n, t in body.items() if not n.endswith("num_batches_tracked")}


def unknown_backbone(body):
    return {"state_dict": prefixed(body, "backbone.")}


RESNETS = {
    moco: "moco",
    swav: "swav",
    dino: "dino",
    barlow_twins: "barlow twins",
    vicreg: "vicreg",
    solo_learn: "solo-learn",
    solo_learn_dino: "solo-learn",
    lightly: "lightly",
    lightly_by_position: "lightly, by position",
    compiled: "torchvision or timm",
    compiled_part: "lightly",
    without_counters: "torchvision or timm",
    unknown_backbone: "backbone of an unknown project",
}


@pytest.mark.parametrize("wrap", RESNETS, ids=lambda wrap: wrap.__name__)
def test_a_resnet_of_each_layout_gives_its_features(wrap, resnet, tmp_path):
    content = wrap(resnet.state_dict())
    torch.save(content, tmp_path / "c.pth")
    names_itself = wrap in (moco, dino)
    encoder, facts = load_encoder(tmp_path / "c.pth", None if names_itself else "resnet18")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder(x), resnet(x), rtol=0, atol=1e-4)
    assert (encoder(x)[0] - encoder(x)[1]).abs().max() > 0.1
    assert facts["layout"] == facts["record"]["layout"] == in_words(facts) == RESNETS[wrap]
    assert facts["epoch"] == content.get("epoch") and not encoder.training
    if names_itself:
        with pytest.raises(UserError, match="holds resnet18, not --arch resnet50"):
            load_encoder(tmp_path / "c.pth", "resnet50")


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_detectron2s_pickle(resnet, tmp_path, protocol):
    """It is as the converters of MoCo and detectron2 write it, with counters and classifier."""
    state = resnet.state_dict() | some("fc.weight")
    model = {detectron2_name(n): t.numpy() for n, t in state.items()}
    content = {"model": model, "__author__": "MOCO", "matching_heuristics": True}
    (tmp_path / "c.pkl").write_bytes(pickle.dumps(content, protocol))
    encoder, facts = load_encoder(tmp_path / "c.pkl", "resnet18")
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(encoder(x), resnet(x), rtol=0, atol=1e-4)
    assert facts["layout"] == "detectron2"
    assert [torchvision_name(detectron2_name(n)) for n in state] == [*state]


# -- 32x32 stems, which names and shapes do not tell ----------------------------------------------


def test_solo_learns_stem_for_cifar_has_its_own_padding(cifar, tmp_path):
    torch.save(solo_learn(cifar.state_dict()), tmp_path / "c.ckpt")
    encoder, facts = load_encoder(tmp_path / "c.ckpt", "resnet18_cifar")
    x = torch.randn(2, 3, 32, 32)
    theirs = copy.deepcopy(cifar)
    theirs.conv1.padding = (2, 2)
    torch.testing.assert_close(encoder(x), theirs(x), rtol=0, atol=1e-4)
    assert (encoder(x) - cifar(x)).abs().max() > 0.01
    assert facts["record"]["layout"] == "solo-learn, stem of padding 2"


def test_lightlys_own_resnet_has_no_relu_in_its_stem(cifar, tmp_path):
    """Its children are in a Sequential, as in lightly's CIFAR-10 benchmark."""
    numbers = {name: i for i, name in enumerate(n for n in CHILDREN if n not in CHILDREN[2:4])}
    state = {
        re.sub(r"^\w+", lambda found: f"backbone.{numbers[found[0]]}", n): t
        for n, t in cifar.state_dict().items()
    }
    state = {n.replace(".downsample.", ".shortcut."): t for n, t in state.items()}
    torch.save({"state_dict": state | some("projection_head.layers.0.weight")}, tmp_path / "c.ckpt")
    encoder, facts = load_encoder(tmp_path / "c.ckpt", "resnet18_cifar")
    theirs = nn.Sequential(*(getattr(cifar, n) for n in numbers), cifar.avgpool, nn.Flatten())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(x), theirs(x), rtol=0, atol=1e-4)
    assert (encoder(x) - cifar(x)).abs().max() > 0.01
    assert facts["record"]["layout"] == "lightly's ResNet, stem without ReLU"


@pytest.mark.parametrize("wrap", [vicreg, barlow_twins, unknown_backbone])
def test_a_stem_whose_padding_nobody_knows_is_refused(wrap, cifar, tmp_path):
    torch.save(wrap(cifar.state_dict()), tmp_path / "c.pth")
    with pytest.raises(UserError, match="padding of a 3x3 stem is 2 in solo-learn"):
        load_encoder(tmp_path / "c.pth", "resnet18_cifar")


def test_a_resnet18_may_be_said_to_be_the_small_one(cifar, tmp_path):
    """Shapes differ: nothing can be loaded wrongly."""
    torch.save(moco(cifar.state_dict()), tmp_path / "c.pth")
    assert load_encoder(tmp_path / "c.pth", "resnet18_cifar")[1]["arch"] == "resnet18_cifar"
    with pytest.raises(UserError, match=r"conv1.weight is \(64, 3, 3, 3\)"):
        load_encoder(tmp_path / "c.pth")


# -- ViTs -----------------------------------------------------------------------------------------


def dino_vit(body):
    """Returns a ViT's file, in which the teacher is not wrapped, but the student is."""
    return dino(body) | {
        "teacher": prefixed(body, "backbone.") | some(*DINO_HEAD),
        "args": argparse.Namespace(arch="deit_small"),
    }


def mae(body):
    decoder = some("mask_token", "decoder_pos_embed", "decoder_embed.weight")
    state = body | decoder | some("decoder_blocks.0.attn.qkv.weight", "decoder_pred.bias")
    return {"model": state, "epoch": 799, "args": argparse.Namespace(model="mae_vit_tiny")}


def lightly_vit(body):
    state = prefixed(body, "backbone.vit.") | some("backbone.mask_token", *LIGHTLY)
    return {"state_dict": state | some("decoder.mask_token", "student_backbone.vit.cls_token")}


def solo_learn_vit(body):
    return {"state_dict": prefixed(body, "backbone.") | some(*PROJECTOR, "classifier.bias")}


VITS = {dino_vit: "dino", mae: "mae", lightly_vit: "lightly, ViT", solo_learn_vit: "solo-learn"}


@pytest.mark.parametrize("wrap", VITS, ids=lambda wrap: wrap.__name__)
def test_a_vit_of_each_layout_gives_its_features(wrap, vit, tmp_path):
    torch.save(wrap(vit.state_dict()), tmp_path / "c.pth")
    arch = None if wrap is dino_vit else "vit_small"
    encoder, facts = load_encoder(tmp_path / "c.pth", arch, 32)
    x = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(encoder(x), vit(x), rtol=0, atol=1e-5)
    assert facts["arch"] == "vit_small" and facts["record"]["layout"] == VITS[wrap]


@pytest.mark.parametrize("old", [False, True])
def test_torchvisions_vit(tmp_path, old):
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(32, 16, 12, 6, 384, 1536).eval()
    for tensor in theirs.parameters():
        tensor.data += 0.02 * torch.randn_like(tensor)
    state = theirs.state_dict()
    if old:  # from before torchvision 0.14
        state = {n.replace("mlp.0.", "mlp.linear_1."): t for n, t in state.items()}
        state = {n.replace("mlp.3.", "mlp.linear_2."): t for n, t in state.items()}
    torch.save(state, tmp_path / "vit.pth")
    encoder, facts = load_encoder(tmp_path / "vit.pth", "vit_small", 32)
    theirs.heads = nn.Identity()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder(x), theirs(x), rtol=0, atol=1e-4)
    assert facts["layout"] == "torchvision ViT"


def test_a_vit_small_that_may_have_6_or_12_heads_is_asked_for(vit, tmp_path):
    """moco-v3's main_lincls.py saves arch and state_dict under timm's own names."""
    state = ddp(vit.state_dict() | some("head.weight"))
    torch.save({"arch": "vit_small", "state_dict": state}, tmp_path / "linear.pth.tar")
    with pytest.raises(UserError, match="give --arch vit_small or vit_small_mocov3"):
        load_encoder(tmp_path / "linear.pth.tar", image_size=32)
    for arch in ("vit_small", "vit_small_mocov3"):
        assert load_encoder(tmp_path / "linear.pth.tar", arch, 32)[1]["arch"] == arch


def test_a_vit_of_another_image_size(vit, tmp_path):
    torch.save(vit.state_dict(), tmp_path / "vit.pth")
    with pytest.raises(UserError, match="of 32 pixels, not 224: give --image-size 32, or"):
        load_encoder(tmp_path / "vit.pth", "vit_small")
    with pytest.raises(UserError, match="--image-size 100: vit_small takes multiples of 16"):
        load_encoder(tmp_path / "vit.pth", "vit_small", 100)
    with pytest.raises(UserError, match="--image-size 100: vit_small takes multiples of 16"):
        load_encoder("random", "vit_small", 100)
    export_backbone(tmp_path / "backbone.safetensors", vit, "vit_small", 32, {"recipe": "snclr"})
    expected = resample_abs_pos_embed(vit.pos_embed, [4, 4])
    for file, arch in (("vit.pth", "vit_small"), ("backbone.safetensors", None)):
        encoder, facts = load_encoder(tmp_path / file, arch, 64)
        assert torch.equal(encoder.pos_embed, expected) and facts["image_size"] == 64
        assert torch.equal(encoder.pos_embed[:, 0], vit.pos_embed[:, 0])
        assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 384)
        assert in_words(facts).endswith("positions interpolated from 32 to 64 pixels")
        encoder, facts = load_encoder(tmp_path / file, arch, 32)
        assert torch.equal(encoder.pos_embed, vit.pos_embed) and "note" not in facts


# -- what is not known ----------------------------------------------------------------------------


def test_what_does_not_fit_is_ten_names(resnet, tmp_path):
    torch.save({f"body.{n}": t for n, t in resnet.state_dict().items()}, tmp_path / "c.pth")
    with pytest.raises(UserError) as error:
        load_encoder(tmp_path / "c.pth", "resnet18")
    text = str(error.value)
    assert len(re.findall(r"\b(missing|unexpected) ", text)) == 10
    assert "missing conv1.weight, unexpected body.conv1.weight" in text
    assert text.endswith(f" and {2 * len(resnet.state_dict()) - 10} more")
    torch.save({f"number {n}": n for n in range(100)}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"no state_dict of tensors: it has .* and 90 more$"):
        load_encoder(tmp_path / "c.pth", "resnet18")


def test_two_tensors_of_one_name_are_refused(resnet, tmp_path):
    state = resnet.state_dict()
    torch.save(prefixed(changed(state), "_orig_mod.") | state, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"more than one conv1\.weight, "):
        load_encoder(tmp_path / "c.pth", "resnet18")


def test_flags_and_numpys_numbers_beside_the_weights(resnet, tmp_path):
    flags = argparse.Namespace(lr=np.float32(0.1), arch="resnet18", own=argparse.Namespace(a=1))
    content = {
        "state_dict": resnet.state_dict(),
        "args": flags,
        "best": np.float64(71.5),
        "epoch": np.int64(7),
        "yes": np.bool_(True),
        "curve": np.arange(3.0),
    }
    torch.save(content, tmp_path / "c.pth")
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    stored = (tmp_path / "old.pth").read_bytes()
    assert b"numpy._core.multiarray" in stored
    old = stored.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")  # of numpy 1
    (tmp_path / "old.pth").write_bytes(old)
    allowed = torch.serialization.get_safe_globals()
    for name in ("c.pth", "old.pth"):
        _, facts = load_encoder(tmp_path / name)
        assert facts["arch"] == "resnet18" and facts["epoch"] == 7
    assert torch.serialization.get_safe_globals() == allowed  # here alone


def test_any_other_type_is_named_and_how_to_save_without_it(resnet, tmp_path):
    torch.save({"state_dict": resnet.state_dict(), "a": Fraction(1, 2)}, tmp_path / "c.pth")
    (tmp_path / "c.pkl").write_bytes(pickle.dumps({"model": {}, "a": Fraction(1, 2)}))
    for name in ("c.pth", "c.pkl"):
        with pytest.raises(UserError, match=r"holds a fractions.Fraction, .* torch.save\("):
            load_encoder(tmp_path / name, "resnet18")
    array = np.array([Fraction(1, 2)])  # an array of objects: loading would have to make each
    torch.save({"state_dict": resnet.state_dict(), "a": array}, tmp_path / "c.pth")
    with pytest.raises(UserError, match=r"holds a (fractions.Fraction|numpy.dtypes.ObjectDType)"):
        load_encoder(tmp_path / "c.pth", "resnet18")


class Runs:
    """An object that runs code when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return type(self.path).mkdir, (self.path,)


@pytest.mark.parametrize("name", ["c.pth", "c.pkl"])
def test_nothing_in_a_file_is_run(tmp_path, name):
    content = {"model": {}, "a": Runs(tmp_path / "made")}
    if name == "c.pth":
        torch.save(content, tmp_path / name)
    else:
        (tmp_path / name).write_bytes(pickle.dumps(content))
    with pytest.raises(UserError, match=name):
        load_encoder(tmp_path / name, "resnet18")
    assert not (tmp_path / "made").exists()


def test_the_encoder_that_a_file_names():
    tensors = {"a": torch.zeros(1)}
    for flags, arch in (
        ({"args": argparse.Namespace(model="mae_vit_base_patch16")}, "mae_vit_base_patch16"),
        ({"args": {"arch": "resnet50"}}, "resnet50"),
        ({"args": argparse.Namespace(arch="xcit", model="byol")}, None),
        ({"args": argparse.Namespace(model=None), "arch": "vit_huge"}, "vit_huge"),
        ({}, None),
    ):
        assert weights.weights_of({"model": tensors} | flags, "file")["arch"] == arch
    assert weights.ARCHS["mae_vit_base_patch16"] == "vit_base"
