"""Writing a feature cache (its layout: cache.py): planned, shared by processes, and taken up again where it stopped."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import DataLoader, Dataset

from qformer import __version__
from qformer.data.cache import (
    DTYPES,
    INDEX,
    MANIFEST,
    QUANTIZED,
    SHARD,
    Manifest,
    TensorFile,
    differences,
    picture_key,
    quantize,
    read_manifest,
    write_manifest,
)
from qformer.data.loading import load_input, start_worker
from qformer.data.records import BrokenRecord, Records
from qformer.data.transforms import ImageTransform
from qformer.files import PARTIAL, atomic_file

logger = logging.getLogger(__name__)

CROPS = 3  # a stream of random numbers beside those of loading.py
MEASURED = 64  # feature files whose length stands for all
MARGIN = 1.02  # of the expected size: headers, and lengths that were only sampled
LIBRARIES = ("torch", "transformers", "open_clip_torch", "timm", "pillow", "safetensors")
Encode = Callable[[Tensor, Tensor | None], tuple[Tensor, Tensor | None]]


class Summary(NamedTuple):
    """What a finished cache holds."""

    pictures: int
    broken: dict[str, str]
    size_bytes: int


class CacheWriter:
    """Writes the features of every image of some records once, under its `image_id`.

    An image's features are a function of the image and the manifest alone: its crops are drawn from (seed, image_id,
    crop), and batches never cross shards. So shards may be written by any process, in any order, now or later, and are
    the same bytes.

    Args:
        folder: of the cache; taken up again if it holds an unfinished one of the same manifest.
        encoder: what identifies the frozen encoder, for the manifest.
        transform: of the images; None where records name feature files.
        num_tokens: None if it varies.
        dtype: float32, bfloat16, float16, or with a scale a token (see `quantize`) int8.
        crops: random crops beside the whole image.
        shard_bytes: size of a shard, about.

    Raises:
        ValueError: the folder holds a cache of another manifest; an image_id names two files; no feature file can be
            read; an unknown dtype; crops of feature files.
    """

    def __init__(
        self, folder: str | Path, records: Records, sources: list[str], *, encoder: Mapping[str, Any],
        transform: ImageTransform | None, width: int, num_tokens: int | None, dtype: str = "bfloat16",
        crops: int = 0, seed: int = 0, shard_bytes: float = 256e6,
    ):  # fmt: skip
        if dtype not in DTYPES:
            raise ValueError(f"dtype={dtype!r}: expected one of {', '.join(DTYPES)}")
        if crops < 0 or (crops and transform is None):
            raise ValueError(f"crops={crops}: expected 0 or more for images, 0 for feature files")
        self.folder, self.transform = Path(folder).expanduser(), transform
        self.records = records
        self.pictures = records.first_of_each_picture()
        clips = transform if transform is not None and records.clips else None
        if clips and num_tokens is None:
            raise ValueError(
                "encoder: features of clips need an encoder that makes one number of tokens of every image"
            )
        number_bytes = width * DTYPES[dtype].itemsize + (4 if dtype in QUANTIZED else 0)
        self.tokens_per_picture = (num_tokens or _mean_length(records, self.pictures)) * (1 + crops)
        self.tokens_per_picture *= clips.frames if clips else 1
        self.picture_bytes = self.tokens_per_picture * number_bytes
        per_shard = max(1, int(shard_bytes / self.picture_bytes))
        fingerprint = hashlib.blake2b(digest_size=16)
        for image_id in self.pictures:
            fingerprint.update(f"{image_id}\n".encode(errors="surrogateescape"))
        preparation = None if transform is None else {
            "size": transform.size, "mean": list(transform.mean), "std": list(transform.std),
            "interpolation": transform.interpolation,
        }  # fmt: skip
        if clips and preparation:
            preparation |= {"frames": clips.frames, "frame_policy": clips.frame_policy}
        self.manifest = Manifest(
            encoder=dict(encoder),
            transform=preparation,
            crops={
                "count": crops,
                "scale": list(transform.crop_scale) if transform and crops else None,
                "seed": seed if crops else 0,
            },
            features={"dtype": dtype, "width": width, "num_tokens": num_tokens},
            data={"sources": sources, "pictures": len(self.pictures), "fingerprint": fingerprint.hexdigest()},
            shards={"count": -(-len(self.pictures) // per_shard), "pictures": per_shard},
            versions={"qformer": __version__, **{name: importlib.metadata.version(name) for name in LIBRARIES}},
        )
        if (self.folder / MANIFEST).exists():
            self._take_up(read_manifest(self.folder))
        self.missing = [n for n in range(self.manifest.shards["count"]) if not self._shard(n).exists()]

    def _take_up(self, there: Manifest) -> None:
        expected = {k: v for k, v in dataclasses.asdict(self.manifest).items() if k not in ("shards", "versions")}
        del expected["data"]["sources"]  # the same images may come by other names
        if lines := differences(dataclasses.asdict(there), expected):
            raise ValueError(
                f"data.features={self.folder} holds another cache; name another folder, or remove it:\n  "
                + "\n  ".join(lines)
            )
        for line in differences(there.versions, self.manifest.versions):
            logger.warning("%s was begun with another version of %s", self.folder, line)
        self.manifest = there

    def _shard(self, number: int) -> Path:
        return self.folder / SHARD.format(number)

    @property
    def expected_bytes(self) -> int:
        """Size of the shards that are still to be written, about."""
        return int(self.picture_bytes * self.share() * MARGIN)

    def describe(self) -> str:
        """What will be written, in one line."""
        m, count = self.manifest, len(self.pictures)
        lengths = "" if m.features["num_tokens"] else " on average"
        there = m.shards["count"] - len(self.missing)
        return (
            f"{count} images x {self.tokens_per_picture:.0f} tokens{lengths} of {m.features['width']} in "
            f"{m.features['dtype']}: {count * self.picture_bytes / 1e9:.3g} GB in {m.shards['count']} shards "
            f"({there} are there already)"
        )

    def begin(self) -> None:
        """Make the folder, see that its disk will hold the rest, and leave the manifest; for one process only.

        Raises: ValueError when the disk is too small.
        """
        there = self.folder.exists()
        self.folder.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.folder).free
        if free < self.expected_bytes:
            if not there:
                self.folder.rmdir()
            raise ValueError(
                f"data.features={self.folder} needs {self.expected_bytes / 1e9:.3g} GB more, but its disk has "
                f"{free / 1e9:.3g} GB free; free some, choose another folder, a smaller dtype (int8) or fewer crops"
            )
        for left in self.folder.glob(f".*{PARTIAL}"):  # of a process that was killed
            left.unlink(missing_ok=True)
        if self.missing:
            (self.folder / INDEX).unlink(missing_ok=True)
        if not (self.folder / MANIFEST).exists():
            write_manifest(self.folder, self.manifest)

    def write(
        self,
        encode: Encode,
        device: torch.device | str,
        *,
        batch_size: int,
        workers: int,
        rank: int = 0,
        world: int = 1,
    ) -> Iterator[int]:
        """Write this process's share, every `world`-th of the missing shards; yields the images of each batch done.

        Args:
            encode: a frozen encoder: inputs and mask -> tokens float[B, N, Dv] and mask.
            batch_size: views encoded at a time, each frame of a clip one.

        Raises:
            OSError: the disk is full, or cannot be written to.
        """
        mine, ids = self.missing[rank::world], list(self.pictures)
        size = max(1, batch_size // (self.manifest.views * (self.manifest.transform or {}).get("frames", 1)))
        members = {number: self._members(number) for number in mine}
        batches = {n: [list(m[i : i + size]) for i in range(0, len(m), size)] for n, m in members.items()}
        if not mine:
            return
        loader = iter(
            DataLoader(
                _Pictures(self), batch_sampler=[batch for n in mine for batch in batches[n]], num_workers=workers,
                collate_fn=list, worker_init_fn=start_worker, prefetch_factor=2 if workers else None,
                generator=torch.Generator(),
            )  # type: ignore[arg-type]
        )  # fmt: skip
        for number in mine:
            shard = _Shard(self.manifest)
            for batch in batches[number]:
                shard.add([ids[i] for i in batch], next(loader), encode, device)
                yield len(batch)
            with atomic_file(self._shard(number)) as scratch:
                shard.save(scratch)

    def share(self, rank: int = 0, world: int = 1) -> int:
        """Pictures that `write` will go through."""
        return sum(len(self._members(number)) for number in self.missing[rank::world])

    def finish(self) -> Summary | None:
        """Write the index if every shard is there, which makes the cache one that can be read; else None.

        Every process calls it when it is through: the last one finds them all.

        Raises: ValueError when no image at all could be read, or a shard is damaged.
        """
        paths = [self._shard(number) for number in range(self.manifest.shards["count"])]
        if not all(path.exists() for path in paths):
            return None
        keys: list[np.ndarray] = []
        bounds: list[np.ndarray] = []
        broken: dict[str, str] = {}
        for path in paths:
            with TensorFile(path) as file:
                ids, ends = file.metadata["ids"], file.read("ends", 0, file.tensors["ends"][1][0]).numpy()
                broken |= file.metadata["broken"]
            ends = ends.reshape(len(ids), self.manifest.views)
            starts = np.concatenate([[0], ends[:-1, -1]]) if len(ids) else np.empty(0)
            keys.append(np.array([picture_key(image_id) for image_id in ids], dtype=np.int64))
            bounds.append(np.column_stack([starts, ends]).astype(np.int64))
        every = np.concatenate(keys)
        if len(every) == 0:
            image_id, reason = next(iter(broken.items()))
            raise ValueError(f"none of {len(broken)} images could be read, the first: {image_id}: {reason}")
        order = np.argsort(every)
        ascending = every[order]
        assert (ascending[1:] > ascending[:-1]).all(), "two image_ids of one key"  # a difference could overflow
        shards = np.repeat(np.arange(len(paths), dtype=np.int32), [len(k) for k in keys])
        index = {"keys": ascending, "shards": shards[order], "bounds": np.concatenate(bounds)[order]}
        with atomic_file(self.folder / INDEX) as scratch:
            tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in index.items()}
            _save(tensors, scratch, {"broken": broken})
        return Summary(len(every), broken, sum(path.stat().st_size for path in paths))

    def _members(self, number: int) -> range:
        size = self.manifest.shards["pictures"]
        return range(number * size, min((number + 1) * size, len(self.pictures)))


class _Pictures(Dataset[Tensor | str]):
    """Every picture's views float[V, 3, S, S], of a clip float[V, n, 3, S, S], or features float[N, Dv]; the reason where
    it cannot be read.
    """

    def __init__(self, writer: CacheWriter):
        self.records, self.transform, self.crops = writer.records, writer.transform, writer.manifest.crops
        self.pictures, self.width = list(writer.pictures.items()), writer.manifest.features["width"]

    def __getitem__(self, picture: int) -> Tensor | str:
        image_id, row = self.pictures[picture]
        record = next(image for image in self.records[row].each_image() if image.image_id == image_id)
        key = picture_key(record.image_id) % 2**64
        draws = [np.random.default_rng([self.crops["seed"], CROPS, key, n]) for n in range(self.crops["count"])]
        try:
            views = load_input(record, self.transform, [None, *draws], self.width)
        except BrokenRecord as broken:
            logger.warning("broken record %s", broken)
            return broken.reason
        return views[0] if self.transform is None else torch.stack(views)


class _Shard:
    """The images of one shard as they come, in the order of the records."""

    def __init__(self, manifest: Manifest):
        self.manifest = manifest
        self.ids: list[str] = []
        self.broken: dict[str, str] = {}
        self.tokens: list[Tensor] = []
        self.scales: list[Tensor] = []
        self.lengths: list[int] = []

    @torch.no_grad()
    def add(self, ids: list[str], inputs: list[Tensor | str], encode: Encode, device: torch.device | str) -> None:
        self.broken |= {i: reason for i, reason in zip(ids, inputs, strict=True) if isinstance(reason, str)}
        ids = [i for i in ids if i not in self.broken]
        sound = [views for views in inputs if isinstance(views, Tensor)]
        if not sound:
            return
        frames = [views.shape[1] if views.ndim == 5 else 1 for views in sound]
        if sound[0].ndim > 3:
            tokens, mask = encode(torch.cat([views.flatten(0, -4) for views in sound]).to(device), None)
        else:
            real = pad_sequence([torch.ones(len(s), dtype=torch.bool) for s in sound], batch_first=True)
            tokens, mask = encode(pad_sequence(sound, batch_first=True).to(device), real.to(device))
        rows, count = tokens.shape[:2]
        lengths: list[int] = [count] * rows if mask is None else mask.sum(1).tolist()
        flat = tokens.flatten(0, 1) if mask is None else tokens[mask]
        dtype = self.manifest.features["dtype"]
        values, scales = quantize(flat, dtype)
        finite = (flat if dtype in QUANTIZED else values).isfinite().all(1).cpu()
        values, scales = values.cpu(), None if scales is None else scales.cpu()
        taken, start = iter(lengths), 0
        for n, image_id in zip(frames, ids, strict=True):  # the tokens of a clip's frames stand side by side
            counts = [sum(itertools.islice(taken, n)) for _ in range(self.manifest.views)]
            there = slice(start, start + sum(counts))
            start = there.stop
            if not finite[there].all():
                self.broken[image_id] = f"its features are NaN or infinite in {dtype}; bfloat16 has a wider range"
                logger.warning("broken record %s: %s", image_id, self.broken[image_id])
                continue
            self.ids.append(image_id)
            self.lengths += counts
            self.tokens.append(values[there])
            if scales is not None:
                self.scales.append(scales[there])

    def save(self, path: Path) -> None:
        dtype, width = self.manifest.features["dtype"], self.manifest.features["width"]
        tensors = {
            "tokens": torch.cat([torch.empty(0, width, dtype=DTYPES[dtype]), *self.tokens]),
            "ends": torch.tensor(self.lengths, dtype=torch.int64).cumsum(0),
        }
        if dtype in QUANTIZED:
            tensors["scales"] = torch.cat([torch.empty(0), *self.scales])
        _save(tensors, path, {"ids": self.ids, "broken": self.broken})


def _save(tensors: dict[str, Tensor], path: Path, metadata: dict[str, Any]) -> None:
    try:  # under one key, because the order of several differs from call to call
        save_file(tensors, path, metadata={"qformer": json.dumps(metadata)})
    except SafetensorError as error:
        raise OSError(f"{path.parent} cannot be written to: {error}; what is there stays, run it once more") from None
    shutil.copymode(path.parent / MANIFEST, path)  # safetensors leaves files that only their owner may read


def _mean_length(records: Records, pictures: dict[str, int]) -> float:
    rows = list(pictures.values())
    lengths, reason = [], ""
    for i in np.linspace(0, len(rows) - 1, min(MEASURED, len(rows)), dtype=int):
        try:
            lengths.append(len(load_input(records[rows[i]], None, [None])[0]))
        except BrokenRecord as broken:
            reason = str(broken)
    if not lengths:
        raise ValueError(f"none of {min(MEASURED, len(rows))} feature files could be read, the last: {reason}")
    return float(np.mean(lengths))
