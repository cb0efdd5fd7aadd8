"""ADE20K's scene parsing set (ADEChallengeData2016): 150 classes, label 0 is unlabelled."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from common.augment import MEAN, STD, to_tensor, view_rng
from common.config import MAX_PIXELS
from common.data.images import UNREADABLE, open_image, said
from common.data.loaders import epoch_order
from common.errors import UserError, say_once
from common.run import documents
from eval.dense import check_each, load_image, or_error

FOLDER = "ADEChallengeData2016"
CLASSES = 150
IMAGES = {"training": 20_210, "validation": 2_000}
IGNORED = -1  # of a label: unlabelled pixels and padding
# ssl-transfer semantic-segmentation/selfsupconfig: DATASET.padding_constant, segm_downsampling_rate
PADDING, LABEL_STRIDE = 32, 4


@dataclass
class Scenes:
    """Images and label maps of one part."""

    name: str
    images: list[Path]
    labels: list[Path]
    max_pixels: int = MAX_PIXELS

    def __len__(self) -> int:
        return len(self.images)

    def fingerprint(self) -> str:
        """Returns a hash of file names and sizes of the label maps."""
        text = "\n".join(f"{path.name} {path.stat().st_size}" for path in self.labels)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    def load(self, number: int) -> tuple[Image.Image, Image.Image]:
        """Returns (RGB image, its labels 0 to 150 as an L image); UserError names a bad file."""
        # not upright: label maps lie as the pixels in the file do
        image = load_image(self.images[number], upright=False, max_pixels=self.max_pixels)
        path = self.labels[number]
        try:
            labels = open_image(path, self.max_pixels)
            labels.load()
        except UNREADABLE as error:
            raise UserError(f"{path} cannot be read ({said(error, path)})") from None
        if text := disagreement(path, labels, image):
            raise UserError(text)
        if (largest := labels.getextrema()[1]) > CLASSES:
            raise UserError(f"{path} has label {largest}: ADE20K's are 0 to {CLASSES}")
        return image, labels

    def check(self) -> None:
        """Raises UserError if an image and its labels do not fit, judged by their headers."""
        what = f"pairs of {self.name} are not image and labels"
        check_each([*zip(self.images, self.labels, strict=True)], self.problem, what)

    def problem(self, pair: tuple[Path, Path]) -> str | None:
        sizes = []
        for path in pair:
            try:
                with open_image(path, self.max_pixels) as file:
                    sizes.append(file)
            except UNREADABLE as error:
                return f"{path} cannot be read ({said(error, path)})"
        return disagreement(pair[1], sizes[1], sizes[0])


def disagreement(path: Path, labels: Image.Image, image: Image.Image) -> str | None:
    if labels.mode in ("L", "P") and labels.size == image.size:
        return None
    return (
        f"{path} is {labels.mode} {labels.size}, its image {image.size}: labels are one byte per "
        "pixel"
    )


def load(data: str, part: str, max_pixels: int = MAX_PIXELS) -> Scenes:
    """Returns one part below --data, the folder itself or the one that holds it; sorted by name."""
    root = documents.expanded(data)
    folders = [f for f in (root, root / FOLDER) if data and (f / "images" / part).is_dir()]
    if not folders:
        raise UserError(
            f"--data {data or 'is missing'}: give {FOLDER} with images/ and annotations/, each "
            "with training/ and validation/",
        )
    images = sorted((folders[0] / "images" / part).glob("*.jpg"))
    labels = [folders[0] / "annotations" / part / f"{path.stem}.png" for path in images]
    missing = [path for path in labels if not path.is_file()]
    if missing or not images:
        what = f"{missing[0]} is missing" if missing else f"{folders[0]}/images/{part} is empty"
        raise UserError(f"{what}: --data wants every .jpg of images/ as a .png of annotations/")
    for kind, taken in (("images", images), ("annotations", labels)):
        names = {path.name for path in taken}
        folder = folders[0] / kind / part
        others = [p.name for p in folder.iterdir() if p.name not in names and p.name[0] != "."]
        if others:
            say_once(f"{folder}: left out are {len(others):,} files (as {min(others)!r})")
    return Scenes("ADE20K", images, labels, max_pixels)


def resized(width: int, height: int, side: int, longest: int) -> tuple[int, int]:
    """Returns (width, height) with the shorter side `side`, or less if the longer would pass
    `longest`; cut to whole pixels, as ssl-transfer's dataset.py.
    """
    scale = min(side / min(width, height), longest / max(width, height))
    return max(1, int(width * scale)), max(1, int(height * scale))


def up_to_multiple(size: int, of: int) -> int:
    return -(-size // of) * of


def normalised(image: Image.Image) -> Tensor:
    """Returns (3,H,W) float32 with ImageNet's mean and std."""
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    return (to_tensor(image).float() / 255 - mean) / std


