"""Downloads what can still be downloaded of the 12 datasets, and checks what is there.

    python eval/transfer/prepare.py                     # says what it would download
    python eval/transfer/prepare.py --root DIR --all
    python eval/transfer/prepare.py --root DIR --datasets pets,dtd
    python eval/transfer/prepare.py --root DIR --check  # downloads nothing

Prints a table: ready, incomplete with counts, or missing with the steps by hand. Ends with 0 when
all are ready. What is downloaded, from where and under which licence: eval/transfer/manifests/.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import common.run.early  # noqa: F401  # isort: skip
import numpy as np

from common.errors import UserError, command, make_folder
from common.run import documents
from common.run.help import in_80_columns
from eval.transfer import manifest as manifests
from eval.transfer.manifest import DATASETS, Manifest

if TYPE_CHECKING:
    from eval.transfer.readers import Pool


@dataclass
class State:
    """Says whether a data set is ready, incomplete or missing, and why."""

    word: str
    detail: str


def state_of(manifest: Manifest, root: Path) -> State:
    """Returns what there is of a dataset below `root`."""
    from eval.transfer.readers import read  # imports torch, which the list need not wait for
    from eval.transfer.splits import uneven

    try:
        pool = read(manifest, root)
    except UserError as error:
        absent = [path for path in manifest.layout if not (root / path).exists()]
        if len(absent) == len(manifest.layout):
            return State("missing", f"nothing at {root / manifest.folder}")
        text = f"no {', '.join(absent)}" if absent else str(error).rsplit("; python", 1)[0]
        return State("incomplete", text)
    copy = f"{pool.copy}, " if pool.copy else ""
    found = {name: len(part) for name, part in pool.parts.items()}
    counts = ", ".join(f"{name} {n} of {manifest.images[name]}" for name, n in found.items())
    wrong = uneven(manifest, pool) + empty_files(pool)
    if found != manifest.images or wrong:
        return State("incomplete", copy + "; ".join([counts, *wrong]))
    return State("ready", copy + ", ".join(f"{name} {n}" for name, n in found.items()))


def empty_files(pool: "Pool") -> list[str]:
    """Says how many image files hold nothing, as an interrupted copy leaves them."""
    if not hasattr(pool.images, "paths"):
        return []
    sizes = np.array([Path(pool.images.path(i)).stat().st_size for i in range(len(pool.images))])
    return [f"{int((sizes == 0).sum())} empty files"] if (sizes == 0).any() else []


def download(manifest: Manifest, root: Path) -> None:
    """Fetches and unpacks a dataset's archives; raises UserError for the first that fails."""
    from eval.transfer.archives import fetch, is_archive, unpack

    for archive in manifest.archives:
        folder = root / archive.get("into", ".")
        path = fetch(archive["url"], folder, archive["md5"])
        if is_archive(path):
            unpack(path, folder)
        if archive.get("inner"):  # an archive within the archive
            unpack(folder / archive["inner"], folder)


def prepare(manifest: Manifest, root: Path, check_only: bool) -> State:
    """Returns a dataset's state, after downloading what is not there."""
    state = state_of(manifest, root)
    if state.word == "ready" or check_only or not manifest.archives:
        return state
    try:
        download(manifest, root)
    except UserError as error:
        return State(state.word, f"{state.detail}; {error}")
    return state_of(manifest, root)


def print_table(states: dict[str, State], root: Path) -> None:
    print(f"{'dataset':12} {'state':12} what is there")
    for key, state in states.items():
        print(f"{key:12} {state.word:12} {state.detail}")
    for key, state in states.items():
        if state.word == "ready":
            continue
        manifest = manifests.load(key)
        print(f"\n{manifest.name} by hand ({manifest.source}; licence: {manifest.licence})")
        if manifest.dead:
            print(f"  note: {manifest.dead}")
        for number, step in enumerate(manifest.by_hand, 1):
            print(f"  {number}. {step.replace('ROOT', str(root))}")


def print_downloads(root: Path | None) -> float:
    """Prints a table of what would be downloaded, without what is ready in `root`; returns GB."""
    total = 0.0
    print(f"{'dataset':12} {'download':>10}  from, and what it takes")
    for key in DATASETS:
        manifest = manifests.load(key)
        ready = root is not None and root.is_dir() and state_of(manifest, root).word == "ready"
        size, said = "by hand", manifest.dead or "no archive to download"
        if manifest.archives:
            size, said = f"{manifest.megabytes:,} MB", manifest.source
        if ready:
            size, said = "-", f"ready in {root}"
        elif manifest.archives:
            total += manifest.megabytes / 1000
        print(f"{key:12} {size:>10}  {said} (licence: {manifest.licence})")
    return total


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=in_80_columns(__doc__),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--root", type=Path, help="folder of all datasets")
    parser.add_argument("--all", action="store_true", help="download all that can be")
    parser.add_argument("--datasets", "--only", default="", help=f"some of {', '.join(DATASETS)}")
    parser.add_argument("--check", action="store_true", help="download nothing")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    arguments = parse_arguments(argv)
    root = documents.expanded(arguments.root) if arguments.root else None
    if not (arguments.all or arguments.datasets or arguments.check):
        total = print_downloads(root)
        raise UserError(
            f"nothing was downloaded: say --all for these {total:.1f} GB, or --datasets NAMES, "
            "with --root DIR"
        )
    if root is None:
        raise UserError(
            "--root DIR is missing: the folder that holds the datasets or is to hold them"
        )
    keys = manifests.chosen(arguments.datasets)
    if not root.is_dir():
        if arguments.check or root.exists():
            raise UserError(f"--root {root}: no such folder")
        make_folder(root, "--root")
    states = {}
    for key in keys:
        print(f"{key} …", flush=True)
        states[key] = prepare(manifests.load(key), root, arguments.check)
    print_table(states, root)
    unready = [key for key, state in states.items() if state.word != "ready"]
    if unready:
        raise UserError(f"{len(unready)} of {len(states)} datasets not ready: {', '.join(unready)}")


if __name__ == "__main__":
    sys.exit(command(main))
