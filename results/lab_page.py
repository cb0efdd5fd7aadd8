"""Writes the lab's part of the claims' page: its table, its words, and what its runs were."""

import re
import statistics
from collections.abc import Iterable, Sequence
from typing import Any

from results import fixed, lab, lab_figures, lab_rates, record, tables
from results.claims import Runs, arms_of, lab_arms
from results.joined import Joined, fill

# the numbers in the page's words are those that results/lab.py judges by
CONSTANTS = {
    name: f"{getattr(lab, name):g}"
    for name in ("LEVEL", "CONSTANT", "LOW_RANK", "NOTHING", "LEARNED", "TESTABLE")
}
CONSTANTS |= {
    name: getattr(lab, name) for name in ("SEEN", "REVERSED", "OPEN", "NOT_TESTABLE", "NOT_RUN")
}
CONSTANTS |= {"SMALLER": lab.SMALLER.replace("{m:g}", "m"), "WIDE": f"{100 - 200 * lab.LEVEL:g}"}
LEAST = 1e-4  # smaller p values are not told apart
HEAD = ("claim", "the paper says", "ours, 95 % interval", "verdict, p after Holm", "command")
CHECKED = (
    "The commit of each record holds the claims that it was run for as they stand here; "
    "`report.py` refuses others. A later claim may take such a run too, beside runs of its own."
)
UNCHECKED = (
    "That the commit of each record holds its claim is **not checked**: its history is not at hand."
)


def markdown(joined: Joined) -> str:
    """Returns the lab's sections; empty if claims.yaml has no lab."""
    what = joined.claims.get("lab")
    if not what:
        return ""
    judged = lab.judge_all(what["claims"], joined.runs)
    first = lab.families(what["claims"]).get("", [])
    return fill(
        "lab.md",
        primary=table(HEAD, rows(first, joined, judged)),
        figures=tables.pictures(shown) if (shown := lab_figures.shown(joined)) else "",
        **CONSTANTS,
        fixed=when_fixed(what, joined.runs),
        ran=as_list(
            [what_ran(what, joined.runs), *uneven(what["claims"], joined.runs), *failed(joined)]
        ),
        rates=lab_rates.markdown(joined),
        each="\n".join(
            f"- {each(claim, judged[claim['name']], joined)}" for claim in what["claims"]
        ),
        added=added(joined, judged),
        secondary=secondary(joined, judged),
    )


def as_list(said: Iterable[str]) -> str:
    return "\n".join(f"- {tables.prose(text)}" for text in said)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    marked = ([tables.Markup(tables.prose(cell)) for cell in line] for line in lines)
    return tables.table(head, marked)


# -- the table ------------------------------------------------------------------------------------


def added(joined: Joined, judged: dict[str, lab.Judged]) -> str:
    """Writes a table for each family of claims that was fixed after the first ones."""
    what, said = joined.claims["lab"], []
    found = lab.families(what["claims"])
    for family, amendment in what.get("amendments", {}).items():
        said += [f"{amendment['date']}: {amendment['text'].strip()}"]
        said += [table(HEAD, rows(found.get(family, []), joined, judged))]
    return "\n\n".join(said) or "None."


def secondary(joined: Joined, judged: dict[str, lab.Judged]) -> str:
    """Writes a table, without verdicts, for each package of secondary claims that have run, and
    names those that have not.
    """
    packages: dict[str, list[dict[str, Any]]] = {}
    for claim in joined.claims["lab"]["claims"]:
        if not claim["primary"]:
            packages.setdefault(claim.get("package", lab.FIRST), []).append(claim)
    said = []
    for package, of in packages.items():
        run = [claim for claim in of if judged[claim["name"]].effects]
        names = ", ".join(f"`{claim['name']}`" for claim in of if claim not in run)
        cells = [line[:3] + line[4:] for line in rows(run, joined, judged)]
        said += [f"**{package[0].upper()}{package[1:]}**"]
        said += [table(HEAD[:3] + HEAD[4:], cells)] if run else []
        said += [f"Not run yet: {names}."] if names else []
    return "\n\n".join(said) or "None."


def rows(
    claims: Iterable[dict[str, Any]], joined: Joined, judged: dict[str, lab.Judged]
) -> list[list[str]]:
    """Returns the cells of each claim, as text with **bold** words and `code`."""
    return [
        [
            f"{claim['claim'][0].upper()}{claim['claim'][1:]}",
            f"{claim['published'].strip()} ({claim['source'].strip()})",
            ours(claim, judged[claim["name"]]) + collapses(claim, joined.runs),
            verdict(judged[claim["name"]]) + ("; see its note" if "note" in claim else ""),
            commands(claim, joined),
        ]
        for claim in claims
    ]


