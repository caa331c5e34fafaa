"""Published files as sources of records: read where they lie, told from record files by their content."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from qformer.data.known import captions, questions
from qformer.data.known.captions import Row
from qformer.data.known.formats import recognise
from qformer.data.records import FIELDS
from qformer.messages import one_line

if TYPE_CHECKING:
    import datasets

ROWS_AT_A_TIME = 10_000
LISTS = ("images", "caption", "answers", "choices")  # the fields that hold several texts
ANSWERS, QUESTIONS = "vqa_annotations", "vqa_questions"
_READ = {
    "karpathy": captions.karpathy,
    "coco_captions": captions.coco_captions,
    "msrvtt": captions.msrvtt,
    "aokvqa": questions.aokvqa,
    "gqa": questions.gqa,
    "vizwiz": questions.vizwiz,
    "textvqa": questions.textvqa,
    "pope": questions.pope,
    "scienceqa": questions.scienceqa,
    "nlvr2": questions.nlvr2,
}


def published_format(path: str) -> str | None:
    """The format of a published file that can be read in place; None for every other source."""
    if not (path.endswith((".json", ".jsonl")) and os.path.isfile(path)):
        return None
    with contextlib.suppress(ValueError):  # the reader of record files says what is wrong
        return recognise(Path(path))
    return None


def find_answers(paths: Sequence[str], formats: Sequence[str | None], key: str) -> list[str]:
    """Those of the paths that are VQA's annotations: no records, but the answers to the questions of others.

    Raises: ValueError when there are no questions beside them.
    """
    answers = [path for path, name in zip(paths, formats, strict=True) if name == ANSWERS]
    if answers and QUESTIONS not in formats:
        file = os.path.basename(answers[0])
        mate = file.replace("mscoco_", "OpenEnded_mscoco_", 1)
        raise ValueError(
            f"{key}: {answers[0]} has VQA's answers without their questions; name the file of questions too, as "
            f"published {mate.replace('annotations', 'questions')}"
        )
    return answers


def published_rows(path: str, name: str, annotations: Sequence[str] = ()) -> datasets.Dataset:
    """The records of a published file as a table in memory, images not looked at.

    Args:
        name: its format.
        annotations: VQA's answers to questions among others.

    Raises: ValueError when it is not as published, or of a format that is only read by `qformer.data.known`.
    """
    if name == QUESTIONS:
        rows = questions.vqa(Path(path), [Path(file) for file in annotations])
    elif name in _READ:
        rows = _READ[name](Path(path))
    else:
        raise ValueError(
            f"{path} has the form of {name}, which needs other files beside it; make record files of them: "
            "python -m qformer.data.known --help"
        )
    import pyarrow

    try:
        return _table(rows)
    except (KeyError, TypeError, AttributeError, pyarrow.ArrowInvalid) as error:
        what = f"an entry has no {error}" if isinstance(error, KeyError) else one_line(error)
        raise ValueError(
            f"{path} has the form of {name}, but is not as published: {what}; download it again"
        ) from error


def _table(rows: Iterator[Row]) -> datasets.Dataset:
    import datasets
    import pyarrow

    first = next(rows, None)
    if first is None:
        return datasets.Dataset.from_dict({"image": []})
    kinds = {name: pyarrow.list_(pyarrow.string()) if name in LISTS else pyarrow.string() for name in FIELDS}
    kinds |= {name: pyarrow.int64() for name in ("image_id", "question_id") if isinstance(first.get(name), int)}
    schema, parts = pyarrow.schema(list(kinds.items())), []
    rows = itertools.chain([first], rows)
    while part := [_whole(row) for row in itertools.islice(rows, ROWS_AT_A_TIME)]:
        parts.append(pyarrow.Table.from_pylist(part, schema=schema))
    whole = pyarrow.concat_tables(parts)
    present = [name for name in whole.column_names if whole[name].null_count < len(whole)]
    return datasets.Dataset(datasets.table.InMemoryTable(whole.select(present)))


def _whole(row: Row) -> Row:
    """A row with every field; empty lists are none."""
    return {name: None if (value := row.get(name)) in ([], ()) else value for name in FIELDS}
