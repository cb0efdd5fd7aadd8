"""Encoders against torchvision, timm and MoCo-v3's rules; heads, momentum copy and export."""

import json
import math

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from common.errors import UserError
from common.models import (
    build_encoder,
    freeze_patch_embedding,
    mlp,
    momentum_copy,
    update_momentum,
)
from common.run.backbone import export_backbone, load_backbone

WIDTHS = {  # embed_dim, and the number of weights of torchvision's and timm's encoders
    "resnet50": (2048, 23_508_032),
    "resnet101": (2048, 42_500_160),
    "resnet18": (512, 11_176_512),
    "resnet18_cifar": (512, 11_168_832),
    "vit_small": (384, None),
    "vit_small_mocov3": (384, None),
    "vit_base": (768, None),
    "vit_base_mocov3": (768, None),
    "tiny": (64, None),
    "resnet_lab": (128, 602_960),
}
SIZE = 64  # pixels: 4x4 patches
BUILT: dict[str, nn.Module] = {}


def encoder_of(arch: str) -> nn.Module:
    """Returns one encoder per arch for all tests that do not change it, in eval mode."""
    if arch not in BUILT:
        torch.manual_seed(0)
        BUILT[arch] = build_encoder(arch, SIZE).eval()
    return BUILT[arch]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Sets one thread: several that wait for each other on a busy machine take 10 times as long."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    BUILT.clear()


@torch.no_grad()
def features(encoder: nn.Module, size: int = SIZE) -> torch.Tensor:
    return encoder.eval()(torch.randn(2, 3, size, size, generator=torch.manual_seed(1)))


def shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(t.shape) for name, t in module.state_dict().items()}


# -- encoders -----------------------------------------------------------------------------------


@pytest.mark.parametrize("arch", WIDTHS)
def test_encoder_gives_one_vector_of_its_width_per_image(arch):
    encoder, (width, weights) = encoder_of(arch), WIDTHS[arch]
    assert encoder.embed_dim == width
    assert features(encoder).shape == (2, width)
    assert weights in (None, sum(p.numel() for p in encoder.parameters()))


@pytest.mark.parametrize("arch", ["resnet50", "resnet101", "resnet18"])
def test_resnet_is_torchvisions_without_its_classifier(arch):
    theirs = getattr(torchvision.models, arch)()
    theirs.fc = nn.Identity()
    ours = encoder_of(arch)
    assert shapes(ours) == shapes(theirs)
    theirs.load_state_dict(ours.state_dict())
    torch.testing.assert_close(features(ours), features(theirs), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arch", "name", "heads"),
    [
        ("vit_small", "vit_small_patch16_224", 6),
        ("vit_base", "vit_base_patch16_224", 12),
        ("vit_small_mocov3", "vit_small_patch16_224", 12),
        ("vit_base_mocov3", "vit_base_patch16_224", 12),
    ],
)
def test_vit_is_timms_without_its_classifier(arch, name, heads):
    ours = encoder_of(arch)
    assert {block.attn.num_heads for block in ours.blocks} == {heads}
    with torch.device("meta"):  # timm's initialisation is not needed and slow
        theirs = timm.create_model(name, num_heads=heads, num_classes=0, img_size=SIZE)
    assert shapes(ours) == shapes(theirs)
    theirs.load_state_dict(ours.state_dict(), assign=True)
    torch.testing.assert_close(features(ours), features(theirs), rtol=0, atol=0)


def test_vit_gives_the_class_token_after_the_last_norm():
    vit = encoder_of("vit_small")
    with torch.no_grad():
        x = torch.randn(2, 3, SIZE, SIZE, generator=torch.manual_seed(1))
        expected = vit.forward_features(x)[:, 0]
    torch.testing.assert_close(features(vit), expected)
    torch.testing.assert_close(expected.mean(dim=1), torch.zeros(2), atol=1e-5, rtol=0)  # normed


def test_the_two_small_vits_differ_in_features_alone():
    ours, released = encoder_of("vit_small"), encoder_of("vit_small_mocov3")
    assert shapes(ours) == shapes(released)
    weights = {name: t.clone() for name, t in released.state_dict().items()}
    released.load_state_dict(ours.state_dict())
    difference = (features(released) - features(ours)).abs().max()
    released.load_state_dict(weights)
    assert difference > 1e-2


def test_timms_small_vit_learns_its_positions():
    assert all(p.requires_grad for p in encoder_of("vit_small").parameters())


