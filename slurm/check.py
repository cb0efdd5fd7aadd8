"""Checks flags with the scripts' own parsers before anything is submitted.

    echo '[["recipes/snclr.py", ["--epochs", "300"], 8]]' | python slurm/check.py

A process of its own, so that submitting imports no recipe. Reads [script, flags, ranks] of each
run; prints for each what it will do, as JSON. A mistake is one line on stderr and exit code 2.

A recipe is a module with `Config` and `PRESETS` and, where flags depend on each other, `resolve`
or `check`. Another script is checked where it has a function `parse_arguments(argv)`.
"""

import ast
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import yaml

from common.config import changed_fields, parse
from common.errors import UserError, command
from common.run import check_batch, default_folder


def main() -> None:
    answers = []
    for script, flags, ranks in json.load(sys.stdin):
        try:
            answers.append(facts_of(script, flags, ranks))
        except UserError as error:
            raise UserError(f"{script} {' '.join(flags)}: {error}") from None
    print(json.dumps(answers))


def facts_of(script: str, flags: list[str], ranks: int) -> dict[str, Any]:
    """What a run will do: `checked`, and of a recipe its name and folder."""
    names = names_in(Path(__file__).resolve().parent.parent / script)
    if {"Config", "PRESETS"} <= names:
        return recipe_facts(load(script), Path(script).stem, flags, ranks)
    if "parse_arguments" in names:
        try:
            load(script).parse_arguments(flags)
        except SystemExit as exit_:  # argparse has said why
            if exit_.code:
                raise UserError("these flags are not understood, see above") from None
        return {"checked": True, "folder": None}
    return {"checked": False, "folder": None}


def names_in(path: Path) -> set[str]:
    """What a script defines at its top level; read, since importing it might run it."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def load(script: str) -> Any:
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def recipe_facts(module: Any, recipe: str, flags: list[str], ranks: int) -> dict[str, Any]:
    resolve = getattr(module, "resolve", None) or getattr(module, "check", lambda config: config)
    config = parse(module.Config, module.PRESETS, flags, resolve)
    check_batch(config.batch_size, ranks)
    if config.resume == "never":
        raise UserError(
            "--resume never: a requeued job would begin anew in another folder; name a new folder "
            "with --output"
        )
    folder = default_folder(recipe, config)
    path = folder / "config.yaml"
    if path.exists():
        saved = yaml.safe_load(path.read_text()) or {}
        changes = changed_fields(config, saved)
        if saved.get("recipe") != recipe:
            changes = [f"recipe was {saved.get('recipe')}, is {recipe}"]
        # bf16 or fp32 is decided where the job runs
        given = any(flag.split("=")[0] == "--precision" for flag in flags)
        changes = [c for c in changes if given or not c.startswith("precision ")]
        if changes:
            raise UserError(
                f"{folder} holds a run with another configuration ({'; '.join(changes)}): use the "
                "same flags or another --output"
            )
    name = f"{recipe}-{config.dataset}-{config.arch}-{config.seed}"
    return {"checked": True, "folder": str(folder), "name": name}


if __name__ == "__main__":
    sys.exit(command(main))
