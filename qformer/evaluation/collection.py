"""Images and their captions as one collection: numbers for the search, ids for files, recall of what was retrieved."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from qformer.data.captions import clean_caption

KS = (1, 5, 10)  # the list sizes of all papers
LONGEST = max(KS)  # what is written of each list


class Ranked(NamedTuple):
    """What R images or captions retrieved, the best first: their numbers int64[R], lists int64[R, n], scores float[R, n]."""

    rows: np.ndarray
    lists: np.ndarray
    scores: np.ndarray


@dataclass(frozen=True)
class Collection:
    """I images and their T captions, numbered in their order.

    Args:
        image_ids: as official files have them.
        captions: of each image.
    """

    image_ids: Sequence[Any]
    captions: Sequence[Sequence[str]]

    @cached_property
    def image_of(self) -> np.ndarray:
        """int64[T], each caption's image."""
        return np.repeat(np.arange(len(self.captions)), [len(captions) for captions in self.captions])

    @cached_property
    def cleaned(self) -> list[str]:
        """The T captions as the model reads them."""
        return [clean_caption(caption) for captions in self.captions for caption in captions]

    @cached_property
    def texts(self) -> list[str]:
        """The U of them that differ."""
        return list(dict.fromkeys(self.cleaned))

    @cached_property
    def text_of(self) -> np.ndarray:
        """int64[T], each caption's text."""
        number = {text: i for i, text in enumerate(self.texts)}
        return np.array([number[text] for text in self.cleaned], np.int64)

    @cached_property
    def caption_ids(self) -> list[str]:
        """IMAGE_ID#NUMBER, as Flickr's files name captions; the number counts an image's own from 0."""
        return [
            f"{i}#{n}" for i, captions in zip(self.image_ids, self.captions, strict=True) for n in range(len(captions))
        ]

    @cached_property
    def images_of_text(self) -> dict[int, set[int]]:
        """The images that each text stands with."""
        images: dict[int, set[int]] = {}
        for text, image in zip(self.text_of.tolist(), self.image_of.tolist(), strict=True):
            images.setdefault(text, set()).add(image)
        return images

    def repeated(self) -> int:
        """How many captions stand with another image too."""
        return sum(len(self.images_of_text[text]) > 1 for text in self.text_of.tolist())

    def outputs(self, of_images: Ranked, of_texts: Ranked) -> list[dict[str, Any] | None]:
        """Of each image the best captions, and of each of its captions the best images, by their ids; None = left out."""
        rows: list[dict[str, Any] | None] = [None] * len(self.image_ids)
        for image, ids, scores in _named(of_images, self.caption_ids):
            rows[image] = {"captions": ids, "caption_scores": scores, "images": [], "image_scores": []}
        for caption, ids, scores in _named(of_texts, self.image_ids):
            row = rows[self.image_of[caption]]
            assert row is not None, "captions of images that cannot be read take no part"
            row["images"].append(ids)
            row["image_scores"].append(scores)
        return rows

    def recall(self, outputs: Sequence[Mapping[str, Any]], equal: bool = False) -> dict[str, dict[str, float]]:
        """Recall in percent of `outputs` of all images: by direction, then by k.

        Args:
            equal: a caption is right for all images with an equal one, not for its own alone.

        Raises: ValueError when outputs are of another form, or hold ids that the collection has not.
        """
        image = {str(i): number for number, i in enumerate(self.image_ids)}
        caption = {i: number for number, i in enumerate(self.caption_ids)}
        owners = [{number} for number in self.image_of.tolist()]
        if equal:
            owners = [self.images_of_text[text] for text in self.text_of.tolist()]
        first: dict[str, list[int]] = {"image_to_text": [], "text_to_image": []}
        captions = iter(range(len(self.caption_ids)))
        for number, output in enumerate(outputs):
            texts, images = require_form(output, self.image_ids[number], len(self.captions[number]))
            right = [number in owners[_number(caption, i, "caption")] for i in texts]
            first["image_to_text"].append(_first(right))
            for listed in images:
                owning = owners[next(captions)]
                first["text_to_image"].append(_first([_number(image, i, "image") in owning for i in listed]))
        return {
            name: {str(k): 100 * sum(p < k for p in positions) / len(positions) for k in KS}
            for name, positions in first.items()
        }


def require_form(output: Any, image_id: Any, captions: int) -> tuple[list[str], list[list[Any]]]:
    """The lists of an output: captions of the image, images of each of its captions.

    Raises: ValueError when it is of another form.
    """
    texts, images = (output.get("captions"), output.get("images")) if isinstance(output, Mapping) else (None, None)
    if not isinstance(texts, list) or not isinstance(images, list) or not all(isinstance(i, list) for i in images):
        raise ValueError(
            f"image_id {image_id}: expected {{'captions': [caption ids], 'images': [[image ids] of each of its captions]}}"
        )
    if len(images) != captions:
        raise ValueError(
            f"image_id {image_id}: {len(images)} lists of images for its {captions} captions; give one each"
        )
    return texts, images


def _named(ranked: Ranked, ids: Sequence[Any]) -> Any:
    lists, scores = ranked.lists[:, :LONGEST].tolist(), ranked.scores[:, :LONGEST].tolist()
    for row, numbers, values in zip(ranked.rows.tolist(), lists, scores, strict=True):
        yield row, [ids[n] for n in numbers], values


def _number(numbers: Mapping[str, int], name: Any, what: str) -> int:
    if str(name) not in numbers:
        example = next(iter(numbers))
        raise ValueError(f"{what} {name!r} is none of the records'; an id is as {example!r}")
    return numbers[str(name)]


def _first(right: list[bool]) -> int:
    """The position of the first right entry from 0, behind every list where there is none."""
    return right.index(True) if True in right else LONGEST
