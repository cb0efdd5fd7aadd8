"""The views' pixels by compiled kernels: the same values as Pillow, bit for bit, in less time.

`--input exact` (the default) takes this path, `--input reference` Pillow's own (`View.apply`), with
the same draws. Every step rounds to uint8 where Pillow does, so that clipping after each change of
colour is kept. The kernels are compiled once per machine and kept beside this file by numba, if it
can be written.

Images are uint8 (H,W,4): one 32-bit word per pixel, as the JPEG decoder writes it; the fourth byte
is never used. Behind the crop they are planes, uint8 (3,S,S).
"""

import functools
import math
from pathlib import Path

import numpy as np
import simplejpeg
import torch
from numba import float32, float64, int32, njit, uint8, uint32
from torch import Tensor

from common.augment import MEAN, STD, Draw, View
from common.errors import is_first_rank
from common.fast.compiled import KEPT, WHERE, kernel

inlined = njit(inline="always")

HALF = np.int32(1 << 21)  # Pillow's weights have 22 fractional bits
ROWS = 16  # rows that the horizontal pass takes at once: 64 bytes, a cache line
BYTES = 4 * ROWS
ALL = np.int32(255)
SQUARE = np.int32(255 * 255)

# -- decoding -----------------------------------------------------------------------------------


def decode_jpeg(data: bytes, max_pixels: int) -> np.ndarray | None:
    """Decodes a JPEG file to uint8 (H,W,4), the values that Pillow decodes. Returns None for
    whatever Pillow should judge: another format, CMYK, damage, more than `max_pixels`.
    """
    if data[:2] != b"\xff\xd8":
        return None
    try:
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        if height * width > max_pixels or space in ("CMYK", "YCCK"):
            return None
        return simplejpeg.decode_jpeg(data, "RGBX")
    except (ValueError, RuntimeError, KeyError, MemoryError):  # KeyError: a nameless subsampling
        return None


def four_channels(pixels: np.ndarray) -> np.ndarray:
    """Adds a fourth channel: uint8 (H,W,3) -> (H,W,4)."""
    padded = np.empty((*pixels.shape[:2], 4), np.uint8)
    padded[:, :, :3], padded[:, :, 3] = pixels, 255  # as the decoder fills it
    return padded


# -- crop and resize ----------------------------------------------------------------------------


