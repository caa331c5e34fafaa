"""The official VQA accuracy: agreement with at least three of ten people, averaged over leaving each person out.

When answers are normalised moves the score by ten points (the same TextVQA answers score 49.1, 59.2 or 61.3), so the
rule has a name that belongs beside every reported number:

| `rule` | the prediction is normalised | the people's answers are | as in |
|---|---|---|---|
| "official-2021" | only when the answers differ | only when they differ | the VQA evaluation tool since March 2021 |
| "official-2017" | always | lose their punctuation, only when they differ | the tool before, and LAVIS |
| "always" | always | always | TextVQA and most later code |

A single reference, as POPE and DAQUAR have, always counts as normalised on both sides: it never differs from another,
and under the official rules "Yes" would be wrong for "yes".

Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py; LAVIS, lavis/common/vqa_tools/vqa_eval.py.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from functools import lru_cache

DISTINCT_ANSWERS = 1 << 16  # that are remembered: a data set's people give the same few thousand again and again
RULES = ("official-2021", "official-2017", "always")

_PUNCTUATION = ';/[]"{}()=+\\_->@<`,?!'
# The tool's lookbehind is misspelt ("(?!<=\d)") and excludes nothing: a period goes unless a digit follows it.
_PERIOD = re.compile(r"\.(?!\d)")
# The tool passes re.UNICODE (32) where `sub` expects a count, so the 33rd period of an answer stays.
_MAX_PERIODS = 32
_NUMBER_COMMA = re.compile(r"\d,\d")

_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5", "six": "6"}
_NUMBERS |= {"seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = {"a", "an", "the"}

# The tool repairs a contraction that lost exactly one apostrophe: "dont", "couldnt've" and "couldn'tve", never
# "couldntve". Its entries with a capital I are left out: it looks words up in lower case and cannot reach them.
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've
    he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's
    someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've
    there're there's they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's
    what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
    wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
"""
_CONTRACTIONS = {
    word[:i] + word[i + 1 :]: word
    for word in _CONTRACTED.split()
    for i, character in enumerate(word)
    if character == "'"
} | {"somebody'd": "somebodyd"}  # the wrong way round in the tool, hence here


@dataclass(frozen=True)
class VqaScore:
    """VQA accuracy over `n` questions, in percent, also by kind of answer where kinds were given."""

    overall: float
    by_type: dict[str, float]
    n: int
    n_by_type: dict[str, int]


@lru_cache(DISTINCT_ANSWERS)
def normalize_answer(text: str) -> str:
    """Lower-case an answer, drop articles and punctuation, write numbers as digits and fix contractions.

    A punctuation mark becomes a space, or nothing where the answer has it next to a space anywhere or has a comma
    between digits. Apostrophes and colons stay.

    Source: `processPunctuation` and `processDigitArticle` of the official tool, its oddities included.
    """
    words = (_NUMBERS.get(word, word) for word in _strip_punctuation(_tidy(text)).lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def vqa_accuracy(prediction: str, answers: list[str], rule: str = RULES[0]) -> float:
    """Mean over the answers, each left out in turn, of min(1, matches among the others / 3), in [0, 1].

    Fewer than ten answers count as if repeated evenly to ten, so a single one scores 0 or 1; the bare formula would
    cap the score of a record with three answers at 2/3.

    Args:
        prediction: the model's answer.
        answers: the people's answers, one entry per person, empty ones too: equal answers are not one answer.
        rule: when both sides are normalised, see the module's table.

    Raises: ValueError when `answers` is empty, or there is no such rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r}: expected one of {', '.join(RULES)}")
    if not answers:
        raise ValueError("answers=[]: expected at least one answer; drop questions without a reference before scoring")
    prediction, answers = _normalise(_tidy(prediction), [_tidy(answer) for answer in answers], rule)
    people = max(10, len(answers))
    matches = answers.count(prediction) * people / len(answers)
    # Leaving out one of the matching answers leaves one match fewer; leaving out any other leaves them all.
    return (matches * min(1, (matches - 1) / 3) + (people - matches) * min(1, matches / 3)) / people


def score_vqa(
    predictions: list[str], answers: list[list[str]], types: list[str] | None = None, rule: str = RULES[0]
) -> VqaScore:
    """Average `vqa_accuracy` over questions, and over the questions of each type.

    Args:
        predictions: one per question.
        answers: the people's answers to each question.
        types: the kind of each question, such as "yes/no", "number", "other"; None for no breakdown.
        rule: when answers are normalised, see the module's table.

    Raises: ValueError when there are no questions, or the lists differ in length.
    """
    if not predictions:
        raise ValueError("predictions=[]: expected at least one; check the split that was evaluated")
    for name, values in (("answers", answers), ("types", types)):
        if values is not None and len(values) != len(predictions):
            raise ValueError(
                f"{name} has {len(values)} entries for {len(predictions)} predictions: give one per question"
            )
    accuracies = [vqa_accuracy(*pair, rule=rule) for pair in zip(predictions, answers, strict=True)]
    groups: dict[str, list[float]] = defaultdict(list)
    for kind, accuracy in zip(types or [], accuracies, strict=types is not None):
        groups[kind].append(accuracy)
    return VqaScore(
        overall=_percent(accuracies),
        by_type={kind: _percent(values) for kind, values in groups.items()},
        n=len(accuracies),
        n_by_type={kind: len(values) for kind, values in groups.items()},
    )


def _normalise(prediction: str, answers: list[str], rule: str) -> tuple[str, list[str]]:
    if rule == "always" or len(answers) == 1:
        return normalize_answer(prediction), [normalize_answer(answer) for answer in answers]
    differ = len(set(answers)) > 1
    if rule == "official-2017":
        return normalize_answer(prediction), [_strip_punctuation(a) for a in answers] if differ else answers
    return (normalize_answer(prediction), [normalize_answer(a) for a in answers]) if differ else (prediction, answers)


def _tidy(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


@lru_cache(DISTINCT_ANSWERS)
def _strip_punctuation(text: str) -> str:
    number_comma = _NUMBER_COMMA.search(text) is not None
    table = {ord(p): "" if number_comma or f"{p} " in text or f" {p}" in text else " " for p in _PUNCTUATION}
    return _PERIOD.sub("", text.translate(table), count=_MAX_PERIODS)


def _percent(values: list[float]) -> float:
    return 100 * sum(values) / len(values)
