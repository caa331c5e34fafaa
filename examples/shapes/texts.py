"""What the small language models are pretrained on: descriptions, paraphrases, questions about a description; never a picture.

Texts are lists of pieces with the weight that their tokens have in the loss: an answer is one word among thirty.
"""

import random
import re
from collections.abc import Callable
from typing import NamedTuple

import torch

from qformer.shapes import grammar, world

BOS, PAD, UNK, LINE_END = "</s>", "<pad>", "<unk>", "\n"
WORD = re.compile(r"\n|</s>|<pad>|<unk>|[\w-]+|[^\w\s]")
Pieces = list[tuple[str, float]]  # text, weight of its tokens in the loss
SEPARATORS = (" , ", " and ", " . ")


class Level(NamedTuple):
    """How hard the texts are: binding a word to its item is learnt on the simplest of them first."""

    forms: tuple[Callable[[world.Item], str], ...]
    items: tuple[int, ...]
    question_types: tuple[str, ...]
    again: float  # share of texts that say the scene again
    lookups: int  # short look-ups ("circle colour: red") in a text: many answers in few tokens
    captions: float = 0.0  # share of scenes said as a caption says them
    asked: float = 0.5  # seq2seq: share of questions, the rest being look-ups
    unaided: float = 0.4  # seq2seq: share of these whose last words the decoder is not given
    about: str = ""  # only questions in which this is found (a regular expression)


LEVELS = (
    Level(grammar.FORMS[:2], (2, 3), (), 0.0, 16),
    Level(grammar.FORMS[:4], (2, 3), ("colour", "shape", "size", "place"), 0.2, 8),
    Level(grammar.FORMS, (1, 2, 2, 3, 3), grammar.QUESTION_TYPES, 0.4, 5),
    # Comparing two items takes longest to learn: half of the questions, once everything else is known.
    Level(grammar.FORMS, (1, 2, 2, 3, 3), grammar.QUESTION_TYPES + ("relation",) * 6, 0.3, 2, captions=0.5),
)
SEQ2SEQ_LEVELS = (  # the same, asked in the encoder; counting too takes long there
    LEVELS[0],
    Level(grammar.FORMS[:2], (2, 3), (), 0.0, 16),
    *LEVELS[1:3],
    LEVELS[3]._replace(
        question_types=grammar.QUESTION_TYPES + ("relation",) * 4 + ("count",) * 3, again=0.2, asked=0.85, unaided=0.7
    ),
)

# What T5 does not find among all the rest: which of two items is further to the left, and what is at a place said before it.
COMPARISONS = Level(grammar.FORMS[:2], (2,), ("relation",), 0.0, 0, asked=1.0, unaided=1.0, about="to the")
PLACE_FIRST = Level(
    tuple(grammar.FORMS[i] for i in (2, 5, 7)), (2, 3), ("colour", "shape", "size"), 0.0, 0,
    asked=1.0, unaided=1.0, about="top|bottom|middle",
)  # fmt: skip


def lm_vocabulary() -> dict[str, int]:
    """Word ids of both language models. OPT's own special ids: 1 pad, 2 begin and end; T5 uses the same."""
    return {word: i for i, word in enumerate(["<s>", PAD, BOS, UNK, LINE_END, *grammar.vocabulary()])}


def draw_text_scene(rng: random.Random, level: Level) -> world.Scene:
    return world.draw_split(rng, False, rng.choice(level.items))


def context(scene: world.Scene, rng: random.Random, level: Level) -> str:
    """What stands before: the scene described in any form of the level, rarely with an opening."""
    if level.captions and rng.random() < level.captions:
        description = grammar.caption(scene, rng)
    else:
        description = grammar.describe(scene, rng, level.forms, SEPARATORS)
    return rng.choice(("", "", "", "a photo of ", "this picture shows ", "caption: ")) + description


def questions(scene: world.Scene, rng: random.Random, level: Level, count: int) -> list[grammar.QA]:
    """Up to `count` questions with their answers, in the prompts of BLIP-2."""
    asked = (
        grammar.ask(scene, rng, rng.choice(level.question_types)) for _ in range(count if level.question_types else 0)
    )
    return [
        (f"question: {q if rng.random() < 0.8 else q.rstrip('?')} {'short ' if rng.random() < 0.3 else ''}answer:", a)
        for q, a in filter(None, asked)
        if re.search(level.about, q)
    ]


