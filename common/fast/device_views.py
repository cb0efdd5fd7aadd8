"""The papers' views in batches on a device: what Pillow does to one image, for many at once.

Workers draw (`View.draw`, the same keyed draws as ever) and at most decode and crop; colours, grey,
blur, solarize and flip run here, with each image's own parameters. Every step rounds and clips to
8 bits where Pillow does, so that the two paths differ by a level here and there
(tests/test_device_views.py), not by a filter. Images that lie in memory are cropped here
too. The arithmetic is float32 on whole numbers up to 255, which it holds exactly.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from common.augment import BLUR, BOX, FLIP, GREY, ORDER, SOLARIZE, View

BLOCK = 2**26  # values held at once: 256 MB in float32, and some four times that in between
BLUR_PASSES = 3  # Pillow's Gaussian is three box filters in each direction
FILTER_SUPPORT = {"bilinear": 1.0, "bicubic": 2.0}


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Moves `x` to a device, to a GPU through pinned memory: of any other, more than 64 KB at once
    may make the host wait for the step before (CUDA's "API synchronization behavior").
    """
    if device.type == "cuda" and x.device.type == "cpu":
        x = x.contiguous().pin_memory()
    return x.to(device, non_blocking=True)


# -- crop ---------------------------------------------------------------------------------------


def crop(images: Tensor, table: Tensor, size: int, interpolation: str) -> Tensor:
    """Crops and resizes: uint8 (N,3,H,W), (N,16) draws on the host -> uint8 (N,3,size,size).

    It is separable, antialiased (the filter grows with the scale) and rounded in between, as is
    Pillow's resize of the cropped image: rows come first, or columns if the height shrinks by more
    than twice the pixels that the width does (`pixels.crop`).
    """
    height, width = images.shape[2:]
    box = to_device(table[:, BOX], images.device)
    across = resize_weights(width, box[:, 0], box[:, 2], size, interpolation)
    down = resize_weights(height, box[:, 1], box[:, 3], size, interpolation)
    rows = to_levels(images.float() @ across.mT[:, None])
    square = to_levels(down[:, None] @ rows)
    shrinks = table[:, BOX][:, 2:] - size  # known on the host, so nothing waits for a GPU
    tall = ((shrinks[:, 1] > 0) & (shrinks[:, 1] > 2 * shrinks[:, 0])).nonzero()[:, 0]
    if len(tall):
        tall = to_device(tall, images.device)
        columns = to_levels(down[tall][:, None] @ images[tall].float())
        square[tall] = to_levels(columns @ across[tall].mT[:, None])
    return square.to(torch.uint8)


def to_levels(x: Tensor) -> Tensor:
    """Rounds to 0 to 255, in place."""
    return x.round_().clamp_(0, 255)


def resize_weights(
    side: int, start: Tensor, length: Tensor, size: int, interpolation: str
) -> Tensor:
    """Returns (N,size,side): pixel i of image n becomes the sum over j of weight[n,i,j] * input j,
    for the crop [start, start + length), by Pillow's triangle or cubic (a = -1/2) filter.
    """
    scale = (length / size)[:, None, None]
    stretch = scale.clamp(min=1.0)
    support = FILTER_SUPPORT[interpolation] * stretch
    centre = (torch.arange(size, device=start.device).double() + 0.5)[:, None] * scale
    place = torch.arange(side, device=start.device).double() - start[:, None, None]
    first = (centre - support + 0.5).clamp(min=0).floor()
    last = torch.minimum((centre + support + 0.5).floor(), length[:, None, None])
    distance = ((place - centre + 0.5) / stretch).abs()
    if interpolation == "bilinear":
        weight = (1 - distance).clamp(min=0)
    else:
        near = (1.5 * distance - 2.5) * distance**2 + 1
        far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
        weight = torch.where(distance < 1, near, torch.where(distance < 2, far, 0.0))
    weight = weight * ((place >= first) & (place < last))
    return (weight / weight.sum(dim=2, keepdim=True)).float()


# -- colour, blur, solarize, flip ---------------------------------------------------------------


