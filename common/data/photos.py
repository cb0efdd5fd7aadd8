"""The embedded dataset `photos`: patches of the 18 photographs that ship inside scikit-image.

32x32 patches, labelled by their photograph; training patches from its left three quarters, test
patches from its right quarter. Small, real and always at hand: for demos and tests, and for no
claim about a method.
"""

import functools
from pathlib import Path

import numpy as np
from PIL import Image

PHOTOS = {
    "astronaut": "astronaut.png",
    "brick": "brick.png",
    "camera": "camera.png",
    "chelsea": "chelsea.png",
    "clock_motion": "clock_motion.png",
    "coffee": "coffee.png",
    "coins": "coins.png",
    "grass": "grass.png",
    "gravel": "gravel.png",
    "hubble_deep_field": "hubble_deep_field.jpg",
    "ihc": "ihc.png",
    "moon": "moon.png",
    "motorcycle_left": "motorcycle_left.png",
    "page": "page.png",
    "retina": "retina.jpg",
    "rocket": "rocket.jpg",
    "text": "text.png",
    "cell": "cell.png",
}
PATCHES = {"train": 300, "test": 60}  # per photograph
SIDE = 32
LARGEST = 64  # sides of 32 to 64 pixels, resized to 32
SEED = 18


@functools.cache
def patches(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Cuts uint8 (N,32,32,3) and labels (N,) of `train` (5400) or `test` (1080), always alike."""
    images, labels = [], []
    for label, name in enumerate(PHOTOS):
        photo = read_photo(name)
        border = photo.width * 3 // 4
        left, right = (0, border) if split == "train" else (border, photo.width)
        rng = np.random.default_rng([SEED, label, list(PATCHES).index(split)])
        for _ in range(PATCHES[split]):
            side = int(rng.integers(SIDE, LARGEST + 1))
            x = int(rng.integers(left, right - side + 1))
            y = int(rng.integers(0, photo.height - side + 1))
            patch = photo.crop((x, y, x + side, y + side))
            images.append(np.asarray(patch.resize((SIDE, SIDE), Image.Resampling.BICUBIC)))
            labels.append(label)
    return np.stack(images), np.array(labels)


def read_photo(name: str) -> Image.Image:
    """Reads one photograph as RGB from scikit-image's own files (nothing is downloaded)."""
    import skimage

    path = Path(skimage.__file__).parent / "data" / PHOTOS[name]
    with Image.open(path) as image:
        return image.convert("RGB")
