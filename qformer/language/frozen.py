"""What every frozen language model has in common: loss, generation, and rows of visual prompt and text."""

import functools
import inspect
import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, PreTrainedTokenizerBase
from transformers import RepetitionPenaltyLogitsProcessor as RepetitionPenalty
from transformers.activations import NewGELUActivation

from qformer.language.chat import Chat
from qformer.language.limits import Limits
from qformer.language.loss import LanguageLoss, loss_of_rows
from qformer.language.rereading import rereading
from qformer.language.sampling import SeededNucleus
from qformer.language.trial import find_problem, heeds_mask, keeps_rows
from qformer.language.visual import VisualRows
from qformer.messages import one_line
from qformer.text import IGNORE_INDEX, encode, pad_rows, probe_tokenizer

logger = logging.getLogger(__name__)
UNCUT = 10**6  # target tokens

Prompt = str | Sequence[str]
"""A text; in a chat also the turns of user and assistant, the user's first and last."""


class FrozenLanguageModel(nn.Module, ABC):
    """A language model that never learns; gradient flows through it to the visual prompt.

    Always in eval mode and without trainable parameters, whatever `train()` is called with. Takes the model over: it is
    frozen in place and its generation config is reduced to token ids, so that only arguments of `generate` decide.

    Args:
        name: hub id or folder, for messages.
        chat: prompts are a user's turns and targets the assistant's, by the tokenizer's own chat template.

    Attributes: `width` (Dl), `vocab_size`, `tokenizer`, `facts` (what the tokenizer does), `chat`, `is_encoder_decoder`.
    Raises: ValueError when the model is of the other kind, or the tokenizer does not fit it (see `probe_tokenizer`), or
        has no chat template.
    """

    is_encoder_decoder: bool

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, chat: bool = False
    ) -> None:  # fmt: skip
        super().__init__()
        if model.config.is_encoder_decoder != self.is_encoder_decoder:
            raise ValueError(
                f"llm.id={name!r}: config.is_encoder_decoder={model.config.is_encoder_decoder}; {type(self).__name__} "
                f"expects {self.is_encoder_decoder}. Use the other class, or load_language_model, which chooses"
            )
        self.name, self.tokenizer, self.facts = name, tokenizer, probe_tokenizer(tokenizer, name)
        self.vocab_size, self.width = cast(nn.Embedding, model.get_input_embeddings()).weight.shape
        self._forward_arguments = frozenset(inspect.signature(model.forward).parameters)
        self.chat = Chat(tokenizer, name) if chat else None
        self._limits = Limits(model.config.get_text_config(), self.vocab_size, tokenizer, name)
        end_id = self.chat.end_id if self.chat else None
        self._stop_ids = self._limits.stop_ids(self.facts, end_id, model.generation_config.eos_token_id)
        self._limits.require_embedded()
        self._pads_freely: bool | None = None  # whether padding leaves a row as it is; None = not yet tried
        self._remembers: bool | None = None  # whether `remember` serves; None = not yet tried
        self._rereads = False  # no cache of this model serves: every token reads its row anew
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
        self, visual_prompt: Tensor | None, prompts: Sequence[Prompt], targets: Sequence[str], *,
        max_target_tokens: int = 32, visual_mask: Tensor | None = None,
    ) -> LanguageLoss:  # fmt: skip
        """Cross-entropy of each target after its visual prompt and text prompt; not smoothed.

        Args:
            visual_prompt: float[B, Q, Dl], or None for text only.
            prompts: B texts that the loss does not cover; "" for none.
            targets: B texts to predict; a line end (decoder-only) or EOS (encoder-decoder) is appended.
            max_target_tokens: longer targets are cut; what begins or ends a text counts, as in the reference.
            visual_mask: bool[B, Q], True at the visual prompt, False where a row has fewer images; None = all of it.

        Raises: ValueError when a row needs more positions or other token ids than the model has.
        """
        _require_list(prompts, "prompts")
        _require_list(targets, "targets")
        assert len(prompts) == len(targets)
        assert max_target_tokens >= 1
        visual = VisualRows.of(visual_prompt, visual_mask, len(prompts), self.width)
        rows = [self._row(*pair, max_target_tokens) for pair in zip(prompts, targets, strict=True)]
        before = [self._before(prompt) for prompt in prompts]
        self._limits.require_room(visual.lengths, before, rows)
        lengths = {n + len(b) + len(row[0]) for n, b, row in zip(visual.lengths, before, rows, strict=True)}
        # What an encoder reads may be padded only if it heeds the mask; after a decoder's text nothing sees the padding.
        if self.is_encoder_decoder and len(lengths) > 1 and not self._try_padding():
            alone = [self._losses(visual.row(i), before[i : i + 1], [row]) for i, row in enumerate(rows)]
            totals, tokens = zip(*alone, strict=True)
            return LanguageLoss(torch.cat(totals).sum(), torch.cat(tokens).sum())
        return self._losses(visual, before, rows).sum()

    def _losses(
        self, visual: VisualRows, before: list[list[int]], rows: list[tuple[list[int], list[int]]]
    ) -> LanguageLoss:  # fmt: skip
        return loss_of_rows(*self._logits_and_labels(visual, before, rows))

    @torch.no_grad()
    def candidate_losses(
        self, visual_prompt: Tensor | None, prompt: Prompt, candidates: Sequence[str], *, batch_size: int = 64
    ) -> LanguageLoss:  # fmt: skip
        """The loss of each of K candidates after one prompt, uncut, as float32[K] and int64[K].

        The prompt is read once where the model lets it be kept, then at most `batch_size` candidates at a time.

        Args:
            visual_prompt: float[1, Q, Dl], or None for text only.

        Raises: ValueError as `loss` does.
        """
        _require_list(candidates, "candidates")
        visual = VisualRows.of(visual_prompt, None, 1, self.width)
        before, rows = self._before(prompt), [self._row(prompt, text, UNCUT) for text in candidates]
        self._limits.require_room(visual.lengths * len(rows), [before] * len(rows), rows)
        total = torch.zeros(len(rows), device=self._embedding.weight.device)
        tokens = torch.tensor([len(target) for _, target in rows], device=total.device)
        groups: dict[tuple[int, ...], list[int]] = {}  # a token that spans the seam belongs to its candidate
        for i, row in enumerate(rows):
            groups.setdefault(tuple(row[0]), []).append(i)
        for context, group in groups.items():
            memory = None
            if self._try_memory() and (visual.prompt is not None or before or context):
                memory = self.remember(*self._join(visual, [before], [list(context)]))
            for part in (group[i : i + batch_size] for i in range(0, len(group), batch_size)):
                targets = [rows[i][1] for i in part]
                if memory is None:
                    losses = self._losses(visual.repeat(len(part)), [before] * len(part), [rows[i] for i in part])
                else:
                    losses = loss_of_rows(self.logits_after(memory, targets), pad_rows(targets, IGNORE_INDEX)[0])
                total[part] = losses.total.to(total.device)
        return LanguageLoss(total, tokens)

    def count_target_tokens(
        self, prompts: Sequence[Prompt], targets: Sequence[str], *, max_target_tokens: int = 32
    ) -> int:  # fmt: skip
        """How many tokens `loss` after a visual prompt will count, without running the model."""
        pairs = zip(prompts, targets, strict=True)
        return sum(len(target) for _, target in (self._row(*pair, max_target_tokens) for pair in pairs))

    @torch.no_grad()
    def generate(
        self, visual_prompt: Tensor | None, prompts: Sequence[Prompt], *, max_new_tokens: int = 30,
        min_new_tokens: int = 0, num_beams: int = 5, length_penalty: float = 1.0, do_sample: bool = False,
        top_p: float = 0.9, temperature: float = 1.0, num_return: int = 1, repetition_penalty: float = 1.0,
        no_repeat_ngram_size: int = 0, visual_mask: Tensor | None = None, seeds: Sequence[int] | None = None,
    ) -> list[str]:  # fmt: skip
        """Continue each prompt up to EOS, a line end or `max_new_tokens`; a batch gives what each row alone gives.

        Args:
            visual_prompt: float[B, Q, Dl], or None for text only.
            prompts: B texts; "" for none.
            length_penalty: beam scores are divided by length ** length_penalty.
            do_sample: draw from the top_p nucleus at `temperature`; num_beams=1 is plain nucleus sampling.
            num_return: texts per row, best first.
            repetition_penalty: above 1, tokens that the text already holds become less likely; the prompt does not count.
            no_repeat_ngram_size: no run of so many tokens occurs twice in a text; 0 = any may.
            visual_mask: as of `loss`.
            seeds: one for each of the B * num_return texts, which then depends on its row and seed alone; by default
                torch's random state decides over the batch. For plain nucleus sampling only.

        Returns: B * num_return texts without their prompts, the texts of a row next to each other.
        Raises: PromptTooLong; ValueError for a search that cannot give `num_return` texts, or a row with nothing to start
            from.
        """
        _require_list(prompts, "prompts")
        visual = VisualRows.of(visual_prompt, visual_mask, len(prompts), self.width)
        if not do_sample and num_return > num_beams:
            raise ValueError(
                f"num_return={num_return} with num_beams={num_beams}: a search keeps one text per beam; "
                f"set num_beams to at least {num_return}, or do_sample=True"
            )
        if not prompts:
            return []
        assert seeds is None or (do_sample and num_beams == 1), "seeds are for plain nucleus sampling"
        free = do_sample and seeds is None  # with seeds: a greedy search behind what draws
        settings: dict[str, Any] = {"temperature": temperature, "top_p": top_p, "top_k": 0} if free else {}
        settings |= {"length_penalty": length_penalty, "early_stopping": False} if num_beams > 1 else {}
        settings |= {"no_repeat_ngram_size": no_repeat_ngram_size} if no_repeat_ngram_size > 0 else {}
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens or None,
            num_beams=num_beams,
            do_sample=free,
            num_return_sequences=num_return if seeds is None else 1,
            **self._special_ids,
            **settings,
        )
        before = [self._before(prompt) for prompt in prompts]
        embeds, mask = self.start(visual, prompts)
        self._limits.require_positions(embeds.shape[1], max_new_tokens, "prompt and answer may take")
        # Not by the config: there, with rows from embeddings, padding shields the first new tokens from the penalty.
        penalty = [RepetitionPenalty(repetition_penalty)] if repetition_penalty != 1 else []
        draw = functools.partial(SeededNucleus, top_p=top_p, temperature=temperature, length=max_new_tokens)
        if seeds is not None:
            embeds, mask = embeds.repeat_interleave(num_return, 0), mask.repeat_interleave(num_return, 0)
        groups = (
            [slice(None)] if bool(mask.all()) or self._try_padding() else [slice(i, i + 1) for i in range(len(mask))]
        )
        alike = 0 if len(groups) > 1 else min(n + len(b) for n, b in zip(visual.lengths, before, strict=True))
        new_ids = [
            row
            for group in groups
            for processors in [[*penalty, *([] if seeds is None else [draw(seeds[group])])]]
            for row in self._search(embeds[group], mask[group], config, processors, alike=alike)
        ]
        assert all(len(row) <= max_new_tokens for row in new_ids)
        return [self._text(row) for row in new_ids]

    def _search(
        self, embeds: Tensor, mask: Tensor, config: GenerationConfig, processors: list[Any], *, alike: int
    ) -> list[list[int]]:
        """New ids of each row, whose first `alike` positions may be another's too; of a single row without its padding."""
        if len(embeds) == 1:
            embeds, mask = embeds[:, mask[0]], mask[:, mask[0]]
        more: dict[str, Any] = {"logits_processor": LogitsProcessorList(processors)} if processors else {}
        inputs = {"inputs_embeds": embeds, "attention_mask": mask.long(), "generation_config": config, **more}
        new_ids = None
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Passing `")
            if not self._rereads:
                try:
                    ahead = self._read_ahead(embeds, mask, config, alike)
                    new_ids = cast(Any, self.model).generate(**inputs, **ahead)
                except torch.OutOfMemoryError:
                    raise
                except Exception as error:
                    if self.is_encoder_decoder:
                        raise
                    logger.warning(
                        "llm.id=%r: %s cannot search with its cache (%s); every token reads its row anew, which is slower",
                        self.name, type(self.model).__name__, one_line(error),
                    )  # fmt: skip
                    self._rereads = True
            if new_ids is None:
                model = rereading(self.model, self.inputs_of)
                new_ids = cast(Any, model).generate(**inputs)
        if self.is_encoder_decoder:
            new_ids = new_ids[:, 1:]  # the decoder's start token
        return cast(list[list[int]], new_ids.tolist())

    def require_generation(self, num_beams: int = 1) -> None:
        """Try what stage 2 will ask for: a gradient to the visual prompt, and texts by `num_beams` beams.

        Costs a few passes over rows of a few tokens; call it where the weights are, before the first step.

        Raises: ValueError when the model cannot be trained through, reads ahead, or cannot write from embeddings.
        """
        problem = find_problem(self, num_beams)
        if problem:
            raise ValueError(
                f"llm.id={self.name!r}: {type(self.model).__name__} does not serve behind a visual prompt: {problem}; "
                "set llm.id to another language model"
            )

    def _try_padding(self) -> bool:
        """Whether padding leaves a row as it is: a state that runs along the row, or a position counted from its
        beginning, reads it. Tried once.
        """
        if self._pads_freely is None:
            self._pads_freely = heeds_mask(self)
            if not self._pads_freely:
                logger.warning(
                    "llm.id=%r: %s reads padding; texts of different lengths go through it row by row",
                    self.name, type(self.model).__name__,
                )  # fmt: skip
        return self._pads_freely

    def _try_memory(self) -> bool:
        """Whether candidates after a row that is kept have the loss that they have behind it. Tried once."""
        if self._remembers is None:
            self._remembers = keeps_rows(self)
        return self._remembers

    def require_lengths(self, queries: int, prompt: str, max_target_tokens: int, *, images: int = 1) -> None:
        """Before a run: room for the `queries` of so many images, the text prompt and a target.

        Raises: ValueError when they need more positions, or the prompt other token ids, than the model has.
        """
        before, (context, _) = self._before(prompt), self._row(prompt, "", max_target_tokens)
        self._limits.require_ids([before + context])
        read = images * queries + len(before) + len(context)
        self._limits.require_positions(
            read, max_target_tokens,
            f"qformer.queries={queries}{f' of {images} images' if images > 1 else ''}, llm.prompt of {len(before) + len(context)} tokens and "
            f"llm.max_target_tokens={max_target_tokens} take",
        )  # fmt: skip

    def _turns(self, prompt: Prompt) -> list[str]:
        return [prompt] if isinstance(prompt, str) else list(prompt)

    def _before(self, prompt: Prompt) -> list[int]:
        """Ids before the visual prompt: a chat's template."""
        if self.chat is None:
            if not isinstance(prompt, str):
                raise ValueError(f"a prompt of {len(prompt)} turns needs llm.chat=true; expected a text")
            return []
        return encode(self.tokenizer, self.chat.split(self._turns(prompt))[0])

    def _text(self, new_ids: list[int]) -> str:
        end = next((i for i, token_id in enumerate(new_ids) if token_id in self._stop_ids), len(new_ids))
        text = cast(str, self.tokenizer.decode(new_ids[:end], skip_special_tokens=True))
        return text.split("\n")[0].strip()

    def _join(
        self, visual: VisualRows, before: list[list[int]], ids: list[list[int]], *, pads_first: bool = False
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Rows [before][visual prompt][text] as `VisualRows.join` has them."""
        empty = [not any(both) for both in zip(before, ids, strict=True)]
        if visual.prompt is None and any(empty):
            raise ValueError(
                f"prompts[{empty.index(True)}]='' without a visual prompt: llm.id={self.name!r} adds no token "
                "of its own to start from; expected a text prompt"
            )
        return visual.join(self._embedding, self.facts.pad_id, before, ids, pads_first=pads_first)

    @abstractmethod
    def _read_ahead(self, embeds: Tensor, mask: Tensor, config: GenerationConfig, alike: int) -> dict[str, Any]:
        """More arguments of `generate`, which would read every row again for each of its beams, and copy what it keeps."""

    @abstractmethod
    def remember(self, embeds: Tensor, mask: Tensor) -> Any:
        """What the model keeps of one row float[1, L, Dl], so that targets after it cost their own tokens; None = nothing."""

    @abstractmethod
    def logits_after(self, memory: Any, targets: list[list[int]]) -> Tensor:
        """float[n, T, V] of n targets after the row that is remembered."""

    def inputs_of(self, embeds: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Arguments of the model's `forward` for rows float[B, L, Dl] and their mask bool[B, L]."""
        return {"inputs_embeds": embeds, "attention_mask": mask.long()}

    @abstractmethod
    def _row(self, prompt: Prompt, target: str, max_target_tokens: int) -> tuple[list[int], list[int]]:
        """Ids after the visual prompt that are read, and ids that are predicted."""

    @abstractmethod
    def _logits_and_labels(
        self, visual: VisualRows, before: list[list[int]], rows: list[tuple[list[int], list[int]]]
    ) -> tuple[Tensor, Tensor]:
        """float[B, T, V] and the int64[B, T] they should predict, for the positions some row has a target at."""

    @abstractmethod
    def next_logits(self, embeds: Tensor, mask: Tensor) -> Tensor:
        """float[B, V] of the first token that follows rows float[B, L, Dl] with mask bool[B, L]."""

    @abstractmethod
    def start(self, visual: VisualRows, prompts: Sequence[Prompt]) -> tuple[Tensor, Tensor]:
        """Rows float[B, L, Dl] of visual prompt and text that `generate` continues, and their mask bool[B, L]."""


def _require_list(texts: Sequence[Prompt], name: str) -> None:
    if isinstance(texts, str):
        raise ValueError(f"{name}={texts[:40]!r} is one text; expected a list of them, one a row: [{texts[:40]!r}]")
