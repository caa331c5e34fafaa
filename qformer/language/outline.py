"""What is known of a language model without its weights."""

import torch
from transformers import AutoConfig

from qformer.config import LlmConfig
from qformer.language.frozen import FrozenLanguageModel
from qformer.language.loading import load_language_model
from qformer.messages import one_line


def language_width(config: LlmConfig) -> int:
    """Dl of the language model that `llm.*` names: the width of its input embeddings.

    Raises: ValueError when its config cannot be reached.
    """
    try:
        theirs = AutoConfig.from_pretrained(
            config.id, revision=config.revision, trust_remote_code=config.trust_remote_code
        )
    except (OSError, ValueError) as error:
        raise ValueError(
            f"llm.id={config.id!r}: its config cannot be reached ({one_line(error)}); give a folder, or a hub id that can "
            "be reached or is in the cache"
        ) from None
    text = theirs.get_text_config()
    return text.word_embed_proj_dim if text.model_type == "opt" else text.hidden_size


def outline_language_model(config: LlmConfig) -> FrozenLanguageModel:
    """The language model on the meta device, with its real tokenizer, which is probed: sizes without weights or memory.

    Raises: ValueError as `load_language_model` does.
    """
    with torch.device("meta"):
        return load_language_model(
            config.id,
            revision=config.revision,
            dtype=config.dtype,
            trust_remote_code=config.trust_remote_code,
            random_weights=True,
            activation=config.activation,
        )
