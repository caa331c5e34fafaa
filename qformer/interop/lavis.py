"""Checkpoints of LAVIS, where BLIP-2 was first written, into an adapter: stage 1, stage 2 and InstructBLIP.

Source: LAVIS's Blip2Qformer, Blip2OPT, Blip2T5, Blip2T5Instruct and Blip2VicunaInstruct. Their files hold what was
trained; what was frozen is named by the config, as for a run, and checked against the file by its width.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qformer.bert import DEC, load_tokenizer
from qformer.config import ConfigError, Stage1Part, Stage2Part, load_config
from qformer.interop.eva import save_as_blip2
from qformer.interop.files import read_pickle, read_safetensors
from qformer.interop.frozen import empty_adapter, require_encoder_width, require_language_width
from qformer.interop.keys import Imported, lavis

PROJECTIONS = ("opt_proj", "t5_proj", "llm_proj")  # of the stage-2 models; without any it is stage 1
WORDS = "Qformer.bert.embeddings.word_embeddings.weight"
STORED_TWICE = {
    "Qformer.cls.predictions.decoder.weight": WORDS,
    "Qformer.cls.predictions.decoder.bias": "Qformer.cls.predictions.bias",
}
ENCODER = "visual_encoder."
EXPECTED = "expected a LAVIS checkpoint of BLIP-2, with query_tokens, ln_vision.* and Qformer.bert.* under 'model'"


def import_lavis(file: Path, arguments: list[str], encoder_folder: Path | None = None) -> Imported:
    """A LAVIS checkpoint as an adapter of the stage that it is of; its sizes are read from its tensors.

    Args:
        file: `.pth` of LAVIS, or a `.safetensors` of the same names.
        arguments: YAML files and overrides that name the frozen parts (`encoder.*`, `llm.*`, `qformer.tokenizer`), and
            `qformer.heads` where a head has not 64 columns: no tensor tells.
        encoder_folder: where `save_encoder` puts the encoder of a fine-tuned file, which then is the config's.

    Raises: ValueError when the file is damaged, no checkpoint of BLIP-2, or does not fit the frozen parts named.
    """
    return import_tensors(read_lavis(file), str(file), arguments, encoder_folder)


def save_encoder(file: Path, folder: Path, heads: int | None = None) -> None:
    """Write the encoder inside a fine-tuned file as a Blip2VisionModel folder.

    Raises: ValueError when it is not EVA's ViT.
    """
    tensors = read_lavis(file)
    eva = {name.removeprefix(ENCODER): tensor for name, tensor in tensors.items() if name.startswith(ENCODER)}
    save_as_blip2(
        eva, {kind: tensors[f"ln_vision.{kind}"] for kind in ("weight", "bias")}, folder, source=str(file), heads=heads
    )


def read_lavis(file: Path) -> dict[str, Tensor]:
    """The tensors of a checkpoint by LAVIS's names, left on the disk until they are used where the format allows it.

    Raises: ValueError when it cannot be read, would run code, or is no checkpoint of BLIP-2.
    """
    if not file.is_file():
        state = "is a folder" if file.is_dir() else "does not exist"
        raise ValueError(f"{file} {state}; expected the file of a LAVIS checkpoint (.pth or .safetensors)")
    loaded = read_safetensors(file) if file.suffix == ".safetensors" else read_pickle(file, EXPECTED)
    tensors = loaded.get("model", loaded) if isinstance(loaded, dict) else loaded
    if not isinstance(tensors, Mapping) or not all(isinstance(value, Tensor) for value in tensors.values()):
        raise ValueError(f"{file} holds no dictionary of tensors; {EXPECTED}")
    if "query_tokens" not in tensors or "ln_vision.weight" not in tensors:
        shown = ", ".join(list(tensors)[:3]) or "nothing"
        raise ValueError(f"{file} is no checkpoint of BLIP-2: it holds {shown} ...; {EXPECTED}")
    return dict(tensors)


def import_tensors(
    tensors: Mapping[str, Tensor], source: str, arguments: list[str], encoder_folder: Path | None = None
) -> Imported:
    """`import_lavis` of tensors that were read already."""
    for copy, original in STORED_TWICE.items():
        if copy in tensors and original in tensors and not torch.equal(tensors[copy], tensors[original]):
            raise ValueError(f"{source}: {copy} differs from {original}, but they are one tensor in a Q-Former")
    projection = next((name for name in PROJECTIONS if f"{name}.weight" in tensors), None)
    config: Any = _config(
        tensors,
        source,
        arguments,
        projection=projection,
        sizes=infer_sizes(tensors, source),
        encoder_folder=encoder_folder,
    )
    width = len(tensors["ln_vision.weight"])
    llm_width = len(tensors[f"{projection}.weight"]) if projection else None
    vocab_size = len(tensors[WORDS]) if WORDS in tensors else None
    if not _has_encoder(tensors):
        require_encoder_width(config.encoder, width, f"{source} was trained on {width} columns (ln_vision)")
    if llm_width is not None:
        require_language_width(config.llm, llm_width, f"{source} projects to {llm_width} columns ({projection})")
    if vocab_size is not None:
        _require_tokenizer(config, vocab_size, source)
    adapter = empty_adapter(config, width, llm_width, vocab_size).state_dict()
    outside = {name: tensor for name, tensor in tensors.items() if not name.startswith(ENCODER)}
    taken, report = lavis(projection or PROJECTIONS[0]).take(adapter, outside, source)
    if len(outside) < len(tensors):
        why = f"the frozen encoder, written to {encoder_folder}"
        report = report._replace(dropped={**report.dropped, **{n: why for n in tensors if n not in outside}})
    return Imported(config, {name: tensor.float() for name, tensor in taken.items()}, report)


def _require_tokenizer(config: Any, vocab_size: int, source: str) -> None:
    """Raise ValueError unless `qformer.tokenizer` has a token for each word embedding; empty, it is left to later."""
    if not config.qformer.tokenizer:
        config.qformer.vocab_size = vocab_size
    elif (needed := len(load_tokenizer(config.qformer.tokenizer))) != vocab_size:
        raise ValueError(
            f"qformer.tokenizer={config.qformer.tokenizer!r} has {needed} tokens with {DEC}, but {source} has "
            f"{vocab_size} word embeddings; name the tokenizer that it was trained with (BLIP-2: bert-base-uncased)"
        )


def infer_sizes(tensors: Mapping[str, Tensor], source: str) -> dict[str, int]:
    """`qformer.*` as the tensors show it; the heads are BERT's, one for 64 columns.

    Raises: ValueError when the tensors are not those of one Q-Former.
    """
    layers = {int(m[1]): None for n in tensors if (m := re.match(r"Qformer\.bert\.encoder\.layer\.(\d+)\.", n))}
    looks = [i for i in layers if f"Qformer.bert.encoder.layer.{i}.crossattention.self.key.weight" in tensors]
    first = "Qformer.bert.encoder.layer.0.intermediate_query.dense.weight"
    if sorted(layers) != list(range(len(layers))) or first not in tensors or not looks:
        raise ValueError(f"{source} lacks layers of its Q-Former (Qformer.bert.encoder.layer.*); {EXPECTED}")
    queries, width = tensors["query_tokens"].shape[1:]
    sizes = {
        "layers": len(layers),
        "width": width,
        "heads": max(1, width // 64),
        "ffn_width": len(tensors[first]),
        "queries": queries,
        "cross_attention_frequency": sorted(looks)[1] if len(looks) > 1 else len(layers),
    }
    sizes |= {
        key: len(tensors[name])
        for key, name in {
            "max_text_positions": "Qformer.bert.embeddings.position_embeddings.weight",
            "contrastive_width": "vision_proj.weight",
        }.items()
        if name in tensors
    }
    return sizes


def _config(
    tensors: Mapping[str, Tensor], source: str, arguments: list[str], *,
    projection: str | None, sizes: dict[str, int], encoder_folder: Path | None,
) -> Any:  # fmt: skip
    """The named frozen parts with the sizes that the tensors show."""
    before = [f"qformer.{key}={value}" for key, value in sizes.items()]
    before += [f"qformer.max_text_tokens={min(32, sizes.get('max_text_positions', 32))}"]
    root: Any = Stage1Part
    if projection:
        root = Stage2Part
        before += [f"stage2.instructed={str(WORDS in tensors).lower()}"]
        # LAVIS runs every T5 with the exact gelu in place of its own activation.
        before += ["llm.activation=gelu"] if projection == "t5_proj" else []
    if _has_encoder(tensors):
        assert encoder_folder is not None, "this file holds its encoder: say where it is to be kept"
        before += ["encoder.loader=transformers", f"encoder.id='{encoder_folder}'", "encoder.block=-1"]
    what = f"stage 2 ({projection})" if projection else "stage 1 (without a language projection)"
    try:
        config = load_config(root, [*before, *arguments])
    except ConfigError as error:
        raise ValueError(f"{source} is of {what}: {error}") from None
    for key, value in sizes.items():
        if key != "heads" and (value_set := getattr(config.qformer, key)) != value:
            raise ValueError(f"qformer.{key}={value_set}, but {source} has {value}; leave it out")
    if _has_encoder(tensors) and config.encoder.id != str(encoder_folder):
        raise ValueError(
            f"encoder.id={config.encoder.id!r}, but {source} holds its own (visual_encoder.*); leave it out"
        )
    return config


def _has_encoder(tensors: Mapping[str, Tensor]) -> bool:
    return any(name.startswith(ENCODER) for name in tensors)
