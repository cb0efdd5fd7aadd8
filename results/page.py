"""index.html: one page with everything in it, to be opened from the file."""

import base64
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from results import claims, summary, tables
from results.page_assets import SCRIPT, STYLE
from results.reproduce import PROTOCOLS


@dataclass(frozen=True)
class Column:
    """A heading; `where` is "wide" for one that narrow screens leave out, "more" for one that is
    shown when all columns are asked for.
    """

    name: str
    where: str = ""
    picks: bool = False  # whether rows can be filtered by its values


@dataclass(frozen=True)
class Cell:
    """What a cell holds, what it is sorted by where that is a number, and what a narrow screen
    shows below it of the columns that it leaves out.
    """

    html: str
    sort: float | None = None
    number: bool = False
    brief: str = ""


@dataclass(frozen=True)
class Line:
    """A row; `ours`: of a method that this repository has a recipe for."""

    cells: list[Cell]
    ours: bool = True
    empty: bool = False


def html(published, records, figures: list[dict[str, str]], folder: Path) -> str:
    """The page's text: a summary, the claims, tables that sort and filter, figures inside, nothing
    loaded.
    """
    rows, apart = tables.join(published, records)
    sections = [ours_section(apart, published), published_section(rows)]
    if any(row.records for row in rows):
        sections.reverse()
    of_claims = [figure for figure in figures if figure.get("page") == "cifar10.md"]
    others = [figure for figure in figures if figure not in of_claims]
    said = "".join(f"<li>{inline(text)}</li>" for text in summary.in_words(published, records))
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Results</title><style>{STYLE}</style></head><body><h1>Results</h1>",
        f'<section id="short"><h2>In short</h2><ul>{said}</ul></section>',
        '<nav><a href="#claims">Claims</a> <a href="#apart">Our runs</a> '
        '<a href="#compared">Published numbers</a>'
        + (' <a href="#figures">Figures</a>' if others else "")
        + "</nav>",
        claims_section(claims.load(), claims.recorded(records), of_claims, folder),
        *sections,
    ]
    if others:
        parts.append('<section id="figures"><h2>Figures</h2>')
        parts += [picture(figure, folder) for figure in others] + ["</section>"]
    parts.append(
        "<footer>Made by <code>python results/report.py</code> from the records and "
        "published.yaml, never typed. Percentages after the last epoch; a difference is given only "
        "where data, epochs, batch, encoder and protocol are the same.</footer>"
    )
    parts.append(f"<script>{SCRIPT}</script></body></html>")
    return "\n".join(parts) + "\n"


def inline(text: str) -> str:
    """A line of Markdown: **bold** and `code`."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def picture(figure: dict[str, str], folder: Path) -> str:
    data = base64.b64encode((folder / figure["file"]).read_bytes()).decode()
    plain = escape(figure["caption"].replace("`", ""))
    return (
        f'<figure><img alt="{plain}" src="data:image/png;base64,{data}">'
        f"<figcaption>{inline(figure['caption'])}<details><summary>command</summary>"
        f"<code>{escape(figure['command'])}</code></details></figcaption></figure>"
    )


# -- the claims -----------------------------------------------------------------------------------


def claims_section(what: dict[str, Any], runs: claims.Runs, figures, folder: Path) -> str:
    """A row for each claim, a column for each tier that has been run, then the claims' figures."""
    run = [tier for tier in what["tiers"] if summary.ones_of(tier, what, runs)]
    missing = [tier["short"] for tier in what["tiers"] if tier not in run]
    heads = "".join(
        f'<th scope="col">{inline(head)}</th>' for head in ["claim", *map(of_tier, run)]
    )
    body = "\n".join(
        f"<tr>{claim_cell(number, claim, runs)}"
        + "".join(verdict_cell(claim, tier, runs) for tier in run)
        + "</tr>"
        for number, claim in enumerate(what["claims"], 1)
    )
    text = [
        '<section id="claims"><h2>The papers\' claims at equal budget</h2>',
        "<p>Each claim compares two runs with the same images, encoder, batch, rate and number of "
        "epochs. It <em>holds</em> or <em>does not hold</em> where the means over seeds differ by "
        "more than the spread of a difference, √(s₁² + s₂²); else the difference is <em>within the "
        "spread</em>. One seed judges nothing. How the runs were made, and their tables: "
        '<a href="cifar10.md">cifar10.md</a> (a text file; GitHub shows it as a page).</p>',
        f'<div class="scroll"><table class="claims"><thead><tr>{heads}</tr></thead>',
        f"<tbody>\n{body}\n</tbody></table></div>",
    ]
    if missing:
        text.append(f"<p>Not run yet: {escape(', '.join(missing))}.</p>")
    return "\n".join([*text, *(picture(figure, folder) for figure in figures), "</section>"])


def of_tier(tier: dict[str, str]) -> str:
    return f"on {tier['short']}"


