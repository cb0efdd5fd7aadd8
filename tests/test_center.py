"""The views of evaluations: torchvision's Resize and CenterCrop, bit for bit, at any shape."""

import resource

import numpy as np
import pytest
import torchvision.transforms as T
from PIL import Image

from common.augment import to_tensor
from common.data.photos import read_photo
from common.fast import center
from eval.transfer import features

MODES = {"bilinear": T.InterpolationMode.BILINEAR, "bicubic": T.InterpolationMode.BICUBIC}
# width and height: ordinary, long, and a pixel wide
SHAPES = [(40, 30), (30, 41), (7, 7), (1, 1), (224, 224), (500, 333), (37, 38), (600, 40)]
SHAPES += [
    (40, 601),
    (3, 50),
    (50, 3),
    (1, 400),
    (401, 1),
    (2, 333),
    (977, 5),
    (9, 1500),
    (1501, 8),
]
SHAPES += [(300, 2500), (2503, 299), (260, 2600)]  # longer sides that shrink


def noise(width: int, height: int) -> Image.Image:
    rng = np.random.default_rng([width, height])
    return Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8))


def plain(image: Image.Image, side: int, size: int, mode: str):
    return to_tensor(T.Compose([T.Resize(side, MODES[mode]), T.CenterCrop(size)])(image))


@pytest.mark.parametrize("long", [0, center.LONG])  # 0: by the kernels, whatever the shape
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shape", SHAPES)
def test_cropping_first_gives_what_cropping_last_gives(shape, mode, long, monkeypatch):
    monkeypatch.setattr(center, "LONG", long)
    image = noise(*shape)
    for side, size in ((37, 32), (32, 32), (64, 56), (256, 224)):
        if side * max(shape) / min(shape) < 30_000:  # larger images are too much for the plain way
            found = center.central_square(image, side, size, mode)
            assert (found == plain(image, side, size, mode)).all(), (side, size)


def test_the_evaluations_take_it(monkeypatch):
    image = noise(3, 90)
    expected = plain(image, 256, 224, "bilinear"), plain(image, 224, 224, "bicubic")
    monkeypatch.setattr("torchvision.transforms.functional.resize", None)
    assert (center.center_view(image, 224) == expected[0]).all()
    assert (features.view(image, 224) == expected[1]).all()


@pytest.mark.parametrize("shape", [(1, 4000), (4000, 1)])
def test_a_line_of_pixels_takes_no_memory(shape):
    center.center_view(noise(1, 20), 224)  # compiles
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    view = center.center_view(noise(*shape), 224)
    assert view.shape == (3, 224, 224)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB; 800 MB once


@pytest.mark.parametrize(("photo", "size"), [("coffee", 224), ("clock_motion", 224), ("text", 32)])
def test_evaluation_view_is_resize_and_center_crop(photo, size):
    image = read_photo(photo)
    assert image.width != image.height
    shorter = {224: 256, 32: 37}[size]  # the usual 256 for 224, the same ratio for others
    assert (center.center_view(image, size) == plain(image, shorter, size, "bilinear")).all()


def test_evaluation_view_keeps_an_image_of_its_own_size():
    image = noise(96, 96)
    assert (center.center_view(image, 96) == to_tensor(image)).all()
