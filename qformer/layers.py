"""Layers of the Q-Former: attention and feed-forward networks over packed tokens, and what makes them lean.

Shape letters: R rows, P packed tokens, Q queries, T text tokens, L = Q + T, N image tokens, D width, H heads, E = D / H.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # two of float[R, H, L, E]


class Absorbed(NamedTuple):
    """Image features with one layer's projections to keys and values, which are never made: queries go to the features.

    The same scores and sums as by keys and values, in another order of products: fewer of them where one row of queries
    looks at many tokens. Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
    """

    features: Tensor  # float[B, N, C], a one behind each that carries the biases
    key: Tensor  # float[H, E, C]
    value: Tensor  # float[H, E, C]


class Looked(NamedTuple):
    """Images that R rows look at: row r at image r % B, or where `image_of` is given at image_of[r % B']."""

    keys: KeysValues | Absorbed
    mask: Tensor | None  # bool[B, 1, 1, N]
    times: int = 1  # rows of each image
    image_of: Tensor | None = None  # int64[B']


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


def draw_drops(shape: torch.Size, p: float, device: torch.device) -> tuple[Tensor, float]:
    """What dropout drops, bool, and the factor of what it keeps.

    On CPUs one draw of 64 random bits decides on four numbers, where PyTorch's decides on one; p is rounded to a multiple
    of 2 ** -16.
    """
    if device.type != "cpu":
        return torch.empty(shape, dtype=torch.bool, device=device).bernoulli_(p), 1 / (1 - p)
    bits = torch.empty(-(-shape.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    dropped = round(p * 2**16)
    return (bits[: shape.numel()] < dropped - 2**15).view(shape), 1 / (1 - dropped * 2**-16)


def dropout(x: Tensor, p: float) -> Tensor:
    """Dropout of a module in training; on CPUs its draws are cheap (`draw_drops`)."""
    if p == 0 or not x.is_cpu:
        return F.dropout(x, p)
    drop, scale = draw_drops(x.shape, p, x.device)
    return (x * scale).masked_fill(drop, 0)


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, scale: float, index: Tensor | None = None
) -> Tensor:  # fmt: skip
    """Attention softmax(scale * query @ key.T) @ value: float[R, H, T, E] over float[R, H, N, E] where bool `mask` is True.

    PyTorch's fused kernel, but plain matrix products on CPUs while learning: in bfloat16 the fused one's gradient is nine
    times slower, and with dropout it keeps copies of the keys and draws slowly.

    Args:
        p: probability of dropout.
        index: int64[R], which of `key`, `value` and `mask` each row reads; None = its own.
    """
    if query.is_cpu and query.requires_grad and (p or query.dtype == torch.bfloat16):
        return _PlainAttention.apply(query, key, value, mask, p, scale, index)
    key, value, mask = _rows(key, index), _rows(value, index), None if mask is None else _rows(mask, index)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=p, scale=scale)


class _PlainAttention(torch.autograd.Function):
    """Attention by matrix products that keeps what was dropped, but makes the probabilities again for the gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, scale: float,  # type: ignore[override]
                index: Tensor | None) -> Tensor:  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            query, key, value = (query * scale).contiguous(), key.contiguous(), value.contiguous()
            shares = _PlainAttention.shares(query, key, mask, index)
            ctx.scale, ctx.index, ctx.mask = scale, index, mask
            ctx.drop, ctx.kept = draw_drops(shares.shape, p, shares.device) if p else (None, 1.0)
            ctx.save_for_backward(query, key, value)
            return _dropped(ctx, shares) @ _rows(value, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        shares = _PlainAttention.shares(query, key, ctx.mask, ctx.index)

        def gather(to_rows: Tensor) -> Tensor:
            return to_rows if ctx.index is None else torch.zeros_like(key).index_add_(0, ctx.index, to_rows)

        to_value = gather(_dropped(ctx, shares).transpose(2, 3) @ gradient)
        to_shares = _dropped(ctx, gradient @ _rows(value, ctx.index).transpose(2, 3))
        to_scores = _softmax_backward(to_shares, shares)
        to_key = gather(to_scores.transpose(2, 3) @ query)
        return (to_scores @ _rows(key, ctx.index)) * ctx.scale, to_key, to_value, None, None, None, None

    @staticmethod
    def shares(query: Tensor, key: Tensor, mask: Tensor | None, index: Tensor | None) -> Tensor:
        return _softmax(query @ _rows(key, index).transpose(2, 3), None if mask is None else _rows(mask, index))


class _AbsorbedAttention(torch.autograd.Function):
    """Attention of queries float[B, H, Q, E] to `Absorbed` images on CPUs; no gradient to the features.

    What is as wide as the features is written head by head into one block, so that it is neither transposed nor copied.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, features: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float,  # type: ignore[override]
                scale: float) -> Tensor:  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            query, found = query * scale, torch.empty_like(query)
            wide = features.new_empty(*query.shape[:3], features.shape[2])
            for h in range(len(key)):
                wide[:, h] = _times(query[:, h], key[h])
            scores = (wide.flatten(1, 2) @ features.transpose(1, 2)).view(*query.shape[:3], -1)
            shares = _softmax(scores, mask).flatten(1, 2)
            ctx.scale = scale
            ctx.drop, ctx.kept = draw_drops(shares.shape, p, shares.device) if p else (None, 1.0)
            torch.bmm(_dropped(ctx, shares), features, out=wide.flatten(1, 2))
            for h in range(len(key)):
                found[:, h] = _times(wide[:, h], value[h].T)
            ctx.save_for_backward(query, features, key, value, shares, wide)
            return found

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        query, features, key, value, shares, read = ctx.saved_tensors
        to_query, to_key, to_value, wide = (torch.empty_like(x) for x in (query, key, value, read))
        for h in range(len(key)):
            wide[:, h] = _times(gradient[:, h], value[h])
            torch.mm(gradient[:, h].flatten(0, 1).T, read[:, h].flatten(0, 1), out=to_value[h])
        to_shares = _dropped(ctx, wide.flatten(1, 2) @ features.transpose(1, 2))
        torch.bmm(_softmax_backward(to_shares, shares), features, out=wide.flatten(1, 2))
        for h in range(len(key)):
            torch.mm(query[:, h].flatten(0, 1).T, wide[:, h].flatten(0, 1), out=to_key[h])
            to_query[:, h] = _times(wide[:, h], key[h].T)
        return to_query * ctx.scale, None, to_key, to_value, None, None, None


