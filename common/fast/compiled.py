"""Where numba keeps the kernels of this folder: compiled once per machine, beside the code if
that can be written.
"""

import contextlib
import os
import tempfile
from pathlib import Path

from numba import config, njit


def cache() -> tuple[bool, str]:
    """Tells whether numba can keep the kernels, and what to say of it. They go into a temporary
    folder of this user if neither the code's folder nor a home takes files (containers).
    """
    beside = Path(__file__).parent / "__pycache__"
    homeless = os.path.expanduser("~") == "~"  # numba would make a folder of this name
    if not homeless or os.access(beside, os.W_OK) or os.environ.get("NUMBA_CACHE_DIR"):
        with contextlib.suppress(RuntimeError):  # numba's, that it finds no place
            njit(cache=True)(cache)
            return True, ""
    try:
        folder = Path(tempfile.gettempdir()) / f"selfsup-kernels-{os.getuid()}"
        folder.mkdir(mode=0o700, exist_ok=True)
        if folder.is_symlink() or folder.stat().st_uid != os.getuid():
            raise PermissionError  # numba runs what it reads there
    except OSError:
        return False, "cannot be kept anywhere, and are compiled at each start: set NUMBA_CACHE_DIR"
    os.environ["NUMBA_CACHE_DIR"] = config.CACHE_DIR = str(folder)
    return True, f"are kept in {folder}: no other folder can be written (NUMBA_CACHE_DIR)"


KEPT, WHERE = cache()
kernel = njit(cache=KEPT, nogil=True, error_model="numpy")  # called from one thread per worker
