"""Records: what was run, on what, by which commit, and what came out.

    python results/record.py knn runs/snclr/cifar10-resnet18_cifar-0   # the run's own k-NN
    python results/record.py knn RUN_SEED0 RUN_SEED1 RUN_SEED2         # one record, with spread
    python results/record.py add RUN/eval/*/record*.json               # what evaluations wrote
    python results/record.py check                                     # every stored record

A record is a JSON file as results/schema.json says, one for each evaluated run: an evaluation takes
`of_runs`, adds what it measured and writes the file. `add` validates it and stores it in
results/records/ under a name made of its own fields. A run from a tree with changes outside
results/ and runs/, or whose command is unknown, is refused unless --allow-dirty, which shows in the
tables. The pages come from the records alone: python results/report.py.
"""

import argparse
import dataclasses
import datetime
import hashlib
import json
import math
import re
import statistics
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from common.config import RunConfig
from common.errors import UserError, brief, command
from common.files import write
from common.run import documents, environment, metrics, results
from common.run.flags import is_free
from common.run.help import in_80_columns

HERE = Path(__file__).resolve().parent
RECORDS, SCHEMA = HERE / "records", HERE / "schema.json"
DATASETS = {"imagenet": "ImageNet-1k", "cifar10": "CIFAR-10", "photos": "photos"}
# flags that say only where and how fast
PLACES = {field.name for field in dataclasses.fields(RunConfig) if is_free(RunConfig, field.name)}
HISTORY = ("loss", "knn", "embedding_std", "effective_rank", "neighbour_purity", "self_matches")
HISTORY += ("positiveness_auc", "found_precision", "found_chance", "images_per_second")
FAILED = "failed"  # protocol of a run that has no numbers, and folder of such records
STARTS = ("command", "versions", "devices")  # what a record takes from environment.json


# -- what makes a record whole --------------------------------------------------------------------


