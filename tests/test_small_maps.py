"""Convolutions of small maps against nn.Conv2d, and which convolutions they take the place of."""

import copy
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import run_script
from torch import nn

from common import small_maps
from common.backbone import export_backbone, load_backbone
from common.distributed import rank_batch_norm
from common.models import build_encoder
from common.run import Run
from common.small_maps import SmallMapConv2d, convolve_small_map, fits, small_map_convolutions

CPU = torch.device("cpu")
WIDE = 128  # channels from which on convolutions are replaced


def leaf(*shape, **how):
    return torch.randn(shape, dtype=torch.float64).to(**how).requires_grad_()


def both(convolve, x, weight, grad):
    """Output, gradient of the input, gradient of the weight."""
    y = convolve(x, weight)
    return y, *torch.autograd.grad(y, (x, weight), grad)


@pytest.mark.parametrize("kernel", [1, 3, 5])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_it_is_conv2d_with_all_its_gradients(kernel, stride):
    torch.manual_seed(kernel)
    for height, width in itertools.product(range(1, 6), repeat=2):
        x, weight = leaf(3, 4, height, width), leaf(5, 4, kernel, kernel)

        def plain(x, weight):
            return F.conv2d(x, weight, stride=stride, padding=kernel // 2)

        def ours(x, weight):
            return convolve_small_map(x, weight, stride)

        grad = torch.randn_like(plain(x, weight))
        expected, found = both(plain, x, weight, grad), both(ours, x, weight, grad)
        for a, b in zip(found, expected, strict=True):
            assert a.shape == b.shape
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


@pytest.mark.parametrize("inputs", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("weights", [torch.contiguous_format, torch.channels_last])
def test_any_memory_format_gives_the_same(inputs, weights):
    torch.manual_seed(0)
    x = leaf(3, 4, 2, 2, memory_format=inputs)
    weight = nn.Parameter(torch.randn(6, 4, 3, 3).double().to(memory_format=weights))
    y = convolve_small_map(x, weight, 1)
    grad = torch.randn_like(y, memory_format=torch.contiguous_format)
    y.backward(grad)
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert weight.grad.stride() == weight.stride()  # an optimizer reads them side by side
    expected = both(lambda x, w: F.conv2d(x, w, padding=1), x, weight, grad)
    for a, b in zip((y, x.grad, weight.grad), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_no_gradient_is_made_that_is_not_wanted():
    x, weight = leaf(2, 4, 1, 1), leaf(5, 4, 3, 3)
    convolve_small_map(x.detach(), weight, 1).sum().backward()
    assert x.grad is None and weight.grad is not None
    weight.grad = None
    convolve_small_map(x, weight.detach(), 1).sum().backward()
    assert x.grad is not None and weight.grad is None
    with torch.no_grad():
        assert not convolve_small_map(x, weight, 1).requires_grad


@pytest.mark.parametrize(
    ("replaced", "arguments"),
    [
        (True, {"kernel_size": 3, "padding": 1}),
        (True, {"kernel_size": 3, "padding": 1, "stride": 2, "bias": False}),
        (True, {"kernel_size": 1}),
        (True, {"kernel_size": 5, "padding": 2}),
        (False, {"kernel_size": 3}),
        (False, {"kernel_size": 3, "padding": "same"}),
        (False, {"kernel_size": 2, "padding": 1}),
        (False, {"kernel_size": (3, 1), "padding": (1, 0)}),
        (False, {"kernel_size": 3, "padding": 1, "stride": (1, 2)}),
        (False, {"kernel_size": 3, "padding": 1, "dilation": 2}),
        (False, {"kernel_size": 3, "padding": 1, "groups": 2}),
        (False, {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}),
    ],
)
def test_plain_convolutions_are_replaced_and_give_what_they_gave(replaced, arguments):
    torch.manual_seed(0)
    plain = nn.Conv2d(WIDE, WIDE, **arguments).double()
    layer = small_map_convolutions(nn.Sequential(copy.deepcopy(plain)), CPU)[0]
    assert isinstance(layer, SmallMapConv2d) == replaced
    for side in (1, 2, 3, 7) if replaced else (7,):
        x = torch.randn(2, WIDE, side, side).double()
        torch.testing.assert_close(layer(x), plain(x), rtol=1e-12, atol=1e-12)


def test_what_is_no_plain_convolution_or_too_narrow_stays():
    class Own(nn.Conv2d):
        pass

    assert fits(nn.Conv2d(WIDE, WIDE, 3, padding=1))
    assert not fits(Own(WIDE, WIDE, 3, padding=1))
    assert not fits(nn.Conv1d(WIDE, WIDE, 3, padding=1))
    assert not fits(nn.ConvTranspose2d(WIDE, WIDE, 3, padding=1))
    assert not fits(nn.Conv2d(WIDE - 1, WIDE, 3, padding=1))
    assert not fits(nn.Conv2d(WIDE, WIDE - 1, 3, padding=1))
    cnn = nn.Sequential(nn.Conv2d(WIDE, WIDE, 3, padding=1))
    assert type(small_map_convolutions(cnn, torch.device("cuda"))[0]) is nn.Conv2d


@pytest.fixture
def small_outputs(monkeypatch):
    """The shapes (C,H,W) of what is computed as a small map."""
    shapes = []

    def counted(x, weight, stride):
        y = convolve_small_map(x, weight, stride)
        shapes.append((*y.shape[1:],))
        return y

    monkeypatch.setattr(small_maps, "convolve_small_map", counted)
    return shapes


def test_resnet18_at_32_pixels_keeps_its_output_gradients_names_and_draws(small_outputs):
    torch.manual_seed(0)
    plain = rank_batch_norm(build_encoder("resnet18", 32).double(), CPU)
    ours = copy.deepcopy(plain)
    tensors = {name: id(p) for name, p in ours.named_parameters()}
    drawn = torch.get_rng_state()
    ours = small_map_convolutions(ours, CPU)
    assert torch.equal(torch.get_rng_state(), drawn)
    assert {name: id(p) for name, p in ours.named_parameters()} == tensors
    assert [*ours.state_dict()] == [*plain.state_dict()]

    x = torch.randn(6, 3, 32, 32).double()
    y, expected = ours(x), plain(x)
    # layer3: five convolutions to 2x2; layer4: five to one pixel
    assert small_outputs == 5 * [(256, 2, 2)] + 5 * [(512, 1, 1)]
    torch.testing.assert_close(y, expected, rtol=0, atol=1e-10)
    grad = torch.randn_like(y)
    y.backward(grad)
    expected.backward(grad)
    for (name, a), b in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=0, atol=1e-10, msg=name)


def test_a_run_places_them_on_cpu():
    run = SimpleNamespace(device=CPU, dtype=torch.float32)
    placed = Run.place(run, build_encoder("resnet18", 32))
    assert isinstance(placed.layer4[1].conv2, SmallMapConv2d)
    assert type(placed.layer1[0].conv1) is nn.Conv2d  # 64 channels


def test_large_maps_and_autocast_are_left_to_pytorch(small_outputs):
    layer = small_map_convolutions(nn.Conv2d(WIDE, WIDE, 3, padding=1), CPU)
    assert layer(torch.randn(2, WIDE, 3, 2)).shape == (2, WIDE, 3, 2)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, WIDE, 1, 1)).dtype == torch.bfloat16
    assert layer(torch.randn(WIDE, 1, 1)).shape == (WIDE, 1, 1)  # one image without a batch
    assert small_outputs == []
    layer(torch.randn(2, WIDE, 4, 1))
    assert small_outputs == [(WIDE, 4, 1)]


