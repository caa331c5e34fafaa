"""From records to batches: what is drawn, what replaces a broken record, and how samples become tensors."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from qformer.data.cache import FeatureCache
from qformer.data.captions import MAX_WORDS, Wording
from qformer.data.clips import load_frames
from qformer.data.order import Draw, GlobalBatches
from qformer.data.records import BrokenRecord, Record, Records
from qformer.data.transforms import ImageTransform, load_features, load_image

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 20
# Streams of random numbers that must not meet: (seed, stream, epoch, position, ...)
AUGMENTATION, REPLACEMENT = 1, 2


class Sample(NamedTuple):
    """One record ready for a batch; `dropped` holds the reason of every broken record met on the way to it.

    `image` is float[3, S, S], features are float[N, Dv]; None marks a broken record of an evaluation. Of several images, or
    frames of a clip, `image` is the first and `images` are all; equal `image_keys` are equal images. `text` is what is to be
    written, `prompt` what stands before it, None where the records say nothing of it.
    """

    image: Tensor | None
    text: str
    image_id: str
    answers: tuple[str, ...] = ()
    question: str | None = None
    question_id: str | int | None = None
    question_type: str | None = None
    captions: tuple[str, ...] = ()
    dropped: tuple[str, ...] = ()
    prompt: str | None = None
    images: tuple[Tensor, ...] = ()
    image_keys: tuple[str, ...] = ()


class RecordDataset(Dataset[Sample]):
    """Records as samples: for training indexed by `Draw`, for evaluation (`in_order`) by plain int.

    In training, crop, flip, text and prompt are a function of (seed, epoch, position) only. A broken
    record is replaced by another whose index is a function of (seed, epoch, position, attempt), so a rank always gets
    as many samples as it asked for, and resuming is exact. In evaluation nothing is random: the first caption is the
    text, and a broken record is a sample without image. Each broken record is logged once a process.

    Args:
        transform: None where the records name precomputed features.
        augment: random crop and flip; images in training only.
        text: what becomes `Sample.text`: `Wording.text`, written by `cleaning` and `max_words`; or a `Wording` for each
            source of the records.
        features: a cache that stands in for the records' images; `augment` then draws one of its crops.
        width: of the feature files that records name; one of another width is a broken record. None = any.

    Raises:
        ValueError: an unknown text, a negative seed, not one wording for each source; on access in training, if 20 attempts in a row met broken records.
    """

    def __init__(
        self,
        records: Records | Sequence[Record],
        transform: ImageTransform | None,
        *,
        seed: int,
        augment: bool,
        text: str | Sequence[Wording],
        cleaning: str = "blip",
        max_words: int = MAX_WORDS,
        in_order: bool = False,
        features: FeatureCache | None = None,
        width: int | None = None,
    ):
        if seed < 0:
            raise ValueError(f"seed={seed}: expected 0 or more")
        assert not (in_order and augment), "an evaluation is not augmented"
        self.records = records
        self.transform = transform
        self.seed = seed
        self.augment = augment
        named = [Wording(text, cleaning=cleaning, max_words=max_words)] if isinstance(text, str) else list(text)
        self.wordings = named * len(self.sizes) if isinstance(text, str) else named
        if len(self.wordings) != len(self.sizes):
            raise ValueError(f"text: {len(named)} wordings for {len(self.sizes)} sources; expected one for each")
        self.width = width
        self.in_order = in_order
        self.features = features
        self._warned: set[str] = set()

    def __len__(self) -> int:
        return len(self.records)

    @property
    def sizes(self) -> list[int]:
        """Records of each source."""
        return self.records.sizes if isinstance(self.records, Records) else [len(self.records)]

    @property
    def most_images(self) -> int:
        """How many images or frames a record surely has, at the most; clips among several images count as one each."""
        if not isinstance(self.records, Records):
            return max(len(record.each_image()) for record in self.records)
        stored = (self.features.manifest.transform or {}) if self.features else {}
        frames = self.transform.frames if self.transform else int(stored.get("frames", 1))
        return max(self.records.most_images, frames if self.records.clips else 1)

    def __getitem__(self, index: Draw | int) -> Sample:
        if isinstance(index, Draw):
            assert not self.in_order, "a dataset in order is indexed by int"
            return self._draw(index)
        assert self.in_order, "a training dataset is indexed by Draw"
        try:
            return self._sample(index, None)
        except BrokenRecord as broken:
            self._warn(broken)
            return _describe(self.records[index], None, "", dropped=(str(broken),))

    def _draw(self, draw: Draw) -> Sample:
        dropped: list[str] = []
        index = draw.index
        while len(dropped) < MAX_ATTEMPTS:
            rng = np.random.default_rng([self.seed, AUGMENTATION, draw.epoch, draw.position])
            try:
                return self._sample(index, rng)._replace(dropped=tuple(dropped))
            except BrokenRecord as broken:
                self._warn(broken)
                dropped.append(str(broken))
            entropy = [self.seed, REPLACEMENT, draw.epoch, draw.position, len(dropped)]
            index = int(np.random.default_rng(entropy).integers(len(self.records)))
        raise ValueError(f"{MAX_ATTEMPTS} records in a row are broken, the last: {dropped[-1]}; check the data")

    def _sample(self, index: int, rng: np.random.Generator | None) -> Sample:
        record = self.records[index]
        record.require_sound()
        source = self.records.source_of(index) if isinstance(self.records, Records) else 0
        prompt, text = self.wordings[source].choose(record, rng)
        draw = rng if self.augment else None
        images: list[Tensor] = []
        keys: list[str] = []
        for one in record.each_image():
            frames = self._read_image(one, draw)
            images += frames
            keys += [f"{one.image_id}#{n}" for n in range(len(frames))]
        sample = _describe(record, images[0], text, prompt=prompt)
        keys = [] if draw is not None else keys  # every draw is another image
        return sample._replace(images=tuple(images) if len(images) > 1 else (), image_keys=tuple(keys))

    def _read_image(self, record: Record, draw: np.random.Generator | None) -> list[Tensor]:
        """The image of a record of one, or the frames of its clip, or the features of either."""
        if self.features is None:
            return frames_of(load_input(record, self.transform, [draw], self.width)[0])
        crops, image_id = self.features.manifest.views - 1, self.features.id_of(record)
        tokens = self.features.read(image_id, 0 if draw is None or not crops else 1 + int(draw.integers(crops)))
        if not tokens.isfinite().all():
            raise BrokenRecord(record.image, "its cached features have values that are NaN or infinite")
        count = self.features.manifest.features["num_tokens"]
        return list(tokens.split(count)) if record.clip and count else [tokens]

    def _warn(self, broken: BrokenRecord) -> None:
        if broken.image not in self._warned:
            self._warned.add(broken.image)
            logger.warning("broken record %s", broken)


def load_input(
    record: Record,
    transform: ImageTransform | None,
    draws: Sequence[np.random.Generator | None],
    width: int | None = None,
) -> list[Tensor]:
    """A record of one image as an encoder takes it, once for each of `draws` (None = the whole image).

    Pixels are float[3, S, S], of a clip float[n, 3, S, S]; without a transform the features float[N, Dv] of its file, once.

    Raises: BrokenRecord when it cannot be read, has features of another width, or holds bytes where a feature file is expected.
    """
    record.require_sound()
    if transform is not None and record.clip:
        frames = load_frames(record, transform.frames, transform.frame_policy, max_pixels=transform.max_pixels)
        return [transform.apply_to_clip(frames, draw) for draw in draws]
    if transform is not None:
        image = load_image(record, transform.max_pixels)
        return [transform.apply(image, draw) for draw in draws]
    if record.image_bytes is not None:
        raise BrokenRecord(record.image, "the record holds bytes; expected the path of a feature file")
    return [load_features(record.image, width)]


def frames_of(image: Tensor) -> list[Tensor]:
    """The frames float[3, S, S] of a clip float[n, 3, S, S]; an image or features by themselves."""
    return list(image) if image.ndim == 4 else [image]


def _describe(
    record: Record, image: Tensor | None, text: str, *, prompt: str | None = None, dropped: tuple[str, ...] = ()
) -> Sample:  # fmt: skip
    return Sample(
        image=image,
        text=text,
        image_id=record.image_id,
        answers=record.answers,
        question=record.question,
        question_id=record.question_id,
        question_type=record.question_type,
        captions=record.captions,
        dropped=dropped,
        prompt=prompt,
    )


@dataclass(frozen=True)
class Batch:
    """Samples side by side; `len(batch)` may be 0 in an evaluation, where broken records are only in `dropped`.

    Args:
        images: float[I, 3, S, S] for images, float[I, N, Dv] padded with zeros for features; each different one once.
        image_mask: bool[I, N], True at features; None for images.
        image_of: int64[B, K], the images of each sample in their order, -1 where it has fewer than K; None where each
            has one, its own: then I = B.
        dropped: one reason for each broken record met.
        prompts: what stands before each text, None where the records say nothing of it; empty = None for all.
    """

    images: Tensor
    image_mask: Tensor | None
    texts: list[str]
    image_ids: list[str]
    answers: list[tuple[str, ...]]
    questions: list[str | None]
    question_ids: list[str | int | None]
    question_types: list[str | None]
    captions: list[tuple[str, ...]]
    dropped: list[str]
    prompts: list[str | None] = field(default_factory=list)
    image_of: Tensor | None = None

    def __len__(self) -> int:
        return len(self.texts)

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Batch:
        """Return the batch with its tensors on `device`."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Return the batch with its tensors in page-locked memory; the DataLoader calls it."""
        return self._map(Tensor.pin_memory)

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        optional = {name: getattr(self, name) for name in ("image_mask", "image_of")}
        changed: dict[str, Any] = {
            name: None if tensor is None else change(tensor) for name, tensor in optional.items()
        }
        return replace(self, images=change(self.images), **changed)

    def first(self, count: int) -> Batch:
        """The first samples."""
        lists: dict[str, Any] = {
            f.name: value[:count] for f in fields(self) if isinstance(value := getattr(self, f.name), list)
        }
        if self.image_of is not None:  # their images may be anywhere
            return replace(self, **lists, image_of=self.image_of[:count])
        mask = None if self.image_mask is None else self.image_mask[:count]
        return replace(self, **lists, images=self.images[:count], image_mask=mask)


