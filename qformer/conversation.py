"""Questions about the same images, one after the other."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from qformer.inference import VisionLanguageModel
from qformer.language import PromptTooLong


def answer_next(
    model: VisionLanguageModel, images: Sequence[str | Path], question: str, *,
    turns: list[tuple[str, str]], settings: dict[str, Any],
) -> str:  # fmt: skip
    """Answer after the conversation so far, and add question and answer to its `turns`.

    Its oldest turns are forgotten when it grows too long.

    Args:
        images: all of them belong to each question.
        settings: as `VisionLanguageModel.answer` takes them by name.

    Raises: ValueError as `VisionLanguageModel.answer` does; PromptTooLong when the question alone is too long.
    """
    while True:
        try:
            answer = model.answer([list(images)], [question], history=turns, **settings)[0]
        except PromptTooLong:
            if not turns:
                raise
            del turns[0]
        else:
            turns.append((question, answer))
            return answer
