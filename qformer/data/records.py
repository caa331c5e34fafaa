"""One schema for all data: one JSON object per record, read by Hugging Face `datasets`.

    {"image": "train/0001.jpg", "caption": "a dog on a beach"}
    {"image": "train/0001.jpg", "caption": ["a dog on a beach", "a dog runs"], "image_id": "17"}
    {"image": "train/0002.jpg", "question": "what is it?", "answers": ["a dog", "dog"], "question_id": "3"}

Nothing here opens a picture: a record is checked for its form when it is read and for its content when it is used.
"""

from __future__ import annotations

import difflib
import hashlib
import logging
import os
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import datasets
    import pyarrow

logger = logging.getLogger(__name__)

READERS = {".json": "json", ".jsonl": "json", ".parquet": "parquet"}
FIELDS = ("image", "caption", "question", "answers", "image_id", "question_id", "question_type", "split")


class BrokenRecord(ValueError):
    """A record whose picture, features or text cannot be used; `reason` says why, `image` which."""

    def __init__(self, image: str, reason: str):
        super().__init__(image, reason)
        self.image = image
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.image}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """One picture (or feature file) and the text that belongs to it.

    Args:
        image: absolute path, or "SOURCE#ROW" where the picture travels inside the record file (`image_bytes`).
        image_id: equal for records of the same picture; by default the path, or a hash of the bytes.
    """

    image: str
    image_id: str
    captions: tuple[str, ...] = ()
    question: str | None = None
    answers: tuple[str, ...] = ()
    question_id: str | None = None
    question_type: str | None = None
    image_bytes: bytes | None = field(default=None, repr=False)


@dataclass(frozen=True)
class _Table:
    source: str
    rows: datasets.Dataset
    folder: str  # relative paths resolve against it
    confined: bool  # a root was given: absolute paths are refused

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


class Records:
    """A map-style sequence of `Record`s over memory-mapped tables; `read_records` makes it."""

    def __init__(self, tables: list[_Table]):
        self._tables = tables
        self._ends = np.cumsum([len(table.rows) for table in tables])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, position, side="right"))
        table = self._tables[number]
        row = int(position - (self._ends[number - 1] if number else 0))
        return _record(table.rows[row], table, row)

    def first_of_each_picture(self) -> dict[str, int]:
        """The first record of every `image_id`, in order; reads the pictures that travel inside the tables.

        Raises:
            ValueError: records of one image_id name different files.
        """
        found: dict[str, tuple[int, str]] = {}
        index = 0
        for table in self._tables:
            columns = [name for name in ("image", "image_id") if name in table.rows.column_names]
            for batch in table.rows.select_columns(columns).iter(batch_size=256):
                for values in zip(*batch.values(), strict=True):
                    name, image_id, content = _identify(dict(zip(batch, values, strict=True)), table, index)
                    _, first = found.setdefault(image_id, (index, name))
                    if content is None and first != name:
                        raise ValueError(
                            f"{table.source}: image_id {image_id!r} is that of {first} and of {name}; "
                            "give every picture its own, or leave image_id out"
                        )
                    index += 1
        return {image_id: first for image_id, (first, _) in found.items()}


def _identify(row: dict[str, Any], table: _Table, number: int) -> tuple[str, str, bytes | None]:
    """Name, image_id and, where the picture travels inside the table, content of a record."""
    image, content = row["image"], None
    if isinstance(image, bytes):
        image = {"bytes": image}
    if isinstance(image, dict):
        content, image = image.get("bytes"), image.get("path")
    if content is None:
        name = image_id = table.resolve(image)
    else:  # the name inside a table need not be unique, the content is
        name, image_id = f"{table.source}#{number}", hashlib.blake2b(content, digest_size=16).hexdigest()
    return name, _string(row.get("image_id")) or image_id, content


def _record(row: dict[str, Any], table: _Table, number: int) -> Record:
    name, image_id, content = _identify(row, table, number)
    return Record(
        image=name,
        image_id=image_id,
        captions=_strings(row.get("caption")),
        question=row.get("question"),
        answers=_strings(row.get("answers")),
        question_id=_string(row.get("question_id")),
        question_type=_string(row.get("question_type")),
        image_bytes=content,
    )


def _string(value: Any) -> str | None:
    return None if value is None else str(value)


def _strings(value: str | list[str | None] | None) -> tuple[str, ...]:
    values = [value] if isinstance(value, str) else value or []
    return tuple(text for text in values if text)


def read_records(sources: list[str], root: str | None = None, *, key: str = "data") -> Records:
    """Open record files or hub data sets as one sequence, checked for form but with no picture opened.

    The first reading of a file leaves an Arrow copy in the cache of `datasets`; later ones map it into memory.

    Args:
        sources: .jsonl, .json or .parquet files, or ids of hub data sets; "SOURCE:NAME" keeps only the records whose
            `split` is NAME (a file) or reads that split (a hub data set, otherwise its "train").
        root: the folder that relative pictures start from; by default the folder of the record file.
        key: the config key that named the sources, for messages.

    Raises:
        ValueError: no source; a file that is missing, empty, unreadable or of an unknown kind; an unknown split; a
            field that is missing or of the wrong type; a record without an image or without text; an image that leaves
            its root, is absolute although a root is given, or is a web address.
    """
    if not sources:
        raise ValueError(f"{key}: expected at least one record file or hub data set, got none")
    return Records([_open_table(source, root, key) for source in sources])


