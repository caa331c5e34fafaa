"""Outputs on disk: a file that grows while they are computed, official results read and written."""

import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.evaluation.task import Task
from qformer.files import atomic_file, require_same

if TYPE_CHECKING:
    from qformer.data import Record


logger = logging.getLogger(__name__)


class OutputFile:
    """JSON lines, the first says of what; while it grows each rank has a file of its own beside it, `FILE.rank0`.

    `save` makes one file of them. A last line that was cut short is computed again.

    Args:
        made_of: what the outputs depend on; a file that was made of something else is refused.
    """

    def __init__(self, path: Path, task: Task, records: "Sequence[Record]", made_of: dict[str, Any]):
        self.path, self.task, self.records, self.made_of = path, task, records, made_of

    def load(self) -> dict[int, Any]:
        """The outputs so far, by the number of their record.

        Raises: ValueError when a file was made of something else, or a line of it cannot be read.
        """
        outputs: dict[int, Any] = {}
        for path in (self.path, *self._parts()):
            lines = list(_read_lines(path)) if path.is_file() else []
            if lines:
                require_same(lines[0], self.made_of, name=str(path), fix="delete it or give another --answers")
            for number, line in enumerate(lines[1:], start=2):
                index = line.get("record")
                if not isinstance(index, int) or "output" not in line:
                    raise ValueError(f"{path}, line {number}: expected a record and its output; delete the file")
                if index < len(self.records):  # --limit was larger then
                    if line.get("asked") != self._asked(index):
                        raise ValueError(
                            f"{path}, line {number}: it answers {line.get('asked')}, record {index} asks "
                            f"{self._asked(index)}: the records have changed; delete the file or give another"
                        )
                    outputs[index] = line["output"]
        return outputs

    def begin(self, rank: int) -> None:
        """Open the file of this rank for more; what was cut short at its end goes."""
        self._mine = self.path.with_name(f"{self.path.name}.rank{rank}")
        content = self._mine.read_bytes() if self._mine.is_file() else b""
        if whole := content.rfind(b"\n") + 1:
            os.truncate(self._mine, whole)
        else:
            self._mine.write_bytes(_line(self.made_of))

    def append(self, outputs: dict[int, Any]) -> None:
        """Add outputs to the file of this rank, on disk when this returns."""
        with self._mine.open("ab") as file:
            file.write(b"".join(map(self._row, outputs.items())))
            file.flush()
            os.fsync(file.fileno())

    def save(self, outputs: dict[int, Any]) -> None:
        """Write everything as one file, in the order of the records, and remove the files of the ranks."""
        with atomic_file(self.path) as scratch:
            scratch.write_bytes(_line(self.made_of) + b"".join(map(self._row, sorted(outputs.items()))))
        for path in self._parts():
            path.unlink()

    def _parts(self) -> list[Path]:
        prefix = f"{self.path.name}.rank"
        return sorted(p for p in self.path.parent.glob("*") if p.name.startswith(prefix))

    def _asked(self, index: int) -> dict[str, Any]:
        record = self.records[index]
        return {"image": record.names, self.task.id_field: self.task.identify(record), "question": record.question}

    def _row(self, item: tuple[int, Any]) -> bytes:
        index, output = item
        return _line({"record": index, "asked": self._asked(index), "output": output})


def read_predictions(path: Path, task: Task, records: "Sequence[Record]", partly: bool = False) -> list[Any]:
    """One output a record from official results, [{"question_id": 1, "answer": "yes"}, ...], or what --json or --answers wrote.

    Args:
        partly: more outputs than records are expected (`--limit`).

    Raises: ValueError naming ids without a record or without an output, a file that is missing or of another form.
    """
    rows = _read_results(path, task)
    ids = [task.identify(record) for record in records]
    if None in ids:
        raise ValueError(
            f"{records[ids.index(None)].image}: its record has no {task.id_field}, so nothing is predicted"
        )
    predicted = [_id_and_output(path, task, number, row) for number, row in enumerate(rows)]
    keys, predicted = _align(list(map(str, ids)), records, rows, predicted)
    _require_same(path, task, keys, [key for key, _ in predicted], partly=partly)
    outputs = dict(predicted)
    if absent := sum(key not in outputs for key in keys):
        logger.warning("%s: %d of %d %s have no prediction; the others are scored", path, absent, len(keys), task.noun)
    return [outputs.get(key) for key in keys]


