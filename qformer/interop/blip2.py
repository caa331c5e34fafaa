"""BLIP-2 and InstructBLIP of transformers into an adapter, with the checkpoint itself as its frozen encoder and LLM.

Source: transformers' Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, InstructBlipForConditionalGeneration.
Only the adapter's tensors are read; those of the frozen parts stay on the disk until the adapter is put to use.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer

from qformer.config import Stage1Part, Stage2Part, from_values
from qformer.interop.frozen import DEC, empty_adapter
from qformer.interop.keys import BLIP2, INSTRUCT_BLIP, Imported, Layout, Report
from qformer.models import Stage1Adapter, Stage2Adapter

# All of a hub id: the frozen parts are loaded from the same cache later.
FILES = ["*.json", "*.txt", "*.model", "model.safetensors", "model-*.safetensors", "qformer_tokenizer/*"]
LAYOUTS: dict[str, Layout] = {"blip-2": BLIP2, "instructblip": INSTRUCT_BLIP}
WORDS, LM_BIAS, TEMPERATURE = "qformer.word_embeddings.weight", "lm_bias", "temperature"
HAS_NO_SLOT = ["temperature", r"lm_transform\..*", r"lm_norm\..*", "lm_bias"]  # what transformers' classes leave out


def import_blip2(id_or_folder: str, revision: str | None = None) -> Imported:
    """A checkpoint as a stage-2 adapter, or a stage-1 adapter where it was made for image-text retrieval.

    Numbers that only training reads (`run.*`, `train.*`, `data.*`) are placeholders.

    Args:
        id_or_folder: what `save_pretrained` wrote, or a hub id.
        revision: of the hub id.

    Raises: ValueError when it cannot be reached, is another model, is damaged or incomplete, does not fit its own config,
        or has a Q-Former that ours cannot stand for.
    """
    folder, source = _folder(id_or_folder, revision)
    theirs, tensors = read_config_of(folder, source), _Weights(folder, source)
    retrieval = "itm_head.weight" in tensors
    if not retrieval and "language_projection.weight" not in tensors:
        raise ValueError(
            f"{source} holds {_class(theirs)}, with neither language_projection nor itm_head; "
            "expected Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval or InstructBlipForConditionalGeneration"
        )
    config = config_of(theirs, source, retrieval, revision)
    instructed = theirs.model_type == "instructblip"
    tokenizer = _tokenizer(folder, source, instructed) if instructed or retrieval else None
    if tokenizer:
        config.qformer.tokenizer = tokenizer[0]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = adapter_like(config, theirs).state_dict()
        found, report = LAYOUTS[theirs.model_type].take(own, tensors, source, HAS_NO_SLOT if retrieval else ())
        found |= {name: own[name] for name in report.new}
        if tokenizer:
            report = _fit_vocabulary(found, report, tokenizer[1])
    if retrieval and "logit_scale" in tensors:
        found[TEMPERATURE] = (-tensors["logit_scale"]).exp().reshape(())
        new = [name for name in report.new if name != TEMPERATURE]
        dropped = {name: why for name, why in report.dropped.items() if name != "logit_scale"}
        report = Report([*report.mapped, TEMPERATURE], new, dropped)
    return Imported(config, {name: found[name] for name in own}, report)


def read_config_of(folder: Path, source: str) -> Any:
    """transformers' config of a BLIP-2 or InstructBLIP folder.

    Raises: ValueError when there is none, or it is another model's, or its Q-Former is not one that ours can stand for.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} has no config.json; expected what save_pretrained of a transformers model leaves")
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{source}: its config.json cannot be read ({_one_line(error)})") from None
    if config.model_type not in LAYOUTS:
        known = " or ".join(repr(name) for name in LAYOUTS)
        raise ValueError(
            f"{source} is a {config.model_type!r} ({_class(config)}), "
            f"expected model_type {known}; an image encoder or language model alone goes into encoder.id or llm.id"
        )
    given = config.qformer_config.to_dict()
    required = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute"}
    for key, value in required.items():
        if given.get(key, value) != value:
            raise ValueError(
                f"{source}: qformer_config.{key} is {given[key]!r}, but this Q-Former always has {value!r}; "
                "it would compute something else with those weights"
            )
    return config


def config_of(theirs: Any, source: str, retrieval: bool, revision: str | None = None) -> Any:
    """Our config of a checkpoint of transformers, from its own config.

    Args:
        source: hub id or folder that the frozen parts are to be loaded from.
        retrieval: stage 1 (Blip2ForImageTextRetrieval) and not stage 2.
    """
    text, qformer = theirs.text_config, theirs.qformer_config
    values: dict[str, Any] = {
        "encoder": {"loader": "transformers", "id": source, "revision": revision, "block": -1},
        "qformer": {
            "layers": qformer.num_hidden_layers,
            "width": qformer.hidden_size,
            "heads": qformer.num_attention_heads,
            "ffn_width": qformer.intermediate_size,
            "queries": theirs.num_query_tokens,
            "cross_attention_frequency": qformer.cross_attention_frequency,
            "dropout": float(qformer.hidden_dropout_prob),
            "max_text_positions": qformer.max_position_embeddings,
            "max_text_tokens": min(32, qformer.max_position_embeddings),
            "feature_norm_eps": theirs.vision_config.layer_norm_eps,
        },
    }
    if retrieval:
        values["qformer"]["contrastive_width"] = theirs.image_text_hidden_size
    else:
        values["llm"] = {"id": source, "revision": revision, "activation": _activation(text)}
        values["stage2"] = {"instructed": theirs.model_type == "instructblip"}
    return from_values(Stage1Part if retrieval else Stage2Part, values, source)


