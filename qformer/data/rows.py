"""Records in tables of Hugging Face `datasets`: json, jsonl, parquet and csv files, and hub data sets."""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qformer.data.columns import choose_fields, image_columns
from qformer.data.records import CLIPS, IMAGE_FIELDS, Identity, Record, build_record, identify, is_clip
from qformer.messages import one_line

if TYPE_CHECKING:
    import datasets
    import pyarrow

logger = logging.getLogger(__name__)

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
METADATA = {"metadata.jsonl": "json", "metadata.csv": "csv", "metadata.parquet": "parquet"}  # of an image folder
HASHED_BYTES = 64 << 20  # larger files are told apart by size and time alone
RECODE = "save it as UTF-8, for instance by iconv -f WINDOWS-1252 -t UTF-8"


@dataclass(frozen=True)
class Rows:
    """A memory-mapped table.

    Args:
        folder: relative paths resolve against it.
        confined: a root was given: absolute paths are refused.
        base: the folder that image_ids are relative to.
    """

    source: str
    rows: datasets.Dataset
    folder: str
    confined: bool
    base: str

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, row: int) -> Record:
        """The record of a row."""
        fields = self.rows[row]
        return build_record(self._identify(fields, row), fields)

    @cached_property
    def several(self) -> tuple[int, int] | None:
        """The row that names the most images and how many those are, where there are more than one."""
        import pyarrow.compute as pc

        if "images" not in self.rows.column_names:
            return None
        counts = pc.fill_null(pc.list_value_length(self.rows.data.column("images")), 0).to_numpy()
        if self.rows._indices is not None:  # one split of the file
            counts = counts[self.rows._indices.column(0).to_numpy()]
        return (int(counts.argmax()), int(counts.max())) if (counts > 1).any() else None

    @cached_property
    def clips(self) -> bool:
        """Whether a row names a video."""
        import pyarrow.compute as pc

        if "video" in self.rows.column_names:
            return True
        endings = rf"(?i)({'|'.join(map(re.escape, CLIPS))})$"
        paths = [parts["path"] for _, parts, _ in image_columns(self.rows) if "path" in parts]
        return any(pc.any(pc.match_substring_regex(path, endings)).as_py() for path in paths)

    def text(self, row: int) -> Record:
        """The record of a row; images inside the table are not read, so that their pages stay on the disk."""
        if self._texts is self.rows:
            return self.read(row)
        fields, name = self._texts[row], f"{self.source}#{row}"
        return build_record([identify(name, None, fields.get("image_id", name), self.base)], fields)

    @cached_property
    def _texts(self) -> datasets.Dataset:
        inside = [name for name, parts, _ in image_columns(self.rows) if "bytes" in parts]
        return self.rows.remove_columns(inside) if inside else self.rows

    def identities(self) -> Iterator[tuple[Identity, ...]]:
        """The images of every row; images inside the table are read."""
        columns = [name for name in (*IMAGE_FIELDS, "image_id") if name in self.rows.column_names]
        row = 0
        for batch in self.rows.select_columns(columns).iter(batch_size=256):
            for values in zip(*batch.values(), strict=True):
                yield self._identify(dict(zip(batch, values, strict=True)), row)
                row += 1

    def _identify(self, fields: dict[str, Any], row: int) -> tuple[Identity, ...]:
        video = fields.get("video")
        images = fields.get("images") or [fields.get("image") if video is None else video]
        image_id = fields.get("image_id") if len(images) == 1 else None  # of several it is the record's
        places = [f"{self.source}#{row}" + (f".{n}" if n else "") for n in range(len(images))]
        identities = []
        for place, image in zip(places, images, strict=True):
            path, content = picture_of(image)
            name = self.resolve(str(path)) if content is None else place
            clip = video is not None or is_clip(str(path or ""))
            identities.append(identify(name, content, image_id, self.base)._replace(clip=clip))
        return tuple(identities)

    def resolve(self, path: str) -> str:
        """Return the absolute path of an image; the check is lexical, so links inside the folder may lead out."""
        if "://" in path:
            raise ValueError(f"{self.source}: image {path!r} is an address; download it and write its path instead")
        if os.path.isabs(path):
            if self.confined:
                raise ValueError(f"{self.source}: image {path!r} is absolute; expected a path relative to the root")
            return path
        resolved = os.path.normpath(os.path.join(self.folder, path))
        if os.path.commonpath([self.folder, resolved]) != self.folder:
            raise ValueError(f"{self.source}: image {path!r} leaves its root {self.folder!r}; move it inside")
        return resolved


