"""What a config's frozen parts are like, from their own configs and without a weight, and the adapter between them."""

from typing import Any

import torch
from transformers import AutoConfig

from qformer.config import EncoderConfig, LlmConfig
from qformer.interop.keys import Imported
from qformer.messages import one_line
from qformer.models import Stage1Adapter, Stage2Adapter
from qformer.qformer import QFormer


def encoder_width(config: EncoderConfig) -> int:
    """Dv of the encoder that `encoder.*` names.

    Raises: ValueError when its config cannot be reached.
    """
    if config.loader == "features":
        assert config.width is not None
        return config.width
    if config.loader == "transformers":
        found = _auto_config("encoder.id", config.id, config.revision)
        return (found.vision_config if "vision_config" in found.sub_configs else found).hidden_size
    import open_clip
    import timm

    try:
        given = open_clip.get_model_config(config.id if ":" in config.id else config.id.replace("/", "-"))
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"encoder.id={config.id!r}: its config cannot be reached ({one_line(error)})") from None
    if given is None:
        raise ValueError(f"encoder.id={config.id!r} is no model of open_clip; see open_clip.list_models()")
    vision = given["vision_cfg"]
    if "timm_model_name" in vision:
        with torch.device("meta"):
            tower: Any = timm.create_model(vision["timm_model_name"])
        return tower.embed_dim
    return vision.get("width", 768)  # open_clip's own default


def language_width(config: LlmConfig) -> int:
    """Dl of the language model that `llm.*` names: the width of its input embeddings.

    Raises: ValueError when its config cannot be reached.
    """
    text = _auto_config("llm.id", config.id, config.revision, config.trust_remote_code).get_text_config()
    return text.word_embed_proj_dim if text.model_type == "opt" else text.hidden_size


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


def _auto_config(key: str, id: str, revision: str | None, trust_remote_code: bool = False) -> Any:
    try:
        return AutoConfig.from_pretrained(id, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{key}={id!r}: its config cannot be reached ({one_line(error)}); give a folder, or a hub id that can be "
            "reached or is in the cache"
        ) from None