def problems(record: Any) -> list[str]:
    """Says what is wrong with a record, one line each; empty for a good one."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    found = []
    for error in sorted(validator.iter_errors(record), key=lambda e: [*map(str, e.path)]):
        where = ".".join(map(str, error.path)) or "the record"
        found.append(f"{where}: {brief(error.message, 200)}")
    found += [f"{where}: {value} is no number" for where, value in not_finite(record)]
    if found:
        return found
    seeds = record["seeds"]
    if len(set(seeds)) != len(seeds):
        found.append(f"seeds: {seeds} repeat")
    for number, part in enumerate([record, *record.get("scores", [])]):
        where = f"scores.{number - 1}." if number else ""
        found += [where + text for text in wrong_numbers(part, len(seeds))]
    for number, curves in enumerate(record.get("history", [])):
        if len({len(values) for values in curves.values()}) > 1:
            found.append(f"history.{number}: its lists are not of one length")
    return found


def not_finite(item: Any, where: str = "") -> Iterator[tuple[str, float]]:
    """Yields (place, value) of every NaN and infinity, which JSON does not know."""
    if isinstance(item, float) and not math.isfinite(item):
        yield where, item
    parts = item.items() if isinstance(item, dict) else ()
    parts = enumerate(item) if isinstance(item, list) else parts
    for name, part in parts:
        yield from not_finite(part, f"{where}.{name}" if where else str(name))


def text_of(record: dict[str, Any]) -> str:
    """Returns a record as JSON. What was tried and diverged becomes null; raises UserError if one
    of the record's own values is not finite: then there is no record.
    """
    scores = [record, *record.get("scores", [])]
    if bad := next((v for s in scores for v in s["values"] if not math.isfinite(v)), None):
        raise UserError(
            f"{record['protocol']} is {bad}: nothing was measured, so there is no record"
        )
    return json.dumps(nulled(record), indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def nulled(item: Any) -> Any:
    """Returns the same with None for NaN and infinities."""
    if isinstance(item, dict):
        return {name: nulled(part) for name, part in item.items()}
    if isinstance(item, list | tuple):
        return [nulled(part) for part in item]
    return None if isinstance(item, float) and not math.isfinite(item) else item


def wrong_numbers(part: dict[str, Any], seeds: int) -> list[str]:
    """Says what is wrong with the value, values and spread of a record or of one of its scores."""
    found, values = [], part["values"]
    if len(values) != seeds:
        found.append(f"values: {len(values)} for {seeds} seeds")
    elif abs(part["value"] - statistics.fmean(values)) > 0.01:
        found.append(f"value: {part['value']} is not the mean {statistics.fmean(values):.3f}")
    spread = spread_of(values)
    if (spread is None) != (part["spread"] is None):
        found.append("spread: a number for several seeds, null for one")
    elif spread is not None and abs(spread - part["spread"]) > 0.01:
        found.append(f"spread: {part['spread']} is not the standard deviation {spread:.3f}")
    return found


def spread_of(values: Sequence[float]) -> float | None:
    """Returns the standard deviation over seeds (n - 1), None for one."""
    return statistics.stdev(values) if len(values) > 1 else None


def with_values(record: dict[str, Any], values: Sequence[float]) -> dict[str, Any]:
    """Returns the record with its values in percent, one for each seed, their mean and spread."""
    values = [round(v, 3) for v in values]
    spread = spread_of(values)
    mean = round(statistics.fmean(values), 3)
    return record | {
        "value": mean,
        "values": values,
        "spread": spread if spread is None else round(spread, 3),
    }


# -- from run folders -----------------------------------------------------------------------------


def of_runs(runs: Sequence[Path]) -> dict[str, Any]:
    """Returns the fields of a record that come from finished run folders; several runs must differ
    in the seed only. An evaluation adds `dataset`, `protocol`, `metric`, its values and command.
    """
    facts = [facts_of(run) for run in runs]
    first = facts[0]
    for run, other in zip(runs[1:], facts[1:], strict=True):
        differing = {n for n in first["config"] if first["config"][n] != other["config"].get(n)}
        differing -= {"seed", "settings", "method", *PLACES}
        if differing:
            raise UserError(
                f"{run} differs from {runs[0]} in {', '.join(sorted(differing))}: one record is of "
                "runs that differ in the seed only"
            )
    config, seen, found = (first[n] for n in ("config", "environment", "results"))
    commits = {f["results"]["commit"] for f in facts}
    if len(commits) > 1:
        raise UserError(f"the runs are of {len(commits)} commits: make one record for each")
    what, (_, copy) = what_ran(config), dataset_of(config["dataset"], found["dataset"])
    what["pretraining"] |= {"copy": copy, "epochs": round(found["epoch"], 4)}
    return {
        **what,
        "seeds": [f["config"]["seed"] for f in facts],
        "seeds_of": "pretraining",
        "epoch": "last",
        "commit": commits.pop(),
        "dirty": any(f["results"]["dirty"] is not False for f in facts),
        "config_hash": found["config_hash"],
        "command": [f["environment"]["command"] for f in facts],
        "versions": {n: v for n, v in seen["versions"].items() if v is not None},
        "hardware": f"{seen['devices']['name']} x {seen['devices']['ranks']}",
        "hours": round(statistics.fmean(f["results"]["hours"] for f in facts), 4),
        "images_per_second": round(
            statistics.fmean(f["results"]["images_per_second"] for f in facts), 1
        ),
        "backbone_sha256": [f["results"]["backbone_sha256"] for f in facts],
        "date": datetime.date.today().isoformat(),
        **note_of(config["epochs"], found["epoch"]),
    }


def of_checkpoint(
    config: dict[str, Any], saved: dict[str, Any], starts: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Returns the fields of a record that come from what a run `saved` before its end: `config` is
    its config.yaml, `starts` are those of its environment.json, if it is there.
    """
    epoch, scheduled = round(saved["epoch"], 4), config["epochs"]
    what, seconds = what_ran(config), saved["seconds"]
    what["pretraining"] |= {"epochs": epoch}
    found = {
        **what,
        "seeds": [config["seed"]],
        "seeds_of": "pretraining",
        "epoch": "last" if epoch >= scheduled else f"{epoch:g} of {scheduled:g} scheduled epochs",
        "commit": saved["commit"],
        "hours": round(seconds / 3600, 4),
        "images_per_second": round(config["batch_size"] * saved["step"] / max(seconds, 1e-9), 1),
    }
    if starts:
        devices, versions = starts[0]["devices"], starts[0]["versions"]
        found |= {
            "dirty": any(start["dirty"] is not False for start in starts),
            "command": [starts[0]["command"]],
            "versions": {n: v for n, v in versions.items() if v is not None},
            "hardware": f"{devices['name']} x {devices['ranks']}",
        }
    return found


def of_failure(run: Path) -> dict[str, Any]:
    """Returns the record of a run that ended in a loss or gradient that is no number: what ran, and
    why it has no values.
    """
    found = documents.read_json(run / results.FAILED, "failed")
    config = documents.read_yaml(run / "config.yaml", "config", ("recipe", "dataset", "seed"))
    start = documents.read_json(run / environment.NAME, "environment", STARTS)
    return {
        **what_ran(config),
        "seeds": [config["seed"]],
        "protocol": FAILED,
        "error": found["error"],
        "epoch": round(found["epoch"], 4),
        "commit": start["commit"],
        "dirty": start["dirty"] is not False,
        "command": [start["command"]],
        "hardware": f"{start['devices']['name']} x {start['devices']['ranks']}",
        "hours": round(found["hours"], 4),
        "date": datetime.date.today().isoformat(),
    }


