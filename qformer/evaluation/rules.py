"""How answers to questions are scored, by the name of the rule: VQA accuracy in its versions, and the other data sets'."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from qformer.evaluation.task import Scores
from qformer.metrics import RULES as VQA_RULES
from qformer.metrics import vqa_accuracy
from qformer.metrics.answers import (
    UNANSWERABLE,
    average_precision,
    choose,
    exact_match,
    is_unanswerable,
    normalize_answer,
    score_binary,
    three_match,
    vizwiz_accuracy,
    yes_or_no,
)

if TYPE_CHECKING:
    from qformer.data import Record

LARGE_DIFFERENCE = 5.0  # percent between two rules
_VQA = "VQA accuracy in percent"

Accuracy = Callable[[str, Sequence[str]], float]  # of an answer against the people's, 0 to 1


def score_answers(records: "Sequence[Record]", answers: Sequence[str], rule: str) -> Scores:
    """The scores of answers to records that have references, by a rule of `RULES`.

    Raises: ValueError when a record lacks what the rule needs: choices, yes or no.
    """
    return RULES[rule](records, answers, rule)


def _vqa(records: "Sequence[Record]", answers: Sequence[str], rule: str) -> Scores:
    by_rule = {name: _accuracies(records, answers, _vqa_by(name)) for name in VQA_RULES}
    scores = _averaged(records, by_rule[rule], rule, _VQA)
    others = {name: _mean(values) for name, values in by_rule.items() if name != rule}
    value, warnings = scores.values["overall"], []
    if max(abs(other - value) for other in others.values()) > LARGE_DIFFERENCE:
        listed = ", ".join(f"{other:.1f} by {name}" for name, other in others.items())
        warnings.append(f"the rule matters here: {value:.1f} by {rule}, {listed}; give it beside the number")
    return replace(scores, others=others, warnings=tuple(warnings))


def _vqa_by(rule: str) -> Accuracy:
    return lambda answer, people: vqa_accuracy(answer, list(people), rule)


def _okvqa(records: "Sequence[Record]", answers: Sequence[str], rule: str) -> Scores:
    """LAVIS' for OK-VQA: the tool of 2017. Its files hold each of five people's answers twice; five count as such."""
    return _averaged(records, _accuracies(records, answers, _vqa_by("official-2017")), rule, _VQA)


def _gqa(records: "Sequence[Record]", answers: Sequence[str], rule: str) -> Scores:
    by_rule = {"gqa": _accuracies(records, answers, _match), "exact": _accuracies(records, answers, _match_exactly)}
    scores = _averaged(records, by_rule[rule], rule, "exact matches in percent")
    return replace(scores, others={name: _mean(values) for name, values in by_rule.items() if name != rule})


def _match(answer: str, references: Sequence[str]) -> float:
    return max(exact_match(answer, reference) for reference in references)


def _match_exactly(answer: str, references: Sequence[str]) -> float:
    return float(answer in references)


def _aokvqa(records: "Sequence[Record]", answers: Sequence[str], rule: str) -> Scores:
    return _averaged(records, _accuracies(records, answers, three_match), rule, "A-OKVQA's accuracy in percent")


def _vizwiz(records: "Sequence[Record]", answers: Sequence[str], rule: str) -> Scores:
    """Beside the accuracy, whether questions that cannot be answered were told: every answer says that it can or not."""
    scores = _averaged(records, _accuracies(records, answers, vizwiz_accuracy), rule, _VQA)
    labels = [is_unanswerable(record.answers, record.answer_type) for record in records]
    predictions = [normalize_answer(answer) == UNANSWERABLE for answer in answers]
    unanswerable = {
        "unanswerable_f1": score_binary(predictions, labels).f1,
        "unanswerable_average_precision": average_precision(predictions, labels),
    }
    return replace(scores, values=scores.values | unanswerable)


def _pope(records: "Sequence[Record]", answers: Sequence[str], rule: str) -> Scores:
    labels = [_label(record) for record in records]
    predictions = [yes_or_no(answer) == "yes" for answer in answers]
    subsets: dict[str, list[int]] = defaultdict(list)
    for i, record in enumerate(records):
        subsets[record.question_type or record.split or "all"].append(i)
    return Scores(
        _binary(predictions, labels), len(records), rule, "percent, yes is positive",
        breakdown={"by_subset": {
            name: _binary([predictions[i] for i in rows], [labels[i] for i in rows]) | {"n": len(rows)}
            for name, rows in subsets.items()
        }},
        each=[{"accuracy": 100.0 * (p == label)} for p, label in zip(predictions, labels, strict=True)],
    )  # fmt: skip


def _binary(predictions: Sequence[bool], labels: Sequence[bool]) -> dict[str, float]:
    score = score_binary(predictions, labels)
    return {name: getattr(score, name) for name in ("accuracy", "precision", "recall", "f1", "yes_ratio")}


def _label(record: "Record") -> bool:
    label = normalize_answer(record.answers[0])
    if label not in ("yes", "no") or len(set(record.answers)) > 1:
        raise ValueError(
            f"{record.image}: its answers are {list(record.answers)}; rule pope needs yes or no, one of them"
        )
    return label == "yes"


def _choice(records: "Sequence[Record]", answers: Sequence[str], rule: str) -> Scores:
    chosen = []
    for record, answer in zip(records, answers, strict=True):
        if not record.choices:
            raise ValueError(f"{record.image}: its record has no choices, which rule choice needs")
        if (right := choose(record.answers[0], record.choices)) is None:
            raise ValueError(f"{record.image}: its answer {record.answers[0]!r} is none of {list(record.choices)}")
        chosen.append((choose(answer, record.choices), right))
    scores = _averaged(records, [float(c == right) for c, right in chosen], rule, "right choices in percent")
    lost = [answer for answer, (choice, _) in zip(answers, chosen, strict=True) if choice is None]
    warning = f"{len(lost)} answers name none of the choices, which counts as wrong, the first: {lost[:1]}"
    return replace(scores, warnings=(warning,) if lost else ())


RULES: dict[str, Callable[["Sequence[Record]", Sequence[str], str], Scores]] = {
    **dict.fromkeys(VQA_RULES, _vqa),
    "okvqa": _okvqa,
    "aokvqa": _aokvqa,
    "vizwiz": _vizwiz,
    "gqa": _gqa,
    "exact": _gqa,
    "pope": _pope,
    "choice": _choice,
}


def _accuracies(records: "Sequence[Record]", answers: Sequence[str], accuracy: Accuracy) -> list[float]:
    return [accuracy(answer, record.answers) for record, answer in zip(records, answers, strict=True)]


def _averaged(records: "Sequence[Record]", values: Sequence[float], rule: str, unit: str) -> Scores:
    """The mean, also over the questions of each type, and of each type of answer as the servers report it."""
    groups = _by_kind([record.question_type or "all" for record in records], values)
    known = _by_kind([record.answer_type for record in records], values)
    breakdown = {"by_answer_type": {kind: {"overall": value, "n": n} for kind, (value, n) in known.items()}}
    return Scores(
        {"overall": _mean(values)}, len(values), rule, unit, groups, breakdown=breakdown if known else {},
        each=[{"accuracy": 100 * value} for value in values],
    )  # fmt: skip


def _by_kind(kinds: Sequence[str | None], values: Sequence[float]) -> dict[str, tuple[float, int]]:
    groups: dict[str, list[float]] = defaultdict(list)
    for kind, value in zip(kinds, values, strict=True):
        if kind:
            groups[kind].append(value)
    return {kind: (_mean(group), len(group)) for kind, group in groups.items()}


def _mean(values: Sequence[float]) -> float:
    return 100 * sum(values) / len(values)
