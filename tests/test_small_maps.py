"""The 3x3 convolution over 2x2 maps as one product, against PyTorch's."""

import copy

import pytest
import torch
from torch import nn

from common.fast.small_maps import SmallMapConv2d, small_map_convolutions
from common.models import build_encoder


def plain_and_ours(channels: int, width: int) -> tuple[nn.Conv2d, SmallMapConv2d]:
    torch.manual_seed(0)
    plain = nn.Conv2d(channels, width, 3, padding=1, bias=False).double()
    ours = SmallMapConv2d.of(nn.Conv2d(channels, width, 3, padding=1, bias=False)).double()
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("size", [(2, 2), (1, 1), (2, 3), (4, 4)])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_it_is_pytorchs_in_value_and_gradient(size, layout):
    plain, ours = plain_and_ours(5, 7)
    x = torch.randn(3, 5, *size, dtype=torch.float64).to(memory_format=layout)
    weights = torch.randn(3, 7, *size, dtype=torch.float64)
    a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
    (plain(a) * weights).sum().backward()
    (ours(b) * weights).sum().backward()
    torch.testing.assert_close(ours(b), plain(a), rtol=0, atol=1e-14)
    torch.testing.assert_close(b.grad, a.grad, rtol=0, atol=1e-14)
    torch.testing.assert_close(ours.weight.grad, plain.weight.grad, rtol=0, atol=1e-13)


def test_its_output_goes_on_with_channels_last():
    _, ours = plain_and_ours(5, 7)
    y = ours(torch.randn(3, 5, 2, 2, dtype=torch.float64))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_the_labs_encoder_computes_what_it_does_with_pytorchs_convolutions():
    torch.manual_seed(0)
    plain = build_encoder("resnet_lab").double()
    ours = small_map_convolutions(copy.deepcopy(plain), torch.device("cpu"))
    met = []
    for name, module in ours.named_modules():
        if isinstance(module, SmallMapConv2d):
            module.register_forward_hook(lambda m, x, y, name=name: met.append((name, y.shape[2])))
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-12, atol=1e-12)
    small = [name for name, size in met if size == 2]
    assert small == ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]
    ours(x).square().sum().backward()
    plain(x).square().sum().backward()
    for (name, p), q in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-9, atol=1e-12, msg=name)


def test_only_what_it_can_be_is_replaced():
    def conv(*kernel, **options):
        return nn.Conv2d(4, 4, *(kernel or (3,)), **{"padding": 1, "bias": False} | options)

    others = [conv(bias=True), conv(stride=2), conv(padding=0), conv(1, padding=0)]
    others += [conv(dilation=2), conv(groups=2), conv(padding_mode="circular")]
    net = nn.Sequential(conv(), *others)
    weight = net[0].weight
    assert small_map_convolutions(net, torch.device("cuda")) is net
    assert type(net[0]) is nn.Conv2d
    small_map_convolutions(net, torch.device("cpu"))
    assert type(net[0]) is SmallMapConv2d and net[0].weight is weight
    assert {type(other) for other in net[1:]} == {nn.Conv2d}


def test_no_random_number_is_drawn():
    plain = nn.Conv2d(4, 4, 3, padding=1, bias=False)
    before = torch.get_rng_state()
    SmallMapConv2d.of(plain)
    assert torch.equal(torch.get_rng_state(), before)
