"""Checks flags with the scripts' own parsers before anything is submitted.

    echo '[["recipes/snclr.py", ["--epochs", "300"], 8]]' | python slurm/check.py

A process of its own, so that submitting and results import no recipe. Reads [script, flags, ranks]
of each run; prints for each what it will do, as JSON. A mistake is one line on stderr and exit code
2. [script, flags, null, {flag: its words}] is of a run of the plan, which is not submitted yet; the
words are left out if the script has no such flag.

A script is checked by its function `parse_arguments(argv)`.
"""

import argparse
import dataclasses
import importlib
import json
import sys
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.errors import UserError, command
from common.run import documents
from common.run.folder import changes, facts_of_run, read_config
from common.run.help import in_80_columns
from common.run.run import check_batch, default_folder

REPOSITORY = Path(__file__).resolve().parent.parent


def main() -> None:
    argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    try:
        asked = [(script, flags, *more) for script, flags, *more in json.load(sys.stdin)]
    except (ValueError, TypeError):
        raise UserError("stdin is no JSON list of [script, flags, ranks], see --help") from None
    answers = []
    for script, flags, *more in asked:
        try:
            answers.append(facts_of(script, flags, *more))
        except UserError as error:
            raise UserError(f"{script} {' '.join(flags)}: {error}") from None
    print(json.dumps(answers))


def facts_of(
    script: str,
    flags: list[str],
    ranks: int | None,
    optional: dict[str, list[str]] | None = None,
) -> dict[str, Any]:
    """Returns what a script will do. `checked` says whether it has a parser that could be asked,
    `absent` which flags name images that are not here. Of a recipe's run there are also its name,
    its folder, its flags (with those of `optional` that it has), and what its `config`.yaml will
    hold.
    """
    facts: dict[str, Any] = {"checked": False, "folder": None, "absent": []}
    if "def parse_arguments(" not in (REPOSITORY / script).read_text():
        return facts  # importing it might run it
    facts["checked"] = True
    module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
    for name, words in (optional or {}).items():
        has = {field.name for field in dataclasses.fields(module.Config)}
        flags = flags + (words if name.replace("-", "_") in has else [])
    try:
        config = module.parse_arguments(flags)
    except SystemExit:  # argparse has said why
        raise UserError("these flags are not understood, see above") from None
    if not dataclasses.is_dataclass(config):
        return facts
    if config.resume == "never":
        raise UserError(
            "--resume never: a requeued job would begin anew in another folder; name a new folder "
            "with --output"
        )
    facts["absent"] = absent_folders(config)
    if not isinstance(config, RunConfig):  # an evaluation
        return facts
    recipe = Path(script).stem
    folder = default_folder(recipe, config)
    if ranks is not None:
        check_batch(config.batch_size, ranks, config.micro_batch)
        refuse_another(folder, recipe, config, flags)
    name = f"{recipe}-{config.dataset}-{config.arch}-{config.seed}"
    facts |= {"folder": str(folder), "name": name, "flags": flags}
    return facts | {"config": noted(recipe, config)}


def noted(recipe: str, config: Any) -> dict[str, Any]:
    """Returns what a run of this configuration notes in its config.yaml."""
    flags = dataclasses.asdict(config)
    flags.pop("plan_name", None)
    return {"recipe": recipe, **facts_of_run(recipe, config), **flags}


def refuse_another(folder: Path, recipe: str, config: Any, flags: list[str]) -> None:
    """Raises UserError if the folder holds something else."""
    if (saved := read_config(folder)) is None:
        return
    changed = changes({"recipe": recipe}, config, saved)
    # the machine that the job runs on decides on bf16 or fp32, and on where colours are done
    given = {flag.split("=")[0] for flag in flags}
    for flag, field in (("--precision", "precision"), ("--augment-device", "augment_device")):
        if flag not in given:
            changed = [c for c in changed if not c.startswith(f"{field} ")]
    if changed:
        raise UserError(
            f"{folder} holds something else ({'; '.join(changed)}): use the same flags or "
            "another --output"
        )


def absent_folders(config: Any) -> list[str]:
    """Lists the flags whose images are neither on this machine nor to be downloaded."""
    if getattr(config, "download", False):
        return []
    given = {f"--{name}": getattr(config, name, "") for name in ("data", "root")}
    return [f"{f} {path}" for f, path in given.items() if path and not there(path)]


def there(path: str) -> bool:
    try:
        return documents.expanded(path).exists()
    except OSError:  # no permission to look at it from here
        return True


if __name__ == "__main__":
    sys.exit(command(main))
