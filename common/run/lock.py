"""One process at a time writes in a run's folder.

The lock is the kernel's on a file (POSIX, `fcntl.lockf`), so it ends with its process, however that
ends. It holds between processes of one machine; between machines on NFS 4, on NFS 3 with its lock
daemon, and on Lustre and GPFS as they are usually mounted (not tested here). If the file system
has no locks, a warning says so and nothing is locked.
"""

import errno
import fcntl
import os
import socket
import time
from pathlib import Path
from typing import TextIO

from common.errors import UserError

NAME = ".lock"
WAIT = 10.0  # seconds: a job that was requeued may start while the one before still ends
UNSUPPORTED = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)


def take(folder: Path, wait: float | None = None) -> TextIO | None:
    """Returns the locked file, to be kept open; None if the file system has no locks. Raises
    UserError that names the process which has it, if it does not end within `wait` seconds (WAIT).
    """
    try:
        file = open(folder / NAME, "a+")  # noqa: SIM115, open as long as the process
    except OSError as error:
        raise UserError(f"{folder / NAME} cannot be written ({error.strerror})") from None
    end = time.monotonic() + (WAIT if wait is None else wait)
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except OSError as error:
            if error.errno in UNSUPPORTED:
                print(f"warning: {folder} is on a file system without locks: start no second run")
                return None
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() > end:
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise UserError(
                f"{folder} is written by {holder}: wait for it, or use another --output"
            )
        time.sleep(0.2)
    file.truncate(0)
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {since}")
    file.flush()
    return file
