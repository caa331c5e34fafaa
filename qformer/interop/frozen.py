"""The adapter of a config, empty on the meta device or filled from a checkpoint, between frozen parts of its widths."""

from typing import Any

import torch

from qformer.config import EncoderConfig, LlmConfig
from qformer.encoders import encoder_width
from qformer.interop.keys import Imported
from qformer.language import language_width
from qformer.models import Stage1Adapter, Stage2Adapter
from qformer.qformer import QFormer


def require_encoder_width(config: EncoderConfig, width: int, of: str) -> None:
    """Raise ValueError unless `encoder.*` names an encoder of a checkpoint's width; `of` says whose that is."""
    if (named := encoder_width(config)) != width:
        raise ValueError(
            f"encoder.id={config.id!r} is {named} wide, but {of}; "
            "name the encoder that it was trained with (BLIP-2: configs/encoder/eva_g.yaml, 1408)"
        )


def require_language_width(config: LlmConfig, width: int, of: str) -> None:
    """Raise ValueError unless `llm.*` names a language model of a checkpoint's width; `of` says whose that is."""
    if (named := language_width(config)) != width:
        raise ValueError(
            f"llm.id={config.id!r} is {named} wide, but {of}; name the language model that it was trained with"
        )


def empty_adapter(
    config: Any, encoder_width: int, language_width: int | None, vocab_size: int | None
) -> Stage1Adapter | Stage2Adapter:
    """The adapter of `config` on the meta device: names and shapes without memory."""
    sizes = config.qformer
    with torch.device("meta"):
        qformer = QFormer(
            width=sizes.width,
            layers=sizes.layers,
            heads=sizes.heads,
            ffn_width=sizes.ffn_width,
            queries=sizes.queries,
            encoder_width=encoder_width,
            cross_attention_frequency=sizes.cross_attention_frequency,
            vocab_size=vocab_size,
            max_text_positions=sizes.max_text_positions,
        )
        if config.stage == "stage1":
            return Stage1Adapter(
                qformer, encoder_width=encoder_width, contrastive_width=sizes.contrastive_width, dec_id=0
            )
        assert language_width is not None
        return Stage2Adapter(qformer, encoder_width=encoder_width, llm_width=language_width)


def filled_adapter(imported: Imported) -> Stage1Adapter | Stage2Adapter:
    """The adapter that holds the imported tensors themselves; the widths of its neighbours are read from them.

    Raises: ValueError when the config has been given other sizes since.
    """
    config, tensors, _ = imported
    words, projection = (tensors.get(f"{n}.weight") for n in ("qformer.word_embeddings", "language_projection"))
    adapter = empty_adapter(
        config,
        len(tensors["feature_norm.weight"]),
        None if projection is None else len(projection),
        None if words is None else len(words),
    )
    try:
        adapter.load_state_dict(tensors, assign=True)
    except RuntimeError as error:
        reason = str(error).splitlines()[-1].strip()
        raise ValueError(
            f"the config does not fit the checkpoint ({reason}); leave the sizes in qformer.* out"
        ) from None
    return adapter
