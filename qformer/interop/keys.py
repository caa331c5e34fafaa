"""The tables of LAVIS and transformers: where they keep the tensors of an adapter.

Source: the state dicts of LAVIS's Blip2Qformer, Blip2OPT and Blip2T5, and of transformers' Blip2 and InstructBlip classes.
"""

from typing import Any, NamedTuple

from torch import Tensor

from qformer.keys import TIED, Layout, Report, block_names, embeddings_names, language_head_names


class Imported(NamedTuple):
    """Another library's checkpoint as one of our adapters: its config, its tensors by our names, and what became of each."""

    config: Any
    tensors: dict[str, Tensor]
    report: Report


def lavis(language_projection: str = "opt_proj") -> Layout:
    """LAVIS, whose projection is called opt_proj, t5_proj, llm_proj or (vicuna) llm_proj."""
    return Layout(
        "LAVIS",
        {
            "qformer.query_tokens": "query_tokens",
            "feature_norm": "ln_vision",
            **embeddings_names("Qformer.bert.embeddings", "Qformer.bert.embeddings.LayerNorm"),
            **language_head_names("Qformer.cls.predictions"),
            "image_projection": "vision_proj",
            "text_projection": "text_proj",
            "itm_head": "itm_head",
            "temperature": "temp",
            "language_projection": language_projection,
        },
        "Qformer.bert.encoder.layer.{}.",
        block_names("self"),
        {**TIED, r"(opt|t5|llm)_model\..*": "the frozen language model is that of llm.id"},
    )


def blip2(embeddings: str = "embeddings", norm: str = "qformer.layernorm") -> Layout:
    """transformers' Blip2 classes; InstructBlip keeps its embeddings inside the Q-Former."""
    return Layout(
        "transformers",
        {
            "qformer.query_tokens": "query_tokens",
            "feature_norm": "vision_model.post_layernorm",
            **embeddings_names(embeddings, norm),
            "image_projection": "vision_projection",
            "text_projection": "text_projection",
            "itm_head": "itm_head",
            "language_projection": "language_projection",
        },
        "qformer.encoder.layer.{}.",
        block_names("attention"),
        {
            r"vision_model\.(embeddings|encoder)\..*": "the frozen encoder stays in its checkpoint",
            r"language_model\..*": "the frozen language model stays in its checkpoint",
            r"qformer\.encoder\.layer\.\d+\.(intermediate|output)\..*": "of a text side that generation does not use",
            r"logit_scale": "it becomes the temperature, exp(-logit_scale)",
            r".*\.position_ids": "a count from 0, no weight",
        },
    )


BLIP2, INSTRUCT_BLIP = blip2(), blip2("qformer.embeddings", "qformer.embeddings.layernorm")
