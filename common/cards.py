"""The cards of recipes/recipes.yaml: what the rest of the project knows of a recipe, as data."""

import functools
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError

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
    """Every recipe's card by the name of its script, in the order of the tables.

    Raises UserError for a card that lacks a field, has one too many, or is of no known family.
    """
    cards = {}
    for recipe, card in (yaml.safe_load(path.read_text()) or {}).items():
        wrong = {f.name for f in fields(Card)} ^ set(card)
        if wrong:
            raise UserError(f"{path}: {recipe}: {', '.join(sorted(wrong))} missing or unknown")
        if card["family"] not in FAMILIES:
            known = ", ".join(FAMILIES)
            raise UserError(f"{path}: {recipe}: family {card['family']} is none of {known}")
        cards[recipe] = Card(**card)
    return cards


def methods(path: Path = CARDS) -> list[str]:
    """The names of all methods, in the order of the tables."""
    return [name for card in load(path).values() for name in card.methods]


def method_of(recipe: str, config: dict[str, Any]) -> str:
    """The paper's name of what a run's configuration does; without a card, the recipe's own."""
    card = load().get(recipe)
    name = recipe
    for method, flags in card.methods.items() if card else ():
        if all(config.get(flag) == value for flag, value in flags.items()):
            name = method
    return f"{name} (official)" if config.get("follow") == "official" else name
