"""BLIP-2 and InstructBLIP of transformers into an adapter, with the checkpoint itself as its frozen encoder and LLM.

Source: transformers' Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval, InstructBlipForConditionalGeneration.
Only the adapter's tensors are read; those of the frozen parts stay on the disk until the adapter is put to use.
"""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import StrictDataclassError
from torch import Tensor
from transformers import AutoConfig

from qformer.bert import DEC, TooManyTokens, load_tokenizer
from qformer.config import Stage1Part, Stage2Part, from_values, load_config, to_yaml
from qformer.interop.files import PICKLE, Weights
from qformer.interop.frozen import empty_adapter, require_encoder_width, require_language_width
from qformer.interop.keys import BLIP2, INSTRUCT_BLIP, Imported
from qformer.keys import Layout, Report
from qformer.messages import one_line
from qformer.models import Stage1Adapter, Stage2Adapter

# All of a hub id: the frozen parts are loaded from the same cache later.
FILES = ["*.json", "*.txt", "*.model", "model.safetensors", "model-*.safetensors", "qformer_tokenizer/*"]
LAYOUTS: dict[str, Layout] = {"blip-2": BLIP2, "instructblip": INSTRUCT_BLIP}
WORDS, LM_BIAS, TEMPERATURE = "qformer.word_embeddings.weight", "lm_bias", "temperature"
VISION_MODELS = ("blip_2_vision_model", "instructblip_vision_model")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt")
QFORMER_TOKENIZER = "qformer_tokenizer"  # InstructBLIP's folder of it
BERT_NAME, BERT_ROWS = "bert-base-uncased", 30523  # its tokens and [DEC]
MAX_PADDING = 512  # rows that embeddings may have beyond their tokens, to be a multiple of 8
HAS_NO_SLOT = ["temperature", r"lm_transform\..*", r"lm_norm\..*", "lm_bias"]  # what transformers' classes leave out


def import_blip2(id_or_folder: str, arguments: Sequence[str] = (), revision: str | None = None) -> Imported:
    """A checkpoint as a stage-2 adapter, or a stage-1 adapter where it was made for image-text retrieval.

    Args:
        id_or_folder: what `save_pretrained` wrote, or a hub id.
        arguments: YAML files and `key=value` overrides of the adapter's config, such as a tokenizer that it came without.
        revision: of the hub id.

    Raises: ValueError when it cannot be reached, is another model, is damaged or incomplete, does not fit its own config
        or the overrides, or has a Q-Former that ours cannot stand for.
    """
    folder, source = _folder(id_or_folder, revision)
    theirs, tensors = read_config_of(folder, source), Weights(folder, source)
    retrieval = "itm_head.weight" in tensors
    if not retrieval and "language_projection.weight" not in tensors:
        raise ValueError(
            f"{source} holds {_class(theirs)}, with neither language_projection nor itm_head; "
            "expected Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval or InstructBlipForConditionalGeneration"
        )
    instructed = theirs.model_type == "instructblip"
    config = overridden(config_of(theirs, source, retrieval, revision), arguments)
    notes = _require_frozen_parts(config, theirs, folder, source)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        adapter = adapter_like(config, theirs).state_dict()
        new = HAS_NO_SLOT if retrieval else ()
        taken, report = LAYOUTS[theirs.model_type].take(adapter, tensors, source, new)
        taken |= {name: adapter[name] for name in report.new}
        if retrieval or instructed:
            notes += choose_tokenizer(
                config, folder / QFORMER_TOKENIZER if instructed else folder, source, len(taken[WORDS])
            )
            report = _add_row_of_dec(taken, report, config.qformer.vocab_size)
    if retrieval and "logit_scale" in tensors:
        taken[TEMPERATURE] = (-tensors["logit_scale"]).exp().reshape(())
        new = [name for name in report.new if name != TEMPERATURE]
        dropped = {name: why for name, why in report.dropped.items() if name != "logit_scale"}
        report = Report([*report.mapped, TEMPERATURE], new, dropped)
    return Imported(config, {name: taken[name] for name in adapter}, report._replace(notes=tuple(notes)))


def overridden(config: Any, arguments: Sequence[str]) -> Any:
    """A config with YAML files and `key=value` overrides on top; raises as `load_config` does."""
    with tempfile.TemporaryDirectory() as folder:
        (path := Path(folder) / "config.yaml").write_text(to_yaml(config))
        return load_config(type(config), [str(path), *arguments])


def _require_frozen_parts(config: Any, theirs: Any, folder: Path, source: str) -> list[str]:
    """Check frozen models that were named in the place of the checkpoint's own; what has to be said of the latter.

    Raises: ValueError when they cannot be reached, or are of another width.
    """
    width, llm_width = theirs.vision_config.hidden_size, theirs.text_config.hidden_size
    if config.encoder.id != source:
        require_encoder_width(config.encoder, width, f"{source} was trained on {width} columns")
    if config.stage != "stage2":
        return []
    if config.llm.id != source:
        require_language_width(config.llm, llm_width, f"{source} projects to {llm_width} columns")
    elif not any((folder / file).is_file() for file in TOKENIZER_FILES):
        return [
            "the checkpoint has no tokenizer of its language model, without which it cannot be asked: put the tokenizer's "
            "files into its folder, or name llm.id=FOLDER_OR_ID of that language model"
        ]
    return []


