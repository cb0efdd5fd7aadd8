"""Records and published numbers, joined once: what every page is made of."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Template
from typing import Any

from common.errors import UserError
from common.run import documents
from results import claims, record, tables
from slurm import plan

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Joined:
    """Numbers and records together: `rows` has a row for each published number, `apart` the records
    next to none, `runs` those of the plan's runs; `claims` is claims.yaml, `figures` figures.yaml.
    """

    published: list[dict[str, Any]]
    rows: list[tables.Row]
    apart: list[tuple[str, tables.Record]]
    plan: dict[str, plan.Planned]
    claims: dict[str, Any]
    runs: claims.Runs
    figures: list[dict[str, str]]

    def of_lab(self, one: tables.Record) -> bool:
        """Tells whether a record is of a run of the lab, which claims.md judges and lists."""
        run = self.plan.get(one.get("plan") or "")
        return run is not None and run.tier.startswith("lab")


def load(folder: Path = HERE) -> Joined:
    """Joins published.yaml, records/, plan.yaml, claims.yaml and figures/ of `folder`."""
    planned = plan.load(folder / "plan.yaml")
    return join(
        tables.load_published(folder / "published.yaml"),
        record.load_all(folder / "records"),
        planned,
        claims.load(folder / "claims.yaml", planned),
        load_figures(folder / "figures"),
        record.load_failures(folder / "records"),
    )


def join(
    published: list[dict[str, Any]],
    records: Sequence[tuple[str, tables.Record]],
    planned: dict[str, plan.Planned],
    what: dict[str, Any],
    figures: Sequence[dict[str, str]] = (),
    failures: Sequence[tuple[str, dict[str, Any]]] = (),
) -> Joined:
    rows, apart = tables.join(published, records)
    runs = claims.recorded([*records, *failures], planned)
    return Joined(published, rows, apart, planned, what, runs, [*figures])


def load_figures(folder: Path) -> list[dict[str, str]]:
    """Reads figures.yaml: file, caption and command of each picture, and its page, which is
    claims.md for those of the claims. Raises UserError if a picture is missing.
    """
    listed = folder / "figures.yaml"
    if not listed.exists():
        return []
    figures = documents.read_yaml(listed, "figures") or []
    for figure in figures:
        if not (folder / figure["file"]).is_file():
            raise UserError(f"{listed} names {figure['file']}, which is not there")
    return figures


def fill(template: str, **parts: str) -> str:
    """Returns a page: a file of templates/ with each $name replaced. No two empty lines follow each
    other.
    """
    text = Template((HERE / "templates" / template).read_text()).substitute(parts)
    return re.sub(r"\n{3,}", "\n\n", text)
