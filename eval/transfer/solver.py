"""l2-regularised logistic regression for a whole path of weight decays, by L-BFGS in float64.

Objective, as in scikit-learn with C = 1/decay: the sum over images of the cross-entropy, plus
(decay/2)·|W|²; the bias is free. Converged means: the norm of the gradient (weights and biases
together) is below 1e-5 of its value at W = 0, and it is this module that checks. On separable
features and small decays that alone leaves the objective loose (its scale is the gradient's at
W = 0, thousands of times larger): from decay 1e-2 on the estimated distance to the minimum,
half of g·H⁻¹·g, must also be below 1e-5 of the objective.

What makes the path cheap, none of which moves its solutions:
- features are centred and rotated onto the eigenvectors of their covariance: an orthogonal change
  of the weights, the bias takes up the mean, and the Hessian is then near to diagonal;
- L-BFGS starts from that diagonal, curvature·eigenvalue + decay, instead of the identity;
- from large decays to small, each start is extrapolated from the last solutions, in log decay;
- the curvature pairs are carried along exactly: another decay adds (change of decay)·s to y;
- logits are linear in the weights, so a line search costs no product with the features: an
  iteration is two products, one for the direction's logits and one for the gradient;
- independent problems (VOC2007's binary classifiers) are columns of one batch: the same two
  products serve them all, each with its own step length.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import UserError

TOLERANCE = 1e-5  # of the gradient's norm at W = 0
DECAYS = tuple(np.logspace(-6, 5, 45))  # GSG App. D.1; ssl-transfer linear.py: logspace(-6, 5, 45)
OBJECTIVE_TOLERANCE, OBJECTIVE_FROM = 1e-5, 1e-2  # of the objective, for decays from 1e-2 on
PAIRS = 30  # curvature pairs kept; of 30 and 100 tried, 100 saves 15 % of steps and costs as much
MOST_ITERATIONS = 2000  # for one decay; a solution that needs more is returned as not converged
MOST_DIMENSIONS = 8192  # of features, because their covariance is decomposed
ARMIJO, WOLFE, LINE_TRIES = 1e-4, 0.9, 50  # Nocedal and Wright, Sec. 3.1, for quasi-Newton steps
# of the objective: near the minimum its decrease drowns in rounding, and the derivative decides
# (the approximate Wolfe conditions of Hager and Zhang 2005)
ROUNDING = 1e-10
BLOCK = 8192  # rows turned to float64 at a time if the whole matrix is not needed


@dataclass
class Fit:
    """A solution: scores are `features @ weight + bias`, weight (D,C), bias (C,), float64."""

    decay: float
    weight: Tensor
    bias: Tensor
    objective: float  # summed over the problems of a batch
    gradient_norm: float  # over its value at W = 0; the worst of a batch
    iterations: int
    converged: bool

    def scores(self, features: Tensor) -> Tensor:
        """Maps features (N,D) of any precision to scores (N,C) float64."""
        blocks = features.split(BLOCK)
        return torch.cat([b.to(self.weight) @ self.weight + self.bias for b in blocks])


def one_hot(targets: Tensor, classes: int) -> Tensor:
    """Turns (N,) labels or (N,C) zeros and ones into (N,C) float64."""
    if targets.ndim == 2:
        return targets.double()
    return F.one_hot(targets.long(), classes).double()


def gradient_norm(
    features: Tensor, targets: Tensor, decay: float, weight: Tensor, bias: Tensor
) -> float:
    """Returns the norm of the gradient over its norm at W = 0, b = 0, from the features as they
    are, float64.

    targets (N,) labels: one multinomial problem; (N,C) zeros and ones: C binary problems, of which
    the worst counts. Used on every solver's result, ours and others'.
    """
    at, zero = [
        raw_gradient(features, targets, decay * scale, weight * scale, bias * scale)
        for scale in (1.0, 0.0)
    ]
    ratio = problem_norms(at, targets.ndim == 2) / problem_norms(zero, targets.ndim == 2)
    return float(ratio.max())


def raw_gradient(
    features: Tensor, targets: Tensor, decay: float, weight: Tensor, bias: Tensor
) -> Tensor:
    """Returns the (D+1,C) gradient of the objective at (weight, bias); the bias is the last row."""
    gradient = torch.zeros(len(weight) + 1, weight.shape[1], dtype=torch.float64)
    gradient = gradient.to(weight.device)
    for x, t in zip(features.split(BLOCK), targets.split(BLOCK), strict=True):
        x, t = x.to(weight), t.to(weight.device)
        logits = x @ weight + bias
        p = logits.sigmoid() if t.ndim == 2 else logits.softmax(1)
        residual = p - one_hot(t, weight.shape[1])
        gradient[:-1] += x.T @ residual
        gradient[-1] += residual.sum(0)
    gradient[:-1] += decay * weight
    return gradient


def problem_norms(gradient: Tensor, binary: bool) -> Tensor:
    """Returns the norm of each problem: (C,) of binary columns, (1,) of a multinomial problem."""
    return gradient.norm(dim=0) if binary else gradient.norm().reshape(1)


class Problem:
    """The objective in rotated coordinates, for one multinomial problem or C binary ones.

    Parameters are (D+1,C) with the bias as last row. A quantity "of each problem" is (C,) for
    binary columns and (1,) for a multinomial problem: both multiply (…,C) by broadcasting.
    """

    def __init__(self, features: Tensor, targets: Tensor, classes: int, device: torch.device):
        n, d = features.shape
        if d > MOST_DIMENSIONS:
            raise UserError(
                f"features of {d} dimensions: --solver torch takes up to {MOST_DIMENSIONS}; use a "
                "smaller --image-size or --solver sklearn"
            )
        self.binary = targets.ndim == 2
        self.targets = targets.to(device)
        self.rows = torch.arange(n, device=device)
        x = features.to(device, torch.float64)
        self.mean = x.mean(0)
        x = x - self.mean
        eigenvalues, self.rotation = torch.linalg.eigh(x.T @ x)
        self.x = torch.empty(n, d + 1, dtype=torch.float64, device=device)
        torch.mm(x, self.rotation, out=self.x[:, :-1])
        self.x[:, -1] = 1
        # of the Hessian's diagonal, without curvature: the bias's is the number of images
        self.scale = torch.cat([eigenvalues.clamp(min=0), eigenvalues.new_tensor([float(n)])])
        self.scale = self.scale[:, None]
        self.penalised = torch.ones_like(self.scale)
        self.penalised[-1] = 0
        self.mean_rotated = (self.mean @ self.rotation)[:, None]
        zero = torch.zeros(d + 1, classes, dtype=torch.float64, device=device)
        _, residual = self.value(self.x @ zero)
        self.zero, self.norm_at_zero = zero, self.raw_norm(self.gradient(residual, zero, 0.0))
        if not bool((self.norm_at_zero > 0).all()):
            raise UserError("the gradient at W = 0 is zero: are all images of one class?")

    def total(self, values: Tensor) -> Tensor:
        """Sums (…,C) for each problem."""
        columns = values.sum(0)
        return columns if self.binary else columns.sum().reshape(1)

    def inner(self, a: Tensor, b: Tensor) -> Tensor:
        """Returns the inner product of each problem."""
        return (a * b).sum(0) if self.binary else torch.dot(a.flatten(), b.flatten()).reshape(1)

    def value(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the cross-entropy of each problem, and the residual p - y (N,C)."""
        if self.binary:
            loss = self.total(F.softplus(logits) - self.targets * logits)
            return loss, logits.sigmoid() - self.targets
        largest = logits.max(1, keepdim=True).values
        p = (logits - largest).exp_()
        total = p.sum(1, keepdim=True)
        # row by row: a fitted image's loss is far smaller than its logits
        beaten = largest[:, 0] - logits[self.rows, self.targets]
        loss = (total[:, 0].log() + beaten).sum().reshape(1)
        p /= total
        p[self.rows, self.targets] -= 1
        return loss, p

    def curvature(self, residual: Tensor) -> Tensor:
        """Returns the mean over images of p·(1 - p), (C,)."""
        p = residual.clone()
        if self.binary:
            p += self.targets
        else:
            p[self.rows, self.targets] += 1
        return (p * (1 - p)).mean(0)

    def gradient(self, residual: Tensor, w: Tensor, decay: float) -> Tensor:
        return self.x.T @ residual + decay * self.penalised * w

    def raw_norm(self, gradient: Tensor) -> Tensor:
        """Returns norms of the gradient for features before centring and rotation."""
        raw = gradient.clone()
        raw[:-1] += self.mean_rotated * gradient[-1]
        return problem_norms(raw, self.binary)

    def unrotated(self, w: Tensor) -> tuple[Tensor, Tensor]:
        """Returns (weight (D,C), bias (C,)) for features before centring and rotation."""
        weight = self.rotation @ w[:-1]
        return weight, w[-1] - self.mean @ weight


