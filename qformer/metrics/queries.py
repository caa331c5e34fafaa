"""How alike the queries of an image have become."""

import torch
import torch.nn.functional as F
from torch import Tensor

RANKED = 16  # images of a micro-batch whose effective rank is computed


@torch.no_grad()
def describe_queries(query_output: Tensor) -> dict[str, Tensor]:
    """`query_output_cosine` and `query_effective_rank` of float[B, Q, D], each float32[]."""
    return {
        "query_output_cosine": mean_cosine(query_output),
        "query_effective_rank": effective_rank(query_output[:RANKED]),
    }


@torch.no_grad()
def mean_cosine(query_output: Tensor) -> Tensor:
    """Cosine of two different queries of an image, averaged over all pairs and images: float[B, Q, D] -> float32[].

    At 1 all queries say the same, at 0 they are unrelated. By the sum of the unit vectors, whose square is that of all
    pairs, so that no Q x Q matrix is made; 0 for a single query.
    """
    queries = query_output.shape[1]
    total = F.normalize(query_output.detach().float(), dim=-1).sum(1).square().sum(-1)
    return ((total - queries) / max(1, queries * (queries - 1))).mean()


@torch.no_grad()
def effective_rank(query_output: Tensor) -> Tensor:
    """Directions that the queries of an image fill, averaged over images: float[B, Q, D] -> float32[], from 1 to Q.

    The exponential of the entropy of the singular values, as shares of their sum. At 1 all queries are multiples of one
    vector. Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.
    """
    unit = F.normalize(query_output.detach().float(), dim=-1)
    cosines = unit @ unit.transpose(1, 2)
    values = torch.linalg.eigvalsh(cosines.nan_to_num()).clamp_min(0).sqrt()  # which fails on what is not finite
    shares = values / values.sum(1, keepdim=True)
    return torch.special.entr(shares).sum(1).exp().mean() + 0 * cosines.sum()  # nan stays nan
