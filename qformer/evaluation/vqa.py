"""Visual question answering: generated answers, or the likeliest of several, scored by the official VQA accuracy or another rule of `rules.py`."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qformer.config.protocol import PMI
from qformer.evaluation.choosing import CHOICES
from qformer.evaluation.rules import RULES, score_answers
from qformer.evaluation.task import GENERATION, WITH_IMAGE, Task

if TYPE_CHECKING:
    from qformer.data import Record

TEXT_ONLY, ORACLE_CAPTION = "text-only", "oracle-caption"


def _lacks(record: "Record", mode: str) -> str | None:
    if not record.question:
        return "it has no question"
    if mode == ORACLE_CAPTION and not record.captions:
        return f"it has no caption, which --mode {ORACLE_CAPTION} gives the language model"
    return None


def _ask(
    model: Any, records: "Sequence[Record]", images: list | None, mode: str, *,
    choose_from: Sequence[str] | None = None, choose_by: str | None = None, **generation: Any,
) -> list[str]:  # fmt: skip
    context = [record.captions[0] for record in records] if mode == ORACLE_CAPTION else None
    questions = [record.question for record in records]
    if choose_from is None:
        return model.answer(images, questions, context, **generation)
    lists = [record.choices if choose_from == CHOICES else choose_from for record in records]
    losses = model.rank(images, questions, lists, context, prompt=generation.get("prompt"), pmi=choose_by == PMI)
    return [several[int(loss.argmin())] for several, loss in zip(lists, losses, strict=True)]


def _describe(record: "Record") -> dict[str, Any]:
    return {"question": record.question, "answers": list(record.answers), "question_type": record.question_type}


TASK = Task(
    id_field="question_id",
    output_field="answer",
    modes=(WITH_IMAGE, TEXT_ONLY, ORACLE_CAPTION),
    rules=tuple(RULES),
    lacks=_lacks,
    has_reference=lambda record: bool(record.answers),
    ask=_ask,
    score=score_answers,
    describe=_describe,
    options=(*GENERATION, "choose_from", "choose_by"),
)