@dataclass
class Pair:
    """A curvature pair: step s, change of gradient y, 1/(s·y) of each problem (0: not usable)."""

    s: Tensor
    y: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, problem: Problem, s: Tensor, y: Tensor) -> "Pair":
        product = problem.inner(s, y)
        least = 1e-14 * (problem.inner(s, s) * problem.inner(y, y)).sqrt()  # else it is rounding
        return cls(s, y, torch.where(product > least, 1 / product, torch.zeros_like(product)))


@dataclass
class Point:
    """A point that the iteration has reached: parameters, their logits, objective and gradient."""

    w: Tensor
    logits: Tensor
    objective: Tensor
    residual: Tensor
    gradient: Tensor


def fit_path(
    features: Tensor,
    targets: Tensor,
    classes: int,
    decays: Sequence[float] = DECAYS,
    device: torch.device | str = "cpu",
    tolerance: float = TOLERANCE,
    between: Callable[[], None] = lambda: None,
) -> Iterator[Fit]:
    """Yields solutions for `decays`, from the largest to the smallest.

    features (N,D) of any precision; targets (N,) labels for a multinomial problem, (N,C) zeros and
    ones for C binary ones. `between` is called in every iteration and may raise to stop. UserError
    for features that are not finite.
    """
    if not bool(torch.isfinite(features).all()):
        raise UserError("the features hold values that are not finite: is the backbone whole?")
    problem = Problem(features, targets, classes, torch.device(device))
    w = problem.zero
    logits = problem.x @ w
    pairs: list[Pair] = []
    solved: list[tuple[float, Tensor, Tensor]] = []
    for decay in sorted(decays, reverse=True):
        if solved:
            change = decay - solved[-1][0]
            pairs = [Pair.of(problem, p.s, p.y + change * problem.penalised * p.s) for p in pairs]
        w, logits = extrapolated(problem, decay, solved, w, logits)
        point, iterations, pairs = minimise(problem, decay, w, logits, pairs, tolerance, between)
        w, logits = point.w, point.logits
        solved = [*solved[-2:], (decay, w, logits)]
        norm = float((problem.raw_norm(point.gradient) / problem.norm_at_zero).max())
        weight, bias = problem.unrotated(w)
        objective = float(point.objective.sum())
        yield Fit(float(decay), weight, bias, objective, norm, iterations, norm < tolerance)