def adapter_like(config: Any, theirs: Any) -> Stage1Adapter | Stage2Adapter:
    """The adapter that the checkpoint holds, without memory for its tensors (meta) but for stage 1's heads, drawn anew."""
    sizes, encoder_width = config.qformer, theirs.vision_config.hidden_size
    reads_text = config.stage == "stage1" or config.stage2.instructed
    vocab_size = theirs.qformer_config.vocab_size if reads_text else None
    adapter = empty_adapter(config, encoder_width, theirs.text_config.hidden_size, vocab_size)
    if config.stage == "stage2":
        return adapter
    temperature = config.stage1.temperature  # transformers has no place for it, nor for the language head
    return Stage1Adapter(
        adapter.qformer, encoder_width=encoder_width, contrastive_width=sizes.contrastive_width, dec_id=0,
        temperature=temperature,
    )  # fmt: skip


def _activation(text: Any) -> str | None:
    """T5's activation where it is not the one that its class derives: BLIP-2's FlanT5 was run with the exact gelu."""
    if text.model_type != "t5":
        return None
    derived = type(text)(feed_forward_proj=text.feed_forward_proj).dense_act_fn
    return None if text.dense_act_fn == derived else text.dense_act_fn


def _folder(id_or_folder: str, revision: str | None) -> tuple[Path, str]:
    """Where its files lie, and what to load its frozen parts by: the hub id, or the whole path of a folder."""
    path = Path(id_or_folder).expanduser()
    if path.is_dir():
        return path.resolve(), str(path.resolve())
    if path.is_file() or id_or_folder.startswith(("/", ".", "~")):
        found = "is a file" if path.is_file() else "does not exist"
        raise ValueError(f"{id_or_folder} {found}; expected a folder that save_pretrained wrote, or a hub id")
    try:
        return Path(snapshot_download(id_or_folder, revision=revision, allow_patterns=FILES)), id_or_folder
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{id_or_folder!r} is no folder here, and no hub id that can be reached or is in the cache "
            f"({_one_line(error)}); check its spelling, or download it and name its folder"
        ) from None


def _tokenizer(folder: Path, source: str, instructed: bool) -> tuple[str, int] | None:
    """`qformer.tokenizer` and how many tokens it has with [DEC]; None where the checkpoint has none of BERT's shape."""
    # A hub id cannot name a folder inside a repository: the downloaded one has to do.
    place, name = (folder / "qformer_tokenizer",) * 2 if instructed else (folder, source)
    if not any((place / file).is_file() for file in ("tokenizer.json", "vocab.txt")):
        return None
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise ValueError(f"{place} has a tokenizer that cannot be loaded ({_one_line(error)})") from None
    if not all((tokenizer.cls_token, tokenizer.sep_token, tokenizer.pad_token)):
        return None
    return str(name), len(tokenizer) + (DEC not in tokenizer.get_vocab())


def _class(config: Any) -> str:
    return ", ".join(config.architectures or ["no class named"])


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:160]


def _fit_vocabulary(tensors: dict[str, Tensor], report: Report, rows: int) -> Report:
    """Give the word embeddings a row for every token: a processor adds `<image>` without one, sizes may be padded."""
    words = tensors[WORDS]
    if rows == len(words):
        return report
    added = torch.empty(max(rows - len(words), 0), words.shape[1]).normal_(std=0.02)
    tensors[WORDS] = torch.cat([words[:rows], added])
    if LM_BIAS in tensors:
        tensors[LM_BIAS] = tensors[LM_BIAS].new_zeros(rows)
    if len(added):
        return report._replace(new=[*report.new, f"{WORDS} from row {len(words)}"])
    return report._replace(dropped={**report.dropped, f"{WORDS} from row {rows}": "no token has these ids"})


class _Weights(Mapping[str, Tensor]):
    """The tensors of a folder by name, float32, each read from its shard when asked for."""

    def __init__(self, folder: Path, source: str) -> None:
        self.source, self.opened = source, dict[Path, Any]()
        self.shards = self._shards(folder)
        for path in set(self.shards.values()):
            if not path.is_file():
                raise ValueError(f"{source} lacks {path.name}, which its index names; download it again")

    def _shards(self, folder: Path) -> dict[str, Path]:
        index, whole = folder / "model.safetensors.index.json", folder / "model.safetensors"
        if index.is_file():
            try:
                return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
            except (ValueError, KeyError, AttributeError) as error:
                raise ValueError(f"{index} is no index of safetensors ({error}); download it again") from None
        if whole.is_file():
            return dict.fromkeys(self._open(whole).keys(), whole)
        raise ValueError(
            f"{self.source} has no model.safetensors; expected the weights as safetensors: pickles (pytorch_model.bin) "
            "are not opened, load them with transformers once and save_pretrained the model"
        )

    def _open(self, path: Path) -> Any:
        try:
            return self.opened.get(path) or self.opened.setdefault(path, safe_open(path, "pt"))
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path} cannot be read as safetensors ({error}); it is damaged or incomplete") from None

    def __getitem__(self, name: str) -> Tensor:
        path = self.shards[name]
        try:
            return self._open(path).get_tensor(name).float()
        except SafetensorError as error:
            raise ValueError(f"{path} has no {name}, which its index names ({error}); download it again") from None

    def __contains__(self, name: object) -> bool:
        return name in self.shards

    def __iter__(self) -> Iterator[str]:
        return iter(self.shards)

    def __len__(self) -> int:
        return len(self.shards)