def picture_of(image: Any) -> tuple[str | None, bytes | None]:
    """The path and the content of an image in any of the forms that a table holds it in."""
    if isinstance(image, bytes):
        return None, image
    return (image.get("path"), image.get("bytes")) if isinstance(image, dict) else (image, None)


def open_file(path: str, split: str | None, root: str | None, *, base: str, key: str) -> Rows:
    """Open a record file; `split` keeps only the records that say so.

    Raises: ValueError as `read_records` does.
    """
    if not os.path.isfile(path):
        raise ValueError(f"{key}: there is no record file {path!r}")
    return open_table(path, _read_file(path, READERS[os.path.splitext(path)[1]], key), split, root, base=base, key=key)


def open_table(path: str, rows: datasets.Dataset, split: str | None, root: str | None, *, base: str, key: str) -> Rows:
    """Open what was read of a file; `split` keeps only the records that say so.

    Raises: ValueError as `read_records` does.
    """
    folder = root if root is not None else os.path.dirname(path)
    table = _checked(path, rows, folder, confined=root is not None, base=base, key=key)
    return replace(table, rows=_choose_split(table.rows, path, split, key))


def open_metadata(folder: str, name: str, base: str, key: str) -> Rows:
    """Open the metadata file of an image folder, whose images all lie in the folder.

    Raises: ValueError as `read_records` does.
    """
    path = os.path.join(folder, name)
    return _checked(path, _read_file(path, METADATA[name], key), folder, confined=True, base=base, key=key)


