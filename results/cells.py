"""Fills in, on the recipes' pages, what the lab has measured of a row.

A cell says `<!-- lab: CLAIM -->not measured<!-- /lab -->`, where CLAIM is a claim's name in
claims.yaml; what stands between the marks is the report's.
"""

import re
from pathlib import Path

from common.errors import UserError
from results import lab, lab_figures, lab_page, tables
from results.joined import Joined

MARK = re.compile(r"<!-- lab: ([a-z0-9.-]+) -->(.*?)<!-- /lab -->")
NOT_YET = "not measured"


def pages(joined: Joined, folder: Path) -> dict[Path, str]:
    """Returns the text of each page with such cells; raises UserError for an unknown claim."""
    known = joined.claims.get("lab", {"claims": []})["claims"]
    judged = lab.judge_all(known, joined.runs)
    by_name = {claim["name"]: claim for claim in known}
    found = {path: path.read_text() for path in sorted(folder.glob("*.md"))}

    def filled(path: Path) -> str:
        def cell(mark: re.Match) -> str:
            if (name := mark.group(1)) not in by_name:
                raise UserError(f"{path} has a cell of {name}, which is no claim of the lab")
            return f"<!-- lab: {name} -->{said(by_name[name], judged[name], joined)}<!-- /lab -->"

        return MARK.sub(cell, found[path])

    return {path: filled(path) for path, text in found.items() if MARK.search(text)}


def said(claim: dict, found: lab.Judged, joined: Joined) -> str:
    """Says the measured effect with its interval, its runs and their scale, like lab: +0.30 [-0.90,
    +1.50] points of k-NN, n = 3, of `lab-a` − `lab-b` (CIFAR-10 …, 20 epochs).
    """
    if found.interval is None:
        return NOT_YET
    verdict = f" **{found.word}**" if found.word else ""
    effect = f"{lab_page.ours(claim, found)}, of {lab_page.formula(claim['effect'])}"
    scale = lab_figures.scale([*claim["effect"]], joined.runs)
    return tables.prose(f"lab:{verdict} {effect} ({scale})")
