"""WebDataset tars, read record by record in any order: an index says where in its tar each record begins.

    00000.tar: 000000001.jpg 000000001.txt 000000001.json 000000002.jpg ...

Files next to each other whose names are equal up to the first dot are one record: its image or clip, its caption
(.txt) and the schema's other fields (.json, whose "caption" stands in for a missing .txt). Nothing is ever unpacked to a disk.

The index is made once, by reading every tar's headers, and kept with the cache of `datasets`: eight bytes a record, one
file for each tar and one for all, which is mapped into memory. Processes that make it at the same time share the work.
"""

from __future__ import annotations

import codecs
import functools
import hashlib
import io
import json
import logging
import os
import random
import re
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from qformer.data.addresses import Files, find_files
from qformer.data.records import CLIPS, Identity, Record, build_record, identify
from qformer.files import atomic_file
from qformer.messages import one_line

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
PICTURES = ("jpg", "jpeg", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm")
VIDEOS = tuple(ending[1:] for ending in CLIPS)
NAME = re.compile(r"((?:.*/)?[^./]+)\.([^/]+)", re.DOTALL)
SAY_EVERY_S = 30.0
# What a .json may say, and of which type; the rest of it is not read.
TEXTS, IDS = ("caption", "answers", "origin", "choices"), ("image_id", "question_id", "question_type", "answer_type")
BOMS = ((codecs.BOM_UTF8, "utf-8-sig"), (codecs.BOM_UTF16_LE, "utf-16"), (codecs.BOM_UTF16_BE, "utf-16"))
CONTROL = re.compile(r"[\x00-\x08\x0e-\x1f]")
TRIED = 8  # records that are looked at when tars are opened


class Tars:
    """The records of WebDataset tars; a worker reads each with one request.

    Args:
        index: int64[S + n + S]: for each of the S tars the number of records up to its end; then where in the tar each
            of its records begins, and where the last one ends.
    """

    def __init__(self, source: str, files: Files, index: Path):
        self.source = source
        self._files = files
        self._index = index
        self._open()

    def _open(self) -> None:
        mapped = np.load(self._index, mmap_mode="r", allow_pickle=False)
        tars = len(self._files.paths)
        self._ends = np.array(mapped[:tars])
        self._offsets = mapped[tars:]

    def __getstate__(self) -> dict[str, Any]:  # a pickled map would be a copy of the whole index
        return {name: value for name, value in vars(self).items() if name not in ("_ends", "_offsets")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, row: int) -> Record:
        """The record of a row; its `problem` says what could not be read."""
        tar = int(np.searchsorted(self._ends, row, side="right"))
        start, end = self._offsets[row + tar : row + tar + 2].tolist()
        path = self._files.paths[tar]
        try:
            content = self._files.system.cat_file(path, start=start, end=end)
            key, members = read_members(content)
        except Exception as error:  # file systems and damaged bytes raise every kind
            name = f"{path}#byte {start}"
            return Record(name, name, problem=f"{type(error).__name__}: {one_line(error)}")
        return record_of_files(f"{path}#{key}", members)

    text = read
    several = None

    @property
    def clips(self) -> bool:
        """Whether one of the first records is a video."""
        return any(self.read(row).clip for row in range(min(TRIED, len(self))))

    def identities(self) -> Iterator[tuple[Identity, ...]]:
        """The image of every row; all of the tars are read."""
        for row in range(len(self)):
            record = self.read(row)
            yield (Identity(record.image, record.image_id, record.image_bytes or b"", record.clip),)


def record_of_files(name: str, files: dict[str, bytes], image: str | None = None, base: str = "") -> Record:
    """The record that files of one name and several endings make up.

    Args:
        image: path of the image where it is a file by itself; otherwise it is one of `files`.
        base: the folder that image_ids of such paths are relative to.
    """
    ending = next((ending for ending in (*PICTURES, *VIDEOS) if ending in files), "")
    content = files.get(ending)
    try:
        if content is None and image is None:
            raise ValueError(f"it has no image ({', '.join(PICTURES)}), only {', '.join(files) or 'nothing'}")
        values = json.loads(decode_text(files["json"], name)) if "json" in files else {}
        fields = _fields(values)
        if "txt" in files:
            fields["caption"] = [line for line in decode_text(files["txt"], name).splitlines() if line.strip()]
        elif not fields.keys() & {"caption", "question"}:
            raise ValueError(
                f"the record has no caption: no .txt (only {', '.join(files) or 'the image'}), and "
                + (
                    f"its .json has only {', '.join(values) or 'nothing'}; expected caption"
                    if files.get("json")
                    else "no .json"
                )
            )
    except (ValueError, RecursionError) as error:  # of json.loads too
        return Record(name, name, problem=one_line(error))
    identity = identify(image or name, content, fields.get("image_id"), base)
    return build_record([identity._replace(clip=identity.clip or ending in VIDEOS)], fields)


def decode_text(content: bytes, name: str) -> str:
    """The text of a file in UTF-8 or UTF-16 behind a byte-order mark, in UTF-8 without, else in Windows-1252.

    Raises: UnicodeDecodeError (a ValueError) when it is none of them.
    """
    for mark, encoding in BOMS:
        if content.startswith(mark) and len(content) > len(mark):
            return content.decode(encoding)
    try:
        return content.decode()
    except UnicodeDecodeError:
        if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            raise
        text = content.decode("cp1252")
        if CONTROL.search(text):
            raise
        _report_encoding(os.path.dirname(name))
        return text


@functools.lru_cache(maxsize=1)
def _report_encoding(place: str) -> None:
    logger.warning("%s: texts that are not UTF-8 are read as Windows-1252", place)


def _fields(values: Any) -> dict[str, Any]:
    """The schema's fields of a .json."""
    if not isinstance(values, dict):
        raise ValueError(f"its .json holds {type(values).__name__}; expected an object")
    fields = {name: values[name] for name in ("question", *TEXTS, *IDS) if values.get(name) is not None}
    for name, value in fields.items():
        is_text = isinstance(value, str)
        is_texts = isinstance(value, list) and all(isinstance(text, str) for text in value)
        is_number = isinstance(value, (int, float))
        is_official = isinstance(value, list) and all(isinstance(v, dict) and "answer" in v for v in value)
        texts = is_text or is_texts
        fits = {"caption": texts, "origin": texts, "answers": texts or is_official, "question": is_text}
        if not fits.get(name, is_text or is_number):
            raise ValueError(f"{name!r} in its .json is {type(value).__name__}; expected text as in the record schema")
    return fields


def read_members(content: bytes) -> tuple[str, dict[str, bytes]]:
    """Name of a record and its files by ending, out of its part of a tar; links, devices and files with holes are none.

    Raises: tarfile.TarError, ValueError when the part is damaged.
    """
    files: dict[str, bytes] = {}
    key = ""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            if named := _named(member):
                key, ending = named
                files[ending] = tar.extractfile(member).read()  # type: ignore[union-attr]  # it is a file
    return key, files


def _named(member: tarfile.TarInfo) -> tuple[str, str] | None:
    """The key and the ending of a member that belongs to a record."""
    match = NAME.fullmatch(member.name)
    if match is None or not member.isreg() or member.issparse():
        return None
    return match[1], match[2].lower()


def open_tars(source: str, key: str) -> Tars:
    """Find the tars of a path or address and their index, which is made if it is not there.

    Raises:
        ValueError: there is no such tar, one is damaged, compressed or cut short, or they hold no records.
    """
    files = find_files(source, key)
    folder = _index_folder()
    states = files.ask(files.system.ukey, files.paths, key)  # a tar that was changed is indexed anew
    parts = [folder / f"{_name(path, state)}.npy" for path, state in zip(files.paths, states, strict=True)]
    whole = folder / f"{_name(*(part.stem for part in parts))}.npy"
    if not whole.exists():
        _make_parts(files, parts, key)
        offsets = [np.load(part, allow_pickle=False) for part in parts]
        ends = np.cumsum([len(of_part) - 1 for of_part in offsets])
        _save(whole, np.concatenate([ends, *offsets]))
    table = Tars(source, files, whole)
    if len(table) == 0:
        raise ValueError(f"{key}: {source} holds no records; expected files such as 0001.jpg and 0001.txt in its tars")
    problem: str | None = None
    for row in range(min(TRIED, len(table))):
        if (problem := table.read(row).problem) is None:
            break
    if problem is not None and "no caption" in problem:
        raise ValueError(f"{key}: {source}: none of its first records can be used: {problem}")
    return table


def _index_folder() -> Path:
    import datasets

    folder = Path(datasets.config.HF_DATASETS_CACHE) / "qformer_tars"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _name(*parts: str) -> str:
    return hashlib.blake2b("\n".join([str(FORMAT_VERSION), *parts]).encode(), digest_size=16).hexdigest()


def _save(path: Path, array: np.ndarray) -> None:
    with atomic_file(path) as scratch, scratch.open("wb") as file:
        np.save(file, array.astype(np.int64))


def _make_parts(files: Files, parts: list[Path], key: str) -> None:
    """Index the tars that are not yet; each process begins elsewhere and skips what another has done meanwhile."""
    missing = {path: part for path, part in zip(files.paths, parts, strict=True) if not part.exists()}
    own_order = random.Random(os.getpid()).sample(list(missing), len(missing))

    def make(path: str) -> None:
        if not missing[path].exists():
            with files.system.open(path, "rb") as file:
                _save(missing[path], index_tar(file, path, key))

    reported_at = time.monotonic()
    for done, _ in enumerate(files.ask(make, own_order, key), start=len(parts) - len(missing) + 1):
        if time.monotonic() - reported_at > SAY_EVERY_S:
            reported_at = time.monotonic()
            logger.info("%s: %d of %d tars have an index", files.address, done, len(parts))


def index_tar(file: BinaryIO, name: str, key: str = "data") -> np.ndarray:
    """Where each record of a tar begins and where the last one ends, int64[n + 1] in bytes; reads its headers only.

    Raises:
        ValueError: it is no tar, compressed, damaged or cut short.
    """
    starts: list[int] = []
    current, end = None, 0
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members = []  # type: ignore[attr-defined]  # otherwise it remembers all of them
                named = _named(member)
                if named and named[0] != current:
                    current = named[0]
                    starts.append(member.offset)
                end = tar.offset
            file.seek(end)
            left = file.read(tarfile.BLOCKSIZE)
    except (tarfile.TarError, EOFError, OSError, ValueError) as error:
        raise ValueError(
            f"{key}: {name} cannot be read as a tar: {one_line(error)}; "
            "expected a whole one that is not compressed, fetch it again"
        ) from None
    if left.strip(b"\0"):  # tarfile takes a damaged header for the end
        raise ValueError(f"{key}: {name} is damaged at byte {end}, after {len(starts)} records; fetch it again")
    if not left:
        logger.warning("%s: %s ends without the mark of an end; it may have been cut short", key, name)
    return np.array([*starts, end], dtype=np.int64)
