"""What every loader shares: keys that it does not read, errors of its library in one line, and seeded random weights."""

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError

from qformer.config import EncoderConfig
from qformer.encoders.frozen import FrozenEncoder
from qformer.messages import one_line


def check_unset(config: EncoderConfig, *names: str) -> None:
    """Refuse keys that the loader does not read.

    Raises: ValueError when one of them is set.
    """
    for name in names:
        if (value := getattr(config, name)) not in (None, []):
            raise ValueError(f"encoder.{name} is {value!r}, but loader '{config.loader}' does not read it; remove it")


def names_place(config: EncoderConfig, expected: str) -> bool:
    """Whether `encoder.id` is a `local-dir:` or `hf-hub:`, which have their weights in themselves.

    Args:
        expected: what such a folder holds, for the error.

    Raises: ValueError when `encoder.pretrained` is set beside one, or there is no such folder.
    """
    kind, colon, place = config.id.partition(":")
    if not colon or kind not in ("local-dir", "hf-hub"):
        return False
    check_unset(config, "pretrained")
    if kind == "local-dir" and not Path(place).is_dir():
        raise ValueError(f"encoder.id '{config.id}': no such folder; expected one with {expected}")
    return True


@contextmanager
def errors_named(config: EncoderConfig) -> Iterator[None]:
    """Whatever a library raises becomes one line that names `encoder.id`."""
    try:
        yield
    except (OSError, RuntimeError, ValueError, TypeError, AssertionError, SafetensorError) as error:
        todo = "check its spelling, download it once where there is a network, or name a local folder"
        message = f"encoder.id '{config.id}' cannot be loaded by {config.loader} ({one_line(error)}); {todo}"
        raise ValueError(message) from error


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and leave the global generator as it was."""
    # Modules are built on the CPU; torch.manual_seed would also reseed the accelerators, which are not forked here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def outline(load: Callable[[EncoderConfig], FrozenEncoder], config: EncoderConfig) -> FrozenEncoder:
    """The encoder on the meta device: sizes without weights and without memory."""
    with torch.device("meta"):
        return load(dataclasses.replace(config, random_weights=True))
