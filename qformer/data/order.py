"""The order of the data: a pure function of three integers, so that a run resumes exactly, on any number of ranks."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler


def derive_seed(*parts: object) -> int:
    """A seed that is a pure function of its parts."""
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=7).digest(), "little")


class Draw(NamedTuple):
    """Which record to read (`index`), and where in the endless stream it stands: `position` counts within `epoch`."""

    index: int  # type: ignore[assignment]  # hides tuple.index, which nothing needs here
    epoch: int
    position: int


class Order:
    """A random permutation of n records for each epoch, a pure function of (seed, epoch).

    Memory: the permutation of one epoch is kept, 8 bytes a record (1 GB at 129 million) and three times that for the
    moment in which it is made; it lives in the main process only, not in the workers.

    Raises:
        ValueError: a negative seed.
    """

    def __init__(self, n: int, seed: int):
        assert n > 0, n
        if seed < 0:
            raise ValueError(f"seed={seed}: expected 0 or more")
        self.n = n
        self.seed = seed
        self._epoch = -1
        self._permutation = np.empty(0, dtype=np.int64)

    def index(self, epoch: int, position: int) -> int:
        """Return the record at `position` (0 to n - 1) of `epoch`."""
        assert epoch >= 0, epoch
        assert 0 <= position < self.n, position
        if epoch != self._epoch:
            # numpy promises that raw bits never change between versions; of shuffle() and permutation() it does not
            bits = np.random.Philox(np.random.SeedSequence([self.seed, epoch])).random_raw(self.n)
            self._permutation = np.argsort(bits, kind="stable")
            self._epoch = epoch
        return int(self._permutation[position])


class GlobalBatches(Sampler[list[Draw]]):
    """The micro-batches of one rank, without end, from the first micro-batch of `first_step`.

    With G = W*B*A (ranks, micro-batch size, accumulation), micro-batch m of step s on rank r is the global positions
    [s*G + m*W*B + r*B, +B) of a stream of epochs laid end to end. So W ranks of B read the same global batches as one
    rank of W*B, every record is read exactly once an epoch whether or not G divides n, and where n < G a global batch
    runs over several epochs. Iterating again starts again at `first_step`.
    """

    def __init__(
        self,
        n: int,
        seed: int,
        world_size: int,
        rank: int,
        micro_batch_size: int,
        accumulation: int,
        first_step: int = 0,
    ):
        assert 0 <= rank < world_size, (rank, world_size)
        assert min(micro_batch_size, accumulation) > 0, (micro_batch_size, accumulation)
        assert first_step >= 0, first_step
        self.order = Order(n, seed)
        self.first = first_step * accumulation * world_size * micro_batch_size + rank * micro_batch_size
        self.stride = world_size * micro_batch_size
        self.micro_batch_size = micro_batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        start = self.first
        while True:
            yield [self._draw(start + offset) for offset in range(self.micro_batch_size)]
            start += self.stride

    def _draw(self, global_position: int) -> Draw:
        epoch, position = divmod(global_position, self.order.n)
        return Draw(self.order.index(epoch, position), epoch, position)
