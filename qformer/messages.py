"""The words of an error: what another library said in one line, and the nearest of what is known."""

import difflib
from collections.abc import Iterable


def one_line(error: BaseException | str, limit: int = 200) -> str:
    """What an error says in one line of at most `limit` characters, cut where a sentence ends, else between words."""
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) <= limit:
        return text
    head = text[: limit - 4]
    sentence = max(head.rfind(end) for end in (". ", "; ", "! ", "? "))
    if sentence > limit // 4:
        return head[: sentence + 1].rstrip(";")
    return f"{head.rpartition(' ')[0] or head} ..."


def nearest(name: str, known: Iterable[str], count: int = 1, cutoff: float = 0.0) -> str:
    """The end of a message about an unknown name: "nearest is a" or "nearest are a, b"; "there are none" without any."""
    names = difflib.get_close_matches(name, list(known), n=count, cutoff=cutoff)
    if not names:
        return "there are none"
    return f"nearest {'is' if len(names) == 1 else 'are'} {', '.join(names)}"
