"""The losses of both stages as pure functions of tensors; similarities, softmax and losses in float32.

Source: BLIP-2 (arXiv 2301.12597), section 3.2. B rows of this rank, C candidates of all ranks, Q queries, E contrastive
width, V vocabulary.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from qformer.text import IGNORE_INDEX

ITM_CHANCE = -(math.log(1 / 3) / 3 + 2 * math.log(2 / 3) / 3)  # 0.6365: a head that knows only one in three matches


def similarity(image_embeds: Tensor, text_embeds: Tensor) -> Tensor:
    """Cosine of the best query: float[B, Q, E], float[C, E], both of unit length -> float[B, C]."""
    return (image_embeds.float() @ text_embeds.float().T).amax(1)


def itc_loss(similarities: Tensor, same: Tensor, label_smoothing: float) -> Tensor:
    """Cross-entropy of each row over its candidates, mean over rows.

    Args:
        similarities: float[B, C], already divided by the temperature.
        same: bool[B, C], True where row and candidate belong to the same image; they share the target evenly.
        label_smoothing: share of the target spread over all candidates.
    """
    targets = same.float() / same.sum(1, keepdim=True)
    targets = (1 - label_smoothing) * targets + label_smoothing / same.shape[1]
    return -(targets * F.log_softmax(similarities.float(), 1)).sum(1).mean()


@torch.no_grad()
def draw_hard_negatives(similarities: Tensor, same: Tensor, noise: Tensor) -> tuple[Tensor, Tensor]:
    """Draw for each row one candidate of another image, from softmax(similarities).

    Args:
        similarities: float[B, C], divided by the temperature.
        same: bool[B, C]; those candidates are never drawn.
        noise: uniform [0, 1) float[B, C]; the same noise gives the same draw (Gumbel's trick), on any number of ranks.

    Returns: int64[B] candidates, and bool[B] whether the row has any candidate of another image.
    """
    gumbel = -torch.log(-torch.log(noise.clamp(1e-20, 1 - 1e-7)))
    return (similarities.float() + gumbel).masked_fill(same, -math.inf).argmax(1), ~same.all(1)


def itm_loss(logits: Tensor, matched: Tensor, counted: Tensor, normalizer: Tensor | float) -> Tensor:
    """Cross-entropy of match (1) or not (0): float[P, 2], bool[P], summed over `counted` bool[P] / `normalizer`."""
    losses = F.cross_entropy(logits.float(), matched.long(), reduction="none")
    return (losses * counted).sum() / normalizer


def diversity_loss(query_output: Tensor) -> Tensor:
    """Mean squared cosine between two queries of an image: float[B, Q, D] -> float[], 1 where all are the same.

    ITC asks for one query that fits and ITG for what one vector can hold, so that nothing else keeps the others from
    becoming copies of it.
    """
    queries = query_output.shape[1]
    unit = F.normalize(query_output.float(), dim=-1)
    squares = (unit @ unit.transpose(1, 2)).square().sum((1, 2))
    return (squares - queries).mean() / max(1, queries * (queries - 1))


def next_token_labels(text_ids: Tensor, text_mask: Tensor) -> Tensor:
    """What each position must predict: int64[B, T], the next token, IGNORE_INDEX where it is padding or missing."""
    return F.pad(text_ids.masked_fill(~text_mask, IGNORE_INDEX)[:, 1:], (0, 1), value=IGNORE_INDEX)


def itg_loss(logits: Tensor, labels: Tensor, label_smoothing: float, normalizer: Tensor | float) -> Tensor:
    """Next-token cross-entropy summed over labels that count / `normalizer`: float[P, V], int64[P]."""
    return F.cross_entropy(logits.float(), labels, label_smoothing=label_smoothing, reduction="sum") / normalizer
