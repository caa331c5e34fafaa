"""The two stages as models: they hold the frozen and the trainable parts and return losses.

`Stage1Model.adapter` and `Stage2Model.adapter` hold all that learns, all that DistributedDataParallel wraps and all that
is saved. Frozen parts stay outside the adapter: they are neither broadcast nor stored, and keep themselves in eval.
"""

import random
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from qformer.contrast import Contrast, Pool, Share, contrast, contrast_apart, picture_ids
from qformer.data import Batch
from qformer.distributed import world_size
from qformer.encoders import Features, FrozenEncoder
from qformer.language import FrozenLanguageModel
from qformer.objectives import itg_loss, itm_loss, next_token_labels
from qformer.qformer import ImageMemory, QFormer
from qformer.text import IGNORE_INDEX


class Prepared(NamedTuple):
    """A micro-batch ready for `forward`: what it reads and how many target tokens its generative loss covers."""

    batch: Batch
    text: Any
    target_tokens: int
    noise_seed: int
    share: Share | None = None  # of a larger contrastive batch, after the first of two passes


class Output(NamedTuple):
    """What a forward pass returns: the loss to descend, numbers to log, and stage 1's embeddings for retrieval."""

    loss: Tensor
    metrics: dict[str, Tensor]
    image_embeds: Tensor | None = None  # float[B, Q, E]
    text_embeds: Tensor | None = None  # float[B, E]


class TextTokens(NamedTuple):
    """BERT tokens of the Q-Former's text side: int64[B, T] beginning with [CLS] and ending with [SEP], bool[B, T]."""

    ids: Tensor
    mask: Tensor


class Embedded(NamedTuple):
    """A micro-batch after the query, text and causal passes."""

    images: ImageMemory
    queries: Tensor  # float[B, Q, D]
    words: Tensor  # float[B, T, D], word embeddings
    hidden: Tensor  # float[B, T, D], causal
    image_embeds: Tensor  # float[B, Q, E]
    text_embeds: Tensor  # float[B, E]


