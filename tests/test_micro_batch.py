"""--micro-batch: the whole batch's gradient in pieces, for encoders without and with batch norm."""

import copy
import dataclasses
import functools
import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import BY_FAMILY, METHODS, only_error, run_ranks, run_script, small
from torch import nn

from common.errors import UserError
from common.fast.batch_norm import rank_batch_norm
from common.fast.micro_batch import Pieces, autocast_of
from common.models import build_encoder, mlp
from common.run import metrics
from common.run.run import Run, check_batch
from recipes.nnclr import nnclr_loss

BATCH, VIEWS, DIM = 12, 2, 8


def tiny_vit(*_):
    from timm.models.vision_transformer import VisionTransformer

    encoder = VisionTransformer(
        img_size=32, patch_size=16, embed_dim=32, depth=2, num_heads=2, num_classes=0
    )
    encoder.embed_dim = 32
    return encoder


def in_pieces(encoder, micro_batch):
    return Pieces(
        encoder, SimpleNamespace(batch_size=BATCH, micro_batch=micro_batch, compile=False)
    )


def encoder_and_head(arch, dtype):
    """Builds an encoder and a head with batch norms, as all recipes have."""
    torch.manual_seed(0)
    encoder = tiny_vit() if arch == "vit" else build_encoder(arch, 32)
    head = mlp([encoder.embed_dim, 16, DIM], output_norm=True)
    return encoder.to(dtype), rank_batch_norm(head, torch.device("cpu")).to(dtype)


def views_of(dtype):
    torch.manual_seed(1)
    return [torch.randn(BATCH, 3, 32, 32).to(dtype) for _ in range(VIEWS)]


def loss_of(features, head):
    """Returns a loss in which every image meets every other, after a head with batch norms."""
    z1, z2 = map(head, features)
    return nnclr_loss(z1, z2) + nnclr_loss(z2.detach(), z1)


def gradients(encoder, head, encode, views):
    """Returns loss and gradients of one step with `encode`, a way of computing the features."""
    encoder.zero_grad()
    head.zero_grad()
    loss = loss_of(encode(*views), head)
    loss.backward()
    getattr(encode, "replay", lambda: None)()
    named = [*encoder.named_parameters("encoder"), *head.named_parameters("head")]
    return loss.detach(), {n: p.grad.clone() for n, p in named if p.grad is not None}


def assert_close(ours, expected, tolerance):
    (loss, grads), (loss_expected, grads_expected) = ours, expected
    torch.testing.assert_close(loss, loss_expected, rtol=tolerance, atol=0)
    assert grads.keys() == grads_expected.keys() and len(grads) > 10
    largest = max(grad.abs().max() for grad in grads_expected.values())
    rounding = torch.finfo(loss.dtype).eps * largest  # a bias before a batch norm has gradient 0
    for name, grad in grads_expected.items():
        worst = (grads[name] - grad).abs().max()
        assert worst <= tolerance * grad.abs().max() + rounding, f"{name}: off by {worst}"


