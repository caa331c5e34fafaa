"""Cross-entropy of target tokens, row by row, not smoothed."""

from typing import NamedTuple

import torch.nn.functional as F
from torch import Tensor

from qformer.text import IGNORE_INDEX


class LanguageLoss(NamedTuple):
    """Cross-entropy of the target tokens and how many there are; the caller normalises over ranks and micro-batches."""

    total: Tensor
    """float32[]: summed over all target tokens; of rows float32[B]."""
    tokens: Tensor
    """int64[]: target tokens counted; of rows int64[B]."""

    def sum(self) -> "LanguageLoss":
        """Of all rows together."""
        return LanguageLoss(self.total.sum(), self.tokens.sum())


def loss_of_rows(logits: Tensor, labels: Tensor) -> LanguageLoss:
    """float[B, T, V] and the int64[B, T] they should predict, IGNORE_INDEX where nothing -> the loss of each row."""
    return LanguageLoss(loss_of_tokens(logits, labels).sum(1), (labels.to(logits.device) != IGNORE_INDEX).sum(1))


def loss_of_tokens(logits: Tensor, labels: Tensor) -> Tensor:
    """float32[B, T] of the same, 0 where nothing is to be predicted."""
    rows = logits.float().flatten(0, 1)  # [B * T, V]: words side by side, so that the softmax needs no copy of them
    losses = F.cross_entropy(rows, labels.to(rows.device).flatten(), ignore_index=IGNORE_INDEX, reduction="none")
    return losses.view(labels.shape)
