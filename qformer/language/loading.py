"""From a config's values to a frozen language model."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    MODEL_FOR_CAUSAL_LM_MAPPING,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    GenerationConfig,
    PreTrainedConfig,
)
from transformers.activations import ACT2FN

from qformer.config import DTYPES
from qformer.language.decoder_only import DecoderOnly
from qformer.language.encoder_decoder import EncoderDecoder
from qformer.language.frozen import FrozenLanguageModel
from qformer.messages import nearest, one_line
from qformer.parts import WHOLE, load_frozen, torch_dtype


def load_language_model(
    id: str,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    trust_remote_code: bool = False,
    random_weights: bool = False,
    activation: str | None = None,
    quantise: str = "no",
    chat: bool = False,
) -> FrozenLanguageModel:
    """Load a causal or sequence-to-sequence language model of transformers; its config says which.

    Args:
        id: hub id or folder, with its tokenizer; of a whole BLIP-2 or InstructBLIP only the language model is read, of
            another multimodal model (Gemma 3, LLaVA) its text model is taken out.
        dtype: of the frozen weights: "float32", "bfloat16" or "float16".
        random_weights: build the architecture from its config with weights drawn from seed 0.
        activation: T5's `dense_act_fn` in place of its own.
        quantise: "8bit" or "4bit" (NF4) by bitsandbytes, on this process's own GPU, computing in `dtype`; "no".
        chat: prompts are a user's turns, targets the assistant's, by the tokenizer's own chat template.

    Raises: ValueError when `dtype` is unknown, `quantise` goes without CUDA, bitsandbytes or weights, model or tokenizer is
        not found or no language model, `activation` is for a model without one, weights are missing, or the tokenizer
        does not fit (see `probe_tokenizer`) or has no chat template.
    """
    weights_dtype = torch_dtype("llm.dtype", dtype, DTYPES)
    if quantise != "no":
        _require_quantisable(quantise, random_weights)
    source: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    with _errors_named(id):
        config = AutoConfig.from_pretrained(id, **source)
        part = "language_model" if config.model_type in WHOLE else None
        tokenizer = AutoTokenizer.from_pretrained(id, **source)
    whole = None if part or random_weights else _multimodal_class(config)
    config = config.text_config if part or _multimodal_class(config) else config
    if activation is not None:
        _set_activation(config, activation, id)
    auto_class = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with _errors_named(id):
        if random_weights:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = auto_class.from_config(config, dtype=weights_dtype, trust_remote_code=trust_remote_code)
        else:
            source |= {"dtype": weights_dtype} | quantisation(quantise, weights_dtype)
            model = load_frozen(whole or auto_class, id, None if whole else config, part, **source)
            model = _text_model(model, auto_class, config) if whole else model
    if part:  # the ids that generation starts from are the language model's; the checkpoint's own file may lack them
        model.generation_config = GenerationConfig.from_model_config(config)
    return (EncoderDecoder if config.is_encoder_decoder else DecoderOnly)(model, tokenizer, id, chat)


def _multimodal_class(config: Any) -> Any:
    """The class of a whole multimodal model whose text model is a causal one of transformers; None for any other."""
    text = getattr(config, "text_config", None)
    if not isinstance(text, PreTrainedConfig) or type(text) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        return None
    return AutoModelForImageTextToText if type(config) in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else None


def _text_model(whole: Any, auto_class: Any, config: Any) -> Any:
    """The causal language model inside a multimodal one, its weights as they are; the rest is let go."""
    with torch.device("meta"):
        model = auto_class.from_config(config)
    body = whole.get_decoder()
    inner = getattr(model, model.base_model_prefix)
    if type(body) is not type(inner):
        raise ValueError(f"{type(whole).__name__} holds a {type(body).__name__}; expected a {type(inner).__name__}")
    setattr(model, model.base_model_prefix, body)
    model.set_output_embeddings(whole.get_output_embeddings())
    model.generation_config = whole.generation_config
    return model


def quantisation(quantise: str, dtype: torch.dtype) -> dict[str, Any]:
    """What `from_pretrained` is told to quantise by, nothing for "no"."""
    if quantise == "no":
        return {}
    settings = {"load_in_8bit": True} if quantise == "8bit" else {
        "load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype
    }  # fmt: skip
    return {"quantization_config": BitsAndBytesConfig(**settings), "device_map": {"": torch.cuda.current_device()}}


def _require_quantisable(quantise: str, random_weights: bool) -> None:
    key = f"llm.quantise={quantise}"
    if quantise not in ("8bit", "4bit"):
        raise ValueError(f"{key}: expected no, 8bit or 4bit")
    if random_weights:
        raise ValueError(
            f"{key} with llm.random_weights=true: only weights that are read can be quantised; set it to no"
        )
    if not torch.cuda.is_available():
        raise ValueError(
            f"{key} needs a CUDA GPU, and none is found; set llm.quantise=no (llm.dtype=bfloat16 halves it)"
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ValueError(f"{key} needs bitsandbytes: pip install 'qformer[quantised]', or set llm.quantise=no")


def _set_activation(config: Any, activation: str, id: str) -> None:
    if not hasattr(config, "dense_act_fn"):
        raise ValueError(
            f"llm.activation={activation!r}: llm.id={id!r} is a {config.model_type}, which has no dense_act_fn; only T5 "
            "has. Set it to null"
        )
    if activation not in ACT2FN:
        raise ValueError(
            f"llm.activation={activation!r} is no activation of transformers; {nearest(activation, ACT2FN, 3)}"
        )
    config.dense_act_fn = activation


@contextmanager
def _errors_named(id: str) -> Iterator[None]:
    try:
        yield
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise ValueError(f"llm.id={id!r}: {_why(id)} (transformers says: {one_line(error)})") from error


def _why(id: str) -> str:
    if Path(id).is_dir():
        return (
            "the folder holds no language model that transformers can load; expected config.json, tokenizer and "
            "weights of a causal or sequence-to-sequence model, set llm.random_weights=true to go without "
            "weights, or llm.trust_remote_code=true if it brings its own code"
        )
    return (
        "neither a folder here nor a language model that can be fetched or is in the cache; check the spelling and "
        "llm.revision, download it while online and set llm.id to its folder, or set llm.trust_remote_code=true if it "
        "brings its own code"
    )
