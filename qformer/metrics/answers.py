"""How answers are scored where not by VQA accuracy: exact match, A-OKVQA, VizWiz, POPE's yes and no, multiple choice.

Each follows one official program, so that a number carries the name of the program that would have printed it. What
`vqa.py` scores stands there: VQA v2, TextVQA, and OK-VQA, whose five answers count twice each by its own rule.
"""

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from qformer.metrics.vqa import normalize_answer

UNANSWERABLE = "unanswerable"
_LETTER = re.compile(r"\(?([A-Za-z])(?:[).:,]|$)")
_SAID = re.compile(r"\banswer is:?\s*\(?([A-Za-z])\b", re.IGNORECASE)


def exact_match(prediction: str, answer: str) -> float:
    """1 when the normalised prediction is the answer, else 0, which is how LAVIS reports GQA.

    GQA's own program compares texts as they are: "Yes" is wrong for "yes" (rule "exact").

    Source: lavis/tasks/vqa.py, GQATask; eval.py of GQA (Hudson and Manning, 2019).
    """
    return float(normalize_answer(prediction) in (answer, normalize_answer(answer)))


def three_match(prediction: str, answers: Sequence[str]) -> float:
    """A-OKVQA's direct answers: min(1, matches / 3) without leaving anybody out, the prediction in small letters.

    Source: evaluation/eval_predictions.py of allenai/aokvqa.
    """
    return min(1.0, list(answers).count(prediction.lower().strip()) / 3)


def vizwiz_accuracy(prediction: str, answers: Sequence[str]) -> float:
    """VizWiz: each person left out in turn, min(1, matches / 3), the prediction always normalised, the answers never.

    Fewer than ten answers count as they are: 3 equal ones of 3 score 2/3.

    Source: vqaEval.py of the VizWiz evaluation.

    Raises: ValueError when `answers` is empty.
    """
    if not answers:
        raise ValueError("answers=[]: expected at least one answer; drop questions without a reference before scoring")
    matches, people = list(answers).count(normalize_answer(prediction)), len(answers)
    return (matches * min(1, (matches - 1) / 3) + (people - matches) * min(1, matches / 3)) / people


def is_unanswerable(answers: Sequence[str], answer_type: str | None = None) -> bool:
    """Whether people could not answer: VizWiz's type of the most popular answer, or that answer itself."""
    if answer_type is not None:
        return answer_type == UNANSWERABLE
    return bool(answers) and Counter(answers).most_common(1)[0][0] == UNANSWERABLE


@dataclass(frozen=True)
class BinaryScore:
    """Yes and no, in percent: `yes` is positive; what would divide by 0 is 0."""

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_ratio: float
    n: int


def yes_or_no(text: str) -> str:
    """POPE's reading of an answer: "no" when its first sentence has the word No, no or not, else "yes".

    Source: evaluate.py of RUCAIBox/POPE.
    """
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "no", "not"} & set(words) else "yes"


def score_binary(predictions: Sequence[bool], labels: Sequence[bool]) -> BinaryScore:
    """Accuracy, precision, recall, F1 and the share of yes of binary predictions.

    Source: evaluate.py of RUCAIBox/POPE (Li et al., 2023, section 5.1).

    Raises: ValueError when there are none, or the lists differ in length.
    """
    if not predictions or len(predictions) != len(labels):
        raise ValueError(f"{len(predictions)} predictions for {len(labels)} labels: expected one each, at least one")
    counts = Counter(zip(predictions, labels, strict=True))
    right, false_yes, missed = counts[True, True], counts[True, False], counts[False, True]
    return BinaryScore(
        accuracy=_percent(right + counts[False, False], len(labels)),
        precision=_percent(right, right + false_yes),
        recall=_percent(right, right + missed),
        f1=_percent(2 * right, 2 * right + false_yes + missed),
        yes_ratio=_percent(right + false_yes, len(labels)),
        n=len(labels),
    )


def average_precision(predictions: Sequence[bool], labels: Sequence[bool]) -> float:
    """The area under the precision-recall steps of predictions that are only true or false, in percent.

    With two values there are two steps: the precision of those predicted true up to their recall, then the share of
    true labels.

    Source: sklearn.metrics.average_precision_score, as VizWiz's evaluation calls it.
    """
    score, share = score_binary(predictions, labels), _percent(sum(labels), len(labels))
    return (score.precision * score.recall + share * (100 - score.recall)) / 100 if any(labels) else 0.0


def choose(text: str, choices: Sequence[str]) -> int | None:
    """Which of the choices an answer names, by its text or by its letter; None = none of them.

    "B", "(b)", "b.", "B) a dog", "The answer is B." name the second; so does its own text, which goes first: where "A" is
    a choice, it is that choice. "A dog" names the first only when the first is "a dog".

    Source: of the forms, llava/eval/eval_science_qa.py of LLaVA, and "The answer is ([A-Z])." of lupantech/ScienceQA.
    """
    texts = [normalize_answer(choice) for choice in choices]
    if (answer := normalize_answer(text)) in texts and texts.count(answer) == 1:
        return texts.index(answer)
    if text in choices:
        return list(choices).index(text)
    letter = _LETTER.match(text.strip()) or _SAID.search(text)
    number = ord(letter[1].upper()) - ord("A") if letter else len(choices)
    return number if number < len(choices) else None


def _percent(part: int, whole: int) -> float:
    return 100 * part / whole if whole else 0.0
