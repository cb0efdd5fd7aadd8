"""The papers' views at a size, as several tests take them."""

from common.augment import View, two_views


def byol_views(size: int) -> tuple[View, View]:
    return two_views("byol", size, interpolation="bicubic")


def simsiam_view(size: int) -> View:
    return two_views("simsiam", size, 0.2)[0]


def cifar_view(size: int, crop_min: float = 0.08) -> View:
    return two_views("cifar", size, crop_min)[0]


def crop_view(size: int) -> View:
    return two_views("crop-flip", size)[0]
