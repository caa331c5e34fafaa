"""qformer: connect a frozen encoder to a frozen language model with a Querying Transformer."""

import os
from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]

# PyTorch asks Linux for huge pages of its large blocks: a training step on CPUs spends less time and memory on small ones.
os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def __getattr__(name: str) -> Any:
    """Import on first use: `import qformer` costs nothing."""
    if name == "load":
        from qformer.inference import load

        return load
    raise AttributeError(f"module 'qformer' has no attribute {name!r}")
