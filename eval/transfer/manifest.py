"""The manifests: where each dataset comes from, what it holds, how it is split."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, nearest_name
from common.run import documents

FOLDER = Path(__file__).resolve().parent / "manifests"
# in the order of the papers' tables (BYOL Table 3)
DATASETS = ("food101", "cifar10", "cifar100", "birdsnap", "sun397", "cars", "aircraft", "voc2007")
DATASETS = (*DATASETS, "dtd", "pets", "caltech101", "flowers")


@dataclass(frozen=True)
class Manifest:
    """One dataset. `images` are counts by official part; `splits` says for each protocol how
    validation is made, and the sizes of train, val and test.
    """

    key: str
    name: str  # the name that results/published.yaml gives it
    metric: str
    classes: int
    source: str
    licence: str
    folder: str  # below --root
    layout: list[str]  # files and folders that must be there
    images: dict[str, int]
    archives: list[dict[str, Any]]
    splits: dict[str, dict[str, Any]]
    by_hand: list[str]
    megabytes: int = 0  # of all archives
    per_class: dict[str, int] = field(default_factory=dict)
    dead: str | None = None  # if the official link is dead: what became of it
    draw: int | None = None  # number of images per class that are drawn for train and val together
    lists: dict[str, dict[str, Any]] = field(default_factory=dict)

    def split(self, protocol: str) -> dict[str, Any]:
        """Returns a protocol's split; ssl-transfer's differs from GSG's in Caltech-101 only."""
        return self.splits.get(protocol, self.splits["gsg"])


def load(key: str) -> Manifest:
    path = FOLDER / f"{key}.yaml"
    return Manifest(key=key, **documents.read_yaml(path))


def chosen(names: str) -> list[str]:
    """Returns the keys of a comma-separated list, in the order of DATASETS; all for an empty list.
    Raises UserError for a name that is no data set's.
    """
    given = [name.strip().lower() for name in names.split(",") if name.strip()]
    for name in given:
        if name not in DATASETS:
            near = nearest_name(name, DATASETS)
            raise UserError(f"--datasets {name}: none of {', '.join(DATASETS)}{near}")
    return [key for key in DATASETS if key in given] if given else list(DATASETS)
