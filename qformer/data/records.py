"""One schema for all data, and the records of several sources as one sequence.

    {"image": "train/0001.jpg", "caption": "a dog on a beach"}
    {"image": "train/0001.jpg", "caption": ["a dog on a beach", "a dog runs"], "image_id": "17"}
    {"image": "train/0002.jpg", "question": "what is it?", "answers": ["a dog", "dog"], "question_id": "3"}
    {"images": ["left.jpg", "right.jpg"], "question": "are both dogs?", "answers": ["yes"]}
    {"image": "clip.mp4", "question": "what does the dog do?", "answers": ["it runs"]}

Nothing here opens an image: a record is checked for its form when it is read and for its content when it is used.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import numpy as np

IMAGE_FIELDS = ("image", "images", "video")  # a record has one of them
FIELDS = (
    *IMAGE_FIELDS, "caption", "question", "answers", "choices", "image_id", "question_id", "question_type",
    "answer_type", "split", "origin",
)  # fmt: skip
CLIPS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".m4v", ".mpg", ".mpeg")  # by these endings a file is a video
LIST_AS_TEXT = re.compile(r'\[\s*"')  # `datasets` turns a list that follows megabytes of strings into its JSON text


class Identity(NamedTuple):
    """What tells an image from others, without its text."""

    name: str
    image_id: str
    content: bytes | None = None  # None for a file
    clip: bool = False  # a video


class BrokenRecord(ValueError):
    """A record whose image, features or text cannot be used; `reason` says why, `image` which."""

    def __init__(self, image: str, reason: str):
        super().__init__(image, reason)
        self.image = image
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.image}: {self.reason}"


@dataclass(frozen=True)
class Record:
    """One image (or clip, or feature file), or several, and the text that belongs to it.

    Args:
        image: absolute path, or "SOURCE#ROW" where the image travels inside the source (`image_bytes`); the first of
            several.
        image_id: equal for records of the same image; by default the path, relative to the folder that all sources lie
            in (so that ids move with it), or a hash of the bytes; of several, their ids in a row.
        question_id: of the type that the source has: servers want their numbers back.
        problem: why the source could not give this record.
        answer_type: of VQA v2: yes/no, number or other.
        split: as the source names it.
        number_id: the source has `image_id` as a number, as COCO does.
        choices: of a question with several to choose from, in their order; `answers` is then the text of the right one.
        clip: the image is a video.
        images: all of several images, in their order; () for one.
        origins: of each caption, "web" or "synthetic", where the records came out of CapFilt.
    """

    image: str
    image_id: str
    captions: tuple[str, ...] = ()
    question: str | None = None
    answers: tuple[str, ...] = ()
    question_id: str | int | None = None
    question_type: str | None = None
    image_bytes: bytes | None = field(default=None, repr=False)
    problem: str | None = None
    answer_type: str | None = None
    split: str | None = None
    number_id: bool = field(default=False, compare=False)
    choices: tuple[str, ...] = ()
    origins: tuple[str, ...] = ()
    clip: bool = False
    images: tuple[Identity, ...] = field(default=(), repr=False)

    def each_image(self) -> list[Record]:
        """A record for each image by itself, under that image's own image_id."""
        return [
            replace(self, image=name, image_id=image_id, image_bytes=content, clip=clip, images=())
            for name, image_id, content, clip in self.images
        ] or [self]

    @property
    def names(self) -> str | list[str]:
        """The name of the image, or those of several."""
        return [image.name for image in self.images] or self.image

    def without_bytes(self) -> Record:
        """The record without the images that travel inside its source."""
        images = tuple(image._replace(content=None) for image in self.images)
        return replace(self, image_bytes=None, images=images)

    def require_sound(self) -> None:
        """Raise BrokenRecord when the source could not give this record."""
        if self.problem is not None:
            raise BrokenRecord(self.image, self.problem)


class Table(Protocol):
    """The records of one source, in an order that does not change; it goes to the workers by pickle."""

    @property
    def source(self) -> str: ...

    @property
    def several(self) -> tuple[int, int] | None:
        """The row that names the most images and how many those are, None where none names more than one."""
        ...

    @property
    def clips(self) -> bool:
        """Whether some row may name a video."""
        ...

    def __len__(self) -> int: ...

    def read(self, row: int) -> Record:
        """The record of a row; one that the source cannot give has a `problem`."""
        ...

    def text(self, row: int) -> Record:
        """As `read`, but the image need not be there; its id may then be another."""
        ...

    def identities(self) -> Iterator[tuple[Identity, ...]]:
        """The images of every row, in order."""
        ...


