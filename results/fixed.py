"""Whether claims were fixed before their runs: a record's commit must hold the claim it speaks to.

The history is asked, by `git show COMMIT:results/claims.yaml`. A checkout without it (a shallow
clone, an archive) cannot say so, and the page then says that.
"""

import functools
import subprocess
from typing import Any

from common.errors import UserError
from common.run import documents, environment
from results.claims import Runs, arms_of

# what must not change after a run
FIELDS = ("effect", "measure", "seeds", "smallest", "primary", "healthy", "collapse", "unlearned")
FIELDS += ("intact", "purity", "views", "family")


@functools.cache
def claims_at(commit: str) -> dict[str, dict[str, Any]] | None:
    """Returns the lab's claims of a commit by name; None for a commit that the history lacks."""
    try:
        text = environment.git("show", f"{commit}:results/claims.yaml")
    except (OSError, subprocess.CalledProcessError):
        return {} if is_known(commit) else None
    what = documents.parsed_yaml(text)
    return {claim["name"]: claim for claim in (what.get("lab") or {"claims": []})["claims"]}


def is_known(commit: str) -> bool:
    try:
        environment.git("cat-file", "-e", f"{commit}^{{commit}}")
        return True
    except (OSError, subprocess.CalledProcessError):
        return False


def time_of(commit: str) -> str:
    """Returns a commit's time, like 2026-11-27 08:19:13 +0000; "" if the history lacks it."""
    try:
        return environment.git("show", "-s", "--format=%ci", commit)
    except (OSError, subprocess.CalledProcessError):
        return ""


def check(claims: list[dict[str, Any]], runs: Runs) -> bool:
    """Tells whether the git history has the commit of every record of these claims' runs. Raises
    UserError for a record whose commit does not hold its claim as it is now. A claim that was fixed
    later may take runs that were there for others, beside an arm of its effect that was not.
    """
    every = True
    for claim in claims:
        arms = arms_of(claim)
        own = [
            arm
            for arm in claim["effect"]
            if all(holds(one, claim) for _, one in records_of(runs, arm))
        ]
        for arm in arms:
            for name, one in records_of(runs, arm):
                there = claims_at(one["commit"])
                every = every and there is not None
                if holds(one, claim):
                    continue
                if claim["name"] in there or not own or not is_anothers(arm, there, claims):
                    raise UserError(
                        f"records/{name}: its commit {one['commit'][:7]} does not hold the claim "
                        f"{claim['name']} as claims.yaml has it now ({', '.join(FIELDS)}): run "
                        f"{arm} at a commit that does"
                    )
    return every


def holds(one: dict[str, Any], claim: dict[str, Any]) -> bool:
    """Tells whether a record's commit holds the claim as it is now, as far as is known."""
    there = claims_at(one["commit"])
    return there is None or is_same(claim, there.get(claim["name"], {}))


def is_anothers(arm: str, there: dict[str, Any], claims: list[dict[str, Any]]) -> bool:
    """Tells whether one of the claims that a commit holds, as they are now, is on this arm."""
    held = [claim for claim in claims if is_same(claim, there.get(claim["name"], {}))]
    return any(arm in arms_of(claim) for claim in held)


def records_of(runs: Runs, arm: str) -> list[tuple[str, dict[str, Any]]]:
    """Returns every record of a run, with its file's name."""
    return [one for by_seed in runs.get(arm, {}).values() for one in by_seed.values()]


def is_same(claim: dict[str, Any], other: dict[str, Any]) -> bool:
    return all(claim.get(name) == other.get(name) for name in FIELDS)