def _open_table(source: str, root: str | None, key: str) -> _Table:
    import datasets  # slow to import, and needed only here

    path, split = _split_source(os.path.expanduser(source))
    is_file = os.path.splitext(path)[1] in READERS
    rows = _read_file(path, key) if is_file else _read_hub(path, split, key)
    if len(rows) == 0:
        raise ValueError(f"{key}: {source} holds no records")
    if isinstance(rows.features.get("image"), datasets.Image):
        rows = rows.cast_column("image", datasets.Image(decode=False))
    rows = _check_fields(rows, path)
    if root is None and not is_file and "bytes" not in _image_columns(rows):
        raise ValueError(f"{key}: {path} names its pictures by path; give the root that the paths start from")
    folder = os.path.abspath(os.path.expanduser(root) if root is not None else os.path.dirname(path))
    table = _Table(path, rows, folder, confined=root is not None)
    _check_images(table)
    _check_texts(table)
    return _Table(path, _choose_split(rows, path, split, key), folder, table.confined) if is_file else table


def _split_source(source: str) -> tuple[str, str | None]:
    match = None if os.path.exists(source) else re.fullmatch(r"(.+?):(\w+(?:\[.*\])?)", source)
    return (match[1], match[2]) if match else (source, None)


def _read_file(path: str, key: str) -> datasets.Dataset:
    import datasets

    if not os.path.isfile(path):
        raise ValueError(f"{key}: there is no record file {path!r}")
    reader = READERS[os.path.splitext(path)[1]]
    try:
        return datasets.load_dataset(reader, data_files=path, split="train")
    except (StopIteration, ValueError) as error:  # how `datasets` says that a file is empty
        raise ValueError(f"{key}: {path} holds no records: {_one_line(error)}") from error
    except datasets.exceptions.DatasetsError as error:
        raise ValueError(
            f"{key}: {path} cannot be read as records: {_one_line(error.__cause__ or error)}; "
            "expected one JSON object per record, each field of one type throughout the file"
        ) from error


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
            f"{_one_line(error)}"
        ) from error


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _check_fields(rows: datasets.Dataset, source: str) -> datasets.Dataset:
    """Return the table reduced to the fields of the schema, or say which field is missing or of the wrong type."""
    import datasets

    features = {name: kind for name, kind in rows.features.items() if kind != datasets.Value("null")}
    others = [name for name in rows.features if name not in FIELDS]
    needed = ("image", "caption", "question")  # of the others, only a likely slip is worth a word
    cutoffs = {name: 0.6 if name in needed else 0.8 for name in FIELDS if name not in features}
    alike = {name: difflib.get_close_matches(name, others, n=1, cutoff=cutoff) for name, cutoff in cutoffs.items()}
    hints = {name: f"; did you mean {near[0]!r}?" if near else "" for name, near in alike.items()}
    found = ", ".join(rows.column_names)
    if "image" not in features:
        raise ValueError(f"{source} has no field 'image'{hints['image']} (it has {found})")
    if "caption" not in features and "question" not in features:
        hint = hints["caption"] or hints["question"]
        raise ValueError(f"{source} has neither a field 'caption' nor 'question'{hint} (it has {found})")
    if "question" in features and "answers" not in features and alike["answers"]:
        raise ValueError(f"{source} has no field 'answers'{hints['answers']} (it has {found})")
    for name, near in alike.items():
        if near and name not in needed:
            logger.warning("%s has no field %r and its field %r is not read", source, name, near[0])

    expected = {"image": "a path or a picture", "caption": "a string or a list of strings", "question": "a string"}
    expected |= {"answers": "a list of strings"}
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
    if name == "caption":
        return is_text(kind) or is_texts
    if name == "question":
        return is_text(kind)
    if name == "answers":
        return is_texts
    return isinstance(kind, (datasets.Value, datasets.Json))  # ids may mix numbers and strings


def _image_columns(rows: datasets.Dataset) -> dict[str, pyarrow.ChunkedArray]:
    """Return the columns "path" and "bytes" of the pictures, those of them that the table has."""
    import pyarrow
    import pyarrow.compute as pc

    column = rows.data.column("image")
    if pyarrow.types.is_struct(column.type):
        parts = {child.name: pc.struct_field(column, child.name) for child in column.type}
        return {name: parts[name] for name in ("path", "bytes") if name in parts and parts[name].type != pyarrow.null()}
    return {"bytes" if "binary" in str(column.type) else "path": column}


def _check_images(table: _Table) -> None:
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
        found = pc.fill_null(pc.match_substring_regex(parts["path"], suspicious), False).to_numpy()
        for row in np.flatnonzero(found & ~embedded):  # beside bytes a path is only a name
            table.resolve(parts["path"][int(row)].as_py())


def _check_texts(table: _Table) -> None:
    import pyarrow
    import pyarrow.compute as pc

    columns = [table.rows.data.column(name) for name in ("caption", "question") if name in table.rows.column_names]
    absent = np.logical_and.reduce([pc.is_null(column).to_numpy() for column in columns])
    if absent.any():
        raise ValueError(f"{table.source}: record {absent.argmax()} (from 0) has neither 'caption' nor 'question'")
    if "caption" in table.rows.column_names and pyarrow.types.is_string(columns[0].type):
        # a list that follows megabytes of strings is turned into its JSON text without a word
        is_list = pc.fill_null(pc.match_substring_regex(columns[0], r'^\[\s*"'), False).to_numpy()
        if is_list.any():
            raise ValueError(
                f"{table.source}: field 'caption' is a list in record {is_list.argmax()} (from 0) and a string before; "
                "expected a string or a list of strings, the same in every record"
            )


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
    return rows.select(np.flatnonzero([str(name) == split for name in rows["split"]]))
