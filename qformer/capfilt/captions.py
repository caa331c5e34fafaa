"""The captions of one image with what decided about them, and what of it goes into records."""

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from qformer.data import Record, clean_caption

WEB, SYNTHETIC = "web", "synthetic"


@dataclass
class Caption:
    """A caption of an image, and whether it is kept.

    Args:
        origin: "web" or "synthetic".
        itm: probability that it matches its image, by the filter's matching head; None without a filter.
        itc: cosine of its embedding and the nearest query's; None without a filter, or one that learnt no contrast.
        why: why it was dropped; None = it is kept.
    """

    text: str
    origin: str
    itm: float | None = None
    itc: float | None = None
    why: str | None = None


@dataclass
class Judged:
    """An image and all of its captions, as a line of the score files holds them.

    Args:
        record: its number among the records, from 0.
        problem: why its image cannot be used; it then has no captions.
    """

    record: int
    image: str
    image_id: str
    captions: list[Caption]
    problem: str | None = None

    @property
    def kept(self) -> list[Caption]:
        """The captions that are kept."""
        return [caption for caption in self.captions if caption.why is None]

    def as_json(self) -> dict[str, Any]:
        """What the score files hold."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Judged":
        """What `as_json` wrote."""
        return cls(**values | {"captions": [Caption(**caption) for caption in values["captions"]]})


def gather_captions(record: Record, written: Sequence[str], cleaning: str) -> list[Caption]:
    """A record's captions, then those written for it; of texts that are equal once cleaned the first stays."""
    origins = record.origins if len(record.origins) == len(record.captions) else (WEB,) * len(record.captions)
    captions = [Caption(text, origin) for text, origin in zip(record.captions, origins, strict=True)]
    captions += [Caption(text, SYNTHETIC) for text in written]
    known: set[str] = set()
    for caption in captions:
        text = clean_caption(caption.text, cleaning=cleaning)
        if not text:
            caption.why = "empty"
        elif text in known:
            caption.why = "equal to another of this image"
        known.add(text)
    return captions


def record_of(record: Record, kept: Sequence[Caption]) -> dict[str, Any]:
    """The fields of a record with the captions that are kept, for `data.train`; its image is not among them."""
    fields: dict[str, Any] = {"image_id": int(record.image_id) if record.number_id else record.image_id}
    fields |= {"caption": [caption.text for caption in kept], "origin": [caption.origin for caption in kept]}
    return fields if record.split is None else fields | {"split": record.split}


def caption_seed(seed: int, image_id: str, number: int) -> int:
    """The seed of an image's caption `number`, 64 bits: the same in any shard, batch and order."""
    name = f"{seed} {number} {image_id}".encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(name, digest_size=8).digest(), "big")
