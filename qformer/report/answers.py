"""Answers beside their images: entries of `results` of an evaluation's JSON, some of each kind and some failures."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qformer.metrics import vqa_accuracy
from qformer.report.page import Card, image_uri, joined, quiet, strong


def choose_examples(results: Sequence[dict[str, Any]], count: int = 24, failures: int = 6) -> list[dict[str, Any]]:
    """Up to `count` results on different images, kinds of question in turn; up to `failures` of them wrong."""
    wrong = _in_turn([r for r in results if not is_right(r)], failures, set())
    chosen = wrong + _in_turn([r for r in results if is_right(r)], count - len(wrong), {r["image"] for r in wrong})
    order = {id(r): i for i, r in enumerate(results)}
    return sorted(chosen, key=lambda r: order[id(r)])


def is_right(result: dict[str, Any]) -> bool:
    """Whether an answer counts in full by the VQA accuracy."""
    return vqa_accuracy(result["answer"], list(result["answers"])) >= 1


def answer_cards(results: Sequence[dict[str, Any]], side: int | None = None) -> list[Card]:
    """A card for each result: its image, the question, the answer and whether it is right, the truth.

    Args:
        side: pixels of an image's longer side at most; None = the file as it is.
    """
    cards = []
    for result in results:
        right, truth = is_right(result), " / ".join(dict.fromkeys(result["answers"]))
        answer = strong(f"{result['answer'] or '(nothing)'} {'✓' if right else '✗ wrong'}")
        lines = [result["question"], joined(["answer: ", answer]), quiet(f"truth: {truth}")]
        image = image_uri(Path(result["image"]), side)
        cards.append(Card(image, lines, "right" if right else "wrong", alt="a held-out image"))
    return cards


def _in_turn(results: list[dict[str, Any]], count: int, pictures: set[str]) -> list[dict[str, Any]]:
    """`count` results, one of each kind in turn, none on a picture in `pictures` or twice on the same."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        kinds.setdefault(result["question_type"] or "all", []).append(result)
    shown = set(pictures)
    chosen: list[dict[str, Any]] = []
    while len(chosen) < count and any(kinds.values()):
        for waiting in kinds.values():
            candidate = next((r for r in waiting if r["image"] not in shown), None)
            waiting[:] = [] if candidate is None else waiting[waiting.index(candidate) + 1 :]
            if candidate is not None and len(chosen) < count:
                chosen.append(candidate)
                shown.add(candidate["image"])
    return chosen
