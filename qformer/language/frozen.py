"""What every frozen language model has in common: loss, generation, and rows of visual prompt and text."""

import inspect
from abc import ABC, abstractmethod
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.activations import NewGELUActivation

from qformer.text import IGNORE_INDEX, pad_rows, probe_tokenizer


class LanguageLoss(NamedTuple):
    """Cross-entropy of the target tokens and how many there are; the caller normalises over ranks and micro-batches."""

    total: Tensor
    """float32[]: summed over all target tokens (float32[B], per row, with reduction "none")."""
    tokens: Tensor
    """int64[]: target tokens counted (int64[B] with reduction "none")."""


class PromptTooLong(ValueError):
    """What stands before an answer, and the answer, need more positions than the language model has."""


class FrozenLanguageModel(nn.Module, ABC):
    """A language model that never learns; gradient flows through it to the visual prompt.

    Always in eval mode and without trainable parameters, whatever `train()` is called with. Takes the model over: it is
    frozen in place and its generation config is reduced to token ids, so that only arguments of `generate` decide.

    Args:
        name: hub id or folder, for messages.

    Attributes: `width` (Dl), `vocab_size`, `tokenizer`, `facts` (what the tokenizer does), `is_encoder_decoder`.
    Raises: ValueError if the model is of the other kind, or the tokenizer does not fit it (see `probe_tokenizer`).
    """

    is_encoder_decoder: bool

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> None:
        super().__init__()
        if model.config.is_encoder_decoder != self.is_encoder_decoder:
            raise ValueError(
                f"llm.id={name!r}: config.is_encoder_decoder={model.config.is_encoder_decoder}; {type(self).__name__} "
                f"expects {self.is_encoder_decoder}. Use the other class, or load_language_model, which chooses"
            )
        self.name, self.tokenizer, self.facts = name, tokenizer, probe_tokenizer(tokenizer, name)
        self.vocab_size, self.width = cast(nn.Embedding, model.get_input_embeddings()).weight.shape
        self._forward_arguments = frozenset(inspect.signature(model.forward).parameters)
        self._stop_ids = [i for i in (tokenizer.eos_token_id, self.facts.line_end_id) if i is not None]
        for what, token_id in (("pad", self.facts.pad_id), *(("end", i) for i in self._stop_ids)):
            if token_id >= self.vocab_size:
                raise ValueError(
                    f"llm.id={name!r}: the tokenizer's {what} token has id {token_id}, the model embeds ids below "
                    f"{self.vocab_size}; set that token to one of the model's vocabulary (a pad can be the EOS token) "
                    "and save the tokenizer in the model's folder"
                )
        if not self._stop_ids:
            raise ValueError(
                f"llm.id={name!r}: its tokenizer has neither an EOS token nor one token for a line end; expected one, "
                "or no text would ever end. Set tokenizer.eos_token, save it in the model's folder, and set llm.id to "
                "that folder"
            )
        self._special_ids: dict[str, Any] = {
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": self._stop_ids,
            "pad_token_id": self.facts.pad_id,
            "decoder_start_token_id": model.generation_config.decoder_start_token_id,
        }
        # A checkpoint's own sampling or penalty settings would fill in whatever `generate` leaves open: keep only ids.
        model.generation_config = GenerationConfig(**self._special_ids)
        self.model = model.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> "FrozenLanguageModel":
        """Stay in eval mode: a frozen model has no dropout."""
        super().train(False)
        return self

    @property
    def _embedding(self) -> nn.Embedding:
        return cast(nn.Embedding, self.model.get_input_embeddings())

    def use_training_kernels(self, device: torch.device, mixed_precision: str) -> None:
        """Compute the same functions by kernels whose gradient is cheap; results differ by rounding only.

        T5's `gelu_new` becomes PyTorch's own (transformers' takes eight kernels and keeps six tensors as wide as the
        feed-forward network). On CPUs in bfloat16 attention is plain products: the fused one's gradient is far slower.
        """
        if device.type == "cpu" and mixed_precision == "bf16":
            self.model.set_attn_implementation("eager")
        for module in list(self.model.modules()):
            for name, child in module.named_children():
                if isinstance(child, NewGELUActivation):
                    setattr(module, name, nn.GELU(approximate="tanh"))

    def embed(self, input_ids: Tensor) -> Tensor:
        """Input embeddings: int64[B, T] -> float[B, T, Dl]."""
        return self._embedding(input_ids)

    def loss(
        self,
        visual_prompt: Tensor | None,
        prompts: list[str],
        targets: list[str],
        *,
        prompt_mask: Tensor | None = None,
        max_target_tokens: int = 32,
        reduction: str = "sum",
    ) -> LanguageLoss:
        """Cross-entropy of each target after its visual prompt and text prompt; not smoothed.

        Args:
            visual_prompt: float[B, Q, Dl], or None for text only.
            prompts: B texts that the loss does not cover; "" for none.
            targets: B texts to predict; a line end (decoder-only) or EOS (encoder-decoder) is appended.
            prompt_mask: bool[B, Q], False on queries that are padding; at least one True per row.
            max_target_tokens: longer targets are cut; what begins or ends a text counts, as in the reference.
            reduction: "sum" over all tokens, "mean" over all tokens, or "none": one sum per row.

        Raises: ValueError for another `reduction`.
        """
        if reduction not in ("sum", "mean", "none"):
            raise ValueError(f"reduction={reduction!r}: expected 'sum', 'mean' or 'none'")
        assert len(prompts) == len(targets)
        assert max_target_tokens >= 1
        _check_visual_prompt(visual_prompt, prompt_mask, len(prompts), self.width)
        rows = [self._row(*pair, max_target_tokens) for pair in zip(prompts, targets, strict=True)]
        logits, labels = self._logits_and_labels(visual_prompt, prompt_mask, rows)
        labels = labels.to(logits.device)
        losses = F.cross_entropy(logits.float().transpose(1, 2), labels, ignore_index=IGNORE_INDEX, reduction="none")
        totals, tokens = losses.sum(1), (labels != IGNORE_INDEX).sum(1)
        if reduction == "none":
            return LanguageLoss(totals, tokens)
        return LanguageLoss(totals.sum() / tokens.sum() if reduction == "mean" else totals.sum(), tokens.sum())

    def count_target_tokens(
        self,
        prompts: list[str],
        targets: list[str],
        *,
        max_target_tokens: int = 32,
        with_visual_prompt: bool = True,
    ) -> int:
        """How many tokens `loss` will count, without running the model.

        Args:
            with_visual_prompt: False if `loss` will get None: the first token of a row is then predicted from nothing.
        """
        rows = [self._row(*pair, max_target_tokens) for pair in zip(prompts, targets, strict=True)]
        unpredicted = not (with_visual_prompt or self.is_encoder_decoder)
        return sum(len(target) - (unpredicted and not context) for context, target in rows)

    @torch.no_grad()
    def generate(
        self,
        visual_prompt: Tensor | None,
        prompts: list[str],
        *,
        prompt_mask: Tensor | None = None,
        max_new_tokens: int = 30,
        min_new_tokens: int = 0,
        num_beams: int = 5,
        length_penalty: float = 1.0,
        do_sample: bool = False,
        top_p: float = 0.9,
        temperature: float = 1.0,
        num_return: int = 1,
    ) -> list[str]:
        """Continue each prompt up to EOS, a line end or `max_new_tokens`; a batch gives what each row alone gives.

        Args:
            visual_prompt: float[B, Q, Dl], or None for text only.
            prompts: B texts; "" for none.
            prompt_mask: bool[B, Q], False on queries that are padding; at least one True per row.
            length_penalty: beam scores are divided by length ** length_penalty.
            do_sample: draw from the top_p nucleus at `temperature`; num_beams=1 is plain nucleus sampling.
            num_return: texts per row, best first.

        Returns: B * num_return texts without their prompts, the texts of a row next to each other.
        Raises: PromptTooLong; ValueError for a search that cannot give `num_return` texts, or a row with nothing to start
            from.
        """
        _check_visual_prompt(visual_prompt, prompt_mask, len(prompts), self.width)
        if not do_sample and num_return > num_beams:
            raise ValueError(
                f"num_return={num_return} with num_beams={num_beams}: a search keeps one text per beam; "
                f"set num_beams to at least {num_return}, or do_sample=True"
            )
        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": 0} if do_sample else {}
        settings |= {"length_penalty": length_penalty, "early_stopping": False} if num_beams > 1 else {}
        embeds, mask = self._start(visual_prompt, prompt_mask, prompts)
        length = embeds.shape[1] + (0 if self.is_encoder_decoder else max_new_tokens)
        positions = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or length
        if length > positions:
            raise PromptTooLong(f"prompt and answer may take {length} positions; the language model has {positions}")
        new_ids = cast(Any, self.model).generate(
            inputs_embeds=embeds,
            attention_mask=mask.long(),
            **self._read_ahead(embeds, mask, max(num_beams, num_return)),
            generation_config=GenerationConfig(
                max_new_tokens=max_new_tokens,
                min_new_tokens=min_new_tokens or None,
                num_beams=num_beams,
                do_sample=do_sample,
                num_return_sequences=num_return,
                **self._special_ids,
                **settings,
            ),
        )
        if self.is_encoder_decoder:
            new_ids = new_ids[:, 1:]  # the decoder's start token
        assert new_ids.shape[1] <= max_new_tokens
        return [self._text(row) for row in new_ids.tolist()]

    def _text(self, new_ids: list[int]) -> str:
        end = next((i for i, token_id in enumerate(new_ids) if token_id in self._stop_ids), len(new_ids))
        text = cast(str, self.tokenizer.decode(new_ids[:end], skip_special_tokens=True))
        return text.split("\n")[0].strip()

    def _join(
        self, visual_prompt: Tensor | None, prompt_mask: Tensor | None, ids: list[list[int]], *, left: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Rows [visual prompt][text] as float[B, L, Dl] and their mask bool[B, L].

        Padding follows the text, or with `left` stands between visual prompt and text:

            left=False  [v v a b]     left=True  [v v a b]
                        [v v a .]                [v v . a]
        """
        device = self._embedding.weight.device
        text_ids, mask = (rows.to(device) for rows in pad_rows(ids, self.facts.pad_id, left=left))
        embeds = self.embed(text_ids)
        if visual_prompt is None:
            if not all(ids):
                raise ValueError(
                    f"prompts[{ids.index([])}]='' without a visual prompt: llm.id={self.name!r} adds no token "
                    "of its own to start from; expected a text prompt"
                )
            return embeds, mask
        visual_mask = mask.new_ones(visual_prompt.shape[:2]) if prompt_mask is None else prompt_mask.to(device)
        embeds = torch.cat([visual_prompt.to(embeds), embeds], 1)
        return embeds, torch.cat([visual_mask, mask], 1)

    def _read_ahead(self, embeds: Tensor, mask: Tensor, copies: int) -> dict[str, Any]:
        """More arguments of `generate`, which would read every row again for each of its `copies`."""
        return {}

    @abstractmethod
    def _row(self, prompt: str, target: str, max_target_tokens: int) -> tuple[list[int], list[int]]:
        """Ids that are given, and ids that are predicted."""

    @abstractmethod
    def _logits_and_labels(
        self, visual_prompt: Tensor | None, prompt_mask: Tensor | None, rows: list[tuple[list[int], list[int]]]
    ) -> tuple[Tensor, Tensor]:
        """float[B, T, V] and the int64[B, T] they should predict, for the positions some row has a target at."""

    @abstractmethod
    def _start(
        self, visual_prompt: Tensor | None, prompt_mask: Tensor | None, prompts: list[str]
    ) -> tuple[Tensor, Tensor]:
        """float[B, L, Dl] and bool[B, L] to generate from."""


def _check_visual_prompt(visual_prompt: Tensor | None, prompt_mask: Tensor | None, rows: int, width: int) -> None:
    assert visual_prompt is None or (visual_prompt.shape[0], visual_prompt.shape[2]) == (rows, width)
    if prompt_mask is not None:
        assert visual_prompt is not None
        assert prompt_mask.shape == visual_prompt.shape[:2]
        assert bool(prompt_mask.any(1).all()), "every row needs a query that is not padding"


def padding_last(mask: Tensor) -> Tensor:
    """Positions int64[B, L] in the order that puts the True ones of bool[B, L] first, otherwise as they were."""
    return mask.int().argsort(dim=1, descending=True, stable=True)


def reorder(embeds: Tensor, mask: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """float[B, L, Dl] and bool[B, L] with the positions int64[B, L] in that order."""
    return embeds.take_along_dim(order[..., None], 1), mask.take_along_dim(order, 1)
