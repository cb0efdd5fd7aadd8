"""The papers' claims at equal budget: what claims.yaml asks, and what the records answer."""

import math
import re
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.run import documents
from results import record
from slurm.plan import PROTOCOLS, Planned

SIDES = ("better", "worse")
MOST_PRIMARY = 12  # claims of the lab: by Holm, each makes the others harder to show
PURITY, OWN = "neighbour_purity", "self_matches"
# what look-ups must return in the last quarter of a run that is to say something about neighbours
LEAST_PURITY, MOST_OWN = 0.3, 0.05
SHOWN = {
    "knn": "k-NN",
    "linear": "linear",
    "semi 1%": "1 %",
    "semi 10%": "10 %",
    "readout": "linear",
}
MONITORED = ("knn", "readout")  # evaluations whose records keep the monitors
# a plan's run -> protocol -> seed -> (file name, record)
Runs = dict[str, dict[str, dict[int, tuple[str, dict[str, Any]]]]]


def load(path: Path, planned: dict[str, Planned]) -> dict[str, Any]:
    """Reads claims.yaml; raises UserError if it names a run that is not planned."""
    what = documents.read_yaml(path, "claims")
    prefixes = [tier["prefix"] for tier in what["tiers"]]
    unknown = [n for n in what["runs"] if not any(p + n in planned for p in prefixes)]
    unknown += [n for s in what["scans"] for n in s["runs"].values() if n not in planned]
    unknown += [c[n] for c in what["claims"] for n in SIDES if c[n] not in what["runs"]]
    if unknown:
        raise UserError(f"{path} names {unknown[0]}, which is no run of plan.yaml")
    if len({*prefixes}) < len(prefixes):
        raise UserError(f"{path}: two tiers have the same prefix")
    if lab := what.get("lab"):
        check_lab(str(path), lab, planned)
    return what


def check_lab(where: str, lab: dict[str, Any], planned: dict[str, Planned]) -> None:
    """Raises UserError for a run not in the plan, a claim twice, or too many primary claims."""
    names = [claim["name"] for claim in lab["claims"]]
    known = {*planned, *(run.tier for run in planned.values())}
    if taken := [name for name in names if names.count(name) > 1 or name in known]:
        raise UserError(f"{where}: lab: {taken[0]} is the name of another claim or of a run too")
    sizes = Counter(claim.get("family", "") for claim in lab["claims"] if claim["primary"])
    if (primary := max(sizes.values(), default=0)) > MOST_PRIMARY:
        raise UserError(f"{where}: lab: {primary} primary claims, at most {MOST_PRIMARY}")
    if strange := {*sizes} - {"", *lab.get("amendments", {})}:
        raise UserError(f"{where}: lab: no amendment is named {min(strange)}, as a claim's family")
    for name, arm in lab_arms(lab):
        if arm not in planned:
            raise UserError(f"{where}: lab: {name} names {arm}, which is no run of plan.yaml")
    for claim in lab["claims"]:
        for arm in claim["effect"]:
            if missing := sorted({*claim["seeds"]} - {*planned[arm].seeds}):
                text = f"{claim['name']} has seed {missing[0]}, which {arm} has not in plan.yaml"
                raise UserError(f"{where}: lab: {text}")
        if claim["measure"] == "views" and {*claim.get("views", {})} != {*claim["effect"]}:
            raise UserError(f"{where}: lab: {claim['name']}: views must name its effect's runs")


def lab_arms(lab: dict[str, Any]) -> list[tuple[str, str]]:
    """Lists the lab's (what names it, run of the plan): claims, its pictures' rows, controls."""
    found = [(claim["name"], arm) for claim in lab["claims"] for arm in arms_of(claim)]
    parts = lab.get("parts", ())
    found += [(part["label"], part[side]) for part in parts for side in ("intact", "broken")]
    found += [(label, of["run"]) for label, of in lab.get("methods", {}).items()]
    for label, panel in lab.get("drops", {}).items():
        found += [(label, arm) for pair in panel["lines"].values() for arm in pair]
    return [*found, *lab.get("controls", {}).items()]


def arms_of(claim: dict[str, Any]) -> list[str]:
    """Lists every run of the plan that a claim of the lab looks at, each once."""
    groups = [
        claim[n] for n in ("effect", "collapse", "unlearned", "intact", "purity") if n in claim
    ]
    return [*dict.fromkeys([*(arm for group in groups for arm in group), claim["healthy"]])]


