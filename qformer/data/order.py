"""The order of the data: a pure function of (seed, position), so that a run resumes exactly, on any number of ranks.

Nothing here grows with the number of records: a permutation is a function of its index, not a list.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

ROUNDS = 8  # of the permutation; with 6 the orders of four records are not yet all as frequent
SLOTS = 10_000  # weights are rounded to this many parts


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

    With `block_records` > 1 runs of that many neighbouring records stay together and in order, so that they are read
    from the disk in sequence; where runs begin differs from epoch to epoch.

    Args:
        stream: tells orders of one seed apart.

    Raises:
        ValueError: a negative seed, a block of less than one record.
    """

    def __init__(self, n: int, seed: int, block_records: int = 1, stream: int = 0):
        assert n > 0, n
        if seed < 0:
            raise ValueError(f"seed={seed}: expected 0 or more")
        if block_records < 1:
            raise ValueError(f"block_records={block_records}: expected 1 (every record by itself) or more")
        self.n = n
        self.seed = seed
        self.block_records = block_records
        self._stream = stream
        self._epoch = -1

    def index(self, epoch: int, position: int) -> int:
        """The record at a position of an epoch."""
        assert 0 <= position < self.n, (position, self.n)
        if epoch != self._epoch:
            self._epoch, (self._blocks, self._shift) = epoch, self._shuffle(epoch)
        block, within = divmod(position, self.block_records)
        if block < self._blocks.n:  # not the remainder, which is less than a block and comes last
            block = self._blocks(block)
        return (block * self.block_records + within + self._shift) % self.n

    def _shuffle(self, epoch: int) -> tuple[_Permutation, int]:
        # of a bit generator numpy promises the numbers for good; of shuffle() and permutation() it does not
        entropy = np.random.SeedSequence([self.seed, self._stream, epoch])
        shift, *keys = np.random.Philox(entropy).random_raw(1 + 2 * ROUNDS).tolist()
        return _Permutation(self.n // self.block_records, keys), shift % self.n

    def draw(self, position: int) -> Draw:
        """What stands at a position of the endless stream of epochs."""
        epoch, within = divmod(position, self.n)
        return Draw(self.index(epoch, within), epoch, within)


class _Permutation:
    """A bijection of range(n) drawn by its keys: affine maps and shifts modulo a power of two, walked until below n.

    Multiplying by an odd number carries low bits upwards, folding the upper half onto the lower one brings them back;
    both can be undone, so no two numbers meet. At most every second number is walked past.
    """

    def __init__(self, n: int, keys: Sequence[int]):
        self.n = n
        bits = max(1, (n - 1).bit_length())
        self._mask, self._fold = (1 << bits) - 1, (bits + 1) // 2
        self._rounds = [(keys[i] | 1, keys[i + 1]) for i in range(0, len(keys), 2)]

    def __call__(self, number: int) -> int:
        while True:
            for factor, summand in self._rounds:
                number = (number * factor + summand) & self._mask
                number ^= number >> self._fold
            if number < self.n:
                return number


class Mixture:
    """Several sources laid end to end, drawn from by weight: each in epochs of its own, however often they come round.

    The sources take turns in a fixed pattern of 10 000 positions, as evenly as their weights allow.

    Args:
        sizes: records of each source.
        weights: share of each source in the stream, up to a common factor.

    Raises:
        ValueError: not one weight for each source; a weight that is not above 0, or too small beside the others.
    """

    def __init__(self, sizes: Sequence[int], weights: Sequence[float], seed: int, block_records: int = 1):
        if len(weights) != len(sizes):
            raise ValueError(f"data.weights: {list(weights)} for {len(sizes)} sources; expected one weight for each")
        total = float(sum(weights))
        if not all(weight > 0 for weight in weights) or not np.isfinite(total):
            raise ValueError(f"data.weights: {list(weights)}; expected numbers above 0")
        self.weights = [weight / total for weight in weights]
        self._orders = [Order(n, seed, block_records, stream) for stream, n in enumerate(sizes)]
        self._starts = np.cumsum([0, *sizes[:-1]]).tolist()
        ends = np.rint(np.cumsum(self.weights) * SLOTS).astype(np.int64)
        self._turns = np.diff(ends, prepend=0)
        if not self._turns.all():
            raise ValueError(
                f"data.weights: {list(weights)}; a share below {1 / SLOTS} is not drawn, leave its source out"
            )
        times = np.concatenate([(np.arange(count) + 0.5) / count for count in self._turns])
        slots = np.argsort(times, kind="stable")
        self._source = np.repeat(np.arange(len(sizes)), self._turns)[slots]
        self._turn = np.concatenate([np.arange(count) for count in self._turns])[slots]

    def draw(self, position: int) -> Draw:
        """What stands at a position of the endless stream; `Draw.epoch` is that of the record's source."""
        period, slot = divmod(position, SLOTS)
        source = int(self._source[slot])
        drawn = self._orders[source].draw(period * int(self._turns[source]) + int(self._turn[slot]))
        start = self._starts[source]
        return Draw(start + drawn.index, drawn.epoch, start + drawn.position)


def shares(sizes: Sequence[int], weights: Sequence[float] = (), size_exponent: float = 0.0) -> list[float]:
    """How often each source is drawn, up to a common factor: weight * records ** size_exponent; [] = once an epoch each record.

    An exponent of 0.5 is the square root that InstructBLIP draws its data sets by.
    Source: InstructBLIP (arXiv 2305.06500), section 2.4.
    """
    if not weights and not size_exponent:
        return []
    return [weight * n**size_exponent for weight, n in zip(weights or [1.0] * len(sizes), sizes, strict=True)]


def build_order(
    sizes: Sequence[int], seed: int, weights: Sequence[float] = (), block_records: int = 1
) -> Order | Mixture:
    """The order of records that come from sources of these sizes: every record once an epoch, or by weight.

    Raises: ValueError as `Order` and `Mixture` do.
    """
    return Mixture(sizes, weights, seed, block_records) if weights else Order(sum(sizes), seed, block_records)


class GlobalBatches(Sampler[list[Draw]]):
    """The micro-batches of one rank, without end, from the stream's position `first` on.

    With W ranks and micro-batches of B, micro-batch m of rank r holds the positions [first + m*W*B + r*B, +B) of a
    stream of epochs laid end to end. So W ranks of B read what one rank of W*B reads, every record is read exactly once
    an epoch whether or not a step divides it, and a run that stopped after `first` records goes on with the next one on
    any number of ranks. Iterating again starts again at `first`.
    """

    def __init__(self, order: Order | Mixture, world_size: int, rank: int, micro_batch_size: int, *, first: int = 0):
        assert 0 <= rank < world_size, (rank, world_size)
        assert micro_batch_size > 0, micro_batch_size
        assert first >= 0, first
        self.order = order
        self.first = first + rank * micro_batch_size
        self.stride = world_size * micro_batch_size
        self.micro_batch_size = micro_batch_size

    def __iter__(self) -> Iterator[list[Draw]]:
        start = self.first
        while True:
            yield [self.order.draw(start + offset) for offset in range(self.micro_batch_size)]
            start += self.stride
