"""Parts of a training set, the same for every run: a small balanced set, a held-out share."""

from collections.abc import Callable

import numpy as np

from common.data.images import Images, subset
from common.errors import UserError, say_once

SEED = 0  # not the run's: seeds of one experiment see the same images


def split_classes(
    labels: np.ndarray, wanted: Callable[[int], float], seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (the rest, those drawn), both in ascending order. Of each class it draws
    round(wanted(its count)) samples, at least one and never the last.
    """
    rng = np.random.default_rng([seed, 1])
    drawn = []
    classes, counts = np.unique(labels, return_counts=True)
    if alone := int((counts == 1).sum()):
        say_once(
            f"{alone} of {len(classes)} classes have a single image: it stays with the rest, and "
            "none of these classes is among what is drawn (labelled or held out)"
        )
    for label in classes:
        own = np.flatnonzero(labels == label)
        number = min(len(own) - 1, max(1, round(wanted(len(own)))))
        drawn.append(rng.permutation(own)[:number])
    drawn = np.sort(np.concatenate(drawn))
    return np.setdiff1d(np.arange(len(labels)), drawn), drawn


def parts(
    train: Images,
    test: Images | None,
    train_images: int,
    validation_share: float,
    subset_seed: int = 0,
    scored_on: str = "held-out",
) -> tuple[Images, Images | None]:
    """Returns (images to train on, images that k-NN is scored on), as the flags of these names ask;
    0 leaves them as they are. What is held out is never trained on.

    Raises UserError if there are not that many images, or no labels to hold out by.
    """
    if validation_share:
        train, held = held_out_share(train, validation_share)
        test = held if scored_on == "held-out" else test
    if train_images:
        train = subset(train, balanced(train, train_images, subset_seed))
    elif subset_seed:
        raise UserError("--subset-seed chooses the images of --train-images: give that too")
    return train, test


def held_out_share(train: Images, share: float) -> tuple[Images, Images]:
    """Returns (the rest, `share` of each class held out), the same for every run."""
    if train.labels is None:
        raise UserError("--validation-share needs class folders: k-NN needs labels")
    kept, held = split_classes(train.labels, lambda count: share * count, SEED)
    if not len(held):
        raise UserError(
            f"--validation-share {share:g}: every class has one image, so none can be held out",
        )
    return subset(train, kept), subset(train, held)


def balanced(images: Images, number: int, draw: int = 0) -> np.ndarray:
    """Draws `number` of the images, equally many of each class; without labels, any. Different
    values of `draw` have no image in common.
    """
    if number > len(images):
        raise UserError(f"--train-images {number}: there are {len(images)} to choose from")
    rng = np.random.default_rng([SEED, 2])
    if images.labels is None:
        check_draw(draw, len(images) // number)
        return np.sort(rng.permutation(len(images))[draw * number :][:number])
    classes, counts = np.unique(images.labels, return_counts=True)
    if number % len(classes):
        raise UserError(
            f"--train-images {number} is not the same number of each of {len(classes)} classes: "
            f"take {max(number // len(classes), 1) * len(classes)}",
        )
    each = number // len(classes)
    if each > counts.min():
        least = images.classes[classes[counts.argmin()]]
        raise UserError(
            f"--train-images {number} is {each} of each class, but {least} has {counts.min()}: "
            f"take {counts.min() * len(classes)} or fewer",
        )
    check_draw(draw, int(counts.min()) // each)
    own = [rng.permutation(np.flatnonzero(images.labels == c)) for c in classes]
    return np.sort(np.concatenate([order[draw * each :][:each] for order in own]))


def check_draw(draw: int, there_are: int) -> None:
    if draw >= there_are:
        raise UserError(
            f"--subset-seed {draw}: only {there_are} draws of so many images have none in common, "
            f"0 to {there_are - 1}"
        )
