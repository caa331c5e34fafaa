"""The columns of a table of Hugging Face `datasets` as the fields of the schema, and the images in them."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from qformer.data.records import FIELDS, IMAGE_FIELDS

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)

# How image folders and WebDataset name what the schema calls otherwise.
ALIASES = {"image": ("file_name", "jpg", "jpeg", "png", "webp"), "caption": ("text", "txt")}


def columns_of(names: list[str]) -> dict[str, str]:
    """What each field of the schema that is there is called."""
    columns = {field: field for field in FIELDS if field in names}
    for field, aliases in ALIASES.items():
        there = [alias for alias in aliases if alias in names]
        if there and field not in columns and not (field == "caption" and "question" in columns):
            columns[field] = there[0]
    return columns


def choose_fields(rows: datasets.Dataset, source: str) -> datasets.Dataset:
    """Return the table reduced to the fields of the schema, images undecoded.

    Raises: ValueError naming the field that is missing or of the wrong type.
    """
    import datasets

    for name, column in columns_of(rows.column_names).items():
        if name != column:
            rows = rows.rename_column(column, name)
            logger.info("%s: its field %r is read as %r", source, column, name)
    for name in IMAGE_FIELDS:
        if (undecoded := _undecoded(rows.features.get(name))) is not None:
            rows = rows.cast_column(name, undecoded)

    features = {name: kind for name, kind in rows.features.items() if kind != datasets.Value("null")}
    others = [name for name in rows.features if name not in FIELDS]
    needed = (*IMAGE_FIELDS, "caption", "question")  # of the others, only a likely slip is worth a word
    cutoffs = {name: 0.6 if name in needed else 0.8 for name in FIELDS if name not in features}
    alike = {name: difflib.get_close_matches(name, others, n=1, cutoff=cutoff) for name, cutoff in cutoffs.items()}
    hints = {name: f"; did you mean {near[0]!r}?" if near else "" for name, near in alike.items()}
    columns = ", ".join(rows.column_names)
    if not features.keys() & set(IMAGE_FIELDS):
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
    expected |= {"answers": "a list of strings, or of objects with 'answer'"}
    expected |= dict.fromkeys(("choices", "origin"), "a list of strings")
    expected |= {"images": "a list of paths or pictures", "video": "a path or a clip"}
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
    if name == "images":
        return isinstance(kind, (datasets.List, datasets.LargeList)) and _fits("image", kind.feature)
    if name in IMAGE_FIELDS:
        is_struct = isinstance(kind, dict) and bool(kind.keys() & {"bytes", "path"})
        is_bytes = isinstance(kind, datasets.Value) and kind.dtype in ("binary", "large_binary")
        return is_text(kind) or is_bytes or is_struct or isinstance(kind, (datasets.Image, datasets.Video))
    if name == "question":
        return is_text(kind)
    if name in ("caption", "answers", "choices", "origin"):
        is_mixed = isinstance(kind, datasets.Json)  # strings in one record and lists in another: see `texts_of`
        is_official = name == "answers" and isinstance(kind, datasets.List) and _has_answer(kind.feature)
        return is_text(kind) or is_texts or is_mixed or is_official
    return isinstance(kind, (datasets.Value, datasets.Json))  # ids may mix numbers and strings


def _has_answer(kind: Any) -> bool:
    import datasets

    return isinstance(kind, datasets.Json) or (isinstance(kind, dict) and "answer" in kind)


def _undecoded(kind: Any) -> Any:
    """The type of a column of images or clips, or lists of them, that leaves them as they are; None for any other."""
    import datasets

    if isinstance(kind, (datasets.Image, datasets.Video)):
        return type(kind)(decode=False)
    if isinstance(kind, (datasets.List, datasets.LargeList)) and (inner := _undecoded(kind.feature)) is not None:
        return datasets.List(inner)
    return None


def image_columns(rows: datasets.Dataset) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Each field of images: its name, the columns "path" and "bytes" that it has, and int64[n] the row of each image."""
    import pyarrow
    import pyarrow.compute as pc

    for name in (name for name in IMAGE_FIELDS if name in rows.column_names):
        column, counts = rows.data.column(name), np.ones(len(rows.data), dtype=np.int64)
        if name == "images":
            counts = pc.fill_null(pc.list_value_length(column), 0).to_numpy()
            column = pc.list_flatten(column)
        parts = {"bytes" if "binary" in str(column.type) else "path": column}
        if pyarrow.types.is_struct(column.type):
            parts = {child.name: pc.struct_field(column, child.name) for child in column.type}
        kept: dict[str, Any] = {
            n: parts[n] for n in ("path", "bytes") if n in parts and parts[n].type != pyarrow.null()
        }
        yield name, kept, np.repeat(np.arange(len(counts)), counts)