def add_failure(record: dict[str, Any], allow_dirty: bool, folder: Path) -> Path:
    """Stores the record of a failed run of the plan; raises UserError if its tree had changes."""
    if record["dirty"] and not allow_dirty:
        raise UserError(
            "the run started from a tree with uncommitted changes: commit and run again"
        )
    path = folder / FAILED / f"{record['plan']}-{record['seeds'][0]}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write(path, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    return path


def load_failures(folder: Path = RECORDS) -> list[tuple[str, dict[str, Any]]]:
    """Reads every record of a failed run, with its file's name below `folder`."""
    paths = sorted((folder / FAILED).glob("*.json"))
    return [(f"{FAILED}/{path.name}", documents.read_json(path, "failure")) for path in paths]


def what_ran(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that a run's config.yaml decides; `epochs` are the scheduled ones."""
    what = {
        "method": config["method"],
        "recipe": config["recipe"],
        "arch": config["arch"],
        "pretraining": {
            "dataset": dataset_of(config["dataset"], "")[0],
            "copy": None,
            "incomplete": part_of(config),
            "epochs": config["epochs"],
            "batch": config["batch_size"],
        },
        "settings": config["settings"],
    }
    return what | ({"plan": config["plan"]} if config["plan"] else {})


def note_of(scheduled: float, done: float) -> dict[str, str]:
    """Notes that a run was stopped (--max-steps): its rate had not come to its end."""
    if done >= scheduled:
        return {}
    return {"note": f"stopped after {done:g} of {scheduled:g} scheduled epochs"}


def noted(record: dict[str, Any], *texts: str) -> dict[str, Any]:
    """Adds texts, of which some may be empty, to the note that a record has."""
    note = "; ".join(text for text in (record.get("note"), *texts) if text)
    return record | ({"note": note} if note else {})


def is_of(record: dict[str, Any], run: Any, seed: int) -> bool:
    """Tells whether a record, perhaps of another machine, is of one seed of a run of the plan
    (slurm/plan.py): its name, its seed, and all that its configuration decides agree.
    """
    seeds = record["seeds"]
    if record.get("seeds_of") == "evaluation":  # several seeds of the probe of one encoder
        seeds = record["hyperparameters"]["evaluation"].get("pretraining_seeds", seeds)
    if record.get("plan") != run.name or seeds != [seed]:
        return False
    wanted = what_ran(run.config_of(seed) | {"plan": run.name})
    its = {name: record.get(name) for name in wanted}
    its["pretraining"] = record["pretraining"] | {"copy": None}
    return its == wanted and not is_stopped(record)


def is_stopped(record: dict[str, Any]) -> bool:
    """Tells whether a record is of a run that was stopped before its scheduled end."""
    return "stopped after" in record.get("note", "")


def facts_of(run: Path) -> dict[str, Any]:
    """Returns config, environment, results and metrics of one finished run."""
    run = Path(run)
    found = results.read(run)
    needs = ("recipe", "dataset", "arch", "epochs", "batch_size", "seed")
    config = documents.read_yaml(run / "config.yaml", "config", needs)
    if not {"method", "plan", "settings"} <= set(config):
        raise UserError(
            f"{run / 'config.yaml'} does not say the run's method and settings: start the run's "
            "command again, which notes them"
        )
    if results.checksum(run / results.BACKBONE) != found["backbone_sha256"]:
        raise UserError(f"{run / results.BACKBONE} is not the one that {results.NAME} describes")
    if not results.is_finished(run):
        raise UserError(f"{run} goes on after its results: start its command again, and let it end")
    return {
        "config": config,
        "environment": documents.read_json(run / environment.NAME, "environment", STARTS),
        "results": found,
        "metrics": metrics.read(run / metrics.NAME),
    }


def dataset_of(dataset: str, name: str) -> tuple[str, str | None]:
    """Returns (data set, which copy of it) from the flag and the name that a run prints."""
    found = re.search(r"\((.+)\)$", name)
    return DATASETS.get(dataset, "other"), found.group(1) if found else None


def part_of(config: dict[str, Any]) -> str | None:
    """Says what a run used of its training set, in stored records' words; None for all of it."""
    share, words = config.get("validation_share", 0.0), []
    if config.get("train_images", 0):
        draw = f" (draw {config['subset_seed']})" if config.get("subset_seed", 0) else ""
        words.append(f"{config['train_images']} images of it{draw}")
    if share:
        words.append(f"without {100 * share:g} % held out")
    return ", ".join(words) or None


def knn_record(runs: Sequence[Path]) -> dict[str, Any]:
    """Returns the record of what the runs' own k-NN monitor said after the last epoch."""
    record = of_runs(runs)
    facts = [facts_of(run) for run in runs]
    values = [f["results"]["knn"] for f in facts]
    if None in values:
        why = "--knn-every 0, no labelled test set, or one class"
        raise UserError(f"a run has no k-NN accuracy: {why}")
    what = record["pretraining"]
    before = [f["results"]["knn_before"] for f in facts]
    others = {}
    if None not in before:
        others["random encoder"] = [round(100 * v, 3) for v in before]
    missing = scored_on(facts[0]["config"], facts[0]["results"].get("unreadable", {}))
    record |= {
        "dataset": {"name": what["dataset"], "copy": what["copy"], "incomplete": missing},
        "protocol": "kNN (k200,t.1)",
        "metric": "top1",
        "others": others,
        "history": [history(f["metrics"]) for f in facts],
    }
    return with_values(record, [100 * v for v in values])


def scored_on(config: dict[str, Any], unreadable: dict[str, int], votes: bool = True) -> str | None:
    """Says which part of the data set the test had, with or without k-NN's `votes` of the training
    images; None for all of it.
    """
    words, share = [], config.get("validation_share", 0.0)
    if share and config.get("scored_on", "held-out") == "held-out":
        words.append(f"{100 * share:g} % of the training images, held out")
    if votes and config.get("train_images", 0):
        words.append(f"votes of {config['train_images']} images")
    words += [f"without {n} {what} images that cannot be read" for what, n in unreadable.items()]
    return ", ".join(words) or None


def history(logged: Sequence[dict[str, Any]]) -> dict[str, list[float | None]]:
    """Returns what a run's monitors said after each epoch, to draw curves from records."""
    epochs = [r for r in logged if r["kind"] == "epoch"]
    found = {"epoch": [r["epoch"] for r in epochs]}
    for name in HISTORY:
        if any(name in r for r in epochs):
            values = [r.get(name) for r in epochs]
            found[name] = [None if v is None else float(f"{v:.5g}") for v in values]
    return found


# -- the stored ones ------------------------------------------------------------------------------


def name_of(record: dict[str, Any]) -> str:
    """Names a file by what the record is; the name ends in a hash of what sets it apart."""
    what = record["pretraining"]
    parts = [record["method"], record["arch"], what["dataset"], f"{what['epochs'] or 0:g}ep"]
    parts += [record["dataset"]["name"], record["protocol"]]
    identity = [record[n] for n in ("config_hash", "seeds", "backbone_sha256", "metric")]
    identity += [*parts, record["dataset"], record["commit"], record.get("hyperparameters")]
    digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:8]
    words = "-".join(parts)[:200]  # a file's name has 255 bytes at most
    return re.sub(r"[^a-z0-9.]+", "-", f"{words}-{digest}".lower()) + ".json"