@kernel
def weights(
    length: int, size: int, cubic: bool, first: int, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the first source pixel (number,) and fixed-point weights (number,taps) of Pillow's
    antialiased filters along one side of `length`, resized to `size`, for `number` of its pixels
    from `first` on. taps is a multiple of 4, with zeros at the end.
    """
    scale = length / size
    stretch = max(scale, 1.0)
    support = (2.0 if cubic else 1.0) * stretch
    inverse = 1.0 / stretch
    start, count = np.empty(number, np.int32), np.empty(number, np.int32)
    for x in range(number):
        centre = (first + x + 0.5) * scale
        start[x] = max(int(centre - support + 0.5), 0)
        count[x] = min(int(centre + support + 0.5), length) - start[x]
    fixed = np.zeros((number, (count.max() + 3) // 4 * 4), np.int32)
    values = np.empty(fixed.shape[1])
    for x in range(number):
        centre, total = (first + x + 0.5) * scale, 0.0
        for k in range(count[x]):
            d = abs((k + start[x] - centre + 0.5) * inverse)
            if not cubic:
                values[k] = max(1.0 - d, 0.0)
            elif d < 1:
                values[k] = (1.5 * d - 2.5) * d * d + 1
            else:
                values[k] = (((d - 5) * d + 8) * d - 4) * -0.5 if d < 2 else 0.0
            total += values[k]
        for k in range(count[x]):
            value = values[k] / total * (2 * HALF)
            fixed[x, k] = int(value - 0.5) if value < 0 else int(value + 0.5)
    return start, fixed


@inlined
def clip(value):
    """Turns a fixed-point value into uint8."""
    return uint8(min(max(value >> 22, 0), 255))


@inlined
def add_four(total, a, b, c, d, w):
    """Adds four weighted lines of bytes to int32 totals; one expression, so that it vectorises."""
    w0, w1, w2, w3 = w[0], w[1], w[2], w[3]
    for j in range(total.size):
        total[j] = int32(
            total[j] + int32(a[j]) * w0 + int32(b[j]) * w1 + int32(c[j]) * w2 + int32(d[j]) * w3
        )


@kernel
def horizontal(
    image: np.ndarray, box: tuple[int, int, int, int], start: np.ndarray, w: np.ndarray
) -> np.ndarray:
    """Resizes the box along its rows by their `weights`: words (H,W) -> (height,size).

    16 rows at a time are turned on their side, so that what one output pixel needs is contiguous.
    """
    left, top, width, height = box
    size = start.size
    out = np.empty((height, size), np.uint32)
    block = np.zeros((width + w.shape[1]) * ROWS, np.uint32)  # weights of 0 reach beyond the box
    source = block.view(np.uint8)
    total = np.empty(BYTES, np.int32)
    words = np.empty(ROWS, np.uint32)
    done = words.view(np.uint8)
    for y in range(0, height, ROWS):
        rows = min(ROWS, height - y)
        for r in range(rows):
            line = image[top + y + r, left : left + width]
            for x in range(width):
                block[x * ROWS + r] = line[x]
        for x in range(size):
            total[:] = HALF
            for k in range(0, w.shape[1], 4):
                p = (start[x] + k) * BYTES
                a, b = source[p : p + BYTES], source[p + BYTES : p + 2 * BYTES]
                c, d = source[p + 2 * BYTES : p + 3 * BYTES], source[p + 3 * BYTES : p + 4 * BYTES]
                add_four(total, a, b, c, d, w[x, k : k + 4])
            for j in range(BYTES):
                done[j] = clip(total[j])
            for r in range(rows):
                out[y + r, x] = words[r]
    return out


@kernel
def vertical(
    image: np.ndarray, box: tuple[int, int, int, int], start: np.ndarray, w: np.ndarray
) -> np.ndarray:
    """Resizes the box along its columns: words (H,W) -> (size,width)."""
    left, top, width, height = box
    size = start.size
    out = np.empty((size, width), np.uint32)
    total = np.empty(4 * width, np.int32)
    right, last = left + width, top + height - 1
    for y in range(size):
        total[:] = HALF
        for k in range(0, w.shape[1], 4):
            p = top + start[y] + k  # beyond the last row the weights are 0
            a = image[min(p, last), left:right].view(np.uint8)
            b = image[min(p + 1, last), left:right].view(np.uint8)
            c = image[min(p + 2, last), left:right].view(np.uint8)
            d = image[min(p + 3, last), left:right].view(np.uint8)
            add_four(total, a, b, c, d, w[y, k : k + 4])
        done = out[y].view(np.uint8)
        for j in range(4 * width):
            done[j] = clip(total[j])
    return out


@kernel
def crop(
    image: np.ndarray,
    box: tuple[int, int, int, int],
    size: int,
    cubic: bool,
    flip: bool,
) -> np.ndarray:
    """Cuts out the box (left, top, width, height), resizes it, and flips it left to right if asked.
    Words (H,W) -> planes (3,size,size). Pillow rounds between the passes, and takes the vertical
    one first if the height shrinks by more than twice the pixels that the width does.
    """
    width, height = box[2:]
    column, across = weights(width, size, cubic, 0, size)
    row, down = weights(height, size, cubic, 0, size)
    tall = height > size and height - size > 2 * (width - size)
    return to_planes(both_ways(image, box, tall, column, across, row, down), flip)


@kernel
def window(
    image: np.ndarray, wide: int, high: int, left: int, top: int, size: int, cubic: bool
) -> np.ndarray:
    """Cuts the square at left, top from the image resized to wide x high, and computes no other
    pixel. Words (H,W) -> planes (3,size,size).
    """
    height, width = image.shape
    column, across = weights(width, wide, cubic, left, size)
    row, down = weights(height, high, cubic, top, size)
    x, y = int(column[0]), int(row[0])
    right = min(width, column[size - 1] + across.shape[1])
    bottom = min(height, row[size - 1] + down.shape[1])
    tall = height > high and height - high > 2 * (width - wide)
    box = x, y, right - x, bottom - y
    square = both_ways(image, box, tall, column - x, across, row - y, down)
    return to_planes(square, False)


@kernel
def both_ways(image, box, tall, column, across, row, down):
    """Resizes the box along both sides: words (H,W) -> (size,size)."""
    width, height, size = box[2], box[3], row.size
    if tall:
        narrow = vertical(image, box, row, down)
        return horizontal(narrow, (0, 0, width, size), column, across)
    low = horizontal(image, box, column, across)
    return vertical(low, (0, 0, size, height), row, down)


@kernel
def to_planes(square: np.ndarray, flip: bool) -> np.ndarray:
    """Turns words (S,S) into planes (3,S,S), flipped left to right if asked."""
    size = len(square)
    planes = np.empty((3, size, size), np.uint8)
    for y in range(size):
        line = square[y]
        red, green, blue = planes[0, y], planes[1, y], planes[2, y]
        for x in range(size):
            word = line[size - 1 - x] if flip else line[x]
            red[x], green[x], blue[x] = uint8(word), uint8(word >> 8), uint8(word >> 16)
    return planes


# -- colour -------------------------------------------------------------------------------------


@inlined
def luma(red, green, blue):
    """Returns Pillow's grey value, by weights of 16 fractional bits."""
    return int32(
        int32(int32(red) * 19595 + int32(green) * 38470 + int32(blue) * 7471 + 32768) >> 16
    )


@inlined
def blend(value, base, factor):
    """Returns base + factor * (value - base), clipped and cut to an integer, as Pillow does."""
    mixed = float32(base) + factor * float32(int32(int32(value) - base))
    return uint8(int32(min(max(mixed, float32(0)), float32(255))))


@kernel
def mean_luma(planes: np.ndarray) -> int:
    red, green, blue = planes[0].ravel(), planes[1].ravel(), planes[2].ravel()
    total = 0
    for i in range(red.size):
        total += luma(red[i], green[i], blue[i])
    return int(total / red.size + 0.5)


@kernel
def away_from(planes: np.ndarray, base: int, factor: float) -> None:
    """Changes brightness (base 0) or contrast (base the mean luma), in place."""
    values, base, factor = planes.ravel(), int32(base), float32(factor)
    for i in range(values.size):
        values[i] = blend(values[i], base, factor)


@kernel
def saturate(planes: np.ndarray, factor: float) -> None:
    red, green, blue = planes[0].ravel(), planes[1].ravel(), planes[2].ravel()
    factor = float32(factor)
    for i in range(red.size):
        base = luma(red[i], green[i], blue[i])
        red[i], green[i] = blend(red[i], base, factor), blend(green[i], base, factor)
        blue[i] = blend(blue[i], base, factor)


@kernel
def shift_hue(planes: np.ndarray, shift: int) -> None:
    """Adds `shift` to the hue in Pillow's HSV of 0 to 255, and goes back to RGB, in place.

    It has no branches and 32-bit integers, so that it vectorises. Hue and saturation are cut to
    integers from quotients in single precision, in double precision where Pillow has it. On the way
    back values are rounded: exact quotients give what Pillow rounds to for every colour.
    """
    reds, greens, blues = planes[0].ravel(), planes[1].ravel(), planes[2].ravel()
    shift = int32(shift)
    for i in range(reds.size):
        r, g, b = int32(reds[i]), int32(greens[i]), int32(blues[i])
        high = r if r > g else g
        high = high if high > b else b
        low = r if r < g else g
        low = low if low < b else b
        span = int32(high - low)
        unit = float32(span if span > 0 else int32(1))
        to_r, to_g = float32(int32(high - r)) / unit, float32(int32(high - g)) / unit
        to_b = float32(int32(high - b)) / unit
        hue = float64(float32(4.0 + float64(to_g) - float64(to_r)))
        hue = float64(float32(2.0 + float64(to_r) - float64(to_b))) if g == high else hue
        hue = float64(float32(to_b - to_g)) if r == high else hue
        turn = hue / 6.0 + 1.0
        turn = turn - 1.0 if turn >= 1.0 else turn
        h = int32(float64(float32(turn)) * 255.0)
        h = int32(int32((h if h < ALL else ALL) + shift) & ALL)
        s = int32(float64(float32(span) / float32(high if high > 0 else int32(1))) * 255.0)

        six = int32(h * 6)
        sector = int32(uint32(six) // uint32(255))
        part = int32(six - int32(sector * ALL))  # of the sector, in 255
        p = int32(uint32(int32(int32(2) * high * int32(ALL - s) + ALL)) // uint32(510))
        fall = int32(high * int32(SQUARE - int32(s * part)))
        rise = int32(high * int32(SQUARE - int32(s * int32(ALL - part))))
        q = int32(float64(fall) * (1 / 65025) + 0.5)
        t = int32(float64(rise) * (1 / 65025) + 0.5)
        first, last = sector == 0 or sector == 6, sector == 5
        reds[i] = high if first or last else (q if sector == 1 else (t if sector == 4 else p))
        greens[i] = (
            high if sector == 1 or sector == 2 else (t if first else (q if sector == 3 else p))
        )
        blues[i] = (
            high if sector == 3 or sector == 4 else (t if sector == 2 else (q if last else p))
        )


@kernel
def make_grey(planes: np.ndarray) -> None:
    red, green, blue = planes[0].ravel(), planes[1].ravel(), planes[2].ravel()
    for i in range(red.size):
        value = uint8(luma(red[i], green[i], blue[i]))
        red[i], green[i], blue[i] = value, value, value


@kernel
def solarize(planes: np.ndarray) -> None:
    values = planes.ravel()
    for i in range(values.size):
        values[i] = values[i] if values[i] < 128 else uint8(255 - values[i])


# -- blur ---------------------------------------------------------------------------------------


def box_radius(sigma: float) -> float:
    """Returns the radius of the extended box, three of which stand for a Gaussian (Gwosdek et al.
    2011, Eqs. 7, 11 and 14), in Pillow's single precision.
    """
    one = np.float32
    sigma2 = one(sigma) * one(sigma) / one(3)
    length = one(math.sqrt(12.0 * float(sigma2) + 1.0))
    whole = one(math.floor((float(length) - 1.0) / 2.0))
    part = (2 * whole + 1) * (whole * (whole + 1) - 3 * sigma2)
    part /= 6 * (sigma2 - (whole + 1) * (whole + 1))
    return float(one(whole + part))


def box_weights(radius: float) -> tuple[int, int, int]:
    """Returns the whole radius, the weight of pixels inside and of the two beyond, in 24 bits."""
    whole = int(radius)
    inside = int(np.float32(1 << 24) / (np.float32(radius) * np.float32(2) + np.float32(1)))
    return whole, inside, ((1 << 24) - (2 * whole + 1) * inside) // 2


@inlined
def rounded(mixed):
    """Rounds 24 fractional bits to uint8."""
    return uint8(uint32(mixed + uint32(1 << 23)) >> uint32(24))


@inlined
def copy(source, out):
    """Copies row by row, which becomes memcpy; numba's own assignment goes byte by byte."""
    for y in range(source.shape[0]):
        line, to = source[y], out[y]
        for x in range(line.size):
            to[x] = line[x]


@kernel
def blur(planes: np.ndarray, radius: int, inside: int, beyond: int) -> None:
    """Blurs in place by three boxes along the rows, then three along the columns; repeats edges."""
    inside, beyond = uint32(inside), uint32(beyond)
    height, width = planes.shape[1:]
    reach = max(radius, 1) + 1
    one = np.zeros((height, width + 2 * reach), np.uint8)
    two = np.zeros_like(one)
    other = np.empty((height, width), np.uint8)
    for plane in planes:
        copy(plane, one[:, reach : reach + width])
        blur_rows(one, two, reach, radius, inside, beyond)
        blur_rows(two, one, reach, radius, inside, beyond)
        blur_rows(one, two, reach, radius, inside, beyond)
        copy(two[:, reach : reach + width], plane)
        blur_columns(plane, other, radius, inside, beyond)
        blur_columns(other, plane, radius, inside, beyond)
        blur_columns(plane, other, radius, inside, beyond)
        copy(other, plane)


@kernel
def blur_rows(source, out, reach, radius, inside, beyond):
    """Blurs by one box along the rows of a plane that has `reach` columns to spare on each side.
    All rows are one line: what runs over from row to row falls into these columns, which are
    refilled.
    """
    first, last = reach, source.shape[1] - reach - 1
    for y in range(source.shape[0]):
        source[y, :first] = source[y, first]
        source[y, last + 1 :] = source[y, last]
    line, n = source.ravel(), source.size - 2 * reach
    done = out.ravel()[reach : reach + n]
    if radius < 2:  # as for every sigma up to 2: 5 pixels, in one expression
        middle, outer = (inside, beyond) if radius == 1 else (beyond, uint32(0))
        a, b, c, d, e = line, line[1:], line[2:], line[3:], line[4:]
        for x in range(n):
            far = uint32(uint32(uint32(a[x]) + uint32(e[x])) * outer)
            near = uint32(uint32(uint32(b[x]) + uint32(d[x])) * middle)
            done[x] = rounded(uint32(uint32(uint32(c[x]) * inside) + uint32(near + far)))
        return
    total = np.zeros(n, np.uint32)
    for k in range(1, 2 * radius + 2):
        part = line[k:]
        for x in range(n):
            total[x] = uint32(total[x] + uint32(part[x]))
    left, right = line, line[2 * reach :]
    for x in range(n):
        far = uint32(uint32(uint32(left[x]) + uint32(right[x])) * beyond)
        done[x] = rounded(uint32(uint32(total[x] * inside) + far))


@kernel
def blur_columns(source, out, radius, inside, beyond):
    """Blurs by one box along the columns."""
    last = source.shape[0] - 1
    total = np.zeros(source.shape[1], np.uint32)
    for k in range(-radius - 1, radius):  # start with the box around the row before the first
        line = source[min(max(k, 0), last)]
        for x in range(total.size):
            total[x] = uint32(total[x] + uint32(line[x]))
    for y in range(source.shape[0]):
        leaves, enters = source[max(y - radius - 1, 0)], source[min(y + radius, last)]
        beneath, line = source[min(y + radius + 1, last)], out[y]
        for x in range(total.size):
            total[x] = uint32(uint32(total[x] + uint32(enters[x])) - uint32(leaves[x]))
            far = uint32(uint32(uint32(leaves[x]) + uint32(beneath[x])) * beyond)
            line[x] = rounded(uint32(uint32(total[x] * inside) + far))


# -- a whole view -------------------------------------------------------------------------------


def render(view: View, image: np.ndarray, draw: Draw) -> Tensor:
    """Makes what `View.apply` makes: uint8 (H,W,4) and what was drawn -> uint8 (3,size,size)."""
    # the flip may come first: each later step treats left and right alike
    words, cubic = image.view(np.uint32)[:, :, 0], view.interpolation == "bicubic"
    planes = crop(words, draw.box, view.size, cubic, draw.flip)
    for step in draw.colour_order or ():
        COLOUR_STEPS[step](planes, draw.colour[step])
    if draw.grey:
        make_grey(planes)
    if draw.blur is not None:
        blur(planes, *box_weights(box_radius(draw.blur)))
    if draw.solarize:
        solarize(planes)
    return torch.from_numpy(planes)


COLOUR_STEPS = (
    lambda planes, factor: away_from(planes, 0, factor),
    lambda planes, factor: away_from(planes, mean_luma(planes), factor),
    saturate,
    lambda planes, turns: shift_hue(planes, int(turns * 255) & 255),  # torchvision's, cut to 0
)


# -- the encoder's input -------------------------------------------------------------------------


@kernel
def look_up(planes: np.ndarray, levels: np.ndarray, out: np.ndarray) -> None:
    """Sets out (N,H,W,3) to levels (3,256) at the values of planes, uint8 (N,3,H,W)."""
    for n in range(len(planes)):
        red, green, blue = planes[n]
        for y in range(red.shape[0]):
            for x in range(red.shape[1]):
                out[n, y, x, 0] = levels[0, red[y, x]]
                out[n, y, x, 1] = levels[1, green[y, x]]
                out[n, y, x, 2] = levels[2, blue[y, x]]


def to_input(views: Tensor, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turns uint8 (N,3,H,W) into the encoder's normalised input on `device`, channels last."""
    if views.device.type == device.type == "cpu" and dtype in (torch.float32, torch.float64):
        # three channels innermost are slow in PyTorch's loops: a look-up of the same values
        out = torch.empty((len(views), *views.shape[2:], 3), dtype=dtype)
        look_up(views.contiguous().numpy(), levels(dtype), out.numpy())
        return out.permute(0, 3, 1, 2)
    views = views.to(device, non_blocking=True).to(dtype, memory_format=torch.channels_last)
    mean, std = mean_and_std(device, dtype)
    return views.div_(255).sub_(mean).div_(std)


@functools.cache
def levels(dtype: torch.dtype) -> np.ndarray:
    """Returns (3,256): what each of a channel's 256 values becomes in the encoder's input."""
    mean, std = mean_and_std(torch.device("cpu"), dtype).view(2, 3, 1)
    return torch.arange(256, dtype=dtype).div(255).sub(mean).div(std).numpy()


@functools.cache  # sent to a GPU once: each sending would wait for the step before
def mean_and_std(device: torch.device, dtype: torch.dtype) -> Tensor:
    return torch.tensor((MEAN, STD), device=device, dtype=dtype).view(2, 3, 1, 1)


def has_compiled() -> bool:
    """Tells whether numba's cache knows these kernels; a guess, for the message only."""
    return KEPT and any(Path(blur.stats.cache_path).glob("pixels.blur-*.nbi"))


@functools.cache
def compile_kernels() -> None:
    """Compiles every kernel, or reads what was compiled before, so that workers inherit them."""
    if WHERE and is_first_rank():
        print(f"warning: the kernels of the input {WHERE}", flush=True)
    if not has_compiled() and is_first_rank():
        print("compiling the kernels of the input: about 10 s, once per machine", flush=True)
    image = np.zeros((2, 2), np.uint32)
    planes = crop(image, (0, 0, 2, 2), 2, True, False)
    for step in COLOUR_STEPS:
        step(planes, 0.5)
    make_grey(planes)
    solarize(planes)
    blur(planes, 1, 1, 1)