def ours(claim: dict[str, Any], found: lab.Judged) -> str:
    """Writes our effect, like +4.20 [+3.10, +5.30] points of k-NN, n = 5."""
    if not found.effects:
        return "not run"
    what, unit = found.interval, lab.UNITS[claim["measure"]]
    if what is None:
        return f"{statistics.fmean(found.effects.values()):+.2f} {unit}, n = {len(found.effects)}"
    return f"{what.mean:+.2f} [{what.low:+.2f}, {what.high:+.2f}] {unit}, n = {what.n}"


def collapses(claim: dict[str, Any], runs: Runs) -> str:
    """Says, of a secondary claim about collapse, how many seeds of each run have collapsed; what a
    primary one's have is in its verdict.
    """
    groups = [claim.get(name, ()) for name in ("collapse", "intact")]
    found = {arm: lab.of_arm(runs, arm).values() for group in groups for arm in group}
    return "".join(
        f"; `{arm}` has collapsed with {sum(one.collapsed for one in ones)} of {len(ones)} seeds"
        for arm, ones in found.items()
        if ones and not claim["primary"]
    )


def verdict(found: lab.Judged) -> str:
    """Writes a verdict, like **open** (9 seeds would settle it); p = 0.21."""
    text = f"**{found.word}**" + (f" ({found.why})" if found.why else "")
    if found.interval and found.adjusted is not None:
        text += f"; p = {found.adjusted:.2g}" if found.adjusted >= LEAST else f"; p < {LEAST:g}"
    return text


def commands(claim: dict[str, Any], joined: Joined) -> str:
    """Returns the command that repeats the claim's runs, and the one that shows it in minutes."""
    data = {joined.plan[arm].config["dataset"] for arm in claim["effect"]} - {"photos"}
    flags = "".join(f" --{name} PATH" for name in sorted(data))
    again = f"python results/reproduce.py --all --only {claim['name']}{flags}"
    return f"`{again}`; on photographs, judging nothing: `make claim NAME={claim['name']}`"


# -- when, and what ran ---------------------------------------------------------------------------


def when_fixed(what: dict[str, Any], runs: Runs) -> str:
    """Says when the claims were fixed, which commits hold them, and what was not kept to."""
    said = [f"Fixed: {what['fixed'] or 'not yet'}."]
    every = fixed.check(what["claims"], runs)
    ran_at: dict[str, list[str]] = {}
    for one in sorted(records(what, runs), key=lambda one: (one["date"], one["commit"])):
        ran_at.setdefault(one["commit"], []).append(one["plan"])
    for commit, of in ran_at.items():
        when = f" of {time}" if (time := fixed.time_of(commit)) else ""
        arms = ", ".join(f"`{arm}`" for arm in dict.fromkeys(of))
        said += [f"At commit `{commit[:7]}`{when}, {len(of)} of the runs ran: {arms}."]
    if ran_at:
        said += [CHECKED if every else UNCHECKED]
    if not what["deviations"]:
        said += ["Deviations: none."]
    said += [f"Deviation of {d['date']}: {d['text'].strip()}" for d in what["deviations"]]
    return as_list(said)


HISTORY = tuple(as_list([text]) for text in (UNCHECKED, CHECKED))  # the lines, in Markdown
TIME = re.compile(r"(?m)^(- At commit `[0-9a-f]{7}`) of [0-9 :+-]{25},")


def is_without_history(text: str, stored: str) -> bool:
    """Tells whether a page differs from a stored one in what only the history says: that commits
    were checked, and their times.
    """
    if HISTORY[0] not in text:
        return False
    text, stored = (TIME.sub(r"\1,", page) for page in (text, stored))
    return stored == text.replace(*HISTORY)


def records(what: dict[str, Any], runs: Runs) -> list[dict[str, Any]]:
    """Returns one record of each seed of each run of the lab."""
    arms = dict.fromkeys(arm for _, arm in lab_arms(what))
    found = {(arm, one["seeds"][0]): one for arm in arms for _, one in fixed.records_of(runs, arm)}
    return [*found.values()]