def test_cifar_resnet_has_a_small_stem_and_no_pooling():
    encoder = encoder_of("resnet18_cifar")
    stem = encoder.conv1
    assert (stem.kernel_size, stem.stride, stem.padding) == ((3, 3), (1, 1), (1, 1))
    assert stem.bias is None and isinstance(encoder.maxpool, nn.Identity)
    with torch.no_grad():
        stem_out = encoder.maxpool(encoder.relu(encoder.bn1(stem(torch.randn(1, 3, 32, 32)))))
        last = encoder.layer4(encoder.layer3(encoder.layer2(encoder.layer1(stem_out))))
    assert stem_out.shape == (1, 64, 32, 32) and last.shape == (1, 512, 4, 4)
    assert shapes(encoder).keys() == shapes(encoder_of("resnet18")).keys()
    # initialised as torchvision's other convolutions: kaiming normal, fan out
    assert stem.weight.std().item() == pytest.approx(math.sqrt(2 / (64 * 9)), rel=0.1)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize(("arch", "blocks"), [("resnet18", 8), ("resnet_lab", 5)])
def test_zero_init_residual_starts_each_block_as_identity(arch, blocks, zero):
    encoder = build_encoder(arch, zero_init_residual=zero)
    scales = [
        block.bn2.weight
        for layer in (1, 2, 3, 4)
        for block in encoder.get_submodule(f"layer{layer}")
    ]
    assert len(scales) == blocks
    assert all((scale == (0 if zero else 1)).all() for scale in scales)


def test_lab_resnet_costs_5_2_million_multiply_adds_at_32_pixels():
    counted = []

    def count(convolution, _, output):
        inputs = convolution.in_channels * math.prod(convolution.kernel_size)
        counted.append(output[0].numel() * inputs)

    encoder = build_encoder("resnet_lab")
    for module in encoder.modules():
        if isinstance(module, nn.Conv2d):
            module.register_forward_hook(count)
    features(encoder, 32)
    assert len(counted) == 14  # the stem, two in each of five blocks, three shortcuts
    assert sum(counted) == 5_222_400


@torch.no_grad()
def test_lab_resnets_last_block_adds_to_what_is_pooled():
    encoder = encoder_of("resnet_lab")
    depths = [len(encoder.get_submodule(f"layer{number}")) for number in (1, 2, 3, 4)]
    assert depths == [1, 1, 1, 2]
    x = torch.randn(2, 3, 32, 32, generator=torch.manual_seed(1))
    seen = {}
    block = encoder.layer4[-1]
    hook = block.register_forward_hook(lambda _, x, y: seen.update(input=x[0].clone()))
    out = encoder(x)
    hook.remove()
    assert seen["input"].shape == (2, 128, 2, 2) and block.downsample is None
    assert not torch.equal(out, seen["input"].mean(dim=(2, 3)))
    weight = block.bn2.weight.clone()
    block.bn2.weight.zero_()  # without its residual branch the pooled input is all there is
    torch.testing.assert_close(encoder(x), seen["input"].mean(dim=(2, 3)))
    block.bn2.weight.copy_(weight)


@pytest.mark.parametrize("arch", ["resnet34", "vit", "vit_small_", "", "fc"])
def test_unknown_arch_lists_the_known_ones(arch):
    with pytest.raises(ValueError, match="vit_small_mocov3"):
        build_encoder(arch)


# -- MoCo-v3's ViT ------------------------------------------------------------------------------


def sincos_oracle(rows: int, columns: int, dim: int) -> torch.Tensor:
    """Follows moco-v3 vits.py, build_2d_sincos_position_embedding, in loops and float64."""
    quarter = dim // 4
    table = [[0.0] * dim]  # the CLS token
    for i in range(rows):
        for j in range(columns):
            row = []
            for place, wave in ((i, math.sin), (i, math.cos), (j, math.sin), (j, math.cos)):
                row += [wave(place / 10000 ** (t / quarter)) for t in range(quarter)]
            table.append(row)
    return torch.tensor(table, dtype=torch.float64)


@pytest.mark.parametrize("size", [SIZE, 224])
def test_mocov3_positions_are_fixed_sines_and_cosines(size):
    vit = encoder_of("vit_small_mocov3") if size == SIZE else build_encoder("vit_small_mocov3")
    side = size // 16
    assert vit.pos_embed.shape == (1, side * side + 1, 384)
    assert not vit.pos_embed.requires_grad
    expected = sincos_oracle(side, side, 384)
    torch.testing.assert_close(vit.pos_embed[0].double(), expected, rtol=0, atol=2e-6)


def test_mocov3_positions_alone_are_not_trained():
    fixed = [n for n, p in encoder_of("vit_small_mocov3").named_parameters() if not p.requires_grad]
    assert fixed == ["pos_embed"]