def recorded(records: Sequence[tuple[str, dict[str, Any]]], planned: dict[str, Planned]) -> Runs:
    """Returns the records of the plan's runs; raises UserError for two of one run, seed and
    protocol.
    """
    found: Runs = {}
    for name, one in records:
        run = planned.get(one.get("plan", ""))
        for seed in run.seeds if run else ():
            if not record.is_of(one, run, seed):
                continue
            by_seed = found.setdefault(run.name, {}).setdefault(one["protocol"], {})
            if seed in by_seed:
                twice = f"{by_seed[seed][0]} and {name} are both {one['protocol']}"
                raise UserError(f"{twice} of {run.name}, seed {seed}: remove one")
            by_seed[seed] = name, one
    return found


def values(runs: Runs, name: str, evaluation: str = "knn") -> list[float]:
    """Returns a run's numbers by one evaluation, in percent, in the order of its seeds."""
    by_seed = runs.get(name, {}).get(PROTOCOLS[evaluation], {})
    return [by_seed[seed][1]["value"] for seed in sorted(by_seed)]


def histories(runs: Runs, run: str) -> list[dict[str, list[float | None]]]:
    """Returns what the monitors of each seed said over its epochs."""
    by_protocol = runs.get(run, {})
    found = next((by_protocol[p] for p in map(PROTOCOLS.get, MONITORED) if p in by_protocol), {})
    return [curve for seed in sorted(found) for curve in found[seed][1].get("history", [])]


def last_quarter(curve: dict[str, list[float | None]], metric: str) -> float:
    """Returns the mean of a monitor over the last quarter of a run's epochs."""
    both = zip(curve["epoch"], curve[metric], strict=True)
    late = [value for epoch, value in both if epoch > 0.75 * curve["epoch"][-1]]
    return statistics.fmean(value for value in late if value is not None)


def look_ups(curves: Sequence[dict[str, list]]) -> tuple[float, float]:
    """Returns, of the entries that a run retrieves in its last quarter, the share with the query's
    label and the share of the query's own image, means over seeds.
    """
    purity, own = ([last_quarter(curve, name) for curve in curves] for name in (PURITY, OWN))
    return statistics.fmean(purity), statistics.fmean(own)


def passes(purity: float, own: float) -> bool:
    """Tells whether look-ups find other images of the query's class often enough for a claim."""
    return purity >= LEAST_PURITY and own <= MOST_OWN


def average(curves: Sequence[dict[str, list]], metric: str, epoch: int) -> float | None:
    """Returns a metric's mean over seeds at an epoch; None if it was not measured."""
    found = [
        c[metric][c["epoch"].index(epoch)] for c in curves if metric in c and epoch in c["epoch"]
    ]
    found = [value for value in found if value is not None]
    return statistics.fmean(found) if found else None


# -- verdicts -------------------------------------------------------------------------------------


UNLEARNED = "neither has learned"
WORDS = ("holds", "does not hold", "within the spread", UNLEARNED, "one seed", "not run")


@dataclass(frozen=True)
class Verdict:
    """A claim's verdict: one of WORDS but the last. One seed judges nothing."""

    word: str
    difference: float  # points: the run that the claim calls better, minus the other


def judge(better: Sequence[float], worse: Sequence[float]) -> Verdict:
    """Judges two lists of numbers over seeds. The spread of their difference is the root of the sum
    of their squared standard deviations (n - 1).
    """
    difference = statistics.fmean(better) - statistics.fmean(worse)
    if min(len(better), len(worse)) < 2:
        return Verdict("one seed", difference)
    spread = math.hypot(statistics.stdev(better), statistics.stdev(worse))
    if abs(difference) <= spread:
        return Verdict("within the spread", difference)
    return Verdict("holds" if difference > 0 else "does not hold", difference)


def random_encoder(runs: Runs, run: str) -> list[float]:
    """Returns the k-NN of the run's own random encoder, calibrated, in percent, in the order of its
    seeds; empty unless every seed has it.
    """
    of_knn = runs.get(run, {}).get(PROTOCOLS["knn"], {})
    found = [of_knn[seed][1].get("others", {}).get("random encoder") for seed in sorted(of_knn)]
    return [value for numbers in found for value in numbers] if all(found) else []


def has_learned(runs: Runs, run: str) -> bool:
    """Tells whether k-NN is above that of the same seeds' random encoders by more than the spread
    of the differences; True if there is none to compare with.
    """
    pairs = [*zip(values(runs, run), random_encoder(runs, run), strict=False)]
    gains = [after - before for after, before in pairs]
    spread = statistics.stdev(gains) if len(gains) > 1 else 0.0
    return not gains or statistics.fmean(gains) > spread


def verdict(
    claim: dict[str, Any], tier: dict[str, str], runs: Runs, numbers: list[list[float]]
) -> Verdict:
    """Says how the numbers of both runs judge the claim; not at all if neither run has learned."""
    found = judge(*numbers)
    if found.word == "one seed" or any(has_learned(runs, n) for n in names_of(claim, tier)):
        return found
    return Verdict(UNLEARNED, found.difference)