def claim_cell(number: int, claim: dict[str, Any], runs: claims.Runs) -> str:
    """The claim, its source, and what else is said of it behind a click."""
    more = [claim[name].strip() for name in ("differs", "tried") if claim.get(name)]
    text = f"{number}. {claim['claim'][0].upper()}{claim['claim'][1:]}"
    details = f"Source: {claim['source'].strip()}. {' '.join(more)}"
    label = "source, and what was tried" if claim.get("tried") else "source"
    return (
        f'<th scope="row">{inline(text)}<details><summary>{label}</summary>'
        f"{inline(claims.filled(details.strip(), runs))}</details></th>"
    )


def verdict_cell(claim: dict[str, Any], tier: dict[str, str], runs: claims.Runs) -> str:
    """The tier's verdict by each protocol that both runs were scored by."""
    said = []
    for evaluation, label in claims.SHOWN.items():
        names = [tier["prefix"] + claim[side] for side in claims.SIDES]
        pair = [claims.values(runs, name, PROTOCOLS[evaluation]) for name in names]
        if not all(pair):
            continue
        found = claims.judge(*pair)
        word = "one seed, not judged" if found.word == "one seed" else found.word
        numbers = f"{claims.mean_cell(pair[0])} against {claims.mean_cell(pair[1])}"
        said.append(
            f'<div><span class="verdict {found.word.replace(" ", "-")}">{word}</span> '
            f"<b>{found.difference:+.2f}</b> <small>{label} {numbers}</small></div>"
        )
    label = escape(of_tier(tier))
    return f'<td data-label="{label}">{"".join(said) or "<small>not run</small>"}</td>'


# -- tables ---------------------------------------------------------------------------------------


def published_section(rows: list[tables.Row]) -> str:
    """All published numbers, with ours beside them where there are, those first."""
    any_run = any(row.records for row in rows)
    notes = tables.notes_of(row.published for row in rows)
    columns = [Column("method", picks=True), Column("encoder", "wide")]
    columns += [Column("protocol", picks=True), Column("evaluated on", "wide", picks=True)]
    columns += [Column("metric", "wide"), Column("epochs", "wide"), Column("batch", "wide")]
    columns += [Column("published")]
    if any_run:
        columns += [Column("ours"), Column("difference", "wide"), Column("spread", "wide")]
    columns += [Column("source", "wide")]
    if any_run:
        columns += [Column("commit", "more"), Column("record", "wide")]
    lines = []
    for row in sorted(rows, key=lambda row: (not row.records, not tables.is_aim(row.published))):
        for name, r in row.records or [("", None)]:
            cells = published_cells(row.published, notes)
            if any_run:
                cells[-1:-1] = ours_cells(r, row.published)
                cells += [Cell(tables.commit_cell(r) if r else ""), links(name)]
            ours = tables.is_recipe(row.published["method"])
            lines.append(Line(cells, ours, row.published["value"] is None))
    title = "Published numbers, and ours beside them"
    if not any_run:
        title = "Published numbers, none of which we have run yet"
    footnotes = "".join(f'<li id="note-{n}">{inline(note)}</li>' for n, note in enumerate(notes, 1))
    text = section("compared", title, columns, lines)
    return text.replace("</section>", f'<ol class="notes">{footnotes}</ol></section>')


def published_cells(p: dict[str, Any], notes: Sequence[str]) -> list[Cell]:
    epochs, batch = tables.budget_cells(p)
    metric = "" if p["metric"] == "top1" else f", {p['metric']}"
    brief = f"{p['arch']}, {epochs} epochs"
    cells = [Cell(escape(tables.method_cell(p)), brief=brief), Cell(escape(p["arch"]))]
    cells += [Cell(escape(p["protocol"]), brief=f"{p['dataset']}{metric}")]
    cells += [Cell(escape(p["dataset"])), Cell(escape(p["metric"]))]
    cells += [Cell(epochs, p["epochs"], True), Cell(batch, p["batch"], True)]
    value = tables.UNAVAILABLE if p["value"] is None else tables.exact(p)
    source = escape(p["source"])
    if p["grade"] in tables.GRADE_WORDS:
        source += f" ({tables.GRADE_WORDS[p['grade']]})"
    if p.get("note"):
        number = notes.index(p["note"]) + 1
        title = escape(p["note"])
        source += f' <sup><a href="#note-{number}" title="{title}">{number}</a></sup>'
    return [*cells, Cell(value, p["value"], True), Cell(source)]


def ours_cells(r: tables.Record | None, p: dict[str, Any]) -> list[Cell]:
    if r is None:
        return [Cell("", number=True), Cell("", number=True), Cell("")]
    off = tables.difference(r, p)
    return [
        Cell(tables.percent(r["value"]), r["value"], True),
        Cell("" if off is None else f"{off:+.2f}", off, True),
        Cell(escape(tables.spread_cell(r))),
    ]


