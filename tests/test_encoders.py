"""Encoders to evaluate: ours, the exact-keys guard, and features instead of names."""

import json
import lzma
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import BY_FAMILY
from safetensors.torch import save_file

from common.errors import UserError
from common.models import build_encoder
from common.run import checkpoint, environment
from common.run.backbone import export_backbone
from eval.encoders import arch_of, in_words, load_encoder, record_fields
from results import record


@pytest.fixture(scope="module")
def resnet():
    """Returns torchvision's ResNet-18 with its classifier, norms with statistics of images."""
    import torchvision

    torch.manual_seed(1)
    model = torchvision.models.resnet18()
    model.train()(torch.randn(8, 3, 64, 64))
    return model.eval()


def features_of(resnet, x):
    """Returns what the classifier of a ResNet gets."""
    seen = []
    hook = resnet.avgpool.register_forward_hook(lambda *call: seen.append(call[2].flatten(1)))
    resnet(x)
    hook.remove()
    return seen[0]


def prefixed(tensors, prefix):
    return {prefix + name: t for name, t in tensors.items()}


def wrapped(layout, resnet):
    """Returns a checkpoint of a ResNet-18 as each project writes it, heads and all."""
    state = resnet.state_dict()
    body = {n: t for n, t in state.items() if not n.startswith("fc.")}
    projector = {f"fc.{i}.weight": torch.randn(4, 4) for i in (0, 3)}
    projector |= {f"fc.1.{n}": torch.randn(4) for n in ("weight", "bias", "running_mean")}
    other = {name: torch.randn_like(t.float()) for name, t in body.items()}
    if layout == "torchvision":
        return state
    if layout == "without classifier":  # like Barlow Twins' and VICReg's resnet50.pth
        return body
    if layout == "ddp":
        return {"model": prefixed(state, "module."), "epoch": 3}
    if layout == "moco-v3":
        tensors = prefixed(body | projector, "module.base_encoder.")
        tensors |= prefixed(other | projector, "module.momentum_encoder.")
    else:
        tensors = prefixed(body | projector, "module.encoder.")
        if layout == "gsg byol":
            tensors |= prefixed(other | projector, "module.encoder_momentum.")
    tensors |= {"module.predictor.0.weight": torch.randn(4, 4)}
    return {"epoch": 100, "arch": "resnet18", "state_dict": tensors, "optimizer": {}}


