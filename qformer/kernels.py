"""Hand-written kernels of the Q-Former: each computes what a plain PyTorch expression does, with less time or memory.

Most are for CPUs; on a GPU `attend` and `dropout` are PyTorch's own. tests/test_kernels.py holds each to its plain form.
Shape letters: R rows, P packed tokens, Q queries, T text tokens, N image tokens, D width, H heads, E = D / H.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class AbsorbedKV(NamedTuple):
    """Image features with one layer's projections to keys and values, which are never made: queries go to the features.

    The same scores and sums as by keys and values, in another order of products: fewer of them where one row of queries
    looks at many tokens. Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
    """

    features: Tensor  # float[B, N', C], a one behind each that carries the biases; zeros behind the first N
    key: Tensor  # float[H, E, C]
    value: Tensor  # float[H, E, C]
    tokens: int  # N


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
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, *, p: float, scale: float,
    index: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attention softmax(scale * query @ key.T) @ value: float[R, H, T, E] over float[R, H, N, E] where bool `mask` is True.

    PyTorch's fused kernel, but plain matrix products on CPUs while learning: in bfloat16 the fused one's gradient is nine
    times slower, and with dropout it keeps copies of the keys and draws slowly.

    Args:
        p: probability of dropout.
        index: int64[R], which of `key`, `value` and `mask` each row reads; None = its own.
    """
    if query.is_cpu and query.requires_grad and (p or query.dtype == torch.bfloat16):
        return PlainAttention.apply(query, key, value, mask, p, scale, index)
    key, value, mask = _rows(key, index), _rows(value, index), None if mask is None else _rows(mask, index)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=p, scale=scale)


class PlainAttention(torch.autograd.Function):
    """Attention by matrix products that keeps what was dropped, but makes the probabilities again for the gradient."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, p: float, scale: float,  # type: ignore[override]
                index: Tensor | None) -> Tensor:  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            query, key, value = (query * scale).contiguous(), key.contiguous(), value.contiguous()
            shares = PlainAttention.shares(query, key, mask, index)
            ctx.scale, ctx.index, ctx.mask = scale, index, mask
            ctx.drop, ctx.kept = draw_drops(shares.shape, p, shares.device) if p else (None, 1.0)
            ctx.save_for_backward(query, key, value)
            return _dropped(ctx, shares) @ _rows(value, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        query, key, value = ctx.saved_tensors
        shares = PlainAttention.shares(query, key, ctx.mask, ctx.index)

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


class AbsorbedAttention(torch.autograd.Function):
    """Attention of queries float[B, H, Q, E] to `AbsorbedKV` images on CPUs; no gradient to the features.

    What is as wide as the features lies as [B, Q, H, C]: then a head's rows of all images are one matrix, and so are an
    image's rows of all heads, and no product needs its factors or its result to be copied.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, features: Tensor, key: Tensor, value: Tensor, tokens: int, mask: Tensor | None, p: float,  # type: ignore[override]
                scale: float) -> Tensor:  # fmt: skip
        with torch.autocast("cpu", enabled=False):
            query = (query * scale).transpose(1, 2).contiguous()  # [B, Q, H, E]
            output, wide = torch.empty_like(query), query.new_empty(*query.shape[:3], features.shape[2])
            for h in range(len(key)):
                torch.mm(_head(query, h), key[h], out=_head(wide, h))
            shares = _softmax(_scores(wide, features, tokens), None if mask is None else mask[:, 0])
            ctx.scale, ctx.tokens = scale, tokens
            ctx.drop, ctx.kept = None, 1.0
            if p:
                heads, queries = shares.unflatten(1, query.shape[1:3]).transpose(1, 2), shares.shape
                drop, ctx.kept = draw_drops(heads.shape, p, shares.device)
                ctx.drop = drop.transpose(1, 2).reshape(queries)
            torch.bmm(_dropped(ctx, shares), features[:, :tokens], out=wide.flatten(1, 2))
            for h in range(len(key)):
                torch.mm(_head(wide, h), value[h].T, out=_head(output, h))
            ctx.save_for_backward(query, features, key, value, shares, wide)
            return output.transpose(1, 2)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        query, features, key, value, shares, read = ctx.saved_tensors
        gradient = gradient.transpose(1, 2).contiguous()
        to_query, to_key, to_value, wide = (torch.empty_like(x) for x in (query, key, value, read))
        for h in range(len(key)):
            torch.mm(_head(gradient, h), value[h], out=_head(wide, h))
            torch.mm(_head(gradient, h).T, _head(read, h), out=to_value[h])
        to_shares = _dropped(ctx, _scores(wide, features, ctx.tokens))
        torch.bmm(_softmax_backward(to_shares, shares), features[:, : ctx.tokens], out=wide.flatten(1, 2))
        for h in range(len(key)):
            torch.mm(_head(query, h).T, _head(wide, h), out=to_key[h])
            torch.mm(_head(wide, h), key[h].T, out=_head(to_query, h))
        return to_query.transpose(1, 2) * ctx.scale, None, to_key, to_value, None, None, None, None


def _head(x: Tensor, h: int) -> Tensor:
    """A head's rows of float[B, Q, H, C], as float[B * Q, C]."""
    return x.flatten(0, 1)[:, h]


def _scores(wide: Tensor, features: Tensor, tokens: int) -> Tensor:
    """float[B, Q * H, N] of float[B, Q, H, C] and float[B, N', C]."""
    return (wide.flatten(1, 2) @ features.transpose(1, 2))[..., :tokens]


def _rows(of: Tensor, index: Tensor | None) -> Tensor:
    return of if index is None else of[index]


def _softmax(scores: Tensor, mask: Tensor | None) -> Tensor:
    if mask is not None:
        scores.masked_fill_(~mask, -torch.inf)
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def _softmax_backward(gradient: Tensor, shares: Tensor) -> Tensor:
    scores: Tensor = torch._softmax_backward_data(gradient.float(), shares.float(), -1, torch.float32)
    return scores.to(shares.dtype)


def _dropped(ctx: Any, shares: Tensor) -> Tensor:
    return shares if ctx.drop is None else (shares * ctx.kept).masked_fill_(ctx.drop, 0)


class LeanFeedForward(torch.autograd.Function):
    """down(gelu(up(x))) of float[P, D]; `recompute` keeps x alone: what lies between is four times as large, and made again."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, recompute: bool
    ) -> Tensor:  # type: ignore[override]
        between = F.linear(x, up, up_bias)
        ctx.save_for_backward(x, up, up_bias, down, None if recompute else between)
        return F.linear(F.gelu(between), down, down_bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        x, up, up_bias, down, between = ctx.saved_tensors
        between = F.linear(x, up, up_bias) if between is None else between
        to_down = gradient.T @ F.gelu(between)
        to_between = torch.ops.aten.gelu_backward(gradient @ down, between)
        return to_between @ up, to_between.T @ x, to_between.sum(0), to_down, gradient.sum(0), None
