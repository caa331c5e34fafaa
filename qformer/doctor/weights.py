"""Where the weights that a config names lie, what they take, and whether they can be had."""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from torch import nn

from qformer.language import FrozenLanguageModel
from qformer.messages import one_line
from qformer.parts import WeightSource


class Weights(NamedTuple):
    """Where weights lie or come from, the bytes of their files (of those to be fetched), 0 if unknown, and whether any is."""

    place: str
    size_bytes: int
    to_fetch: bool


def parameter_bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def resident_bytes(llm: FrozenLanguageModel, quantise: str) -> int:
    """What a language model takes: its matrices but the head in 8 bits, or in 4 with a scale for 64 numbers, if so asked."""
    if quantise == "no":
        return parameter_bytes(llm)
    head = llm.model.get_output_embeddings()
    linear = [m.weight for m in llm.modules() if isinstance(m, nn.Linear) and m is not head]
    saved = 1.0 if quantise == "8bit" else 0.5 + 4 / 64
    return parameter_bytes(llm) - sum(round(w.numel() * (w.element_size() - saved)) for w in linear)


def find_weights(source: WeightSource) -> Weights:
    """The weights of a file, folder, address or hub id, from the cache if they are all there.

    Raises: ValueError when the folder has none or lacks a shard, or the hub cannot be reached, has none, or has more than
        the disk has room for.
    """
    path = Path(source.place)
    if path.is_file():
        return Weights(source.place, path.stat().st_size, to_fetch=False)
    if path.is_dir():
        files = _files(path, source)
        if missing := [file.name for file in files if not file.is_file()]:
            raise ValueError(f"{_name(source)}: the folder lacks {missing[0]} ({len(missing)} of {len(files)} files)")
        return Weights(source.place, sum(file.stat().st_size for file in files), to_fetch=False)
    if "://" in source.place:
        return Weights(source.place, 0, to_fetch=True)
    if (snapshot := _cached_snapshot(source)) is not None:
        files = _files(snapshot, source)
        if all(file.is_file() for file in files):
            return Weights(f"{source.place} in the cache", sum(f.stat().st_size for f in files), to_fetch=False)
    return _on_hub(source)


def _files(folder: Path, source: WeightSource) -> list[Path]:
    """The files that make up the weights in a folder: one, or the shards that an index names, there or not."""
    file = next((folder / name for name in source.files if (folder / name).is_file()), None)
    if file is None:
        raise ValueError(f"{_name(source)}: the folder has no weights; expected one of {', '.join(source.files)}")
    if not file.name.endswith(".index.json"):
        return [file]
    return [folder / name for name in sorted(set(json.loads(file.read_text())["weight_map"].values()))]


def _cached_snapshot(source: WeightSource) -> Path | None:
    """The folder of the hub's cache that holds one of the files."""
    for name in source.files:
        try:
            file = try_to_load_from_cache(
                source.place, name, cache_dir=constants.HF_HUB_CACHE, revision=source.revision
            )
        except ValueError:  # not the form of a hub id
            return None
        if isinstance(file, str):
            return Path(file).parent
    return None


def _on_hub(source: WeightSource) -> Weights:
    """What the hub would send, by its own dry run: a whole set of shards where there is an index."""
    patterns = [*source.files, "*.safetensors", "*.bin"]
    try:
        plan = snapshot_download(source.place, revision=source.revision, allow_patterns=patterns, dry_run=True)
    except Exception as error:  # the hub and its transport raise many kinds
        raise ValueError(
            f"{_name(source)}: its weights are not in the cache and the hub cannot be asked ({one_line(error)}); "
            "download them once where there is a network, or name a local folder"
        ) from None
    bytes_left = {file.filename: (file.file_size or 0) * file.will_download for file in plan}
    first = next((name for name in source.files if name in bytes_left), None)
    if first is None:
        raise ValueError(f"{_name(source)}: the repository has no weights; expected one of {', '.join(source.files)}")
    whole = first.removesuffix(".index.json")
    names = [first] if whole == first else [name for name in bytes_left if name.endswith(Path(whole).suffix)]
    size_bytes = sum(bytes_left[name] for name in names)
    cache = Path(constants.HF_HUB_CACHE)
    if (free := shutil.disk_usage(existing(cache)).free) < size_bytes:
        raise ValueError(
            f"{_name(source)}: {size_bytes / 1e9:.1f} GB are to be fetched to {cache}, whose disk has {free / 1e9:.1f} GB "
            "free; free some, or set HF_HOME to a larger disk"
        )
    return Weights(f"{source.place} on the hub", size_bytes, to_fetch=True)


def _name(source: WeightSource) -> str:
    return f"{source.key}={source.place!r}"


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())
