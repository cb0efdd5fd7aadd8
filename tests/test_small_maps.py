"""The 3x3 convolution over 2x2 maps as one product, against PyTorch's."""

import pytest
import torch
from torch import nn

from common.models import build_encoder
from common.small_maps import SmallMapConv2d


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


def test_the_labs_encoder_computes_what_pytorchs_convolutions_do_and_starts_from_the_same_weights():
    def plain_of(module: SmallMapConv2d) -> nn.Conv2d:
        plain = nn.Conv2d(module.in_channels, module.out_channels, 3, padding=1, bias=False)
        plain.weight = module.weight
        return plain

    torch.manual_seed(0)
    encoder = build_encoder("resnet_lab").double()
    after = torch.rand(1)
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    expected = encoder(x)
    small = [(n, m) for n, m in encoder.named_modules() if isinstance(m, SmallMapConv2d)]
    assert [name for name, _ in small] == ["layer4.0.conv2", "layer4.1.conv1", "layer4.1.conv2"]
    for name, module in small:
        encoder.set_submodule(name, plain_of(module).double())
    torch.testing.assert_close(encoder(x), expected, rtol=1e-12, atol=1e-12)
    # as torchvision's blocks alone leave the generator: seeds keep their meaning
    assert float(after) == pytest.approx(0.25207966566085815)