Predicted = list[tuple[str, Any]]  # key and output


def _align(
    keys: list[str], records: "Sequence[Record]", rows: list[Any], predicted: Predicted
) -> tuple[list[str], Predicted]:  # fmt: skip
    """By what records and outputs meet: by ids, unless those repeat or are none of the records'."""
    if len(set(keys)) < len(keys) and all({"image", "question"} <= row.keys() for row in rows):
        # POPE counts from 1 in each of its subsets
        keys = [_whole_key(key, record.image, record.question) for key, record in zip(keys, records, strict=True)]
        triples = (
            (_whole_key(key, row["image"], row["question"]), out)
            for row, (key, out) in zip(rows, predicted, strict=True)
        )
        return keys, list(triples)
    names = [os.path.basename(record.image) for record in records]
    known = {key for key, _ in predicted}
    for alternative in (keys, names, [Path(name).stem for name in names]):
        if not known.isdisjoint(alternative):
            return alternative, predicted
    return keys, predicted


def _require_same(path: Path, task: Task, keys: list[str], predicted: list[str], *, partly: bool) -> None:
    what = " or ".join(dict.fromkeys((task.result_names[0], task.id_field)))
    ((key, count),) = Counter(predicted).most_common(1)
    if count > 1:
        raise ValueError(f"{path}: {what} {key} stands {count} times; expected one {task.output_field} each")
    known, there = set(keys), set(predicted)
    missing = [key for key in keys if key not in there]
    extra = [key for key in predicted if key not in known] if not partly else []
    if task.some_suffice and not extra and not known.isdisjoint(there):
        return
    for names, lack in ((missing, "is missing, which the records have"), (extra, "is of none of the records")):
        if names:
            more = f" (and {len(names) - 1} others)" if len(names) > 1 else ""
            raise ValueError(f"{path}: {what} {names[0]}{more} {lack}; give the predictions of these records")


def _id_and_output(path: Path, task: Task, number: int, row: Any) -> tuple[str, Any]:
    """What a row of results holds, under the names of the server or under our own."""
    id_name, output_name = task.result_names
    if isinstance(row, dict):
        key = next((row[name] for name in (id_name, task.id_field) if name in row), None)
        for name in (output_name, task.output_field):
            if key is not None and row.get(name) is not None:
                return str(key), row[name]
    raise ValueError(f"{path}: entry {number} (from 0) has no {id_name} or no {output_name}, or one of null")


def _whole_key(key: str, image: str | None, question: str | None) -> str:
    return f"{key} of {os.path.basename(image or '')} {question or ''}"


def write_submission(path: Path, task: Task, records: "Sequence[Record]", outputs: Sequence[Any]) -> None:
    """Write official results, ids of the type that the records have; an image that could not be read has output ""."""
    id_name, output_name = task.result_names
    rows = [
        {id_name: task.identify(record), output_name: "" if output is None else output}
        for record, output in zip(records, outputs, strict=True)
    ]
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(rows))


def _read_results(path: Path, task: Task) -> list[Any]:
    if not path.is_file():
        raise ValueError(f"--predictions: there is no file {path}")
    text = path.read_text(errors="replace")
    try:
        content = json.loads(text)
    except ValueError as error:
        try:  # an object a line, as --answers writes them
            content = [json.loads(line) for line in text.splitlines() if line.strip()]
        except ValueError:
            raise ValueError(f"{path} is no JSON ({error}); expected official results or what --json wrote") from None
    rows = content.get("results", [content]) if isinstance(content, dict) else content
    if not isinstance(rows, list) or not rows:
        raise ValueError(f"{path}: expected a list of results, or an object with a list of them under 'results'")
    if isinstance(rows[0], dict) and "adapter" in rows[0]:
        return [{**row["asked"], task.output_field: row["output"]} for row in rows[1:]]
    return rows


def _read_lines(path: Path) -> Iterator[dict[str, Any]]:
    lines = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines[:-1], start=1):  # the last has no end: it is empty, or was cut short
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(
                f"{path}, line {number}: expected a JSON object; delete the file or give another --answers"
            )
        yield row


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row).encode() + b"\n"
