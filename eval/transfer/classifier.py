"""Choosing a weight decay on the validation set, refitting on both, testing once."""

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from eval.transfer.solver import DECAYS, TOLERANCE, Fit, fit_path, gradient_norm

SKLEARN_ITERATIONS = 100  # scikit-learn's default, which ssl-transfer leaves as it is
Metric = Callable[[np.ndarray, np.ndarray], float]


@dataclass
class Split:
    """Features (N,D) and targets: labels (N,), or (N,C) zeros and ones for binary classifiers."""

    features: Tensor
    targets: Tensor

    def __add__(self, other: "Split") -> "Split":
        return Split(
            torch.cat([self.features, other.features]), torch.cat([self.targets, other.targets])
        )


@dataclass
class Chosen:
    """The chosen weight decay and its result, with everything that was tried."""

    decay: float
    validation: float  # percent
    value: float  # percent, on the test set
    fit: Fit
    tried: list[dict[str, Any]] = field(default_factory=list)  # one for each decay, ascending


class Sklearn:
    """ssl-transfer's setting: LogisticRegression(solver="lbfgs", warm_start=True) and nothing else.

    One classifier goes through all decays (and through VOC's classes in turn). Each fit starts from
    the last one's weights, and stops after 100 iterations or if the largest component of the mean
    gradient is below 1e-4; it does not say which. Features stay float32, as there.
    """

    def __init__(self, classes: int):
        from sklearn.linear_model import LogisticRegression

        self.classes = classes
        self.make = lambda: LogisticRegression(
            solver="lbfgs", warm_start=True, max_iter=SKLEARN_ITERATIONS
        )
        self.regression, self.known = self.make(), None

    def fit(self, train: Split, decay: float) -> Fit:
        """Returns the fit for one decay, with the gradient norm that it reached."""
        x, y = train.features.cpu().numpy(), train.targets.cpu().numpy()
        known = np.unique(y)
        if y.ndim == 1 and len(known) < 3:
            raise UserError("--solver sklearn: the training images are of fewer than 3 classes")
        if self.known is not None and not np.array_equal(known, self.known):
            self.regression = self.make()  # a new class has no weights to start from
        self.known = known
        self.regression.set_params(C=1 / decay)
        weight = torch.zeros(x.shape[1], self.classes, dtype=torch.float64)
        # a class without training images is unknown to scikit-learn: it never wins
        bias = torch.full((self.classes,), -torch.inf, dtype=torch.float64)
        iterations = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # no warnings: every decay's gradient norm says it
            for column in range(self.classes) if y.ndim == 2 else [None]:
                self.regression.fit(x, y if column is None else y[:, column])
                iterations = max(iterations, int(self.regression.n_iter_.max()))
                places = known if column is None else [column]
                weight[:, places] = torch.from_numpy(self.regression.coef_.T.copy()).double()
                bias[places] = torch.from_numpy(self.regression.intercept_.copy()).double()
        seen = torch.isfinite(bias)
        targets = train.targets.cpu()
        if targets.ndim == 1:
            targets = (seen.cumsum(0) - 1)[targets]  # places among the classes that it knows
        features = train.features.cpu()
        norm = gradient_norm(features, targets, decay, weight[:, seen], bias[seen])
        return Fit(decay, weight, bias, float("nan"), norm, iterations, norm < TOLERANCE)


def choose(
    train: Split,
    validation: Split,
    test: Split,
    classes: int,
    metric: Metric,
    solver: str,
    decays: Sequence[float] = DECAYS,
    halved: bool = False,
    device: torch.device | str = "cpu",
    between: Callable[[], None] = lambda: None,
    progress: Callable[[], Any] = lambda: None,
) -> Chosen:
    """Chooses the weight decay that is best on `validation` (the smallest of equals: ssl-transfer
    goes up and wants strictly more), refits it on both sets, and scores it on `test` once.

    `halved` is for binary classifiers with ssl-transfer's decay: its softmax over two classes has
    the minimiser that binary regression has at half the decay.
    """
    check_classes(train)
    share = 0.5 if halved else 1.0
    tried: list[dict[str, Any]] = []
    best: tuple[float, float, Fit] | None = None
    sklearn = Sklearn(classes) if solver == "sklearn" else None
    if sklearn is not None:  # upwards, as ssl-transfer
        fits = (sklearn.fit(train, decay * share) for decay in sorted(decays))
    else:
        scaled = [decay * share for decay in decays]
        data = train.features, train.targets
        fits = fit_path(*data, classes, scaled, device=device, between=between)
    for fit in fits:
        between()
        value = score(fit, validation, metric)
        decay = fit.decay / share
        tried.append(
            {
                "decay": float(f"{decay:.6g}"),
                "validation": round(value, 3),
                "gradient_norm": float(f"{fit.gradient_norm:.6e}"),  # to compare with the tolerance
                "iterations": fit.iterations,
                "converged": fit.converged,
            }
        )
        if best is None or value > best[1] or (value == best[1] and decay < best[0]):
            best = decay, value, fit
        progress()
    tried.sort(key=lambda row: row["decay"])
    decay, value, fit = best
    both = train + validation
    if sklearn is not None:
        fit = sklearn.fit(both, decay * share)
    else:
        # starts again at a large decay: at a small one the training images are fitted so well that
        # their solution has no curvature left to start from
        way = [d * share for d in approach(decay, max(decays))]
        *_, fit = fit_path(both.features, both.targets, classes, way, device, between=between)
        # recomputed from the features as they are: the solver's coordinates are rotated ones
        fit.gradient_norm = gradient_norm(
            both.features.to(device), both.targets.to(device), fit.decay, fit.weight, fit.bias
        )
    return Chosen(decay, value, score(fit, test, metric), fit, tried)


def approach(decay: float, largest: float) -> list[float]:
    """Returns `decay`, and ten times, a hundred times … as much, up to `largest`."""
    found = [decay]
    while found[-1] * 10 <= largest:
        found.append(found[-1] * 10)
    return found


def check_classes(train: Split) -> None:
    """Raises UserError if there is nothing to learn: one class only, or a binary class that is
    always or never there.
    """
    targets = train.targets
    if targets.ndim == 2:
        share = targets.double().mean(0)
        if bool(((share == 0) | (share == 1)).any()):
            number = int(((share == 0) | (share == 1)).nonzero()[0])
            raise UserError(
                f"class {number} is in none or in all of the {len(targets)} training images: a "
                "classifier needs images with it and images without"
            )
    elif len(targets.unique()) < 2:
        raise UserError("the training images are of one class only")


def score(fit: Fit, split: Split, metric: Metric) -> float:
    """Returns the score on a split, in percent."""
    return metric(fit.scores(split.features).cpu().numpy(), split.targets.cpu().numpy())
