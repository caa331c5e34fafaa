"""The words of an error: another library's in one line, the nearest of what is known, and the line that ends a stage."""

import difflib
import hashlib
import os
import sys
from collections.abc import Iterable
from pathlib import Path

EMPTY_ANSWER = "(the answer is empty: the language model ended it at once)"


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


def print_error(line: str) -> None:
    """Print the line that ends a stage on standard error; of a machine's processes under one launcher, the first alone.

    All of them make the same mistake. The launcher has told each the name of a file for its error, all in one folder.
    """
    if error_file := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        mark = Path(error_file).parent.parent / hashlib.sha256(line.encode()).hexdigest()
        try:
            mark.touch(exist_ok=False)
        except FileExistsError:
            return
        except OSError:  # a launcher without that folder: better twice than never
            pass
    print(line, file=sys.stderr, flush=True)
