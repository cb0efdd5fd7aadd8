"""The lab's claims: what was fixed before the runs, and what the runs say of it.

An arm is a run of plan.yaml in the tier `lab`. A claim's effect on a seed is a sum over arms of a
measure of that seed's run, each arm with its factor: 1 and -1 for a difference, four terms for a
difference of two drops. Effects are paired by seed; a claim is judged by their mean with a t
interval, after Holm over the primary claims. `claims.yaml`, under `lab`, holds the claims.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scipy import stats

from common.errors import UserError
from results.claims import PURITY, Runs, last_quarter
from results.record import FAILED
from slurm.plan import PROTOCOLS

LEVEL = 0.05
# a collapsed run has less std, or less rank, and gains fewer points of k-NN over random
CONSTANT, LOW_RANK, NOTHING = 0.1, 2.0, 3.0
LEARNED = 5.0  # points of k-NN above random, of "learns faster"
TESTABLE = 10.0  # points of k-NN that the healthy arm must lie above its random encoder
SEEN, REVERSED, SMALLER = "seen here", "reversed here", "smaller than {m:g} here"
OPEN, NOT_TESTABLE, NOT_RUN = "open", "not testable here", "not run"
FIRST = "fixed with the primary ones"  # the package of secondary claims that name none
MOST_SEEDS = 1000  # `seeds_to_settle` looks no further


# -- what one run says ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """One seed of one arm. Accuracies in percent, `std` as 1 for a sphere (geometry.py)."""

    knn: float
    linear: float
    random: float  # k-NN of the same seed's random encoder, calibrated
    std: float  # of the embedding, at the end, like `rank`
    rank: float
    feature_rank: float  # of the representation
    record: dict[str, Any]

    @property
    def gain(self) -> float:
        return self.knn - self.random

    @property
    def curve(self) -> dict[str, list[float | None]]:
        """Returns what the run's monitors said over its epochs."""
        (found,) = self.record["history"]
        return found

    @property
    def collapsed(self) -> bool:
        """Tells whether the embedding is constant or of low rank, and nothing was learned."""
        return (self.std < CONSTANT or self.rank < LOW_RANK) and self.gain < NOTHING


def measured(record: dict[str, Any]) -> Measured:
    """Reads what a record of the read-out says of its run."""
    numbers = record["scores"][0]["value"], record["value"], record["others"]["random encoder"][0]
    return from_geometry(*numbers, record["geometry"][0][-1], record)


def from_geometry(
    knn: float, linear: float, random: float, last: dict[str, Any], record: dict[str, Any]
) -> Measured:
    """Puts a run's numbers together with the last point of its geometry."""
    lay = last["embedding"]
    ranks = lay["effective_rank"], last["representation"]["effective_rank"]
    return Measured(knn, linear, random, lay["std"], *ranks, record)


def of_arm(runs: Runs, arm: str) -> dict[int, Measured]:
    """Returns the seeds of an arm that are recorded."""
    by_seed = runs.get(arm, {}).get(PROTOCOLS["readout"], {})
    return {seed: measured(record) for seed, (_, record) in sorted(by_seed.items())}


def epochs_until(one: Measured, points: float) -> float:
    """Returns the epoch, between two in proportion, at which a run's k-NN first lay `points` above
    its random encoder; the last one if it never did.
    """
    both = zip(one.curve["epoch"], one.curve["knn"], strict=True)
    known = [(epoch, 100 * value) for epoch, value in both if value]
    goal, before = one.random + points, (0.0, one.random)
    for epoch, value in known:
        if value >= goal and epoch > 0:
            return before[0] + (goal - before[1]) / (value - before[1]) * (epoch - before[0])
        before = (epoch, value)
    return known[-1][0]


# -- effects --------------------------------------------------------------------------------------


def effects(claim: dict[str, Any], runs: Runs) -> dict[int, float]:
    """Returns the effect by seed, of the seeds that every arm has and the claim names."""
    arms = {arm: values_of(claim, arm, runs) for arm in claim["effect"]}
    found = {}
    for seed in claim["seeds"]:
        if all(seed in by_seed for by_seed in arms.values()):
            terms = (factor * arms[arm][seed] for arm, factor in claim["effect"].items())
            found[seed] = sum(terms)
    return found


MEASURES = ("knn", "linear", "gain", "rank", "std", "feature_rank")
UNITS = {"knn": "points of k-NN", "linear": "points of the linear read-out"}
UNITS |= {"gain": "points of k-NN over random", "top1": "points of top-1"}
UNITS |= {"beyond_first": "points of the linear read-out"}
UNITS |= {"found_over_chance": "points of precision over chance"}
UNITS |= {"purity_growth": "points of the look-ups' purity"}
UNITS |= {"auc_over_chance": "points of AUC over chance"}
UNITS |= {"feature_rank": "of the representation's effective rank"}
UNITS |= {"rank": "of effective rank", "std": "of std·√D", "views": "views of an image"}


