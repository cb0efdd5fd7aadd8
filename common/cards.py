"""The cards of recipes/recipes.yaml: what the rest of the project knows of a recipe, as data."""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.run import documents

CARDS = Path(__file__).resolve().parents[1] / "recipes" / "recipes.yaml"
FAMILIES = ("contrastive", "non-contrastive", "clustering")


@dataclass(frozen=True)
class Card:
    """One recipe's card; recipes/recipes.yaml says what each field means."""

    methods: dict[str, dict[str, Any]]
    family: str
    paper: str
    chooses: list[str]
    linear: str | None
    finetune: str | None
    metrics: dict[str, str]
    smallest: list[str]


@functools.cache
def load(path: Path = CARDS) -> dict[str, Card]:
    """Returns every recipe's card by the name of its script, in the order of recipes.yaml.

    Raises UserError for a card that does not fit schemas/cards.yaml, or names another's method.
    """
    cards, methods = {}, {}
    for recipe, card in (documents.read_yaml(path, "cards") or {}).items():
        cards[recipe] = Card(**card)
        twice = [m for m in card["methods"] if m in methods]
        if twice:
            raise UserError(f"{path}: {recipe}: the method {twice[0]} is {methods[twice[0]]}'s too")
        methods |= dict.fromkeys(card["methods"], recipe)
    return cards


def methods(path: Path = CARDS) -> list[str]:
    """Returns the names of all methods, in the order of recipes.yaml."""
    return [name for card in load(path).values() for name in card.methods]


def protocol(recipe: str | None, kind: str, known: Iterable[str]) -> str | None:
    """Returns the protocol that a recipe's card names for its `kind` of evaluation, "linear" or
    "finetune"; None without a card or if it names none. Raises UserError for one not in `known`.
    """
    card = load().get(recipe)
    name = getattr(card, kind) if card else None
    if name is not None and name not in known:
        raise UserError(f"{CARDS}: {recipe}: {kind}: {name} is none of {', '.join(known)}")
    return name


def method_of(recipe: str, config: dict[str, Any]) -> str:
    """Returns the paper's name of what a configuration does, or the recipe's own without a card."""
    card = load().get(recipe)
    name = recipe
    for method, flags in card.methods.items() if card else ():
        if unknown := [flag for flag in flags if config and flag not in config]:
            raise UserError(f"{CARDS}: {recipe}: {method}: {unknown[0]} is no flag of the recipe")
        if all(config.get(flag) == value for flag, value in flags.items()):
            name = method
    return f"{name} (official)" if config.get("follow") == "official" else name
