"""How the house is built: imports go down only and never in a circle; nothing knows a recipe."""

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

FOLDERS = ("benchmarks", "common", "eval", "recipes", "results", "slurm")

# from the bottom up: a module imports from its own floor and from those below
FLOORS = [
    {"common.errors", "common.run.documents", "common.run.help"},
    {
        "common.augment",
        "common.cards",
        "common.config",
        "common.distributed",
        "common.files",
        "common.models",
        "common.optim",
        "common.pairs",
        "common.progress",
        "common.support_set",
    },
    {"common.fast"},
    {"common.data"},
    {"common.knn"},
    {"common.run"},
    {"recipes", "results", "eval", "slurm"},
    {"benchmarks"},
]
# imports that a floor's folders may make of one another, besides
WITHIN = {
    "eval": {"eval", "results.record"},
    "eval.figures": {"eval", "results.record", "recipes"},
    "results": {"results", "slurm.plan"},  # its list of runs is a sweep too
    "slurm": {"slurm"},
    "slurm.check": {"slurm", "recipes"},
    "recipes": set(),
}


def modules() -> dict[str, Path]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): path
        for folder in FOLDERS
        for path in sorted((ROOT / folder).rglob("*.py"))
        if path.name != "__init__.py"
    }


def imported(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Yields this project's modules that a file imports anywhere, also in a function."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        else:
            continue
        yield from (name for name in names if name in known)


GRAPH = {name: set(imported(path, modules())) for name, path in modules().items()}


def inside(name: str, places: set[str]) -> bool:
    return any(name == place or name.startswith(place + ".") for place in places)


def floor(name: str) -> int:
    return next(number for number, places in enumerate(FLOORS) if inside(name, places))


def test_no_module_imports_itself_through_others():
    assert len(GRAPH) > 80
    TopologicalSorter(GRAPH).prepare()  # CycleError, with the circle


@pytest.mark.parametrize("name", GRAPH)
def test_imports_go_down_only(name):
    ways = [place for place in WITHIN if inside(name, {place})]
    allowed = WITHIN[max(ways, key=len)] if ways else None
    for other in GRAPH[name]:
        assert floor(other) <= floor(name), f"{name} imports {other}, which stands above it"
        if allowed is not None and floor(other) == floor(name):
            assert inside(other, allowed), f"{name} imports {other}"


def test_the_top_of_common_stays_small():
    lines = sum(len(path.read_text().splitlines()) for path in (ROOT / "common").glob("*.py"))
    assert lines <= 1800


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.py")), ids=lambda p: p.stem)
def test_a_recipe_stays_short(path):
    limit = 350 if path.stem in ("fnc", "snclr") else 300
    assert len(path.read_text().splitlines()) <= limit