def collate(samples: list[Sample]) -> Batch:
    """Stack images or pad features, each different one once; samples without an image leave only their reasons.

    Raises:
        ValueError: features of different widths.
    """
    kept = [sample for sample in samples if sample.image is not None]
    images: list[Tensor] = [sample.image for sample in kept if sample.image is not None]
    image_of = None
    if any(sample.images for sample in kept):
        rows = [(s.images or (i,), s.image_keys) for s, i in zip(kept, images, strict=True)]
        images, image_of = index_images(rows)
    stacked, mask = _stack(images)
    return Batch(
        images=stacked,
        image_mask=mask,
        texts=[sample.text for sample in kept],
        image_ids=[sample.image_id for sample in kept],
        answers=[sample.answers for sample in kept],
        questions=[sample.question for sample in kept],
        question_ids=[sample.question_id for sample in kept],
        question_types=[sample.question_type for sample in kept],
        captions=[sample.captions for sample in kept],
        dropped=[reason for sample in samples for reason in sample.dropped],
        prompts=[sample.prompt for sample in kept],
        image_of=image_of,
    )


def index_images(rows: Sequence[tuple[Sequence[Tensor], Sequence[Any]]]) -> tuple[list[Tensor], Tensor]:
    """The different images of all rows, and which of them stand in each row: int64[R, K], -1 where it has fewer than K.

    Args:
        rows: the images of each row and their keys, equal for equal images; without keys all are different.
    """
    place: dict[Any, int] = {}
    different: list[Tensor] = []
    image_of = torch.full((len(rows), max(len(images) for images, _ in rows)), -1)
    for row, (images, keys) in enumerate(rows):
        for k, image in enumerate(images):
            key = keys[k] if keys else (row, k)
            if key not in place:
                place[key] = len(different)
                different.append(image)
            image_of[row, k] = place[key]
    return different, image_of


