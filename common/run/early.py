"""Answers --help and wrong flags at once: a script imports this module before torch.

    import common.run.early  # noqa: F401  # isort: skip

PyTorch takes seconds to import, and a typo should not wait for it. Of the script that Python was
started with, and of this project's modules that it imports from, only the statements that its
function `parse_arguments` needs are executed: the `Config`, the presets, the checks. If the flags
are right, or if anything unforeseen happens, nothing is said here: the script goes on, parses its
flags itself, and that alone counts.
"""

import __future__

import ast
import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from common.errors import UserError, command

ENTRY = "parse_arguments"
OWN = {"benchmarks", "common", "eval", "recipes", "results", "slurm"}
# imported whole: they need no torch, and an error must be of the class that others catch
WHOLE = {"common.cards", "common.config", "common.errors", "common.run.documents"}
WHOLE |= {"common.run.flags"}
FLAGS = __future__.annotations.compiler_flag  # annotations stay text until somebody asks


def names_bound(statement: ast.stmt) -> set[str]:
    """Returns the names that a top-level statement of a module gives a value, or changes."""
    if isinstance(statement, ast.FunctionDef | ast.ClassDef):
        return {statement.name}
    if isinstance(statement, ast.Import):
        return {alias.asname or alias.name.split(".")[0] for alias in statement.names}
    if isinstance(statement, ast.ImportFrom):
        return {alias.asname or alias.name for alias in statement.names}
    targets = getattr(statement, "targets", [getattr(statement, "target", None)])
    found = set()
    for target in filter(None, targets):
        while isinstance(target, ast.Subscript | ast.Attribute):
            target = target.value
        parts = target.elts if isinstance(target, ast.Tuple | ast.List) else [target]
        found |= {part.id for part in parts if isinstance(part, ast.Name)}
    return found


def names_used(statement: ast.stmt) -> set[str]:
    """Returns the names that a statement reads. It skips the methods of a class: none is called."""
    parts: list[ast.AST] = [statement]
    if isinstance(statement, ast.ClassDef):
        body = [node for node in statement.body if not isinstance(node, ast.FunctionDef)]
        parts = [*statement.bases, *statement.keywords, *statement.decorator_list, *body]
    nodes = [node for part in parts for node in ast.walk(part)]
    names = [node for node in nodes if isinstance(node, ast.Name)]
    return {node.id for node in names if isinstance(node.ctx, ast.Load)}


def part_of(name: str, path: Path, wanted: set[str]) -> ModuleType:
    """Makes a module of what defines the names `wanted`, and of what these need in turn."""
    tree = ast.parse(path.read_text(), str(path))
    body = tree.body
    needed, new = set(), {*wanted}
    while new:
        needed |= new
        users = [s for s in body if names_bound(s) & new]
        imports = (ast.Import, ast.ImportFrom)
        new = {n for s in users if not isinstance(s, imports) for n in names_used(s)} - needed
    module = ModuleType(f"{name}: {', '.join(sorted(wanted))}")
    module.__file__, module.__doc__ = str(path), ast.get_docstring(tree, clean=False)
    sys.modules[module.__name__] = module  # where dataclasses and typing look names up
    for statement in body:
        if not (bound := names_bound(statement) & needed):
            continue
        if isinstance(statement, ast.ImportFrom) and is_own(statement.module):
            for alias in statement.names:
                if (alias.asname or alias.name) in bound:
                    value = imported(statement.module, alias.name)
                    setattr(module, alias.asname or alias.name, value)
        else:
            code = compile(ast.Module([statement], []), str(path), "exec", FLAGS)
            exec(code, module.__dict__)
    return module


def is_own(module: str | None) -> bool:
    return (module or "").split(".")[0] in OWN


def imported(module: str, name: str) -> object:
    """Returns what `from module import name` gives, without the module's other statements."""
    for whole in (f"{module}.{name}", module):
        if whole in WHOLE:
            found = importlib.import_module(whole)
            return found if whole != module else getattr(found, name)
    spec = importlib.util.find_spec(module)
    if spec.submodule_search_locations is not None:  # a package: the name is one of its modules
        module, spec = f"{module}.{name}", importlib.util.find_spec(f"{module}.{name}")
        return importlib.import_module(module)
    return getattr(part_of(module, Path(spec.origin), {name}), name)


def answer(path: Path) -> None:
    """Ends the process with what its flags deserve, if that is --help or one error line."""

    def parse() -> None:
        try:
            part_of(path.stem, path, {ENTRY}).parse_arguments(None)
        except (UserError, SystemExit):
            raise
        except Exception:
            return  # the script itself will meet it, or not

    if code := command(parse):
        sys.exit(code)


def started_script() -> Path | None:
    """Returns the script that Python was started with, if it imports this module and has flags."""
    path = getattr(sys.modules.get("__main__"), "__file__", None)
    if path is None or not (path := Path(path)).is_file() or path.suffix != ".py":
        return None
    text = path.read_text()
    return path if f"import {__name__}" in text and f"def {ENTRY}(" in text else None


if (script := started_script()) is not None:
    answer(script)
