"""The Querying Transformer: learned queries that read an image through cross-attention and share a BERT with text.

Source: BLIP-2 (arXiv 2301.12597), section 3.1. Shape letters: B batch, N image tokens, Q queries, T text tokens,
D width, Dv encoder width, H heads.

Which position sees which is a bool mask, True = may look. With two queries (a, b) and two text tokens (c, d):

    queries alone (ITC)     text alone (ITC)     all see all (ITM)     text after queries (ITG)
        a b                     c d                  a b c d               a b c d
      a 1 1                   c 1 1                a 1 1 1 1             a 1 1 0 0
      b 1 1                   d 1 1                b 1 1 1 1             b 1 1 0 0
                                                   c 1 1 1 1             c 1 1 1 0
                                                   d 1 1 1 1             d 1 1 1 1

Padding text tokens are looked at by nobody. ITG's queries do not depend on the text, so its upper half is the query pass
itself: the causal pass runs the text rows alone against the query pass's keys and values.
"""

from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KeysValues = tuple[Tensor, Tensor]  # two of float[B, H, T, D / H]


class ImageMemory(NamedTuple):
    """An image as cross-attention sees it: keys and values of every layer that looks, projected once."""

    layers: list[KeysValues]
    mask: Tensor | None  # bool[B, 1, 1, N]

    def select(self, index: Tensor) -> "ImageMemory":
        """The images at `index` int64[B'], in that order."""
        mask = None if self.mask is None else self.mask[index]
        return ImageMemory([(k[index], v[index]) for k, v in self.layers], mask)


class QueryPass(NamedTuple):
    """Result of the query pass: `output` float[B, Q, D] and every layer's self-attention keys and values."""

    output: Tensor
    keys_values: list[KeysValues]


def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Scaled dot-product attention: float[B, H, T, E] over float[B, H, N, E], where bool `mask` is True.

    PyTorch's fused kernel, but on CPUs in bfloat16 plain matrix products: the fused one's gradient is nine times slower.
    """
    if query.is_cpu and query.dtype == torch.bfloat16 and query.requires_grad:
        scores = query * query.shape[-1] ** -0.5 @ key.transpose(2, 3)
        if mask is not None:
            scores = scores.masked_fill(~mask, -torch.inf)
        return F.dropout(scores.softmax(3), dropout) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


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

    def keys_values(self, memory: Tensor) -> KeysValues:
        """Keys and values of `memory` float[B, N, Dm]."""
        return self._split(self.key(memory)), self._split(self.value(memory))

    def forward(self, hidden: Tensor, keys_values: KeysValues, mask: Tensor | None) -> Tensor:
        """float[B, T, D] attending to the keys and values where `mask` (bool, broadcast to [B, H, T, N]) is True."""
        p = self.dropout if self.training else 0.0
        query = self._split(self.query(hidden))
        read = attend(query, *keys_values, mask, p)
        read = self.dense(read.transpose(1, 2).flatten(2))
        return self.norm(hidden + F.dropout(read, self.dropout, self.training))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(2, (self.heads, -1)).transpose(1, 2)


class FeedForward(nn.Module):
    """BERT's feed-forward network with exact GELU and post-norm."""

    def __init__(self, width: int, ffn_width: int, dropout: float) -> None:
        super().__init__()
        self.dropout = dropout
        self.up = nn.Linear(width, ffn_width)
        self.down = nn.Linear(ffn_width, width)
        self.norm = nn.LayerNorm(width, eps=1e-12)

    def forward(self, hidden: Tensor) -> Tensor:
        changed = F.dropout(self.down(F.gelu(self.up(hidden))), self.dropout, self.training)
        return self.norm(hidden + changed)


class Block(nn.Module):
    """One layer: shared self-attention, cross-attention of the queries to the image, a feed-forward network each."""

    def __init__(
        self, width: int, heads: int, ffn_width: int, dropout: float, encoder_width: int | None, has_text: bool
    ) -> None:
        super().__init__()
        self.attention = Attention(width, width, heads, dropout)
        self.cross_attention = None if encoder_width is None else Attention(width, encoder_width, heads, dropout)
        self.query_ffn = FeedForward(width, ffn_width, dropout)
        self.text_ffn = FeedForward(width, ffn_width, dropout) if has_text else None

    def forward(
        self, hidden: Tensor, n_queries: int, mask: Tensor | None, image: KeysValues | None,
        image_mask: Tensor | None, before: KeysValues | None, rows: int | None = None,
    ) -> tuple[Tensor, KeysValues]:  # fmt: skip
        keys_values = self.attention.keys_values(hidden)
        hidden = hidden[:, :rows]
        seen = keys_values
        if before is not None:
            seen = (torch.cat([before[0], seen[0]], 2), torch.cat([before[1], seen[1]], 2))
        hidden = self.attention(hidden, seen, mask)
        queries, text = hidden.split([n_queries, hidden.shape[1] - n_queries], 1)
        parts = []
        if n_queries:
            if image is not None:
                assert self.cross_attention is not None
                queries = self.cross_attention(queries, image, image_mask)
            parts.append(self.query_ffn(queries))
        if text.shape[1]:
            assert self.text_ffn is not None, "this Q-Former was built without a text side"
            parts.append(self.text_ffn(text))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1), keys_values


