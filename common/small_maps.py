"""Convolutions of feature maps of a few pixels on CPU, as matrix products.

At 32 pixels torchvision's ResNets have maps of 2x2 in layer3 and of one pixel in layer4. A 3x3
convolution with padding 1 meets mostly padding there: on one pixel 8 of its 9 taps, on 2x2 pixels
20 of 36 pairs of tap and pixel. oneDNN multiplies most of that padding, and repacks
9.4 MB of weights to use 1 MB of them. Here every output pixel takes what lies inside the map, a row
at a time: the row's taps lie side by side in memory with channels last, and so do its pixels, so
that one product sums over pixels and channels, without a copy of weights, maps or gradients.

The terms of each sum are those of `F.conv2d`, but for its products with padding, which are 0:
results differ by rounding only.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# where it wins (benchmarks/small_maps.py): pixels of the output, channels on both sides
LARGEST_OUTPUT = 4
FEWEST_CHANNELS = 128


class Row(NamedTuple):
    """What one output pixel takes from one row of the map."""

    output: int  # the output pixel, counted row by row
    pixels: slice  # input pixels, counted row by row
    tap_row: int  # row of the kernel
    taps: slice  # columns of the kernel, one for each of the pixels


class SmallMapConv2d(nn.Conv2d):
    """nn.Conv2d that makes maps of up to 4 pixels by `convolve_small_map`, others as ever."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.makes_small_maps_of(x):
            return super().forward(x)
        y = convolve_small_map(x, self.weight, self.stride[0])
        return y if self.bias is None else y + self.bias[:, None, None]

    def makes_small_maps_of(self, x: Tensor) -> bool:
        if x.ndim != 4 or x.device.type != "cpu" or x.dtype != self.weight.dtype:
            return False
        # a graph, and autocast's choice of precision, are PyTorch's own convolution's
        if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
            return False
        return math.prod(-(-side // self.stride[0]) for side in x.shape[2:]) <= LARGEST_OUTPUT


def small_map_convolutions(module: nn.Module, device: torch.device) -> nn.Module:
    """The same module, on CPU with its fitting convolutions turned into SmallMapConv2d.

    In place, and the layers stay the objects they are: their parameters, names, state and hooks do
    not change, and nothing is drawn anew.
    """
    if device.type == "cpu":
        for layer in module.modules():
            if fits(layer):
                layer.__class__ = SmallMapConv2d
    return module


def fits(layer: nn.Module) -> bool:
    """Whether it is a plain convolution of an odd square kernel with padding to the same size, one
    stride, one group, no dilation and channels enough.
    """
    if type(layer) is not nn.Conv2d or layer.padding_mode != "zeros":
        return False
    side, (stride, other) = layer.kernel_size[0], layer.stride
    square = layer.kernel_size == (side, side) and side % 2 == 1 and stride == other
    padded = layer.padding == (side // 2, side // 2) and layer.dilation == (1, 1)
    wide = min(layer.in_channels, layer.out_channels) >= FEWEST_CHANNELS
    return square and padded and layer.groups == 1 and wide


def convolve_small_map(x: Tensor, weight: Tensor, stride: int) -> Tensor:
    """F.conv2d(x, weight, stride=stride, padding=k//2) on CPU: x (N,C,H,W), weight (O,C,k,k) of odd
    k -> (N,O,H',W') with channels last. Of any size; slow where maps are large.
    """
    return _SmallMapConvolution.apply(x, weight, stride)


class _SmallMapConvolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, stride: int) -> Tensor:
        x, weight = channels_last(x), channels_last(weight)
        ctx.save_for_backward(x, weight)
        ctx.rows, shape = rows_of(x.shape, weight.shape[2], stride)
        y = zeros_channels_last((x.shape[0], weight.shape[0], *shape), x)
        outputs, inputs = pixels_of(y), pixels_of(x)
        for row in ctx.rows:
            outputs[:, row.output].addmm_(across(inputs, row), taps_of(weight, row).T)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        x, weight = ctx.saved_tensors
        grads, inputs = pixels_of(channels_last(grad)), pixels_of(x)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = zeros_channels_last(x.shape, x)
            for row in ctx.rows:
                into = across(pixels_of(grad_x), row)
                into.addmm_(grads[:, row.output], taps_of(weight, row))
        if ctx.needs_input_grad[1]:
            grad_weight = zeros_channels_last(weight.shape, weight)
            for row in ctx.rows:
                into = taps_of(grad_weight, row)
                into.addmm_(grads[:, row.output].T, across(inputs, row))
        return grad_x, grad_weight, None


def rows_of(shape: torch.Size, kernel: int, stride: int) -> tuple[list[Row], tuple[int, int]]:
    """Everything that the output pixels of maps (N,C,H,W) take, and the output's (H',W')."""
    height, width = shape[2:]
    rows, columns = [*spans(height, kernel, stride)], [*spans(width, kernel, stride)]
    found = [
        Row(
            i * len(columns) + j,
            slice(y * width + left.start, y * width + left.stop),
            first_tap + y - above.start,
            slice(left_tap, left_tap + len(left)),
        )
        for i, (above, first_tap) in enumerate(rows)
        for j, (left, left_tap) in enumerate(columns)
        for y in above
    ]
    return found, (len(rows), len(columns))


def spans(size: int, kernel: int, stride: int) -> Iterator[tuple[range, int]]:
    """For each output of one dimension: the inputs that its kernel covers, and the first tap."""
    for centre in range(0, size, stride):
        first = centre - kernel // 2
        yield range(max(0, first), min(size, first + kernel)), max(0, -first)


# views of the same memory, or an error: what is written through a copy would be lost


def taps_of(weight: Tensor, row: Row) -> Tensor:
    """A row's taps (O,taps*C) of a weight (O,C,k,k) with channels last."""
    return weight.permute(0, 2, 3, 1)[:, row.tap_row, row.taps].view(len(weight), -1)


def across(pixels: Tensor, row: Row) -> Tensor:
    """A row's pixels (N,taps*C) of (N,H*W,C)."""
    return pixels[:, row.pixels].view(len(pixels), -1)


def pixels_of(x: Tensor) -> Tensor:
    """(N,C,H,W) with channels last -> (N,H*W,C)."""
    n, c, h, w = x.shape
    return x.permute(0, 2, 3, 1).view(n, h * w, c)


def channels_last(x: Tensor) -> Tensor:
    """The same values with channels last in memory, a copy only where they are not."""
    return x.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)


def zeros_channels_last(shape: tuple[int, ...], like: Tensor) -> Tensor:
    n, c, h, w = shape
    return like.new_zeros(n, h, w, c).permute(0, 3, 1, 2)