def extrapolated(
    problem: Problem,
    decay: float,
    solved: list[tuple[float, Tensor, Tensor]],
    w: Tensor,
    logits: Tensor,
) -> tuple[Tensor, Tensor]:
    """Returns the next start on a path through the last solutions, a polynomial in log decay; for
    each problem only if that is better than the last solution.
    """
    if len(solved) < 2:
        return w, logits
    times, now = [np.log(d) for d, _, _ in solved], np.log(decay)
    weights = [
        np.prod([(now - u) / (t - u) for j, u in enumerate(times) if j != i])
        for i, t in enumerate(times)
    ]
    guess = sum(c * w for c, (_, w, _) in zip(weights, solved, strict=True))
    guess_logits = sum(c * z for c, (_, _, z) in zip(weights, solved, strict=True))
    better = penalised_value(problem, guess, guess_logits, decay)[0]
    better = better < penalised_value(problem, w, logits, decay)[0]
    return torch.where(better, guess, w), torch.where(better, guess_logits, logits)


def penalised_value(
    problem: Problem, w: Tensor, logits: Tensor, decay: float
) -> tuple[Tensor, Tensor]:
    """Returns the objective of each problem, and the residual."""
    loss, residual = problem.value(logits)
    return loss + decay / 2 * problem.total(problem.penalised * w * w), residual


