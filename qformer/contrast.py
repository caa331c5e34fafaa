"""Pictures against captions: the contrastive loss and the hard negatives of every row of a contrastive batch.

A contrastive batch is one micro-batch of each rank, or several of each (`stage1.itc_batch_size`). Its rows are counted as
`gather` lays them out: those of rank 0 first, and a rank's micro-batches one after the other.

Several micro-batches take two passes, since all embeddings are needed before any has its gradient. The first keeps only
the embeddings, and finds the loss and its gradient with respect to them; the second embeds each micro-batch again, with
the same dropout, and goes back from there. Loss and gradient are those of the batch in one piece.
Source: GradCache (arXiv 2101.06983), section 3.2.
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
    """A caption and an image of another picture for each of B rows, as rows of the contrastive batch."""

    text: Tensor  # int64[B]
    has_text: Tensor  # bool[B]: is there any?
    image: Tensor
    has_image: Tensor


class Contrast(NamedTuple):
    """What comparing all rows finds, for B of them."""

    itc: Tensor
    accuracy: Tensor
    negatives: Negatives
    pairs: Tensor  # float[]: pairs that matching counts, mean over ranks and micro-batches


class Pool(NamedTuple):
    """What this rank's rows of a contrastive batch hold for others, as long as the longest of any rank."""

    tokens: Tensor  # float[B, N, Dv], frozen features
    mask: Tensor | None  # uint8[B, N]
    text: Tensor  # int64[B, T, 2]: ids, and whether they are tokens

    @staticmethod
    def of(features: Sequence[Features], texts: Sequence[Text]) -> "Pool":
        """Of the rows of one or more micro-batches."""
        tokens, text = _join([x.tokens for x in features]), _join([torch.stack(x, 2) for x in texts])
        masks = [x.mask.byte() for x in features if x.mask is not None]
        if not masks:  # as many tokens on every rank
            return Pool(tokens, None, pad_to_longest(text, 1))
        return Pool(pad_to_longest(tokens, 1), pad_to_longest(_join(masks), 1), pad_to_longest(text, 1))

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


class Share(NamedTuple):
    """What the first of two passes leaves a micro-batch of B rows for the second."""

    features: Features
    contrast: Contrast
    gradients: tuple[Tensor, Tensor, Tensor]  # of ITC with respect to image and text embeddings and the temperature
    pool: Pool
    dropout_seed: int

    def itc(self, image_embeds: Tensor, text_embeds: Tensor, temperature: Tensor) -> Tensor:
        """ITC of the whole contrastive batch, with this micro-batch's part of its gradient."""
        embedded = (image_embeds, text_embeds, temperature)
        linear = torch.stack([(x * g).sum() for x, g in zip(embedded, self.gradients, strict=True)]).sum()
        return self.contrast.itc + (linear - linear.detach())


def contrast(
    image_embeds: Tensor, text_embeds: Tensor, temperature: Tensor, picture: Tensor, label_smoothing: float,
    noise_seed: int, micro_batches: int = 1,
) -> Contrast:  # fmt: skip
    """Compare this rank's rows of a contrastive batch with those of all ranks, in float32 also under autocast.

    Args:
        image_embeds, text_embeds: float[B, Q, E], float[B, E] of unit length.
        picture: int64[B], equal for captions of the same picture; those are no negatives of each other.
        noise_seed: seed of the negatives drawn; the same on all ranks.
        micro_batches: how many the rows come from; their scores are then not kept but computed again for the gradient.
    """
    with torch.autocast(image_embeds.device.type, enabled=False):
        same, texts = picture[:, None] == gather(picture)[None, :], gather(text_embeds, gradient=True)
        score = similarity if micro_batches == 1 else partial(checkpoint, similarity, use_reentrant=False)
        i2t = torch.cat([score(rows, texts) for rows in image_embeds.chunk(micro_batches)]) / temperature
        t2i = transpose_over_ranks(i2t)  # every pair is scored once, where its picture is: queries never cross ranks
        itc = (itc_loss(i2t, same, label_smoothing) + itc_loss(t2i, same, label_smoothing)) / 2
    noise = draw_noise(len(same), micro_batches, noise_seed).to(same.device)
    negatives = Negatives(*draw_hard_negatives(i2t, same, noise[1]), *draw_hard_negatives(t2i, same, noise[0]))
    pairs = len(same) + negatives.has_text.sum() + negatives.has_image.sum()
    found = [same.gather(1, scores.argmax(1, keepdim=True)).float().mean() for scores in (i2t, t2i)]
    return Contrast(itc, (found[0] + found[1]) / 2, negatives, sum_over_ranks(pairs) / (world_size() * micro_batches))


def contrast_apart(
    features: Sequence[Features], texts: Sequence[Text], embeds: Sequence[tuple[Tensor, Tensor]], temperature: Tensor,
    picture: Tensor, label_smoothing: float, noise_seed: int, dropout_seeds: Sequence[int],
) -> list[Share]:  # fmt: skip
    """Compare the rows of this rank's k micro-batches, embedded without gradient: what each needs for the second pass.

    The mean of the k losses of the second pass is the loss of the whole.
    """
    k = len(features)
    embedded = (torch.cat([image for image, _ in embeds]), torch.cat([text for _, text in embeds]), temperature)
    leaves = images, words, divisor = tuple(x.detach().requires_grad_() for x in embedded)
    found = contrast(images, words, divisor, picture, label_smoothing, noise_seed, k)
    of_images, of_texts, of_temperature = torch.autograd.grad(found.itc, leaves)
    found, pool = found._replace(itc=found.itc.detach()), Pool.of(features, texts)
    shares, rows = [], len(picture) // k
    for i, seed in enumerate(dropout_seeds):
        own = slice(i * rows, (i + 1) * rows)
        tokens = pool.tokens[own, : features[i].tokens.shape[1]]  # they lie in memory once
        contrasted = found._replace(negatives=Negatives(*(x[own] for x in found.negatives)))
        gradients = (of_images[own] * k, of_texts[own] * k, of_temperature)
        shares.append(Share(features[i]._replace(tokens=tokens), contrasted, gradients, pool, seed))
    return shares


def draw_noise(rows: int, micro_batches: int, seed: int) -> Tensor:
    """Uniform noise float[2, B, W*B] of this rank's B rows, which are those of its micro-batches.

    A row has a seed of its own, and its column another row's place, by where the two stand in the order of records, in
    which ranks take turns with their micro-batches. So it is the same on any number of ranks and micro-batches.
    """
    ranks = world_size()
    place = torch.arange(ranks * rows).view(micro_batches, ranks, -1).transpose(0, 1).flatten()
    generator, own = torch.Generator(), place.view(ranks, rows)[rank()].tolist()
    drawn = [torch.rand(2, ranks * rows, generator=generator.manual_seed(seed + row)) for row in own]
    return torch.stack(drawn, 1)[..., place]


def picture_ids(image_ids: list[str]) -> Tensor:
    """int64[B], equal where the ids are equal, so that they can be compared across ranks."""
    digests = [hashlib.blake2b(i.encode(), digest_size=8).digest() for i in image_ids]
    return torch.tensor([int.from_bytes(d, "little", signed=True) for d in digests])


def _join(parts: list[Tensor]) -> Tensor:
    """Tensors [B, L, ...] of different L, one after the other, padded with zeros to the longest."""
    if len(parts) == 1:
        return parts[0]
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(p, (0, 0) * (p.dim() - 2) + (0, longest - p.shape[1])) for p in parts])
