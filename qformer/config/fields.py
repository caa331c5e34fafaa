"""A key of a config: its default, its meaning and unit, and the values that it may have."""

from dataclasses import field
from typing import Any

Problems = list[tuple[bool, str]]  # whether it is wrong, and what to say then


def described(
    default: Any, text: str, choices: tuple[str, ...] = (), *, at_least: float | None = None,
    above: float | None = None, at_most: float | None = None,
) -> Any:  # fmt: skip
    """A field with its meaning and unit, and the values that it may have (bounds do not concern null)."""
    metadata = {"help": text, "choices": choices, "at_least": at_least, "above": above, "at_most": at_most}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)
