"""The feature cache: what a frozen encoder makes of every image, kept on disk and read in any order.

    CACHE/manifest.json              whose features these are (`Manifest`); written first
    CACHE/shard-00000.safetensors    P images, whole or not there at all
        tokens  dtype[T, Dv]         the tokens of every view of every image, one after another, without padding
        scales  float32[T]           only of int8: a token is its row of `tokens` times its scale
        ends    int64[n * V]         where each view ends in T: image 0 view 0, image 0 view 1, ..., image 1 view 0
        metadata "qformer"           JSON: {"ids": [n image_ids], "broken": {image_id: reason}}
    CACHE/index.safetensors          written last; a cache without it is unfinished
        keys    int64[M]             `picture_key` of every image_id, ascending
        shards  int32[M]             the shard of each
        bounds  int64[M, V + 1]      where in T its views begin and end
        metadata "qformer"           JSON: {"broken": {image_id: reason}}

View 0 is the whole image, views 1 to V - 1 are random crops. An image that could not be read is in `broken` only.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qformer.config import DTYPES as FLOATS
from qformer.data.records import BrokenRecord, Record
from qformer.files import atomic_file

FORMAT_VERSION = 1
MANIFEST, INDEX, SHARD = "manifest.json", "index.safetensors", "shard-{:05d}.safetensors"
QUANTIZED = {"int8": 127.0}  # the largest number that each can hold
DTYPES = {name: getattr(torch, name) for name in (*FLOATS, *QUANTIZED)}
_TORCH_NAMES = {
    "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8,
    "I32": torch.int32, "I64": torch.int64,
}  # fmt: skip
_MOST_OPEN = 256  # files a process holds open


@dataclass(frozen=True)
class Manifest:
    """Whose features a cache holds and how.

    Args:
        encoder: loader, id, pretrained, revision, random_weights, block, image_size and dtype of the frozen encoder.
        transform: size, mean, std and interpolation of the images; None where features came from files.
        crops: count of random crops beside the whole image, their scale and seed.
        features: dtype, width Dv and num_tokens N (None if it varies) of what is stored.
        data: sources, number of images and the fingerprint of their image_ids in order.
        shards: count, and images in each.
        versions: of the libraries that had a part in it.
    """

    encoder: dict[str, Any]
    transform: dict[str, Any] | None
    crops: dict[str, Any]
    features: dict[str, Any]
    data: dict[str, Any]
    shards: dict[str, int]
    versions: dict[str, str]
    format_version: int = FORMAT_VERSION

    @property
    def views(self) -> int:
        """The whole image and its random crops."""
        return 1 + self.crops["count"]


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a cache.

    Raises: ValueError when the folder is no cache, its manifest is damaged, or of another format version.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"data.features={folder} is no feature cache: it has no {MANIFEST}; write it with stages/cache_features.py"
        )
    try:
        values = json.loads(path.read_text())
        version = values.get("format_version")
        if version == FORMAT_VERSION:
            manifest = Manifest(**values)
            dtype = manifest.features["dtype"]
            if dtype in DTYPES:
                return manifest
            raise ValueError(f"its dtype {dtype} is read no more, choose int8 or bfloat16")
    except (ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"{path} cannot be used ({error}); write the cache anew with stages/cache_features.py"
        ) from None
    raise ValueError(f"{path} has format version {version}, this qformer reads {FORMAT_VERSION}; write the cache anew")


def differences(manifest: Mapping[str, Any], expected: Mapping[str, Any]) -> list[str]:
    """One line for each value that `expected` names and `manifest` does not have, by dotted key."""
    ours, theirs = dict(_leaves(expected)), dict(_leaves(manifest))
    return [f"{key}: the cache has {theirs.get(key)}, expected {value}" for key, value in ours.items()
            if theirs.get(key) != value]  # fmt: skip


def _leaves(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if not isinstance(values, Mapping):
        yield prefix, list(values) if isinstance(values, tuple) else values
        return
    for key, value in values.items():
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def picture_key(image_id: str) -> int:
    """A 64-bit number for an image_id, by which the index is sorted."""
    return int.from_bytes(
        hashlib.blake2b(image_id.encode(errors="surrogateescape"), digest_size=8).digest(), "little", signed=True
    )


def quantize(tokens: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """float[T, Dv] -> dtype[T, Dv] and, where a byte a number is too coarse without, a scale float32[T] a token.

    The scale belongs to a token and not to an image, because the few tokens of a vision transformer that are a hundred
    times larger than the rest would take the rest's digits. The error is at most the token's largest number / 254.
    """
    if dtype not in QUANTIZED:
        return tokens.to(DTYPES[dtype]), None
    limit = QUANTIZED[dtype]
    tokens = tokens.float()
    scales = (tokens.abs().amax(1) / limit).clamp_min(torch.finfo(torch.float32).tiny)
    scaled = (tokens / scales[:, None]).clamp(-limit, limit)
    return scaled.round().to(DTYPES[dtype]), scales


class FeatureCache:
    """Features of images by `image_id`, read where they lie: nothing is kept in memory, and any order is as good.

    Reads go straight into the tensor returned, by position, so that processes may share an object across a fork and
    resident memory stays flat where a memory map of the shards would grow with every page read.

    Raises: ValueError when the folder is no cache, or an unfinished or damaged one.
    """

    def __init__(self, folder: str | Path):
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(self.folder)
        self._open: dict[int, TensorFile] = {}
        count = self.manifest.shards["count"]
        missing = [n for n in range(count) if not (self.folder / SHARD.format(n)).is_file()]
        if missing or not (self.folder / INDEX).is_file():
            raise ValueError(
                f"data.features={self.folder} is unfinished, {count - len(missing)} of {count} shards are there; run "
                "stages/cache_features.py once more with the same arguments"
            )

    def __len__(self) -> int:
        """Number of images."""
        return len(self._index["keys"])

    def __contains__(self, image_id: str) -> bool:
        return self._find(image_id) is not None

    def __reduce__(self):  # to a spawned worker goes the path, not open files
        return FeatureCache, (self.folder,)

    def id_of(self, record: Record) -> str:
        """The name under which the cache has a record's image: its image_id, or its path in caches from before 0.2."""
        known = record.image_id in self or record.image_id in self.broken
        return record.image_id if known or record.image_bytes is not None or record.image not in self else record.image

    @cached_property
    def broken(self) -> dict[str, str]:
        """Why an image is not in the cache, by `image_id`."""
        with TensorFile(self.folder / INDEX) as file:
            return file.metadata["broken"]

    def read(self, image_id: str, view: int = 0) -> Tensor:
        """Features float[N, Dv] of one view of an image, in the stored dtype; bfloat16 if that is quantised.

        Raises:
            BrokenRecord: the image could not be read when the cache was written, or was not among those written.
            ValueError: a shard is missing or damaged.
        """
        assert 0 <= view < self.manifest.views, view
        row = self._find(image_id)
        if row is None:
            raise BrokenRecord(image_id, self.broken.get(image_id, f"not in the feature cache {self.folder}"))
        shard = self._shard(int(self._index["shards"][row]))
        start, end = (int(bound) for bound in self._index["bounds"][row, view : view + 2])
        tokens = shard.read("tokens", start, end)
        if "scales" in shard.tensors:
            tokens = (tokens.float() * shard.read("scales", start, end)[:, None]).bfloat16()
        return tokens

    @cached_property
    def _index(self) -> dict[str, np.ndarray]:
        with TensorFile(self.folder / INDEX) as file:
            return {name: file.map(name) for name in ("keys", "shards", "bounds")}

    def _find(self, image_id: str) -> int | None:
        keys, key = self._index["keys"], picture_key(image_id)
        row = int(np.searchsorted(keys, key))
        return row if row < len(keys) and keys[row] == key else None

    def _shard(self, number: int) -> TensorFile:
        if number not in self._open:
            if len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open))).close()
            self._open[number] = TensorFile(self.folder / SHARD.format(number))
        return self._open[number]


