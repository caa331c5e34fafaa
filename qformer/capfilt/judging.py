"""The captioner and the filter: captions for a batch of images, and how well each fits its image."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch

from qformer.capfilt.captions import Caption, Judged, caption_seed, gather_captions
from qformer.data import Record, clean_caption
from qformer.encoders import Features
from qformer.inference import VisionLanguageModel
from qformer.models import Stage1

PAIRS_AT_ONCE = 256  # captions beside their images in one pass of the matching head


@dataclass(frozen=True)
class Method:
    """How captions are written and judged.

    Args:
        per_image: captions written for each image.
        top_p: of the nucleus that they are sampled from.
        num_beams: beams in place of sampling; None = sample.
        seed: with an image's id and a caption's number it decides what is sampled.
        threshold: a caption is kept from this probability of the matching head on.
        cleaning: how a caption is written before it is matched, as `data.cleaning`.

    Raises: ValueError when a value is outside its range.
    """

    per_image: int = 1
    top_p: float = 0.9
    num_beams: int | None = None
    seed: int = 0
    threshold: float = 0.5
    cleaning: str = "blip"

    def __post_init__(self) -> None:
        for name, value, fits, expected in (
            ("--captions", self.per_image, self.per_image >= 1, "1 or more"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--seed", self.seed, self.seed >= 0, "0 or more"),
            ("--threshold", self.threshold, 0 <= self.threshold <= 1, "a probability, 0 to 1"),
            ("--num-beams", self.num_beams, (self.num_beams or self.per_image) >= self.per_image,
             f"at least --captions {self.per_image}: a search keeps one text a beam"),
        ):  # fmt: skip
            if not fits:
                raise ValueError(f"{name} {value}: expected {expected}")


class Captioner:
    """Stage 2's adapter as a writer of captions.

    Raises: ValueError when the adapter is of another stage.
    """

    def __init__(self, model: VisionLanguageModel, method: Method):
        if model.model.name != "stage2":
            raise ValueError(
                f"--captioner takes an adapter of stage 2, with a language model; this one is of {model.model.name}"
            )
        self.model, self.method = model, method

    def write(self, features: Features, image_ids: Sequence[str]) -> list[list[str]]:
        """The captions of each image, features float[B, N, Dv]."""
        each = self.method.per_image
        if self.method.num_beams is None:
            seeds = [caption_seed(self.method.seed, name, number) for name in image_ids for number in range(each)]
            settings: dict[str, Any] = {"do_sample": True, "top_p": self.method.top_p, "num_beams": 1, "seeds": seeds}
        else:
            settings = {"num_beams": self.method.num_beams}
        texts = self.model.caption(features, num_return=each, **settings)
        return [texts[first : first + each] for first in range(0, len(texts), each)]


class Filter:
    """Stage 1's adapter as a judge of captions.

    Raises: ValueError when the adapter is of another stage, or its matching head learnt nothing.
    """

    def __init__(self, model: VisionLanguageModel, method: Method):
        if model.model.name != "stage1":
            raise ValueError(
                f"--filter takes an adapter of stage 1, with a matching head; this one is of {model.model.name}"
            )
        self.stage = cast(Stage1, model.model)
        if "itm" not in self.stage.adapter.weights:
            raise ValueError(
                "--filter: this adapter was trained with stage1.itm=0, so its matching head learnt nothing"
            )
        self.model, self.method = model, method

    @torch.no_grad()
    def judge(self, features: Features, captions: Sequence[Sequence[Caption]]) -> None:
        """Score the captions of each image, features float[B, N, Dv], and drop those below the threshold."""
        adapter, contrasts = self.stage.adapter, "itc" in self.stage.adapter.weights
        pairs = [(row, caption) for row, texts in enumerate(captions) for caption in texts if caption.why != "empty"]
        memory = adapter.project_images(*features)
        queries = adapter.embed_queries(adapter.qformer.query_pass(memory).output) if contrasts else None
        for first in range(0, len(pairs), PAIRS_AT_ONCE):
            group = pairs[first : first + PAIRS_AT_ONCE]
            rows = torch.tensor([row for row, _ in group], device=self.model.device)
            text = self.stage.tokenize([clean_caption(c.text, cleaning=self.method.cleaning) for _, c in group])
            itm = adapter.match([memory.select(rows)], *text).softmax(1)[:, 1].tolist()
            itc: list[float | None] = [None] * len(group)
            if queries is not None:
                itc = (queries[rows] @ adapter.embed_text(text)[:, :, None]).amax((1, 2)).tolist()
            for (_, caption), probability, cosine in zip(group, itm, itc, strict=True):
                caption.itm, caption.itc = round(probability, 6), None if cosine is None else round(cosine, 6)
                if caption.why is None and probability < self.method.threshold:
                    caption.why = f"itm below {self.method.threshold:g}"


@dataclass(frozen=True)
class Bootstrap:
    """A captioner, a filter or both; with both of one frozen encoder, every image is encoded once.

    Raises: ValueError when there is neither.
    """

    captioner: Captioner | None
    filter: Filter | None
    method: Method

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError("give --captioner, --filter or both")

    @property
    def models(self) -> list[VisionLanguageModel]:
        """Those whose encoder reads the images: the filter's may be the captioner's."""
        both = [part.model for part in (self.captioner, self.filter) if part is not None]
        frozen = [model.config.encoder for model in both if model.config.tune.encoder == "no"]
        return both[:1] if len(frozen) == 2 and frozen[0] == frozen[1] else both

    def judge(self, records: Sequence[tuple[int, Record]], images: Sequence[Sequence[Any]]) -> list[Judged]:
        """The captions of numbered records, with an image for each of `models` as its `read` returns it."""
        features = [model.encode([views[n] for views in images]) for n, model in enumerate(self.models)]
        written: list[list[str]] = [[] for _ in records]
        if self.captioner is not None:
            written = self.captioner.write(features[0], [record.image_id for _, record in records])
        captions = [
            gather_captions(record, texts, self.method.cleaning)
            for (_, record), texts in zip(records, written, strict=True)
        ]
        if self.filter is not None:
            self.filter.judge(features[-1], captions)
        return [
            Judged(number, record.image, record.image_id, texts)
            for (number, record), texts in zip(records, captions, strict=True)
        ]
