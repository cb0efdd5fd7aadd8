"""The 12 datasets' metrics, in percent: top-1, mean per-class, and VOC2007's 11-point mAP."""

import warnings

import numpy as np

RECALLS = 11  # VOC2007 devkit: recall 0, 0.1, …, 1
GSG_TEN = ("cifar10", "aircraft", "caltech101", "cars", "dtd", "flowers", "food101", "pets")
GSG_TEN = (*GSG_TEN, "sun397", "voc2007")  # the transfer table of GSG's main paper


def top1(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns percent of rows whose largest score is their label's; scores (N,C), labels (N,)."""
    return 100 * float(np.mean(scores.argmax(1) == labels))


def mean_per_class(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns percent right of each class, averaged over the classes that occur in `labels`."""
    from sklearn.metrics import balanced_accuracy_score  # here: its import takes seconds

    with warnings.catch_warnings():
        # a class may be predicted that has no image here: it counts as wrong, and is not averaged
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        return 100 * float(balanced_accuracy_score(labels, scores.argmax(1)))


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Returns the 11-point interpolated average precision of one class, in [0,1]: VOC2007 devkit,
    VOCevalcls.

    It is the mean over recalls 0, 0.1, …, 1 of the best precision at that recall or above (0 if it
    is not reached). scores (N,), positive (N,) of zeros and ones; equal scores stay in the order of
    the list, as in the devkit. Without any positive there is no precision: nan.
    """
    if not positive.any():
        return float("nan")
    ranked = positive[np.argsort(-scores, kind="stable")].astype(np.int64)
    hits = ranked.cumsum()
    precision = hits / np.arange(1, len(ranked) + 1)
    total, points = int(hits[-1]), []
    for tenth in range(RECALLS):
        # in whole numbers: 0.3 of 10 positives is the third, whatever 0.1 + 0.2 is in binary
        reached = (RECALLS - 1) * hits >= tenth * total
        points.append(precision[reached].max() if reached.any() else 0.0)
    return float(np.mean(points))


def mean_average_precision(scores: np.ndarray, labels: np.ndarray) -> float:
    """Returns the mean over classes of `average_precision`, in percent; scores, labels (N,C).

    labels are 1 for a class that is there and 0 otherwise. "Difficult" objects count as not there,
    as in ssl-transfer (target == 1); the devkit leaves such images out of that class.
    """
    each = [average_precision(scores[:, c], labels[:, c]) for c in range(labels.shape[1])]
    return 100 * float(np.nanmean(each))


METRICS = {"top1": top1, "mean per-class": mean_per_class, "11pt mAP": mean_average_precision}


def averages(values: dict[str, float], every: tuple[str, ...]) -> dict[str, float]:
    """Returns means over the 12 datasets, over 11 (without Birdsnap) and over GSG's 10, of those
    groups that are whole; `values` by dataset, in percent.
    """
    groups = {
        "average of 12": every,
        "average of 11": tuple(key for key in every if key != "birdsnap"),
        "average of 10": GSG_TEN,
    }
    return {
        name: float(np.mean([values[key] for key in keys]))
        for name, keys in groups.items()
        if all(key in values for key in keys)
    }
