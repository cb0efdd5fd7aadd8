"""index.html: one page with all tables and figures, to be opened from the file."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from html import escape
from typing import Any

from results import claims, lab, lab_figures, lab_page, summary, tables
from results.joined import HERE, Joined, fill


@dataclass(frozen=True)
class Column:
    """A heading. `where` is "wide" for one that narrow screens leave out, "more" for one that is
    shown when all columns are asked for. A cell breaks its line only if `wraps` says so.
    """

    name: str
    where: str = ""
    picks: bool = False  # whether rows can be filtered by its values
    wraps: bool = False


@dataclass(frozen=True)
class Cell:
    """A cell's text, the number that it is sorted by, if any, and what a narrow screen shows below
    it of the columns that it leaves out.
    """

    html: str
    sort: float | None = None
    number: bool = False
    brief: str = ""


@dataclass(frozen=True)
class Line:
    """A row; `ours` says that its method has a recipe in this repository."""

    cells: list[Cell]
    ours: bool = True
    empty: bool = False


@dataclass(frozen=True)
class Table:
    """A section of the page with one table; `notes` are numbered below it."""

    name: str
    title: str
    columns: list[Column]
    lines: list[Line]
    notes: Sequence[str] = ()


def html(joined: Joined, said: Sequence[str]) -> str:
    """Returns the page's text: a summary, the claims, tables that sort and filter, figures. It
    loads the pictures next to it and nothing else.
    """
    ours = [ours_table(joined), published_table(joined.rows)]
    if any(row.records for row in joined.rows):
        ours.reverse()
    of_claims = [figure for figure in joined.figures if figure.get("page") == "claims.md"]
    others = [figure for figure in joined.figures if figure not in of_claims]
    of_lab = lab_table(joined), *map(picture, lab_figures.shown(joined))
    templates = HERE / "templates"
    return fill(
        "index.html",
        style=(templates / "index.css").read_text() + "".join(map(column_style, ours)),
        summary="".join(f"<li>{inline(text)}</li>" for text in said),
        lab="\n".join(of_lab),
        claims="\n".join([claims_table(joined), *map(picture, of_claims)]),
        tables="\n".join(map(section, ours)),
        figures="\n".join(map(picture, others)) or "<p>None so far.</p>",
        script=(templates / "index.js").read_text(),
    )


def inline(text: str) -> str:
    """Turns a line of Markdown, with **bold** and `code`, into HTML."""
    text = re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text, quote=False))
    return re.sub(r"\*\*(.+?)\*\*", r"<strong>\1</strong>", text)


def picture(figure: dict[str, str]) -> str:
    plain = escape(figure["caption"].replace("`", ""))
    return (
        f'<figure><img alt="{plain}" src="figures/{escape(figure["file"])}">'
        f"<figcaption>{inline(figure['caption'])}<details><summary>command</summary>"
        f"<code>{escape(figure['command'])}</code></details></figcaption></figure>"
    )


# -- the claims -----------------------------------------------------------------------------------


def claims_table(joined: Joined) -> str:
    """Returns a row for each claim, a column for each tier that was run; and what the tiers are."""
    what, runs = joined.claims, joined.runs
    run = [tier for tier in what["tiers"] if summary.ones_of(tier, what, runs)]
    missing = [tier["short"] for tier in what["tiers"] if tier not in run]
    heads = "".join(
        f'<th scope="col">{inline(head)}</th>' for head in ["claim", *map(of_tier, run)]
    )
    body = "\n".join(
        f"<tr>{claim_cell(number, claim, joined)}"
        + "".join(verdict_cell(claim, tier, runs) for tier in run)
        + "</tr>"
        for number, claim in enumerate(what["claims"], 1)
    )
    text = [
        f'<div class="scroll"><table class="claims"><thead><tr>{heads}</tr></thead>',
        f"<tbody>\n{body}\n</tbody></table></div>",
    ]
    text += [f"<p><b>{inline(t['title'])}</b>: {inline(t['note'].strip())}</p>" for t in run]
    if missing:
        text.append(f"<p><b>Not run yet</b>: {escape(', '.join(missing))}.</p>")
    return "\n".join(text)


def lab_table(joined: Joined) -> str:
    """Returns a row for each primary claim of the lab; empty without a lab."""
    what = joined.claims.get("lab")
    if not what:
        return ""
    judged = lab.judge_all(what["claims"], joined.runs)
    heads = "".join(f'<th scope="col">{head}</th>' for head in lab_page.HEAD)
    body = ""
    primary = [claim for claim in what["claims"] if claim["primary"]]
    for first, *cells in lab_page.rows(primary, joined, judged):
        body += f'<tr><th scope="row">{inline(first)}</th>'
        for head, cell in zip(lab_page.HEAD[1:], cells, strict=True):
            body += f'<td data-label="{head}">{inline(cell)}</td>'
        body += "</tr>\n"
    return (
        "<h3>The lab: fixed before the runs, judged over seeds</h3>"
        f'<div class="scroll"><table class="claims"><thead><tr>{heads}</tr></thead>'
        f"<tbody>\n{body}</tbody></table></div><p>Nothing here can refute a claim about ImageNet. "
        'What the words mean: <a href="claims.md">claims.md</a>.</p>'
    )


def of_tier(tier: dict[str, str]) -> str:
    return f"on {tier['short']}"


def claim_cell(number: int, claim: dict[str, Any], joined: Joined) -> str:
    """Writes the claim, its source, and what else is said of it behind a click."""
    text = f"{number}. {claim['claim'][0].upper()}{claim['claim'][1:]}"
    details = f"Source: {claim['source'].strip()}. {' '.join(claims.notes(claim))}"
    label = "source, and what was tried" if claim.get("tried") else "source"
    return (
        f'<th scope="row">{inline(text)}<details><summary>{label}</summary>'
        f"{inline(claims.filled(details.strip(), joined.runs, joined.plan))}</details></th>"
    )


def verdict_cell(claim: dict[str, Any], tier: dict[str, str], runs: claims.Runs) -> str:
    """Writes the tier's verdict by each protocol that both runs were scored by."""
    said = []
    for evaluation, label in claims.SHOWN.items():
        pair = claims.pair(claim, tier, runs, evaluation)
        if not pair:
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


