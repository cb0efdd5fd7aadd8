"""The lab's choices before its claims, on held-out images: each run's rate, and the pilot."""

import math
import statistics
from collections.abc import Callable
from typing import Any

from results import tables
from results.claims import Runs
from results.joined import Joined
from results.record import FAILED
from slurm.plan import PROTOCOLS

GRID, PILOT = "rate-", "pilot-"  # how their names begin in the plan
MEASURES = ("knn", "classifier")  # a rate is chosen by the first of these that the run has


def markdown(joined: Joined) -> str:
    """Returns the page's text on the rates and the pilot; one sentence if nothing has run."""
    grid, pilot = rates_of(joined), pilot_of(joined)
    if not grid:
        return "Nothing has run yet."
    used = chosen(joined)
    said = [GRID_SAYS, grid_table(grid, used), edges(grid, used)]
    if pilot:
        said += [PILOT_SAYS, pilot_table(pilot)]
    return "\n\n".join(said)


GRID_SAYS = (
    "Every run of a claim, those with a part taken away too, had the same budget: a quarter of its "
    "family's rate, that rate and four times it, half the length, one seed. Points of k-NN on "
    "2 000 held-out images above the calibrated random encoder (classifiers: percent right); "
    "**bold** is the rate that the claims use, the best of the three unless the pilot says another."
)
PILOT_SAYS = (
    "The pilot: methods at the rates chosen and at full length, seeds from 0 on, on the same "
    "held-out images. A run that is here at another rate too (`-x1`: its family's own) has in "
    "the claims the rate that is better here, on the seeds that have both."
)


def edges(grid: dict[str, dict[float, float | None]], used: dict[str, float]) -> str:
    """Says how many chosen rates are the largest or the least that was tried, and whose."""

    def those(end: Callable) -> str:
        arms = [f"`{arm}`" for arm, by in grid.items() if used[arm] == end(by)]
        return f"({len(arms)} of {len(grid)}{': ' * bool(arms)}{', '.join(arms)})"

    return (
        "A better rate may lie beyond the three where the chosen one is the largest that was tried "
        f"{those(max)} or the least {those(min)}."
    )


def rates_of(joined: Joined) -> dict[str, dict[float, float | None]]:
    """Returns each run's number at each factor of its rate, None if it failed there. A run is
    left out unless all its factors are recorded.
    """
    found: dict[str, dict[float, float | None]] = {}
    for name in joined.plan:
        if not name.startswith(GRID):
            continue
        arm, _, factor = name.removeprefix(GRID).rpartition("-x")
        if joined.runs.get(name):
            found.setdefault(arm, {})[float(factor)] = number_of(joined.runs, name)
    planned = [name.removeprefix(GRID).rpartition("-x")[0] for name in joined.plan]
    return {arm: by for arm, by in found.items() if len(by) == planned.count(arm)}


def chosen(joined: Joined) -> dict[str, float]:
    """Returns the factor of each run's rate in the claims: the grid's best, unless the pilot, at
    full length, has the run at another factor that gains more on the seeds that have both.
    """
    found = {arm: best(by_factor) for arm, by_factor in rates_of(joined).items()}
    pilot = {
        arm: {one["seeds"][0]: gain(one) for one in ones} for arm, ones in pilot_of(joined).items()
    }
    for name, other in pilot.items():
        arm, _, factor = name.rpartition("-x")
        both = other.keys() & pilot.get(arm, {}).keys()
        if both and sum(other[seed] - pilot[arm][seed] for seed in both) > 0:
            found[arm] = float(factor)
    return found


def number_of(runs: Runs, name: str) -> float | None:
    """Returns the gain of a run's first seed; a classifier's accuracy; None if the run failed."""
    by_protocol = runs[name]
    if FAILED in by_protocol:
        return None
    evaluation = next(e for e in MEASURES if PROTOCOLS[e] in by_protocol)
    one = next(one for _, one in by_protocol[PROTOCOLS[evaluation]].values())
    return gain(one) if evaluation == "knn" else one["value"]


def gain(one: dict[str, Any]) -> float:
    return one["value"] - one["others"]["random encoder"][0]


def best(by_factor: dict[float, float | None]) -> float:
    """Returns the factor of the best number, of equals the one nearest to 1."""
    known = {f: -math.inf if v is None else v for f, v in by_factor.items()}
    return max(known, key=lambda f: (known[f], -abs(math.log(f))))


def grid_table(found: dict[str, dict[float, float | None]], used: dict[str, float]) -> str:
    factors = sorted({f for by in found.values() for f in by})
    head = ("run", *(f"rate x {f:g}" for f in factors))
    lines = []
    for arm, by in found.items():
        cells = [cell(by[f], by, f == used[arm]) for f in factors]
        lines.append([tables.Markup(f"`{arm}`"), *map(tables.Markup, cells)])
    return tables.table(head, lines)


def cell(value: float | None, by: dict[float, float | None], chosen: bool) -> str:
    text = "failed" if value is None else f"{value:+.1f}"
    return f"**{text}**" if chosen else text


def pilot_of(joined: Joined) -> dict[str, list[dict[str, Any]]]:
    """Returns the records of each run of the pilot."""
    found = {}
    for name in joined.plan:
        by_seed = joined.runs.get(name, {}).get(PROTOCOLS["knn"], {})
        if name.startswith(PILOT) and by_seed:
            found[name.removeprefix(PILOT)] = [one for _, (_, one) in sorted(by_seed.items())]
    return found


def pilot_table(found: dict[str, list[dict[str, Any]]]) -> str:
    head = ("run", "seeds", "k-NN", "above random", "spread of it", "training, min")
    lines = []
    for arm, ones in found.items():
        gains = [gain(one) for one in ones]
        spread = f"{statistics.stdev(gains):.1f}" if len(gains) > 1 else ""
        lines.append(
            [
                tables.Markup(f"`{arm}`"),
                str(len(ones)),
                f"{statistics.fmean(one['value'] for one in ones):.1f}",
                f"{statistics.fmean(gains):+.1f}",
                spread,
                f"{60 * statistics.fmean(one['hours'] for one in ones):.1f}",
            ]
        )
    return tables.table(head, lines)
