"""The plan of runs, results/plan.yaml, as command lines: results/ lists and records its runs,
slurm/sweep.py submits them.

The file holds tiers by name. A tier: dataset, arch and batch (if they are not the preset's), flags
of all its runs, flags by family of recipes/recipes.yaml under `families`, and its runs by name. A
run: recipe, flags (which win over the tier's; null takes one away), hours. seeds, evaluations,
device and basis stand in the tier or in the run. A recipe that lacks one of its flags is a mistake,
unless the tier names the flag under `optional`: then it does without. A tier may also have a
`prefix` of its names, `hours-factor`, by which its runs' hours are multiplied, `factors`, by which
the rates of the runs named are, and `rates`: each run is then run at each of these factors.
`{seed}` in a flag stands for the run's seed.
"""

import argparse
import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import cards
from common.errors import UserError, nearest_name
from common.run import documents
from slurm.submission import ask, flags_of

# the evaluations that a plan may ask for, with the protocols of their records
PROTOCOLS = {
    "knn": "kNN (k200,t.1)",
    "linear": "linear",
    "semi 1%": "semi-sup 1%",
    "semi 10%": "semi-sup 10%",
    "readout": "linear (L-BFGS), standardised",
    "readout first 22": "linear (L-BFGS), standardised, first 22 features",
    "untrained": "linear (L-BFGS), standardised, untrained",
    "classifier": "classifier",  # for SCRIPTS alone, which write its record when they end
}
SCRIPTS = {"supervised": "eval/supervised.py"}  # runs that are no recipe's, without card and family
DATA = {"imagenet": "its train/ and val/", "cifar10": "as the recipes' --data"}  # a flag for each
RATES = ("lr", "lr-biases")  # the flags that a factor of a run's rate multiplies
EITHER = ("seeds", "evaluations", "device", "basis")  # of the run, else of its tier


@dataclass(frozen=True)
class Planned:
    """A run of the plan: `hours` are those of one seed's training on `device`, `basis` says whether
    they were measured; `config` is what its config.yaml will hold, without the seed.
    """

    name: str
    tier: str
    recipe: str
    flags: list[str]
    seeds: list[int]
    evaluations: list[str]
    hours: float
    device: str
    basis: str
    config: dict[str, Any]

    @property
    def script(self) -> str:
        return script_of(self.recipe)

    def config_of(self, seed: int) -> dict[str, Any]:
        """Returns `config` with this seed in the place of {seed}."""
        return with_seed(self.config, seed)


@dataclass(frozen=True)
class Piece:
    """One seed of one run of the plan."""

    run: Planned
    seed: int

    @property
    def name(self) -> str:
        return f"{self.run.name}-{self.seed}"

    @property
    def dataset(self) -> str:
        return self.run.config["dataset"]

    def flags(self, output: str, data: str | None) -> list[str]:
        """Returns the flags of its training."""
        flags = [*with_seed(self.run.flags, self.seed), *(["--data", data] if data else [])]
        flags += ["--seed", str(self.seed), "--plan-name", self.run.name]
        return [*flags, "--output", output]


def script_of(recipe: str) -> str:
    return SCRIPTS.get(recipe, f"recipes/{recipe}.py")


def is_run(script: str) -> bool:
    """Tells whether a script leaves a run folder, as recipes do."""
    return script.startswith("recipes/") or script in SCRIPTS.values()


def with_seed(item: Any, seed: int) -> Any:
    """Returns the same with the seed for {seed} in every text of it."""
    if isinstance(item, dict):
        return {name: with_seed(part, seed) for name, part in item.items()}
    if isinstance(item, list):
        return [with_seed(part, seed) for part in item]
    return item.replace("{seed}", str(seed)) if isinstance(item, str) else item


def pieces(runs: Sequence[Planned]) -> Iterator[Piece]:
    """Yields the first seeds of all runs, then the second seeds, and so on."""
    for number in range(max((len(run.seeds) for run in runs), default=0)):
        for run in runs:
            if number < len(run.seeds):
                yield Piece(run, run.seeds[number])


