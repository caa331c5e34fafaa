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

from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from qformer.kernels import AbsorbedKV, dropout
from qformer.layers import Attention, FeedForward, ImageKV, KeysValues, Packing, WatchedKV

ABSORBED_TIME = 1.35  # of a product in `AbsorbedAttention`, over one in a projection: benchmarks/README.md


class ImageMemory(NamedTuple):
    """Images as cross-attention sees them: what every layer that looks reads of them, made once.

    Row r looks at image r % B, or where `image_of` is given at image_of[r % B']; nothing is copied for it.
    """

    layers: Sequence[KeysValues | AbsorbedKV | WatchedKV]
    mask: Tensor | None  # bool[B, 1, 1, N]
    times: int = 1  # rows that look at each image
    image_of: Tensor | None = None  # int64[B']

    @property
    def rows(self) -> int:
        """R, the rows that look."""
        return self.times * len(self.layers[0][0] if self.image_of is None else self.image_of)

    def select(self, index: Tensor) -> "ImageMemory":
        """The images at `index` int64[R], in that order."""
        return self._replace(image_of=index if self.image_of is None else self.image_of[index])

    def watched(self) -> "ImageMemory":
        """The same images, in whose layers' `looks` stands afterwards where the queries looked."""
        assert self.image_of is None
        return self._replace(layers=[WatchedKV(layer[0], layer[1], []) for layer in self.layers])


class QueryPass(NamedTuple):
    """Result of the query pass: `output` float[B, Q, D] and every layer's self-attention keys and values."""

    output: Tensor
    keys_values: list[KeysValues]