def assert_uniform(weight: torch.Tensor, bound: float) -> None:
    """Asserts that all are within the bound, filling it, with a uniform distribution's variance."""
    weight, n = weight.detach(), weight.numel()
    assert weight.abs().max() <= bound * (1 + 1e-6) and weight.abs().max() > 0.999 * bound
    assert abs(weight.mean()) < 5 * bound / math.sqrt(3 * n)
    # the square of a uniform number has mean b^2/3 and variance 4 b^4/45
    spread = 5 * math.sqrt(4 / 45 / n)
    assert weight.square().mean().item() / bound**2 == pytest.approx(1 / 3, abs=spread)


def test_mocov3_linears_are_xavier_uniform_with_q_k_and_v_apart():
    vit, dim = encoder_of("vit_small_mocov3"), 384
    assert len(vit.blocks) == 12
    for block in vit.blocks:
        for part in block.attn.qkv.weight.chunk(3):
            assert_uniform(part, math.sqrt(6 / (dim + dim)))  # not sqrt(6 / (3 * dim + dim))
        assert_uniform(block.attn.proj.weight, math.sqrt(6 / (dim + dim)))
        assert_uniform(block.mlp.fc1.weight, math.sqrt(6 / (dim + 4 * dim)))
        assert_uniform(block.mlp.fc2.weight, math.sqrt(6 / (dim + 4 * dim)))


def test_mocov3_patch_embedding_is_uniform_over_its_fans():
    projection = encoder_of("vit_small_mocov3").patch_embed.proj
    assert projection.weight.shape == (384, 3, 16, 16)
    assert_uniform(projection.weight, math.sqrt(6 / (3 * 16 * 16 + 384)))


def test_mocov3_biases_start_at_zero_and_the_class_token_near_it():
    vit = encoder_of("vit_small_mocov3")
    biases = [p for name, p in vit.named_parameters() if name.endswith("bias")]
    assert len(biases) == 12 * 6 + 2 and all((bias == 0).all() for bias in biases)
    norms = [m.weight for m in vit.modules() if isinstance(m, nn.LayerNorm)]
    assert len(norms) == 25 and all((weight == 1).all() for weight in norms)
    assert 0.8e-6 < vit.cls_token.std().item() < 1.2e-6


def test_frozen_patch_embedding_is_all_that_freezing_stops():
    (vit,) = momentum_copy(encoder=encoder_of("vit_small_mocov3"))
    for parameter in vit.parameters():
        parameter.requires_grad = True
    freeze_patch_embedding(vit)
    frozen = [name for name, p in vit.named_parameters() if not p.requires_grad]
    assert frozen == ["patch_embed.proj.weight", "patch_embed.proj.bias"]


# -- heads --------------------------------------------------------------------------------------


def layers(head: nn.Sequential) -> list[tuple]:
    """Returns each layer as plain values: FC (in, out, bias), BN (width, affine), ReLU."""
    values = []
    for layer in head:
        if isinstance(layer, nn.Linear):
            values.append(("FC", layer.in_features, layer.out_features, layer.bias is not None))
        elif isinstance(layer, nn.BatchNorm1d):
            assert layer.track_running_stats and layer.eps == 1e-5 and layer.momentum == 0.1
            values.append(("BN", layer.num_features, layer.affine))
        else:
            values.append((type(layer).__name__,))
    return values


FC, BN, RELU = "FC", "BN", ("ReLU",)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (  # NNCLR's projector: BN after every FC, also the last
            {"sizes": [9, 8, 7, 4], "output_norm": True},
            [
                *[(FC, 9, 8, False), (BN, 8, True), RELU],
                *[(FC, 8, 7, False), (BN, 7, True), RELU],
                *[(FC, 7, 4, False), (BN, 4, True)],
            ],
        ),
        (  # SimSiam's predictor: last FC plain, with bias
            {"sizes": [9, 5, 9], "output_bias": True},
            [(FC, 9, 5, False), (BN, 5, True), RELU, (FC, 5, 9, True)],
        ),
        (  # BYOL's: hidden FC with bias, last one without
            {"sizes": [9, 5, 4], "hidden_bias": True},
            [(FC, 9, 5, True), (BN, 5, True), RELU, (FC, 5, 4, False)],
        ),
        (  # MoCo-v3's: no biases, BN without affine at the output
            {"sizes": [9, 5, 4], "output_norm": True, "output_affine": False},
            [(FC, 9, 5, False), (BN, 5, True), RELU, (FC, 5, 4, False), (BN, 4, False)],
        ),
        ({"sizes": [9, 4]}, [(FC, 9, 4, False)]),
        ({"sizes": [9, 4], "output_bias": True, "hidden_bias": True}, [(FC, 9, 4, True)]),
    ],
)
def test_head_has_just_the_layers_that_are_asked_for(arguments, expected):
    head = mlp(**arguments)
    assert layers(head) == expected
    assert head(torch.randn(6, 9)).shape == (6, arguments["sizes"][-1])


