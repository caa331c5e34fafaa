"""What a stage sets in its process before torch is imported; `import qformer` sets nothing."""

import ctypes
import os
import sys

MMAP_MAX, TRIM_THRESHOLD = -4, -1  # of mallopt(3)
MALLOC_SETTINGS = {"MALLOC_MMAP_MAX_", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "GLIBC_TUNABLES"}


def prepare_environment() -> None:
    """Memory for training on CPUs: huge pages for PyTorch's large blocks, and what is freed is kept for the next step.

    By default glibc gives every large block back to the kernel, which clears it anew in each step: 5 to 15 % of a step's
    time on two cores (benchmarks/README.md). What the user sets in the environment wins.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    if sys.platform == "linux" and not MALLOC_SETTINGS & os.environ.keys():
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt is not None:
            mallopt(MMAP_MAX, 0)
            mallopt(TRIM_THRESHOLD, -1)