class QFormer(nn.Module):
    """Queries and text in one transformer; only query positions look at the image.

    Unlike BERT there are no token types, and positions of the text start at 0 whether or not queries stand before it.

    Args:
        width, layers, heads, ffn_width: sizes D, layers, H and the feed-forward width.
        queries: number of learned query tokens Q.
        encoder_width: Dv of the image features.
        cross_attention_frequency: layers 0, f, 2f, ... look at the image.
        init_std: standard deviation of initial weights, .02 in BERT.
        vocab_size: words of the text side; None leaves the text side out (stage 2 has no use for it).
    """

    def __init__(
        self, *, width: int, layers: int, heads: int, ffn_width: int, queries: int, encoder_width: int,
        cross_attention_frequency: int = 2, dropout: float = 0.1, vocab_size: int | None, max_text_positions: int = 512,
        init_std: float = 0.02,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.dropout, self.vocab_size, self.max_text_positions = (
            width,
            dropout,
            vocab_size,
            max_text_positions,
        )
        self.query_tokens = nn.Parameter(torch.empty(1, queries, width))
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12)
        self.word_embeddings = nn.Embedding(vocab_size, width) if vocab_size else None
        self.position_embeddings = nn.Embedding(max_text_positions, width) if vocab_size else None
        self.blocks = nn.ModuleList(
            Block(
                width, heads, ffn_width, dropout,
                encoder_width if i % cross_attention_frequency == 0 else None, vocab_size is not None,
            )
            for i in range(layers)
        )  # fmt: skip
        self.reset_parameters(init_std)

    @property
    def layers(self) -> list[Block]:
        return cast(list[Block], list(self.blocks))

    @torch.no_grad()
    def reset_parameters(self, std: float) -> None:
        """Linear and embedding weights and query tokens normal(0, std); biases 0; norms 1; query FFN = text FFN."""
        nn.init.normal_(self.query_tokens, std=std)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=std)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)
        self.copy_text_ffn()

    def copy_text_ffn(self) -> None:
        """Start the query feed-forward networks as copies of the text ones, where there is a text side."""
        for block in self.layers:
            if block.text_ffn is not None:
                block.query_ffn.load_state_dict(block.text_ffn.state_dict())

    def project_images(self, image_features: Tensor, image_mask: Tensor | None = None) -> ImageMemory:
        """Project normed features float[B, N, Dv] (bool[B, N], True = real) to cross-attention keys and values, once."""
        layers = [b.cross_attention.keys_values(image_features) for b in self.layers if b.cross_attention is not None]
        return ImageMemory(layers, None if image_mask is None else image_mask[:, None, None, :])

    def query_pass(self, images: ImageMemory) -> QueryPass:
        """The queries look at the images and at each other: float[B, Q, D]."""
        return QueryPass(*self._run(self._embed_queries(images), self.query_tokens.shape[1], None, images))

    def text_pass(self, text_ids: Tensor, text_mask: Tensor, rows: int | None = None) -> Tensor:
        """The text alone, every token sees every token: int64[B, T], bool[B, T] -> float[B, T, D], or its first `rows`."""
        return self._run(self._embed_text(text_ids), 0, text_mask[:, None, None, :], rows=rows)[0]

    def matching_pass(self, images: ImageMemory, text_ids: Tensor, text_mask: Tensor) -> Tensor:
        """Queries and text together, everything sees everything: the queries' output float[B, Q, D]."""
        queries = self._embed_queries(images)
        n_queries = queries.shape[1]
        hidden = torch.cat([queries, self._embed_text(text_ids)], 1)
        mask = torch.cat([text_mask.new_ones(len(text_mask), n_queries), text_mask], 1)[:, None, None, :]
        return self._run(hidden, n_queries, mask, images, rows=n_queries)[0]

    def causal_pass(self, text_ids: Tensor, text_mask: Tensor, queries: QueryPass) -> Tensor:
        """The text sees all queries and earlier text: float[B, T, D]; the same as the joint mask (module docstring)."""
        length, n_queries = text_ids.shape[1], queries.output.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=text_ids.device).tril()
        text = earlier & text_mask[:, None, None, :]
        mask = torch.cat([text.new_ones(*text.shape[:3], n_queries), text], 3)
        return self._run(self._embed_text(text_ids), 0, mask, before=queries.keys_values)[0]

    def _embed_queries(self, images: ImageMemory) -> Tensor:
        batch = len(images.layers[0][0])
        return self._norm_embedding(self.query_tokens.expand(batch, -1, -1))

    def _embed_text(self, text_ids: Tensor) -> Tensor:
        assert self.word_embeddings is not None, "this Q-Former was built without a text side"
        assert self.position_embeddings is not None
        if text_ids.shape[1] > self.max_text_positions:
            raise ValueError(
                f"text of {text_ids.shape[1]} tokens is longer than qformer.max_text_positions={self.max_text_positions}; "
                "shorten it, lower data.max_text_tokens, or raise qformer.max_text_positions"
            )
        words = self.word_embeddings(text_ids)
        return self._norm_embedding(words + self.position_embeddings.weight[: text_ids.shape[1]])

    def _norm_embedding(self, embedding: Tensor) -> Tensor:
        return F.dropout(self.embedding_norm(embedding), self.dropout, self.training)

    def _run(
        self, hidden: Tensor, n_queries: int, mask: Tensor | None, images: ImageMemory | None = None,
        before: list[KeysValues] | None = None, rows: int | None = None,
    ) -> tuple[Tensor, list[KeysValues]]:  # fmt: skip
        """`rows`: positions of the last layer that somebody reads; the others are not computed there."""
        all_keys_values = []
        image_layers = iter(images.layers if images is not None else ())
        image_mask = images.mask if images is not None else None
        for i, block in enumerate(self.layers):
            image = next(image_layers) if images is not None and block.cross_attention is not None else None
            read = rows if i == len(self.blocks) - 1 else None
            hidden, keys_values = block(hidden, n_queries, mask, image, image_mask, before[i] if before else None, read)
            all_keys_values.append(keys_values)
        return hidden, all_keys_values
