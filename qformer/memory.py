"""What a process does with memory that it has freed."""

import ctypes
import sys

M_TOP_PAD, M_MMAP_THRESHOLD = -2, -3  # of glibc's malloc.h


def return_freed_memory() -> None:
    """Let glibc give large blocks back to the system as soon as they are freed.

    By itself it learns to keep blocks of up to 32 MB for later, and between the activations of one step and the gradients
    of the next much of that fits nowhere. Does nothing where malloc is another.
    """
    if sys.platform == "linux" and (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)):
        mallopt(M_MMAP_THRESHOLD, 4 << 20)
        mallopt(M_TOP_PAD, 64 << 20)
