"""Records: the fields that a finished run gives, and what makes a record whole.

An evaluation takes `of_runs`, adds what it measured, and writes a JSON file that
`python results/record.py add` stores; results/schema.json says what is in it.
"""

import contextlib
import dataclasses
import datetime
import functools
import hashlib
import importlib
import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from common.config import RunConfig, numbers_of, parse, values_before
from common.errors import UserError
from common.run import backbone, environment, metrics

SCHEMA = Path(__file__).resolve().parent.parent / "results" / "schema.json"

METHODS = {
    "nnclr": "NNCLR",
    "nnsiam": "NNSiam",
    "snclr": "SNCLR",
    "simsiam_gsg": "SimSiam-GSG",
    "byol_gsg": "BYOL-GSG",
}
# flags that do not make another experiment: places, speed, and what has its own field in a record
ROW = ("dataset", "arch", "epochs", "batch_size", "follow", "gsg")  # these choose the presets too
NOT_SETTINGS = {"recipe", "seed", *ROW, "train_images", "validation_share"}
NOT_SETTINGS |= {"precision", "augment_device", "compile"}  # where, and in which order of sums
DATASETS = {"imagenet": "ImageNet-1k", "cifar10": "CIFAR-10", "photos": "photos"}
PLACES = {"data", "output", "workers", "download", "wandb", "knn_every", "checkpoint_minutes"}
PLACES |= {"snapshot_epochs", "resume", "max_steps", "on_bad_image", "config"}


def problems(record: Any) -> list[str]:
    """What is wrong with a record, one line each; empty for a good one."""
    import jsonschema

    validator = jsonschema.Draft202012Validator(json.loads(SCHEMA.read_text()))
    found = []
    for error in sorted(validator.iter_errors(record), key=lambda e: [*map(str, e.path)]):
        where = ".".join(map(str, error.path)) or "the record"
        found.append(f"{where}: {error.message}")
    if found:
        return found
    seeds = record["seeds"]
    if len(set(seeds)) != len(seeds):
        found.append(f"seeds: {seeds} repeat")
    for number, part in enumerate([record, *record.get("scores", [])]):
        where = f"scores.{number - 1}." if number else ""
        found += [where + text for text in wrong_numbers(part, len(seeds))]
    return found


def wrong_numbers(part: dict[str, Any], seeds: int) -> list[str]:
    """What is wrong with the value, values and spread of a record or of one of its scores."""
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
    """Standard deviation over seeds (n - 1), None for one."""
    return statistics.stdev(values) if len(values) > 1 else None


def of_runs(runs: Sequence[Path]) -> dict[str, Any]:
    """The fields of a record that come from finished run folders; of several, the runs must differ
    in the seed only. An evaluation adds `dataset`, `protocol`, `metric`, its values and command.
    """
    facts = [facts_of(run) for run in runs]
    first = facts[0]
    for run, other in zip(runs[1:], facts[1:], strict=True):
        differing = {n for n in first["config"] if first["config"][n] != other["config"].get(n)}
        differing -= {"seed", *PLACES}
        if differing:
            raise UserError(
                f"{run} differs from {runs[0]} in {', '.join(sorted(differing))}: one record is of "
                "runs that differ in the seed only"
            )
    config, seen = first["config"], first["environment"]
    commits = {f["results"]["commit"] for f in facts}
    if len(commits) > 1:
        raise UserError(f"the runs are of {len(commits)} commits: make one record for each")
    name, copy = dataset_of(config["dataset"], first["results"]["dataset"])
    return {
        "method": method_of(config),
        "recipe": config["recipe"],
        "arch": config["arch"],
        "pretraining": {
            "dataset": name,
            "copy": copy,
            "incomplete": part_of(config),
            "epochs": round(first["results"]["epoch"], 4),
            "batch": config["batch_size"],
        },
        "seeds": [f["config"]["seed"] for f in facts],
        "seeds_of": "pretraining",
        "epoch": "last",
        "settings": settings_of(config),
        "commit": commits.pop(),
        "dirty": any(f["results"]["dirty"] is not False for f in facts),
        "config_hash": first["results"]["config_hash"],
        "command": [f["environment"]["command"] for f in facts],
        "versions": {n: v for n, v in seen["versions"].items() if v is not None},
        "hardware": f"{seen['devices']['name']} x {seen['devices']['ranks']}",
        "hours": round(statistics.fmean(f["results"]["hours"] for f in facts), 4),
        "images_per_second": round(
            statistics.fmean(f["results"]["images_per_second"] for f in facts), 1
        ),
        "backbone_sha256": [f["results"]["backbone_sha256"] for f in facts],
        "date": datetime.date.today().isoformat(),
        **note_of(config["epochs"], first["results"]["epoch"]),
    }


def note_of(scheduled: float, done: float) -> dict[str, str]:
    """A note for a run that was stopped (--max-steps): its rate had not come to its end."""
    if done >= scheduled:
        return {}
    return {"note": f"stopped after {done:g} of {scheduled:g} scheduled epochs"}


