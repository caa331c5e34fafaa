"""Records in tables of Hugging Face `datasets`: json, jsonl, parquet and csv files, and hub data sets."""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from qformer.data.records import FIELDS, Identity, Record, build_record, identify
from qformer.messages import one_line

if TYPE_CHECKING:
    import datasets
    import pyarrow

logger = logging.getLogger(__name__)

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
METADATA = {"metadata.jsonl": "json", "metadata.csv": "csv", "metadata.parquet": "parquet"}  # of an image folder
# How image folders and WebDataset name what the schema calls otherwise.
HASHED_BYTES = 64 << 20  # larger files are told apart by size and time alone
RECODE = "save it as UTF-8, for instance by iconv -f WINDOWS-1252 -t UTF-8"
ALIASES = {"image": ("file_name", "jpg", "jpeg", "png", "webp"), "caption": ("text", "txt")}


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

    def text(self, row: int) -> Record:
        """The record of a row; images inside the table are not read, so that their pages stay on the disk."""
        if "image" in self._texts.column_names:
            return self.read(row)
        fields, name = self._texts[row], f"{self.source}#{row}"
        return build_record(identify(name, None, fields.get("image_id", name), self.base), fields)

    @cached_property
    def _texts(self) -> datasets.Dataset:
        return self.rows.remove_columns("image") if "bytes" in _image_columns(self.rows) else self.rows

    def identities(self) -> Iterator[Identity]:
        """The picture of every row; pictures inside the table are read."""
        columns = [name for name in ("image", "image_id") if name in self.rows.column_names]
        row = 0
        for batch in self.rows.select_columns(columns).iter(batch_size=256):
            for values in zip(*batch.values(), strict=True):
                yield self._identify(dict(zip(batch, values, strict=True)), row)
                row += 1

    def _identify(self, fields: dict[str, Any], row: int) -> Identity:
        path, content = picture_of(fields["image"])
        name = self.resolve(str(path)) if content is None else f"{self.source}#{row}"
        return identify(name, content, fields.get("image_id"), self.base)

    def resolve(self, path: str) -> str:
        """Return the absolute path of a picture; the check is lexical, so links inside the folder may lead out."""
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
    """The path and the content of a picture in any of the forms that a table holds it in."""
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
    """Open the metadata file of an image folder, whose pictures all lie in the folder.

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
    if folder is None and "bytes" not in _image_columns(rows):
        raise ValueError(f"{key}: {source} names its pictures by path; give the root that the paths start from")
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


def columns_of(names: list[str]) -> dict[str, str]:
    """What each field of the schema that is there is called."""
    columns = {field: field for field in FIELDS if field in names}
    for field, aliases in ALIASES.items():
        there = [alias for alias in aliases if alias in names]
        if there and field not in columns and not (field == "caption" and "question" in columns):
            columns[field] = there[0]
    return columns


def choose_fields(rows: datasets.Dataset, source: str) -> datasets.Dataset:
    """Return the table reduced to the fields of the schema, pictures undecoded.

    Raises: ValueError naming the field that is missing or of the wrong type.
    """
    import datasets

    for name, column in columns_of(rows.column_names).items():
        if name != column:
            rows = rows.rename_column(column, name)
            logger.info("%s: its field %r is read as %r", source, column, name)
    if isinstance(rows.features.get("image"), datasets.Image):
        rows = rows.cast_column("image", datasets.Image(decode=False))

    features = {name: kind for name, kind in rows.features.items() if kind != datasets.Value("null")}
    others = [name for name in rows.features if name not in FIELDS]
    needed = ("image", "caption", "question")  # of the others, only a likely slip is worth a word
    cutoffs = {name: 0.6 if name in needed else 0.8 for name in FIELDS if name not in features}
    alike = {name: difflib.get_close_matches(name, others, n=1, cutoff=cutoff) for name, cutoff in cutoffs.items()}
    hints = {name: f"; did you mean {near[0]!r}?" if near else "" for name, near in alike.items()}
    columns = ", ".join(rows.column_names)
    if "image" not in features:
        raise ValueError(f"{source} has no field 'image'{hints['image']} (it has {columns})")
    if "caption" not in features and "question" not in features:
        hint = hints["caption"] or hints["question"]
        raise ValueError(f"{source} has neither a field 'caption' nor 'question'{hint} (it has {columns})")
    if "question" in features and "answers" not in features and alike["answers"]:
        raise ValueError(f"{source} has no field 'answers'{hints['answers']} (it has {columns})")
    for name, near in alike.items():
        if near and name not in needed:
            logger.warning("%s has no field %r and its field %r is not read", source, name, near[0])

    expected = {"image": "a path or a picture", "caption": "a string or a list of strings", "question": "a string"}
    expected |= {"answers": "a list of strings, or of objects with 'answer'", "choices": "a list of strings"}
    for name in [name for name in FIELDS if name in features]:
        if not _fits(name, features[name]):
            what = expected.get(name, "a string or a number")
            raise ValueError(f"{source}: field {name!r} is {features[name]}; expected {what}, the same in every record")
    return rows.select_columns([name for name in FIELDS if name in features])


def _fits(name: str, kind: Any) -> bool:
    import datasets

    def is_text(kind: Any) -> bool:
        return isinstance(kind, datasets.Value) and kind.dtype in ("string", "large_string")

    is_texts = isinstance(kind, (datasets.List, datasets.LargeList)) and (
        is_text(kind.feature) or kind.feature == datasets.Value("null")
    )
    if name == "image":
        is_struct = isinstance(kind, dict) and bool(kind.keys() & {"bytes", "path"})
        is_bytes = isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")
        return is_text(kind) or is_bytes or is_struct or isinstance(kind, datasets.Image)
    if name == "question":
        return is_text(kind)
    if name in ("caption", "answers", "choices"):
        is_mixed = isinstance(kind, datasets.Json)  # strings in one record and lists in another: see `texts_of`
        is_official = name == "answers" and isinstance(kind, datasets.List) and _has_answer(kind.feature)
        return is_text(kind) or is_texts or is_mixed or is_official
    return isinstance(kind, (datasets.Value, datasets.Json))  # ids may mix numbers and strings


def _has_answer(kind: Any) -> bool:
    import datasets

    return isinstance(kind, datasets.Json) or (isinstance(kind, dict) and "answer" in kind)


def _image_columns(rows: datasets.Dataset) -> dict[str, pyarrow.ChunkedArray]:
    """Return the columns "path" and "bytes" of the pictures, those of them that the table has."""
    import pyarrow
    import pyarrow.compute as pc

    column = rows.data.column("image")
    if pyarrow.types.is_struct(column.type):
        parts = {child.name: pc.struct_field(column, child.name) for child in column.type}
        return {name: parts[name] for name in ("path", "bytes") if name in parts and parts[name].type != pyarrow.null()}
    return {"bytes" if "binary" in str(column.type) else "path": column}


def _check_images(table: Rows) -> None:
    """Find the first record without an image or with a path that may not be used, on whole columns at a time."""
    import pyarrow.compute as pc

    parts = _image_columns(table.rows)
    embedded = pc.is_valid(parts["bytes"]).to_numpy() if "bytes" in parts else np.zeros(len(table.rows), dtype=bool)
    named = np.zeros_like(embedded)
    if "path" in parts:
        named = pc.fill_null(pc.greater(pc.binary_length(parts["path"]), 0), False).to_numpy()
    if not (embedded | named).all():
        raise ValueError(f"{table.source}: record {(embedded | named).argmin()} (from 0) has no 'image'")
    if "path" in parts:
        suspicious = r"(^|[/\\])\.\.([/\\]|$)|://" + (r"|^([/\\]|[A-Za-z]:)" if table.confined else "")
        matches = pc.fill_null(pc.match_substring_regex(parts["path"], suspicious), False).to_numpy()
        for row in np.flatnonzero(matches & ~embedded):  # beside bytes a path is only a name
            table.resolve(parts["path"][int(row)].as_py())


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
