"""Logistic regression, metrics and few-shot against definitions in plain loops and float64."""

import math

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from common.errors import UserError
from eval.transfer import few_shot, scores
from eval.transfer.classifier import Sklearn, Split, choose
from eval.transfer.solver import DECAYS, TOLERANCE, Fit, fit_path, gradient_norm


def clouds(images=240, dimensions=9, classes=4, spread=2.0, seed=0) -> Split:
    """Draws classes that overlap, with correlated features, of uneven scale and off the origin."""
    rng = np.random.default_rng(seed)
    labels = np.arange(images) % classes
    means = rng.normal(size=(classes, dimensions))
    x = means[labels] + spread * rng.normal(size=(images, dimensions))
    x = x @ rng.normal(size=(dimensions, dimensions)) * np.logspace(0, -1.5, dimensions) + 3
    return Split(torch.from_numpy(x.astype(np.float32)), torch.from_numpy(labels))


def loops(data: Split, decay: float, weight, bias) -> tuple[float, np.ndarray]:
    """Returns (objective, gradient (D+1,C)) of the multinomial problem, image by image."""
    objective = decay / 2 * sum(float(w) ** 2 for w in weight.flatten())
    gradient = np.zeros((len(weight) + 1, len(bias)))
    gradient[:-1] = decay * weight.numpy()
    for x, label in zip(data.features.double().numpy(), data.targets.tolist(), strict=True):
        logits = [
            sum(x[i] * float(weight[i, c]) for i in range(len(x))) + float(bias[c])
            for c in range(len(bias))
        ]
        total = sum(math.exp(z - max(logits)) for z in logits)
        objective += math.log(total) + max(logits) - logits[label]
        for c, z in enumerate(logits):
            residual = math.exp(z - max(logits)) / total - (c == label)
            gradient[:-1, c] += residual * x
            gradient[-1, c] += residual
    return objective, gradient


def test_the_grid_is_forty_five_values_even_in_log():
    assert len(DECAYS) == 45 and DECAYS[0] == 1e-6 and DECAYS[-1] == pytest.approx(1e5)
    assert np.diff(np.log10(DECAYS)) == pytest.approx([0.25] * 44)


def test_gradient_norm_against_loops_and_differences():
    data = clouds(30, 5, 3)
    rng = np.random.default_rng(1)
    weight, bias = torch.from_numpy(rng.normal(size=(5, 3))), torch.from_numpy(rng.normal(size=3))
    _, at = loops(data, 0.7, weight, bias)
    _, zero = loops(data, 0.7, weight * 0, bias * 0)
    expected = np.linalg.norm(at) / np.linalg.norm(zero)
    assert gradient_norm(data.features, data.targets, 0.7, weight, bias) == pytest.approx(expected)
    step = 1e-6  # the loops' gradient is the objective's: by differences
    for i, c in ((0, 0), (3, 2)):
        moved = [weight.clone(), weight.clone()]
        moved[0][i, c] += step
        moved[1][i, c] -= step
        difference = loops(data, 0.7, moved[0], bias)[0] - loops(data, 0.7, moved[1], bias)[0]
        assert difference / (2 * step) == pytest.approx(at[i, c], rel=1e-5)


def test_every_decay_of_the_path_is_converged_by_the_definition():
    data = clouds(60, 5, 3)
    fits = list(fit_path(data.features, data.targets, 3))
    assert [f.decay for f in fits] == sorted(DECAYS, reverse=True)
    for fit in fits:
        objective, gradient = loops(data, fit.decay, fit.weight, fit.bias)
        _, zero = loops(data, fit.decay, fit.weight * 0, fit.bias * 0)
        assert fit.converged
        assert np.linalg.norm(gradient) < TOLERANCE * np.linalg.norm(zero)
        assert fit.objective == pytest.approx(objective, rel=1e-10)