DTYPES = [
    (torch.float64, 1e-10),
    pytest.param(torch.float32, 1e-5, marks=pytest.mark.long),
]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("micro_batch", [2, 4, 12])
def test_a_vit_in_pieces_has_the_gradient_of_the_whole_batch(micro_batch, dtype, tolerance):
    encoder, head = encoder_and_head("vit", dtype)
    views = views_of(dtype)
    expected = gradients(encoder, head, lambda *v: [encoder(x) for x in v], views)
    ours = gradients(encoder, head, in_pieces(encoder, micro_batch), views)
    assert_close(ours, expected, tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
def test_one_forward_for_both_views_changes_nothing(dtype, tolerance):
    encoder, head = encoder_and_head("vit", dtype)
    views = views_of(dtype)
    forwards = []
    encoder.register_forward_hook(lambda *_: forwards.append(1))
    ours = gradients(encoder, head, Pieces(encoder), views)
    assert len(forwards) == 1
    expected = gradients(encoder, head, lambda *v: [encoder(x) for x in v], views)
    assert_close(ours, expected, tolerance)


@pytest.mark.parametrize("arch", [pytest.param("resnet18", marks=pytest.mark.long), "tiny"])
def test_a_resnet_whole_has_statistics_per_view(arch):
    encoder, head = encoder_and_head(arch, torch.float64)
    views = [x * (i + 1) for i, x in enumerate(views_of(torch.float64))]
    expected = gradients(encoder, head, lambda *v: [encoder(x) for x in v], views)
    assert_close(gradients(encoder, head, Pieces(encoder), views), expected, 1e-12)


def place(encoder):
    """Gives an encoder our own batch norms, as Run.place on CPU."""
    return rank_batch_norm(encoder, torch.device("cpu"))


@pytest.mark.parametrize(
    "norms",
    [place, pytest.param(lambda encoder: encoder, marks=pytest.mark.long)],
    ids=["ours", "torch's"],
)
@pytest.mark.parametrize("micro_batch", [4, pytest.param(12, marks=pytest.mark.long)])
def test_a_resnet_in_pieces_has_statistics_per_piece(micro_batch, norms):
    """torch's batch norms give the same, called piece by piece with the graph of all pieces at
    once; running statistics too: they move once for each piece and view, not again in the replay.
    """
    encoder, head = encoder_and_head("resnet18", torch.float64)
    plain, views = copy.deepcopy(encoder), views_of(torch.float64)
    pieces = BATCH // micro_batch

    def piece_by_piece(*views):
        features = [x.new_empty(BATCH, 512) for x in views]
        for x, f in zip(views, features, strict=True):
            for j in range(pieces):
                images = [i for i in range(BATCH) if i % pieces == j]
                f[images] = plain(x[images])
        return features

    expected = gradients(plain, head, piece_by_piece, views)
    encoder = norms(encoder)
    encode = in_pieces(encoder, micro_batch)
    assert_close(gradients(encoder, head, encode, views), expected, 1e-10)
    statistics = dict(plain.named_buffers())
    assert statistics["bn1.num_batches_tracked"] == pieces * VIEWS
    for name, value in encoder.named_buffers():
        torch.testing.assert_close(value, statistics[name], rtol=1e-10, atol=1e-12, msg=name)
    assert all(m.track_running_stats for m in encoder.modules() if "BatchNorm" in str(type(m)))


def test_pieces_of_a_resnet_are_another_gradient_than_the_whole():
    """With batch norms the size of a piece enters the numbers, as the pages say."""
    encoder, head = encoder_and_head("tiny", torch.float64)
    views = views_of(torch.float64)
    _, whole = gradients(encoder, head, Pieces(encoder), views)
    _, parts = gradients(encoder, head, in_pieces(encoder, 4), views)
    _, one_piece = gradients(encoder, head, in_pieces(encoder, BATCH), views)
    first = "encoder.0.weight"
    assert (parts[first] - whole[first]).norm() > 0.01 * whole[first].norm()
    torch.testing.assert_close(one_piece[first], whole[first], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("arch", ["vit", "tiny"])
def test_bf16_is_replayed_as_bf16(arch):
    """The replay repeats the first forward bit by bit, outside of the autocast of the caller."""
    encoder, head = encoder_and_head(arch, torch.float32)
    outputs = []
    encoder.register_forward_hook(lambda m, i, output: outputs.append(output.detach()))
    encode = in_pieces(encoder, 4)
    with torch.autocast("cpu", torch.bfloat16):
        z1, z2 = map(head, encode(*views_of(torch.float32)))
    nnclr_loss(z1.float(), z2.float()).backward()
    encode.replay()
    first, again = outputs[: len(outputs) // 2], outputs[len(outputs) // 2 :]
    assert len(first) == len(again) == 3 * VIEWS
    assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert autocast_of("cpu")["enabled"] is False
    with torch.no_grad():  # another first forward, without autocast: the replay was not like this
        plain = encoder(views_of(torch.float32)[0][::3])
    assert not torch.equal(plain, again[0].float())
    assert all(p.grad is not None and p.grad.any() for p in [next(encoder.parameters())])


def test_without_gradient_nothing_is_kept_for_a_replay():
    encoder, _ = encoder_and_head("vit", torch.float32)
    encode = in_pieces(encoder, 4)
    with torch.no_grad():
        features = encode(*views_of(torch.float32))
        torch.testing.assert_close(features[1], encoder(views_of(torch.float32)[1]))
    assert not encode.encoded and not features[0].requires_grad


def test_a_view_that_the_loss_leaves_out_has_no_gradient():
    encoder, head = encoder_and_head("vit", torch.float64)
    x1, x2 = views_of(torch.float64)
    encode = in_pieces(encoder, 4)
    features, _ = encode(x1, x2)
    head(features).square().mean().backward()
    encode.replay()
    ours = [p.grad.clone() for p in encoder.parameters()]
    encoder.zero_grad()
    head(encoder(x1)).square().mean().backward()
    for mine, p in zip(ours, encoder.parameters(), strict=True):
        torch.testing.assert_close(mine, p.grad)
    assert not encode.encoded


def test_no_more_than_one_piece_has_a_graph():
    """The bytes that autograd saves for the backward pass at one time are those of a piece."""
    encoder, head = encoder_and_head("vit", torch.float32)
    views = views_of(torch.float32)
    saved = {}
    weights = {p.data_ptr() for p in [*encoder.parameters(), *head.parameters()]}

    def most(encode):
        now = peak = 0

        class Kept:
            def __init__(self, tensor):
                nonlocal now, peak
                is_weight = tensor.untyped_storage().data_ptr() in weights
                self.tensor, self.bytes = tensor, 0 if is_weight else tensor.nbytes
                now += self.bytes
                peak = max(peak, now)

            def __del__(self):
                nonlocal now
                now -= self.bytes

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
            gradients(encoder, head, encode, views)
        return peak

    for micro_batch in (0, 12, 2):
        saved[micro_batch] = most(in_pieces(encoder, micro_batch))
    assert saved[12] < 0.7 * saved[0]  # one view of two
    assert saved[2] < 0.35 * saved[12]


LAYERS = ["depth", "patches", "attention"]


@pytest.mark.parametrize(
    "layer", ["dropout", "drop path", *(pytest.param(n, marks=pytest.mark.long) for n in LAYERS)]
)
def test_an_encoder_that_draws_at_random_is_refused(layer):
    from timm.layers import DropPath, PatchDropout
    from torchvision.ops import StochasticDepth

    encoder, _ = encoder_and_head("vit", torch.float32)
    in_pieces(encoder, 4)
    for arch in ("vit_small", "vit_small_mocov3", "vit_base", "resnet18", "tiny"):
        in_pieces(build_encoder(arch, 32) if arch != "vit_base" else encoder, 4)  # not one of ours
    encoder.blocks[1].drop_path1 = {
        "dropout": nn.Dropout(0.1),
        "drop path": DropPath(0.1),
        "depth": StochasticDepth(0.1, "row"),
        "patches": PatchDropout(0.1),
        "attention": nn.MultiheadAttention(8, 2, dropout=0.1),
    }[layer]
    Pieces(encoder)  # whole, it may
    with pytest.raises(ValueError, match=r"blocks.1.drop_path1 \(\w+\) draws at random"):
        in_pieces(encoder, 4)


# -- recipes --------------------------------------------------------------------------------------


def train(recipe, folder, flags, monkeypatch, steps=3):
    """Returns the metrics of a short run of a recipe, in this process."""
    main = importlib.import_module(f"recipes.{recipe}").main
    monkeypatch.setattr(Run, "finish", lambda *a, **k: None)  # no export of the tiny ViT
    arguments = [*small(recipe), "--workers", "0", "--max-steps", str(steps)]
    main([*arguments, "--precision", "fp64", *flags, "--output", str(folder)])
    return [r for r in metrics.read(folder / "metrics.jsonl") if r["kind"] == "step"]


def assert_same_numbers(runs, tolerance=1e-9):
    drop = ("kind", "images_per_second", "data_wait", "memory_gb")
    one, two = ([{n: v for n, v in r.items() if n not in drop} for r in run] for run in runs)
    assert len(one) == len(two) > 0
    for a, b in zip(one, two, strict=True):
        assert a.keys() == b.keys()
        for name, value in a.items():
            np.testing.assert_allclose(b[name], value, rtol=tolerance, atol=1e-12, err_msg=name)


@pytest.mark.long
@pytest.mark.parametrize("method", BY_FAMILY)
def test_a_recipe_with_a_vit_gives_the_same_run_in_pieces(method, tmp_path, monkeypatch):
    recipe, flags = METHODS[method]
    monkeypatch.setattr(f"recipes.{recipe}.build_encoder", tiny_vit)
    whole = train(recipe, tmp_path / "whole", flags, monkeypatch)
    flags = [*flags, "--micro-batch", "6"]
    pieces = train(recipe, tmp_path / "pieces", flags, monkeypatch)
    assert_same_numbers([whole, pieces])
    assert len({r["loss"] for r in whole}) == 3  # it trains


@pytest.mark.long
def test_multi_crop_in_one_piece_is_the_run_without(tmp_path, monkeypatch):
    """One piece of a CNN has the whole batch's statistics, of the small crops too."""
    crops = ["--multi-crop", "--small-crops", "3"]
    whole = train("nnclr", tmp_path / "whole", crops, monkeypatch, 2)
    pieces = train("nnclr", tmp_path / "pieces", [*crops, "--micro-batch", "36"], monkeypatch, 2)
    assert_same_numbers([whole, pieces])


def first_gradients_and_steps(folder, ranks, script, *flags):
    """Returns rank 0's first gradients, after the mean over ranks, and the steps' metrics."""
    folder.mkdir()
    run_ranks(ranks, script, folder, *flags, "--output", folder / "run")
    seen = torch.load(folder / "rank0.pt", weights_only=False)
    records = metrics.read(folder / "run" / "metrics.jsonl")
    return seen["gradients"], [r for r in records if r["kind"] == "step"]


def assert_same_training(one, two):
    names = ("step", "loss", "grad_norm")  # a monitor is the mean of each rank's own
    assert_same_numbers([[{n: r[n] for n in names} for r in x[1]] for x in (one, two)], 1e-8)
    assert one[0].keys() == two[0].keys()
    for name, gradient in one[0].items():
        bound = 1e-9 * gradient.abs().max().item() + 1e-14
        torch.testing.assert_close(two[0][name], gradient, rtol=0, atol=bound, msg=name)


@pytest.mark.long
def test_two_ranks_in_pieces_are_one_process_in_pieces(tmp_path):
    """Batch norms change nothing: a piece has the same images however many ranks share it."""
    flags = ["nnclr", *small("nnclr"), "--precision", "fp64", "--max-steps", "2"]
    flags += ["--micro-batch", "12", "--multi-crop", "--small-crops", "2"]
    driver = "tests/rank_driver.py"
    one, two = (first_gradients_and_steps(tmp_path / f"{n}", n, driver, *flags) for n in (1, 2))
    assert_same_training(one, two)


# the tiny ViT is no arch that an export could name
WITH_TINY_VIT = """
import runpy, sys
sys.path[:0] = {paths}
from common import distributed
from common.run.run import Run
from recipes import snclr
from test_micro_batch import tiny_vit
snclr.build_encoder = tiny_vit
Run.finish = lambda *a, **k: distributed.stop()
runpy.run_path({driver!r}, run_name="__main__")
"""


@pytest.mark.long
def test_two_ranks_with_a_vit_in_pieces_are_one_process_whole(tmp_path):
    tests = Path(__file__).parent
    driver = tmp_path / "driver.py"
    paths = [str(tests.parent), str(tests)]
    driver.write_text(WITH_TINY_VIT.format(paths=paths, driver=str(tests / "rank_driver.py")))
    flags = ["snclr", *small("snclr"), "--precision", "fp64", "--max-steps", "3"]
    whole = first_gradients_and_steps(tmp_path / "1", 1, driver, *flags)
    pieces = first_gradients_and_steps(tmp_path / "2", 2, driver, *flags, "--micro-batch", "12")
    assert "encoder.patch_embed.proj.weight" in whole[0]
    assert_same_training(whole, pieces)


# -- mistakes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("batch", "ranks", "micro_batch", "near"),
    [
        (36, 1, 5, "4 or 6"),
        (36, 1, 72, "36"),
        (36, 1, 1, "2"),
        (36, 1, 36, None),
        (36, 2, 9, "6 or 12"),
        (36, 2, 2, "4"),
        (36, 2, 12, None),
        (4096, 8, 512, None),
    ],
)
def test_a_piece_must_divide_the_batch_and_be_shared_by_the_ranks(batch, ranks, micro_batch, near):
    if near is None:
        check_batch(batch, ranks, micro_batch)
        return
    with pytest.raises(UserError, match=f"--micro-batch {micro_batch} .*take {near}$"):
        check_batch(batch, ranks, micro_batch)


@pytest.mark.long
def test_a_wrong_piece_is_one_line(tmp_path):
    flags = [*small("nnsiam"), "--micro-batch", "5", "--output", str(tmp_path / "run")]
    error = only_error(run_script("recipes/nnsiam.py", *flags))
    assert "--micro-batch 5 must cut --batch-size 36" in error and "take 4 or 6" in error
    assert not (tmp_path / "run").exists()
    flags[flags.index("5")] = "-4"
    assert "must not be negative" in only_error(run_script("recipes/nnsiam.py", *flags))


def test_the_piece_is_one_of_the_numbers_of_a_run():
    """A ResNet's run with other pieces is another run."""
    from common.run.flags import changed_fields
    from recipes.nnclr import Config

    saved = dataclasses.asdict(Config())
    changed = dataclasses.replace(Config(), micro_batch=64)
    assert changed_fields(changed, saved) == ["micro_batch was 0, is 64"]
    assert json.dumps(saved)


@pytest.mark.long
def test_a_compiled_encoder_gives_the_same_features_and_gradients(monkeypatch):
    # everything but the generated C++ or Triton, which would cost a minute here
    traced = functools.partialmethod(nn.Module.compile, backend="aot_eager")
    monkeypatch.setattr(nn.Module, "compile", traced)
    views = [torch.randn(4, 3, 32, 32) for _ in range(2)]
    plain, _ = encoder_and_head("vit", torch.float32)
    compiled = copy.deepcopy(plain)
    names = [*compiled.state_dict()]
    torch._dynamo.utils.counters.clear()
    outputs = []
    for encoder, compile_ in ((plain, False), (compiled, True)):
        config = SimpleNamespace(batch_size=4, micro_batch=0, compile=compile_)
        outputs.append(Pieces(encoder, config)(*views))
        sum(f.square().sum() for f in outputs[-1]).backward()
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 1, "nothing was compiled"
    for a, b in zip(*outputs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    for p, q in zip(plain.parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-4)
    assert [*compiled.state_dict()] == names == [*copy.deepcopy(compiled).state_dict()]


@pytest.mark.parametrize("arch", ["tiny", pytest.param("resnet18_cifar", marks=pytest.mark.long)])
def test_views_in_one_forward_keep_their_own_batch_statistics(arch):
    """Two views together are as one forward for each, in value, gradient and running numbers."""
    together = rank_batch_norm(build_encoder(arch, 32).double(), torch.device("cpu"))
    apart = copy.deepcopy(together)
    views = [torch.randn(6, 3, 32, 32).double() * s + s for s in (1.0, 3.0)]
    weights = [torch.randn(6, together.embed_dim).double() for _ in views]
    joint = Pieces(together)(*views)
    single = [apart(x) for x in views]
    for outputs in (joint, single):
        sum((o * w).sum() for o, w in zip(outputs, weights, strict=True)).backward()
    for a, b in zip(joint, single, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for (name, p), q in zip(together.named_parameters(), apart.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-8, atol=1e-8, msg=name)
    for (name, p), q in zip(together.named_buffers(), apart.buffers(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12, msg=name)
    mixed = apart(torch.cat(views)).chunk(2)
    assert (mixed[0] - joint[0]).abs().max() > 0.1, "the views' statistics do not differ: weak test"
