"""Stage 2, generative learning: the Q-Former learns to prompt a frozen language model, by that model's own loss.

Source: BLIP-2 (arXiv 2301.12597), section 3.3.
"""

from typing import Any, Literal, NamedTuple, final

import torch
from torch import Tensor, nn

from qformer.data import Batch, RecordDataset
from qformer.encoders import Features, FrozenEncoder
from qformer.language import FrozenLanguageModel
from qformer.language.visual import VisualRows
from qformer.metrics.queries import describe_queries
from qformer.models.batch import TextTokens, split_prefix, tokenize
from qformer.models.stage import Output, Prepared, Stage
from qformer.qformer import QFormer
from qformer.text import PROMPTS, continue_prompt


class PromptsAndTargets(NamedTuple):
    """What the language model is given of each row beside the visual prompt, and what it is to say."""

    prompts: list[str]
    targets: list[str]


class Stage2Adapter(nn.Module):
    """All that stage 2 trains: feature norm, Q-Former, and the projection to the language model's width.

    A Q-Former with a text side is an instructed one: it reads the prompt beside its queries.
    Source: InstructBLIP (arXiv 2305.06500), section 2.3.

    Args:
        encoder_width, llm_width: Dv of the frozen features, Dl of the language model.
        feature_norm_eps: of the LayerNorm on the features.
    """

    def __init__(
        self, qformer: QFormer, *, encoder_width: int, llm_width: int, feature_norm_eps: float = 1e-5
    ) -> None:  # fmt: skip
        super().__init__()
        self.feature_norm = nn.LayerNorm(encoder_width, eps=feature_norm_eps)
        self.qformer = qformer
        if (unread := qformer.layers[-1].text_ffn) is not None:
            unread.requires_grad_(False)  # of the last layer only the queries are read: no gradient would ever come
        self.language_projection = nn.Linear(qformer.width, llm_width)

    def forward(
        self, features: Tensor, image_mask: Tensor | None, text: TextTokens | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Frozen features float[B, N, Dv], bool[B, N] | None -> visual prompt float[R, Q, Dl], query output float[R, Q, D].

        Args:
            text: the prompts of an instructed Q-Former, R of them; None for any other.
            rows: int64[R], the image of each row, so that one under several prompts is projected once; None = 0 .. B-1.
        """
        assert (text is None) == (self.qformer.vocab_size is None), "an instructed Q-Former takes a text, others none"
        images = self.qformer.project_images(features, image_mask, self.feature_norm, once=text is None or rows is None)
        if text is None:
            output = self.qformer.query_pass(images).output
            visual_prompt = self.language_projection(output)
            return (visual_prompt, output.detach()) if rows is None else (visual_prompt[rows], output.detach()[rows])
        images = images if rows is None else images.select(rows)
        output = self.qformer.matching_pass([images], text.ids, text.mask)
        return self.language_projection(output), output.detach()


@final
class Stage2(Stage[PromptsAndTargets]):
    """A frozen encoder, stage 2's adapter and a frozen language model.

    The forward pass of a micro-batch:

    1. encode the images, without gradient (or read them from the feature cache): `image_features` float[B, N, Dv];
    2. `feature_norm`, and keys and values for every cross-attention layer;
    3. query pass of the Q-Former, beside the prompt where it is instructed: `query_output` float[B, Q, D];
    4. `language_projection`: `visual_prompt` float[B, Q, Dl];
    5. the frozen language model reads visual prompt, prompt and target, and predicts the target.

    Args:
        prompt: text before every caption in training that has none of its own; not in the loss.
        vqa_prompt: of a question, {} in its place; "" = BLIP-2's for this kind of model, in a chat the question alone.
        max_target_tokens: tokens of a caption that the loss covers.
        sample_max_new_tokens: longest caption that validation shows.
        tokenizer: BERT tokenizer of an instructed Q-Former; None for any other.
    """

    name: Literal["stage2"] = "stage2"
    adapter: Stage2Adapter
    transferred: Any = None  # checkpoint.Transfer: what stage 1's adapter gave this one

    def __init__(
        self, encoder: FrozenEncoder, adapter: Stage2Adapter, llm: FrozenLanguageModel, *, prompt: str = "",
        vqa_prompt: str = "", max_target_tokens: int = 32, sample_max_new_tokens: int = 30, tokenizer: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.adapter, self.llm = encoder, adapter, llm
        self.prompt, self.max_target_tokens, self.tokenizer = prompt, max_target_tokens, tokenizer
        self.sample_max_new_tokens = sample_max_new_tokens
        blip2 = PROMPTS["vqa_encoder_decoder" if llm.is_encoder_decoder else "vqa_decoder_only"]
        self.vqa_prompt = vqa_prompt or ("{}" if llm.chat is not None else blip2)

    def frozen(self) -> dict[str, nn.Module]:
        return {"encoder": self.encoder, "llm": self.llm.model}

    def use_training_kernels(self, device: torch.device, mixed_precision: str) -> None:
        self.llm.use_training_kernels(device, mixed_precision)

    def require_data(self, dataset: RecordDataset) -> None:
        if (images := dataset.most_images) > 1:  # now, and not when the first of them comes
            queries = self.adapter.qformer.query_tokens.shape[1]
            self.llm.require_lengths(queries, self.prompt, self.max_target_tokens, images=images)

    @torch.no_grad()
    def prompt_embeds(self, features: Features, prompts: list[str], rows: Tensor | None = None) -> list[Tensor]:
        """What the language model reads of each row, float[L, Dl]: visual prompt and text, in a chat inside its template.

        A server of that model alone is sent it.

        Args:
            features, prompts, rows: as of `visual_prompt`.
        """
        visual_prompt = self.visual_prompt(features, prompts, rows)
        visual = VisualRows.of(visual_prompt, self.visual_mask(rows), len(prompts), self.llm.width)
        embeds, real = self.llm.start(visual, prompts)
        return [row[of_row] for row, of_row in zip(embeds, real, strict=True)]

    def visual_prompt(self, features: Features, prompts: list[str], rows: Tensor | None = None) -> Tensor:
        """float[R, Q, Dl] of a frozen encoder's features and R prompts, which only an instructed Q-Former reads.

        Args:
            rows: int64[R], the image of each prompt; None = one each. int64[R, K] for several, whose visual prompts
                stand one after the other, float[R, K * Q, Dl]; -1 where a row has fewer, see `visual_mask`.
        """
        return self._ask_queries(features, prompts, rows=rows)[0]

    def visual_mask(self, rows: Tensor | None) -> Tensor | None:
        """bool[R, K * Q], True where the `visual_prompt` of `rows` is an image's; None = everywhere."""
        if rows is None or rows.ndim == 1:
            return None
        return (rows >= 0).repeat_interleave(self.adapter.qformer.query_tokens.shape[1], 1)

    def _ask_queries(
        self, features: Features, prompts: list[str], adapter: nn.Module | None = None, rows: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        device = next(self.adapter.parameters()).device
        text = None if self.tokenizer is None else tokenize(self.tokenizer, prompts, device)
        adapter = self.adapter if adapter is None else adapter
        if rows is None or rows.ndim == 1:
            output: tuple[Tensor, Tensor] = adapter(features.tokens, features.mask, text, rows)
            return output
        row, place = (rows >= 0).nonzero(as_tuple=True)
        text = None if text is None else TextTokens(text.ids[row], text.mask[row])
        each, query_output = adapter(features.tokens, features.mask, text, rows[row, place])
        visual_prompt = each.new_zeros(*rows.shape, *each.shape[1:])
        visual_prompt[row, place] = each
        return visual_prompt.flatten(1, 2), query_output

    def prepare(self, batch: Batch, seed: int) -> Prepared[PromptsAndTargets]:
        """Choose prompts and targets: a text after its own prompt, or after `prompt`, for an encoder-decoder in two parts."""
        pairs = zip(batch.prompts or [None] * len(batch), batch.texts, strict=True)
        prompts, targets = map(list, zip(*(self._split(prompt, text, seed) for prompt, text in pairs), strict=True))
        counted = self.llm.count_target_tokens(prompts, targets, max_target_tokens=self.max_target_tokens)
        return Prepared(batch, PromptsAndTargets(prompts, targets), counted, seed)

    def _split(self, prompt: str | None, text: str, seed: int) -> tuple[str, str]:
        if prompt is not None:
            return prompt, text
        splits = self.llm.is_encoder_decoder and self.llm.chat is None  # in a chat the whole caption is the answer
        prefix, target = split_prefix(text, seed) if splits else ("", text)
        return continue_prompt(self.prompt, prefix), target

    def forward(
        self, prepared: Prepared[PromptsAndTargets], targets_per_rank: Tensor, adapter: nn.Module | None = None
    ) -> Output:  # fmt: skip
        prompts, targets = prepared.text
        rows = prepared.batch.image_of
        visual_prompt, query_output = self._ask_queries(self.encode(prepared.batch), prompts, adapter, rows)
        lm = self.llm.loss(
            visual_prompt, prompts, targets, max_target_tokens=self.max_target_tokens,
            visual_mask=self.visual_mask(rows),
        )  # fmt: skip
        loss = lm.total / targets_per_rank
        return Output(loss, {"lm": loss.detach(), **describe_queries(query_output)})

    def sample(self, prepared: Prepared[PromptsAndTargets], count: int = 4) -> list[dict[str, str]]:
        batch = prepared.batch.first(count)
        prompts = [self.prompt if p is None else p for p in batch.prompts or [None] * len(batch)]
        visual_prompt = self.visual_prompt(self.encode(batch), prompts, batch.image_of)
        with torch.autocast(visual_prompt.device.type, enabled=False):
            texts = self.llm.generate(
                visual_prompt.float(), prompts, num_beams=1, max_new_tokens=self.sample_max_new_tokens,
                visual_mask=self.visual_mask(batch.image_of),
            )  # fmt: skip
        rows = zip(texts, batch.texts, batch.image_ids, prompts, strict=True)
        asked = bool(batch.prompts)  # of each record something else
        return [
            {"generated": generated, "caption": caption, "image_id": image_id, **({"prompt": prompt} if asked else {})}
            for generated, caption, image_id, prompt in rows
        ]
