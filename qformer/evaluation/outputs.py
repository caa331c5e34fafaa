"""Outputs on disk: a file that grows while they are computed, official results read and written."""

import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.evaluation.task import Task
from qformer.files import atomic_file

if TYPE_CHECKING:
    from qformer.data import Record


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
                self._compare(path, lines[0])
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
        return {"image": record.image, self.task.id_field: self.task.identify(record), "question": record.question}

    def _row(self, item: tuple[int, Any]) -> bytes:
        index, output = item
        return _line({"record": index, "asked": self._asked(index), "output": output})

    def _compare(self, path: Path, header: dict[str, Any]) -> None:
        for key, value in self.made_of.items():
            if header.get(key) != value:
                raise ValueError(
                    f"{path} was begun with {key} {header.get(key)!r}, not {value!r}; delete it or give another --answers"
                )


def read_predictions(path: Path, task: Task, records: "Sequence[Record]", partly: bool = False) -> list[Any]:
    """One output a record from official results, [{"question_id": 1, "answer": "yes"}, ...], or what --json or --answers wrote.

    Args:
        partly: more outputs than records are expected (`--limit`).

    Raises: ValueError naming ids without a record or without an output, a file that is missing or of another form.
    """
    outputs: dict[str, Any] = {}
    rows = _read_results(path, task)
    for number, row in enumerate(rows):
        if not isinstance(row, dict) or not {task.id_field, task.output_field} <= row.keys():
            raise ValueError(f"{path}: entry {number} (from 0) has no {task.id_field} or no {task.output_field}")
        outputs[str(row[task.id_field])] = row[task.output_field]
    if len(outputs) < len(rows):
        twice, count = Counter(str(row[task.id_field]) for row in rows).most_common(1)[0]
        raise ValueError(f"{path}: {task.id_field} {twice} stands {count} times; expected one {task.output_field} each")
    ids = [task.identify(record) for record in records]
    if None in ids:
        raise ValueError(
            f"{records[ids.index(None)].image}: its record has no {task.id_field}, so nothing is predicted"
        )
    missing = [i for i in ids if str(i) not in outputs]
    extra = [i for i in outputs if i not in set(map(str, ids))] if not partly else []
    for names, what in ((missing, "is missing, which the records have"), (extra, "is of none of the records")):
        if names:
            more = f" (and {len(names) - 1} others)" if len(names) > 1 else ""
            raise ValueError(f"{path}: {task.id_field} {names[0]}{more} {what}; give the predictions of these records")
    return [outputs[str(i)] for i in ids]


def write_submission(path: Path, task: Task, records: "Sequence[Record]", outputs: Sequence[Any]) -> None:
    """Write official results, ids of the type that the records have; an image that could not be read has output ""."""
    rows = [
        {task.id_field: task.identify(record), task.output_field: "" if output is None else output}
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