class TrainingBatches(torch.utils.data.Dataset):
    """Maps an iteration to (images (N,3,H,W), labels (N,H/4,W/4) int64) of this rank, or to an
    error's text.

    It does as ssl-transfer's mit_semseg/dataset.py: one short side for the batch, drawn from
    `sides`; flips; bilinear images and nearest labels; zero padding to a multiple of 32. There a
    batch holds images of one orientation, here of any (the paper does not say): the smaller ones
    are padded. All draws are keyed by seed, epoch and image or batch.
    """

    def __init__(
        self, scenes: Scenes, batch: int, sides: list[int], longest: int, seed: int, ranks: slice
    ):
        self.scenes, self.batch, self.sides, self.longest = scenes, batch, sides, longest
        self.seed, self.ranks = seed, ranks

    def __getitem__(self, step: int) -> tuple[Tensor, Tensor] | str:
        return or_error(lambda: self.build(step))

    def build(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, place = divmod(step, len(self.scenes) // self.batch)
        order = epoch_order(len(self.scenes), self.seed, epoch)
        numbers = order[place * self.batch : (place + 1) * self.batch]
        side = int(view_rng(self.seed, epoch, place, 1).choice(self.sides))
        pairs = []
        for number in numbers[self.ranks]:
            image, labels = self.scenes.load(int(number))
            if view_rng(self.seed, epoch, int(number), 0).random() < 0.5:
                image, labels = (
                    x.transpose(Image.Transpose.FLIP_LEFT_RIGHT) for x in (image, labels)
                )
            size = resized(*image.size, side, self.longest)
            image = image.resize(size, Image.Resampling.BILINEAR)
            pairs.append((image, labels.resize(size, Image.Resampling.NEAREST)))
        return padded(pairs)


def padded(pairs: list[tuple[Image.Image, Image.Image]]) -> tuple[Tensor, Tensor]:
    """Puts the images of one batch on a common canvas, and takes every fourth of their labels."""
    width = up_to_multiple(max(image.width for image, _ in pairs), PADDING)
    height = up_to_multiple(max(image.height for image, _ in pairs), PADDING)
    x = torch.zeros(len(pairs), 3, height, width)
    y = torch.full((len(pairs), height // LABEL_STRIDE, width // LABEL_STRIDE), IGNORED)
    for row, (image, labels) in enumerate(pairs):
        x[row, :, : image.height, : image.width] = normalised(image)
        canvas = Image.new("L", (width, height), 0)
        canvas.paste(labels, (0, 0))
        small = canvas.resize((y.shape[2], y.shape[1]), Image.Resampling.NEAREST)
        y[row] = torch.from_numpy(np.array(small)).long() - 1
    return x, y


class TestScenes(torch.utils.data.Dataset):
    """Maps a number to (images (1,3,H,W) per test size, labels (H,W) int64), or an error's text."""

    def __init__(self, scenes: Scenes, numbers: list[int], sides: list[int], longest: int):
        self.scenes, self.numbers, self.sides, self.longest = scenes, numbers, sides, longest

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, place: int) -> tuple[list[Tensor], Tensor] | str:
        return or_error(lambda: self.build(self.numbers[place]))

    def build(self, number: int) -> tuple[list[Tensor], Tensor]:
        image, labels = self.scenes.load(number)
        views = []
        for side in self.sides:
            size = [up_to_multiple(n, PADDING) for n in resized(*image.size, side, self.longest)]
            views.append(normalised(image.resize(size, Image.Resampling.BILINEAR))[None])
        return views, torch.from_numpy(np.array(labels)).long() - 1


class Confusion:
    """Counts of (truth, prediction) over pixels with a label, and the three scores they give."""

    def __init__(self, classes: int, device: torch.device):
        self.classes = classes
        self.counts = torch.zeros(classes, classes, dtype=torch.int64, device=device)

    def add(self, truth: Tensor, prediction: Tensor) -> None:
        """Counts two label maps of one shape; a pixel below 0 in `truth` does not count."""
        counted = truth >= 0
        flat = truth[counted] * self.classes + prediction[counted]
        self.counts += torch.bincount(flat, minlength=self.classes**2).view_as(self.counts)

    def scores(self) -> dict[str, float]:
        """Returns mIoU, mean accuracy and pixel accuracy in percent. Classes that are in neither
        truth nor prediction have no IoU, and those not in the truth no accuracy.
        """
        counts = self.counts.double()
        right, truth, said = counts.diag(), counts.sum(1), counts.sum(0)
        union, seen = truth + said - right, truth > 0
        return {
            "mIoU": 100 * (right / union)[union > 0].mean().item(),
            "mean accuracy": 100 * (right / truth)[seen].mean().item(),
            "pixel accuracy": 100 * (right.sum() / truth.sum()).item(),
        }


def upsampled(scores: Tensor, size: tuple[int, int]) -> Tensor:
    """Turns scores (1,C,h,w) into class probabilities (1,C,H,W) at the labels' size."""
    return F.interpolate(scores, size=size, mode="bilinear", align_corners=False).softmax(1)