def minimise(
    problem: Problem,
    decay: float,
    w: Tensor,
    logits: Tensor,
    pairs: list[Pair],
    tolerance: float,
    between: Callable[[], None],
) -> tuple[Point, int, list[Pair]]:
    """Finds the minimum for one decay: (point, iterations, curvature pairs)."""
    objective, residual = penalised_value(problem, w, logits, decay)
    point = Point(w, logits, objective, residual, problem.gradient(residual, w, decay))
    curvature = problem.curvature(residual)
    # a class that is fitted to the last digit has no curvature left: its bias keeps a little
    diagonal = problem.scale * curvature.clamp(min=1e-12) + decay * problem.penalised
    for iteration in range(MOST_ITERATIONS):
        open_ = problem.raw_norm(point.gradient) >= tolerance * problem.norm_at_zero
        direction = -inverse_hessian(problem, point.gradient, diagonal, pairs)
        if decay >= OBJECTIVE_FROM * (1 - 1e-9):  # the grid's 1e-2 is not exact
            above = -problem.total(point.gradient * direction) / 2
            open_ |= above > OBJECTIVE_TOLERANCE * point.objective
        if not bool(open_.any()):
            return point, iteration, pairs
        between()
        direction = torch.where(open_, direction, torch.zeros_like(direction))
        moved, found = line_search(problem, decay, point, direction, open_)
        if not bool(found.any()):
            if not pairs:  # even the steepest descent finds nothing lower: rounding is all there is
                return point, iteration, pairs
            pairs = []
            continue
        newest = Pair.of(problem, moved.w - point.w, moved.gradient - point.gradient)
        pairs = [*pairs[1 - PAIRS :], newest]
        point = moved
    return point, MOST_ITERATIONS, pairs


def inverse_hessian(
    problem: Problem, gradient: Tensor, diagonal: Tensor, pairs: list[Pair]
) -> Tensor:
    """Returns L-BFGS's product of the inverse Hessian with the gradient (Nocedal and Wright, Alg.
    7.4). It begins from the diagonal, scaled by the newest pair as their Eq. 7.20 in its metric.
    """
    q, alphas = gradient.clone(), []
    for pair in reversed(pairs):
        alphas.append(pair.inverse * problem.inner(pair.s, q))
        q.addcmul_(pair.y, alphas[-1], value=-1)
    q /= diagonal
    if pairs:
        newest = pairs[-1]
        scale = 1 / (newest.inverse * problem.inner(newest.y, newest.y / diagonal))
        q *= torch.where(newest.inverse > 0, scale, torch.ones_like(scale))
    for pair, alpha in zip(pairs, reversed(alphas), strict=True):
        q.addcmul_(pair.s, alpha - pair.inverse * problem.inner(pair.y, q))
    return q


def line_search(
    problem: Problem, decay: float, at: Point, direction: Tensor, open_: Tensor
) -> tuple[Point, Tensor]:
    """Finds a step of each problem that meets the strong Wolfe conditions: (point, which ones
    moved).

    The derivative along the direction rises with the step (the objective is convex): a secant on
    it, kept within the bracket, gives the next try.
    """
    change = problem.x @ direction
    slope = problem.total(at.gradient * direction)
    part = problem.penalised * direction
    across, along = problem.total(part * at.w), problem.total(part * direction)
    base = problem.total(problem.penalised * at.w * at.w)
    step = torch.ones_like(slope)
    low, high = torch.zeros_like(step), torch.full_like(step, torch.inf)
    slack = ROUNDING * at.objective.abs()
    for _ in range(LINE_TRIES):
        logits = at.logits + step * change
        loss, residual = problem.value(logits)
        objective = loss + decay / 2 * (base + 2 * step * across + step**2 * along)
        derivative = problem.total(residual * change) + decay * (across + step * along)
        descended = objective <= at.objective + ARMIJO * step * slope + slack
        good = descended & (derivative.abs() <= WOLFE * slope.abs())
        if bool((good | ~open_).all()):
            break
        beyond = ~descended | (derivative > 0)
        high, low = torch.where(beyond, step, high), torch.where(beyond, low, step)
        secant = step * slope / (slope - derivative)
        middle = torch.where(high.isinf(), 2 * step, (low + high) / 2)
        inside = (secant > low) & (secant < torch.where(high.isinf(), 4 * step, high))
        step = torch.where(good | ~open_, step, torch.where(inside, secant, middle))
    found = descended & open_
    if not bool((found | ~open_).all()):  # those that found nothing stay where they are
        logits = torch.where(found, logits, at.logits)
        step = torch.where(found, step, torch.zeros_like(step))
        loss, residual = problem.value(logits)
        objective = loss + decay / 2 * (base + 2 * step * across + step**2 * along)
    w = at.w + step * direction
    return Point(w, logits, objective, residual, problem.gradient(residual, w, decay)), found
