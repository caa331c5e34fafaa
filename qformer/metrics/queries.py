"""How alike the queries of an image have become."""

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.no_grad()
def mean_cosine(query_output: Tensor) -> Tensor:
    """Cosine of two different queries of an image, averaged over all pairs and images: float[B, Q, D] -> float32[].

    At 1 all queries say the same, at 0 they are unrelated. By the sum of the unit vectors, whose square is that of all
    pairs, so that no Q x Q matrix is made; 0 for a single query.
    """
    queries = query_output.shape[1]
    total = F.normalize(query_output.detach().float(), dim=-1).sum(1).square().sum(-1)
    return ((total - queries) / max(1, queries * (queries - 1))).mean()
