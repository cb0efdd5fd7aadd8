"""The results pages, made of records and published numbers, never typed.

    python results/report.py                 # writes README.md here, index.html, the root's table,
                                             # and draws the figures that are made of records
    python results/report.py --check         # says what is out of date and exits with 1
    python results/report.py compare RUN [RUN …] [--output compare.png]

A number stands beside a paper's only where data, epochs, batch and protocol are the same; all
other records have tables of their own.
"""

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError, command
from results import claims, compare, curves, page, record, tables

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
FIGURES = HERE / "figures"
BEGIN, END = "<!-- results: made by results/report.py -->", "<!-- end of results -->"

HEAD = """# Results

Made by `python results/report.py` from [published.yaml](published.yaml) and the files in
[records/](records/): change those, not this page. [index.html](index.html) has the same tables,
sortable and filterable, with all published numbers and the figures. Whether the papers' claims hold
at equal budget: [cifar10.md](cifar10.md).

Numbers are percentages after the **last** epoch. *Difference* is ours minus published, in points,
and is given only where data, epochs, batch, encoder and protocol are the same. *Spread* is the
standard deviation over seeds. "Published, not at hand": the paper has this number in a table that
no source at hand holds. (OCR): read by a machine from slides; (secondary): quoted by another work;
(assumed): the source does not state it, our command takes it.
"""


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["compare"]:
        return compare.main(argv[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, say what is stale")
    arguments = parser.parse_args(argv)
    pages = build()
    figures = curves.stale(load_figures(FIGURES), record.load_shown(), FIGURES)
    stale = [path for path, text in pages.items() if not path.exists() or path.read_text() != text]
    if arguments.check:
        if stale or figures:
            names = ", ".join(str(path.relative_to(ROOT)) for path in [*stale, *figures])
            raise UserError(f"out of date: {names}; run python results/report.py")
        print("the pages and figures say what the records say")
        return None
    for path in stale:
        path.write_text(pages[path])
    for path, numbers in figures.items():
        curves.draw(path, numbers)
    print("\n".join(f"wrote {path}" for path in [*stale, *figures]) or "nothing has changed")


def build(folder: Path = HERE, readme: Path = ROOT / "README.md") -> dict[Path, str]:
    """The text of every page, made of published.yaml, records/ and figures/ in `folder`."""
    published = tables.load_published(folder / "published.yaml")
    records = record.load_shown(folder / "records")
    figures = load_figures(folder / "figures")
    of_claims = [figure for figure in figures if figure.get("page") == "cifar10.md"]
    others = [figure for figure in figures if figure not in of_claims]
    pages = {
        folder / "README.md": markdown(published, records, others),
        folder / "cifar10.md": claims.markdown(published, records, of_claims),
        folder / "index.html": page.html(published, records, others, folder / "figures"),
    }
    if readme.exists():
        pages[readme] = in_readme(readme.read_text(), summary(published, records))
    return pages


def load_figures(folder: Path) -> list[dict[str, str]]:
    """figures.yaml: file, caption, command of each picture, and its page where that is neither
    README.md nor index.html; UserError for a missing one.
    """
    listed = folder / "figures.yaml"
    if not listed.exists():
        return []
    figures = yaml.safe_load(listed.read_text()) or []
    for figure in figures:
        if not (folder / figure["file"]).exists():
            raise UserError(f"{listed} names {figure['file']}, which is not there")
    return figures


# -- markdown -------------------------------------------------------------------------------------

COMPARED = ("method", "encoder", "epochs", "batch", "published", "source", "ours", "difference")
COMPARED += ("spread", "commit", "hours", "record")
APART = ("method", "encoder", "trained on", "epochs", "batch", "evaluated on", "ours", "spread")
APART += ("why apart", "commit", "hours", "record")


def markdown(published, records, figures) -> str:
    rows, apart = tables.join(published, records)
    rows = [row for row in rows if is_ours(row.published) or row.records]
    text = [HEAD, "## The papers' numbers, and ours\n"]
    for protocol, dataset in groups(
        (r.published["protocol"], r.published["dataset"]) for r in rows
    ):
        of = [
            r
            for r in rows
            if (r.published["protocol"], r.published["dataset"]) == (protocol, dataset)
        ]
        of.sort(key=lambda r: (*tables.method_order(r.published["method"]), r.published["arch"]))
        text += [f"### {protocol}, {dataset}\n", tables.table(COMPARED, compared_cells(of)), ""]
    text.append("## Ours under other settings, beside no paper's number\n")
    if not apart:
        text.append("None so far.\n")
    for protocol in sorted({r["protocol"] for _, r in apart}, key=tables.protocol_order):
        of = [(n, r) for n, r in apart if r["protocol"] == protocol]
        of.sort(key=lambda item: apart_order(item[1]))
        cells = (apart_cells(n, r, published) for n, r in of)
        text += [f"### {protocol}\n", tables.table(APART, cells), ""]
    if figures:
        text.append("## Figures\n")
    for figure in figures:
        text += [f"![{figure['caption']}](figures/{figure['file']})\n"]
        text += [f"{figure['caption']} `{figure['command']}`\n"]
    return "\n".join(text).rstrip() + "\n"


def is_ours(row: dict[str, Any]) -> bool:
    """Whether a published number is one that this repository aims at."""
    return (
        tables.method_order(row["method"])[0] < len(tables.OURS) and "lightly" not in row["method"]
    )


def groups(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Protocols in their order, ImageNet's first."""
    return sorted(
        set(pairs), key=lambda p: (p[1] != "ImageNet-1k", *tables.protocol_order(p[0]), p[1])
    )


def compared_cells(rows: Iterable[tables.Row]) -> Iterable[list[str]]:
    for row in rows:
        p = row.published
        metric = "" if p["metric"] == "top1" else f" ({p['metric']})"
        left = [tables.method_cell(p), p["arch"], *tables.budget_cells(p)]
        left += [tables.published_cell(p) + metric, p["source"]]
        if not row.records:
            yield [*left, "", "", "", "", "", ""]
        for name, r in row.records:
            off = tables.difference(r, p)
            yield [
                tables.method_cell(r),
                *left[1:],
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
    metric = "" if r["metric"] == "top1" else f" ({r['metric']})"
    return [
        r["method"],
        r["arch"],
        tables.data_cell(what, "dataset"),
        tables.number_cell(what["epochs"]),
        tables.number_cell(what["batch"]),
        tables.data_cell(r["dataset"]),
        tables.percent(r["value"]) + metric,
        tables.spread_cell(r),
        tables.why_apart(r, published) + ("; protocol assumed" if r.get("assumed") else ""),
        tables.commit_cell(r),
        tables.hours_cell(r),
        links(name),
    ]


def links(names: str) -> str:
    """A link to each of a row's records."""
    each = names.split()
    return ", ".join(
        f"[{'record' if len(each) == 1 else i + 1}](records/{name})" for i, name in enumerate(each)
    )


# -- the root README ------------------------------------------------------------------------------


def summary(published, records) -> str:
    """The papers' ImageNet numbers with ours where there are, and our own runs in short."""
    rows, apart = tables.join(published, records)
    main_rows = [
        row
        for row in rows
        if is_ours(row.published)
        and (row.published["protocol"], row.published["dataset"]) == ("linear", "ImageNet-1k")
        and row.published["metric"] == "top1"
    ]
    main_rows.sort(key=lambda r: (*tables.method_order(r.published["method"]), r.published["arch"]))
    head = ("method", "encoder", "epochs", "batch", "published", "ours")
    cells = []
    for row in main_rows:
        p = row.published
        ours = ", ".join(summary_cell(r, p) for _, r in row.records) or "not run yet"
        cells.append(
            [
                tables.method_cell(p),
                p["arch"],
                *tables.budget_cells(p),
                tables.published_cell(p),
                ours,
            ]
        )
    text = ["Linear top-1 on ImageNet, in percent:\n", tables.table(head, cells), ""]
    whole = [(name, r) for name, r in apart if is_whole(r["pretraining"])]
    if whole:
        text += ["Our runs so far, beside which no paper has a number:\n", *side_by_side(whole), ""]
    text.append(
        "Do the papers' claims hold at equal budget? [results/cifar10.md](results/cifar10.md)."
    )
    text.append("All tables, with commits, hours and records: [results/](results/README.md).")
    return "\n".join(text)


def summary_cell(record: tables.Record, row: dict[str, Any]) -> str:
    """Our number, with the settings that the published one's source leaves open: 75.10
    (multi_crop True).
    """
    told = tables.stated(record, row)
    more = [f"{n} {v}" for n, v in (record.get("settings") or {}).items() if n not in told]
    return tables.percent(record["value"]) + (f" ({', '.join(more)})" if more else "")


def is_whole(pretraining: dict[str, Any]) -> bool:
    """Whether a run saw a whole data set: photos and subsets have pages of their own."""
    return pretraining["dataset"] != "photos" and pretraining["incomplete"] is None


def side_by_side(apart: list[tuple[str, dict]]) -> list[str]:
    """One row for each encoder, one column for each protocol that any of them was scored by."""
    columns: dict[tuple, str] = {}
    rows: dict[tuple, dict[str, list[str]]] = {}
    for _, r in sorted(apart, key=lambda item: apart_order(item[1])):
        what, name = r["pretraining"], r["protocol"]
        if r["dataset"]["name"] != what["dataset"]:
            name += f", {r['dataset']['name']}"
        columns[(tables.protocol_order(r["protocol"]), name)] = name
        encoder = (
            r["method"],
            r["arch"],
            tables.data_cell(what, "dataset"),
            tables.number_cell(what["epochs"]),
        )
        seeds = len(r["values"])
        value = tables.percent(r["value"]) + (f" ({seeds} seeds)" if seeds > 1 else "")
        rows.setdefault(encoder, {}).setdefault(name, []).append(value)
    names = [columns[key] for key in sorted(columns)]
    cells = [[*row, *(", ".join(found.get(n, [])) for n in names)] for row, found in rows.items()]
    return [tables.table(("method", "encoder", "trained on", "epochs", *names), cells)]


def in_readme(readme: str, text: str) -> str:
    """The README with its results section replaced."""
    if BEGIN not in readme or END not in readme:
        raise UserError(f"README.md has no place for the results: put '{BEGIN}' and '{END}' in it")
    before, rest = readme.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    return f"{before}{BEGIN}\n{text}\n{END}{after}"


if __name__ == "__main__":
    code = command(main)
    sys.exit(1 if code and "--check" in sys.argv else code)
