"""index.html: one page with everything in it, to be opened from the file."""

import base64
import html as escape
import json
from pathlib import Path

from results import tables

STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 1300px; padding: 0 1rem;
  color: #1b1b1b; background: #fff }
h1 { font-size: 1.6rem } h2 { font-size: 1.2rem; margin-top: 2.5rem }
.bar { display: flex; gap: .6rem; flex-wrap: wrap; align-items: center; margin: .6rem 0 }
input, select { font: inherit; padding: .25rem .5rem; border: 1px solid #999; border-radius: 4px }
.scroll { overflow-x: auto }
table { border-collapse: collapse; width: 100%; font-size: .88rem }
th, td { text-align: left; padding: .3rem .55rem; border-bottom: 1px solid #ddd;
  vertical-align: top }
th { position: sticky; top: 0; background: #f4f4f4; white-space: nowrap }
th button { all: unset; cursor: pointer; font-weight: 600 }
th button:focus-visible { outline: 2px solid #06c }
td.number { text-align: right; font-variant-numeric: tabular-nums }
tr.empty td { color: #767676 }
figure { margin: 1.5rem 0 } figure img { max-width: 100%; height: auto; border: 1px solid #ddd }
figcaption { color: #444; font-size: .9rem } code { font-size: .85em; background: #f4f4f4 }
@media (prefers-color-scheme: dark) {
  body { background: #16181b; color: #e6e6e6 } th { background: #23262a }
  th, td { border-color: #3a3d42 } tr.empty td { color: #9a9a9a } code { background: #23262a }
  input, select { background: #23262a; color: inherit } figcaption { color: #bbb }
  figure img { background: #fff }
}
"""

SCRIPT = """
'use strict';
for (const section of document.querySelectorAll('section.data')) {
  const body = section.querySelector('tbody'), rows = [...body.rows];
  const search = section.querySelector('input'), picks = [...section.querySelectorAll('select')];
  const count = section.querySelector('.count');
  const shown = row => {
    const words = search.value.toLowerCase().split(/\\s+/).filter(Boolean);
    const text = row.textContent.toLowerCase();
    const picked = pick => row.cells[+pick.dataset.column].textContent === pick.value;
    return words.every(word => text.includes(word)) &&
      picks.every(pick => !pick.value || picked(pick));
  };
  const filter = () => {
    let left = 0;
    for (const row of rows) { row.hidden = !shown(row); left += !row.hidden; }
    count.textContent = left + ' of ' + rows.length + ' rows';
  };
  search.addEventListener('input', filter);
  picks.forEach(pick => pick.addEventListener('change', filter));
  section.querySelectorAll('th button').forEach((button, column) => {
    button.addEventListener('click', () => {
      const head = button.closest('th'), up = head.getAttribute('aria-sort') !== 'ascending';
      section.querySelectorAll('th').forEach(other => other.removeAttribute('aria-sort'));
      head.setAttribute('aria-sort', up ? 'ascending' : 'descending');
      const key = row => row.cells[column].dataset.sort ?? row.cells[column].textContent;
      const numeric = rows.every(row => key(row) === '' || !isNaN(parseFloat(key(row))));
      const order = (a, b) => {
        const x = key(a), y = key(b);
        if (x === '' || y === '') return (x === '') - (y === '');  // empty cells stay last
        const by = numeric ? parseFloat(x) - parseFloat(y) : x.localeCompare(y);
        return up ? by : -by;
      };
      body.append(...[...rows].sort(order));
    });
  });
  filter();
}
"""

Cell = tuple[str, float | None] | str


def html(published, records, figures: list[dict[str, str]], folder: Path) -> str:
    """The page's text: tables that sort and filter, figures inside, nothing loaded."""
    rows, apart = tables.join(published, records)
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>Results</title><style>{STYLE}</style></head><body><h1>Results</h1>",
        "<p>Made by <code>python results/report.py</code> from the records and published.yaml. "
        "Percentages after the last epoch; a difference is given only where data, epochs, batch, "
        "encoder and protocol are the same. Click a column to sort by it. Whether the papers' "
        'claims hold at equal budget: <a href="cifar10.md">cifar10.md</a>.</p>',
        section("compared", "Published numbers, and ours beside them", *compared(rows)),
        section(
            "apart",
            "Ours under other settings, beside no paper's number",
            *others(apart, published),
        ),
    ]
    if figures:
        parts.append("<h2>Figures</h2>")
    for figure in figures:
        picture = base64.b64encode((folder / figure["file"]).read_bytes()).decode()
        caption = escape.escape(figure["caption"])
        parts.append(
            f'<figure><img alt="{caption}" src="data:image/png;base64,{picture}">'
            f"<figcaption>{caption} <code>{escape.escape(figure['command'])}</code></figcaption>"
            "</figure>"
        )
    parts.append(f"<script>{SCRIPT}</script></body></html>")
    return "\n".join(parts) + "\n"


def compared(rows: list[tables.Row]) -> tuple[list[str], list[list[Cell]], tuple[str, ...]]:
    head = ["method", "encoder", "protocol", "evaluated on", "metric", "epochs", "batch"]
    head += ["published", "ours", "difference", "spread", "grade", "source", "commit", "record"]
    cells: list[list[Cell]] = []
    for row in rows:
        p = row.published
        left: list[Cell] = [tables.method_cell(p), p["arch"], p["protocol"], p["dataset"]]
        left.append(p["metric"])
        for name, text in zip(tables.BUDGET, tables.budget_cells(p), strict=True):
            left.append((text, number(p[name])[1]))
        left.append(("not at hand", None) if p["value"] is None else (tables.exact(p), p["value"]))
        origin: list[Cell] = [p["grade"], p["source"]]
        for name, r in row.records or [("", None)]:
            if r is None:
                cells.append([*left, ("", None), ("", None), "", *origin, "", ""])
                continue
            ours = [number(r["value"]), number(tables.difference(r, p), signed=True)]
            ours.append(tables.spread_cell(r))
            what = [tables.method_cell(r), *left[1:]]
            cells.append([*what, *ours, *origin, tables.commit_cell(r), link(name)])
    return head, cells, ("method", "protocol", "evaluated on")


def others(apart, published) -> tuple[list[str], list[list[Cell]], tuple[str, ...]]:
    head = ["method", "encoder", "trained on", "epochs", "batch", "protocol", "evaluated on"]
    head += ["metric", "ours", "spread", "why apart", "settings", "images/s", "hours", "hardware"]
    head += ["commit", "record"]
    cells: list[list[Cell]] = []
    for name, r in apart:
        what = r["pretraining"]
        settings = json.dumps(r.get("settings") or {})
        cells.append(
            [
                r["method"],
                r["arch"],
                tables.data_cell(what, "dataset"),
                number(what["epochs"]),
                number(what["batch"]),
                tables.protocol_cell(r),
                tables.data_cell(r["dataset"]),
                r["metric"],
                number(r["value"]),
                tables.spread_cell(r),
                tables.why_apart(r, published),
                "" if settings == "{}" else settings,
                number(r["images_per_second"]),
                number(r["hours"]),
                r["hardware"],
                tables.commit_cell(r),
                link(name),
            ]
        )
    return head, cells, ("method", "trained on", "protocol")


def number(value: float | None, otherwise: str = "", signed: bool = False) -> Cell:
    if value is None:
        return otherwise, None
    return (f"{value:+.2f}" if signed else f"{value:g}"), float(value)


def link(names: str) -> str:
    each = [f'<a href="records/{n}">{n.removesuffix(".json")}</a>' for n in names.split()]
    return "\x00" + "<br>".join(each)


def section(
    name: str, title: str, head: list[str], rows: list[list[Cell]], filters: tuple[str, ...]
) -> str:
    picks = []
    for label in filters:
        column = head.index(label)
        values = sorted(
            {str(r[column][0] if isinstance(r[column], tuple) else r[column]) for r in rows}
        )
        options = "".join(f"<option>{escape.escape(v)}</option>" for v in values)
        picks.append(
            f'<label>{label} <select data-column="{column}"><option value="">all</option>'
            f"{options}</select></label>"
        )
    heads = "".join(f'<th scope="col"><button type="button">{h}</button></th>' for h in head)
    body = "\n".join(line(row) for row in rows)
    return (
        f'<section class="data" id="{name}"><h2>{title}</h2><div class="bar">'
        f'<label>search <input type="search" placeholder="words, all must be in a row"></label>'
        f'{"".join(picks)}<span class="count" aria-live="polite"></span></div>'
        f'<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>\n{body}\n'
        "</tbody></table></div></section>"
    )


def line(row: list[Cell]) -> str:
    cells = []
    for cell in row:
        if isinstance(cell, tuple):
            text, value = cell
            cells.append(
                f'<td class="number" data-sort="{"" if value is None else value}">{text}</td>'
            )
        elif cell.startswith("\x00"):
            cells.append(f"<td>{cell[1:]}</td>")
        else:
            cells.append(f"<td>{escape.escape(cell)}</td>")
    empty = ' class="empty"' if ("not at hand", None) in row else ""
    return f"<tr{empty}>{''.join(cells)}</tr>"
