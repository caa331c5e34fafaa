"""The frozen models of a config without their weights: what they are like, and whether the weights can be had."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import HfApi, constants, try_to_load_from_cache
from torch import nn

from qformer.build import build_encoder, build_language_model
from qformer.config import EncoderConfig, LlmConfig
from qformer.encoders import FrozenEncoder
from qformer.language import FrozenLanguageModel

# Names under which a repository holds its weights, the preferred ones first; an index names the files of its shards.
FILES = (
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip


class Weights(NamedTuple):
    """Where weights lie or come from, how large their files are, and whether they must be fetched first."""

    place: str
    size_bytes: int
    to_fetch: bool


def outline_encoder(config: EncoderConfig) -> FrozenEncoder:
    """The encoder on the meta device: sizes without memory."""
    with torch.device("meta"):
        return build_encoder(dataclasses.replace(config, random_weights=config.loader != "features"))


def outline_language_model(config: LlmConfig) -> FrozenLanguageModel:
    """The language model on the meta device, with its real tokenizer, which is probed."""
    with torch.device("meta"):
        return build_language_model(dataclasses.replace(config, random_weights=True, quantise="no"))


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


def encoder_weights(config: EncoderConfig) -> Weights | None:
    """The weights that `encoder.*` names; None where there are none to load.

    Raises: ValueError when they are neither here nor can be fetched.
    """
    if config.loader == "features" or config.random_weights:
        return None
    if config.loader == "transformers":
        return find_weights("encoder.id", config.id, config.revision)
    if config.id.startswith("local-dir:"):
        return find_weights("encoder.id", config.id.removeprefix("local-dir:"))
    if config.id.startswith("hf-hub:"):
        return find_weights("encoder.id", config.id.removeprefix("hf-hub:"))
    import open_clip

    name = config.id.replace("/", "-")
    if config.pretrained is None:
        tags = open_clip.list_pretrained_tags_by_model(name)
        raise ValueError(f"encoder.pretrained is missing for '{name}'; expected one of {tags} or a file")
    if (file := Path(config.pretrained)).is_file():
        return Weights(str(file), file.stat().st_size, to_fetch=False)
    source: dict[str, Any] = open_clip.get_pretrained_cfg(name, config.pretrained)
    if source.get("hf_hub"):
        repository, _, file_name = source["hf_hub"].rpartition("/")
        return find_weights("encoder.pretrained", repository, None, (file_name,) if file_name else FILES)
    cached = Path("~/.cache/clip").expanduser() / os.path.basename(source["url"])
    if cached.is_file():
        return Weights(str(cached), cached.stat().st_size, to_fetch=False)
    return Weights(source["url"], 0, to_fetch=True)


def find_weights(key: str, id: str, revision: str | None = None, files: tuple[str, ...] = FILES) -> Weights:
    """The weights of a folder or hub id, from the cache if they are there.

    Raises: ValueError when the folder has none or lacks a shard, or the hub cannot be reached or has none.
    """
    if (folder := Path(id)).is_dir():
        found = next((folder / name for name in files if (folder / name).is_file()), None)
        if found is None:
            raise ValueError(f"{key}={id!r}: the folder has no weights; expected one of {', '.join(files)}")
        paths = [folder / name for name in _shards(found)]
        if missing := [path.name for path in paths if not path.is_file()]:
            raise ValueError(f"{key}={id!r}: the folder lacks {missing[0]} ({len(missing)} of {len(paths)} files)")
        return Weights(id, sum(path.stat().st_size for path in paths), to_fetch=False)
    cached = {name: path for name in files if (path := _cached(id, name, revision))}
    if cached:
        shards = [_cached(id, name, revision) for name in _shards(next(iter(cached.values())))]
        if all(shards):
            return Weights(f"{id} in the cache", sum(p.stat().st_size for p in shards if p), to_fetch=False)
    try:
        siblings = HfApi().model_info(id, revision=revision, files_metadata=True).siblings or []
    except Exception as error:  # the hub and its transport raise many kinds
        raise ValueError(
            f"{key}={id!r}: its weights are not in the cache and the hub cannot be asked ({_first_line(error)}); "
            "download them once where there is a network, or name a local folder"
        ) from None
    sizes = {s.rfilename: s.size or 0 for s in siblings}
    found_name = next((name for name in files if name in sizes), None)
    if found_name is None:
        raise ValueError(f"{key}={id!r}: the repository has no weights; expected one of {', '.join(files)}")
    suffix = ".safetensors" if ".safetensors" in found_name else ".bin"
    sharded = found_name.endswith(".index.json")
    size_bytes = sum(size for name, size in sizes.items() if name.endswith(suffix)) if sharded else sizes[found_name]
    _require_room(key, id, size_bytes)
    return Weights(f"{id} on the hub", size_bytes, to_fetch=True)


def _shards(path: Path) -> list[str]:
    """Names of the files that make up the weights."""
    if not path.name.endswith(".index.json"):
        return [path.name]
    return sorted(set(json.loads(path.read_text())["weight_map"].values()))


def _cached(id: str, name: str, revision: str | None) -> Path | None:
    try:
        found = try_to_load_from_cache(id, name, cache_dir=constants.HF_HUB_CACHE, revision=revision)
    except ValueError:  # not the form of a hub id
        return None
    return Path(found) if isinstance(found, str) else None


def _require_room(key: str, id: str, size_bytes: int) -> None:
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(existing(cache)).free
    if free < size_bytes:
        raise ValueError(
            f"{key}={id!r}: {size_bytes / 1e9:.1f} GB are to be fetched to {cache}, whose disk has {free / 1e9:.1f} GB "
            "free; free some, or set HF_HOME to a larger disk"
        )


def existing(path: Path) -> Path:
    """The path, or the nearest folder above it that is there."""
    path = path.absolute()
    return next(p for p in (path, *path.parents) if p.exists())


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:160]
