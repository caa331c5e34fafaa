"""What stages make of a batch's texts before anything is computed: tokens, and the two parts of a prefix LM's caption."""

import random
from typing import Any, NamedTuple

import torch
from torch import Tensor


class TextTokens(NamedTuple):
    """BERT tokens of the Q-Former's text side: int64[B, T] beginning with [CLS] and ending with [SEP], bool[B, T]."""

    ids: Tensor
    mask: Tensor


def tokenize(tokenizer: Any, texts: list[str], device: torch.device, max_tokens: int | None = None) -> TextTokens:
    """BERT tokens of the texts, cut at `max_tokens` and padded to the longest."""
    rows = tokenizer(texts, padding=True, truncation=max_tokens is not None, max_length=max_tokens, return_tensors="pt")
    return TextTokens(rows["input_ids"].to(device), rows["attention_mask"].bool().to(device))


def split_prefix(text: str, seed: int) -> tuple[str, str]:
    """Split a caption at a word drawn uniformly from 1 to its midpoint, as a pure function of text and seed.

    Source: BLIP-2 section 3.3, prefix language modelling. A caption of one word has no prefix.
    """
    words = text.split()
    if len(words) < 2:
        return "", text
    cut = random.Random(f"{seed} {text}").randint(1, max(1, len(words) // 2))
    return " ".join(words[:cut]), " ".join(words[cut:])
