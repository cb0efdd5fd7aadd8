"""Makes the results pages from records and published numbers; nobody types them.

    python results/report.py          # writes the pages and draws the figures
    python results/report.py --check  # says what is stale, exits with 1
    python results/report.py compare RUN [RUN …] [--output compare.png]

The pages are README.md, claims.md, index.html and results.csv in results/, the block of results in
the README of the project and the lab's cells in the recipes' pages; the figures are those that are
made of records.

A number stands beside a paper's only where data, epochs, batch and protocol are the same; all
other records have tables of their own.
"""

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, command
from common.files import write
from common.run.help import in_80_columns
from results import (
    cells,
    claims_page,
    compare,
    curves,
    lab_figures,
    lab_page,
    page,
    spreadsheet,
    summary,
    tables,
)
from results.joined import HERE, Joined, fill, load

ROOT = HERE.parent
BEGIN, END = "<!-- results: made by results/report.py -->", "<!-- end of results -->"


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, say what is stale")
    arguments = parser.parse_args(argv)
    joined = load()
    pages = build(joined)
    figures = curves.stale(joined, HERE / "figures")
    of_lab = lab_figures.stale(joined, HERE / "figures")
    stale = [path for path, text in pages.items() if not is_stored(path, text, arguments.check)]
    if arguments.check:
        if stale or figures or of_lab:
            names = ", ".join(str(path.relative_to(ROOT)) for path in [*stale, *figures, *of_lab])
            raise UserError(f"out of date: {names}; run python results/report.py")
        print("the pages and figures say what the records say")
        return None
    for path in stale:
        write(path, pages[path])
    for path, numbers in figures.items():
        curves.draw(path, numbers)
    for path, numbers in of_lab.items():
        lab_figures.draw(path, numbers)
    wrote = [*stale, *figures, *of_lab]
    print("\n".join(f"wrote {path}" for path in wrote) or "nothing has changed")


def is_stored(path: Path, text: str, check: bool) -> bool:
    """Tells whether a page has this text. A page made with git's history has the times of commits,
    and that they were checked; a check without the history does not call that stale.
    """
    if not path.exists():
        return False
    stored = path.read_text()
    return stored == text or (check and lab_page.is_without_history(text, stored))


def build(
    joined: Joined, folder: Path = HERE, readme: Path = ROOT / "README.md"
) -> dict[Path, str]:
    """Returns the text of every page."""
    said = summary.sentences(joined)
    pages = {
        folder / "README.md": markdown(joined, said),
        folder / "claims.md": claims_page.markdown(joined),
        folder / "index.html": page.html(joined, said),
        folder / spreadsheet.NAME: spreadsheet.text(joined),
    }
    pages |= cells.pages(joined, readme.parent / "recipes")
    if readme.exists():
        pages[readme] = in_readme(readme.read_text(), root_part(joined, said))
    return pages


def as_list(said: Iterable[str]) -> str:
    return "\n".join(f"- {tables.prose(text)}" for text in said)


# -- markdown -------------------------------------------------------------------------------------

COMPARED = ("method", "encoder", "epochs", "batch", "published", "source", "ours", "difference")
COMPARED += ("spread", "commit", "training", "record")
APART = ("method", "encoder", "trained on", "epochs", "batch", "evaluated on", "ours", "spread")
APART += ("why not comparable", "commit", "training", "record")
NOT_RUN = ("method", "encoder", "protocol", "data", "epochs", "batch", "published", "source")


def markdown(joined: Joined, said: Sequence[str]) -> str:
    """Returns the text of results/README.md."""
    return fill(
        "README.md",
        summary=as_list(said),
        beside="\n".join(beside(joined.rows)),
        apart="\n".join(under_other_settings(joined)),
        not_run="\n".join(not_run(joined.rows)),
        figures=tables.pictures(f for f in joined.figures if f.get("page") != "claims.md"),
    )


def beside(rows: Iterable[tables.Row]) -> list[str]:
    """Returns a table for each protocol and data set with a number of ours next to a paper's."""
    rows = [row for row in rows if row.records]
    if not rows:
        return ["None so far: no run of ours has had a paper's data, epochs and batch."]
    text = []
    for protocol, dataset in groups(
        (r.published["protocol"], r.published["dataset"]) for r in rows
    ):
        of = [
            r
            for r in rows
            if (r.published["protocol"], r.published["dataset"]) == (protocol, dataset)
        ]
        of.sort(key=lambda row: tables.published_order(row.published))
        notes = tables.notes_of(row.published for row in of)
        text += [f"### {tables.plain(protocol)}, {tables.plain(dataset)}\n"]
        text += [tables.table(COMPARED, compared_cells(of, notes))]
        text += ["", *footnotes(notes)]
    return text