def add(record: dict[str, Any], allow_dirty: bool = False, folder: Path = RECORDS) -> Path:
    """Validates a record and stores it; returns its path. Raises UserError if it is refused."""
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
    write(path, text_of(record))
    return path


def twins(path: Path) -> list[str]:
    """Names the records beside `path` that are of the same backbones by the same protocol."""
    same = "backbone_sha256", "seeds", "protocol", "metric", "dataset"
    one = read(path)
    others = [(other, read(other)) for other in sorted(path.parent.glob("*.json")) if other != path]
    return [other.name for other, its in others if all(its.get(n) == one[n] for n in same)]


def load_all(folder: Path = RECORDS) -> list[tuple[str, dict[str, Any]]]:
    """Returns every stored record with its file's name, in order; raises UserError for a broken
    one.
    """
    records = []
    for path in sorted(folder.glob("*.json")):
        if not re.fullmatch(r"[A-Za-z0-9._-]+", path.name):
            raise UserError(f"{path}: rename it, to letters, digits, . _ and - (pages link to it)")
        record = read(path)
        if found := problems(record):
            raise UserError(f"{path}: {found[0]}")
        records.append((path.name, record))
    return records


def read(path: Path) -> dict[str, Any]:
    """Reads a file with a record, for `problems` to check; raises UserError if there is none."""
    return documents.read_json(path, "block")


# -- the command ----------------------------------------------------------------------------------


def say_stored(path: Path) -> None:
    print(f"stored {path}")
    for name in twins(path):
        print(
            f"warning: {name} has the same runs and protocol: remove one, or tables show them twice"
        )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__), formatter_class=argparse.RawDescriptionHelpFormatter
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
            say_stored(add(read(file), arguments.allow_dirty))
    elif arguments.what == "knn":
        say_stored(add(knn_record(arguments.runs), arguments.allow_dirty))
    else:
        print(f"{len(load_all())} records are as results/schema.json says")


if __name__ == "__main__":
    sys.exit(command(main))