def published_table(rows: list[tables.Row]) -> Table:
    """Returns all published numbers, with ours next to them if there are any, those first."""
    any_run = any(row.records for row in rows)
    notes = tables.notes_of(row.published for row in rows)
    columns = [Column("method", picks=True, wraps=True), Column("encoder", "wide")]
    columns += [Column("protocol", picks=True, wraps=True)]
    columns += [Column("evaluated on", "wide", picks=True)]
    columns += [Column("metric", "wide"), Column("epochs", "wide"), Column("batch", "wide")]
    columns += [Column("published")]
    if any_run:
        columns += [Column("ours"), Column("difference", "wide"), Column("spread", "wide")]
    columns += [Column("source", "wide", wraps=True)]
    if any_run:
        columns += [Column("commit", "more"), Column("record", "wide")]
    lines = []
    for row in sorted(rows, key=position):
        for name, r in row.records or [("", None)]:
            cells = published_cells(row.published, notes)
            if r:  # with the settings that the published number leaves open
                cells[0] = replace(cells[0], html=escape(tables.method_cell(r)))
            if any_run:
                cells[-1:-1] = ours_cells(r, row.published)
                cells += [Cell(tables.commit_cell(r) if r else ""), links(name)]
            ours = tables.is_recipe(row.published["method"])
            lines.append(Line(cells, ours, row.published["value"] is None))
    title = "Published numbers, and ours beside them"
    if not any_run:
        title = "Published numbers, none of which we have run yet"
    return Table("compared", title, columns, lines, notes)


def position(row: tables.Row) -> tuple:
    """Returns a sort key: numbers next to ours first, then those this repository aims at."""
    p = row.published
    return not row.records, not tables.is_aim(p), *tables.whole_order(p)


def published_cells(p: dict[str, Any], notes: Sequence[str]) -> list[Cell]:
    epochs, batch = tables.budget_cells(p)
    metric = "" if p["metric"] == "top1" else f", {p['metric']}"
    brief = f"{p['arch']}, {epochs} epochs, batch {batch}; {p['source']}"
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


def ours_table(joined: Joined) -> Table:
    """Returns our runs that may not stand next to any published number."""
    columns = [Column("method", picks=True, wraps=True), Column("settings", "wide", wraps=True)]
    columns += [Column("encoder", "wide"), Column("trained on", "wide", picks=True, wraps=True)]
    columns += [Column("epochs", "wide"), Column("protocol", picks=True, wraps=True)]
    columns += [Column("ours"), Column("spread", "wide", wraps=True)]
    columns += [Column("why not comparable", "wide", wraps=True), Column("training", "more")]
    columns += [Column("record", "wide"), Column("batch", "more")]
    columns += [Column("evaluated on", "more", wraps=True)]
    columns += [Column("images/s", "more"), Column("hardware", "more"), Column("commit", "more")]
    columns += [Column("metric", "more")]
    lines = [
        Line(apart_cells(name, r, joined.published))
        for name, r in sorted(joined.apart, key=lambda item: apart_position(item[1]))
    ]
    title = "Our runs under other settings, beside no paper's number"
    return Table("apart", title, columns, lines)


def apart_position(r: tables.Record) -> tuple:
    """Returns a sort key: by what was trained on, then by protocol and method."""
    what = r["pretraining"]
    data = (what["dataset"], what["incomplete"] or "", *tables.protocol_order(r["protocol"]))
    return (*data, *tables.method_order(r["method"]), what["epochs"] or 0, tables.method_cell(r))


