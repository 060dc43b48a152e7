"""How the process gets its memory on CPU."""

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of malloc.h
SETTINGS = ("MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory() -> None:
    """Keep what large tensors leave for the next ones, where glibc gives out the memory.

    By itself glibc gives every block from 32 MB on back to the system as soon as it is freed; the next tensor of that
    size then costs a page fault for each 4 kB, which takes longer than the scan that fills it. Blocks up to 2 GB are
    kept. Does nothing where the environment sets one of SETTINGS, or malloc is not glibc's.
    """
    if sys.platform != "linux" or any(name in os.environ for name in SETTINGS):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    for setting in (M_MMAP_THRESHOLD, M_TRIM_THRESHOLD) if mallopt else ():
        mallopt(setting, 2**31 - 1)