def names_of(claim: dict[str, Any], tier: dict[str, str]) -> list[str]:
    """Returns the claim's two runs on a tier; the first is the one that it calls better."""
    return [tier["prefix"] + claim[side] for side in SIDES]


def pair(
    claim: dict[str, Any], tier: dict[str, str], runs: Runs, evaluation: str = "knn"
) -> list[list[float]]:
    """Returns the numbers of both runs over seeds; empty unless both have some."""
    numbers = [values(runs, name, evaluation) for name in names_of(claim, tier)]
    return numbers if all(numbers) else []


def words(what: dict[str, Any], tier: dict[str, str], runs: Runs) -> list[str]:
    """Says how k-NN judges each claim on a tier: one of WORDS each."""
    pairs = [pair(claim, tier, runs) for claim in what["claims"]]
    both = zip(what["claims"], pairs, strict=True)
    return [verdict(c, tier, runs, n).word if n else "not run" for c, n in both]


def in_short(what: dict[str, Any], runs: Runs) -> str:
    """Says how many claims hold, on each tier, by k-NN."""
    said = []
    for tier in what["tiers"]:
        found = words(what, tier, runs)
        counts = [f"{found.count(word)} {word}" for word in WORDS if word in found]
        said.append(f"{tier['short']}: {', '.join(counts)}")
    return f"In short, of {len(what['claims'])} claims, by k-NN. {'; '.join(said)}."


def sentence(
    claim: dict[str, Any], what: dict[str, Any], runs: Runs, planned: dict[str, Planned]
) -> str:
    """Says in one sentence how the tiers judge a claim."""
    said = []
    for tier in what["tiers"]:
        for evaluation, label in SHOWN.items():
            numbers = pair(claim, tier, runs, evaluation)
            if not numbers:
                continue
            found = verdict(claim, tier, runs, numbers)
            if found.word == "does not hold" and not claim["tried"]:
                raise UserError(
                    f"claims.yaml: '{claim['claim']}' does not hold on {tier['short']}: "
                    "say under tried where its cause was looked for"
                )
            text = f"{label} {mean_cell(numbers[0])} against {mean_cell(numbers[1])}"
            text += f", {found.difference:+.2f}"
            text += seed_by_seed(runs, *names_of(claim, tier), PROTOCOLS[evaluation])
            word = "one seed, not judged" if found.word == "one seed" else f"**{found.word}**"
            text += unlike(runs, names_of(claim, tier))
            said.append(f"{tier['short']}: {word} ({text})")
    text = f"**{claim['claim'][0].upper()}{claim['claim'][1:]}.** {'; '.join(said) or 'Not run'}. "
    text += f"Source: {claim['source'].strip()}."
    return filled(" ".join([text, *notes(claim)]), runs, planned)


def unlike(runs: Runs, names: Sequence[str]) -> str:
    """Says which of the runs retrieve other images of the query's class too seldom for a claim."""
    said = []
    for name in names:
        curves = [curve for curve in histories(runs, name) if PURITY in curve]
        if curves and not passes(*(found := look_ups(curves))):
            said.append(f"{name}: {100 * found[0]:.0f} % have the query's label")
    return f"; **look-ups fail the check**, {', '.join(said)}" if said else ""


def notes(claim: dict[str, Any]) -> list[str]:
    """Returns what a claim says besides its source."""
    return [claim[name].strip() for name in ("differs", "tried") if claim.get(name)]


def filled(text: str, runs: Runs, planned: dict[str, Planned]) -> str:
    """Replaces each {run of the plan} in a text by its k-NN, or by "not run"."""

    def number(name: re.Match) -> str:
        if name[1] not in planned:
            raise UserError(f"claims.yaml quotes {name[1]}, which is no run of plan.yaml")
        return mean_cell(values(runs, name[1])) or "not run"

    return re.sub(r"\{([a-z0-9.-]+)\}", number, text)


def seed_by_seed(runs: Runs, better: str, worse: str, protocol: str) -> str:
    """Says how much the runs differ on each seed that both have, like "; by seed +0.50, -0.20"."""
    a, b = runs[better][protocol], runs[worse][protocol]
    seeds = sorted(a.keys() & b.keys())
    differences = [f"{a[seed][1]['value'] - b[seed][1]['value']:+.2f}" for seed in seeds]
    return f"; by seed {', '.join(differences)}" if len(seeds) > 1 else ""


def mean_cell(numbers: Sequence[float]) -> str:
    """Writes mean and spread, like 58.21 ± 0.45; of one seed the number alone."""
    if not numbers:
        return ""
    spread = f" ± {statistics.stdev(numbers):.2f}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.2f}{spread}"