def load(path: Path) -> dict[str, Planned]:
    """Returns a plan's runs by name; raises UserError if one lacks a field or names what is
    unknown.
    """
    found: dict[str, dict[str, Any]] = {}
    tiers = documents.read_yaml(path, "plan")["tiers"]
    for tier, of_tier in tiers.items():
        for name, run, factor in expanded(path, of_tier):
            if name in found or name in tiers:
                raise UserError(f"{path}: the name {name} appears twice")
            found[name] = merged(f"{path}: {name}", name, tier, of_tier, run, factor)
    answers = resolved(json.dumps([run.pop("asked") for run in found.values()]))
    return {
        name: Planned(**run, flags=answer["flags"], config=answer["config"])
        for (name, run), answer in zip(found.items(), answers, strict=True)
    }


def expanded(path: Path, of_tier: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], float]]:
    """Yields the runs of a tier with their names and the factors of their rates."""
    prefix, rates = of_tier.get("prefix", ""), of_tier.get("rates")
    factors = of_tier.get("factors") or {}
    if unknown := set(factors) - set(of_tier["runs"]):
        raise UserError(f"{path}: factors: {', '.join(sorted(unknown))} is no run of its tier")
    for name, run in of_tier["runs"].items():
        for rate in rates or [None]:
            factor = factors.get(name, 1) * (rate or 1)
            yield prefix + name + (f"-x{rate:g}" if rate else ""), run, factor


def merged(
    where: str,
    name: str,
    tier: str,
    of_tier: dict[str, Any],
    run: dict[str, Any],
    factor: float = 1,
) -> dict[str, Any]:
    """Merges a run's fields with its tier's; `asked` is what slurm/check.py is to resolve."""
    fields = {key: run.get(key, of_tier.get(key)) for key in EITHER}
    if missing := [key for key, value in fields.items() if not value]:
        raise UserError(f"{where}: {', '.join(missing)} missing, in the run and in its tier")
    if unknown := set(fields["evaluations"]) - set(PROTOCOLS):
        raise UserError(f"{where}: unknown evaluation {', '.join(sorted(unknown))}")
    recipe, families = run["recipe"], of_tier.get("families") or {}
    if recipe not in (known := {**cards.load(), **SCRIPTS}):
        raise UserError(f"{where}: no recipe {recipe}{nearest_name(recipe, known)}")
    if "classifier" in fields["evaluations"] and recipe not in SCRIPTS:
        raise UserError(f"{where}: {recipe} trains no classifier: leave that evaluation out")
    if unknown := set(families) - set(cards.FAMILIES):
        raise UserError(f"{where}: its tier has flags of no known family {', '.join(unknown)}")
    values = {"dataset": of_tier["dataset"], "arch": of_tier.get("arch")}
    values |= {"batch-size": of_tier.get("batch"), **(of_tier.get("flags") or {})}
    if recipe not in SCRIPTS:
        values |= families.get(cards.load()[recipe].family) or {}
    own = run.get("flags") or {}
    if factor != 1:
        whole = values | own
        if "lr" not in whole:
            raise UserError(f"{where}: there is a factor for its rate, but it has no lr")
        own = own | {n: float(f"{factor * whole[n]:.6g}") for n in RATES if n in whole}
    spare = [f for f in of_tier.get("optional") or [] if f in values and f not in own]
    optional = {flag: flags_of({flag: values.pop(flag)}, name) for flag in spare}
    asked = [script_of(recipe), flags_of(values | own, name), None, optional]
    hours = float(f"{run['hours'] * of_tier.get('hours-factor', 1):.3g}")
    own_fields = {"name": name, "tier": tier, "recipe": recipe, "hours": hours}
    return {**own_fields, **fields, "asked": asked}


@functools.cache  # the question starts a process that imports every recipe
def resolved(asked: str) -> list[dict[str, Any]]:
    return ask(json.loads(asked))


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    for name, words in DATA.items():
        parser.add_argument(f"--{name}", default="", metavar="PATH", help=words)


def chosen(runs: dict[str, Planned], names: Sequence[str]) -> list[Planned]:
    """Returns the runs of these names and of the tiers of these names."""
    tiers = {run.tier for run in runs.values()}
    for name in names:
        if name not in {*runs, *tiers}:
            hint = nearest_name(name, [*runs, *tiers])
            raise UserError(f"--only {name}: no such run or tier in the plan{hint}")
    return [run for run in runs.values() if {run.name, run.tier} & {*names}]
