"""The text of claims.md: the lab, then the claims on tiers and the tables of their runs."""

import statistics
from collections.abc import Sequence
from typing import Any

from results import lab_page, tables
from results.claims import (
    LEAST_PURITY,
    MOST_OWN,
    PURITY,
    SHOWN,
    Runs,
    average,
    histories,
    in_short,
    judge,
    lab_arms,
    look_ups,
    mean_cell,
    passes,
    random_encoder,
    sentence,
    values,
)
from results.joined import Joined, fill
from slurm.plan import PROTOCOLS, Planned


def markdown(joined: Joined) -> str:
    what, runs = joined.claims, joined.runs
    said = [tables.prose(sentence(c, what, runs, joined.plan)) for c in what["claims"]]
    tiers = []
    for tier in what["tiers"]:
        text = [f"## {tables.prose(tier['title'])}", tables.prose(tier["note"])]
        text += tier_table(tier, joined)
        tiers.append("\n\n".join(text))
    return fill(
        "claims.md",
        lab=lab_page.markdown(joined),
        in_short=tables.prose(in_short(what, runs)),
        claims="\n".join(f"{n}. {text}" for n, text in enumerate(said, 1)),
        tiers="\n\n".join(tiers),
        scans="\n\n".join(scan_table(scan, runs) for scan in what["scans"]),
        LEAST_PURITY=f"{100 * LEAST_PURITY:g}",
        MOST_OWN=f"{100 * MOST_OWN:g}",
        purity="\n\n".join(purity_tables(joined)) or "Not run.",
        figures=tables.pictures(f for f in joined.figures if f.get("page") == "claims.md"),
        published=context_table(joined.published),
    )


def tier_table(tier: dict[str, str], joined: Joined) -> list[str]:
    """Returns the tier's numbers, a row for each run that it plans, and below the missing runs."""
    names, runs, plan = joined.claims["runs"], joined.runs, joined.plan
    planned = [name for name in names if tier["prefix"] + name in plan]
    asked = dict.fromkeys(e for n in planned for e in plan[tier["prefix"] + n].evaluations)
    rows, missing = [], []
    for name in planned:
        run = tier["prefix"] + name
        scores = [values(runs, run, e) for e in asked]
        missing += lacking(runs, plan[run])
        if not any(scores):
            continue
        one = next(one for by_seed in runs[run].values() for _, one in by_seed.values())
        trained_on = tables.data_cell(one["pretraining"], "dataset")
        row = [names[name], trained_on, f"{one['pretraining']['epochs']:g}"]
        row += [str(len(seeds_of(runs, run))), mean_cell(random_encoder(runs, run))]
        rows.append([*row, *map(mean_cell, scores), cost(runs, run), links(runs, run)])
    head = ["method", "trained on", "epochs", "seeds", "random encoder, k-NN"]
    head += [SHOWN[e] for e in asked]
    text = [tables.table([*head, "training", "records"], rows)] if rows else []
    if missing:
        how = f"`python results/reproduce.py --next --only {missing[0].split()[0]}"
        data = " --cifar10 PATH" if not tier["prefix"].startswith("photos") else ""
        text += [f"**Missing**: {', '.join(missing)}. {how}{data}` runs the first of them."]
    return text


def lacking(runs: Runs, run: Planned) -> list[str]:
    """Says which records a planned run lacks, like simsiam (seed 1), simsiam (linear of seed 0)."""
    found, name = [], run.name
    trained = seeds_of(runs, name)
    if seeds := [str(s) for s in run.seeds if s not in trained]:
        found.append(f"{name} (seed {', '.join(seeds)})")
    for evaluation in run.evaluations:
        done = runs.get(name, {}).get(PROTOCOLS[evaluation], {})
        if seeds := [str(s) for s in trained if s not in done]:
            found.append(f"{name} ({SHOWN[evaluation]} of seed {', '.join(seeds)})")
    return found


def seeds_of(runs: Runs, run: str) -> list[int]:
    return sorted({seed for by_seed in runs.get(run, {}).values() for seed in by_seed})


def cost(runs: Runs, run: str) -> str:
    """Says the mean time of training, and on what hardware."""
    ones = {seed: one for by_seed in runs[run].values() for seed, (_, one) in by_seed.items()}
    hours = [one["hours"] for one in ones.values() if one["hours"] is not None]
    one = next(iter(ones.values()))
    time = tables.hours_cell({"hours": statistics.fmean(hours)}) if hours else ""
    return f"{time}, {one['hardware']}"


