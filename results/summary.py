"""What the records come to: a few sentences, each counted from the records when it is written."""

from collections.abc import Iterable, Sequence
from typing import Any

from results import claims, lab, tables
from results.joined import Joined

UNJUDGED = {
    claims.UNLEARNED: "not judged (neither run has learned)",
    "one seed": "not judged (one seed)",
    "not run": "not run",
}
SMALLER = "smaller here than is of interest"  # each claim has its own bound


def sentences(joined: Joined) -> list[str]:
    """Says in Markdown: the papers' claims and numbers, and what our other runs are."""
    text = [*of_lab(joined.claims, joined.runs), papers_numbers(joined.rows)]
    text += [verdicts(joined.claims, joined.runs)]
    apart = [r for _, r in joined.apart if not joined.of_lab(r)]  # the lab has its own sentence
    return [*text, *other_runs(joined.rows, apart)]


def papers_numbers(rows: Sequence[tables.Row]) -> str:
    """Says how many of the numbers that this repository aims at were run, by pre-training data."""
    aims = [row for row in rows if tables.is_aim(row.published)]
    said = []
    for data in dict.fromkeys(row.published["pretraining"] for row in aims):
        of = [row for row in aims if row.published["pretraining"] == data]
        run = [row for row in of if row.records]
        if not run:
            said.append(f"no {data} number of the papers has been run yet (0 of {len(of)})")
            continue
        off = [tables.difference(r, row.published) for row in run for _, r in row.records]
        known = [value for value in off if value is not None]
        verb = "has" if len(run) == 1 else "have"
        text = f"{len(run)} of the papers' {len(of)} {data} numbers {verb} been run"
        said.append(text + (f", ours {span(known, '+.2f')} points off" if known else ""))
    text = "; ".join(said)
    missing = sum(row.published["value"] is None for row in aims)
    more = f" Of {missing} of these the paper's own number is unknown: its table was not at hand."
    more = more if missing else ""
    return f"**{text[0].upper()}{text[1:]}.**{more}"


def verdicts(what: dict[str, Any], runs: claims.Runs) -> str:
    """Says how many claims hold, by k-NN, on each tier, with its budget; most judged first."""
    tiers = []
    for tier in what["tiers"]:
        words = claims.words(what, tier, runs)
        judged = [word for word in words if word not in UNJUDGED]
        known = [word for word in claims.WORDS if word in words]
        counts = ", ".join(f"{words.count(w)} {UNJUDGED.get(w, w)}" for w in known)
        budget = budget_of(ones_of(tier, what, runs))
        name = f"{tier['short']}, {budget}" if budget else tier["short"]
        counts = "not run yet" if {*words} == {"not run"} else counts
        order = len(judged), len(words) - words.count("not run")
        tiers.append((order, "holds" in words, f"{name}: **{counts}**"))
    tiers.sort(key=lambda item: item[0], reverse=True)
    text = f"Of {len(what['claims'])} claims, by k-NN. {'. '.join(said for *_, said in tiers)}."
    if any(holds for _, holds, _ in tiers):
        return text
    return f"{text} So far none is shown to hold."


def of_lab(what: dict[str, Any], runs: claims.Runs) -> list[str]:
    """Counts the verdicts on the lab's primary claims, and names those that are judged;
    empty without any claim.
    """
    found = what.get("lab", {}).get("claims", [])
    judged = lab.judge_all(found, runs)
    said = {claim["claim"]: judged[claim["name"]].word for claim in found if claim["primary"]}
    said = {c: SMALLER if word.startswith(SMALLER[:8]) else word for c, word in said.items()}
    why = {c["claim"]: f" ({y})" if (y := judged[c["name"]].why) else "" for c in found}
    words = [*said.values()]
    counts = ", ".join(f"{words.count(word)} {word}" for word in dict.fromkeys(words))
    text = f"Of the lab's {len(words)} primary claims: **{counts}**."
    for word in (lab.SEEN, lab.REVERSED, SMALLER, lab.OPEN, lab.NOT_TESTABLE):
        if named := [f"{claim}{why[claim]}" for claim, its in said.items() if its == word]:
            text += f" {word.capitalize()}: {'; '.join(named)}."
    return [text] if words else []


def ones_of(tier: dict, what: dict[str, Any], runs: claims.Runs) -> list[tables.Record]:
    """Returns the records of the runs that a tier's claims compare."""
    names = dict.fromkeys(n for claim in what["claims"] for n in claims.names_of(claim, tier))
    by_seed = [seeds for name in names for seeds in runs.get(name, {}).values()]
    return [one for seeds in by_seed for _, one in seeds.values()]


def budget_of(records: Sequence[tables.Record]) -> str:
    """Says the budget, like 3 to 6 epochs, CPU; "" without records."""
    epochs = [r["pretraining"]["epochs"] for r in records]
    if not epochs or None in epochs:
        return ""
    return f"{span(epochs)} epochs, {devices(records)}"


def span(numbers: Sequence[float], form: str = "g") -> str:
    """Says the range of numbers, like 3 to 6; of equal numbers the one."""
    ends = [f"{end(numbers):{form}}" for end in (min, max)]
    return ends[0] if ends[0] == ends[1] else " to ".join(ends)


def devices(records: Iterable[tables.Record]) -> str:
    """Names the hardware; all CPUs are "CPU", known by the number of cores in their names."""
    kinds = {"CPU" if " cores x " in r["hardware"] else r["hardware"] for r in records}
    return ", ".join(sorted(kinds))


def shortest(rows: Iterable[tables.Row]) -> float:
    """Returns the fewest epochs that a number that we aim at was trained for."""
    aims = [row.published for row in rows if tables.is_aim(row.published)]
    return min(p["epochs"] for p in aims if p["epochs"] is not None)


def is_short(record: tables.Record, papers: float) -> bool:
    """Tells whether a run has fewer epochs than any of the papers' runs."""
    epochs = record["pretraining"]["epochs"]
    return epochs is not None and epochs < papers


def other_runs(rows: Sequence[tables.Row], apart: Sequence[tables.Record]) -> list[str]:
    """Says that short runs test the code and not the methods, if there are any."""
    papers = shortest(rows)
    short = [r for r in apart if is_short(r, papers)]
    if not short:
        return []
    which = f"All {len(apart)}" if len(short) == len(apart) else f"{len(short)} of the {len(apart)}"
    return [
        f"**{which} numbers of ours under other settings** are of short runs: {budget_of(short)}; "
        f"the papers' shortest has {papers:g} epochs. They test the code, not the methods."
    ]
