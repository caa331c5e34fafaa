"""A contrastive batch of several micro-batches, in two passes, since all embeddings are needed before any has its gradient.

The first pass keeps only the embeddings, and yields the loss and its gradient with respect to them; the second embeds each
micro-batch again, with the same dropout, and goes back from there. Loss and gradient are those of the batch in one piece.
Source: GradCache (arXiv 2101.06983), section 3.2.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from qformer.encoders import Features
from qformer.models.contrast import Contrast, NegativeBank, Negatives, Text, contrast


class CachedStep(NamedTuple):
    """What the first of two passes leaves a micro-batch of B rows for the second."""

    features: Features
    contrast: Contrast
    gradients: tuple[Tensor, Tensor, Tensor]  # of ITC with respect to image and text embeddings and the temperature
    bank: NegativeBank
    dropout_seed: int

    def itc(self, image_embeds: Tensor, text_embeds: Tensor, temperature: Tensor) -> Tensor:
        """ITC of the whole contrastive batch, with this micro-batch's part of its gradient."""
        embedded = (image_embeds, text_embeds, temperature)
        linear = torch.stack([(x * g).sum() for x, g in zip(embedded, self.gradients, strict=True)]).sum()
        return self.contrast.itc + (linear - linear.detach())


def gradcache_step(
    features: Sequence[Features], texts: Sequence[Text], embeds: Sequence[tuple[Tensor, Tensor]], *,
    temperature: Tensor, keys: Tensor, label_smoothing: float, noise_seed: int, dropout_seeds: Sequence[int],
) -> list[CachedStep]:  # fmt: skip
    """Compare the rows of this rank's k micro-batches, embedded without gradient: what each needs for the second pass.

    The mean of the k losses of the second pass is the loss of the whole.
    """
    k = len(features)
    embedded = (torch.cat([image for image, _ in embeds]), torch.cat([text for _, text in embeds]), temperature)
    leaves = images, words, divisor = tuple(x.detach().requires_grad_() for x in embedded)
    whole = contrast(
        images, words, divisor, keys, label_smoothing=label_smoothing, noise_seed=noise_seed, micro_batches=k
    )
    of_images, of_texts, of_temperature = torch.autograd.grad(whole.itc, leaves)
    whole, bank = whole._replace(itc=whole.itc.detach()), NegativeBank.of(features, texts)
    steps, rows = [], len(keys) // k
    for i, seed in enumerate(dropout_seeds):
        mine = slice(i * rows, (i + 1) * rows)
        tokens = bank.tokens[mine, : features[i].tokens.shape[1]]  # they lie in memory once
        compared = whole._replace(negatives=Negatives(*(x[mine] for x in whole.negatives)))
        gradients = (of_images[mine] * k, of_texts[mine] * k, of_temperature)
        steps.append(CachedStep(features[i]._replace(tokens=tokens), compared, gradients, bank, seed))
    return steps