# -- momentum copy ------------------------------------------------------------------------------


def small_module() -> nn.Module:
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU())
    encoder[0].bias.requires_grad = False  # as a frozen patch embedding
    parts = {"encoder": encoder, "projector": nn.Linear(6, 2), "predictor": nn.Linear(2, 2)}
    return nn.ModuleDict(parts)


def small_copy(module: nn.Module) -> nn.Sequential:
    return momentum_copy(encoder=module["encoder"], projector=module["projector"])


def test_momentum_copy_starts_equal_shares_nothing_and_gets_no_gradient():
    online = small_module()
    target = small_copy(online)
    assert not any(p.requires_grad for p in target.parameters())
    assert online["encoder"][0].weight.requires_grad and target.training
    kept = online.state_dict()
    for name, b in target.state_dict().items():
        assert torch.equal(kept[name], b) and kept[name].data_ptr() != b.data_ptr(), name
    assert {name.split(".")[0] for name in target.state_dict()} == {"encoder", "projector"}
    x = torch.randn(8, 4)
    assert torch.equal(online["projector"](online["encoder"](x)), target(x))
    assert target(x).grad_fn is None


@pytest.mark.parametrize("momentum", [0.99, 0.5, 1.0, 0.0])
def test_momentum_update_moves_parameters_only(momentum):
    online = small_module()
    target = small_copy(online)
    for parameter in online.parameters():
        parameter.data.add_(torch.randn_like(parameter))
    online["encoder"](
        torch.randn(8, 4) + 5
    )  # moves the running statistics of the online network alone
    before = {name: t.clone() for name, t in target.state_dict().items()}
    kept = {name: t.clone() for name, t in online.state_dict().items()}
    update_momentum(target, online, momentum)
    parameters = dict(online.named_parameters())
    for name, now in target.state_dict().items():
        if name in parameters:
            expected = momentum * before[name] + (1 - momentum) * kept[name]
            torch.testing.assert_close(now, expected, rtol=1e-6, atol=1e-7)
        else:
            assert torch.equal(now, before[name]) and not torch.equal(now, kept[name]), name
    assert all(torch.equal(t, kept[name]) for name, t in online.state_dict().items())
    assert all(p.grad_fn is None and not p.requires_grad for p in target.parameters())


def test_batch_norm_of_the_momentum_copy_follows_its_own_inputs():
    target = small_copy(small_module())
    before = target.encoder[1].running_mean.clone()
    with torch.no_grad():
        target(torch.randn(8, 4) + 5)
    assert not torch.equal(target.encoder[1].running_mean, before)


# -- exported backbones -------------------------------------------------------------------------

