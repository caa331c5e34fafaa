"""The same inputs for every side: captions, features and pictures out of a seed."""

import random
from string import ascii_lowercase
from typing import Any

import torch
from torch import Tensor

WORDS = [a + b for a in ascii_lowercase for b in ascii_lowercase]  # a token each
QUESTION = "Question: {} Answer:"


def captions(n: int, words: tuple[int, int], seed: int = 0) -> list[str]:
    """`n` captions whose lengths are spread evenly from the shortest to the longest, in random order."""
    rng, (low, high) = random.Random(seed), words
    lengths = [low + round((high - low) * i / max(n - 1, 1)) for i in range(n)]
    rng.shuffle(lengths)
    return [" ".join(rng.choices(WORDS, k=length)) for length in lengths]


def features(task: dict[str, Any], n: int, first: int = 0) -> Tensor:
    """float[n, N, Dv], picture `first` and the following."""
    return torch.stack([
        torch.randn(task["tokens"], task["encoder_width"], generator=torch.Generator().manual_seed(1000 + i))
        for i in range(first, first + n)
    ]).to(task["device"])  # fmt: skip


def pixels(n: int, side: int) -> Tensor:
    """float[n, 3, S, S]: pictures as an encoder wants them."""
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(2))


def questions(n: int) -> list[str]:
    """Questions of 4 to 8 words, without anything that is cleaned away."""
    return captions(n, (4, 8), seed=3)


def prefixes(texts: list[str]) -> list[tuple[str, str]]:
    """Each text cut at its first third, as prefix language modelling wants it."""
    words = [text.split() for text in texts]
    return [(" ".join(w[: len(w) // 3]), " ".join(w[len(w) // 3 :])) for w in words]


def autocast(task: dict[str, Any]) -> torch.autocast:
    return torch.autocast(task["device"], torch.bfloat16, enabled=task["dtype"] == "bfloat16")


def draw_negatives(similarities: Tensor) -> Tensor:
    """For each row another column, from the softmax of its similarities, as LAVIS draws it."""
    weights = similarities.softmax(1) + 1e-4
    return torch.multinomial(weights.fill_diagonal_(0), 1)[:, 0]


class Reranking:
    """Matching logits of every picture with every caption, a few pictures a turn; a side brings `score`."""

    task: dict[str, Any]
    texts: list[str]

    def score(self, first: int, n: int, texts: list[str]) -> Tensor:
        """float[n, C] of the pictures from `first` on."""
        raise NotImplementedError

    def check(self) -> dict[str, Any]:
        return {"logits": self.score(0, 2, self.texts[:4]).flatten().tolist()}

    def step(self, round: int) -> None:
        n = self.task["pictures_a_turn"]
        self.score(round * n % self.task["pictures"], n, self.texts)
