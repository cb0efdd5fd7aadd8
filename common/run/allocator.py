"""What the C library does with memory that a training step frees.

glibc gives large blocks back to the system as soon as they are free, and every step asks for the
same blocks again, page by page: on CPU a run spends several percent of its time there.
"""

import ctypes
import os
import platform

# mallopt's numbers, glibc's malloc.h
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST_KEPT = 2**30  # bytes: larger blocks still go back at once
VARIABLES = (  # settings of the user
    "MALLOC_MMAP_THRESHOLD_",
    "MALLOC_TRIM_THRESHOLD_",
    "MALLOC_TOP_PAD_",
    "GLIBC_TUNABLES",
)


def keep_freed_memory() -> bool:
    """Makes this process keep freed blocks of up to 1 GiB for its own next step. Returns whether it
    does: not without glibc, nor if the environment sets the allocator already.

    The process then keeps its peak, which may be some percent higher, since blocks lie apart
    (benchmarks/README.md); it does not grow from step to step.
    """
    if platform.libc_ver()[0] != "glibc" or any(name in os.environ for name in VARIABLES):
        return False
    mallopt = ctypes.CDLL(None).mallopt
    never = -1
    return bool(mallopt(M_MMAP_THRESHOLD, LARGEST_KEPT) and mallopt(M_TRIM_THRESHOLD, never))
