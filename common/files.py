"""Files that are there whole or not at all: written beside their place, then renamed."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path beside `path` to write to, which becomes `path` at the end of the block.

    If the block fails, what was written is removed and `path` stays as it was. The name holds the
    process, so that two processes that write the same file do not meet.
    """
    beside = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def write(path: Path, content: str | bytes) -> None:
    """Writes a whole file; at every moment `path` is the old file or the new one, whole."""
    with replacing(path) as beside:
        beside.write_bytes(content.encode() if isinstance(content, str) else content)
