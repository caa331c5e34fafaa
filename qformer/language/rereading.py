"""Generation without a cache: any model that takes embeddings can answer."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel


class _Rereads:
    """What `generate` of transformers asks of a model, answered without a cache: every token reads the whole row anew."""

    def prepare_inputs_for_generation(
        self: Any,
        input_ids: Tensor,
        inputs_embeds: Tensor | None = None,
        attention_mask: Tensor | None = None,
        **_: Any,
    ) -> dict[str, Any]:
        assert inputs_embeds is not None
        embeds = inputs_embeds
        if input_ids.shape[1]:
            embeds = torch.cat([inputs_embeds, self.get_input_embeddings()(input_ids)], 1)
        if attention_mask is None:
            attention_mask = torch.ones(embeds.shape[:2], dtype=torch.long, device=embeds.device)
        return {**self.inputs_of(embeds, attention_mask.bool()), "use_cache": False}

    def _prepare_cache_for_generation(self, *_: Any, **__: Any) -> None:
        """No cache."""


def rereading(model: PreTrainedModel, inputs_of: Callable[[Tensor, Tensor], dict[str, Tensor]]) -> PreTrainedModel:
    """The same decoder-only model, its weights shared, whose `generate` keeps nothing from token to token.

    Args:
        inputs_of: arguments of `forward` for float[B, L, Dl] and the mask bool[B, L].
    """
    twin = copy.copy(model)
    twin.__class__ = type(type(model).__name__, (_Rereads, type(model)), {"inputs_of": staticmethod(inputs_of)})
    return twin
