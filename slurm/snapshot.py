"""The code that a job runs: the commit it was submitted with, whatever the tree becomes later.

A snapshot is a folder with the tree's files and `.commit`, one line: the commit, and "dirty" where
the files are not quite its own. `common/run/environment.py` reads it, so a run knows what it ran.
"""

import io
import shutil
import subprocess
import tarfile
from pathlib import Path

from common.errors import UserError
from common.run.environment import NO_CODE

LARGEST = 200e6  # bytes; a larger dirty snapshot holds data or runs that git does not ignore


def commit(repository: Path) -> tuple[str, list[str]]:
    """Returns (commit, changed files) of a checkout. Changes in results/, runs/ and README.md,
    which results/report.py writes, do not count.
    """
    head = git(repository, "rev-parse", "HEAD").decode().strip()
    status = git(repository, "status", "--porcelain", "-z", "--", ".", *NO_CODE)
    return head, [entry[3:] for entry in status.decode().split("\0") if entry[2:3] == " "]


def check(repository: Path, allow_dirty: bool) -> tuple[str, bool]:
    """Returns (commit, dirty); raises UserError for a dirty tree that is not allowed, or no
    checkout.
    """
    head, changed = commit(repository)
    if changed and not allow_dirty:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise UserError(
            f"uncommitted changes ({', '.join(changed[:3])}{more}): a job runs a commit, so that "
            "its numbers can be traced; commit them, or give --allow-dirty to run the tree as it is"
        )
    return head, bool(changed)


def take(repository: Path, folder: Path, allow_dirty: bool = False) -> str:
    """Writes the snapshot into `folder` (which must not exist) and returns its .commit line."""
    head, dirty = check(repository, allow_dirty)
    folder.mkdir(parents=True)
    if dirty:
        copy_tree(repository, folder)
    else:
        archive = git(repository, "archive", "--format=tar", head)
        with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
            tar.extractall(folder, filter="data")
    line = f"{head} dirty" if dirty else head
    (folder / ".commit").write_text(line + "\n")
    return line


def copy_tree(repository: Path, folder: Path) -> None:
    """Copies tracked and untracked files as they are now; what git ignores stays behind."""
    names = git(repository, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    paths = [repository / name for name in names.decode().split("\0") if name]
    paths = [path for path in paths if path.is_symlink() or path.is_file()]  # not the deleted ones
    size = sum(path.lstat().st_size for path in paths)
    if size > LARGEST:
        largest = max(paths, key=lambda path: path.lstat().st_size).relative_to(repository)
        raise UserError(
            f"the tree's files add up to {size / 1e6:.0f} MB (the largest: {largest}), too much to "
            "copy for a job: name data and runs in .gitignore"
        )
    for path in paths:
        target = folder / path.relative_to(repository)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, target, follow_symlinks=False)


def git(repository: Path, *arguments: str) -> bytes:
    """Returns what git prints; raises UserError if there is no git or no checkout."""
    try:
        done = subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True)
    except OSError as error:
        raise UserError(f"git cannot be started ({error.strerror}): install it") from None
    if done.returncode:
        said = done.stderr.decode().strip().split("\n")[0]
        raise UserError(f"{repository} is no usable git checkout, so there is no commit: {said}")
    return done.stdout
