"""How captions, questions and answers are chosen and written before they are tokenized."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from qformer.data.records import BrokenRecord, Record

# Of the reference's . ! " ( ) * # : ; ~ all but the points and colons of numbers: 3.5, .5, 10:30.
PUNCTUATION = re.compile(r"[!\"()*#;~]|:(?!(?<=\d:)\d)|\.(?!\d)|(?<=[^\W\d])\.|(?<=\.)\.")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
CLEANINGS = ("blip", "none")
MAX_WORDS = 50
TEXTS = ("caption", "question", "vqa")
ANSWERS = ("votes", "most_frequent")


def clean_caption(text: str, max_words: int = MAX_WORDS, cleaning: str = "blip") -> str:
    """Lower-case a caption, put a space for each of `. ! " ( ) * # : ; ~` and keep the first `max_words` words.

    Control characters and line ends become spaces; runs of spaces become one. Unlike the reference, numbers keep their
    points and colons: 3.5 cm, 10:30. With `cleaning` "none" the text stays as it is up to its `max_words`-th word.

    Source: BlipCaptionProcessor in lavis/processors/blip_processors.py.
    """
    return _clean(text, " ", max_words, cleaning)


def clean_question(text: str, max_words: int = MAX_WORDS, cleaning: str = "blip") -> str:
    """Lower-case a question, remove `. ! " ( ) * # : ; ~` and keep the first `max_words` words; else as `clean_caption`.

    Unlike the reference, runs of spaces become one, as in captions.

    Source: BlipQuestionProcessor in lavis/processors/blip_processors.py.
    """
    return _clean(text, "", max_words, cleaning)


def _clean(text: str, instead: str, max_words: int, cleaning: str) -> str:
    if cleaning == "none":
        words = re.match(rf"\s*(?:\S+\s+){{0,{max_words - 1}}}\S+", text)
        return words[0].strip() if words else ""
    return " ".join(CONTROL.sub(" ", PUNCTUATION.sub(instead, text.lower())).split()[:max_words])


@dataclass(frozen=True)
class Wording:
    """How the records of one data set become texts: what is to be written, and the prompt before it.

    Args:
        text: "caption": one of the record's captions is written; "vqa": an answer to its question; "question": its
            question, as in InstructBLIP's question generation.
        templates: prompts of which a record gets one at a time, {} where its question (vqa) or answer (question) goes;
            empty = no prompt, and for vqa the question alone.
        answer: "votes" draws an answer in proportion to the people who gave it, as BLIP does; "most_frequent" takes
            the commonest, the first of equals.
        cleaning, max_words: of captions and questions, see `clean_caption`; answers stay as they are, in one line.

    Raises: ValueError when text or answer is none of these.
    """

    text: str = "caption"
    templates: tuple[str, ...] = ()
    answer: str = "votes"
    cleaning: str = "blip"
    max_words: int = MAX_WORDS

    def __post_init__(self) -> None:
        for name, value, choices in (("text", self.text, TEXTS), ("answer", self.answer, ANSWERS)):
            if value not in choices:
                raise ValueError(f"{name}={value!r}: expected one of {', '.join(choices)}")

    def texts(self, record: Record) -> tuple[str, ...]:
        """All that a record has to be written, as it has it."""
        question = (record.question,) if record.question else ()
        return {"caption": record.captions, "vqa": record.answers, "question": question}[self.text]

    def choose(self, record: Record, rng: np.random.Generator | None) -> tuple[str | None, str]:
        """A record's prompt, None where there is none, and its text; without `rng` the first or commonest of each.

        Raises: BrokenRecord when the record lacks what is to be written, or the answers that training needs.
        """
        if self.text == "caption":
            blank, text = "", clean_caption(_draw(record.captions, rng), self.max_words, self.cleaning)
        else:
            answers = [line for answer in record.answers if (line := " ".join(CONTROL.sub(" ", answer).split()))]
            if not answers and (self.text == "vqa" or self.templates or rng is not None):
                raise BrokenRecord(record.image, "the record has no answers, or only empty ones")
            question = clean_question(record.question or "", self.max_words, self.cleaning)
            if not question:
                raise BrokenRecord(record.image, "the record has no question, or an empty one")
            commonest = rng is None or self.answer == "most_frequent"
            answer = Counter(answers).most_common(1)[0][0] if answers and commonest else _draw(answers, rng)
            blank, text = (question, answer) if self.text == "vqa" else (answer, question)
        if not text.strip():
            raise BrokenRecord(record.image, f"the record has no {self.text}, or an empty one")
        templates = self.templates or (("{}",) if self.text == "vqa" else ())
        return (_draw(templates, rng).replace("{}", blank) if templates else None), text


def _draw(choices: Sequence[str], rng: np.random.Generator | None) -> str:
    if not choices:
        return ""
    return choices[0 if rng is None else int(rng.integers(len(choices)))]
