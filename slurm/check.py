"""Checks flags with the scripts' own parsers before anything is submitted.

    echo '[["recipes/snclr.py", ["--epochs", "300"], 8]]' | python slurm/check.py

A process of its own, so that submitting imports no recipe. Reads [script, flags, ranks] of each
run; prints for each what it will do, as JSON. A mistake is one line on stderr and exit code 2.

A script is checked where its `main` calls `parse(Config, presets, argv[, resolve])`, as the recipes
and evaluations do, by the same call; or where it has a function `parse_arguments(argv)`.
"""

import argparse
import ast
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from common.config import parse
from common.errors import UserError, command
from common.run.folder import changes, read_config
from common.run.run import check_batch, default_folder

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    try:
        asked = [(script, flags, ranks) for script, flags, ranks in json.load(sys.stdin)]
    except (ValueError, TypeError):
        raise UserError("stdin is no JSON list of [script, flags, ranks], see --help") from None
    answers = []
    for script, flags, ranks in asked:
        try:
            answers.append(facts_of(script, flags, ranks))
        except UserError as error:
            raise UserError(f"{script} {' '.join(flags)}: {error}") from None
    print(json.dumps(answers))


def facts_of(script: str, flags: list[str], ranks: int) -> dict[str, Any]:
    """What a run will do: `checked`, flags with a folder that is `absent` here, and of a recipe its
    name and folder.
    """
    tree = ast.parse((REPOSITORY / script).read_text())  # importing it might run it
    if call := parse_call(tree):
        return config_facts(load(script), call, script, flags, ranks)
    if "parse_arguments" in (getattr(node, "name", "") for node in tree.body):
        try:
            load(script).parse_arguments(flags)
        except SystemExit as exit_:  # argparse has said why
            if exit_.code:
                raise UserError("these flags are not understood, see above") from None
        return {"checked": True, "folder": None, "absent": []}
    return {"checked": False, "folder": None, "absent": []}


def parse_call(tree: ast.Module) -> ast.Call | None:
    """The call of `parse` in a script's `main`."""
    mains = [n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "main"]
    calls = [node for main in mains for node in ast.walk(main) if isinstance(node, ast.Call)]
    named = [node for node in calls if getattr(node.func, "id", "") == "parse"]
    return named[0] if named and len(named[0].args) >= 3 else None


def load(script: str) -> Any:
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def config_facts(
    module: Any, call: ast.Call, script: str, flags: list[str], ranks: int
) -> dict[str, Any]:
    """What `parse` makes of the flags, with the values that the call's names have in the module."""
    config_class, presets, *resolve = [
        getattr(module, node.id) if isinstance(node, ast.Name) else ast.literal_eval(node)
        for i, node in enumerate(call.args)
        if i != 2  # argv
    ]
    config = parse(config_class, presets, flags, *resolve)
    if config.resume == "never":
        raise UserError(
            "--resume never: a requeued job would begin anew in another folder; name a new folder "
            "with --output"
        )
    absent = absent_folders(config)
    if not script.startswith("recipes/"):
        return {"checked": True, "folder": None, "absent": absent}
    recipe = Path(script).stem
    check_batch(config.batch_size, ranks, config.micro_batch)
    folder = default_folder(recipe, config)
    if (saved := read_config(folder)) is not None:
        changed = changes({"recipe": recipe}, config, saved)
        # bf16 or fp32, and where colours are done, is decided where the job runs
        given = {flag.split("=")[0] for flag in flags}
        for flag, field in (("--precision", "precision"), ("--augment-device", "augment_device")):
            if flag not in given:
                changed = [c for c in changed if not c.startswith(f"{field} ")]
        if changed:
            raise UserError(
                f"{folder} holds something else ({'; '.join(changed)}): use the same flags or "
                "another --output"
            )
    name = f"{recipe}-{config.dataset}-{config.arch}-{config.seed}"
    return {"checked": True, "folder": str(folder), "name": name, "absent": absent}


def absent_folders(config: Any) -> list[str]:
    """The flags that name images which are not on this machine, nor to be downloaded."""
    if getattr(config, "download", False):
        return []
    given = {f"--{name}": getattr(config, name, "") for name in ("data", "root")}
    return [f"{f} {path}" for f, path in given.items() if path and not there(path)]


def there(path: str) -> bool:
    try:
        return Path(path).expanduser().exists()
    except OSError:  # it may not be looked at from here
        return True


if __name__ == "__main__":
    sys.exit(command(main))
