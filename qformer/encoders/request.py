"""What `load_encoder` was asked for, and how a loader says that it cannot be had."""

import difflib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from safetensors import SafetensorError


@dataclass(frozen=True)
class Request:
    """The arguments of `load_encoder`."""

    loader: str
    id: str
    pretrained: str | None
    revision: str | None
    block: int
    image_size: int | None
    dtype: torch.dtype
    width: int | None
    num_tokens: int | None
    random_weights: bool
    seed: int

    def check_unset(self, *names: str) -> None:
        for name in names:
            if (value := vars(self)[name]) is not None:
                raise ValueError(f"encoder.{name} is {value!r}, but loader '{self.loader}' does not read it; remove it")

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError, SafetensorError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            todo = "check its spelling, download it once where there is a network, or name a local folder"
            raise ValueError(f"encoder.id '{self.id}' cannot be loaded by {self.loader} ({reason}); {todo}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    names = [repr(match) for match in difflib.get_close_matches(name, list(known), n=3, cutoff=0.0)]
    return f"nearest: {', '.join(names)}" if names else "there are none"


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    # Modules are built on the CPU; torch.manual_seed would also reseed the accelerators, which are not forked here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield
