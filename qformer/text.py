"""Prompts, label masking, and what a tokenizer does to a text: pure functions, no model."""

import re
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100  # a label that no loss counts

PROMPTS = {
    "caption": "a photo of",
    "vqa_decoder_only": "Question: {} Answer:",
    "vqa_encoder_decoder": "Question: {} Short answer:",
}
"""BLIP-2's prompts by name; {} is the question. Source: arXiv 2301.12597, sections 4.1 and 4.2."""


class TokenizerFacts(NamedTuple):
    """What a tokenizer adds around a text, and the ids that pad rows and end lines."""

    bos_ids: list[int]
    """Prepended to every text; [] if none."""
    eos_id: int | None
    """Appended to every text; None if none. Not the same as having an EOS token: OPT has one and appends nothing."""
    pad_id: int
    """The pad token, else the EOS token: masked wherever it pads, so any id of the vocabulary serves."""
    line_end_id: int | None
    """The one token of "\\n"; None if it takes several or is lost, so that only EOS can end a text."""


def probe_tokenizer(tokenizer: PreTrainedTokenizerBase, name: str) -> TokenizerFacts:
    """Find out by trial what `tokenizer` does, instead of trusting its settings.

    Args:
        name: hub id or folder, for messages.

    Raises:
        ValueError: the tokenizer has no vocabulary, adds something else than a prefix and one EOS, or has neither a pad
            nor an EOS token.
    """
    bare, framed = encode(tokenizer, "a"), list(tokenizer("a").input_ids)
    if not bare:
        raise ValueError(
            f"llm.id={name!r}: its tokenizer encodes 'a' to no token at all; expected at least one. The folder may "
            "lack tokenizer.json (an empty tokenizer is then made up): save the model's own tokenizer there"
        )
    starts = [start for start in range(len(framed)) if framed[start : start + len(bare)] == bare]
    after = framed[starts[0] + len(bare) :] if starts else []
    if not starts or len(after) > 1:
        raise ValueError(
            f"llm.id={name!r}: its tokenizer makes {framed} of 'a' ({bare} without special tokens); expected a prefix "
            "and at most one EOS around it. Set llm.id to a model whose tokenizer does so"
        )
    pad_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if not isinstance(pad_id, int):
        raise ValueError(
            f"llm.id={name!r}: its tokenizer has pad_token=None and eos_token=None; expected at least one, to pad "
            "batches. Set tokenizer.pad_token to a token of its vocabulary, save it in the model's folder, and set "
            "llm.id to that folder"
        )
    return TokenizerFacts(framed[: starts[0]], after[0] if after else None, pad_id, _line_end_id(tokenizer))


def _line_end_id(tokenizer: PreTrainedTokenizerBase) -> int | None:
    word = encode(tokenizer, "a")
    after_word = encode(tokenizer, "a\n")
    # After a word comes first: that is where a line ends, and some tokenizers put a space token before a lone "\n".
    candidates = [after_word[len(word) :] if after_word[: len(word)] == word else [], encode(tokenizer, "\n")]
    for ids in candidates:
        if len(ids) == 1 and ids[0] != tokenizer.unk_token_id and "\n" in tokenizer.decode(ids):
            return ids[0]
    return None


def encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` alone, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def words_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> tuple[list[str], list[int]]:
    """The words of a text's tokens, and which of them each token belongs to; -1 = none (special tokens, punctuation)."""
    special = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    text, kept, ends = "", [], [0]
    for token_id in ids:
        if token_id not in special:
            kept.append(token_id)
            text = str(tokenizer.decode(kept))
        ends.append(len(text))
    spans = [match.span() for match in re.finditer(r"\w[\w'’-]*", text)]
    of_character = {at: word for word, span in enumerate(spans) for at in range(*span)}
    places = [[of_character[at] for at in range(*span) if at in of_character] for span in pairwise(ends)]
    return [text[slice(*span)] for span in spans], [words[-1] if words else -1 for words in places]


def split_prompt(
    tokenizer: PreTrainedTokenizerBase, prompt: str, target: str, seam: str | None = None
) -> tuple[list[int], list[int]]:  # fmt: skip
    """Token ids of `prompt` and of the `target` that continues it after `seam`; None = a space, where none is there.

    Both are encoded as one text, because a word's tokens depend on the space before it. A token that spans the seam
    belongs to the target.
    """
    if not prompt:
        return [], encode(tokenizer, target)
    if seam is None:
        seam = "" if prompt[-1].isspace() or not target else " "
    context, joint = encode(tokenizer, prompt), encode(tokenizer, prompt + seam + target)
    shared = 0
    while shared < min(len(context), len(joint)) and context[shared] == joint[shared]:
        shared += 1
    return joint[:shared], joint[shared:]


def continue_prompt(prompt: str, text: str) -> str:
    """`text` after `prompt`, a space between them where none is; the end of a prompt stays as it is written."""
    return prompt + (" " if prompt and text and not prompt[-1].isspace() else "") + text


def mask_context(context: list[int], target: list[int]) -> list[int]:
    """Labels of the row `context + target`: the context is not in the loss."""
    return [IGNORE_INDEX] * len(context) + target


def pad_rows(rows: list[list[int]], filler: int, *, left: bool = False, width: int = 0) -> tuple[Tensor, Tensor]:
    """Stack rows of different lengths.

    Args:
        filler: a pad id, or IGNORE_INDEX for labels.
        left: put the fillers first instead of last.
        width: pad to at least this many columns.

    Returns: int64[B, T], and bool[B, T], False on fillers.

        rows [[5, 6, 7], [8]], filler 0 ->    [[5, 6, 7],    [[1, 1, 1],
                                               [8, 0, 0]]     [1, 0, 0]]
    """
    width = max([width, *map(len, rows)])
    ids = torch.full((len(rows), width), filler, dtype=torch.long)
    mask = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        here = slice(width - len(row), width) if left else slice(0, len(row))
        ids[i, here] = torch.tensor(row, dtype=torch.long)
        mask[i, here] = True
    return ids, mask