def ours_section(apart, published) -> str:
    """Our runs that no published number may stand beside."""
    columns = [Column("method", picks=True), Column("encoder", "wide")]
    columns += [Column("trained on", "wide", picks=True), Column("epochs", "wide")]
    columns += [Column("protocol", picks=True), Column("ours"), Column("spread", "wide")]
    columns += [Column("why not comparable", "wide"), Column("training", "wide")]
    columns += [Column("record", "wide"), Column("batch", "more"), Column("evaluated on", "more")]
    columns += [Column("images/s", "more"), Column("hardware", "more"), Column("commit", "more")]
    columns += [Column("metric", "more")]
    lines = [Line(apart_cells(name, r, published)) for name, r in apart]
    title = "Our runs under other settings, beside no paper's number"
    return section("apart", title, columns, lines)


def apart_cells(name: str, r: tables.Record, published) -> list[Cell]:
    what = r["pretraining"]
    data = tables.data_cell(what, "dataset")
    epochs = tables.number_cell(what["epochs"])
    speed = r["images_per_second"]
    on = tables.data_cell(r["dataset"])
    return [
        Cell(escape(tables.method_cell(r)), brief=f"{data}, {epochs} epochs"),
        Cell(escape(r["arch"])),
        Cell(escape(data)),
        Cell(epochs, what["epochs"], True),
        Cell(escape(tables.protocol_cell(r)), brief="" if on == data else on),
        Cell(tables.percent(r["value"]), r["value"], True),
        Cell(escape(tables.spread_cell(r))),
        Cell(escape(tables.why_apart(r, published))),
        Cell(tables.hours_cell(r), r["hours"], True),
        links(name),
        Cell(tables.number_cell(what["batch"]), what["batch"], True),
        Cell(escape(on)),
        Cell("" if speed is None else f"{speed:.0f}", speed, True),
        Cell(escape(r["hardware"])),
        Cell(escape(tables.commit_cell(r))),
        Cell(escape(r["metric"])),
    ]


def links(names: str) -> Cell:
    """ "record", or "1, 2, 3" for a row of several."""
    each = names.split()
    words = ["record"] if len(each) == 1 else [str(n) for n in range(1, len(each) + 1)]
    anchors = (
        f'<a href="records/{escape(name)}">{word}</a>'
        for name, word in zip(each, words, strict=True)
    )
    return Cell(", ".join(anchors))


def section(name: str, title: str, columns: Sequence[Column], lines: Sequence[Line]) -> str:
    """A heading, a bar of controls, a table. Rows of other methods stay out until asked for."""
    if not lines:
        return f'<section id="{name}"><h2>{escape(title)}</h2><p>None so far.</p></section>'
    picks = "".join(
        pick(number, column, (line.cells[number].html for line in lines))
        for number, column in enumerate(columns)
        if column.picks
    )
    others = sum(not line.ours for line in lines)
    every = (
        f'<button type="button" class="every" aria-pressed="false">Show all {len(lines)} rows, '
        "also methods without a recipe here</button>"
        if others
        else ""
    )
    heads = "".join(
        f'<th scope="col"{where(c)}><button type="button">{escape(c.name)}</button></th>'
        for c in columns
    )
    body = "\n".join(row(line, columns) for line in lines)
    return (
        f'<section class="data" id="{name}"><h2>{escape(title)}</h2><div class="bar">{every}'
        '<label>search <input type="search" placeholder="words, all must be in a row"></label>'
        f'{picks}<button type="button" class="columns" aria-pressed="false">All columns</button>'
        '<span class="count" aria-live="polite"></span></div>'
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n'
        "</tbody></table></div></section>"
    )


def pick(number: int, column: Column, values: Iterable[str]) -> str:
    options = "".join(f"<option>{value}</option>" for value in sorted(set(values)))
    return (
        f'<label>{escape(column.name)} <select data-column="{number}"><option value="">all</option>'
        f"{options}</select></label>"
    )


def where(column: Column) -> str:
    return f' class="{column.where}"' if column.where else ""


def row(line: Line, columns: Sequence[Column]) -> str:
    classes = " ".join(w for w, is_so in (("other", not line.ours), ("empty", line.empty)) if is_so)
    cells = []
    for cell, column in zip(line.cells, columns, strict=True):
        names = " ".join(n for n in ("number" if cell.number else "", column.where) if n)
        text = f' class="{names}"' if names else ""
        if cell.number:
            text += f' data-sort="{"" if cell.sort is None else cell.sort}"'
        if cell.brief:
            text += f' data-brief="{escape(cell.brief)}"'
        cells.append(f"<td{text}>{cell.html}</td>")
    start = f'<tr class="{classes}">' if classes else "<tr>"
    return f"{start}{''.join(cells)}</tr>"
