"""Images against captions: the contrastive loss, and the hard negatives of every row of a contrastive batch.

A contrastive batch is one micro-batch of each rank, or several of each (`stage1.itc_batch_size`, see gradcache.py). Its
rows are counted as `gather` lays them out: those of rank 0 first, and a rank's micro-batches one after the other.
"""

import hashlib
from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from qformer.distributed import fetch, gather, pad_to_longest, rank, sum_over_ranks, transpose_over_ranks, world_size
from qformer.encoders import Features
from qformer.objectives import draw_hard_negatives, itc_loss, similarity

Text = tuple[Tensor, Tensor]  # int64[B, T] ids, bool[B, T] whether they are tokens


class Negatives(NamedTuple):
    """A caption and an image of another pair for each of B rows, as rows of the contrastive batch."""

    text: Tensor  # int64[B]
    has_text: Tensor  # bool[B]: is there any?
    image: Tensor
    has_image: Tensor


class Contrast(NamedTuple):
    """What comparing all rows yields, for B of them."""

    itc: Tensor
    accuracy: Tensor
    negatives: Negatives
    pairs: Tensor  # float[]: pairs that matching counts, mean over ranks and micro-batches


class NegativeBank(NamedTuple):
    """What this rank's rows of a contrastive batch hold for others, as long as the longest of any rank."""

    tokens: Tensor  # float[B, N, Dv], frozen features
    mask: Tensor | None  # uint8[B, N]
    text: Tensor  # int64[B, T, 2]: ids, and whether they are tokens

    @staticmethod
    def of(features: Sequence[Features], texts: Sequence[Text]) -> "NegativeBank":
        """Of the rows of one or more micro-batches."""
        tokens, text = _join([x.tokens for x in features]), _join([torch.stack(x, 2) for x in texts])
        masks = [x.mask.byte() for x in features if x.mask is not None]
        if not masks:  # as many tokens on every rank
            return NegativeBank(tokens, None, pad_to_longest(text, 1))
        return NegativeBank(pad_to_longest(tokens, 1), pad_to_longest(_join(masks), 1), pad_to_longest(text, 1))

    def fetch(self, negatives: Negatives) -> tuple[Features, Text]:
        """The negatives, whichever rank holds them."""
        mask = None if self.mask is None else fetch(self.mask, negatives.image).bool()
        if self.tokens.requires_grad:  # of an encoder that learns: all cross, with their gradient
            tokens = gather(self.tokens, gradient=True)[negatives.image]
        else:
            tokens = fetch(self.tokens, negatives.image)
        features = Features(tokens, mask)
        ids, text_mask = fetch(self.text, negatives.text).unbind(2)
        return features, (ids, text_mask.bool())


def contrast(
    image_embeds: Tensor, text_embeds: Tensor, temperature: Tensor, keys: Tensor, *, label_smoothing: float,
    noise_seed: int, micro_batches: int = 1,
) -> Contrast:  # fmt: skip
    """Compare this rank's rows of a contrastive batch with those of all ranks, in float32 also under autocast.

    Args:
        image_embeds, text_embeds: float[B, Q, E], float[B, E] of unit length.
        keys: int64[B, K], of each row's image, of its caption; rows that have one in common are no negatives of each other.
        noise_seed: seed of the negatives drawn; the same on all ranks.
        micro_batches: how many the rows come from; their scores are then not kept but computed again for the gradient.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        same, texts = (keys[:, None] == gather(keys)[None]).any(2), gather(text_embeds, gradient=True)
        score = similarity if micro_batches == 1 else partial(checkpoint, similarity, use_reentrant=False)
        i2t = torch.cat([score(rows, texts) for rows in image_embeds.chunk(micro_batches)]) / temperature
        t2i = transpose_over_ranks(i2t)  # every pair is scored once, where its image is: queries never cross ranks
        itc = (itc_loss(i2t, same, label_smoothing) + itc_loss(t2i, same, label_smoothing)) / 2
    noise = draw_noise(len(same), micro_batches, noise_seed).to(same.device)
    negatives = Negatives(*draw_hard_negatives(i2t, same, noise[1]), *draw_hard_negatives(t2i, same, noise[0]))
    pairs = len(same) + negatives.has_text.sum() + negatives.has_image.sum()
    right = [same.gather(1, scores.argmax(1, keepdim=True)).float().mean() for scores in (i2t, t2i)]
    return Contrast(itc, (right[0] + right[1]) / 2, negatives, sum_over_ranks(pairs) / (world_size() * micro_batches))


def draw_noise(rows: int, micro_batches: int, seed: int) -> Tensor:
    """Uniform noise float[2, B, W*B] of this rank's B rows, which are those of its micro-batches.

    A row has a seed of its own, and its column another row's place, by where the two stand in the order of records, in
    which ranks take turns with their micro-batches. So it is the same on any number of ranks and micro-batches.
    """
    ranks = world_size()
    place = torch.arange(ranks * rows).view(micro_batches, ranks, -1).transpose(0, 1).flatten()
    generator, mine = torch.Generator(), place.view(ranks, rows)[rank()].tolist()
    drawn = [torch.rand(2, ranks * rows, generator=generator.manual_seed(seed + row)) for row in mine]
    return torch.stack(drawn, 1)[..., place]


def text_keys(texts: Sequence[str]) -> Tensor:
    """int64[B], equal where the texts (or ids) are equal, so that they can be compared across ranks."""
    digests = [hashlib.blake2b(text.encode(), digest_size=8).digest() for text in texts]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])


def _join(parts: list[Tensor]) -> Tensor:
    """Tensors [B, L, ...] of different L, one after the other, padded with zeros to the longest."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(p, (0, 0) * (p.dim() - 2) + (0, longest - p.shape[1])) for p in parts])