def test_an_exported_backbone_is_torchvisions(tmp_path):
    torch.manual_seed(0)
    encoder = small_map_convolutions(build_encoder("resnet18", 32), CPU)
    export_backbone(tmp_path / "b.safetensors", encoder, "resnet18", 32, {"recipe": "test"})
    loaded, _ = load_backbone(tmp_path / "b.safetensors")  # checks names and features
    assert not any(isinstance(layer, SmallMapConv2d) for layer in loaded.modules())
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded(x), encoder.eval()(x), rtol=1e-4, atol=1e-4)


def test_a_resumed_run_of_small_maps_is_the_whole_run(tmp_path):
    flags = "--dataset photos --arch resnet18 --image-size 32 --batch-size 8 --queue-size 64 "
    flags += "--projector-hidden 16 --predictor-hidden 16 --output-dim 8 --knn-every 0 --workers 0"

    def weights_after(folder, *stops):
        for stop in stops:
            command = [*flags.split(), "--output", str(tmp_path / folder), "--max-steps", stop]
            done = run_script("recipes/nnclr.py", *command)
            assert done.returncode == 0, done.stderr
        return torch.load(tmp_path / folder / "checkpoint.pt")["state"]["model"]

    whole, resumed = weights_after("whole", "3"), weights_after("resumed", "1", "3")
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())
