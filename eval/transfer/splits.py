"""Which images train, validate and test: GSG's, BYOL's and ssl-transfer's splits, sizes asserted.

Random draws are numpy's RandomState(seed), which is ssl-transfer's generator: with seed 0 its 20 %
are the first fifth of the very permutation that linear.py makes.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError
from eval.transfer.manifest import Manifest
from eval.transfer.readers import Pool


@dataclass
class Splits:
    """Indices into a pool, and what is missing of the dataset, in words (None: it is whole)."""

    train: np.ndarray
    val: np.ndarray
    test: np.ndarray
    incomplete: str | None


def make(
    manifest: Manifest,
    pool: Pool,
    protocol: str,
    seed: int = 0,
    lists: Path | None = None,
    allow_incomplete: bool = False,
) -> Splits:
    """Returns the splits of a protocol; raises UserError if their sizes are not the protocol's,
    unless `allow_incomplete`, which says the counts instead.
    """
    rule = manifest.split(protocol)
    rng = np.random.RandomState(seed)
    if manifest.draw:
        if protocol == "ssl-transfer":
            parts = listed(manifest, pool, lists, allow_incomplete)
        else:
            parts = drawn(pool, manifest.draw, rng)
    else:
        parts = pool.parts
    train, val = validation(rule, pool.labels, parts, rng)
    result = Splits(train, val, parts["test"], None)
    sizes = {name: len(getattr(result, name)) for name in ("train", "val", "test")}
    wrong = [f"{n} {sizes[n]} of {rule[n]}" for n in sizes if sizes[n] != rule[n]]
    if not wrong:
        wrong = uneven(manifest, pool)
    if wrong:
        text = ", ".join(wrong)
        if not allow_incomplete:
            raise UserError(
                f"{manifest.name} has another size than --splits {protocol} says ({text} images); "
                "complete it, or use --allow-incomplete, which keeps the counts in the record"
            )
        empty = [n for n in sizes if sizes[n] == 0]
        if empty:
            raise UserError(f"{manifest.name}: no images to {empty[0]} on ({text})")
        result.incomplete = text
    return result


def validation(
    rule: dict, labels: np.ndarray, parts: dict[str, np.ndarray], rng: np.random.RandomState
) -> tuple[np.ndarray, np.ndarray]:
    """Returns (train, val) by a manifest's rule: given, random, or so many of each class. If a
    dataset is incomplete, its validation set keeps its share.
    """
    train = parts["train"]
    if rule["validation"] == "given":
        return train, parts["val"]
    whole = rule["train"] + rule["val"]
    if rule["validation"] == "per class":
        share = rule["val"] / whole
        val = []
        for label in np.unique(labels[train]):
            members = train[labels[train] == label]
            count = rule["per_class"] if len(train) == whole else round(share * len(members))
            val.append(rng.choice(members, min(count, len(members) - 1), replace=False))
        val = np.sort(np.concatenate(val))
        return np.setdiff1d(train, val), val
    count = rule["val"] if len(train) == whole else int(rule["val"] / whole * len(train))
    order = np.arange(len(train))
    rng.shuffle(order)
    return np.sort(train[order[count:]]), np.sort(train[order[:count]])


def drawn(pool: Pool, each: int, rng: np.random.RandomState) -> dict[str, np.ndarray]:
    """Draws so many distinct images of each class to train on, the rest is to test (GSG App. D.1);
    of a class with too few it takes all but one.
    """
    train = []
    for label in np.unique(pool.labels):
        members = np.flatnonzero(pool.labels == label)
        train.append(rng.choice(members, min(each, len(members) - 1), replace=False))
    chosen = np.sort(np.concatenate(train))
    return {"train": chosen, "test": np.setdiff1d(np.arange(len(pool.labels)), chosen)}


def listed(
    manifest: Manifest, pool: Pool, folder: Path | None, allow_incomplete: bool
) -> dict[str, np.ndarray]:
    """Returns Caltech-101 by ssl-transfer's train.txt and test.txt: lines like
    "accordion/image_0001.jpg 1".

    They were drawn with replacement and written without repeats: 17 to 30 images per class.
    """
    if folder is None:
        raise UserError(
            "--splits ssl-transfer on Caltech101 needs --caltech-lists FOLDER with train.txt and "
            "test.txt of ssl-transfer's caltech101-splits/ (github.com/linusericsson/ssl-transfer)"
        )
    names = [pool.images.path(i) for i in range(len(pool.images))]
    places = {"/".join(Path(name).parts[-2:]): index for index, name in enumerate(names)}
    parts = {}
    for file, facts in manifest.lists.items():
        path = folder / file
        if not path.is_file():
            raise UserError(f"--caltech-lists {folder}: no {file} there")
        content = path.read_bytes()
        lines = [line.split() for line in content.decode().splitlines() if line.strip()]
        same = hashlib.sha256(content).hexdigest() == facts["sha256"]
        if not same and not allow_incomplete:
            raise UserError(
                f"{path} ({len(lines)} lines) is not ssl-transfer's ({facts['lines']} lines, "
                f"sha256 {facts['sha256'][:8]}…); --allow-incomplete takes it nevertheless"
            )
        found = [places[name] for name, _ in lines if name in places]
        if any(pool.labels[places[n]] != int(y) for n, y in lines if n in places):
            raise UserError(f"{path}: its class numbers are not those of the sorted class folders")
        parts[file.removesuffix(".txt")] = np.array(found, dtype=np.int64)
    return parts


def uneven(manifest: Manifest, pool: Pool) -> list[str]:
    """Says what is wrong with the number of classes, or with counts that must be equal."""
    if pool.labels.ndim == 2:
        return []
    wrong = []
    classes = len(np.unique(pool.labels))
    if classes != manifest.classes:
        wrong.append(f"{classes} of {manifest.classes} classes")
    for part, count in manifest.per_class.items():
        counts = np.bincount(pool.labels[pool.parts[part]], minlength=manifest.classes)
        if (counts != count).any():
            label = int(np.flatnonzero(counts != count)[0])
            wrong.append(f"{part} class {label} {counts[label]} of {count}")
    return wrong