class Block(nn.Module):
    """One layer of BERT that queries and text share, in which the queries also read the image.

    1. self-attention of all tokens of a row, as far as `mask` lets them;
    2. cross-attention of the queries to their image, in layers that have it;
    3. a feed-forward network, one for queries and one for text.

    Args:
        encoder_width: Dv of the image features; None for a layer without cross-attention.
        has_text: whether there is a text side.
        recompute_ffn: see `FeedForward`.
    """

    def __init__(
        self, *, width: int, heads: int, ffn_width: int, dropout: float, encoder_width: int | None, has_text: bool,
        recompute_ffn: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.attention = Attention(width, width, heads, dropout)
        self.cross_attention = None if encoder_width is None else Attention(width, encoder_width, heads, dropout)
        self.query_ffn = FeedForward(width, ffn_width, dropout, recompute=recompute_ffn)
        self.text_ffn = FeedForward(width, ffn_width, dropout, recompute=recompute_ffn) if has_text else None

    def forward(
        self, hidden: Tensor, packing: Packing, mask: Tensor | None, *, images: Sequence[ImageKV] = (),
        before: KeysValues | None = None, reads: Tensor | None = None,
    ) -> tuple[Tensor, KeysValues]:  # fmt: skip
        """Packed tokens through the layer.

        Args:
            hidden: float[P, D], the tokens of R rows without padding: all rows' queries, then all rows' texts.
            packing: where each token belongs.
            mask: bool, broadcast to [R, H, Q + T, all keys], True = may look; None = everything.
            images: keys and values of the images that the rows' queries read, group after group of rows.
            before: more self-attention keys and values [R, H, L, E] in front of the tokens' own.
            reads: int64[R, n], the tokens whose output somebody reads; None = all.

        Returns: the tokens' output float[P, D] (float[R * n, D] with `reads`), and their keys and values [R, H, Q + T, E].
        """
        hidden, keys_values = self.attention(hidden, packing, mask, before=before, reads=reads)
        n_queries = packing.rows * packing.queries
        queries, text = hidden.split([n_queries, len(hidden) - n_queries])
        parts = []
        if len(queries):
            if images:
                assert self.cross_attention is not None
                rows = queries.unflatten(0, (packing.rows, packing.queries))
                queries = self.cross_attention.cross_attend(rows, images).flatten(0, 1)
            parts.append(self.query_ffn(queries))
        if len(text):
            assert self.text_ffn is not None, "this Q-Former was built without a text side"
            parts.append(self.text_ffn(text))
        return parts[0] if len(parts) == 1 else torch.cat(parts), keys_values


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
        recompute_ffn: spares memory for some time: stage 1 keeps three passes for their gradient, stage 2 a small one.

    The passes, each a function of packed tokens and a mask over the same blocks:

    1. `project_images`: image features to the keys and values of every cross-attention layer, once an image;
    2. `query_pass`: the queries alone;
    3. `text_pass`: the text alone; `causal_pass`: the text after the queries; `text_and_causal_pass`: both as one;
    4. `matching_pass`: queries and text together.
    """

    def __init__(
        self, *, width: int, layers: int, heads: int, ffn_width: int, queries: int, encoder_width: int,
        cross_attention_frequency: int = 2, dropout: float = 0.1, vocab_size: int | None, max_text_positions: int = 512,
        init_std: float = 0.02, recompute_ffn: bool = True,
    ) -> None:  # fmt: skip
        super().__init__()
        self.width, self.dropout = width, dropout
        self.vocab_size, self.max_text_positions = vocab_size, max_text_positions
        self.query_tokens = nn.Parameter(torch.empty(1, queries, width))
        self.embedding_norm = nn.LayerNorm(width, eps=1e-12)
        self.word_embeddings = nn.Embedding(vocab_size, width) if vocab_size else None
        self.position_embeddings = nn.Embedding(max_text_positions, width) if vocab_size else None
        self.blocks = nn.ModuleList(
            Block(
                width=width, heads=heads, ffn_width=ffn_width, dropout=dropout,
                encoder_width=encoder_width if i % cross_attention_frequency == 0 else None,
                has_text=vocab_size is not None, recompute_ffn=recompute_ffn,
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

    def project_images(
        self, image_features: Tensor, image_mask: Tensor | None = None, norm: nn.LayerNorm | None = None,
        once: bool = False,
    ) -> ImageMemory:  # fmt: skip
        """Project features float[B, N, Dv] (bool[B, N], True = real) to cross-attention keys and values, once.

        Args:
            norm: applied to the features first; None where they are normed already.
            once: a single row looks at each image. Where that takes less time, the projections are `AbsorbedKV`: while
                learning, so that inference rounds as other implementations do, and on CPUs, since a GPU's fused kernels have
                no heads as wide as the features.
        """
        looking = [block.cross_attention for block in self.layers if block.cross_attention is not None]
        mask = None if image_mask is None else image_mask[:, None, None, :]
        fixed = torch.is_grad_enabled() and not image_features.requires_grad
        fold = norm if fixed else None
        if norm is not None:
            image_features = image_features.to(norm.weight.dtype)
            if fixed:
                image_features = F.layer_norm(image_features, norm.normalized_shape, eps=norm.eps)
            else:
                image_features = norm(image_features)
        if not (once and fixed and image_features.is_cpu and self._absorbing_is_cheaper(image_features)):
            return ImageMemory([attention.keys_values(image_features, fold) for attention in looking], mask)
        if torch.is_autocast_enabled("cpu"):
            image_features = image_features.to(torch.get_autocast_dtype("cpu"))
        _, tokens, width = image_features.shape
        zeros = (0, -(width + 1) % 16, 0, -tokens % 16)  # sizes that products like
        image_features = F.pad(F.pad(image_features, (0, 1), value=1.0), zeros)
        return ImageMemory([attention.absorb(image_features, tokens, fold) for attention in looking], mask)

    def _absorbing_is_cheaper(self, features: Tensor) -> bool:
        """Whether projecting queries takes less time than projecting features float[B, N, Dv]."""
        (_, tokens, features_width), queries = features.shape, self.query_tokens.shape[1]
        heads = self.layers[0].attention.heads
        projected = tokens * features_width * self.width + queries * self.width * tokens
        return ABSORBED_TIME * queries * features_width * (self.width + heads * tokens) < projected

    def query_pass(self, images: ImageMemory) -> QueryPass:
        """The queries look at the images and at each other: float[B, Q, D]."""
        packing = Packing(images.rows, self.query_tokens.shape[1], None)
        kept: list[KeysValues] = []
        output = self._run(self._embed_queries(packing), packing, None, images=[images], kept=kept)
        return QueryPass(packing.pad(output), kept)

    def text_pass(self, text: Tensor, text_mask: Tensor, first: bool = False) -> Tensor:
        """The text alone, every token sees every token: float[B, T, D], zero at padding.

        Args:
            text: int64[B, T] ids, or float[B, T, D] their word embeddings; text_mask: bool[B, T], True = a token.
            first: only the output of each text's first token, float[B, D].
        """
        packing, mask = Packing.of(text_mask), text_mask[:, None, None, :]
        hidden = self._embed_text(text, packing)
        if not first:
            return packing.pad(self._run(hidden, packing, mask))
        lengths = text_mask.sum(1)
        return self._run(hidden, packing, mask, reads=(lengths.cumsum(0) - lengths)[:, None])

    def matching_pass(self, images: Sequence[ImageMemory], text: Tensor, text_mask: Tensor) -> Tensor:
        """Queries and text together, everything sees everything: the queries' output float[R, Q, D].

        Args:
            images: what the R rows look at, group after group.
        """
        rows, n_queries = len(text), self.query_tokens.shape[1]
        packing = Packing.of(text_mask, n_queries)
        hidden = torch.cat([self._embed_queries(packing), self._embed_text(text, packing)])
        mask = torch.cat([text_mask.new_ones(rows, n_queries), text_mask], 1)[:, None, None, :]
        reads = torch.arange(rows * n_queries, device=hidden.device).view(rows, n_queries)
        return self._run(hidden, packing, mask, images=images, reads=reads).view(rows, n_queries, -1)

    def causal_pass(self, text: Tensor, text_mask: Tensor, queries: QueryPass) -> Tensor:
        """The text sees all queries and earlier text: float[B, T, D], zero at padding; the same as the joint mask."""
        packing, mask = Packing.of(text_mask), _causal_mask(text_mask, queries)
        return packing.pad(self._run(self._embed_text(text, packing), packing, mask, before=queries.keys_values))

    def text_and_causal_pass(
        self, text: Tensor, decoded: Tensor, text_mask: Tensor, queries: QueryPass
    ) -> tuple[Tensor, Tensor]:
        """`text_pass` of one and `causal_pass` of the other, which has the same mask, as rows of one pass."""
        causal = _causal_mask(text_mask, queries)
        alone = causal.clone()
        alone[..., : queries.output.shape[1]] = False
        alone[..., queries.output.shape[1] :] = text_mask[:, None, None, :]
        packing = Packing.of(text_mask.repeat(2, 1))
        before = [(key.repeat(2, 1, 1, 1), value.repeat(2, 1, 1, 1)) for key, value in queries.keys_values]
        hidden = self._embed_text(torch.cat([text, decoded]), packing)
        first, second = packing.pad(self._run(hidden, packing, torch.cat([alone, causal]), before=before)).chunk(2)
        return first, second

    def _embed_queries(self, packing: Packing) -> Tensor:
        return self._norm_embedding(self.query_tokens.expand(packing.rows, -1, -1).flatten(0, 1))

    def _embed_text(self, text: Tensor, packing: Packing) -> Tensor:
        assert self.word_embeddings is not None, "this Q-Former was built without a text side"
        assert self.position_embeddings is not None
        assert packing.text is not None
        if packing.length > self.max_text_positions:
            raise ValueError(
                f"text of {packing.length} tokens is longer than qformer.max_text_positions={self.max_text_positions}; "
                "shorten it, lower qformer.max_text_tokens, or raise qformer.max_text_positions"
            )
        tokens = text.flatten(0, 1).index_select(0, packing.text)
        words = tokens if tokens.is_floating_point() else self.word_embeddings(tokens)
        return self._norm_embedding(words + self.position_embeddings(packing.text % packing.length))

    def _norm_embedding(self, embedding: Tensor) -> Tensor:
        return dropout(self.embedding_norm(embedding), self.dropout if self.training else 0.0)

    def _run(
        self, hidden: Tensor, packing: Packing, mask: Tensor | None, *, images: Sequence[ImageMemory] = (),
        before: list[KeysValues] | None = None, reads: Tensor | None = None, kept: list[KeysValues] | None = None,
    ) -> Tensor:  # fmt: skip
        """Packed tokens through all layers.

        Args:
            reads: the last layer's tokens that somebody reads, int64[R, n]; the others are not computed there.
            kept: gains every layer's self-attention keys and values.
        """
        reading = 0  # of the layers with cross-attention
        for i, block in enumerate(self.layers):
            image_kv = []
            if images and block.cross_attention is not None:
                image_kv = [ImageKV(m.layers[reading], m.mask, m.times, m.image_of) for m in images]
                reading += 1
            last = i == len(self.blocks) - 1
            hidden, keys_values = block(
                hidden, packing, mask,
                images=image_kv, before=before[i] if before else None, reads=reads if last else None,
            )  # fmt: skip
            if kept is not None:
                kept.append(keys_values)
        return hidden


def _causal_mask(text_mask: Tensor, queries: QueryPass) -> Tensor:
    """bool[B, 1, T, Q + T] of bool[B, T]: all queries and earlier text."""
    length, n_queries = text_mask.shape[1], queries.output.shape[1]
    earlier = torch.ones(length, length, dtype=torch.bool, device=text_mask.device).tril()
    text = earlier & text_mask[:, None, None, :]
    return torch.cat([text.new_ones(*text.shape[:3], n_queries), text], 3)
