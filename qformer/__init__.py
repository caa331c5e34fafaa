"""qformer: connect a frozen encoder to a frozen language model with a Querying Transformer."""

from typing import Any

__version__ = "0.1.0"
__all__ = ["load"]  # noqa: F822


def __getattr__(name: str) -> Any:
    """Import on first use: `import qformer` costs nothing."""
    if name == "load":
        from qformer.inference import load

        return load
    raise AttributeError(f"module 'qformer' has no attribute {name!r}")
