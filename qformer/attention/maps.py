"""What a trained Q-Former's queries look at: cross-attention laid over the image, and what of it speaks for each word.

The probabilities are those of the pass that embeds, matches or writes, computed plainly so that they have a gradient. A
word's map is Grad-CAM on them: where a query looks, times how much more that place speaks for the word (the gradient, where
it is positive), averaged over heads and queries. Shape letters: K images, L layers that look, H heads, Q queries, N tokens
of an image, h x w places, W words.

Source: Grad-CAM (arXiv 1610.02391); ALBEF (arXiv 2107.07651), section 6.4, for cross-attention. There the words look at the
image themselves; here queries do, and a word's map comes from the word's part in a score.
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.encoders import Features, FrozenEncoder
from qformer.files import atomic_file
from qformer.language.frozen import Prompt
from qformer.language.words import word_losses
from qformer.layers import WatchedKV
from qformer.models import Stage1, Stage2
from qformer.models.batch import tokenize
from qformer.qformer import ImageMemory, QFormer
from qformer.text import words_of

HEADS = ("mean", "max")


class AttentionMaps(NamedTuple):
    """Who looks where in an image of h x w places; with K > 1 images or frames a map is [K, h, w] wherever it says [h, w]."""

    maps: Tensor
    """float32[L, H, Q, h, w]: the probability with which a head's query looks at a place."""
    beside: Tensor
    """float32[L, H, Q]: at tokens that have no place (class token, registers); it and all places are 1 together."""
    layers: list[int]
    """L numbers, from 0: the Q-Former's layers that look at the image."""
    words: list[str]
    """W words of the text; none without one."""
    word_maps: Tensor
    """float32[W, L, h, w]: where the image speaks for a word, 0 or more."""

    def of_queries(self, layer: int | None = None, heads: str = "mean") -> Tensor:
        """Where each query looks, float32[Q, h, w].

        Args:
            layer: one of `layers`; None = their mean.
            heads: "mean" or "max" over the heads.

        Raises: ValueError when there is no such layer, or `heads` is neither.
        """
        if heads not in HEADS:
            raise ValueError(f"heads={heads!r}: expected one of {', '.join(HEADS)}")
        maps = self._of_layer(self.maps, layer)
        return maps.mean(0) if heads == "mean" else maps.amax(0)

    def of_words(self, layer: int | None = None) -> Tensor:
        """Where the image speaks for each word, float32[W, h, w].

        Args:
            layer: one of `layers`; None = their mean.

        Raises: ValueError when there is no such layer.
        """
        return self._of_layer(self.word_maps.transpose(0, 1), layer)

    def overlap(self, layer: int | None = None, heads: str = "mean") -> float:
        """Mean cosine of the maps of two queries: 1 where all look at the same places, 0 where no two share one."""
        maps = F.normalize(self.of_queries(layer, heads).flatten(1), dim=1)
        pairs = len(maps) * (len(maps) - 1)
        return float((maps.sum(0).square().sum() - len(maps)) / pairs) if pairs else 1.0

    def save(self, path: Path) -> None:
        """Write everything as one .npz file, under the names that it has here."""
        arrays: dict[str, Any] = {name: np.asarray(value) for name, value in self._asdict().items()}
        with atomic_file(path) as scratch, scratch.open("wb") as file:
            np.savez_compressed(file, **arrays)

    def _of_layer(self, maps: Tensor, layer: int | None) -> Tensor:
        if layer is None:
            return maps.mean(0)
        if layer not in self.layers:
            raise ValueError(
                f"layer={layer}: expected one of {self.layers}, the Q-Former's layers that look at the image"
            )
        return maps[self.layers.index(layer)]


@torch.enable_grad()
def attention_of_match(model: Stage1, features: Features, images: Tensor, text: str | None) -> AttentionMaps:
    """Where stage 1's queries look: alone, or beside a text that they are matched with, and what speaks for its words.

    What a word adds is known by hiding it behind [MASK]: the gradient of the match (the logit of match minus that of no
    match) with the word, minus the gradient without it.

    Args:
        features: of the images that differ, float[B, N, Dv].
        images: int64[K], those that are read side by side.

    Raises: ValueError when the encoder has no grid, an image fewer tokens than it, or the matching head was not trained.
    """
    adapter, place = model.adapter, _Places.of(model.encoder, features, images)
    memory = _watch(adapter.qformer, features.side_by_side(images[None]), adapter.feature_norm)
    if text is None:
        adapter.qformer.query_pass(memory)
        return place.lay_out(adapter.qformer, torch.stack(_looks(memory))[:, 0])
    if "itm" not in adapter.weights:
        raise ValueError(
            "this adapter was trained with stage1.itm=0, so its matching head knows nothing of words; leave the text out"
        )
    ids, mask = model.tokenize([text])
    words, word_of = words_of(model.tokenizer, ids[0].tolist())
    hidden = torch.arange(-1, len(words))[:, None] == torch.tensor(word_of)  # no word, then each
    hidden[0] = False
    blank = model.tokenizer.unk_token_id if model.tokenizer.mask_token_id is None else model.tokenizer.mask_token_id
    rows = ids.expand(len(hidden), -1).masked_fill(hidden.to(ids.device), blank)
    logits = adapter.match([memory._replace(times=len(rows))], rows, mask.expand(len(rows), -1))
    looks = _looks(memory)
    gradients = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), looks)
    look, gradient = (torch.cat(x).unflatten(2, (len(rows), -1)).transpose(1, 2) for x in (looks, gradients))
    return place.lay_out(adapter.qformer, look[:, 0], words, list((gradient[:, :1] - gradient[:, 1:]).unbind(1)))


