"""Records: what was run, on what, by which commit, and what came out.

    python results/record.py knn runs/snclr/cifar10-resnet18_cifar-0   # the run's own k-NN
    python results/record.py knn RUN_SEED0 RUN_SEED1 RUN_SEED2         # one record, with spread
    python results/record.py add linear_probe.json                     # what an evaluation wrote
    python results/record.py check                                     # every stored record

A record is a JSON file as results/schema.json says, one for each evaluated run. `add` validates it
and stores it in results/records/ under a name made of its own fields. A run from a tree with
changes outside results/ and runs/, or whose command is unknown, is refused unless --allow-dirty,
which shows in the tables. The pages come from the records alone: python results/report.py.
"""

import argparse
import hashlib
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from common.errors import UserError, command
from common.files import write
from common.record import as_shown, facts_of, of_runs, problems, read, with_values

HISTORY = ("loss", "knn", "embedding_std", "effective_rank", "neighbour_purity", "self_matches")
HISTORY += ("images_per_second",)
RECORDS = Path(__file__).resolve().parent / "records"


def name_of(record: dict[str, Any]) -> str:
    """A file name that says what the record is, and ends in a hash of what sets it apart."""
    what = record["pretraining"]
    parts = [record["method"], record["arch"], what["dataset"], f"{what['epochs'] or 0:g}ep"]
    parts += [record["dataset"]["name"], record["protocol"]]
    identity = [record[n] for n in ("config_hash", "seeds", "backbone_sha256", "metric")]
    identity += [*parts, record["dataset"], record["commit"], record.get("hyperparameters")]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    return re.sub(r"[^a-z0-9.]+", "-", "-".join([*parts, digest]).lower()) + ".json"


def add(record: dict[str, Any], allow_dirty: bool = False, folder: Path = RECORDS) -> Path:
    """Validates a record and stores it; returns its path. UserError where it is refused."""
    if isinstance(record, dict):
        if record.get("commit") in (None, "unknown"):
            raise UserError(
                "the record names no commit: run from a git checkout, or with the file .commit "
                "that the launcher writes"
            )
        if not record.get("command") and not allow_dirty:
            raise UserError("the record has no command: run the evaluation again, or --allow-dirty")
        if record.get("dirty") is not False and not allow_dirty:
            raise UserError(
                "the run started from a tree with uncommitted changes: commit and run again, or "
                "--allow-dirty, which shows in the tables"
            )
        if allow_dirty:
            record = {**record, "command": record.get("command") or ["unknown"]}
            record["dirty"] = record.get("dirty") is not False
    if found := problems(record):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise UserError(f"not a record: {found[0]}{more}; see results/schema.json")
    path = folder / name_of(record)
    folder.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return path


def load_all(folder: Path = RECORDS) -> list[tuple[Path, dict[str, Any]]]:
    """Every stored record with its path, in the order of names; UserError for a broken one."""
    records = []
    for path in sorted(folder.glob("*.json")):
        record = read(path)
        if found := problems(record):
            raise UserError(f"{path}: {found[0]}")
        records.append((path, record))
    return records


def load_shown(folder: Path = RECORDS) -> list[tuple[str, dict[str, Any]]]:
    """Every stored record with its file's name, as tables read it."""
    return [(path.name, as_shown(record)) for path, record in load_all(folder)]


def knn_record(runs: Sequence[Path]) -> dict[str, Any]:
    """The record of what the runs' own k-NN monitor said after the last epoch."""
    record = of_runs(runs)
    facts = [facts_of(run) for run in runs]
    values = [f["results"]["knn"] for f in facts]
    if None in values:
        raise UserError("a run has no k-NN accuracy: --knn-every 0, or no labelled test set")
    what = record["pretraining"]
    before = [f["results"]["knn_before"] for f in facts]
    others = {}
    if None not in before:
        others["random encoder"] = [round(100 * v, 3) for v in before]
    record |= {
        "dataset": {"name": what["dataset"], "copy": what["copy"], "incomplete": scored_on(facts)},
        "protocol": "kNN (k200,t.1)",
        "metric": "top1",
        "others": others,
        "history": [history(f["metrics"]) for f in facts],
    }
    return with_values(record, [100 * v for v in values])


def scored_on(facts: Sequence[dict[str, Any]]) -> str | None:
    """What the monitor's k-NN had of the data set, in words; None for all of it."""
    config, words = facts[0]["config"], []
    if share := config.get("validation_share", 0.0):
        words.append(f"{100 * share:g} % of the training images, held out")
    if config.get("train_images", 0):
        words.append(f"votes of {config['train_images']} images")
    return ", ".join(words) or None


def history(logged: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """What a run's monitors said after each epoch, so that curves can be drawn from records."""
    epochs = [r for r in logged if r["kind"] == "epoch"]
    found = {"epoch": [r["epoch"] for r in epochs]}
    for name in HISTORY:
        if any(name in r for r in epochs):
            values = [r.get(name) for r in epochs]
            found[name] = [None if v is None else float(f"{v:.5g}") for v in values]
    return found


# -- the command ----------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what", required=True, metavar="add|knn|check")
    adding = commands.add_parser("add", help="validate and store records that evaluations wrote")
    adding.add_argument("files", nargs="+", type=Path, metavar="FILE")
    knn = commands.add_parser("knn", help="record the k-NN accuracy of a run, or of its seeds")
    knn.add_argument("runs", nargs="+", type=Path, metavar="RUN")
    for each in (adding, knn):
        each.add_argument(
            "--allow-dirty",
            action="store_true",
            help="also from a tree with changes or without a command; shows in the tables",
        )
    commands.add_parser("check", help="validate every stored record")
    arguments = parser.parse_args(argv)
    if arguments.what == "add":
        for file in arguments.files:
            print(f"stored {add(read(file), arguments.allow_dirty)}")
    elif arguments.what == "knn":
        print(f"stored {add(knn_record(arguments.runs), arguments.allow_dirty)}")
    else:
        print(f"{len(load_all())} records are as results/schema.json says")


if __name__ == "__main__":
    sys.exit(command(main))
