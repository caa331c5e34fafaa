"""How captions and questions are written before they are tokenized."""

from __future__ import annotations

import re

PUNCTUATION = re.compile(r"[.!\"()*#:;~]")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")


def clean_caption(text: str, max_words: int = 50) -> str:
    """Lower-case a caption, put a space for each of `. ! " ( ) * # : ; ~` and keep the first `max_words` words.

    Control characters and line ends become spaces; runs of spaces become one.

    Source: BlipCaptionProcessor in lavis/processors/blip_processors.py.
    """
    return _first_words(PUNCTUATION.sub(" ", text.lower()), max_words)


def clean_question(text: str, max_words: int = 50) -> str:
    """Lower-case a question, remove `. ! " ( ) * # : ; ~` and keep the first `max_words` words.

    Unlike the reference, runs of spaces become one, as in captions.

    Source: BlipQuestionProcessor in lavis/processors/blip_processors.py.
    """
    return _first_words(PUNCTUATION.sub("", text.lower()), max_words)


def _first_words(text: str, max_words: int) -> str:
    return " ".join(CONTROL.sub(" ", text).split()[:max_words])
