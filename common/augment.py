"""The papers' views.

A view is drawn first (`View.draw`, from a generator keyed by seed, epoch, sample and view) and
applied after (`View.apply`), so that the number of workers, of ranks and a restart change nothing,
and so that a faster path can use the same draws: `render` of fast/pixels.py.
`View.apply` goes through Pillow, as the released code of SimSiam, MoCo-v3 and SNCLR does. Both give
the same uint8.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image, ImageFilter, ImageOps
from torch import Tensor

from common.errors import UserError

# The mean and standard deviation of ImageNet, in [0, 1]; GSG App. B.2 uses them on CIFAR-10 too.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

RESAMPLE = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


# the columns of a table of draws: box, order of the colour steps (-1: none), factors, the rest
BOX, ORDER, COLOUR = slice(0, 4), slice(4, 8), slice(8, 12)
GREY, BLUR, SOLARIZE, FLIP = 12, 13, 14, 15
COLUMNS = 16


@dataclass(frozen=True)
class Draw:
    """What was drawn for one view; None means that the transform is not applied."""

    box: tuple[int, int, int, int]  # left, top, width, height of the crop, in pixels
    colour_order: tuple[int, ...] | None  # 0 brightness, 1 contrast, 2 saturation, 3 hue
    colour: tuple[float, float, float, float]  # factors, and the shift of the hue in turns
    grey: bool
    blur: float | None  # standard deviation in pixels
    solarize: bool
    flip: bool


@dataclass(frozen=True)
class View:
    """One random view of an image, with the numbers of a paper's table.

    `size` is in pixels, `scale` the range of the crop's share of the area, `jitter` the strengths
    of brightness, contrast, saturation and hue, each `…_p` the probability of its transform.
    """

    size: int
    scale: tuple[float, float]
    jitter: tuple[float, float, float, float]
    jitter_p: float = 0.8
    grey_p: float = 0.2
    blur_p: float = 0.0
    solarize_p: float = 0.0
    flip_p: float = 0.5
    interpolation: str = "bicubic"
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # aspect of the crop, width over height
    blur_sigma: tuple[float, float] = (0.1, 2.0)

    def draw(self, rng: np.random.Generator, width: int, height: int) -> Draw:
        """Draws all parameters for an image of width x height pixels."""
        box = draw_crop(rng, width, height, self.scale, self.ratio)
        order = tuple(map(int, rng.permutation(4))) if rng.random() < self.jitter_p else None
        brightness, contrast, saturation, hue = self.jitter
        colour = (
            rng.uniform(max(0.0, 1 - brightness), 1 + brightness),
            rng.uniform(max(0.0, 1 - contrast), 1 + contrast),
            rng.uniform(max(0.0, 1 - saturation), 1 + saturation),
            rng.uniform(-hue, hue),
        )
        grey = rng.random() < self.grey_p
        sigma = rng.uniform(*self.blur_sigma)
        blur = sigma if rng.random() < self.blur_p else None
        solarize = rng.random() < self.solarize_p
        return Draw(box, order, colour, grey, blur, solarize, flip=rng.random() < self.flip_p)

    def apply(self, image: Image.Image, draw: Draw) -> Tensor:
        """Makes uint8 (3,size,size) of an RGB image, in the order of BYOL's and MoCo-v3's code."""
        left, top, width, height = draw.box
        image = image.crop((left, top, left + width, top + height))
        image = image.resize((self.size, self.size), RESAMPLE[self.interpolation])
        for step in draw.colour_order or ():
            image = COLOUR_STEPS[step](image, draw.colour[step])
        if draw.grey:
            image = F.rgb_to_grayscale(image, num_output_channels=3)
        if draw.blur is not None:
            image = image.filter(ImageFilter.GaussianBlur(draw.blur))
        if draw.solarize:
            image = ImageOps.solarize(image, threshold=128)  # 0.5, BYOL App. B
        if draw.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return to_tensor(image)

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Tensor:
        return self.apply(image, self.draw(rng, *image.size))


def crop_only(draw: Draw) -> Draw:
    """Returns the draw of the same crop, with nothing after it."""
    return Draw(draw.box, None, draw.colour, grey=False, blur=None, solarize=False, flip=False)


def draw_row(draw: Draw) -> np.ndarray:
    """Returns a draw as (16,) float64, in the columns above; the hue in Pillow's whole levels."""
    row = np.zeros(COLUMNS)
    row[BOX] = draw.box
    row[ORDER] = -1 if draw.colour_order is None else draw.colour_order
    row[COLOUR] = draw.colour
    row[COLOUR.stop - 1] = int(draw.colour[3] * 255) % 256  # torchvision's adjust_hue
    row[[GREY, SOLARIZE, FLIP]] = draw.grey, draw.solarize, draw.flip
    row[BLUR] = 0.0 if draw.blur is None else draw.blur
    return row