def _rows(of: Tensor, index: Tensor | None) -> Tensor:
    return of if index is None else of[index]


def _times(x: Tensor, matrix: Tensor) -> Tensor:
    """float[B, Q, C] @ float[C, C'] as one product."""
    return (x.flatten(0, 1) @ matrix).unflatten(0, x.shape[:2])


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def _softmax_backward(gradient: Tensor, shares: Tensor) -> Tensor:
    found: Tensor = torch._softmax_backward_data(gradient.float(), shares.float(), -1, torch.float32)
    return found.to(shares.dtype)


def _dropped(ctx: Any, shares: Tensor) -> Tensor:
    return shares if ctx.drop is None else (shares * ctx.kept).masked_fill_(ctx.drop, 0)


class _FeedForward(torch.autograd.Function):
    """down(gelu(up(x))) of float[P, D]; `lean` keeps x alone: what lies between is four times as large, and made again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, lean: bool
    ) -> Tensor:  # type: ignore[override]
        between = F.linear(x, up, up_bias)
        ctx.save_for_backward(x, up, up_bias, down, None if lean else between)
        return F.linear(F.gelu(between), down, down_bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, up, up_bias, down, between = ctx.saved_tensors
        between = F.linear(x, up, up_bias) if between is None else between
        to_down = gradient.T @ F.gelu(between)
        to_between = torch.ops.aten.gelu_backward(gradient @ down, between)
        return to_between @ up, to_between.T @ x, to_between.sum(0), to_down, gradient.sum(0), None


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

    def absorb(self, features: Tensor, norm: nn.LayerNorm | None) -> Absorbed:
        """`keys_values` for `Absorbed` features float[B, N, C]: at least one wider than the memory, by a one and zeros."""

        def affine(linear: nn.Linear) -> Tensor:
            weight, bias = _folded(linear, norm)
            zeros = weight.new_zeros(len(weight), features.shape[2] - weight.shape[1] - 1)
            return torch.cat([weight, bias[:, None], zeros], 1).to(features.dtype).unflatten(0, (self.heads, -1))

        return Absorbed(features, affine(self.key), affine(self.value))

    def forward(self, hidden: Tensor, packing: Packing, mask: Tensor | None, before: KeysValues | None,
                reads: Tensor | None) -> tuple[Tensor, KeysValues]:  # fmt: skip
        """Packed tokens float[P, D] attending to each other, row by row, where `mask` is True; and their keys and values.

        Args:
            mask: bool, broadcast to [R, H, Q + T, all keys]; None = all.
            before: more keys and values, in front of these.
            reads: int64[R, n], the tokens to compute; None = all.
        """
        key, value = (self.split(packing.pad(linear(hidden))) for linear in (self.key, self.value))
        seen = (key, value) if before is None else (torch.cat([before[0], key], 2), torch.cat([before[1], value], 2))
        if reads is not None:
            hidden = hidden[reads.flatten()]
        query = self.query(hidden)
        query = packing.pad(query) if reads is None else query.unflatten(0, reads.shape)
        read = attend(self.split(query), *seen, mask, self._p, self._scale).transpose(1, 2).flatten(2)
        return self._add(hidden, packing.pack(read) if reads is None else read.flatten(0, 1)), (key, value)

    def look(self, hidden: Tensor, images: Sequence[Looked]) -> Tensor:
        """Queries float[R, Q, D] attending to images, group after group of the R rows."""
        query, read, first = self.split(self.query(hidden)), [], 0
        for keys, mask, times, image_of in images:
            n_images = len(keys[0]) if image_of is None else len(image_of)
            rows = query[first : first + times * n_images]
            first += len(rows)
            if isinstance(keys, Absorbed):
                found = _AbsorbedAttention.apply(rows, *keys, mask, self._p, self._scale)
            else:
                rows = rows.unflatten(0, (times, n_images)).permute(1, 2, 0, 3, 4).flatten(2, 3)
                found = attend(rows, *keys, mask, self._p, self._scale, image_of)
            found = found.unflatten(2, (times, -1)).permute(2, 0, 3, 1, 4)  # [times, B, Q, H, E]
            read.append(found.flatten(3).flatten(0, 1))
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
    """BERT's feed-forward network with exact GELU and post-norm, of float[P, D]; `lean` spares memory for some time."""

    def __init__(self, width: int, ffn_width: int, dropout: float, lean: bool) -> None:
        super().__init__()
        self.dropout, self.lean = dropout, lean
        self.up = nn.Linear(width, ffn_width)
        self.down = nn.Linear(ffn_width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, hidden: Tensor) -> Tensor:
        device = hidden.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else self.up.weight.dtype
        tensors = (hidden, self.up.weight, self.up.bias, self.down.weight, self.down.bias)
        changed = _FeedForward.apply(*(tensor.to(dtype) for tensor in tensors), self.lean)
        return self.norm(hidden + dropout(changed, self.dropout if self.training else 0.0))
