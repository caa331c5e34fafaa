"""Image folders: images or clips with a metadata file, as `datasets` has them, or each with a .txt or .json of its name."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from qformer.data.records import Identity, Record, Table, is_clip
from qformer.data.rows import METADATA, open_metadata
from qformer.data.tars import PICTURES, VIDEOS, record_of_files
from qformer.messages import one_line

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

TEXTS = (".txt", ".json")
MAC = "._"  # what macOS leaves beside a file on other disks


class Folder:
    """Pictures of a folder, each beside its text; what is in memory is the list of their names."""

    def __init__(self, source: str, images: pyarrow.Array, base: str):
        self.source = source
        self._base = base
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def read(self, row: int) -> Record:
        """The record of a row; its `problem` says what could not be read."""
        path = self._path(row)
        texts: dict[str, bytes] = {}
        for ending in TEXTS:
            try:
                with open(os.path.splitext(path)[0] + ending, "rb") as file:
                    texts[ending[1:]] = file.read()
            except FileNotFoundError:
                continue
            except OSError as error:
                return Record(path, path, problem=f"{type(error).__name__}: {one_line(error)}")
        return record_of_files(path, texts, path, self._base)

    text = read
    several = None

    @property
    def clips(self) -> bool:
        """Whether some of its files are videos."""
        return any(is_clip(os.fsdecode(name)) for name in self._images.to_pylist())

    def identities(self) -> Iterator[tuple[Identity, ...]]:
        """The image of every row."""
        for row in range(len(self)):
            record = self.read(row)
            yield (Identity(record.image, record.image_id),)

    def _path(self, row: int) -> str:
        return os.path.join(self.source, os.fsdecode(self._images[row].as_py()))


def open_folder(folder: str, base: str, key: str) -> Table:
    """Open an image folder by its metadata.jsonl, .csv or .parquet if there is one, else by the texts beside them.

    Raises:
        ValueError: it holds no image with a text, or its metadata are wrong as `read_records` says.
    """
    folder = os.path.abspath(folder)
    for name in METADATA:
        if os.path.isfile(os.path.join(folder, name)):
            return open_metadata(folder, name, base, key)
    import pyarrow

    alone = 0
    chunks = []
    for place, names in _walk(folder):
        there = set(names)
        images = [name for name in names if os.path.splitext(name)[1].lower()[1:] in (*PICTURES, *VIDEOS)]
        kept = [name for name in images if any(os.path.splitext(name)[0] + ending in there for ending in TEXTS)]
        alone += len(images) - len(kept)
        paths = [os.fsencode(os.path.join(place, name) if place != "." else name) for name in kept]
        chunks.append(pyarrow.array(paths, pyarrow.large_binary()))  # names need not be UTF-8
    images = pyarrow.concat_arrays(chunks)
    if len(images) == 0:
        raise ValueError(
            f"{key}: {folder} holds {alone or 'no'} images{' but no text beside them' if alone else ''}; expected "
            f"{', '.join(METADATA)}, or a .txt or .json named as each image"
        )
    if alone:
        logger.warning("%s: %d images of %s have no .txt or .json beside them and are left out", key, alone, folder)
    return Folder(folder, images, base)


def _walk(folder: str) -> Iterator[tuple[str, list[str]]]:
    """The folder and those below it, relative to it, with their files; in an order that does not change."""
    for place, below, names in os.walk(folder):
        below.sort()
        yield os.path.relpath(place, folder), sorted(name for name in names if not name.startswith(MAC))