def what_ran(what: dict[str, Any], runs: Runs) -> str:
    """Says how many runs there are, their hours, and on what they ran."""
    found = records(what, runs)
    if not found:
        return "Nothing yet."
    hours = sum(one["hours"] or 0 for one in found)
    machines = ", ".join(sorted({one["hardware"] for one in found}))
    return f"{len(found)} runs of one seed each, {hours:.1f} hours of training, on {machines}."


def uneven(claims: Sequence[dict[str, Any]], runs: Runs) -> list[str]:
    """Names the claims whose runs are not all of one commit, or of one CPU's model."""
    said = []
    for claim in claims:
        ones = [one for arm in claim["effect"] for _, one in fixed.records_of(runs, arm)]
        for what, of in (("commit", commit), ("CPU or GPU model", model)):
            if len(several := sorted({of(one) for one in ones})) > 1:
                text = f"Not all of one {what}: the runs of {claim['name']} ({'; '.join(several)})."
                said.append(text)
    if not said and any(runs.get(arm) for claim in claims for arm in claim["effect"]):
        said = ["All runs that one claim compares are of one commit and of one CPU or GPU model."]
    return said


def failed(joined: Joined) -> list[str]:
    """Lists the runs that ended in a loss or gradient that is no number."""
    return [
        f"**Failed**: `{arm}`, seed {seed}: {one['error']}."
        for arm, by_protocol in joined.runs.items()
        for seed, (_, one) in sorted(by_protocol.get(record.FAILED, {}).items())
    ]


def commit(one: dict[str, Any]) -> str:
    return one["commit"][:7]


def model(one: dict[str, Any]) -> str:
    """Returns the hardware without its number of cores and ranks."""
    return re.sub(r"(, \d+ cores)? x \d+$", "", one["hardware"])


def each(claim: dict[str, Any], found: lab.Judged, joined: Joined) -> str:
    """Says what one claim compares, its effects by seed, and its records."""
    seeds = ", ".join(map(str, claim["seeds"]))
    text = f"`{claim['name']}`: {formula(claim['effect'])} ({lab.UNITS[claim['measure']]}); seeds "
    text += f"{seeds}; smallest effect of interest {claim['smallest']:g}; healthy run "
    text += f"`{claim['healthy']}`."
    for group in ("collapse", "unlearned", "intact"):
        if group in claim:
            text += f" {group.capitalize()}: {', '.join(f'`{arm}`' for arm in claim[group])}."
    text += f" Against it: {claim['against'].strip()}."
    text += f" **Note of {claim['note'].strip()}**" if "note" in claim else ""
    if found.effects:
        text += f" By seed: {', '.join(f'{v:+.2f}' for v in found.effects.values())}."
        text += shares(claim, joined.runs)
    files = dict.fromkeys(
        n for arm in arms_of(claim) for n, _ in fixed.records_of(joined.runs, arm)
    )
    links = ", ".join(f"[{number}](records/{name})" for number, name in enumerate(files, 1))
    return tables.prose(text) + (f" Records: {links}." if files else "")


def shares(claim: dict[str, Any], runs: Runs) -> str:
    """Says, of a difference of two differences of k-NN, a - b - c + d, what share a - b is of all
    that a gains over its random encoder, and c - d of what c gains; "" if a or c gains nothing.
    """
    if claim["measure"] != "knn" or [*claim["effect"].values()] != [1, -1, -1, 1]:
        return ""
    arms, said = [*claim["effect"]], []
    for whole, less in (arms[:2], arms[2:]):
        a, b = lab.of_arm(runs, whole), lab.of_arm(runs, less)
        seeds = [seed for seed in claim["seeds"] if seed in a and seed in b]
        lost = sum(a[seed].knn - b[seed].knn for seed in seeds)
        if (gained := sum(a[seed].gain for seed in seeds)) <= 0:
            return ""
        share = f"{100 * lost / gained:.0f} %"
        said.append(f"`{whole}` − `{less}` is {share} of what `{whole}` gains over random")
    return f" As shares: {'; '.join(said)}."


def formula(effect: dict[str, float]) -> str:
    """Writes an effect as a formula, like `a` − `b` + 0.5 `c`."""
    text = ""
    for arm, factor in effect.items():
        sign = "−" if factor < 0 else "+"
        size = "" if abs(factor) == 1 else f"{abs(factor):g} "
        text += f" {sign} {size}`{arm}`"
    return text.removeprefix(" + ").strip()