def values_of(claim: dict[str, Any], arm: str, runs: Runs) -> dict[int, float]:
    """Returns the claim's measure of an arm by seed: top1 is that of a classifier's own record,
    beyond_first what the linear read-out loses if it sees only the first 22 features.
    """
    if claim["measure"] == "top1":
        by_seed = runs.get(arm, {}).get(PROTOCOLS["classifier"], {})
        return {seed: one["value"] for seed, (_, one) in by_seed.items()}
    if claim["measure"] == "beyond_first":
        first = runs.get(arm, {}).get(PROTOCOLS["readout first 22"], {})
        whole = of_arm(runs, arm)
        return {s: whole[s].linear - one["value"] for s, (_, one) in first.items() if s in whole}
    return {seed: value(claim, arm, one) for seed, one in of_arm(runs, arm).items()}


def value(claim: dict[str, Any], arm: str, one: Measured) -> float:
    """Returns the claim's measure of one run of an arm: one of MEASURES; `views`, the views of an
    image that the run had seen when its k-NN lay 5 points above random; and, each as a mean over
    the last quarter: `found_over_chance`, by how much what FNC finds is of the image's class more
    often than by chance; `purity_growth`, by how much the look-ups' purity is above that of their
    first epoch; `auc_over_chance`, by how much more often than in one of two cases SNCLR's
    positiveness is larger for a neighbour of the image's class than for another.
    """
    measure = claim["measure"]
    if measure == "purity_growth":
        first = next(v for v in one.curve[PURITY] if v is not None)
        return 100 * (last_quarter(one.curve, PURITY) - first)
    if measure == "auc_over_chance":
        return 100 * (last_quarter(one.curve, "positiveness_auc") - 0.5)
    if measure == "found_over_chance":
        return 100 * (
            last_quarter(one.curve, "found_precision") - last_quarter(one.curve, "found_chance")
        )
    if measure == "views":
        return claim["views"][arm] * epochs_until(one, LEARNED)
    if measure not in MEASURES:
        raise UserError(f"claims.yaml: {measure} is no measure of the lab's runs")
    return getattr(one, measure)


@dataclass(frozen=True)
class Interval:
    """The mean of paired effects with its two-sided t interval, and the p of a mean of 0."""

    n: int
    mean: float
    low: float
    high: float
    p: float


def interval(found: Sequence[float], level: float = LEVEL) -> Interval:
    """Returns the interval of two effects or more; it has no width if the effects are all alike."""
    n, mean = len(found), statistics.fmean(found)
    error = statistics.stdev(found) / n**0.5
    half = stats.t.ppf(1 - level / 2, n - 1) * error
    p = float(2 * stats.t.sf(abs(mean) / error, n - 1)) if error else float(mean == 0)
    return Interval(n, mean, mean - half, mean + half, p)


def holm(ps: dict[str, float]) -> dict[str, float]:
    """Returns Holm's step-down adjusted p values (1979): of m ordered ones, the k-th (from 0) is
    multiplied by m - k; none is below the one before it, none above 1.
    """
    adjusted, least = {}, 0.0
    for number, name in enumerate(sorted(ps, key=ps.get)):
        least = max(least, min(1.0, (len(ps) - number) * ps[name]))
        adjusted[name] = least
    return adjusted


def seeds_to_settle(found: Sequence[float], m: float) -> int | None:
    """Returns the least number of seeds at which effects of this mean and spread would be judged:
    their interval is without 0, or their 90 % interval inside ±m. None if 1000 are too few.
    """
    mean, spread = statistics.fmean(found), statistics.stdev(found)
    for n in range(len(found), MOST_SEEDS + 1):
        error = spread / n**0.5
        apart = abs(mean) > stats.t.ppf(1 - LEVEL / 2, n - 1) * error
        inside = abs(mean) + stats.t.ppf(0.95, n - 1) * error < m
        if apart or inside:
            return n
    return None


# -- verdicts -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Judged:
    """A claim's verdict and what it is made of; `why` says what an open or untestable one lacks."""

    word: str
    effects: dict[int, float]
    interval: Interval | None = None
    adjusted: float | None = None  # p after Holm; None of a secondary claim
    why: str = ""


