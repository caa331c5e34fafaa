"""How captions and questions are written before they are tokenized."""

from __future__ import annotations

import re

# Of the reference's . ! " ( ) * # : ; ~ all but the points and colons of numbers: 3.5, .5, 10:30.
PUNCTUATION = re.compile(r"[!\"()*#;~]|:(?!(?<=\d:)\d)|\.(?!\d)|(?<=[^\W\d])\.|(?<=\.)\.")
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]")
CLEANINGS = ("blip", "none")
MAX_WORDS = 50


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
