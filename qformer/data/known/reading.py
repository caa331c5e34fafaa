"""Published files as they were downloaded: JSON of gigabytes one item at a time, JSON lines, also inside their zips."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TextIO, TypeAlias

from qformer.messages import one_line

File: TypeAlias = Path | zipfile.Path
CHUNK_CHARACTERS = 1 << 20
_SPACE = " \t\r\n"
_AFTER_A_VALUE = frozenset(",:]}" + _SPACE)


def stream_json(file: File) -> Iterator[tuple[str, Any]]:
    """The items of a JSON file as (top-level key, item), with one item in memory at a time.

    A list under a top-level key is handed out item by item, any other value whole; the items of a file that is one list
    have key "". Of JSON lines the first object is handed out.

    Raises: ValueError naming the file where it is no JSON.
    """
    with _opened(file) as text:
        try:
            yield from _Scanner(text).entries()
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file} is no JSON, or was cut short: {one_line(error)}; download it again") from error


def json_lines(file: File) -> Iterator[dict[str, Any]]:
    """The objects of a file that has one on each line.

    Raises: ValueError naming the file and line where there is none.
    """
    with _opened(file) as text:
        for number, line in enumerate(text, start=1):
            if line.strip():
                try:
                    yield json.loads(line)
                except ValueError as error:
                    raise ValueError(f"{file}, line {number}: expected a JSON object: {one_line(error)}") from error


def text_lines(file: File) -> Iterator[str]:
    """The lines of a text file that are not empty, without their ends."""
    with _opened(file) as text:
        yield from (line.rstrip("\r\n") for line in text if line.strip())


def look_for(patterns: Sequence[str], folder: Path) -> list[File]:
    """The files of these names in a folder, in the folders directly in it, and in the zips there; each name once."""
    files: dict[str, File] = {}
    for pattern in patterns:
        for path in [*sorted(folder.glob(pattern)), *sorted(folder.glob(f"*/{pattern}"))]:
            files.setdefault(path.name, path)
    for archive in sorted(folder.glob("*.zip")):
        with zipfile.ZipFile(archive) as members:
            names = [n for n in members.namelist() if any(Path(n).match(pattern) for pattern in patterns)]
        for name in sorted(n for n in names if not n.startswith("__MACOSX")):
            files.setdefault(Path(name).name, zipfile.Path(archive, name))
    return list(files.values())


def _opened(file: File) -> TextIO:
    if isinstance(file, Path):
        return file.open(encoding="utf-8-sig")
    return file.open("r", encoding="utf-8-sig")  # type: ignore[return-value]


class _Scanner:
    """A window over a text that moves on value by value; `json` reads each value, in C."""

    def __init__(self, text: TextIO):
        self.text, self.window, self.at = text, "", 0
        self.decoder = json.JSONDecoder()

    def entries(self) -> Iterator[tuple[str, Any]]:
        if self._next() == "[":
            yield from (("", item) for item in self._items())
            return
        self._expect("{")
        while self._next() != "}":
            key = self._value()
            self._expect(":")
            if self._next() == "[":
                yield from ((key, item) for item in self._items())
            else:
                yield key, self._value()
            if self._next() != "}":
                self._expect(",")

    def _items(self) -> Iterator[Any]:
        self._expect("[")
        while self._next() != "]":
            yield self._value()
            if self._next() != "]":
                self._expect(",")
        self.at += 1

    def _next(self) -> str:
        """The next character that is no space; it is not taken."""
        while True:
            while self.at < len(self.window):
                if self.window[self.at] not in _SPACE:
                    return self.window[self.at]
                self.at += 1
            if not self._more():
                raise json.JSONDecodeError("the text ends early", self.window, self.at)

    def _expect(self, character: str) -> None:
        if self._next() != character:
            raise json.JSONDecodeError(f"expected {character!r}", self.window, self.at)
        self.at += 1

    def _value(self) -> Any:
        self._next()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.window, self.at)
                if self.window[end : end + 1] in _AFTER_A_VALUE:  # else a number may go on
                    self.at = end
                    return value
            except json.JSONDecodeError:
                if not self._more():
                    raise
                continue
            if not self._more():
                self.at = end
                return value

    def _more(self) -> bool:
        """Read as much again as the value so far is long, so that long values cost no square of their length."""
        self.window = self.window[self.at :]
        self.at = 0
        more = self.text.read(max(CHUNK_CHARACTERS, len(self.window)))
        self.window += more
        return bool(more)
