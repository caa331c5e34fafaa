"""A process at work on its shards: images read by workers, one batch of them in memory at a time."""

import logging
import os
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qformer.capfilt.captions import Judged
from qformer.capfilt.judging import Bootstrap
from qformer.capfilt.shards import Shards
from qformer.data import BrokenRecord, Record, Records
from qformer.data.loading import load_input, start_worker
from qformer.evaluation.progress import Passing

logger = logging.getLogger(__name__)

Read = tuple[int, Record, list[Tensor] | str]  # a str is why the image cannot be read


class Images(Dataset[Read]):
    """Records by their number, each with its image as every one of `transforms` prepares it (None: a feature file)."""

    def __init__(self, records: Records, transforms: Sequence[Any], widths: Sequence[int]):
        self.records, self.inputs = records, list(zip(transforms, widths, strict=True))

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, number: int) -> Read:
        record = self.records[number]
        try:
            views = [load_input(record, transform, [None], width)[0] for transform, width in self.inputs]
        except BrokenRecord as broken:
            return number, record, broken.reason
        return number, record, views


class Work:
    """What one process does: shards that no other process has, one after the other.

    Args:
        batch_size: images encoded at a time; batches never cross shards.
        workers: processes that read images.
    """

    def __init__(self, shards: Shards, bootstrap: Bootstrap, *, batch_size: int, workers: int):
        self.shards, self.bootstrap, self.batch_size, self.workers = shards, bootstrap, batch_size, workers
        models = bootstrap.models
        self.images = Images(
            shards.records, [model.transform for model in models], [model.model.encoder.width for model in models]
        )

    def estimate(self) -> float:
        """Seconds a record, measured on the first batch that is to be done; nothing of it is kept."""
        missing = self.shards.missing() or [0]  # none, where others wrote the last ones while the models loaded
        numbers = list(self.shards.members(missing[0]))[: self.batch_size]
        self._judge([self.images[numbers[0]]])  # what is only slow the first time
        began_at = time.monotonic()
        self._judge([self.images[number] for number in numbers])
        return (time.monotonic() - began_at) / len(numbers)

    def run(self) -> tuple[int, int]:
        """Write every missing shard that no other process holds; returns how many records were done, and how many broke."""
        missing = self.shards.missing()
        first = os.getpid() * 7919 % len(missing) if missing else 0  # processes begin at different places
        done = broken = 0
        total = sum(len(self.shards.members(number)) for number in missing)
        with Passing("captioning and filtering", total, shown=True) as passing:
            for number in [*missing[first:], *missing[:first]]:
                with self.shards.claim(number) as mine:
                    if mine:
                        judged = []
                        for rows in self._batches(number):
                            judged += rows
                            passing.advance(len(rows))
                        self.shards.save(number, judged)
                        done += len(judged)
                        broken += sum(row.problem is not None for row in judged)
                    else:
                        passing.advance(len(self.shards.members(number)))
        return done, broken

    def _batches(self, number: int) -> Iterator[list[Judged]]:
        members = self.shards.members(number)
        workers = min(self.workers, -(-len(members) // self.batch_size))
        loader: DataLoader[Read] = DataLoader(
            self.images, self.batch_size, sampler=members, num_workers=workers, collate_fn=list,
            worker_init_fn=start_worker, prefetch_factor=2 if workers else None, generator=torch.Generator(),
        )  # fmt: skip
        for batch in loader:
            yield self._judge(batch)

    def _judge(self, batch: Sequence[Read]) -> list[Judged]:
        """A batch in its order; a record whose image cannot be read is logged, and keeps nothing."""
        sound = [(number, record) for number, record, views in batch if not isinstance(views, str)]
        images = [views for _, _, views in batch if not isinstance(views, str)]
        rows = {row.record: row for row in self.bootstrap.judge(sound, images)} if sound else {}
        for number, record, reason in batch:
            if isinstance(reason, str):
                logger.warning("broken record %d, %s: %s", number, record.image, reason)
                rows[number] = Judged(number, record.image, record.image_id, [], reason)
        return [rows[number] for number, _, _ in batch]


def describe(shards: Shards, seconds_each: float) -> str:
    """What is to be done and how long it will take, in one line."""
    missing = shards.missing()
    left = sum(len(shards.members(number)) for number in missing)
    whole = timedelta(seconds=round(left * seconds_each))
    return (
        f"{shards.records_count} records in {shards.count} shards, {shards.count - len(missing)} are there already; "
        f"{1 / max(seconds_each, 1e-9):.3g} records a second and process: {whole} by one, that by N with N"
    )