FACTS = {"recipe": "snclr", "epoch": 3, "commit": "abc1234", "config_hash": "0123456789ab"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Exports an encoder once: arch -> path of its backbone file."""
    folder, done = tmp_path_factory.mktemp("backbones"), {}

    def export(arch: str):
        if arch not in done:
            done[arch] = folder / arch / "backbone.safetensors"
            done[arch].parent.mkdir()
            export_backbone(done[arch], encoder_of(arch), arch, SIZE, FACTS)
        return done[arch]

    return export


def metadata_of(path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def rewritten(path, target, metadata=(), drop=(), **tensors):
    """Writes a copy of a backbone file with other metadata or tensors."""
    weights = load_file(path) | tensors
    weights = {name: t for name, t in weights.items() if name not in drop}
    save_file(weights, target, metadata_of(path) | dict(metadata))
    return target


def refused(path) -> str:
    with pytest.raises(UserError) as error:
        load_backbone(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)
    return str(error.value)


def test_exported_resnet_loads_into_torchvisions_without_its_classifier(exported):
    model = torchvision.models.resnet18()
    result = model.load_state_dict(load_file(exported("resnet18")), strict=False)
    assert sorted(result.missing_keys) == ["fc.bias", "fc.weight"]
    assert result.unexpected_keys == []
    model.fc = nn.Identity()
    torch.testing.assert_close(
        features(model), features(encoder_of("resnet18")), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("arch", ["vit_small", "vit_small_mocov3"])
def test_exported_vit_loads_into_timms_with_the_stored_arguments(exported, arch):
    metadata = metadata_of(exported(arch))
    assert metadata["loader"] == "timm.create_model"
    with torch.device("meta"):
        model = timm.create_model(**json.loads(metadata["loader_kwargs"]))
    model.load_state_dict(load_file(exported(arch)), assign=True)
    torch.testing.assert_close(features(model), features(encoder_of(arch)), rtol=1e-5, atol=1e-5)


def test_metadata_say_what_the_file_is(exported):
    metadata = metadata_of(exported("vit_small_mocov3"))
    assert metadata["arch"] == "vit_small_mocov3" and metadata["image_size"] == str(SIZE)
    arguments = json.loads(metadata["loader_kwargs"])
    assert arguments["num_heads"] == 12 and arguments["num_classes"] == 0
    assert json.loads(metadata["mean"]) == [0.485, 0.456, 0.406]
    assert json.loads(metadata["std"]) == [0.229, 0.224, 0.225]
    assert {name: metadata[name] for name in FACTS} == {n: str(v) for n, v in FACTS.items()}
    assert len(json.loads(metadata["feature_check"])) >= 8
    assert metadata_of(exported("resnet18"))["loader"] == "torchvision.models.resnet18"
    for arch in ("tiny", "resnet_lab"):
        metadata = metadata_of(exported(arch))
        assert metadata["loader"] == "common.models.build_encoder"
        assert json.loads(metadata["loader_kwargs"]) == {"arch": arch}


@pytest.mark.parametrize("arch", ["tiny", "resnet_lab", "resnet18_cifar", "vit_small_mocov3"])
def test_backbone_comes_back_as_it_went(exported, arch):
    encoder, metadata = load_backbone(exported(arch).parent)  # a run folder
    assert metadata["arch"] == arch and not encoder.training
    assert encoder.embed_dim == WIDTHS[arch][0]
    original = encoder_of(arch).state_dict()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, original[name]), name
    torch.testing.assert_close(features(encoder), features(encoder_of(arch)))


def test_another_network_of_the_same_shapes_is_refused(exported, tmp_path):
    path = rewritten(
        exported("vit_small_mocov3"), tmp_path / "b.safetensors", {"arch": "vit_small"}
    )
    assert "features" in refused(path)


@pytest.mark.parametrize("factor", [1.05, float("nan")])
def test_changed_weights_are_refused(exported, tmp_path, factor):
    weight = load_file(exported("tiny"))["0.weight"] * factor
    path = rewritten(exported("tiny"), tmp_path / "b.safetensors", **{"0.weight": weight})
    assert "features" in refused(path)


def test_missing_unexpected_and_misshapen_tensors_are_all_listed(exported, tmp_path):
    path = rewritten(
        exported("tiny"),
        tmp_path / "b.safetensors",
        drop=["1.weight"],
        **{"fc.weight": torch.zeros(10, 128), "0.weight": torch.zeros(16, 3, 7, 7)},
    )
    message = refused(path)
    assert "missing 1.weight" in message and "unexpected fc.weight" in message
    assert "0.weight is (16, 3, 7, 7), not (16, 3, 3, 3)" in message


@pytest.mark.parametrize("kind", ["absent", "no safetensors", "no metadata", "truncated"])
def test_a_file_that_is_no_backbone_is_named(exported, tmp_path, kind):
    path = tmp_path / "b.safetensors"
    if kind == "no safetensors":
        path.write_text("a text")
    elif kind == "no metadata":
        save_file({"a": torch.zeros(2)}, path)
    elif kind == "truncated":
        path.write_bytes(exported("tiny").read_bytes()[:-100])
    refused(path)


def test_an_arch_that_this_code_does_not_know_is_refused(exported, tmp_path):
    path = rewritten(exported("tiny"), tmp_path / "b.safetensors", {"arch": "resnet34"})
    assert "resnet34" in refused(path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_export_leaves_the_encoder_as_it_was(tmp_path, dtype):
    torch.manual_seed(0)
    encoder = build_encoder("tiny").to(dtype).train()
    for parameter in encoder.parameters():  # more digits than float32 holds
        parameter.data.mul_(1 + 1e-9 * torch.rand_like(parameter))
    before = {name: t.clone() for name, t in encoder.state_dict().items()}
    export_backbone(tmp_path / "b.safetensors", encoder, "tiny", 32, FACTS)
    assert encoder.training
    for name, tensor in encoder.state_dict().items():
        assert tensor.dtype == before[name].dtype and torch.equal(tensor, before[name]), name
    stored = load_file(tmp_path / "b.safetensors")
    assert {t.dtype for t in stored.values()} == {torch.float32, torch.int64}
    assert [p.name for p in tmp_path.iterdir()] == ["b.safetensors"]  # no partial file stays