def read_config_of(folder: Path, source: str) -> Any:
    """transformers' config of a BLIP-2 or InstructBLIP folder.

    Raises: ValueError when there is none, or it is another model's, or its Q-Former is not one that ours can stand for.
    """
    if not (folder / "config.json").is_file():
        raise ValueError(f"{source} has no config.json; expected what save_pretrained of a transformers model leaves")
    try:
        config: Any = AutoConfig.from_pretrained(folder)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"{source}: its config.json cannot be read ({one_line(error)})") from None
    if config.model_type not in LAYOUTS:
        known = " or ".join(repr(name) for name in LAYOUTS)
        raise ValueError(
            f"{source} is a {config.model_type!r} ({_class(config)}), "
            f"expected model_type {known}; an image encoder or language model alone goes into encoder.id or llm.id"
        )
    if (vision := config.vision_config.model_type) not in VISION_MODELS:
        raise ValueError(
            f"{source}: its vision_config is a {vision!r}, expected {' or '.join(map(repr, VISION_MODELS))}: this Q-Former "
            "was not trained on a Blip2VisionModel; convert its language model and encoder by name (encoder.id, llm.id)"
        )
    settings = config.qformer_config.to_dict()
    required = {"hidden_act": "gelu", "layer_norm_eps": 1e-12, "position_embedding_type": "absolute"}
    for key, value in required.items():
        if settings.get(key, value) != value:
            raise ValueError(
                f"{source}: qformer_config.{key} is {settings[key]!r}, but this Q-Former always has {value!r}; "
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
        values["qformer"] |= {"contrastive_width": theirs.image_text_hidden_size, "tokenizer": ""}
    else:
        values["llm"] = {"id": source, "revision": revision, "activation": _activation(text)}
        values["stage2"] = {"instructed": theirs.model_type == "instructblip"}
        values["qformer"] |= {"tokenizer": ""} if values["stage2"]["instructed"] else {}
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
        state = "is a file" if path.is_file() else "does not exist"
        raise ValueError(f"{id_or_folder} {state}; expected a folder that save_pretrained wrote, or a hub id")
    try:
        folder = Path(snapshot_download(id_or_folder, revision=revision, allow_patterns=FILES))
        if not any(folder.glob("model*.safetensors")):  # of before safetensors
            folder = Path(
                snapshot_download(id_or_folder, revision=revision, allow_patterns=[*FILES, f"{PICKLE[:-4]}*.bin"])
            )
        return folder, id_or_folder
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{id_or_folder!r} is no folder here, and no hub id that can be reached or is in the cache "
            f"({one_line(error)}); check its spelling, or download it and name its folder"
        ) from None


def choose_tokenizer(config: Any, place: Path, source: str, rows: int) -> list[str]:
    """Set `qformer.tokenizer` and `qformer.vocab_size` in a config, and say where that is not the checkpoint's own.

    Args:
        place: folder in which the checkpoint keeps the tokenizer of its Q-Former.
        rows: word embeddings of the checkpoint.

    Raises: ValueError when the config names a tokenizer that does not fit them.
    """
    qformer = config.qformer
    if qformer.tokenizer:
        qformer.vocab_size = _rows_with_dec(qformer.tokenizer, rows)
        if qformer.vocab_size is None:
            raise ValueError(
                f"qformer.tokenizer={qformer.tokenizer!r} does not fit the {rows} word embeddings of {source}; name the "
                "tokenizer that it was trained with, or '' for none"
            )
        return []
    notes = []
    if any((place / file).is_file() for file in TOKENIZER_FILES):
        # A hub id names its own folder; one inside it has to be the downloaded one.
        name = source if place.name != QFORMER_TOKENIZER else str(place)
        qformer.vocab_size = _rows_with_dec(str(place), rows)
        if qformer.vocab_size is not None:
            qformer.tokenizer = name
            return []
        notes = [f"the tokenizer of the checkpoint does not fit its {rows} word embeddings, so it is left out"]
    qformer.vocab_size = rows
    if rows == BERT_ROWS:
        qformer.tokenizer = BERT_NAME
        return [
            *notes,
            f"the checkpoint has no tokenizer: {BERT_NAME} is taken, whose tokens are as many as its {rows} rows",
        ]
    return [
        *notes,
        f"the checkpoint has no tokenizer for its {rows} word embeddings, and none is named: this adapter reads no text "
        "before qformer.tokenizer=FOLDER_OR_ID names one",
    ]


def _rows_with_dec(name: str, rows: int) -> int | None:
    """Word embeddings that a tokenizer needs with [DEC]: `rows`, or one more for it; None where it fits neither."""
    for vocab_size in (rows, rows + 1):
        try:
            tokenizer = load_tokenizer(name, vocab_size)
        except TooManyTokens:
            continue
        unused = vocab_size - 1 - max(tokenizer.get_vocab().values())
        if vocab_size > rows:
            return vocab_size if tokenizer.bos_token_id == rows else None
        return rows if unused == 0 or (rows % 8 == 0 and unused < MAX_PADDING) else None
    return None


def _add_row_of_dec(tensors: dict[str, Tensor], report: Report, rows: int) -> Report:
    """Give [DEC] a word embedding where a checkpoint has none: text generation begins with it, and only stage 1 trains it."""
    words = tensors[WORDS]
    if rows == len(words):
        return report
    tensors[WORDS] = torch.cat([words, torch.empty(rows - len(words), words.shape[1]).normal_(std=0.02)])
    if LM_BIAS in tensors:
        tensors[LM_BIAS] = tensors[LM_BIAS].new_zeros(rows)
    return report._replace(new=[*report.new, f"{WORDS} row {rows - 1}, of {DEC}"])


def _class(config: Any) -> str:
    return ", ".join(config.architectures or ["no class named"])
