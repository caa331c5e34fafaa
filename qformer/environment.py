"""What a stage sets in the environment before torch is imported; `import qformer` sets nothing."""

import os


def prepare_environment() -> None:
    """Huge pages for PyTorch's large blocks: a training step on CPUs takes less time and memory. The user's setting wins."""
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
