"""Memory that PyTorch gives back on a CPU, kept for what it asks for next."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 128 << 20  # bytes; larger tensors are returned as ever
OLD_LARGEST = 32 << 20  # what older versions of glibc take at most
CLOSED_TO_CHANGE = ("GLIBC_TUNABLES", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_")


def keep_freed() -> bool:
    """Have this process keep the memory of tensors it frees, as most of them come back at once.

    glibc returns it to the system, and faults it in again page by page, which can take a third of
    the time of reading on a CPU (docs/performance.md). For a process that is ours alone: the
    commands and the runners of results/ call it, nothing else does. False where malloc is not
    glibc's or its settings are in the environment already.
    """
    if not sys.platform.startswith("linux") or any(name in os.environ for name in CLOSED_TO_CHANGE):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:  # musl
        return False
    trims = mallopt(M_TRIM_THRESHOLD, 8 * LARGEST)
    return bool(trims and any(mallopt(M_MMAP_THRESHOLD, n) for n in (LARGEST, OLD_LARGEST)))
