"""Language models that read with an encoder and write with a decoder."""

from typing import final

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qformer.language.frozen import FrozenLanguageModel, padding_last, reorder
from qformer.text import IGNORE_INDEX, encode, pad_rows


@final
class EncoderDecoder(FrozenLanguageModel):
    """The encoder reads [visual prompt][text prompt], the decoder writes the target with EOS."""

    is_encoder_decoder = True

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__(model, tokenizer, name)
        start_id = self._special_ids["decoder_start_token_id"]
        if start_id is None:
            raise ValueError(
                f"llm.id={name!r}: decoder_start_token_id=None; expected the id its decoder starts from (T5: the pad "
                "id, 0). Set it in the model's generation_config.json"
            )
        self._start_id: int = start_id
        end_id = tokenizer.eos_token_id if self.facts.eos_id is None else self.facts.eos_id
        self._end_id = self._stop_ids[0] if end_id is None else end_id

    def _row(self, prompt: str, target: str, max_target_tokens: int) -> tuple[list[int], list[int]]:
        target_ids = self.facts.bos_ids + encode(self.tokenizer, target)
        return self._framed(prompt), [*target_ids[: max_target_tokens - 1], self._end_id]  # EOS survives the cut

    def _framed(self, prompt: str) -> list[int]:
        end = [] if self.facts.eos_id is None else [self.facts.eos_id]
        return self.facts.bos_ids + encode(self.tokenizer, prompt) + end

    def _logits_and_labels(
        self, visual_prompt: Tensor | None, prompt_mask: Tensor | None, rows: list[tuple[list[int], list[int]]]
    ) -> tuple[Tensor, Tensor]:
        embeds, mask = self._encoder_inputs(visual_prompt, prompt_mask, [context for context, _ in rows])
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

    def _start(
        self, visual_prompt: Tensor | None, prompt_mask: Tensor | None, prompts: list[str]
    ) -> tuple[Tensor, Tensor]:
        return self._encoder_inputs(visual_prompt, prompt_mask, [self._framed(prompt) for prompt in prompts])

    def _encoder_inputs(
        self, visual_prompt: Tensor | None, prompt_mask: Tensor | None, ids: list[list[int]]
    ) -> tuple[Tensor, Tensor]:
        embeds, mask = self._join(visual_prompt, prompt_mask, ids)
        # Relative positions are index distances: padding between queries and text would shift them.
        return (embeds, mask) if prompt_mask is None else reorder(embeds, mask, padding_last(mask))