def apart_cells(name: str, r: tables.Record, published) -> list[Cell]:
    what = r["pretraining"]
    data = tables.data_cell(what, "dataset")
    epochs = tables.number_cell(what["epochs"])
    speed = r["images_per_second"]
    on = tables.data_cell(r["dataset"])
    settings, budget = tables.settings_cell(r), f"{data}, {epochs} epochs"
    why = tables.why_apart(r, published, settings=False)
    return [
        Cell(escape(r["method"]), brief="; ".join(t for t in (settings, budget) if t)),
        Cell(escape(settings)),
        Cell(escape(r["arch"])),
        Cell(escape(data)),
        Cell(epochs, what["epochs"], True),
        Cell(escape(tables.protocol_cell(r)), brief="" if on == data else on),
        Cell(tables.percent(r["value"]), r["value"], True),
        Cell(escape(tables.spread_cell(r))),
        Cell(escape(why or "settings")),
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
    """Links a row's records, as "record", or as "1, 2, 3" if it has several."""
    each = names.split()
    words = ["record"] if len(each) == 1 else [str(n) for n in range(1, len(each) + 1)]
    anchors = (
        f'<a href="records/{escape(name)}">{word}</a>'
        for name, word in zip(each, words, strict=True)
    )
    return Cell(", ".join(anchors))


def section(table: Table) -> str:
    """Returns a heading, a bar of controls, a table. Other methods' rows show when asked for."""
    name, title, columns, lines = table.name, escape(table.title), table.columns, table.lines
    if not lines:
        return f'<section id="{name}"><h2>{title}</h2><p>None so far.</p></section>'
    picks = "".join(
        pick(number, column, (line.cells[number].html for line in lines))
        for number, column in enumerate(columns)
        if column.picks
    )
    every = ""
    if not all(line.ours for line in lines):
        every = '<button type="button" class="every" aria-pressed="false">'
        every += f"Show all {len(lines)} rows, also methods without a recipe here</button>"
    heads = "".join(
        f'<th scope="col"><button type="button">{escape(column.name)}</button></th>'
        for column in columns
    )
    body = "\n".join(map(row, lines))
    notes = "".join(
        f'<li id="note-{number}">{inline(note)}</li>' for number, note in enumerate(table.notes, 1)
    )
    return (
        f'<section class="data" id="{name}"><h2>{title}</h2><div class="bar">{every}'
        '<label>search <input type="search" placeholder="SNCLR linear"></label>'
        f'{picks}<button type="button" class="columns" aria-pressed="false">All columns</button>'
        '<span class="count" aria-live="polite"></span></div>'
        f'<div class="scroll" tabindex="0"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n'
        f"</tbody></table></div>{notes and f'<ol class=notes>{notes}</ol>'}</section>"
    )


def pick(number: int, column: Column, values: Iterable[str]) -> str:
    options = "".join(f"<option>{value}</option>" for value in sorted(set(values)))
    return (
        f'<label>{escape(column.name)} <select data-column="{number}"><option value="">all</option>'
        f"{options}</select></label>"
    )


def column_style(table: Table) -> str:
    """Says how a table's columns look, once for all of its rows: so the page is half the size."""
    if not table.lines:
        return ""

    def chosen(which: Iterable[bool]) -> str:
        numbers = [n for n, is_so in enumerate(which, 1) if is_so]
        return ", ".join(f":is(td, th):nth-child({n})" for n in numbers) or ":not(*)"

    columns, here = table.columns, f"#{table.name}"
    some = f"{here}:not(.every-column)"
    wide, more = (chosen(c.where == w for c in columns) for w in ("wide", "more"))
    numbers = chosen(cell.number for cell in table.lines[0].cells)
    return (
        f"{some} :is({more}) {{ display: none }}\n"
        f"@media (max-width: 800px) {{ {some} :is({wide}) {{ display: none }} }}\n"
        f"{here} :is({numbers}) {{ text-align: right; font-variant-numeric: tabular-nums }}\n"
        f"{here} td:is({chosen(not c.wraps for c in columns)}) {{ white-space: nowrap }}\n"
    )


def row(line: Line) -> str:
    kinds = " ".join(w for w, is_so in (("other", not line.ours), ("empty", line.empty)) if is_so)
    start = f'<tr class="{kinds}">' if kinds else "<tr>"
    return f"{start}{''.join(map(cell_html, line.cells))}</tr>"


def cell_html(cell: Cell) -> str:
    """Returns a cell of a row, with what it is sorted by if its text does not begin with that."""
    text = ""
    if cell.number and cell.html and not begins_with(cell.html, cell.sort):
        text += f' data-sort="{"" if cell.sort is None else cell.sort}"'
    if cell.brief:
        text += f' data-brief="{escape(cell.brief)}"'
    return f"<td{text}>{cell.html}</td>"


def begins_with(text: str, value: float | None) -> bool:
    try:
        return float(text.split()[0]) == value
    except ValueError:
        return False