COLOUR_STEPS = (F.adjust_brightness, F.adjust_contrast, F.adjust_saturation, F.adjust_hue)


ViewName = Literal["byol", "vicreg", "simsiam", "simclr", "cifar", "crop-flip", "crop"]
PLAIN = {"jitter": (0.0, 0.0, 0.0, 0.0), "jitter_p": 0.0, "grey_p": 0.0}
# what each name's two views have in common, and what is the first's and the second's own
VIEWS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    # BYOL's T and T' (its App. B and Table 6): asymmetric blur and solarize; also Barlow Twins',
    # the code's of VICReg, and MoCo-v3's with bilinear crops (of 0.2 or more for ResNet-50)
    "byol": ({"jitter": (0.4, 0.4, 0.2, 0.1)}, {"blur_p": 1.0}, {"blur_p": 0.1, "solarize_p": 0.2}),
    # VICReg App. C.1: the same made symmetric
    "vicreg": ({"jitter": (0.4, 0.4, 0.2, 0.1), "blur_p": 0.5, "solarize_p": 0.1}, {}, {}),
    # SimSiam's code; GSG App. B.1 states the same: blur in half of the views
    "simsiam": ({"jitter": (0.4, 0.4, 0.4, 0.1), "blur_p": 0.5}, {}, {}),
    # SimCLR App. A at strength 1, and its code (data_util.py)
    "simclr": ({"jitter": (0.8, 0.8, 0.8, 0.2), "blur_p": 0.5}, {}, {}),
    # GSG App. B.2: no blur; SimCLR App. B.9 states the same: "simclr" at strength 0.5, no blur
    "cifar": ({"jitter": (0.4, 0.4, 0.4, 0.1)}, {}, {}),
    # what classifiers on top train on: torchvision's RandomResizedCrop and RandomHorizontalFlip
    "crop-flip": (PLAIN, {}, {}),
    "crop": (PLAIN | {"flip_p": 0.0}, {}, {}),
}


def two_views(
    name: ViewName,
    size: int,
    crop_min: float = 0.08,
    interpolation: str = "bilinear",
    jitter_strength: float = 1.0,
) -> tuple[View, View]:
    """Returns the two views of this name, of `size` pixels. Crops take `crop_min` or more of the
    area; brightness, contrast, saturation and hue are changed `jitter_strength` times as much.
    Raises UserError for a strength that `check_jitter_strength` refuses.
    """
    check_jitter_strength(name, jitter_strength)
    both, *each = VIEWS[name]
    common = both | {"jitter": tuple(jitter_strength * s for s in both["jitter"])}
    common |= {"size": size, "scale": (crop_min, 1.0), "interpolation": interpolation}
    first, second = (View(**common | own) for own in each)
    return first, second


def check_jitter_strength(name: ViewName, strength: float) -> None:
    """Raises UserError if views without colours are told a strength, or if the hue would turn by
    more than half a turn either way, which gives every hue there is.
    """
    hue = VIEWS[name][0]["jitter"][3]
    if hue == 0 and strength != 1:
        raise UserError(f"--jitter-strength {strength:g}: --views {name} changes no colours")
    if strength * hue > 0.5:
        most = f"at most {0.5 / hue:g} for --views {name}"
        raise UserError(f"--jitter-strength {strength:g}: {most}, which gives any hue")


def small_crops(
    views: Sequence[View], number: int, size: int, scale: tuple[float, float]
) -> list[View]:
    """Returns the small crops of multi-crop: `number` of the same views in turn, of `size` pixels,
    that take a share of the area within `scale`.
    """
    small = [dataclasses.replace(view, size=size, scale=scale) for view in views]
    return [small[i % len(small)] for i in range(number)]


def draw_crop(
    rng: np.random.Generator,
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
) -> tuple[int, int, int, int]:
    """Draws (left, top, width, height) of Inception's crop as torchvision's RandomResizedCrop does:
    ten tries of a random share of the area and log-uniform aspect, else the largest central crop.
    """
    log_ratio = math.log(ratio[0]), math.log(ratio[1])
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        aspect = math.exp(rng.uniform(*log_ratio))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            left, top = rng.integers(0, width - w + 1), rng.integers(0, height - h + 1)
            return int(left), int(top), w, h
    if width / height < ratio[0]:
        w, h = width, round(width / ratio[0])
    elif width / height > ratio[1]:
        w, h = round(height * ratio[1]), height
    else:
        w, h = width, height
    return (width - w) // 2, (height - h) // 2, w, h


def view_rng(seed: int, epoch: int, sample: int, view: int) -> np.random.Generator:
    """Returns the generator of one view: a counter-based stream keyed by all four numbers."""
    return np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, view, sample, 0]))


def to_tensor(image: Image.Image) -> Tensor:
    """Turns an RGB image into uint8 (3,H,W)."""
    return torch.from_numpy(np.array(image).transpose(2, 0, 1).copy())