def judge_all(claims: Sequence[dict[str, Any]], runs: Runs) -> dict[str, Judged]:
    """Judges every claim; returns verdicts by name. Holm is over all primary claims of a family:
    those that are not run count as p = 1, so that nothing gains by leaving some out.
    """
    found = {claim["name"]: effects(claim, runs) for claim in claims}
    adjusted = {}
    for primary in families(claims).values():
        names = [claim["name"] for claim in primary]
        ps = {n: interval([*found[n].values()]).p if len(found[n]) > 1 else 1.0 for n in names}
        adjusted |= holm(ps)
    return {
        claim["name"]: judge(claim, runs, found[claim["name"]], adjusted.get(claim["name"]))
        for claim in claims
    }


def families(claims: Sequence[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Returns the primary claims by family; those that were fixed first have no name for theirs."""
    found: dict[str, list[dict[str, Any]]] = {}
    for claim in claims:
        if claim["primary"]:
            found.setdefault(claim.get("family", ""), []).append(claim)
    return found


def judge(
    claim: dict[str, Any], runs: Runs, found: dict[int, float], adjusted: float | None
) -> Judged:
    """Judges one claim; secondary ones (no adjusted p) get an interval and no verdict."""
    if not found:
        return Judged(NOT_RUN, found)
    missing = len(claim["seeds"]) - len(found)
    if len(found) < 2 or missing:
        return Judged(OPEN, found, None, adjusted, without(claim, runs, missing))
    what = interval([*found.values()])
    if adjusted is None:
        return Judged("", found, what)
    needed = [claim["healthy"], *claim.get("purity", ())]
    if lacking := [arm for arm in needed if {*claim["seeds"]} - {*of_arm(runs, arm)}]:
        return Judged(OPEN, found, what, adjusted, f"{lacking[0]} is not run with every seed")
    if why := not_testable(claim, runs):
        return Judged(NOT_TESTABLE, found, what, adjusted, why)
    m, wide = claim["smallest"], interval([*found.values()], 2 * LEVEL)
    if adjusted < LEVEL and what.mean < 0:
        return Judged(REVERSED, found, what, adjusted)
    if adjusted < LEVEL and not (why := contradicted(claim, runs)):
        return Judged(SEEN, found, what, adjusted)
    if adjusted >= LEVEL and -m < wide.low and wide.high < m:
        return Judged(SMALLER.format(m=m), found, what, adjusted)
    if adjusted >= LEVEL:
        settled = seeds_to_settle([*found.values()], m)
        why = f"{settled} seeds would settle it" if settled else "more than 1000 seeds are needed"
    return Judged(OPEN, found, what, adjusted, why)


def without(claim: dict[str, Any], runs: Runs, missing: int) -> str:
    """Says how many seeds are missing, and which of their runs failed."""
    failed = [
        f"{arm} failed with seed {seed}"
        for arm in claim["effect"]
        for seed in sorted(runs.get(arm, {}).get(FAILED, {}))
    ]
    text = f"{missing} of {len(claim['seeds'])} seeds lack"
    return text + (f": {', '.join(failed)}" if failed else "")


def not_testable(claim: dict[str, Any], runs: Runs) -> str:
    """Says why nothing can be said: the healthy arm has not learned, or the precondition fails."""
    healthy = of_arm(runs, claim["healthy"])
    gain = interval([healthy[seed].gain for seed in claim["seeds"]])
    if gain.mean < TESTABLE:
        within = f"{gain.mean:.1f} [{gain.low:.1f}, {gain.high:.1f}]"
        return f"{claim['healthy']} is {within} points above random, not {TESTABLE:g}"
    for arm, least in (claim.get("purity") or {}).items():
        found = statistics.fmean(
            last_quarter(one.curve, PURITY) for one in of_arm(runs, arm).values()
        )
        if found < least:
            return f"{arm}'s look-ups have the query's label in {100 * found:.0f} % of cases"
    return ""


def contradicted(claim: dict[str, Any], runs: Runs) -> str:
    """Says what speaks against a claimed collapse: a broken run, at any of its rates, that has not
    collapsed, or a healthy one that has. Of a run that is to learn nothing, says that it has
    learned. Returns "" if nothing speaks against the claim.
    """
    for arm in claim.get("collapse", ()):
        found = of_arm(runs, arm)
        if not found:
            return f"{arm} is not run"
        if whole := [seed for seed, one in found.items() if not one.collapsed]:
            return f"{arm} has not collapsed with seed {', '.join(map(str, whole))}"
    for arm in claim.get("unlearned", ()):
        found = of_arm(runs, arm)
        if learned := [seed for seed, one in found.items() if one.gain >= NOTHING]:
            return f"{arm} has learned something with seed {', '.join(map(str, learned))}"
    for arm in claim.get("intact", ()):
        if bad := [seed for seed, one in of_arm(runs, arm).items() if one.collapsed]:
            return f"{arm} has collapsed with seed {', '.join(map(str, bad))}"
    return ""