def links(runs: Runs, run: str) -> tables.Markup:
    files = dict.fromkeys(runs[run][p][s][0] for p in runs[run] for s in sorted(runs[run][p]))
    return tables.Markup(", ".join(f"[{n}](records/{name})" for n, name in enumerate(files, 1)))


def scan_table(scan: dict[str, Any], runs: Runs) -> str:
    """Returns a row for each value that was tried, and says whether one is better than ours."""
    title = tables.prose(f"{scan['what']}{' (' + scan['unit'] + ')' if scan['unit'] else ''}:")
    scores = {value: values(runs, name) for value, name in scan["runs"].items()}
    scores = {value: numbers for value, numbers in scores.items() if numbers}
    if not scores:
        return f"{title}\n\nnot run"
    rows = [
        (
            f"{value:g}{' (ours)' if value == scan['ours'] else ''}",
            mean_cell(numbers),
            str(len(numbers)),
            links(runs, scan["runs"][value]),
        )
        for value, numbers in scores.items()
    ]
    table = tables.table(("value", "k-NN on held-out images", "seeds", "records"), rows)
    return f"{title}\n\n{table}\n\n{conclusion(scan, scores)}"


def conclusion(scan: dict[str, Any], scores: dict[float, list[float]]) -> str:
    """Says whether another value is better than ours by more than the spread."""
    best = max(scores, key=lambda value: statistics.fmean(scores[value]))
    if scan["ours"] not in scores:
        return f"Best: {best:g}."
    if best == scan["ours"]:
        return f"Ours, {best:g}, is the best of them."
    found = judge(scores[best], scores[scan["ours"]])
    word = {"holds": "more than the spread"}.get(found.word, found.word)
    return f"Best: {best:g}, {found.difference:+.2f} points from ours ({word})."


def purity_tables(joined: Joined) -> list[str]:
    """Returns the purity of retrieved neighbours over training, a table for each tier and one for
    the lab.
    """
    names = joined.claims["runs"].items()
    tables_of = {
        tier["title"]: {method: tier["prefix"] + name for name, method in names}
        for tier in joined.claims["tiers"]
    }
    arms = lab_arms(joined.claims.get("lab", {"claims": []}))
    tables_of["The lab"] = {f"`{arm}`": arm for _, arm in arms}
    text = []
    for title, runs in tables_of.items():
        found = {label: histories(joined.runs, run) for label, run in runs.items()}
        found = {m: kept for m, cs in found.items() if (kept := [c for c in cs if PURITY in c])}
        measured = {e for cs in found.values() for e in cs[0]["epoch"] if e > 0}
        columns = spread_out(sorted(measured), 6)
        rows = [purity_row(label, curves, columns) for label, curves in found.items()]
        if rows:
            head = (
                "method",
                *(f"epoch {e}" for e in columns),
                "last quarter",
                "own image",
                "check",
            )
            text += [f"{tables.prose(title)}:", tables.table(head, rows)]
    return text


def purity_row(label: str, curves: Sequence[dict], columns: Sequence[int]) -> list[str]:
    purity, own = look_ups(curves)
    at = [percent(average(curves, PURITY, epoch)) for epoch in columns]
    passed = "yes" if passes(purity, own) else "no"
    return [tables.Markup(tables.prose(label)), *at, percent(purity), percent(own), passed]


def spread_out(epochs: Sequence[int], number: int) -> list[int]:
    """Picks at most `number` of the epochs, the first and the last among them."""
    if len(epochs) <= number:
        return [*epochs]
    step = (len(epochs) - 1) / (number - 1)
    return [epochs[round(i * step)] for i in range(number)]


def percent(value: float | None) -> str:
    return "" if value is None else f"{100 * value:.1f}"


def context_table(published: Sequence[dict[str, Any]]) -> str:
    rows = [
        (
            r["method"],
            r["arch"],
            tables.number_cell(r["epochs"]),
            tables.number_cell(r["batch"]),
            r["protocol"],
            tables.published_cell(r),
            r["source"],
        )
        for r in published
        if (r["pretraining"], r["dataset"]) == ("CIFAR-10", "CIFAR-10")
    ]
    head = ("method", "encoder", "epochs", "batch", "protocol", "published", "source")
    return tables.table(head, sorted(rows, key=lambda row: tables.method_order(row[0])))