def photometric(pixels: Tensor, table: Tensor) -> Tensor:
    """Does all that follows the crop: uint8 (N,3,H,W) on any device, (N,16) draws on the host ->
    uint8 (N,3,H,W). It works in blocks, so that a large batch does not hold several copies in
    float.
    """
    block = max(1, BLOCK // math.prod(pixels.shape[1:]))
    parts = zip(pixels.split(block), table.split(block), strict=True)
    return torch.cat([photometric_block(part, rows) for part, rows in parts])


def photometric_block(pixels: Tensor, table: Tensor) -> Tensor:
    x, device = pixels.float(), pixels.device
    steps, groups = plan(table)
    if not steps:
        return pixels
    sizes = [len(group) for group in groups]
    # one transfer for all row numbers: their lengths are known here, so nothing waits for a GPU
    rows = to_device(torch.cat(groups), device).split(sizes)
    values = to_device(table.float(), device)
    for step, row in zip(steps, rows, strict=True):
        x[row] = step(x[row], values[row])
    return x.to(torch.uint8)


def plan(table: Tensor) -> tuple[list, list[Tensor]]:
    """Returns a batch's steps and the rows that each applies to, in the order of BYOL's code."""
    todo = [
        (COLOUR_STEPS[colour], table[:, ORDER.start + turn] == colour)
        for turn in range(4)
        for colour in range(4)
    ]
    todo += [(grey, table[:, GREY] > 0)]
    # the box filters' widths are whole numbers per step: images of one width share a step
    sigma = table[:, BLUR]
    radius = box_radius(sigma).floor()
    todo += [
        (blur_of_width(int(r)), (sigma > 0) & (radius == r)) for r in radius[sigma > 0].unique()
    ]
    todo += [(solarize, table[:, SOLARIZE] > 0), (flip, table[:, FLIP] > 0)]
    chosen = [(step, mask.nonzero()[:, 0]) for step, mask in todo]
    chosen = [(step, rows) for step, rows in chosen if len(rows)]
    return [step for step, _ in chosen], [rows for _, rows in chosen]


def column(values: Tensor, number: int) -> Tensor:
    return values[:, number, None, None, None]


def blend(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """Returns base + factor * (x - base), clipped, its fraction cut off: Pillow's ImageEnhance."""
    return (base + factor * (x - base)).clamp_(0, 255).floor_()


def luma(x: Tensor) -> Tensor:
    """Turns (N,3,H,W) into (N,1,H,W): ITU-R 601-2 in Pillow's 16-bit integers."""
    r, g, b = x.int().split(1, dim=1)
    return ((19595 * r + 38470 * g + 7471 * b + 0x8000) >> 16).float()


def brightness(x: Tensor, values: Tensor) -> Tensor:
    return blend(torch.zeros((), device=x.device), x, column(values, 8))


def contrast(x: Tensor, values: Tensor) -> Tensor:
    mean = luma(x).double().mean(dim=(1, 2, 3), keepdim=True)
    return blend((mean + 0.5).floor().float(), x, column(values, 9))


def saturation(x: Tensor, values: Tensor) -> Tensor:
    return blend(luma(x), x, column(values, 10))


def hue(x: Tensor, values: Tensor) -> Tensor:
    """Turns the hue by whole levels of 1/255, through Pillow's 8-bit HSV."""
    high, low = x.amax(dim=1), x.amin(dim=1)
    r, g, b = x.unbind(dim=1)
    spread = (high - low).clamp(min=1)
    rc, gc, bc = (high - r) / spread, (high - g) / spread, (high - b) / spread
    turn = torch.where(r == high, bc - gc, torch.where(g == high, 2 + rc - bc, 4 + gc - rc))
    grey_ = high == low
    h = ((turn / 6 + 1) % 1.0 * 255).floor().masked_fill(grey_, 0)
    s = ((high - low) / high.clamp(min=1) * 255).floor()
    h = (h + values[:, 11, None, None]) % 256
    sector = h * 6 / 255
    whole = sector.floor()
    part, s = sector - whole, s / 255
    p = round_half_up(high * (1 - s))
    q = round_half_up(high * (1 - s * part))
    t = round_half_up(high * (1 - s * (1 - part)))
    whole = (whole % 6).long()[:, None]
    # the value of each channel in each of the six sectors of the colour circle
    red = torch.stack([high, q, p, p, t, high], dim=1).gather(1, whole)
    green = torch.stack([t, high, high, q, p, p], dim=1).gather(1, whole)
    blue = torch.stack([p, p, t, high, high, q], dim=1).gather(1, whole)
    return torch.cat([red, green, blue], dim=1)


def round_half_up(x: Tensor) -> Tensor:
    return (x + 0.5).floor()


COLOUR_STEPS = (brightness, contrast, saturation, hue)


def grey(x: Tensor, values: Tensor) -> Tensor:
    return luma(x).expand_as(x)


def box_radius(sigma: Tensor) -> Tensor:
    """Returns the radius of the box filters, (N,) and fractional, that Pillow takes for a Gaussian
    of `sigma`: three of them have the variance sigma**2 (Gwosdek et al., the extended box filter).
    """
    variance = sigma.double() ** 2 / BLUR_PASSES
    whole = ((torch.sqrt(12 * variance + 1) - 1) / 2).floor()
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * variance)
    return whole + part / (6 * (variance - (whole + 1) ** 2))


def blur_of_width(radius: int):
    """Returns a blur with boxes of 2 * radius + 1 whole pixels and a part of one on either side."""

    def blur(x: Tensor, values: Tensor) -> Tensor:
        full = 1 / (2 * box_radius(values[:, BLUR]) + 1)
        edge = (1 - (2 * radius + 1) * full) / 2
        full, edge = (v.float()[:, None, None, None] for v in (full, edge))
        for _ in range(2):  # rows, then columns
            for _ in range(BLUR_PASSES):
                x = box_filter(x, radius, full, edge)
            x = x.mT
        return x

    return blur


def box_filter(x: Tensor, radius: int, full: Tensor, edge: Tensor) -> Tensor:
    """Applies one box along the last axis, rounds to whole levels, and repeats border pixels."""
    width, reach = x.shape[3], radius + 1
    padded = F.pad(x, (reach, reach, 0, 0), mode="replicate")
    # sums of whole levels, exact in any order: one pass over memory instead of one per pixel
    total = F.avg_pool2d(padded, (1, 2 * radius + 1), stride=1, divisor_override=1)[..., 1:-1]
    ends = padded[..., :width] + padded[..., 2 * reach :]
    return round_half_up(total * full + ends * edge)


def solarize(x: Tensor, values: Tensor) -> Tensor:
    return torch.where(x < 128, x, 255 - x)  # 0.5, BYOL App. B


def flip(x: Tensor, values: Tensor) -> Tensor:
    return x.flip(3)


class DeviceViews:
    """Finishes on a device what a loader of `common.data.loaders.view_loader` began.

    Images in memory, whose `pixels` are uint8 (N,H,W,3), go to the device whole, once, and the
    loader draws only ("draws"); of image files the loader decodes and crops ("crops").
    """

    def __init__(self, images: Any, views: Sequence[View], device: torch.device):
        self.views, self.device = views, device
        pixels = getattr(images, "pixels", None)
        self.stage = "crops" if pixels is None else "draws"
        if pixels is not None:
            pixels = torch.from_numpy(pixels).to(device)
            self.pixels = pixels.permute(0, 3, 1, 2).contiguous()

    def __call__(self, loaded: list[tuple[Tensor, Tensor]], samples: Tensor) -> list[Tensor]:
        """Turns (crops, draws) of each view, as loaded, into uint8 (N,3,size,size) each."""
        if self.stage == "draws":
            images = self.pixels[to_device(samples, self.device)]
        finished = []
        for view, (crops, table) in zip(self.views, loaded, strict=True):
            if self.stage == "draws":
                crops = crop(images, table, view.size, view.interpolation)
            finished.append(photometric(to_device(crops, self.device), table))
        return finished