def facts_of(run: Path) -> dict[str, Any]:
    """config, environment and results of one finished run."""
    run = Path(run)
    if not (run / "results.json").exists():
        raise UserError(f"{run} is no finished run: it has no results.json")
    config = yaml.safe_load((run / "config.yaml").read_text())
    results = read(run / "results.json")
    stored = hashlib.sha256((run / backbone.NAME).read_bytes()).hexdigest()
    if stored != results["backbone_sha256"]:
        raise UserError(f"{run / backbone.NAME} is not the one that results.json was written for")
    return {
        "config": config,
        "environment": read(run / environment.NAME),
        "results": results,
        "metrics": metrics.read(run / metrics.NAME),
    }


def part_of(config: dict[str, Any]) -> str | None:
    """What a run used of its training set, in words; None for all of it."""
    share, words = config.get("validation_share", 0.0), []
    if config.get("train_images", 0):
        words.append(f"{config['train_images']} images of it")
    if share:
        words.append(f"without the {100 * share:g} % held out")
    return ", ".join(words) or None


def method_of(config: dict[str, Any]) -> str:
    """The paper's name of what a configuration runs."""
    recipe = config["recipe"]
    name = METHODS.get(recipe, recipe)  # a recipe of somebody else's
    if recipe.endswith("_gsg") and not config["gsg"]:
        name = "BYOL (SimSiam heads)" if recipe == "byol_gsg" else "SimSiam"
    if config.get("momentum_encoder"):
        name += " (momentum encoder)"
    if config.get("follow") == "official":
        name += " (official)"
    return name


def dataset_of(dataset: str, name: str) -> tuple[str, str | None]:
    """(data set, which copy of it) from the flag and the name that a run prints."""
    found = re.search(r"\((.+)\)$", name)
    return DATASETS.get(dataset, "other"), found.group(1) if found else None


def settings_of(config: dict[str, Any]) -> dict[str, Any]:
    """The values of a run's configuration that enter its numbers and are not what its recipe has
    for this data set, encoder, length and reading of the paper, however they were given.
    """
    own = preset_of(config["recipe"], config)
    before = values_before(own)
    found = {}
    for name, value in numbers_of(own).items():
        ours = config.get(name, before.get(name, value))  # a run that is older than the field
        if name not in NOT_SETTINGS | PLACES and ours != value and is_setting(name, ours, config):
            found[name] = ours
    return found


def is_setting(name: str, value: Any, config: dict[str, Any]) -> bool:
    """False for the values that make nothing but speed: pieces of a batch where there is no batch
    norm in the encoder, and the other way to the same views, bit for bit.
    """
    if name == "micro_batch":
        return not config["arch"].startswith("vit")
    return (name, value) != ("input", "reference")


def preset_of(recipe: str, config: dict[str, Any]) -> RunConfig:
    """What a recipe runs without any other flag than those that choose the row of a table."""
    flags = []
    for name in ROW:
        flag, value = name.replace("_", "-"), config.get(name)
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        elif value is not None:
            flags += [f"--{flag}", str(value)]
    return resolved(recipe, tuple(flags))


@functools.cache
def resolved(recipe: str, flags: tuple[str, ...]) -> RunConfig:
    """The configuration that a recipe makes of a command line; UserError where it refuses it."""
    module = importlib.import_module(f"recipes.{recipe}")  # by name: nothing here knows a recipe
    resolve = getattr(module, "resolve", None) or module.check
    return parse(module.Config, module.PRESETS, flags, resolve)


def as_shown(record: dict[str, Any]) -> dict[str, Any]:
    """The record as tables read it: without settings that are the recipe's own. Older records have
    every flag of their command line there, also one that says what holds without it.
    """
    settings, what = record.get("settings"), record["pretraining"]
    if not settings or record["recipe"] not in METHODS:
        return record
    scheduled = re.search(r"of (\S+) scheduled epochs", record.get("note", ""))
    epochs = float(scheduled[1]) if scheduled else what["epochs"]
    config = {
        "dataset": {name: flag for flag, name in DATASETS.items()}.get(what["dataset"]),
        "arch": record["arch"],
        "epochs": None if epochs is None else round(epochs),
        "batch_size": what["batch"],
    }
    if record["method"].endswith(" (official)"):
        config["follow"] = "official"
    if record["recipe"].endswith("_gsg"):
        config["gsg"] = "GSG" in record["method"]
    own: dict[str, Any] = {}
    with contextlib.suppress(UserError):  # no row of this recipe: nothing is its own
        own = dataclasses.asdict(preset_of(record["recipe"], config))
    return record | {"settings": differing(settings, own)}


def differing(settings: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The settings that are not a recipe's `own` values."""
    return {n: v for n, v in settings.items() if n not in own or own[n] != v}


def with_values(record: dict[str, Any], values: Sequence[float]) -> dict[str, Any]:
    """The record with its values in percent, one for each seed, their mean and spread."""
    values = [round(v, 3) for v in values]
    spread = spread_of(values)
    mean = round(statistics.fmean(values), 3)
    return record | {
        "value": mean,
        "values": values,
        "spread": spread if spread is None else round(spread, 3),
    }


def read(path: Path) -> Any:
    """A JSON file; UserError where there is none."""
    try:
        return json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