class Stage1Adapter(nn.Module):
    """All that stage 1 trains: feature norm, Q-Former, the contrastive projections, the matching and language heads."""

    def __init__(
        self, qformer: QFormer, encoder_width: int, contrastive_width: int, dec_id: int, label_smoothing: float = 0.1,
        temperature: float = 0.07, itc: float = 1.0, itm: float = 1.0, itg: float = 1.0, feature_norm_eps: float = 1e-5,
    ) -> None:  # fmt: skip
        super().__init__()
        assert qformer.vocab_size is not None
        width = qformer.width
        self.dec_id, self.label_smoothing, self.weights = dec_id, label_smoothing, {"itc": itc, "itm": itm, "itg": itg}
        self.feature_norm = nn.LayerNorm(encoder_width, eps=feature_norm_eps)
        self.qformer = qformer
        self.image_projection = nn.Linear(width, contrastive_width)
        self.text_projection = nn.Linear(width, contrastive_width)
        self.itm_head = nn.Linear(width, 2)
        self.temperature = nn.Parameter(torch.tensor(temperature))
        self.lm_transform = nn.Linear(width, width)
        self.lm_norm = nn.LayerNorm(width, eps=1e-12)
        self.lm_bias = nn.Parameter(torch.zeros(qformer.vocab_size))
        nn.init.normal_(self.lm_transform.weight, std=0.02)
        nn.init.zeros_(self.lm_transform.bias)

    def project_images(self, features: Tensor, mask: Tensor | None) -> ImageMemory:
        """Frozen features float[B, N, Dv], bool[B, N] | None -> cross-attention keys and values."""
        return self.qformer.project_images(features, mask, self.feature_norm)

    def embed_queries(self, query_output: Tensor) -> Tensor:
        """float[B, Q, D] -> float[B, Q, E] of unit length."""
        return F.normalize(self.image_projection(query_output).float(), dim=-1)

    def embed_text(self, text: TextTokens) -> Tensor:
        """float[B, E] of unit length, from [CLS] of the text pass."""
        return self._embed_cls(self.qformer.text_pass(text.ids, text.mask, first=True))

    def _embed_cls(self, cls_output: Tensor) -> Tensor:
        return F.normalize(self.text_projection(cls_output).float(), dim=-1)

    def match(self, images: Sequence[ImageMemory], text: Tensor, text_mask: Tensor) -> Tensor:
        """Logits of no match and match float[R, 2]: the head on every query's output, averaged.

        Args:
            images: what the R texts are matched with, group after group.
            text: int64[R, T] ids, or float[R, T, D] their word embeddings; text_mask: bool[R, T].
        """
        return self.itm_head(self.qformer.matching_pass(images, text, text_mask)).float().mean(1)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """BERT's masked-LM head, tied to the word embeddings: float[..., D] -> float[..., V]."""
        assert self.qformer.word_embeddings is not None
        hidden = self.lm_norm(F.gelu(self.lm_transform(hidden)))
        return F.linear(hidden, self.qformer.word_embeddings.weight, self.lm_bias)

    def embed(self, features: Tensor, image_mask: Tensor | None, text: TextTokens) -> Embedded:
        """All that a micro-batch computes of itself alone, before its rows are compared with any other."""
        images = self.project_images(features, image_mask)
        queries = self.qformer.query_pass(images)
        words, decoded = self._embed_words(text.ids)
        text_output, hidden = self.qformer.text_and_causal_pass(words, decoded, text.mask, queries)
        image_embeds, text_embeds = self.embed_queries(queries.output), self._embed_cls(text_output[:, 0])
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        return Embedded(images, queries.output, words, hidden, image_embeds, text_embeds)

    def embed_alone(self, features: Features, text: TextTokens, dropout_seed: int) -> tuple[Tensor, Tensor]:
        """float[B, Q, E], float[B, E] without gradient, but by the kernels and the draws of a pass that has one."""
        torch.manual_seed(dropout_seed)
        found = self.embed(features.tokens, features.mask, text)
        return found.image_embeds.detach(), found.text_embeds.detach()

    def forward(
        self, features: Tensor, image_mask: Tensor | None, text: TextTokens, picture: Tensor, targets_per_rank: Tensor,
        noise_seed: int, share: Share | None = None,
    ) -> Output:  # fmt: skip
        """ITC, ITM and ITG of one micro-batch.

        Args:
            features, image_mask: float[B, N, Dv], bool[B, N] | None; without gradient.
            picture: int64[B], equal for captions of the same picture; those are no negatives of each other.
            targets_per_rank: ITG's normalizer: target tokens of the step over all ranks and micro-batches, divided by
                their number, so that every token of the step weighs the same.
            noise_seed: seed of the negatives drawn; the same on all ranks.
            share: of a contrastive batch of several micro-batches, compared before; None = compare this one.
        """
        if share is not None:
            torch.manual_seed(share.dropout_seed)
        found = self.embed(features, image_mask, text)
        embeds = (found.image_embeds, found.text_embeds, self.temperature)
        if share is None:
            contrasted = contrast(*embeds, picture, self.label_smoothing, noise_seed)
            pool = None if world_size() == 1 else Pool.of([Features(features, image_mask)], [text])
        else:
            contrasted, pool = share.contrast._replace(itc=share.itc(*embeds)), share.pool
        itm, itm_accuracy = self._itm(found, text.mask, contrasted, pool)

        labels = next_token_labels(text.ids, text.mask)
        counted = labels != IGNORE_INDEX  # the head is the widest matrix of all: only where there is a label
        itg = itg_loss(self.lm_logits(found.hidden[counted]), labels[counted], self.label_smoothing, targets_per_rank)

        losses = {"itc": contrasted.itc, "itm": itm, "itg": itg}
        metrics = {
            **losses,
            "itc_accuracy": contrasted.accuracy,
            "itm_accuracy": itm_accuracy,
            "temperature": self.temperature,
            "query_output_cosine": mean_cosine(found.queries),
        }
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        metrics = {name: value.detach() for name, value in metrics.items()}
        return Output(loss, metrics, found.image_embeds.detach(), found.text_embeds.detach())

    def _embed_words(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Word embeddings float[B, T, D] of the texts, and of the same behind [DEC]: one look-up in the large table."""
        assert self.qformer.word_embeddings is not None
        dec = ids.new_full((1,), self.dec_id)
        words, dec_word = self.qformer.word_embeddings(torch.cat([ids.flatten(), dec])).split([ids.numel(), 1])
        words = words.unflatten(0, ids.shape)
        return words, torch.cat([dec_word.expand(len(ids), 1, -1), words[:, 1:]], 1)

    def _itm(
        self, found: Embedded, text_mask: Tensor, contrasted: Contrast, pool: Pool | None
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Loss and accuracy over 3B pairs: matched, (image, negative text), (negative image, text).

        Args:
            pool: where the negatives are; None = among these very rows, so that keys, values and words are there already.
        """
        negatives, words = contrasted.negatives, found.words
        if pool is None:
            images = found.images.select(negatives.image)
            other, other_mask = words[negatives.text], text_mask[negatives.text]
        else:  # projected here: only frozen features cross ranks
            assert self.qformer.word_embeddings is not None
            features, (ids, other_mask) = pool.fetch(negatives)
            images, other = self.project_images(*features), self.qformer.word_embeddings(ids)
        longer = other.shape[1] - words.shape[1]
        own, own_mask = F.pad(words, (0, 0, 0, longer)), F.pad(text_mask, (0, longer))
        logits = self.match(
            [found.images._replace(times=2), images],
            torch.cat([own, other, own]),
            torch.cat([own_mask, other_mask, own_mask]),
        )
        batch = len(words)
        matched = torch.arange(3 * batch, device=logits.device) < batch
        counted = torch.cat([torch.ones_like(negatives.has_text), negatives.has_text, negatives.has_image])
        correct = ((logits.argmax(1) == matched) & counted).sum()
        return itm_loss(logits, matched, counted, contrasted.pairs), correct / contrasted.pairs


class Stage1Model(nn.Module):
    """A frozen encoder and stage 1's adapter.

    Args:
        tokenizer: BERT tokenizer with [DEC] as its `bos_token`.
        max_text_tokens: longest caption, [CLS] and [SEP] included.
        itc_batch_size: rows that are contrasted with each other in training; None = those that go forward at once.
    """

    def __init__(
        self, encoder: FrozenEncoder, adapter: Stage1Adapter, tokenizer: Any, max_text_tokens: int,
        itc_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.adapter, self.tokenizer, self.max_text_tokens = encoder, adapter, tokenizer, max_text_tokens
        self.itc_batch_size = itc_batch_size
        encoder.output_dtype = None  # as computed: what crosses ranks is then half the bytes of float32

    def tokenize(self, texts: list[str]) -> TextTokens:
        """Tokens of the texts, padded to the longest."""
        return tokenize(self.tokenizer, texts, next(self.adapter.parameters()).device, self.max_text_tokens)

    def prepare(self, batch: Batch, noise_seed: int) -> Prepared:
        """Tokenize the captions and count ITG's targets."""
        text = self.tokenize(batch.texts)
        return Prepared(batch, text, int(text.mask[:, 1:].sum()), noise_seed)

    def contrasted_together(self, micro_batch_size: int) -> int:
        """Micro-batches of a rank that make one contrastive batch.

        Raises: ValueError when the contrastive batch is not a multiple of what goes forward at once.
        """
        at_once = micro_batch_size * world_size()
        wanted = self.itc_batch_size or at_once
        if wanted % at_once:
            raise ValueError(
                f"stage1.itc_batch_size={wanted} must be a multiple of train.micro_batch_size={micro_batch_size} "
                f"times {world_size()} processes"
            )
        return wanted // at_once

    def contrast(self, prepared: list[Prepared]) -> list[Prepared]:
        """The first of two passes over a step's micro-batches; where each is a contrastive batch of its own, none."""
        together = self.contrasted_together(len(prepared[0].batch))
        groups = [prepared[first : first + together] for first in range(0, len(prepared), together)]
        return prepared if together == 1 else [p for group in groups for p in self._contrast_group(group)]

    def _contrast_group(self, group: list[Prepared]) -> list[Prepared]:
        adapter = self.adapter.module if isinstance(self.adapter, DistributedDataParallel) else self.adapter
        seeds = torch.randint(2**62, (len(group),)).tolist()
        features = [self.encoder(p.batch.images, p.batch.image_mask) for p in group]
        embeds = [adapter.embed_alone(f, p.text, seed) for f, p, seed in zip(features, group, seeds, strict=True)]
        shares = contrast_apart(
            features, [p.text for p in group], embeds, adapter.temperature,
            torch.cat([self._pictures(p) for p in group]), adapter.label_smoothing, group[0].noise_seed, seeds,
        )  # fmt: skip
        return [p._replace(share=share) for p, share in zip(group, shares, strict=True)]

    def _pictures(self, prepared: Prepared) -> Tensor:
        return picture_ids(prepared.batch.image_ids).to(prepared.text.ids.device)

    def forward(self, prepared: Prepared, targets_per_rank: Tensor) -> Output:
        batch, share = prepared.batch, prepared.share
        features = self.encoder(batch.images, batch.image_mask) if share is None else share.features
        picture = self._pictures(prepared)
        return self.adapter(*features, prepared.text, picture, targets_per_rank, prepared.noise_seed, share)


class Stage2Adapter(nn.Module):
    """All that stage 2 trains: feature norm, Q-Former, and the projection to the language model's width.

    A Q-Former with a text side is an instructed one: it reads the prompt beside its queries.
    Source: InstructBLIP (arXiv 2305.06500), section 2.3.
    """

    def __init__(
        self, qformer: QFormer, encoder_width: int, llm_width: int, feature_norm_eps: float = 1e-5
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
            rows: int64[R], the picture of each row, so that one under several prompts is projected once; None = 0 .. B-1.
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


class Stage2Model(nn.Module):
    """A frozen encoder, stage 2's adapter and a frozen language model.

    Args:
        prompt: text before every caption in training; not in the loss.
        max_target_tokens: tokens of a caption that the loss covers.
        tokenizer: BERT tokenizer of an instructed Q-Former; None for any other.
    """

    def __init__(
        self, encoder: FrozenEncoder, adapter: Stage2Adapter, llm: FrozenLanguageModel, prompt: str = "",
        max_target_tokens: int = 32, tokenizer: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.encoder, self.adapter, self.llm = encoder, adapter, llm
        self.prompt, self.max_target_tokens, self.tokenizer = prompt, max_target_tokens, tokenizer

    def visual_prompt(self, features: Features, prompts: list[str], rows: Tensor | None = None) -> Tensor:
        """float[R, Q, Dl] of a frozen encoder's features and R prompts, which only an instructed Q-Former reads.

        Args:
            rows: int64[R], the picture of each prompt; None = one each.
        """
        return self._ask_queries(features, prompts, rows)[0]

    def _ask_queries(self, features: Features, prompts: list[str], rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
        device = next(self.adapter.parameters()).device
        text = None if self.tokenizer is None else tokenize(self.tokenizer, prompts, device)
        return self.adapter(features.tokens, features.mask, text, rows)

    def prepare(self, batch: Batch, noise_seed: int) -> Prepared:
        """Choose prompts and targets: the caption after the prompt, or for an encoder-decoder its two parts."""
        pairs = [split_prefix(text, noise_seed) if self.llm.is_encoder_decoder else ("", text) for text in batch.texts]
        prompts = [f"{self.prompt} {prefix}".strip() for prefix, _ in pairs]
        targets = [target for _, target in pairs]
        counted = self.llm.count_target_tokens(prompts, targets, max_target_tokens=self.max_target_tokens)
        return Prepared(batch, (prompts, targets), counted, noise_seed)

    def forward(self, prepared: Prepared, targets_per_rank: Tensor) -> Output:
        prompts, targets = prepared.text
        features = self.encoder(prepared.batch.images, prepared.batch.image_mask)
        visual_prompt, query_output = self._ask_queries(features, prompts)
        found = self.llm.loss(visual_prompt, prompts, targets, max_target_tokens=self.max_target_tokens)
        loss = found.total / targets_per_rank
        return Output(loss, {"lm": loss.detach(), "query_output_cosine": mean_cosine(query_output)})


def tokenize(tokenizer: Any, texts: list[str], device: torch.device, max_tokens: int | None = None) -> TextTokens:
    """BERT tokens of the texts, cut at `max_tokens` and padded to the longest."""
    found = tokenizer(
        texts, padding=True, truncation=max_tokens is not None, max_length=max_tokens, return_tensors="pt"
    )
    return TextTokens(found["input_ids"].to(device), found["attention_mask"].bool().to(device))


@torch.no_grad()
def mean_cosine(query_output: Tensor) -> Tensor:
    """Cosine of two different queries of a picture, averaged over all pairs and pictures: float[B, Q, D] -> float32[].

    At 1 all queries say the same, at 0 they are unrelated. By the sum of the unit vectors, whose square is that of all
    pairs, so that no Q x Q matrix is made; 0 for a single query.
    """
    queries = query_output.shape[1]
    total = F.normalize(query_output.detach().float(), dim=-1).sum(1).square().sum(-1)
    return ((total - queries) / max(1, queries * (queries - 1))).mean()


def split_prefix(text: str, seed: int) -> tuple[str, str]:
    """Split a caption at a word drawn uniformly from 1 to its midpoint, as a pure function of text and seed.

    Source: BLIP-2 section 3.3, prefix language modelling. A caption of one word has no prefix.
    """
    words = text.split()
    if len(words) < 2:
        return "", text
    cut = random.Random(f"{seed} {text}").randint(1, max(1, len(words) // 2))
    return " ".join(words[:cut]), " ".join(words[cut:])