def under_other_settings(joined: Joined) -> list[str]:
    """Returns a table for each protocol that ours were scored by, next to no paper's number; of the
    lab's runs a pointer.
    """
    apart = [(n, r) for n, r in joined.apart if not joined.of_lab(r)]
    text = [] if joined.apart else ["None so far."]
    if left := len(joined.apart) - len(apart):
        rows = "1 row is" if left == 1 else f"{left} rows are"
        text += [f"The lab's {rows} in [claims.md](claims.md), index.html and results.csv.\n"]
    for protocol in sorted({r["protocol"] for _, r in apart}, key=tables.protocol_order):
        of = [(n, r) for n, r in apart if r["protocol"] == protocol]
        of.sort(key=lambda item: apart_order(item[1]))
        cells = (apart_cells(n, r, joined.published) for n, r in of)
        text += [f"### {tables.plain(protocol)}\n", tables.table(APART, cells), ""]
    return text


def not_run(rows: Iterable[tables.Row]) -> list[str]:
    """Returns one table of the numbers that this repository aims at and has no run for."""
    of = [row for row in rows if not row.records and tables.is_aim(row.published)]
    of.sort(key=lambda row: tables.whole_order(row.published))
    notes = tables.notes_of(row.published for row in of)
    cells = []
    for p in (row.published for row in of):
        data = p["dataset"] + metric_cell(p)
        left = [tables.method_cell(p), p["arch"], p["protocol"], data, *tables.budget_cells(p)]
        cells.append([*left, tables.published_cell(p), source_cell(p, notes)])
    return [tables.table(NOT_RUN, cells), "", *footnotes(notes)]


def source_cell(row: dict[str, Any], notes: Sequence[str]) -> tables.Markup:
    """Returns a published number's source, with the number of its note, like <sup>2</sup>."""
    mark = f" <sup>{notes.index(row['note']) + 1}</sup>" if row.get("note") in notes else ""
    return tables.Markup(tables.plain(row["source"]) + mark)


def footnotes(notes: Sequence[str]) -> list[str]:
    text = [f"<sup>{number}</sup> {tables.prose(note)}  " for number, note in enumerate(notes, 1)]
    return [*text, ""] if text else []


def metric_cell(row: dict[str, Any]) -> str:
    return "" if row["metric"] == "top1" else f" ({row['metric']})"


def groups(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    return sorted(set(pairs), key=tables.group_order)


def compared_cells(rows: Iterable[tables.Row], notes: Sequence[str]) -> Iterable[list[str]]:
    for row in rows:
        p = row.published
        for name, r in row.records:
            off = tables.difference(r, p)
            yield [
                tables.method_cell(r),
                p["arch"],
                *tables.budget_cells(p),
                tables.published_cell(p) + metric_cell(p),
                source_cell(p, notes),
                tables.percent(r["value"]),
                "" if off is None else f"{off:+.2f}",
                tables.spread_cell(r),
                tables.commit_cell(r),
                tables.hours_cell(r),
                links(name),
            ]


def apart_order(r: tables.Record) -> tuple:
    what = r["pretraining"]
    return (what["dataset"], r["arch"], what["epochs"] or 0, *tables.method_order(r["method"]))


def apart_cells(name: str, r: tables.Record, published) -> list[str]:
    what = r["pretraining"]
    return [
        r["method"],
        r["arch"],
        tables.data_cell(what, "dataset"),
        tables.number_cell(what["epochs"]),
        tables.number_cell(what["batch"]),
        tables.data_cell(r["dataset"]),
        tables.percent(r["value"]) + metric_cell(r),
        tables.spread_cell(r),
        tables.why_apart(r, published) + ("; protocol assumed" if r.get("assumed") else ""),
        tables.commit_cell(r),
        tables.hours_cell(r),
        links(name),
    ]


def links(names: str) -> tables.Markup:
    """Links to each of a row's records."""
    each = names.split()
    words = ["record"] if len(each) == 1 else range(1, len(each) + 1)
    both = zip(words, each, strict=True)
    return tables.Markup(", ".join(f"[{word}](records/{name})" for word, name in both))


# -- the root README ------------------------------------------------------------------------------


def root_part(joined: Joined, said: Sequence[str]) -> str:
    """Returns the root README's part: what the records come to, and the lab's pictures."""
    figures = [f for f in lab_figures.shown(joined) if f["file"] in lab_figures.FRONT]
    return fill(
        "root.md",
        summary=as_list(said[:3]),
        figures=tables.pictures(figures, "results/figures") if figures else "",
    ).rstrip()


def in_readme(readme: str, text: str) -> str:
    """Returns the README with its results section replaced."""
    if BEGIN not in readme or END not in readme:
        raise UserError(f"README.md has no place for the results: put '{BEGIN}' and '{END}' in it")
    before, rest = readme.split(BEGIN, 1)
    after = rest.rsplit(END, 1)[1]
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


if __name__ == "__main__":
    code = command(main)
    sys.exit(1 if code and "--check" in sys.argv else code)