class TensorFile:
    """A safetensors file, of which rows are read by position; `metadata` is the JSON under its key "qformer".

    `safetensors.safe_open` maps the file: every page that was read stays in the resident memory of each process that
    read it, in the end the whole cache (benchmarks/cache_reader.py shows both).

    Raises: ValueError when the file is missing, damaged or incomplete.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            self._file = path.open("rb", buffering=0)
        except OSError as error:
            raise ValueError(f"{path} of the feature cache cannot be opened ({error.strerror})") from None
        try:
            size = int.from_bytes(self._file.read(8), "little")
            first = 8 + size
            header = json.loads(self._file.read(size)) if first <= os.fstat(self._file.fileno()).st_size else None
            self.metadata: dict[str, Any] = json.loads(header.pop("__metadata__")["qformer"])  # type: ignore[union-attr]
            self.tensors: dict[str, tuple[torch.dtype, list[int], int]] = {
                name: (_TORCH_NAMES[t["dtype"]], t["shape"], first + t["data_offsets"][0])
                for name, t in header.items()  # type: ignore[union-attr]
            }
            ends = [first + t["data_offsets"][1] for t in header.values()]  # type: ignore[union-attr]
            if os.fstat(self._file.fileno()).st_size != max(ends):
                raise ValueError("its length is not what its header says")
        except (ValueError, KeyError, TypeError, AttributeError, MemoryError, OverflowError) as error:
            self._file.close()
            raise ValueError(
                f"{path} of the feature cache is damaged ({error}); delete it and write it again"
            ) from None

    def read(self, name: str, start: int, end: int) -> Tensor:
        """Rows start to end of a tensor."""
        dtype, shape, offset = self.tensors[name]
        row = math.prod(shape[1:]) * dtype.itemsize
        buffer = torch.empty((end - start) * row, dtype=torch.uint8)
        view, offset = buffer.numpy().data, offset + start * row
        while len(view):
            count = os.preadv(self._file.fileno(), [view], offset)
            if count == 0:
                raise ValueError(f"{self.path} of the feature cache ends too soon; delete it and write it again")
            view, offset = view[count:], offset + count
        return buffer.view(dtype).view(end - start, *shape[1:])

    def map(self, name: str) -> np.ndarray:
        """A tensor as a read-only memory map, for the index: few pages of it are touched."""
        dtype, shape, offset = self.tensors[name]
        kind = {torch.int32: "<i4", torch.int64: "<i8"}[dtype]
        return np.memmap(self.path, kind, "r", offset, tuple(shape))

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Put the manifest of a cache into its folder."""
    with atomic_file(folder / MANIFEST) as scratch:
        scratch.write_text(json.dumps(dataclasses.asdict(manifest), indent=1) + "\n")