LAYOUTS = ["torchvision", "without classifier", "ddp", "moco-v3", "simsiam", "gsg byol"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_gives_the_same_features(layout, resnet, tmp_path):
    path = tmp_path / "checkpoint.pth.tar"
    torch.save(wrapped(layout, resnet), path)
    says = layout in ("moco-v3", "simsiam", "gsg byol")
    encoder, facts = load_encoder(path, None if says else "resnet18")
    x = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(encoder(x), features_of(resnet, x), rtol=0, atol=1e-6)
    assert not encoder.training
    assert facts["arch"] == "resnet18" and facts["recipe"] is None and len(facts["sha256"]) == 64
    assert facts["epoch"] == {"moco-v3": 100, "ddp": 3}.get(layout, 100 if says else None)
    if not says:
        with pytest.raises(UserError, match="give --arch"):
            load_encoder(path)
    with pytest.raises(UserError):  # never another than the file's
        load_encoder(path, "resnet50")


def test_momentum_encoder_alone(resnet, tmp_path):
    tensors = prefixed(resnet.state_dict(), "module.momentum_encoder.")
    torch.save({"state_dict": tensors}, tmp_path / "c.pth")
    encoder, facts = load_encoder(tmp_path / "c.pth", "resnet18")
    x = torch.randn(1, 3, 64, 64)
    torch.testing.assert_close(encoder(x), features_of(resnet, x), rtol=0, atol=1e-6)
    assert "momentum" in facts["layout"]


def test_every_key_that_does_not_match_is_named(resnet, tmp_path):
    state = resnet.state_dict()
    del state["bn1.weight"], state["layer3.1.conv2.weight"]
    state |= {"layer9.weight": torch.zeros(1), "fcx.bias": torch.zeros(1)}
    state["conv1.weight"] = torch.zeros(64, 3, 3, 3)
    torch.save(state, tmp_path / "c.pth")
    with pytest.raises(UserError) as error:
        load_encoder(tmp_path / "c.pth", "resnet18")
    text = str(error.value)
    for expected in ("missing bn1.weight", "missing layer3.1.conv2.weight"):
        assert expected in text
    for expected in (
        "unexpected layer9.weight",
        "unexpected fcx.bias",
        "conv1.weight is (64, 3, 3",
    ):
        assert expected in text
    assert text.count("missing") == 2 and text.count("unexpected") == 2


def test_heads_of_a_vit_are_told_by_the_file_and_not_by_its_tensors(tmp_path):
    """MoCo-v3's ViT-S and timm's have equal names and shapes, and other features."""
    torch.manual_seed(0)
    twelve = build_encoder("vit_small_mocov3", 32).eval()
    six = build_encoder("vit_small", 32).eval()
    six.load_state_dict(twelve.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert (six(x) - twelve(x)).abs().max() > 1e-2
    state = twelve.state_dict() | {"head.0.weight": torch.zeros(8, 384)}
    moco = {"arch": "vit_small", "state_dict": prefixed(state, "module.base_encoder.")}
    torch.save(moco, tmp_path / "moco.pth.tar")
    encoder, facts = load_encoder(tmp_path / "moco.pth.tar", image_size=32)
    assert facts["arch"] == "vit_small_mocov3"
    torch.testing.assert_close(encoder(x), twelve(x), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="holds vit_small_mocov3, not --arch vit_small"):
        load_encoder(tmp_path / "moco.pth.tar", "vit_small", image_size=32)
    # timm's files do not say: --arch does
    save_file({n: t.clone() for n, t in twelve.state_dict().items()}, tmp_path / "timm.safetensors")
    with pytest.raises(UserError, match="give --arch"):
        load_encoder(tmp_path / "timm.safetensors", image_size=32)
    for arch, expected in (("vit_small", six), ("vit_small_mocov3", twelve)):
        encoder, _ = load_encoder(tmp_path / "timm.safetensors", arch, image_size=32)
        torch.testing.assert_close(encoder(x), expected(x), rtol=0, atol=1e-6)
    # ours says it in its metadata
    path = tmp_path / "backbone.safetensors"
    export_backbone(path, twelve, "vit_small_mocov3", 32, {"recipe": "snclr", "epoch": 2})
    encoder, facts = load_encoder(path)
    assert (facts["arch"], facts["recipe"], facts["epoch"]) == ("vit_small_mocov3", "snclr", 2)
    assert facts["image_size"] == 32 and facts["run"] is None
    torch.testing.assert_close(encoder(x), twelve(x), rtol=0, atol=1e-6)
    with pytest.raises(UserError, match="holds vit_small_mocov3, not --arch vit_small"):
        load_encoder(path, "vit_small")


def test_controls():
    encoder, facts = load_encoder("pixels", image_size=8)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(encoder(x), x.flatten(1)) and encoder.embed_dim == 192
    assert not any(p.requires_grad for p in encoder.parameters())
    first, facts = load_encoder("random", "tiny", 32)
    second, again = load_encoder("random", "tiny", 32)
    assert facts["sha256"] == again["sha256"]
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(first(x), second(x))


def test_mistakes_get_one_line(tmp_path):
    for source, arch, text in (
        (tmp_path / "nothing.pth", None, "no such file"),
        (tmp_path, None, "has no backbone.safetensors and no checkpoint.pt"),
        ("random", None, "needs --arch"),
        ("random", "resnet51", "did you mean resnet5"),
    ):
        with pytest.raises(UserError, match=text):
            load_encoder(source, arch)
    (tmp_path / "text.pth").write_text("not a checkpoint")
    (tmp_path / "text.safetensors").write_text("not a checkpoint")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    for name, text in (
        ("text.pth", "cannot be read"),
        ("text.safetensors", "no safetensors file"),
        ("empty.pth", "no state_dict"),
    ):
        with pytest.raises(UserError, match=text):
            load_encoder(tmp_path / name, "resnet18")


# -- runs that have not ended ---------------------------------------------------------------------


def unfinished(run, folder):
    """Copies the run's folder as it was before its backbone was exported."""
    done = {"backbone.safetensors", "results.json"}
    shutil.copytree(run, folder, ignore=lambda _, names: done & {*names})
    return folder


def fields_of(facts, path):
    config = SimpleNamespace(backbone=str(path), method="", pretrained_on="other", seed=0)
    return record_fields(facts, config, environment.describe(torch.device("cpu"), 1))


@pytest.mark.parametrize("method", BY_FAMILY)
def test_a_run_can_be_evaluated_before_its_end(method, run_of, tmp_path):
    run = run_of(method)
    finished, exported = load_encoder(run)
    folder = unfinished(run, tmp_path / "run")
    alone = tmp_path / "copy.pt"  # a snapshot's, without its run
    shutil.copy(run / checkpoint.NAME, alone)
    (folder / "snapshots").mkdir()
    snapshot = shutil.copy(alone, folder / "snapshots" / "epoch-0001.pt")
    x = torch.randn(2, 3, exported["image_size"], exported["image_size"])
    for path in (folder, folder / checkpoint.NAME, snapshot, alone):
        encoder, facts = load_encoder(path)
        assert torch.equal(encoder(x), finished(x)) and not encoder.training
        for name in ("arch", "recipe", "image_size", "layout"):
            assert facts[name] == exported[name]
        assert facts["epoch"] == pytest.approx(exported["epoch"])
        assert facts["run"] is None and facts["config"]["dataset"] == "photos"
        found = fields_of(facts, path)
        scheduled = facts["config"]["epochs"]
        says = f"{round(facts['epoch'], 4):g} of {scheduled:g} scheduled epochs"
        assert found["epoch"] == says and in_words(facts) == f"epoch {says}"
        assert found["method"] == method and found["pretraining"]["batch"] == 36
        assert found["backbone_sha256"] == [facts["sha256"]] and found["seeds_of"] == "pretraining"
        assert bool(found["command"]) == (path is not alone)
        found |= {"dataset": found["pretraining"] | {}, "protocol": "linear", "metric": "top1"}
        found["dataset"] = {"name": "photos", "copy": None, "incomplete": None}
        found = record.with_values(found, [50.0]) | {"command": ["a command"]}
        assert record.problems(found) == [] or found["commit"] == "unknown"
    with pytest.raises(UserError, match=r"holds \S+, not --arch resnet50"):
        load_encoder(snapshot, "resnet50")


def test_a_run_that_goes_on_after_its_results_gives_its_checkpoint(run_of, tmp_path):
    run = run_of("NNCLR")
    assert load_encoder(run)[1]["run"] == run  # it has ended
    folder = tmp_path / "run"
    shutil.copytree(run, folder)
    starts = json.loads((folder / environment.NAME).read_text())
    last = starts["steps"] | {"last": starts["steps"]["last"] + 1}
    starts["restarts"] = [{**starts, "steps": last}]
    (folder / environment.NAME).write_text(json.dumps(starts))
    assert load_encoder(folder)[1]["record"]["epoch"].endswith("scheduled epochs")


def test_a_checkpoint_without_an_encoder_is_named(tmp_path):
    """One is an evaluation's, one is of the first format, in which flags were not saved."""
    for state, text in (
        ({"evaluation": "linear_probe"}, "is the checkpoint of an evaluation"),
        ({"recipe": "nnclr", "state": {"model": {}}}, "leave it beside the config.yaml"),
    ):
        torch.save({"format": checkpoint.FORMAT, **state}, tmp_path / "c.pt")
        with pytest.raises(UserError, match=text):
            load_encoder(tmp_path / "c.pt")


def test_a_checkpoint_of_format_1_is_read_under_the_new_names(tmp_path):
    """tests/test_old_checkpoint.py says where the file is from; nothing lies next to it here."""
    stored = Path(__file__).resolve().parent / "data" / "checkpoint-format-1.pt.xz"
    (tmp_path / checkpoint.NAME).write_bytes(lzma.decompress(stored.read_bytes()))
    encoder, facts = load_encoder(tmp_path)
    assert facts["record"]["epoch"] == "0.0133 of 10 scheduled epochs"
    model = torch.load(tmp_path / checkpoint.NAME, weights_only=True)["state"]["model"]
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(model[f"branch.0.{name}"], tensor), name


def test_a_note_of_the_encoder_stays_beside_that_of_the_evaluation():
    stopped = {"note": "stopped after 1 of 10 scheduled epochs"}
    assert record.noted({}) == {} and record.noted(stopped, "") == stopped
    both = record.noted(stopped, "stored features")
    assert both["note"] == "stopped after 1 of 10 scheduled epochs; stored features"
    assert record.is_stopped(both)


def test_moco_v3s_own_names_are_of_its_own_vits():
    """They have 12 heads, fixed positions; after its linear evaluation, a file has timm's names."""
    for name in ("vit_small", "vit_base"):
        assert arch_of(Path("a.pth.tar"), name, "moco-v3", None) == f"{name}_mocov3"
    assert arch_of(Path("a.pth.tar"), "vit_base", "torchvision or timm", None) == "vit_base"
