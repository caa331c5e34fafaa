"""Language models that read with an encoder and write with a decoder."""

from collections.abc import Sequence
from typing import Any, final

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutput

from qformer.language.frozen import FrozenLanguageModel, Prompt
from qformer.language.memory import for_decoder_beams
from qformer.language.visual import VisualRows
from qformer.text import IGNORE_INDEX, encode, pad_rows


@final
class EncoderDecoder(FrozenLanguageModel):
    """The encoder reads [visual prompt][text prompt], the decoder writes the target with EOS.

    In a chat the encoder reads the template up to where the answer begins.
    """

    is_encoder_decoder = True

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, chat: bool = False
    ) -> None:  # fmt: skip
        super().__init__(model, tokenizer, name, chat)
        start_id = self._special_ids["decoder_start_token_id"]
        if start_id is None:
            raise ValueError(
                f"llm.id={name!r}: decoder_start_token_id=None; expected the id its decoder starts from (T5: the pad "
                "id, 0). Set it in the model's generation_config.json"
            )
        self._start_id: int = start_id
        end_id = tokenizer.eos_token_id if self.facts.eos_id is None else self.facts.eos_id
        if self.chat is not None and self.chat.end_id is not None:
            end_id = self.chat.end_id
        self._end_id = self._stop_ids[0] if end_id is None else end_id

    def _row(self, prompt: Prompt, target: str, max_target_tokens: int) -> tuple[list[int], list[int]]:
        target_ids = self.facts.bos_ids + encode(self.tokenizer, target)
        return self._framed(prompt), [*target_ids[: max_target_tokens - 1], self._end_id]  # EOS survives the cut

    def _framed(self, prompt: Prompt) -> list[int]:
        if self.chat is not None:
            return encode(self.tokenizer, self.chat.split(self._turns(prompt))[1])
        end = [] if self.facts.eos_id is None else [self.facts.eos_id]
        return self.facts.bos_ids + encode(self.tokenizer, str(prompt)) + end

    def _logits_and_labels(
        self, visual: VisualRows, before: list[list[int]], rows: list[tuple[list[int], list[int]]]
    ) -> tuple[Tensor, Tensor]:
        embeds, mask = self._join(visual, before, [context for context, _ in rows])
        targets = [target for _, target in rows]
        labels, _ = pad_rows(targets, IGNORE_INDEX)
        decoder_ids, _ = pad_rows([[self._start_id, *target[:-1]] for target in targets], self.facts.pad_id)
        logits = self.model(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            decoder_input_ids=decoder_ids.to(embeds.device),
            use_cache=False,
        ).logits
        return logits, labels

    def _read_ahead(self, embeds: Tensor, mask: Tensor, config: GenerationConfig, alike: int) -> dict[str, Any]:
        """Room for what the decoder keeps; what it keeps of the encoder's output all beams of a row share."""
        room = config.max_new_tokens or 0
        return {"past_key_values": for_decoder_beams(room)} if (config.num_beams or 1) > 1 else {}

    def remember(self, embeds: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder makes of the row."""
        return self.model.get_encoder()(inputs_embeds=embeds, attention_mask=mask.long()).last_hidden_state, mask.long()

    def logits_after(self, memory: tuple[Tensor, Tensor], targets: list[list[int]]) -> Tensor:
        hidden, mask = memory
        decoder_ids, _ = pad_rows([[self._start_id, *target[:-1]] for target in targets], self.facts.pad_id)
        logits: Tensor = self.model(
            encoder_outputs=BaseModelOutput(last_hidden_state=hidden.expand(len(targets), -1, -1)),
            attention_mask=mask.expand(len(targets), -1),
            decoder_input_ids=decoder_ids.to(hidden.device),
            use_cache=False,
        ).logits
        return logits

    def next_logits(self, embeds: Tensor, mask: Tensor) -> Tensor:
        start = torch.full((len(embeds), 1), self._start_id, device=embeds.device)
        return self.model(
            inputs_embeds=embeds, attention_mask=mask.long(), decoder_input_ids=start, use_cache=False
        ).logits[:, -1]

    def start(self, visual: VisualRows, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        before = [self._before(prompt) for prompt in prompts]
        return self._join(visual, before, [self._framed(prompt) for prompt in prompts])