def lookups(scene: world.Scene, rng: random.Random, count: int) -> list[grammar.QA]:
    """Up to `count` look-ups of one attribute by another that only one item has."""
    pairs = []
    for _ in range(count):
        item = rng.choice(scene)
        key, wanted = rng.sample(("colour", "shape", "place", "size"), 2)
        if key != "size" and sum(getattr(i, key) == getattr(item, key) for i in scene) == 1:
            name = "where" if wanted == "place" else wanted
            pairs.append((f"{getattr(item, key)} {name}:", getattr(item, wanted)))
    return pairs


def document(rng: random.Random, level: Level) -> Pieces:
    """A text as pieces with the weight of their tokens in the loss: what was said, said again, and asked about."""
    scene = draw_text_scene(rng, level)
    pieces: Pieces = [] if rng.random() < 0.5 else [(BOS, 0.0)]
    if rng.random() > 0.04:
        pieces += [(context(scene, rng, level), 0.1), (rng.choice((BOS, BOS, LINE_END, "")), 0.0)]
    if rng.random() < level.again:
        pieces.append((rng.choice(("", "", "a photo of ", "caption: ")) + grammar.caption(scene, rng) + LINE_END, 0.3))
    for asked, answer in lookups(scene, rng, level.lookups if rng.random() < 0.5 or not level.question_types else 0):
        pieces += [(asked, 0.05), (answer, 1.0), (",", 0.0)]
    for asked, answer in questions(scene, rng, level, rng.randint(2, 6)):
        pieces += [(asked, 0.05), (answer, 1.0), (LINE_END, 0.2)]
    return pieces


def seq2seq_pair(rng: random.Random, level: Level) -> tuple[str, str, Pieces]:
    """Encoder text, a description and what follows it, and weighted decoder pieces.

    The decoder writes the rest of a paraphrase, look-ups, or the answer to one question.

    A question in the encoder has one answer where a text with look-ups has sixteen, and is learnt as much later. So the
    look-ups come first, and then the decoder is given the last words of the question, from all of them to none: it reads
    in the encoder what it is not given.
    """
    scene, kind = draw_text_scene(rng, level), rng.random()
    before = context(scene, rng, level) if rng.random() > 0.04 else ""
    if kind < 0.4 * level.again:
        words = grammar.caption(scene, rng).split()
        cut = rng.randint(0, len(words) // 2)
        return before, " ".join(words[:cut]), [(" ".join(words[cut:]), 0.3)]
    short = lookups(scene, rng, level.lookups)
    if level is SEQ2SEQ_LEVELS[0]:
        return before, "", [piece for asked, answer in short for piece in ((asked, 0.05), (answer, 1.0))]
    pairs = short[:1] if rng.random() > level.asked or not level.question_types else questions(scene, rng, level, 1)
    if not pairs:
        return seq2seq_pair(rng, level)
    asked, answer = pairs[0]
    words = WORD.findall(asked)
    hint = [] if rng.random() < level.unaided else words[rng.randrange(len(words)) :]
    return before, asked, [*([(",", 0.0), (" ".join(hint), 0.5)] if hint else []), (answer, 1.0)]


def merge(description: str, rng: random.Random, plain: float = 0.3) -> list[list[str]]:
    """Words of a description by position: but for a share `plain`, neighbouring words of an item share some or all.

    A whole item at one position needs no place in the order, so that these are sometimes shuffled, or not separated.
    """
    merged = rng.random() > plain
    cut = rng.choice((0.0, 0.0, rng.random() * 0.7)) if merged else 1.0
    bare = merged and rng.random() < 0.5
    positions: list[list[str]] = []
    within = False
    for word in WORD.findall(description):
        separates = word in (",", "and", ".", ":")
        if separates and not bare:
            positions.append([word])
        elif not separates and within and rng.random() >= cut:
            positions[-1].append(word)
        elif not separates:
            positions.append([word])
        within = not separates
    if merged and cut == 0 and rng.random() < 0.5:
        rng.shuffle(positions)
    return positions


def encode(pieces: Pieces, ids: dict[str, int]) -> tuple[list[int], list[float]]:
    tokens = [(ids[w], weight) for text, weight in pieces for w in WORD.findall(text)]
    return [t for t, _ in tokens], [w for _, w in tokens]


def pad(rows: list[list], value) -> torch.Tensor:
    longest = max(map(len, rows))
    return torch.tensor([row + [value] * (longest - len(row)) for row in rows])