def sklearn_to_norm(data: Split, decay: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Lowers scikit-learn's tolerance until our gradient norm is reached: weight and bias."""
    tolerance, x, y = 1e-4, data.features.double().numpy(), data.targets.numpy()
    while True:
        found = LogisticRegression(C=1 / decay, tol=tolerance, max_iter=100_000).fit(x, y)
        weight, bias = torch.from_numpy(found.coef_.T.copy()), torch.from_numpy(found.intercept_)
        if gradient_norm(data.features, data.targets, decay, weight, bias) < TOLERANCE:
            return weight, bias
        tolerance /= 4


@pytest.mark.long
def test_both_solvers_agree_at_the_same_gradient_norm():
    data, test = clouds(seed=0), clouds(images=1000, seed=0, spread=2.2)
    worst = 0.0
    for fit in list(fit_path(data.features, data.targets, 4))[::4]:
        weight, bias = sklearn_to_norm(data, fit.decay)
        other = Fit(fit.decay, weight, bias, 0.0, 0.0, 0, True)
        ours, theirs = (f.scores(test.features).argmax(1) for f in (fit, other))
        if fit.decay >= 1e-2:
            objective, _ = loops(data, fit.decay, weight, bias)
            worst = max(worst, abs(fit.objective / objective - 1))
            # of 1000 points up to two lie between the two boundaries, by processor
            assert (ours == theirs).double().mean() >= 0.998
        accuracy = [(p == test.targets).double().mean() for p in (ours, theirs)]
        assert abs(accuracy[0] - accuracy[1]) <= 0.002 + 1e-12
    assert worst < 1e-4


def test_separable_features_are_as_near_to_the_minimum_as_promised():
    """There the gradient alone leaves the objective loose: see solver.py."""
    data = clouds(60, 20, 3, spread=0.1)
    for fit in fit_path(data.features, data.targets, 3, [1.0, 0.1, 0.01]):
        x, y = data.features.double().numpy(), data.targets.numpy()
        best = LogisticRegression(C=1 / fit.decay, tol=1e-12, max_iter=100_000).fit(x, y)
        weight, bias = torch.from_numpy(best.coef_.T.copy()), torch.from_numpy(best.intercept_)
        objective, _ = loops(data, fit.decay, weight, bias)
        assert fit.objective == pytest.approx(objective, rel=1e-4)


def test_a_path_gives_what_each_decay_alone_gives():
    data = clouds(120, 6, 3)
    together = {f.decay: f for f in fit_path(data.features, data.targets, 3, DECAYS[20:32])}
    for decay in (DECAYS[20], DECAYS[25]):
        (alone,) = fit_path(data.features, data.targets, 3, [decay])
        torch.testing.assert_close(alone.weight, together[decay].weight, rtol=1e-3, atol=1e-4)


def test_binary_columns_are_independent_and_scikit_learns():
    data = clouds(150, 6, 4)
    targets = torch.stack([(data.targets == c).long() for c in range(4)], 1)
    targets[:40, 0] = 1  # images of several classes
    for fit in fit_path(data.features, targets, 4, [10.0, 0.1]):
        x = data.features.double().numpy()
        for c in range(4):
            other = LogisticRegression(C=1 / fit.decay, tol=1e-10, max_iter=10_000)
            other.fit(x, targets[:, c].numpy())
            expected = torch.from_numpy(other.coef_[0])
            torch.testing.assert_close(fit.weight[:, c], expected, rtol=1e-3, atol=1e-3)
        assert gradient_norm(data.features, targets, fit.decay, fit.weight, fit.bias) < TOLERANCE


def test_half_the_decay_is_the_softmax_over_two_classes():
    """In ssl-transfer's VOC, the softmax's difference of columns is the binary weight."""
    data = clouds(100, 5, 2)
    (softmax,) = fit_path(data.features, data.targets, 2, [3.0], tolerance=1e-9)
    (binary,) = fit_path(data.features, data.targets[:, None], 1, [1.5], tolerance=1e-9)
    difference = softmax.weight[:, 1] - softmax.weight[:, 0]
    torch.testing.assert_close(binary.weight[:, 0], difference, rtol=1e-5, atol=1e-7)


def test_the_choice_is_the_best_on_validation_and_the_smallest_of_equals():
    data = clouds(200, 6, 3, spread=1.5)
    decays = DECAYS[24:40]  # here the minimum is well marked
    # 200 images in turn over 3 classes and 3 splits would give each split one class
    order = np.random.default_rng(0).permutation(200)
    thirds = [Split(data.features[order[i::3]], data.targets[order[i::3]]) for i in range(3)]
    for solver in ("torch", "sklearn"):
        found = choose(*thirds, 3, scores.top1, solver, decays)
        assert [row["decay"] for row in found.tried] == pytest.approx(decays, rel=1e-5)
        values = [row["validation"] for row in found.tried]
        assert found.decay == pytest.approx(decays[int(np.argmax(values))])
        both = thirds[0] + thirds[1]
        assert len(both.targets) == len(thirds[0].targets) + len(thirds[1].targets)
        if solver == "torch":
            (alone,) = fit_path(both.features, both.targets, 3, [found.decay], tolerance=1e-8)
            torch.testing.assert_close(found.fit.weight, alone.weight, rtol=1e-2, atol=1e-3)
            assert found.fit.gradient_norm < TOLERANCE
        expected = scores.top1(
            found.fit.scores(thirds[2].features).numpy(), thirds[2].targets.numpy()
        )
        assert found.value == expected


def test_scikit_learn_stops_early_and_the_norm_says_so():
    data = clouds(300, 40, 5, spread=3.0)
    sklearn = Sklearn(5)
    fits = [sklearn.fit(data, decay) for decay in DECAYS[:3]]
    assert all(f.gradient_norm > TOLERANCE and not f.converged for f in fits)
    assert fits[0].iterations == 100
    oracle = LogisticRegression(C=1 / DECAYS[0], max_iter=100)  # ssl-transfer's first fit
    with pytest.warns(Warning, match="converge"):
        oracle.fit(data.features.numpy(), data.targets.numpy())
    np.testing.assert_allclose(fits[0].weight.numpy(), oracle.coef_.T, rtol=1e-5, atol=1e-6)


def test_a_class_without_training_images_never_wins():
    data = clouds(90, 5, 3)
    for solver in ("torch", "sklearn"):
        test = Split(data.features, data.targets + (data.targets == 2))  # 0, 1, 3 of four
        found = choose(test, test, test, 4, scores.top1, solver, DECAYS[20:24])
        assert (found.fit.scores(data.features).argmax(1) != 2).all()


def test_what_cannot_be_learned_is_said():
    data = clouds(20, 4, 2)
    bad = data.features.clone()
    bad[3, 1] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        list(fit_path(bad, data.targets, 2))
    one = Split(data.features, data.targets * 0)
    with pytest.raises(UserError, match="one class only"):
        choose(one, one, one, 2, scores.top1, "torch")
    never = Split(data.features, torch.zeros(20, 3).long())
    with pytest.raises(UserError, match="class 0 is in none or in all"):
        choose(never, never, never, 3, scores.mean_average_precision, "torch")
    with pytest.raises(UserError, match="takes up to 8192"):
        list(fit_path(torch.randn(4, 8193), torch.tensor([0, 1, 0, 1]), 2))


# -- metrics --------------------------------------------------------------------------------------


def devkit_ap(confidence: list[float], truth: list[int]) -> float:
    """Follows VOCevalcls.m of the VOC2007 devkit, line by line; recall levels are fractions."""
    order = sorted(range(len(confidence)), key=lambda i: -confidence[i])
    tp = fp = 0
    recall, precision = [], []
    for i in order:
        tp, fp = tp + truth[i], fp + 1 - truth[i]
        recall.append((tp, sum(truth)))
        precision.append(tp / (fp + tp))
    ap = 0.0
    for tenth in range(11):
        above = [p for (a, b), p in zip(recall, precision, strict=True) if 10 * a >= tenth * b]
        ap += max(above, default=0.0) / 11
    return ap


def test_eleven_points_by_hand():
    ap = scores.average_precision
    assert ap(np.array([3.0, 2.0, 1.0]), np.array([1, 1, 0])) == 1.0
    # one positive at rank 2: precision 1/2 at every recall level
    assert ap(np.array([3.0, 2.0, 1.0]), np.array([0, 1, 0])) == pytest.approx(0.5)
    # positives at ranks 1 and 4: precision 1 for recall 0 to 0.5 (6 levels), 1/2 above (5)
    found = ap(np.array([4.0, 3.0, 2.0, 1.0]), np.array([1, 0, 0, 1]))
    assert found == pytest.approx((6 * 1 + 5 * 0.5) / 11)
    # ten positives of which the third ends recall 0.3 exactly
    truth = np.array([1, 1, 1] + [0] * 7 + [1] * 7)
    found = ap(-np.arange(17.0), truth)
    assert found == pytest.approx((4 * 1 + 7 * 10 / 17) / 11)
    # equal scores stay in the order of the list
    assert ap(np.zeros(2), np.array([0, 1])) == pytest.approx(0.5)
    assert math.isnan(ap(np.ones(3), np.zeros(3, dtype=int)))


def test_eleven_points_against_the_devkits_code():
    rng = np.random.default_rng(0)
    for _ in range(30):
        count = int(rng.integers(2, 60))
        truth = rng.integers(2, size=count)
        truth[rng.integers(count)] = 1
        confidence = np.round(rng.normal(size=count), 1)  # with ties
        found = scores.average_precision(confidence, truth)
        assert found == pytest.approx(devkit_ap(confidence.tolist(), truth.tolist()))
    labels, confidence = rng.integers(2, size=(50, 4)), rng.normal(size=(50, 4))
    each = [devkit_ap(confidence[:, c].tolist(), labels[:, c].tolist()) for c in range(4)]
    found = scores.mean_average_precision(confidence, labels)
    assert found == pytest.approx(100 * sum(each) / 4)


def test_mean_per_class_on_unbalanced_data():
    labels = np.array([0] * 90 + [1] * 9 + [2])
    guesses = np.zeros((100, 4))
    guesses[:, 0] = 1.0
    guesses[90:93, 1] = 2.0  # a third of class 1, none of class 2
    assert scores.mean_per_class(guesses, labels) == pytest.approx(100 * (1 + 1 / 3 + 0) / 3)
    assert scores.top1(guesses, labels) == pytest.approx(93.0)
    guesses[0, 3] = 9.0  # a class that has no image here: wrong, and not averaged
    assert scores.mean_per_class(guesses, labels) == pytest.approx(100 * (89 / 90 + 1 / 3) / 3)


def test_averages_want_whole_groups():
    from eval.transfer.manifest import DATASETS

    values = {key: float(number) for number, key in enumerate(DATASETS)}
    found = scores.averages(values, DATASETS)
    assert found["average of 12"] == pytest.approx(sum(range(12)) / 12)
    assert found["average of 11"] == pytest.approx((66 - DATASETS.index("birdsnap")) / 11)
    left = DATASETS.index("birdsnap") + DATASETS.index("cifar100")
    assert found["average of 10"] == pytest.approx((66 - left) / 10)
    del values["birdsnap"]
    assert set(scores.averages(values, DATASETS)) == {"average of 11", "average of 10"}
    del values["pets"]
    assert scores.averages(values, DATASETS) == {}


# -- few-shot -------------------------------------------------------------------------------------


def test_episodes_find_classes_that_are_apart_and_guess_where_they_are_not():
    rng = np.random.default_rng(0)
    labels = np.arange(8 * 25) % 8
    apart = 50.0 * np.eye(8)[labels] + rng.normal(size=(200, 8))
    accuracies, classes = few_shot.episodes(apart, labels, 5, count=20)
    assert classes == 8 and (accuracies == 100).all()
    assert few_shot.interval(accuracies) == 0
    noise = rng.normal(size=(200, 8))
    accuracies, _ = few_shot.episodes(noise, labels, 5, count=100)
    assert abs(accuracies.mean() - 20) < 3
    expected = 1.96 * np.sqrt(np.mean((accuracies - accuracies.mean()) ** 2)) / 10
    assert few_shot.interval(accuracies) == pytest.approx(expected)
    again, _ = few_shot.episodes(noise, labels, 5, count=100)
    other, _ = few_shot.episodes(noise, labels, 5, seed=1, count=100)
    assert (again == accuracies).all() and (other != accuracies).any()


def test_an_episode_against_loops(monkeypatch):
    """Distances by loops over the very images that the episode draws give the same."""
    rng = np.random.default_rng(3)
    labels = np.repeat(np.arange(6), 9)
    x = rng.normal(size=(54, 4)) + labels[:, None] * 0.5
    drawn: list[np.ndarray] = []
    make = np.random.default_rng

    class Spy:
        def __init__(self, seed):
            self.rng = make(seed)

        def choice(self, *arguments, **names):
            drawn.append(self.rng.choice(*arguments, **names))
            return drawn[-1]

    monkeypatch.setattr(few_shot.np.random, "default_rng", Spy)
    (accuracy,), _ = few_shot.episodes(x, labels, 4, queries=5, count=1)
    images = drawn[1:]
    assert len(images) == 5 and all(len(set(d)) == 9 for d in images)
    right = 0
    for own, those in enumerate(images):
        for query in those[4:]:
            distances = []
            for others in images:
                mean = [sum(x[i][k] for i in others[:4]) / 4 for k in range(4)]
                distances.append(sum((x[query][k] - mean[k]) ** 2 for k in range(4)))
            right += distances.index(min(distances)) == own
    assert accuracy == pytest.approx(100 * right / 25)


def test_classes_with_too_few_images_take_no_part():
    labels = np.array([0] * 30 + [1] * 30 + [2] * 30 + [3] * 30 + [4] * 30 + [5] * 19)
    x = np.random.default_rng(0).normal(size=(len(labels), 3))
    assert few_shot.episodes(x, labels, 5, count=2)[1] == 5  # 19 < 5 + 15
    assert few_shot.episodes(x, labels, 20, count=2) is None
