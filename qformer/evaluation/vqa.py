"""Visual question answering: generated answers, scored by the official VQA accuracy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qformer.evaluation.task import WITH_IMAGE, Scores, Task
from qformer.metrics import RULES, score_vqa

if TYPE_CHECKING:
    from qformer.data import Record

TEXT_ONLY, ORACLE_CAPTION = "text-only", "oracle-caption"
LARGE_DIFFERENCE = 5.0  # percent between two rules


def _lacks(record: "Record", mode: str) -> str | None:
    if not record.question:
        return "it has no question"
    if mode == ORACLE_CAPTION and not record.captions:
        return f"it has no caption, which --mode {ORACLE_CAPTION} gives the language model"
    return None


def _ask(model: Any, records: "Sequence[Record]", images: list | None, mode: str, **generation: Any) -> list[str]:
    context = [record.captions[0] for record in records] if mode == ORACLE_CAPTION else None
    return model.answer(images, [record.question for record in records], context, **generation)


def _score(records: "Sequence[Record]", answers: Sequence[str], rule: str) -> Scores:
    references = [list(record.answers) for record in records]
    types = [record.question_type or "all" for record in records]
    by_rule = {name: score_vqa(list(answers), references, types, name) for name in RULES}
    score = by_rule[rule]
    others = {name: other.overall for name, other in by_rule.items() if name != rule}
    warnings = []
    if max(abs(other - score.overall) for other in others.values()) > LARGE_DIFFERENCE:
        listed = ", ".join(f"{other:.1f} by {name}" for name, other in others.items())
        warnings.append(f"the rule matters here: {score.overall:.1f} by {rule}, {listed}; give it beside the number")
    groups = {name: (accuracy, score.n_by_type[name]) for name, accuracy in score.by_type.items()}
    unit = "VQA accuracy in percent"
    return Scores({"overall": score.overall}, score.n, rule, unit, groups, others, tuple(warnings))


def _describe(record: "Record") -> dict[str, Any]:
    return {"question": record.question, "answers": list(record.answers), "question_type": record.question_type}


TASK = Task(
    id_field="question_id",
    output_field="answer",
    modes=(WITH_IMAGE, TEXT_ONLY, ORACLE_CAPTION),
    rules=RULES,
    lacks=_lacks,
    has_reference=lambda record: bool(record.answers),
    ask=_ask,
    score=_score,
    describe=_describe,
)
