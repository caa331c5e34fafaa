"""Nucleus sampling whose draws belong to a row, and not to the batch that it happens to be in."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, TopPLogitsWarper


class SeededNucleus(LogitsProcessor):
    """Leaves each row one token, drawn from its `top_p` nucleus by a random number of (the row's seed, the position).

    A greedy search behind it is nucleus sampling. `generate` itself draws for all rows from one stream, where a row's
    text depends on its neighbours.

    Args:
        seeds: one a row, 0 or more.
        length: tokens that a text may have.
    """

    def __init__(self, seeds: Sequence[int], *, top_p: float, temperature: float, length: int) -> None:
        # One more than tokens: an encoder-decoder's text begins with its start token.
        self.draws = torch.from_numpy(np.stack([np.random.default_rng(seed).random(length + 1) for seed in seeds]))
        self.nucleus, self.temperature = TopPLogitsWarper(top_p=top_p), temperature

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        kept = self.nucleus(input_ids, scores.float() / self.temperature)
        cumulative = kept.double().softmax(-1).cumsum(-1)
        draw = self.draws[:, input_ids.shape[1], None].to(scores.device) * cumulative[:, -1:]
        token = (cumulative > draw).int().argmax(-1, keepdim=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, token, 0.0)