class Records:
    """A map-style sequence of `Record`s of one or more tables; `read_records` makes it."""

    def __init__(self, tables: list[Table]):
        self._tables = tables
        self.sizes = [len(table) for table in tables]
        self._ends = np.cumsum(self.sizes)

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> Record:
        table, row = self._place(index)
        return table.read(row)

    def source_of(self, index: int) -> int:
        """The number of the source that a record is from."""
        return int(np.searchsorted(self._ends, index + len(self) if index < 0 else index, side="right"))

    def _place(self, index: int) -> tuple[Table, int]:
        position = index + len(self) if index < 0 else index
        if not 0 <= position < len(self):
            raise IndexError(f"record {index} of {len(self)}")
        number = self.source_of(position)
        return self._tables[number], int(position - (self._ends[number - 1] if number else 0))

    def text(self, index: int) -> Record:
        """The record without the bytes of its image, so that all of them fit in memory."""
        table, row = self._place(index)
        return table.text(row).without_bytes()

    @property
    def clips(self) -> bool:
        """Whether some record may name a video."""
        return any(table.clips for table in self._tables)

    def require_single(self, why: str) -> None:
        """Raises: ValueError when a record names more than one image."""
        for table in self._tables:
            if table.several is not None:
                raise ValueError(f"{table.source}: record {table.several[0]} (from 0) names several images; {why}")

    @property
    def most_images(self) -> int:
        """How many images the record names that names the most."""
        return max(table.several[1] if table.several else 1 for table in self._tables)

    def first_of_each_picture(self) -> dict[str, int]:
        """The first record of every image's `image_id`, in order; reads the images that travel inside the sources.

        Raises:
            ValueError: records of one image_id name different files.
        """
        firsts: dict[str, tuple[int, str]] = {}
        index = 0
        for table in self._tables:
            for images in table.identities():
                for name, image_id, content, _ in images:
                    _, first = firsts.setdefault(image_id, (index, name))
                    if content is None and first != name:
                        raise ValueError(
                            f"{table.source}: image_id {image_id!r} is that of {first} and of {name}; "
                            "give every image its own, or leave image_id out"
                        )
                index += 1
        return {image_id: first for image_id, (first, _) in firsts.items()}


def distinct_captions(records: Records | Sequence[Record], sample: int = 1024) -> tuple[int, int]:
    """How many different first captions a sample of records holds, and how many records it looked at, evenly spread.

    Far fewer than records are class labels or the like: equal texts are no negatives of each other.
    """
    rows = range(0, len(records), max(1, len(records) // sample))
    captions = [
        " ".join(record.captions[0].lower().split())
        for i in rows
        if (record := records.text(i) if isinstance(records, Records) else records[i]).captions
    ]
    return len(set(captions)), len(captions)


def identify(name: str, content: bytes | None, image_id: Any, base: str = "") -> Identity:
    """The identity of a file (`name` is its path), or of an image inside a source, where names need not be unique.

    Args:
        base: the folder that ids of files are relative to; files outside keep their whole path.
    """
    if image_id is None and content is not None:
        image_id = hashlib.blake2b(content, digest_size=16).hexdigest()
    elif image_id is None:
        image_id = name.removeprefix(os.path.join(base, "")) if base else name
    return Identity(name, str(image_id), content, is_clip(name))


def is_clip(name: str) -> bool:
    """Whether a file is a video, by its ending."""
    return os.path.splitext(name)[1].lower() in CLIPS


def build_record(images: Sequence[Identity], fields: Mapping[str, Any]) -> Record:
    """The record of its images and the schema's fields; its `problem` names a field that is of another type."""
    identity, several = images[0], tuple(images) if len(images) > 1 else ()
    if several:
        image_id = fields.get("image_id")
        whole = " ".join(image.image_id for image in images) if image_id is None else str(image_id)
        identity = Identity(identity.name, whole)
    try:
        captions = tuple(text for text in texts_of("caption", fields.get("caption")) if text)
        answers = texts_of("answers", fields.get("answers"))  # an empty one counts
        choices = texts_of("choices", fields.get("choices"))
        origins = texts_of("origin", fields.get("origin"))
    except ValueError as error:
        return Record(identity.name, identity.image_id, problem=str(error))
    return Record(
        image=identity.name,
        image_id=identity.image_id,
        captions=captions,
        question=fields.get("question"),
        answers=answers,
        question_id=fields.get("question_id"),
        question_type=_string(fields.get("question_type")),
        image_bytes=identity.content,
        answer_type=_string(fields.get("answer_type")),
        split=_string(fields.get("split")),
        number_id=isinstance(fields.get("image_id"), int),
        choices=choices,
        clip=identity.clip,
        images=several,
        origins=origins,
    )


def _string(value: Any) -> str | None:
    return None if value is None else str(value)


def texts_of(name: str, value: Any) -> tuple[str, ...]:
    """The texts of a field that holds one or a list of them, or of VQA's official {"answer": text, ...}.

    Raises: ValueError when it holds something else.
    """
    if isinstance(value, str) and LIST_AS_TEXT.match(value):
        with contextlib.suppress(ValueError):  # a text that begins so
            value = json.loads(value)
    if value is None or value == "":
        return ()
    values = value if isinstance(value, list) else [value]
    texts = [entry.get("answer") if isinstance(entry, dict) else entry for entry in values]
    odd = next((text for text in texts if not isinstance(text, str | None)), None)
    if odd is not None:
        raise ValueError(f"its {name!r} holds {type(odd).__name__}; expected a text or a list of texts")
    return tuple(text for text in texts if text is not None)
