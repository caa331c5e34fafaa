"""Layers of the Q-Former: BERT's attention and feed-forward network, over packed tokens.

Shape letters: R rows, P packed tokens, Q queries, T text tokens, L = Q + T, N image tokens, D width, H heads, E = D / H.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.kernels import AbsorbedAttention, AbsorbedKV, LeanFeedForward, attend, dropout

KeysValues = tuple[Tensor, Tensor]  # two of float[R, H, L, E]


class ImageKV(NamedTuple):
    """Images that R rows look at: row r at image r % B, or where `image_of` is given at image_of[r % B']."""

    keys: "KeysValues | AbsorbedKV | WatchedKV"
    mask: Tensor | None  # bool[B, 1, 1, N]
    times: int = 1  # rows of each image
    image_of: Tensor | None = None  # int64[B']


class WatchedKV(NamedTuple):
    """Keys and values of images that are attended to plainly, without dropout, and who looks where is kept."""

    key: Tensor
    value: Tensor
    looks: list[Tensor]  # gains the probabilities float[B, H, times * Q, N], with their graph

    def attend(self, query: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        """`kernels.attend` of queries float[B, H, times * Q, E]."""
        scores = scale * query @ self.key.transpose(2, 3)
        self.looks.append((scores if mask is None else scores.masked_fill(~mask, -torch.inf)).softmax(-1))
        return self.looks[-1] @ self.value


class Packing(NamedTuple):
    """The tokens of R rows without the padding of their texts: all that layers compute, but for attention itself.

    All rows' queries come first, then the texts. With one query a row, and the texts "a b" and "c":

        padded  [q a b]    packed  [q r a b c]
                [r c .]
    """

    rows: int
    queries: int
    text: Tensor | None  # where the text's tokens lie among R * T, int64; None where there is no text
    length: int = 0  # T
    tokens: int = 0  # of the text; what follows them is filler that nobody reads

    @staticmethod
    def of(text_mask: Tensor, queries: int = 0) -> "Packing":
        """Rows of `queries` and of the texts of bool[R, T], True = a token.

        Many tokens are filled up to a multiple of 64: kernels are made, and kept, for every size that they meet.
        """
        text = text_mask.flatten().nonzero()[:, 0]
        filler = text[:1].expand(-len(text) % 64 if len(text) > 512 else 0)
        return Packing(len(text_mask), queries, torch.cat([text, filler]), text_mask.shape[1], len(text))

    def pad(self, packed: Tensor) -> Tensor:
        """float[P, D] -> float[R, Q + T, D], zero where there is no token."""
        if self.text is None:
            return packed.unflatten(0, (self.rows, self.queries))
        texts = packed.new_zeros(self.rows * self.length, packed.shape[1])
        queries, tokens, _ = packed.tensor_split([first := self.rows * self.queries, first + self.tokens])
        texts = texts.index_put((self.text[: self.tokens],), tokens).unflatten(0, (self.rows, self.length))
        return texts if not self.queries else torch.cat([queries.unflatten(0, (self.rows, self.queries)), texts], 1)

    def pack(self, padded: Tensor) -> Tensor:
        """float[R, Q + T, D] -> float[P, D]."""
        queries, texts = padded.split([self.queries, self.length], 1)
        if self.text is None:
            return queries.flatten(0, 1)
        tokens = texts.flatten(0, 1).index_select(0, self.text)
        return tokens if not self.queries else torch.cat([queries.flatten(0, 1), tokens])


class Attention(nn.Module):
    """Multi-head attention with BERT's output: dense, dropout, residual, LayerNorm (post-norm)."""

    def __init__(self, width: int, memory_width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(memory_width, width)
        self.value = nn.Linear(memory_width, width)
        self.dense = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def keys_values(self, memory: Tensor, norm: nn.LayerNorm | None = None) -> KeysValues:
        """Keys and values of `memory` float[B, N, Dm].

        Args:
            norm: its weight and bias are still to be applied to `memory`. They are folded into the projections, so that
                features that do not learn need no gradient of their own size.
        """

        def project(linear: nn.Linear) -> Tensor:
            weight, bias = _folded(linear, norm)
            return self.split(F.linear(memory, weight, bias)).contiguous()  # laid out as the products read them

        return project(self.key), project(self.value)

    def absorb(self, features: Tensor, tokens: int, norm: nn.LayerNorm | None) -> AbsorbedKV:
        """`keys_values` for `AbsorbedKV` features float[B, N', C] of N tokens: at least one wider than the memory, by a one
        and zeros.
        """

        def affine(linear: nn.Linear) -> Tensor:
            weight, bias = _folded(linear, norm)
            zeros = weight.new_zeros(len(weight), features.shape[2] - weight.shape[1] - 1)
            return torch.cat([weight, bias[:, None], zeros], 1).to(features.dtype).unflatten(0, (self.heads, -1))

        return AbsorbedKV(features, affine(self.key), affine(self.value), tokens)

    def forward(
        self, hidden: Tensor, packing: Packing, mask: Tensor | None, *, before: KeysValues | None, reads: Tensor | None
    ) -> tuple[Tensor, KeysValues]:  # fmt: skip
        """Packed tokens float[P, D] attending to each other, row by row, where `mask` is True; and their keys and values.

        Args:
            mask: bool, broadcast to [R, H, Q + T, all keys]; None = all.
            before: more keys and values, in front of these.
            reads: int64[R, n], the tokens to compute; None = all.
        """
        key, value = (self.split(packing.pad(linear(hidden))) for linear in (self.key, self.value))
        keys, values = (
            (key, value) if before is None else (torch.cat(pair, 2) for pair in zip(before, (key, value), strict=True))
        )
        if reads is not None:
            hidden = hidden[reads.flatten()]
        query = self.query(hidden)
        query = packing.pad(query) if reads is None else query.unflatten(0, reads.shape)
        read = attend(self.split(query), keys, values, mask, p=self._p, scale=self._scale).transpose(1, 2).flatten(2)
        return self._add(hidden, packing.pack(read) if reads is None else read.flatten(0, 1)), (key, value)

    def cross_attend(self, hidden: Tensor, images: Sequence[ImageKV]) -> Tensor:
        """Queries float[R, Q, D] attending to images, group after group of the R rows."""
        query, read, first = self.split(self.query(hidden)), [], 0
        for keys, mask, times, image_of in images:
            n_images = len(keys[0]) if image_of is None else len(image_of)
            rows = query[first : first + times * n_images]
            first += len(rows)
            if isinstance(keys, AbsorbedKV):
                output = AbsorbedAttention.apply(rows, *keys, mask, self._p, self._scale)
            else:
                rows = rows.unflatten(0, (times, n_images)).permute(1, 2, 0, 3, 4).flatten(2, 3)
                if isinstance(keys, WatchedKV):
                    output = keys.attend(rows, mask, self._scale)
                else:
                    output = attend(rows, *keys, mask, p=self._p, scale=self._scale, index=image_of)
            output = output.unflatten(2, (times, -1)).permute(2, 0, 3, 1, 4)  # [times, B, Q, H, E]
            read.append(output.flatten(3).flatten(0, 1))
        return self._add(hidden, torch.cat(read))

    def split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

    @property
    def _p(self) -> float:
        return self.dropout if self.training else 0.0

    @property
    def _scale(self) -> float:
        return float((self.query.out_features // self.heads) ** -0.5)

    def _add(self, hidden: Tensor, read: Tensor) -> Tensor:
        return self.norm(hidden + dropout(self.dense(read), self._p))


def _folded(linear: nn.Linear, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
    """Weight and bias of linear(norm(x)) for an x that lacks the norm's own weight and bias."""
    if norm is None:
        return linear.weight, linear.bias
    weight = linear.weight * norm.weight
    return weight, F.linear(norm.bias, linear.weight, linear.bias)


class FeedForward(nn.Module):
    """BERT's feed-forward network with exact GELU and post-norm, of packed tokens float[P, D].

    Args:
        recompute: make what lies between the two products again for the gradient, which spares memory for some time.
    """

    def __init__(self, width: int, ffn_width: int, dropout: float, *, recompute: bool) -> None:
        super().__init__()
        self.dropout, self.recompute = dropout, recompute
        self.up = nn.Linear(width, ffn_width)
        self.down = nn.Linear(ffn_width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, hidden: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.up.weight.dtype
        tensors = (hidden, self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        changed = LeanFeedForward.apply(*(tensor.to(dtype) for tensor in tensors), self.recompute)
        return self.norm(hidden + dropout(changed, self.dropout if self.training else 0.0))
