"""What a run says may find no reader: a closed pipe or terminal does not end it."""

import errno
import os
import sys
from collections.abc import Callable
from typing import Any, TextIO

GONE = {errno.EPIPE, errno.EIO, errno.ENXIO, errno.ECONNRESET}  # the reader, or the terminal


class Outlasting:
    """An output stream that drops what is written once its reader is gone."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self.unless_gone(self.stream.write, text)

    def flush(self) -> None:
        self.unless_gone(self.stream.flush)

    def unless_gone(self, do: Callable, *arguments: str) -> Any:
        try:
            return do(*arguments)
        except OSError as error:
            if error.errno not in GONE:
                raise
        with open(os.devnull, "w") as nothing:  # for what is buffered, and for libraries in C too
            os.dup2(nothing.fileno(), self.stream.fileno())


def outlast_readers() -> None:
    """Lets this process go on from now on even if nobody reads what it says."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115, as long as the process
        if not isinstance(stream, Outlasting):
            setattr(sys, name, Outlasting(stream))
