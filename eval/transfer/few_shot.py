"""Few-shot episodes by class means (prototypical networks on frozen features), as GSG's tooling.

ssl-transfer few_shot.py: 5 classes at random, 5 or 20 images of each give the class mean, 15 more
of each are classified by the nearest mean in squared Euclidean distance, features as they are (not
normalised); 600 episodes; mean and 1.96·σ/√600 of the episodes' accuracies.
"""

from collections.abc import Callable

import numpy as np

WAYS, SHOTS, QUERIES, EPISODES = 5, (5, 20), 15, 600  # few_shot.py and the two settings


def episodes(
    features: np.ndarray,
    labels: np.ndarray,
    shots: int,
    seed: int = 0,
    ways: int = WAYS,
    queries: int = QUERIES,
    count: int = EPISODES,
    between: Callable[[], None] = lambda: None,
) -> tuple[np.ndarray, int] | None:
    """Returns (accuracy of each episode in percent (count,), number of classes drawn from); None if
    fewer than `ways` classes have `shots + queries` images.

    features (N,D), labels (N,). Classes with too few images take no part.
    """
    features = features.astype(np.float64)
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    members = [m for m in members if len(m) >= shots + queries]
    if len(members) < ways:
        return None
    rng = np.random.default_rng([seed, shots])
    accuracies = np.empty(count)
    for number in range(count):
        between()
        chosen = rng.choice(len(members), ways, replace=False)
        drawn = [rng.choice(members[c], shots + queries, replace=False) for c in chosen]
        means = np.stack([features[d[:shots]].mean(0) for d in drawn])
        asked = np.concatenate([features[d[shots:]] for d in drawn])
        # |x - m|² without |x|², which is the same for every class
        distance = (means**2).sum(1) - 2 * asked @ means.T
        accuracies[number] = 100 * np.mean(distance.argmin(1) == np.arange(ways).repeat(queries))
    return accuracies, len(members)


def interval(accuracies: np.ndarray) -> float:
    """Returns half the 95 % interval of the mean, in points: 1.96 standard deviations (of the
    population, np.std, as ssl-transfer) over the root of the number of episodes.
    """
    return float(1.96 * accuracies.std() / np.sqrt(len(accuracies)))
