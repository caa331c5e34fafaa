"""Image-text retrieval: how often the right partner is among the k most similar."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_LOW = 2**31 - 1  # the 31 low bits of an integer


@dataclass(frozen=True)
class RetrievalScore:
    """Recall at each k, in percent, in both directions (the papers' TR@k and IR@k)."""

    image_to_text: dict[int, float]
    text_to_image: dict[int, float]
    n_images: int
    n_texts: int


def recall_at_k(
    similarity: Tensor, text_image: Tensor, ks: Sequence[int] = (1, 5, 10), texts: Sequence[str] | None = None
) -> RetrievalScore:  # fmt: skip
    """Recall@k of images by caption and of captions by image.

    An image counts as retrieved if any of its captions is in its top k. Ties count against us: every wrong candidate as
    similar as the right one is ranked before it, so a constant similarity does not score.

    Args:
        similarity: float[I, T], higher is more alike; -inf marks pairs that were never compared.
        text_image: int[T], the image that each caption belongs to.
        ks: list sizes, 1 or more.
        texts: the T captions; an equal caption of another image is as right as the own one. None = all differ.

    Raises:
        ValueError: the shapes do not fit each other.
        ValueError: `text_image` points outside the images, or an image has no caption.
        ValueError: `similarity` holds NaN.
        ValueError: a k is below 1.
    """
    if similarity.ndim != 2 or text_image.shape != similarity.shape[1:] or similarity.numel() == 0:
        raise ValueError(
            f"similarity {list(similarity.shape)} and text_image {list(text_image.shape)}: expected [I, T] and [T], "
            "both non-empty; rows are images, columns are captions"
        )
    n_images, n_texts = similarity.shape
    text_image = text_image.to(similarity.device, torch.long)
    if text_image.min() < 0 or text_image.max() >= n_images:
        raise ValueError(
            f"text_image spans {int(text_image.min())}..{int(text_image.max())}: expected 0..{n_images - 1}, "
            "the row of each caption's image"
        )
    captions = torch.bincount(text_image, minlength=n_images)
    if (captions == 0).any():
        raise ValueError(f"image {int((captions == 0).nonzero()[0])} has no caption: drop its row from similarity")
    if similarity.isnan().any():  # NaN compares false with everything and would rank first
        raise ValueError("similarity holds NaN: expected numbers or -inf; check the embeddings before scoring")
    if min(ks) < 1:
        raise ValueError(f"ks={list(ks)}: expected list sizes of 1 or more")

    right = text_image == torch.arange(n_images, device=similarity.device)[:, None]  # bool[I, T]
    if texts is not None:
        numbers = {text: i for i, text in enumerate(dict.fromkeys(texts))}
        kind = torch.tensor([numbers[text] for text in texts], device=similarity.device)
        has = right.new_zeros(n_images, len(numbers))  # bool[I, distinct texts]
        has[text_image, kind] = True
        right = has[:, kind]
    of_right = similarity.masked_fill(~right, -torch.inf)
    # The rank of the right partner is the number of wrong candidates at least as similar.
    image_rank = (~right & (similarity >= of_right.amax(1, keepdim=True))).sum(1)
    text_rank = (~right & (similarity >= of_right.amax(0))).sum(0)
    return RetrievalScore(_recall(image_rank, ks), _recall(text_rank, ks), n_images, n_texts)


def _recall(rank: Tensor, ks: Sequence[int]) -> dict[int, float]:
    return {k: 100 * int((rank < k).sum()) / len(rank) for k in ks}


def order_keys(scores: Tensor, right: Tensor, index: Tensor) -> Tensor:
    """One integer a candidate whose order is that of a list: the highest score first; of equal scores a wrong one, as in
    `recall_at_k`, then the smaller number. No two are equal, so `topk` is the same however candidates come together.

    Args:
        scores: float[..., n] without NaN, right: bool[..., n], index: int[..., n] below 2**31; broadcast together.

    Returns: int64[..., n]; `read_keys` is the inverse.

    Raises: ValueError when a score is NaN.
    """
    if scores.isnan().any():
        raise ValueError(
            "a score is NaN: expected numbers; check the adapter, or encoder.dtype (bfloat16 is the wider one)"
        )
    bits = (scores.float() + 0.0).view(torch.int32)  # -0.0 becomes 0.0
    ascending = bits ^ ((bits >> 31) & _LOW)
    return (ascending.long() << 32) | ((~right).long() << 31) | (_LOW - index)


def read_keys(keys: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Scores float32, right bool and index int64 of `order_keys`."""
    ascending = (keys >> 32).int()
    scores = (ascending ^ ((ascending >> 31) & _LOW)).view(torch.float32)
    return scores, (keys >> 31) & 1 == 0, _LOW - (keys & _LOW)
