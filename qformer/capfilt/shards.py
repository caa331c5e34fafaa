"""The out folder: what it is made of, its shards, which of them this process may write, and what becomes of them.

    OUT/made_of.json          what everything depends on; a folder that was made of something else is refused
    OUT/00017.tar             kept records of shard 17: an image, its captions (.txt) and their fields (.json); or
    OUT/shards/00017.jsonl    kept records of shard 17, joined as OUT/records.jsonl once all are there
    OUT/scores/00017.jsonl    every record of shard 17 with all of its captions, their scores, and why they were dropped
    OUT/locks/00017           held by the process that writes shard 17
    OUT/summary.json, .html   counts, and examples with their images

A shard is a run of neighbours among the records. What is in it is a function of its records and `made_of.json` alone, and
its kept records appear in one rename after its scores: so shards may be written by any process, in any order, again.
"""

import contextlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from qformer.capfilt.captions import Judged, record_of
from qformer.data import Records
from qformer.data.tars import PICTURES
from qformer.files import PARTIAL, atomic_file, begin_folder, lock, require_made_of

RECORDS = "records.jsonl"
TARS, LINES = "tar", "jsonl"


class Shards:
    """The shards of an out folder over some records.

    Args:
        count: records that are gone through, the first ones.
        size: records of a shard.
        form: "tar" or "jsonl".
        made_of: what the captions depend on beside the records.

    Raises: ValueError when the folder was made of something else, or is none of these.
    """

    def __init__(self, folder: Path, records: Records, *, count: int, size: int, form: str, made_of: dict[str, Any]):
        self.folder, self.records, self.records_count, self.size, self.form = folder, records, count, size, form
        self.made_of = {**made_of, "records": count, "shard_records": size, "format": form}
        self.count = -(-count // size)
        require_made_of(
            folder, self.made_of, name=f"--out {folder}", fix="name another folder, or remove it", others_begin=True
        )

    def begin(self) -> None:
        """Make the folders; for each process."""
        begin_folder(self.folder, self.made_of)
        for name in ("scores", "locks", *(["shards"] if self.form == LINES else [])):
            with contextlib.suppress(FileExistsError):  # `exist_ok` looks again, and another may have removed the locks
                (self.folder / name).mkdir()

    def kept_file(self, number: int) -> Path:
        """Where the kept records of a shard stand; once it is there the shard is done."""
        return self.folder / (f"{number:05d}.tar" if self.form == TARS else f"shards/{number:05d}.jsonl")

    def scores_file(self, number: int) -> Path:
        """Where all captions of a shard stand."""
        return self.folder / f"scores/{number:05d}.jsonl"

    def missing(self) -> list[int]:
        """Shards that are still to be written."""
        return [number for number in range(self.count) if not self.kept_file(number).exists()]

    def members(self, number: int) -> range:
        """The records of a shard."""
        return range(number * self.size, min((number + 1) * self.size, self.records_count))

    @contextlib.contextmanager
    def claim(self, number: int) -> Iterator[bool]:
        """Whether the shard is this process's to write while the block runs: nobody else does, and it is not there yet."""
        try:
            file = (self.folder / f"locks/{number:05d}").open("a+")
        except FileNotFoundError:  # every shard was there, so the locks went
            yield False
            return
        with file:
            mine = lock(file, f"shard {number} of --out {self.folder}") is None
            yield mine and not self.kept_file(number).exists()

    def save(self, number: int, judged: Sequence[Judged]) -> None:
        """Write a shard, its scores first."""
        with atomic_file(self.scores_file(number)) as scratch:
            scratch.write_text("".join(json.dumps(row.as_json()) + "\n" for row in judged))
        path = self.kept_file(number)
        with atomic_file(path) as scratch:
            if self.form == TARS:
                self._write_tar(scratch, judged)
            else:
                lines = [{"image": row.image, **record_of(self.records.text(row.record), row.kept)} for row in judged
                         if row.kept]  # fmt: skip
                scratch.write_text("".join(json.dumps(line) + "\n" for line in lines))

    def _write_tar(self, path: Path, judged: Sequence[Judged]) -> None:
        with tarfile.open(path, "w") as tar:
            for row in judged:
                if row.kept:
                    record = self.records[row.record]
                    content = record.image_bytes
                    image = Path(record.image).read_bytes() if content is None else content
                    texts = "".join(" ".join(caption.text.split()) + "\n" for caption in row.kept)
                    fields = record_of(record, row.kept)
                    del fields["caption"]  # in the .txt
                    members = ((_ending(image), image), ("txt", texts.encode()), ("json", json.dumps(fields).encode()))
                    for ending, member in members:
                        about = tarfile.TarInfo(f"{row.record:09d}.{ending}")  # of no time and no owner: the same bytes
                        about.size = len(member)
                        tar.addfile(about, io.BytesIO(member))

    def read_scores(self, number: int) -> list[Judged]:
        """What `save` wrote of a shard's captions."""
        return [Judged.from_json(json.loads(line)) for line in self.scores_file(number).open()]

    def join(self) -> str:
        """Make one record file of the shards and remove what only their making needed; returns the entry of `data.train`.

        Any process may call it once no shard is missing; several at a time write the same.
        """
        if self.form == LINES:
            with atomic_file(self.folder / RECORDS) as scratch, scratch.open("wb") as whole:
                for number in range(self.count):
                    with self.kept_file(number).open("rb") as file:
                        shutil.copyfileobj(file, whole)
        for name in (".", "scores", "shards"):  # not the locks: another process may be removing them
            for left in (self.folder / name).glob(f".*{PARTIAL}"):  # of processes that were killed
                if not left.name.startswith((f".{RECORDS}", ".summary")):
                    left.unlink(missing_ok=True)
        shutil.rmtree(self.folder / "locks", ignore_errors=True)
        return str(self.folder / ("*.tar" if self.form == TARS else RECORDS))


def _ending(image: bytes) -> str:
    """The ending of an image's file by its content."""
    with Image.open(io.BytesIO(image)) as file:
        ending = (file.format or "").lower()
    return ending if ending in PICTURES else "jpg"
