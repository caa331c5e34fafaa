"""Language models that read and write in one row."""

import logging
from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from qformer.language.frozen import FrozenLanguageModel, padding_last, reorder
from qformer.text import IGNORE_INDEX, encode, mask_context, pad_rows, split_prompt

logger = logging.getLogger(__name__)


@final
class DecoderOnly(FrozenLanguageModel):
    """One row holds everything: [visual prompt][BOS text prompt target line-end].

    Without a text prompt BOS is itself a target, predicted from the last query, as in the reference. Without a line-end
    token EOS ends the target.
    """

    is_encoder_decoder = False

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__(model, tokenizer, name)
        line_end_id = self.facts.line_end_id
        if line_end_id is None:
            logger.warning("llm.id=%r: no single token ends a line; targets end with EOS instead", name)
        self._end_id = self._stop_ids[0] if line_end_id is None else line_end_id

    def _row(self, prompt: str, target: str, max_target_tokens: int) -> tuple[list[int], list[int]]:
        context, target_ids = split_prompt(self.tokenizer, prompt, target)
        if context:
            context = self.facts.bos_ids + context
        else:
            target_ids = self.facts.bos_ids + target_ids
        return context, [*target_ids, self._end_id][:max_target_tokens]

    def _logits_and_labels(
        self, visual_prompt: Tensor | None, prompt_mask: Tensor | None, rows: list[tuple[list[int], list[int]]]
    ) -> tuple[Tensor, Tensor]:
        embeds, mask = self._join(visual_prompt, prompt_mask, [context + target for context, target in rows])
        if prompt_mask is not None:
            # Padded queries move to the end: the last real query is what the first text token is predicted from.
            embeds, mask = reorder(embeds, mask, padding_last(mask))
            lengths = prompt_mask.sum(1).tolist()
        else:
            lengths = [0 if visual_prompt is None else visual_prompt.shape[1]] * len(rows)
        label_rows = [[IGNORE_INDEX] * n + mask_context(*row) for n, row in zip(lengths, rows, strict=True)]
        next_labels = pad_rows(label_rows, IGNORE_INDEX, width=embeds.shape[1])[0][:, 1:]
        positions = (next_labels != IGNORE_INDEX).any(0).nonzero()[:, 0]
        inputs = {**self._inputs(embeds, mask), "use_cache": False}
        if "logits_to_keep" in self._forward_arguments:
            logits = self.model(**inputs, logits_to_keep=positions.to(embeds.device)).logits
        else:
            logits = self.model(**inputs).logits
            logits = logits[:, positions.to(logits.device)]
        return logits, next_labels[:, positions]

    def _inputs(self, embeds: Tensor, mask: Tensor) -> dict[str, Tensor]:
        inputs = {"inputs_embeds": embeds, "attention_mask": mask.long()}
        if "position_ids" in self._forward_arguments:
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        return inputs

    def _read_ahead(self, embeds: Tensor, mask: Tensor, copies: int) -> dict[str, Any]:
        """Keys and values of all positions but the last, computed once a row and then repeated for its beams."""
        if copies == 1 or embeds.shape[1] == 1:
            return {}
        inputs = self._inputs(embeds[:, :-1], mask[:, :-1])
        if "logits_to_keep" in self._forward_arguments:
            inputs["logits_to_keep"] = torch.zeros(0, dtype=torch.long, device=embeds.device)
        cache = self.model(**inputs, use_cache=True).past_key_values
        if not isinstance(cache, DynamicCache):  # another kind of memory, which `generate` builds itself
            return {}
        cache.batch_repeat_interleave(copies)
        return {"past_key_values": cache}

    def _start(
        self, visual_prompt: Tensor | None, prompt_mask: Tensor | None, prompts: list[str]
    ) -> tuple[Tensor, Tensor]:
        rows = [self.facts.bos_ids + encode(self.tokenizer, prompt) for prompt in prompts]
        embeds, mask = self._join(visual_prompt, prompt_mask, rows, left=True)
        # The next token is read off the last position. Where no text stands there (no BOS, no prompt), the row's
        # padding goes to the front instead.
        as_is = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        return reorder(embeds, mask, torch.where(mask[:, -1:], as_is, mask.int().argsort(dim=1, stable=True)))
