"""Language models that read and write in one row."""

import copy
import logging
from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from qformer.language.frozen import FrozenLanguageModel, Prompt
from qformer.language.memory import SharedStart, for_beams, keys_values
from qformer.language.trial import shares_starts
from qformer.language.visual import VisualRows
from qformer.text import IGNORE_INDEX, encode, mask_context, pad_rows, split_prompt

logger = logging.getLogger(__name__)


@final
class DecoderOnly(FrozenLanguageModel):
    """One row holds everything: [visual prompt][BOS text prompt target line-end].

    Without a text prompt BOS is itself a target, predicted from the last query, as in the reference. Without a line-end
    token EOS ends the target. In a chat: [template][visual prompt][prompt template][answer end-of-turn].
    """

    is_encoder_decoder = False

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, chat: bool = False
    ) -> None:  # fmt: skip
        super().__init__(model, tokenizer, name, chat)
        self._repeats = False  # whether `remember` keeps keys and values that may be repeated; known once it was called
        self._shares: bool | None = None  # whether `read_alike` serves; None = not yet tried
        line_end_id = self.facts.line_end_id
        if self.chat is not None:
            self._end_id = self._stop_ids[0] if self.chat.end_id is None else self.chat.end_id
            return
        if line_end_id is None:
            logger.warning("llm.id=%r: no single token ends a line; targets end with EOS instead", name)
        self._end_id = self._stop_ids[0] if line_end_id is None else line_end_id

    def _row(self, prompt: Prompt, target: str, max_target_tokens: int) -> tuple[list[int], list[int]]:
        if self.chat is not None:
            _, after = self.chat.split(self._turns(prompt))
            context, target_ids = split_prompt(self.tokenizer, after, target, self.chat.seam)
        else:
            context, target_ids = split_prompt(self.tokenizer, str(prompt), target)
            if context:
                context = self.facts.bos_ids + context
            else:
                target_ids = self.facts.bos_ids + target_ids
        return context, [*target_ids, self._end_id][:max_target_tokens]

    def _logits_and_labels(
        self, visual: VisualRows, before: list[list[int]], rows: list[tuple[list[int], list[int]]]
    ) -> tuple[Tensor, Tensor]:
        embeds, mask = self._join(visual, before, [context + target for context, target in rows])
        label_rows = [
            [IGNORE_INDEX] * (len(ids) + n) + mask_context(*row)
            for n, ids, row in zip(visual.lengths, before, rows, strict=True)
        ]
        next_labels = pad_rows(label_rows, IGNORE_INDEX, width=embeds.shape[1])[0][:, 1:]
        positions = (next_labels != IGNORE_INDEX).any(0).nonzero()[:, 0]
        inputs = {**self.inputs_of(embeds, mask), "use_cache": False}
        if "logits_to_keep" in self._forward_arguments:
            logits = self.model(**inputs, logits_to_keep=positions.to(embeds.device)).logits
            if logits.shape[1] == embeds.shape[1] != len(positions):  # accepted and not heeded
                logits = logits[:, positions.to(logits.device)]
        else:
            logits = self.model(**inputs).logits
            logits = logits[:, positions.to(logits.device)]
        return logits, next_labels[:, positions]

    def inputs_of(self, embeds: Tensor, mask: Tensor) -> dict[str, Tensor]:
        inputs = super().inputs_of(embeds, mask)
        if "position_ids" in self._forward_arguments:
            inputs["position_ids"] = (mask.long().cumsum(1) - 1).clamp(min=0)
        return inputs

    def next_logits(self, embeds: Tensor, mask: Tensor) -> Tensor:
        return self.model(**self.inputs_of(embeds, mask), use_cache=False).logits[:, -1]

    def _read_ahead(self, embeds: Tensor, mask: Tensor, config: GenerationConfig, alike: int) -> dict[str, Any]:
        """Keys and values of all positions but the last, once for what rows have alike, then repeated for their beams."""
        copies = max(config.num_beams or 1, config.num_return_sequences or 1)
        start = SharedStart.of(embeds, mask, alike) if alike and len(embeds) > 1 else None
        cache = self.read_alike(start, embeds, mask) if start is not None and self._try_sharing() else None
        if cache is None and (copies > 1 or self._repeats):
            memory = self.remember(embeds, mask)
            cache = None if memory is None else memory[0]
        if cache is None:
            return {}
        if (kept := keys_values(cache)) is not None:
            return {"past_key_values": for_beams(kept, copies, config.max_new_tokens or 0)}
        cache.batch_repeat_interleave(copies)
        return {"past_key_values": cache}

    def read_alike(self, start: SharedStart, embeds: Tensor, mask: Tensor) -> DynamicCache | None:
        """Keys and values of all positions of rows but the last, their starts read once; None where more is kept."""
        ones = torch.ones(start.embeds.shape[:2], dtype=torch.bool, device=embeds.device)
        output = self.model(**self.inputs_of(start.embeds, ones), **self._no_logits(), use_cache=True)
        if (kept := keys_values(output.get("past_key_values"))) is None:
            return None
        cache = start.spread(kept)
        if (before := cache.get_seq_length()) < embeds.shape[1] - 1:
            self._read_on(cache, embeds[:, before:-1], mask[:, :-1], **self._no_logits())
        return cache

    def _try_sharing(self) -> bool:
        """Whether rows go on from a start that was read once for all of them. Tried once."""
        if self._shares is None:
            self._shares = shares_starts(self)
        return self._shares

    def _no_logits(self) -> dict[str, Tensor]:
        keep = torch.zeros(0, dtype=torch.long, device=self.model.device)
        return {"logits_to_keep": keep} if "logits_to_keep" in self._forward_arguments else {}

    def _read_on(self, cache: DynamicCache, embeds: Tensor, mask: Tensor, **options: Tensor) -> Any:
        """The model's output for rows whose first positions `cache` holds; `mask` covers those too."""
        inputs = self.inputs_of(embeds, mask)
        if "position_ids" in inputs:
            inputs["position_ids"] = inputs["position_ids"][:, -embeds.shape[1] :]
        return self.model(**inputs, past_key_values=cache, use_cache=True, **options)

    def remember(self, embeds: Tensor, mask: Tensor) -> tuple[DynamicCache, Tensor] | None:
        """Keys and values of all positions but the last, and the last; it is read with what comes after."""
        if embeds.shape[1] == 1:
            return None
        inputs = self.inputs_of(embeds[:, :-1], mask[:, :-1])
        cache = self.model(**inputs, **self._no_logits(), use_cache=True).get("past_key_values")
        # Another kind of memory (a state, a cache that repeats in part only) is not for us to repeat.
        self._repeats = isinstance(cache, DynamicCache) and all(
            hasattr(c, "batch_repeat_interleave") for c in cache.layers
        )
        return (cache, embeds[:, -1:]) if self._repeats else None

    def logits_after(self, memory: tuple[DynamicCache, Tensor], targets: list[list[int]]) -> Tensor:
        cache, last = copy.deepcopy(memory[0]), memory[1].expand(len(targets), -1, -1)
        before = cache.get_seq_length()
        cache.batch_repeat_interleave(len(targets))
        ids, mask = (rows.to(last.device) for rows in pad_rows([ids[:-1] for ids in targets], self.facts.pad_id))
        embeds = torch.cat([last, self.embed(ids)], 1)
        logits: Tensor = self._read_on(
            cache, embeds, torch.cat([mask.new_ones(len(targets), before + 1), mask], 1)
        ).logits
        return logits

    def logits_behind(self, cache: DynamicCache, embeds: Tensor, mask: Tensor) -> Tensor:
        """float[B, V] of the first token that follows rows, all of whose positions but the last `cache` holds."""
        logits: Tensor = self._read_on(cache, embeds[:, -1:], mask).logits[:, -1]
        return logits

    def start(self, visual: VisualRows, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        before = [self._before(prompt) for prompt in prompts]
        # The next token is read off the last position, and nothing stands between visual prompt and text.
        ids = [self._opening_ids(prompt) for prompt in prompts]
        return self._join(visual, before, ids, pads_first=True)

    def _opening_ids(self, prompt: Prompt) -> list[int]:
        if self.chat is not None:
            return encode(self.tokenizer, self.chat.split(self._turns(prompt))[1])
        return self.facts.bos_ids + encode(self.tokenizer, str(prompt))