@torch.enable_grad()
def attention_of_text(
    model: Stage2, features: Features, images: Tensor, *, prompt: Prompt, text: str | None
) -> AttentionMaps:  # fmt: skip
    """Where stage 2's queries look, and what speaks for each word of a text that the language model writes after `prompt`:
    the gradient of the log of its probability behind the words before it.

    Args:
        features: of the images that differ, float[B, N, Dv].
        images: int64[K], those whose visual prompts stand one after the other.
        prompt: read by an instructed Q-Former too.

    Raises: ValueError as `attention_of_match` does, or as `FrozenLanguageModel.loss`.
    """
    adapter, place = model.adapter, _Places.of(model.encoder, features, images)
    memory = _watch(adapter.qformer, features.side_by_side(images[:, None]), adapter.feature_norm)
    if model.tokenizer is None:
        output = adapter.qformer.query_pass(memory).output
    else:
        question = prompt if isinstance(prompt, str) else prompt[-1]
        asked = tokenize(model.tokenizer, [question] * memory.rows, features.tokens.device)
        output = adapter.qformer.matching_pass([memory], *asked)
    looks = _looks(memory)
    look = torch.stack(looks).permute(0, 2, 3, 1, 4).flatten(3)  # [L, H, Q, K * N]
    if text is None:
        return place.lay_out(adapter.qformer, look)
    words, losses = word_losses(model.llm, adapter.language_projection(output).flatten(0, 1)[None], prompt, text)
    gradients = [torch.stack(torch.autograd.grad(-loss, looks, retain_graph=True)) for loss in losses]
    return place.lay_out(adapter.qformer, look, words, [x.permute(0, 2, 3, 1, 4).flatten(3) for x in gradients])


class _Places(NamedTuple):
    """The grid of places, and the number of tokens of each of K images, of which the last lie on it row by row."""

    grid: tuple[int, int]
    tokens: list[int]
    each: int  # with padding

    @classmethod
    def of(cls, encoder: FrozenEncoder, features: Features, images: Tensor) -> "_Places":
        if encoder.grid is None:
            raise ValueError(
                "encoder.grid=[]: where the tokens of these features lie is not known; set it in the adapter's "
                "config.yaml to [rows, columns], if the last rows * columns tokens lie row by row"
            )
        each = features.tokens.shape[1] if encoder.num_tokens is None else encoder.num_tokens
        real = features.tokens.new_ones(features.tokens.shape[:2]) if features.mask is None else features.mask
        tokens = real[images].reshape(-1, each).sum(1).int().tolist()
        if min(tokens) < math.prod(encoder.grid):
            raise ValueError(
                f"{min(tokens)} tokens of an image are fewer than the places of encoder.grid={[*encoder.grid]}"
            )
        return cls(encoder.grid, tokens, each)

    def lay_out(self, qformer: QFormer, look: Tensor, words: Sequence[str] = (), gradients: Sequence[Tensor] = ()) -> AttentionMaps:  # fmt: skip
        """Maps of the probabilities float[L, H, Q, K * N], and of their gradients for each word."""
        look = look.detach().float()
        word_maps = look.new_zeros(len(words), len(look), look.shape[-1])
        for word, gradient in enumerate(gradients):
            word_maps[word] = (look * gradient.float().clamp(min=0)).mean((1, 2))
        (maps, beside), (word_maps, _) = self._split(look), self._split(word_maps)
        layers = [i for i, block in enumerate(qformer.layers) if block.cross_attention is not None]
        return AttentionMaps(maps.cpu(), beside.cpu(), layers, list(words), word_maps.cpu())

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """float[..., K * N] on the grid, float[..., K, h, w], and beside it, float[..., K]; of one image without K."""
        images, places = x.unflatten(-1, (-1, self.each)), math.prod(self.grid)
        on = torch.stack([images[..., k, n - places : n] for k, n in enumerate(self.tokens)], -2)
        beside = torch.stack([images[..., k, : n - places].sum(-1) for k, n in enumerate(self.tokens)], -1)
        maps = on.unflatten(-1, self.grid)
        return (maps, beside) if len(self.tokens) > 1 else (maps[..., 0, :, :], beside[..., 0])


def _watch(qformer: QFormer, features: Features, norm: nn.LayerNorm) -> ImageMemory:
    """The images as cross-attention sees them; every probability has a gradient, whatever learns."""
    return qformer.project_images(features.tokens.detach().requires_grad_(), features.mask, norm).watched()


def _looks(memory: ImageMemory) -> list[Tensor]:
    """The probabilities of each layer that looked."""
    return [layer.looks[0] for layer in memory.layers if isinstance(layer, WatchedKV)]
