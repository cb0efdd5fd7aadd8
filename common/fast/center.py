"""The views of evaluations: the central square of a resized image.

Of an image much longer than wide nearly all that resizing makes is cropped away (a line of 1x4000
pixels becomes 256x1024000): then the square alone is computed, with the same values.
"""

import numpy as np
import torch
import torchvision.transforms.functional as F
from PIL import Image
from torch import Tensor

from common.augment import to_tensor
from common.fast import pixels

LONG = 8  # times the shorter side: from here on most of a resized image is not in its square


def center_view(
    image: Image.Image, size: int, interpolation: str = "bilinear", square: bool = False
) -> Tensor:
    """Makes the view of evaluations: brings the shorter side to size/0.875 (256 for 224) and cuts
    the central square of `size`. `square` resizes both sides so, whatever the aspect (GSG's
    main_knn.py). An image that has just this size is taken as it is.
    """
    if image.size == (size, size):
        return to_tensor(image)
    side = round(size / 0.875)
    if not square:
        return central_square(image, side, size, interpolation)
    image = F.resize(image, [side, side], F.InterpolationMode(interpolation))
    return to_tensor(F.center_crop(image, [size, size]))


def central_square(image: Image.Image, side: int, size: int, interpolation: str) -> Tensor:
    """Returns uint8 (3,size,size): brings the shorter side to `side`, then cuts the middle, as
    torchvision's Resize and CenterCrop do, bit for bit.
    """
    short, long = sorted(image.size)
    if long <= LONG * short:
        image = F.resize(image, side, F.InterpolationMode(interpolation))
        return to_tensor(F.center_crop(image, [size, size]))
    longer = int(side * long / short)  # as torchvision cuts it
    wide, high = (side, longer) if image.height == long else (longer, side)
    left, top = round((wide - size) / 2), round((high - size) / 2)
    words = pixels.four_channels(np.asarray(image)).view(np.uint32)[:, :, 0]
    cubic = interpolation == "bicubic"
    return torch.from_numpy(pixels.window(words, wide, high, left, top, size, cubic))