def open_saved(folder: str, split: str | None, root: str | None, *, base: str, key: str) -> Rows:
    """Open what `save_to_disk` of `datasets` wrote: a data set, or several splits of which "train" is the default.

    Raises: ValueError as `read_records` does.
    """
    import datasets

    try:
        saved = datasets.load_from_disk(folder)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(f"{key}: {folder} cannot be read as a saved data set: {one_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if (split or "train") not in saved:
            raise ValueError(f"{key}: {folder} has no split {split or 'train'!r}; it has {', '.join(saved)}")
        saved, split = saved[split or "train"], None
    table = _checked(folder, saved, root, confined=root is not None, base=base, key=key)
    return table if split is None else replace(table, rows=_choose_split(table.rows, folder, split, key))


def open_hub(name: str, split: str | None, root: str | None, *, base: str, key: str) -> Rows:
    """Open a hub data set, downloaded whole.

    Raises: ValueError as `read_records` does.
    """
    return _checked(name, _read_hub(name, split, key), root, confined=root is not None, base=base, key=key)


def _checked(source: str, rows: datasets.Dataset, folder: str | None, *, confined: bool, base: str, key: str) -> Rows:
    if len(rows) == 0:
        raise ValueError(f"{key}: {source} holds no records")
    rows = choose_fields(rows, source)
    if folder is None and not any("bytes" in parts for _, parts, _ in image_columns(rows)):
        raise ValueError(f"{key}: {source} names its images by path; give the root that the paths start from")
    table = Rows(source, rows, os.path.abspath(os.path.expanduser(folder or "")), confined, base)
    _check_encoding(table, key)
    _check_images(table)
    _check_texts(table)
    return table


def _read_file(path: str, reader: str, key: str) -> datasets.Dataset:
    import datasets  # slow to import, and needed only here
    import pyarrow

    try:
        return datasets.load_dataset(reader, data_files=path, split="train", cache_dir=_cache_of(path))
    except (StopIteration, ValueError, datasets.exceptions.DatasetsError) as error:
        cause = error.__cause__ or error.__context__ or error
        if not isinstance(cause, pyarrow.ArrowInvalid) and not isinstance(error, datasets.exceptions.DatasetsError):
            # StopIteration or ValueError: how `datasets` says that a file is empty
            raise ValueError(f"{key}: {path} holds no records: {one_line(error)}") from error
        if reader != "parquet" and (line := _undecodable_line(path)) is not None:
            raise ValueError(f"{key}: {path} is not UTF-8 in row {line} (from 0); {RECODE}") from error
        raise ValueError(
            f"{key}: {path} cannot be read as records: {one_line(cause)}; "
            "expected one JSON object per record, each field of one type throughout the file"
        ) from error


def _cache_of(path: str) -> str:
    """Where the Arrow copy of a file goes: another place for other content, even if it was written within a second."""
    import datasets

    state = os.stat(path)
    name = hashlib.blake2b(f"{os.path.abspath(path)}\n{state.st_size}\n{state.st_mtime_ns}".encode(), digest_size=16)
    if state.st_size <= HASHED_BYTES:
        name.update(Path(path).read_bytes())
    return os.path.join(datasets.config.HF_DATASETS_CACHE, "qformer_records", name.hexdigest())


def _undecodable_line(path: str) -> int | None:
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            try:
                line.decode()
            except UnicodeDecodeError:
                return number
    return None


def _read_hub(name: str, split: str | None, key: str) -> datasets.Dataset:
    import datasets

    if os.path.exists(name):
        raise ValueError(f"{key}: {name!r} is no record file; expected one that ends in {', '.join(READERS)}")
    if name.startswith((".", "/")) or name.count("/") > 1:
        raise ValueError(f"{key}: there is no record file {name!r}")
    try:
        return datasets.load_dataset(name, split=split or "train")
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise ValueError(
            f"{key}: {name!r} is neither a record file ({', '.join(READERS)}) nor a hub data set that can be read: "
            f"{one_line(error)}"
        ) from error


def _check_images(table: Rows) -> None:
    """Find the first record without an image or with a path that may not be used, on whole columns at a time."""
    import pyarrow.compute as pc

    there = np.zeros(len(table.rows), dtype=np.int64)  # in how many fields
    for name, parts, row_of in image_columns(table.rows):
        embedded = pc.is_valid(parts["bytes"]).to_numpy() if "bytes" in parts else np.zeros(len(row_of), dtype=bool)
        named = np.zeros_like(embedded)
        if "path" in parts:
            named = pc.fill_null(pc.greater(pc.binary_length(parts["path"]), 0), False).to_numpy()
        absent = row_of[~(embedded | named)]
        if name == "images" and len(absent):
            raise ValueError(f"{table.source}: record {absent[0]} (from 0) has an empty entry in its 'images'")
        there += np.bincount(np.unique(row_of[embedded | named]), minlength=len(there))
        if "path" in parts:
            suspicious = r"(^|[/\\])\.\.([/\\]|$)|://" + (r"|^([/\\]|[A-Za-z]:)" if table.confined else "")
            matches = pc.fill_null(pc.match_substring_regex(parts["path"], suspicious), False).to_numpy()
            for i in np.flatnonzero(matches & ~embedded):  # beside bytes a path is only a name
                table.resolve(parts["path"][int(i)].as_py())
    if not there.all():
        raise ValueError(f"{table.source}: record {there.argmin()} (from 0) has no 'image'")
    if there.max() > 1:
        raise ValueError(
            f"{table.source}: record {there.argmax()} (from 0) has more than one of {', '.join(IMAGE_FIELDS)}; name all "
            "of its images in 'images'"
        )


def _check_encoding(table: Rows, key: str) -> None:
    """Find the first text that is no UTF-8, which Arrow would hand out only when it comes to be read."""
    import pyarrow

    for name in table.rows.column_names:
        first = 0
        for chunk in table.rows.data.column(name).chunks:
            try:
                chunk.validate(full=True)
            except pyarrow.ArrowInvalid:
                row = next(i for i in range(len(chunk)) if not _is_valid(chunk.slice(i, 1)))
                raise ValueError(
                    f"{key}: {table.source}: record {first + row} (from 0) is not UTF-8 in field {name!r}; {RECODE}"
                ) from None
            first += len(chunk)


def _is_valid(array: pyarrow.Array) -> bool:
    import pyarrow

    try:
        pyarrow.concat_arrays([array, array[:0]]).validate(full=True)
    except pyarrow.ArrowInvalid:
        return False
    return True


def _check_texts(table: Rows) -> None:
    import pyarrow.compute as pc

    columns = [table.rows.data.column(name) for name in ("caption", "question") if name in table.rows.column_names]
    absent = np.logical_and.reduce([pc.is_null(column).to_numpy() for column in columns])
    if absent.all():
        raise ValueError(f"{table.source}: no record has a 'caption' or 'question'")
    if absent.any():
        logger.warning(
            "%s: %d of %d records have neither 'caption' nor 'question', the first is record %d (from 0); "
            "training replaces them by others", table.source, absent.sum(), len(absent), absent.argmax(),
        )  # fmt: skip


def _choose_split(rows: datasets.Dataset, source: str, split: str | None, key: str) -> datasets.Dataset:
    names = [str(name) for name in rows.unique("split")] if "split" in rows.column_names else []
    if split is None:
        if len(names) > 1:
            logger.warning(
                "%s: %s has the splits %s, all of them read; choose one with SOURCE:NAME", key, source, names
            )
        return rows
    if split not in names:
        raise ValueError(f"{key}: {source} has no record with split {split!r}; it has {names or 'no field split'}")
    chosen = np.fromiter((str(name) == split for name in rows["split"]), dtype=bool, count=len(rows))
    return rows.select(np.flatnonzero(chosen))
