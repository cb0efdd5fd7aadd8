"""One clear line for a mistake, and the exit codes of every command."""

import errno
import functools
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL: stopped on request, start the same command again

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
FORBIDDEN = {errno.EROFS, errno.EACCES, errno.EPERM}
DISK_ERRORS = {*FULL, errno.EROFS}
ODD_PATH = {errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.ENXIO}
# what PyTorch says of more bytes than there are, or than can be counted
NO_MEMORY = ("can't allocate memory", "size calculation overflowed", "Overflow when unpacking")


class UserError(Exception):
    """A mistake that the user can fix. One line says what is wrong, where, and what to do.

    Rank 0 says it, since all ranks meet it alike (a wrong flag). `this_rank=True` marks what one
    rank alone meets (a corrupt image, a killed loader worker): that rank says it.
    """

    def __init__(self, message: str, this_rank: bool = False):
        super().__init__(message)
        self.this_rank = this_rank


class PeerFailed(Exception):  # noqa: N818, another rank says the error
    """Ends this rank without a word: another rank has met an error and says it."""


class Stopped(Exception):  # noqa: N818, it is no error
    """The run was asked to stop, has saved its state and can be continued."""


def nearest_name(name: str, choices, cutoff: float = 0.5) -> str:
    """Returns `"; did you mean X?"` for the choice nearest to `name`, or an empty string if no
    choice has a difflib ratio of `cutoff`.
    """
    import difflib

    near = difflib.get_close_matches(name, list(choices), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def nearest_path(name: str, choices) -> str:
    """Returns a stricter `nearest_name`, since any folder has names that are a little alike."""
    return nearest_name(name, choices, cutoff=0.8)


def brief(what: object, most: int = 100) -> str:
    """Returns `what` as text; beyond about `most` characters its middle is left out."""
    text = str(what)
    return text if len(text) <= most else f"{text[: most // 2]} … {text[-(most // 2) :]}"


def make_folder(folder: Path, flag: str = "--output") -> None:
    """Makes a folder and those above it; raises UserError that names the flag if it cannot."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in FULL:
            raise
        files = [path for path in (folder, *folder.parents) if path.is_file()]
        what = f"{files[0]} is a file" if files else error.strerror
        raise UserError(f"{flag} {folder}: {what}; choose a folder that can be written") from None


def is_disk_error(error: BaseException) -> bool:
    """Tells whether an error says that the disk is full, over quota or read-only."""
    return isinstance(error, OSError) and error.errno in DISK_ERRORS


def is_first_rank() -> bool:
    """Tells whether this process is rank 0, by torchrun's or srun's number, or is no rank. If the
    number is malformed, every rank counts as first: none may fail in silence.
    """
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    return not rank.isdecimal() or int(rank) == 0


def say_error(message: str) -> None:
    print(f"error: {brief(' '.join(message.split()), 2000)}", file=sys.stderr, flush=True)


@functools.cache
def say_once(text: str) -> None:
    """Prints a note once, on rank 0: what a user should know and may not have meant."""
    if os.environ.get("RANK", "0") == "0":
        print(f"note: {text.encode(errors='backslashreplace').decode()}", flush=True)


def lost_peer(error: RuntimeError) -> bool:
    """Tells whether a collective failed because another rank is gone."""
    text = str(error).lower()
    return any(t in text for t in ("connection closed by peer", "connection reset", "broken pipe"))


def lost_worker(error: RuntimeError) -> str | None:
    """Returns what to say if a loader worker was killed or ended; None for any other error."""
    text = str(error)
    if "DataLoader worker (pid" not in text:
        return None
    if "Bus error" in text:  # what a full /dev/shm gives
        return "a loader worker found no shared memory: enlarge /dev/shm, or fewer --workers"
    if "by signal: Killed" in text or "exited unexpectedly" in text:
        return "a loader worker was killed, probably for memory: fewer --workers"
    return None


def disk_advice(error: OSError) -> str:
    """Returns one line on what the file system refused: where, why, and what helps."""
    where = f" ({brief(error.filename)})" if error.filename else ""
    if error.errno in ODD_PATH:
        return f"{brief(error.filename)}: {error.strerror}"
    if error.errno in FORBIDDEN:
        return (
            f"no access{where}: {error.strerror}; change its rights, or choose another folder "
            "(--output)"
        )
    return (
        f"cannot write{where}: {error.strerror}; free space and start the same command again, "
        "it continues from its last checkpoint"
    )


def command(main: Callable[[], None]) -> int:
    """Runs a script's `main` and turns its outcome into an exit code and at most one line.

    Returns 0 if it finished, 2 for a mistake, said in one line, 75 if it was stopped on request and
    can be continued, 130 if it was interrupted. An unforeseen error keeps its traceback, since it
    is a bug of ours.
    """
    try:
        main()
        return 0
    except UserError as error:
        if error.this_rank or is_first_rank():
            say_error(str(error))
        return EXIT_USER_ERROR
    except PeerFailed:
        return EXIT_USER_ERROR
    except Stopped:
        return EXIT_STOPPED
    except KeyboardInterrupt:
        return 130
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, MemoryError) or any(text in str(error) for text in NO_MEMORY):
            say_error(f"{error or 'memory ran out'}: ask for less, a smaller batch or size")
            return EXIT_USER_ERROR
        if type(error).__name__ == "OutOfMemoryError":  # torch's: slow to import for this
            text = str(error).split(". ")[0]
            say_error(f"{text}: use a smaller --batch-size, more ranks or --precision bf16")
            return EXIT_USER_ERROR
        if said := lost_worker(error):
            say_error(f"{said}; the same command continues from the last checkpoint")
            return EXIT_USER_ERROR
        if os.environ.get("WORLD_SIZE", "1") == "1" or not lost_peer(error):
            raise
        say_error(f"another rank ended, see its error: {error}")
        return EXIT_USER_ERROR
    except OSError as error:
        if error.errno not in FULL and not (error.errno in FORBIDDEN | ODD_PATH and error.filename):
            raise
        say_error(disk_advice(error))
        return EXIT_USER_ERROR
    finally:
        # loader workers ignore the stop signals (a scheduler sends them to every process), and
        # the loader would raise an error of its own at their death
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for child in multiprocessing.active_children():
            child.kill()
