"""The two stages as models: they hold the frozen and the trainable parts and return losses.

`Stage1Model.adapter` and `Stage2Model.adapter` are all that learns, all that DistributedDataParallel wraps and all that
is saved. Frozen parts stay outside the adapter: they are neither broadcast nor stored, and keep themselves in eval.
"""

import hashlib
import random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.data import Batch
from qformer.distributed import gather, gather_padded, rank, sum_over_ranks, world_size
from qformer.encoders import Features, FrozenEncoder
from qformer.language import FrozenLanguageModel
from qformer.objectives import draw_hard_negatives, itc_loss, itg_loss, itm_loss, next_token_labels, similarity
from qformer.qformer import ImageMemory, QFormer
from qformer.text import IGNORE_INDEX


class Prepared(NamedTuple):
    """A micro-batch ready for `forward`: what it reads and how many target tokens its generative loss covers."""

    batch: Batch
    text: Any
    target_tokens: int
    noise_seed: int


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
        return self.qformer.project_images(self.feature_norm(features.to(self.feature_norm.weight.dtype)), mask)

    def embed_queries(self, query_output: Tensor) -> Tensor:
        """float[B, Q, D] -> float[B, Q, E] of unit length."""
        return F.normalize(self.image_projection(query_output).float(), dim=-1)

    def embed_text(self, text: TextTokens) -> Tensor:
        """float[B, E] of unit length, from [CLS] of the text pass."""
        hidden = self.qformer.text_pass(text.ids, text.mask, rows=1)[:, 0]
        return F.normalize(self.text_projection(hidden).float(), dim=-1)

    def match(self, images: ImageMemory, text: TextTokens) -> Tensor:
        """Logits of no match and match float[B, 2]: the head on every query's output, averaged."""
        return self.itm_head(self.qformer.matching_pass(images, text.ids, text.mask)).float().mean(1)

    def lm_logits(self, hidden: Tensor) -> Tensor:
        """BERT's masked-LM head, tied to the word embeddings: float[..., D] -> float[..., V]."""
        assert self.qformer.word_embeddings is not None
        hidden = self.lm_norm(F.gelu(self.lm_transform(hidden)))
        return F.linear(hidden, self.qformer.word_embeddings.weight, self.lm_bias)

    def forward(
        self, features: Tensor, image_mask: Tensor | None, text: TextTokens, picture: Tensor, targets_per_rank: Tensor,
        noise_seed: int,
    ) -> Output:  # fmt: skip
        """ITC, ITM and ITG of one micro-batch.

        Args:
            features, image_mask: float[B, N, Dv], bool[B, N] | None; without gradient.
            picture: int64[B], equal for captions of the same picture; those are no negatives of each other.
            targets_per_rank: ITG's normalizer: target tokens of the step over all ranks and micro-batches, divided by
                their number, so that every token of the step weighs the same.
            noise_seed: seed of the negatives drawn; the same on all ranks.
        """
        images = self.project_images(features, image_mask)
        queries = self.qformer.query_pass(images)
        image_embeds, text_embeds = self.embed_queries(queries.output), self.embed_text(text)
        with torch.no_grad():
            self.temperature.clamp_(0.001, 0.5)
        same = picture[:, None] == gather(picture)[None, :]
        i2t = similarity(image_embeds, gather(text_embeds, gradient=True)) / self.temperature
        t2i = similarity(gather(image_embeds, gradient=True), text_embeds).T / self.temperature
        itc = (itc_loss(i2t, same, self.label_smoothing) + itc_loss(t2i, same, self.label_smoothing)) / 2
        itm, itm_accuracy = self._itm(features, image_mask, images, text, i2t, t2i, same, noise_seed)

        labels = next_token_labels(text.ids, text.mask)
        dec_ids = torch.cat([torch.full_like(text.ids[:, :1], self.dec_id), text.ids[:, 1:]], 1)
        hidden = self.qformer.causal_pass(dec_ids, text.mask, queries)
        counted = labels != IGNORE_INDEX  # the head is the widest matrix of all: only where there is a label
        itg = itg_loss(self.lm_logits(hidden[counted]), labels[counted], self.label_smoothing, targets_per_rank)

        losses = {"itc": itc, "itm": itm, "itg": itg}
        found = same.gather(1, i2t.argmax(1, keepdim=True)).float().mean()
        found_back = same.gather(1, t2i.argmax(1, keepdim=True)).float().mean()
        metrics = {
            **losses,
            "itc_accuracy": (found + found_back) / 2,
            "itm_accuracy": itm_accuracy,
            "temperature": self.temperature,
        }
        loss = torch.stack([self.weights[name] * value for name, value in losses.items()]).sum()
        return Output(loss, {k: v.detach() for k, v in metrics.items()}, image_embeds.detach(), text_embeds.detach())

    def _itm(
        self, features: Tensor, image_mask: Tensor | None, images: ImageMemory, text: TextTokens, i2t: Tensor,
        t2i: Tensor, same: Tensor, noise_seed: int,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Loss and accuracy over 3B pairs: matched, (negative image, text), (image, negative text)."""
        batch, everyone = same.shape
        generator = torch.Generator().manual_seed(noise_seed)
        rows = slice(rank() * batch, (rank() + 1) * batch)
        noise = torch.rand(2, everyone, everyone, generator=generator)[:, rows].to(same.device)
        negative_image, has_image = draw_hard_negatives(t2i, same, noise[0])
        negative_text, has_text = draw_hard_negatives(i2t, same, noise[1])

        own = torch.arange(batch, device=same.device)
        if world_size() == 1:  # keys and values are there already
            pairs = images.select(torch.cat([own, negative_image, own]))
        else:
            all_masks = None if image_mask is None else gather_padded(image_mask, 1, False)[negative_image]
            negatives = self.project_images(gather_padded(features, 1)[negative_image], all_masks)
            pairs = _concatenate(images, negatives, images)
        all_ids, all_masks_text = gather_padded(text.ids, 1), gather_padded(text.mask, 1, False)
        length = all_ids.shape[1]
        ids, mask = (F.pad(t, (0, length - t.shape[1])) for t in text)
        pair_text = TextTokens(
            torch.cat([ids, ids, all_ids[negative_text]]), torch.cat([mask, mask, all_masks_text[negative_text]])
        )
        logits = self.match(pairs, pair_text)
        matched = torch.arange(3 * batch, device=same.device) < batch
        counted = torch.cat([torch.ones_like(has_image), has_image, has_text])
        correct = ((logits.argmax(1) == matched) & counted).sum() / counted.sum()
        return itm_loss(logits, matched, counted, sum_over_ranks(counted.sum()) / world_size()), correct


class Stage1Model(nn.Module):
    """A frozen encoder and stage 1's adapter.

    Args:
        tokenizer: BERT tokenizer with [DEC] as its `bos_token`.
        max_text_tokens: longest caption, [CLS] and [SEP] included.
    """

    def __init__(self, encoder: FrozenEncoder, adapter: Stage1Adapter, tokenizer: Any, max_text_tokens: int) -> None:
        super().__init__()
        self.encoder, self.adapter, self.tokenizer, self.max_text_tokens = encoder, adapter, tokenizer, max_text_tokens

    def tokenize(self, texts: list[str]) -> TextTokens:
        """Tokens of the texts, padded to the longest."""
        return tokenize(self.tokenizer, texts, next(self.adapter.parameters()).device, self.max_text_tokens)

    def prepare(self, batch: Batch, noise_seed: int) -> Prepared:
        """Tokenize the captions and count ITG's targets."""
        text = self.tokenize(batch.texts)
        return Prepared(batch, text, int(text.mask[:, 1:].sum()), noise_seed)

    def forward(self, prepared: Prepared, targets_per_rank: Tensor) -> Output:
        features = self.encoder(prepared.batch.images, prepared.batch.image_mask)
        picture = picture_ids(prepared.batch.image_ids).to(features.tokens.device)
        return self.adapter(
            features.tokens, features.mask, prepared.text, picture, targets_per_rank, prepared.noise_seed
        )


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
    ) -> Tensor:  # fmt: skip
        """Frozen features float[B, N, Dv], bool[B, N] | None -> visual prompt float[R, Q, Dl].

        Args:
            text: the prompts of an instructed Q-Former, R of them; None for any other.
            rows: int64[R], the picture of each row, so that one under several prompts is projected once; None = 0 .. B-1.
        """
        assert (text is None) == (self.qformer.vocab_size is None), "an instructed Q-Former takes a text, others none"
        normed = self.feature_norm(features.to(self.feature_norm.weight.dtype))
        images = self.qformer.project_images(normed, image_mask)
        if text is None:
            visual_prompt = self.language_projection(self.qformer.query_pass(images).output)
            return visual_prompt if rows is None else visual_prompt[rows]
        images = images if rows is None else images.select(rows)
        return self.language_projection(self.qformer.matching_pass(images, text.ids, text.mask))


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
        visual_prompt = self.visual_prompt(features, prompts)
        found = self.llm.loss(visual_prompt, prompts, targets, max_target_tokens=self.max_target_tokens)
        loss = found.total / targets_per_rank
        return Output(loss, {"lm": loss.detach()})


