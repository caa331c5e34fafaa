"""Captions against people's, by coco-caption's own programs (`pycocoevalcap`): BLEU, METEOR, ROUGE-L, CIDEr-D and SPICE.

Source: https://github.com/tylin/coco-caption, as `pycocoevalcap` ships it.
"""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass, field

from qformer.metrics.java_scores import score_by_java
from qformer.metrics.tokens import APPROXIMATE, PTB, find_java, tokenize_approximately, tokenize_ptb

AUTO = "auto"  # PTB where there is Java
NONE = "none"  # the captions are tokens already
TOKENIZERS = (AUTO, PTB, APPROXIMATE, NONE)
BLEU = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4")
INSTALL = "pip install 'qformer[captions]'"


@dataclass(frozen=True)
class CaptionScores:
    """Scores from 0 to 1 (CIDEr: to 10) of `n` captions, by the names that coco-caption has.

    Args:
        tokenizer: "PTB", "none", or "approximate": then a number may differ from coco-caption's.
        values: of the corpus.
        each: of every caption, in order.
        absent: why METEOR or SPICE could not be computed.
    """

    tokenizer: str
    n: int
    values: dict[str, float]
    each: list[dict[str, float]]
    absent: dict[str, str] = field(default_factory=dict)


def require_caption_metrics(tokenizer: str = AUTO) -> None:
    """Raises: ValueError when pycocoevalcap is missing, or Java for the PTB tokenizer."""
    if importlib.util.find_spec("pycocoevalcap") is None:
        raise ValueError(f"captions are scored by pycocoevalcap, which is not installed: {INSTALL}")
    if tokenizer == PTB and find_java() is None:
        raise ValueError(f"the PTB tokenizer needs Java: {INSTALL}; or give --rule {APPROXIMATE}")


def score_captions(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str = AUTO
) -> CaptionScores:
    """Score one caption an image against its references, of which every image has one or more.

    Without Java there is no METEOR and no SPICE; by the approximate tokenizer neither, as they would not be coco-caption's.

    Args:
        tokenizer: "PTB", "approximate", "none" for what is tokenized, or "auto": PTB where there is Java.

    Raises: ValueError when an image has no reference, or as `require_caption_metrics` does.
    """
    require_caption_metrics(tokenizer)
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"{len(predictions)} captions for {len(references)} images; give one each, one or more in all")
    if odd := [text for text in predictions if not isinstance(text, str)]:
        raise ValueError(f"{odd[0]!r} is no caption; expected a text for each image")
    if not all(references):
        raise ValueError(f"image {[bool(texts) for texts in references].index(False)} (from 0) has no reference")
    java = None if tokenizer == APPROXIMATE else find_java()
    if tokenizer == AUTO:
        tokenizer = PTB if java else APPROXIMATE
    ours, theirs = _tokenize(predictions, references, tokenizer, java)
    columns = _score_in_python(ours, theirs)
    absent = {}
    for name in ("METEOR", "SPICE"):
        if java is None:
            absent[name] = f"needs Java and its tokenizer: {INSTALL}"
            continue
        scored = score_by_java(name, ours, theirs, java)
        if isinstance(scored, str):
            absent[name] = scored
        else:
            columns[name] = scored
    order = [name for name in (*BLEU, "METEOR", "ROUGE_L", "CIDEr", "SPICE") if name in columns]
    each = [{name: columns[name][1][i] for name in order} for i in range(len(ours))]
    values = {name: columns[name][0] for name in order}
    return CaptionScores(tokenizer, len(ours), values, each, absent)


def _tokenize(
    predictions: Sequence[str], references: Sequence[Sequence[str]], tokenizer: str, java: str | None
) -> tuple[list[str], list[list[str]]]:
    flat = [*predictions, *(text for texts in references for text in texts)]
    if tokenizer == PTB and java is not None:
        flat = tokenize_ptb(flat, java)
    elif tokenizer == APPROXIMATE:
        flat = tokenize_approximately(flat)
    else:
        flat = [" ".join(text.splitlines()) for text in flat]
    tokens = iter(flat)
    ours = [next(tokens) for _ in predictions]
    return ours, [[next(tokens) for _ in texts] for texts in references]


def _score_in_python(ours: list[str], theirs: list[list[str]]) -> dict[str, tuple[float, list[float]]]:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    results, references = dict(enumerate([text] for text in ours)), dict(enumerate(theirs))
    corpus, each = Bleu(4).compute_score(references, results, verbose=0)
    columns = {name: (float(corpus[i]), list(map(float, each[i]))) for i, name in enumerate(BLEU)}
    for name, scorer in (("ROUGE_L", Rouge()), ("CIDEr", Cider())):
        score, scores = scorer.compute_score(references, results)
        columns[name] = (float(score), list(map(float, scores)))
    return columns
