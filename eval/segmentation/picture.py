"""GSG's Fig. 2: image, truth and prediction of the first ten validation images."""

from pathlib import Path

import numpy as np
from PIL import Image

from common.run.pictures import headless_pyplot, save

SHOWN = 10
HEADS = ("image", "truth", "prediction")


def palette(classes: int) -> np.ndarray:
    """Returns (classes + 1, 3) uint8: black for no label, then one fixed colour per class."""
    rng = np.random.default_rng(150)
    return np.concatenate([np.zeros((1, 3)), rng.integers(40, 256, (classes, 3))]).astype(np.uint8)


def draw(
    path: Path,
    rows: list[tuple[Image.Image, np.ndarray, np.ndarray]],
    classes: int,
    title: str,
) -> None:
    """Draws a row for each (image, truth (H,W), prediction (H,W)); labels from 0, -1 for none."""
    plt, colours = headless_pyplot(), palette(classes)
    figure, axes = plt.subplots(len(rows), 3, figsize=(8, 2.1 * len(rows)), squeeze=False)
    for axis_row, (image, truth, prediction) in zip(axes, rows, strict=True):
        pictures = (np.asarray(image), colours[truth + 1], colours[prediction + 1])
        for axis, pixels in zip(axis_row, pictures, strict=True):
            axis.imshow(pixels, interpolation="nearest")
            axis.axis("off")
    for axis, text in zip(axes[0], HEADS, strict=True):
        axis.set_title(text, fontsize=10)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout(rect=(0, 0, 1, 0.99))
    save(figure, path, plt)