def _stack(images: list[Tensor]) -> tuple[Tensor, Tensor | None]:
    if not images:
        return torch.empty(0), None
    if images[0].ndim == 3:
        return torch.stack(images), None
    widths = sorted({image.shape[1] for image in images})
    if len(widths) > 1:
        raise ValueError(f"features of widths {widths} in one batch; expected one width Dv, from one encoder")
    lengths = torch.tensor([len(image) for image in images])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    return torch.nn.utils.rnn.pad_sequence(images, batch_first=True), mask


def training_loader(dataset: RecordDataset, batches: GlobalBatches, workers: int) -> DataLoader[Sample]:
    """Return the endless loader of one rank's micro-batches (`Batch`), from `batches.first` on.

    To resume, build it anew with another `first`; it neither reads nor moves torch's global random state.
    """
    assert not dataset.in_order
    return _loader(dataset, workers, batch_sampler=batches)


def evaluation_loader(
    dataset: RecordDataset,
    batch_size: int,
    workers: int,
    *,
    rank: int = 0,
    world_size: int = 1,
    limit: int | None = None,
) -> DataLoader[Sample]:
    """Return the loader of records rank, rank + W, ... of the first `limit`; ranks may differ by one batch."""
    assert dataset.in_order
    assert 0 <= rank < world_size, (rank, world_size)
    count = len(dataset) if limit is None else min(limit, len(dataset))
    return _loader(dataset, workers, sampler=range(rank, count, world_size), batch_size=batch_size)


def _loader(dataset: RecordDataset, workers: int, **batching) -> DataLoader[Sample]:
    return DataLoader(
        dataset,
        num_workers=workers,
        collate_fn=collate,
        pin_memory=torch.cuda.is_available(),
        persistent_workers=workers > 0,
        prefetch_factor=4 if workers > 0 else None,
        worker_init_fn=start_worker,
        generator=torch.Generator(),  # otherwise each iterator draws its seed from the global one
        **batching,
    )


def start_worker(worker: int) -> None:
    """What every process that reads does first: one thread, Ctrl-C left to the main process, and no life after it."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the main process's to handle: it saves, then ends us
    if multiprocessing.get_start_method() != "fork":  # torch looks at the parent, which then is a server that lives on
        threading.Thread(target=_end_with, args=(multiprocessing.parent_process(),), daemon=True).start()


def _end_with(main: multiprocessing.process.BaseProcess | None) -> None:
    assert main is not None
    main.join()
    os._exit(1)