def tokenize(tokenizer: Any, texts: list[str], device: torch.device, max_tokens: int | None = None) -> TextTokens:
    """BERT tokens of the texts, cut at `max_tokens` and padded to the longest."""
    found = tokenizer(
        texts, padding=True, truncation=max_tokens is not None, max_length=max_tokens, return_tensors="pt"
    )
    return TextTokens(found["input_ids"].to(device), found["attention_mask"].bool().to(device))


def split_prefix(text: str, seed: int) -> tuple[str, str]:
    """Split a caption at a word drawn uniformly from 1 to its midpoint, as a pure function of text and seed.

    Source: BLIP-2 section 3.3, prefix language modelling. A caption of one word has no prefix.
    """
    words = text.split()
    if len(words) < 2:
        return "", text
    cut = random.Random(f"{seed} {text}").randint(1, max(1, len(words) // 2))
    return " ".join(words[:cut]), " ".join(words[cut:])


def picture_ids(image_ids: list[str]) -> Tensor:
    """int64[B], equal where the ids are equal, so that they can be compared across ranks."""
    digests = [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in image_ids]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])


def _concatenate(*memories: ImageMemory) -> ImageMemory:
    """One memory of all images; masks are padded to the longest."""
    longest = max(m.layers[0][0].shape[2] for m in memories)

    def widen(x: Tensor, dim: int) -> Tensor:
        missing = [0, 0] * (x.dim() - 1 - dim) + [0, longest - x.shape[dim]]
        return F.pad(x, missing)

    layers = [
        (torch.cat([widen(k, 2) for k, _ in same_layer]), torch.cat([widen(v, 2) for _, v in same_layer]))
        for same_layer in zip(*(m.layers for m in memories), strict=True)
    ]
    masks = [m.mask for m in memories if m.mask is not None]
    return ImageMemory(layers, torch.cat([widen(m, 3) for m in masks]) if masks else None)
