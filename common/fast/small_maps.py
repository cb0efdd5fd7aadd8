"""A convolution of 3x3 over maps of 2x2 as one product of matrices, on a CPU.

There every pixel of the output sees every pixel of the input, each through a tap of its own, so the
whole is one linear map of 4 C values to 4 D. PyTorch's CPU kernels multiply by the padding too, and
are slow for the gradient of such weights.
"""

import functools

import torch
from torch import Tensor, nn


def small_map_convolutions(module: nn.Module, device: torch.device) -> nn.Module:
    """Replaces, on a CPU, the convolutions of a module that could meet maps of 2x2 by ours."""
    if device.type == "cuda":
        return module
    for name, child in module.named_children():
        if type(child) is nn.Conv2d and fits(child):
            setattr(module, name, SmallMapConv2d.of(child))
        else:
            small_map_convolutions(child, device)
    return module


def fits(conv: nn.Conv2d) -> bool:
    """Tells whether a convolution is 3x3 with stride 1, padding 1 and nothing else."""
    shape = conv.kernel_size, conv.stride, conv.padding, conv.dilation
    plain = conv.groups == 1 and conv.bias is None and conv.padding_mode == "zeros"
    return plain and shape == ((3, 3), (1, 1), (1, 1), (1, 1))


class SmallMapConv2d(nn.Conv2d):
    """nn.Conv2d with 3x3 weights, stride 1, padding 1 and no bias: (N,C,H,W) -> (N,D,H,W), with the
    same parameter, values and gradients up to rounding. It is PyTorch's if maps are not 2x2.
    """

    @classmethod
    def of(cls, plain: nn.Conv2d) -> "SmallMapConv2d":
        """Returns the same convolution with the same parameter; no random number is drawn."""
        new = cls(plain.in_channels, plain.out_channels, 3, padding=1, bias=False, device="meta")
        new.weight = plain.weight
        return new

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[2:] != (2, 2):
            return super().forward(x)
        taps = self.weight.flatten(2).permute(2, 1, 0)  # (9,C,D)
        # (input 4, output 4, C, D); indexing by [...] has a gradient four times as slow
        dense = taps.index_select(0, taps_between_pixels()).unflatten(0, (4, 4))
        rows = x.permute(0, 2, 3, 1).flatten(1)  # (N, 4 C), pixel by pixel
        y = rows @ dense.transpose(1, 2).reshape(rows.shape[1], -1)
        return y.view(len(x), 2, 2, -1).permute(0, 3, 1, 2)


@functools.cache
def taps_between_pixels() -> Tensor:
    """Returns (16,) taps of a 3x3 kernel, 0 to 8: for each input pixel those through which the four
    output pixels see it.
    """
    place = torch.tensor([(row, column) for row in range(2) for column in range(2)])
    apart = place[:, None] - place[None, :] + 1  # in each direction, 0 to 2
    return (3 * apart[..., 0] + apart[..., 1]).flatten()
