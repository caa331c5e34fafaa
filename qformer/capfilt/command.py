"""CapFilt from start to end: mistakes first, then shards, then what they hold in sum."""

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qformer.capfilt.judging import Bootstrap, Captioner, Filter, Method
from qformer.capfilt.running import Work, describe
from qformer.capfilt.shards import LINES, TARS, Shards
from qformer.capfilt.summary import summarise
from qformer.data import Records, read_records
from qformer.distributed import device_of_rank
from qformer.evaluation.command import fingerprint
from qformer.inference import load

logger = logging.getLogger(__name__)


def bootstrap(
    sources: Sequence[str], out: Path, *, captioner: str | None = None, filter_by: str | None = None,
    method: Method, form: str | None = None, root: str | None = None, limit: int | None = None,
    shard_records: int = 1000, batch_size: int = 64, workers: int = 2, device: str | None = None,
) -> dict[str, Any] | None:  # fmt: skip
    """Write captions for records, drop those that do not match, and leave records for training in `out`.

    Any number of processes may run it on the same arguments at the same time, or one after another.

    Args:
        captioner: adapter of stage 2 that writes a caption for every image; None = only what is there is filtered.
        filter_by: adapter of stage 1 whose matching head decides; None = everything is kept.
        form: "tar" or "jsonl"; None = tars where images travel inside the sources.
        limit: only the first records.

    Returns: the summary; None while other processes still write shards.
    Raises: ValueError when an option, an adapter, the records or the folder do not fit.
    """
    if min(shard_records, batch_size, 1 if limit is None else limit) < 1 or workers < 0:
        raise ValueError("--shard-records, --batch-size and --limit must be at least 1, and --workers at least 0")
    if not captioner and not filter_by:
        raise ValueError("give --captioner, --filter or both")
    records = read_records(list(sources), root=root, key="RECORDS")
    records.require_single("captions are written for one image a record")
    count = len(records) if limit is None else min(limit, len(records))
    form = _form_of(records, form)
    made_of: dict[str, Any] = {
        "captioner": captioner and fingerprint(captioner), "filter": filter_by and fingerprint(filter_by),
        **asdict(method), "sources": [os.path.abspath(s) if os.path.exists(s) else s for s in sources],
    }  # fmt: skip
    shards = Shards(out, records, count=count, size=shard_records, form=form, made_of=made_of)
    if shards.missing():
        began_at = time.monotonic()
        device = device or device_of_rank()
        work = Work(
            shards,
            Bootstrap(
                Captioner(load(captioner, device), method) if captioner else None,
                Filter(load(filter_by, device), method) if filter_by else None,
                method,
            ),
            batch_size=batch_size,
            workers=workers,
        )
        shards.begin()
        logger.info(describe(shards, work.estimate()))
        done, broken = work.run()
        print(f"{out}: {done} records by this process in {time.monotonic() - began_at:.1f} s, {broken} of them broken")
        if shards.missing():
            print("this process is through, others are not; the last one joins the shards (or the same command again)")
            return None
    entry = shards.join()
    summary = summarise(shards)
    _report(summary, entry, out)
    return summary


def _form_of(records: Records, form: str | None) -> str:
    inside = next(
        (r.image_bytes is not None for r in map(records.__getitem__, range(len(records))) if not r.problem), None
    )
    if form == LINES and inside:
        raise ValueError(
            f"--format {LINES}: the images travel inside the sources, so a line cannot name them; use {TARS}"
        )
    return form or (TARS if inside else LINES)


def _report(summary: dict[str, Any], entry: str, out: Path) -> None:
    for origin, counter in summary["captions"].items():
        if not counter.total():
            continue
        dropped = ", ".join(f"{count} {why}" for why, count in counter.items() if why != "kept")
        print(
            f"{origin:<9}  {counter['kept']} of {counter.total()} captions kept{f' (dropped: {dropped})' if dropped else ''}"
        )
    print(
        f"{summary['with_captions']} of {summary['records']} records keep a caption, {summary['broken']} images could not "
        f"be read; train with data.train=[{entry}]; see {out / 'summary.html'}"
    )
    if not summary["with_captions"]:
        logger.warning("no caption was kept: the filter does not fit these images, or --threshold is too high")
