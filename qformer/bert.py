"""BERT in the Q-Former: the tokenizer of its text side, and weights to start from.

Source: BLIP-2 section 3.1; token types are dropped, the query feed-forward networks start as copies of the text ones.
"""

import json
from pathlib import Path
from typing import Any, NoReturn

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import AutoModelForMaskedLM, AutoTokenizer

from qformer.keys import BERT
from qformer.messages import one_line
from qformer.models import Stage1Adapter
from qformer.parts import load_frozen

DEC = "[DEC]"  # begins a text that is generated
HEAD = r"cls\..*"  # tensors of the language modelling head, which a BERT for sentence embeddings has not
IMAGE = "<image>"  # where processors of transformers put an image
GROWS = (
    "word_embeddings",
    "position_embeddings",
    "lm_bias",
)  # the vocabulary may have gained tokens, positions may be fewer


class TooManyTokens(ValueError):
    """A tokenizer has tokens without a word embedding."""


class NoTokenizer:
    """Stands where a checkpoint came without a tokenizer: the text side keeps its weights and reads no text."""

    bos_token_id = 0

    def __init__(self, vocab_size: int) -> None:
        self.vocab_size = vocab_size

    def __len__(self) -> int:
        return self.vocab_size

    def __call__(self, *args: object, **kwargs: object) -> NoReturn:
        """Raises: ValueError, always."""
        raise ValueError(
            f"qformer.tokenizer is empty, so no text can be read: name the tokenizer that the {self.vocab_size} word embeddings, "
            f"{DEC} included, were trained with"
        )


def load_tokenizer(name: str, vocab_size: int | None = None) -> Any:
    """The BERT tokenizer that `qformer.tokenizer` names, with [DEC] added as its `bos_token`.

    Args:
        name: folder, hub id, or folder inside a repository of the hub (owner/repository/folder, as InstructBLIP has it);
            empty = none came with the checkpoint.
        vocab_size: rows of the word embeddings; `<image>`, which a processor adds to its tokenizer and not to them, is
            left out where there is no row for it. None = a row for every token.

    Raises: ValueError when it cannot be loaded, has no [CLS], [SEP] or padding, or has more tokens than there are rows.
    """
    if not name:
        if vocab_size is None:
            raise ValueError(
                "qformer.tokenizer is empty; name a BERT tokenizer: a folder, or a hub id as bert-base-uncased"
            )
        return NoTokenizer(vocab_size)
    tokenizer = _read(name)
    for token in ("cls_token", "sep_token", "pad_token"):
        if getattr(tokenizer, token) is None:
            raise ValueError(f"qformer.tokenizer={name!r} has no {token}; a BERT-shaped tokenizer is needed")
    with_dec = tokenizer.get_vocab().keys() | {DEC}
    if vocab_size is not None and len(with_dec) > vocab_size:
        _leave_out(tokenizer, IMAGE)
    tokenizer.add_special_tokens({"bos_token": DEC})
    if vocab_size is not None and (needed := max(tokenizer.get_vocab().values()) + 1) > vocab_size:
        raise TooManyTokens(
            f"qformer.tokenizer={name!r} has {needed} tokens with {DEC}, but there are {vocab_size} word embeddings; "
            "name the tokenizer that they were trained with"
        )
    return tokenizer


def _read(name: str) -> Any:
    repository, subfolder = name, ""
    if not Path(name).is_dir() and name.count("/") == 2:
        repository, _, subfolder = name.rpartition("/")
    try:
        return AutoTokenizer.from_pretrained(repository, subfolder=subfolder)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"qformer.tokenizer={name!r} cannot be loaded ({one_line(error)}); give a folder, or a hub id that can be reached"
        ) from None


def lacks_dec(name: str) -> bool:
    """Whether the tokenizer that `qformer.tokenizer` names has no [DEC] of its own; raises as `load_tokenizer` does."""
    return DEC not in _read(name).get_vocab()


def _leave_out(tokenizer: Any, added: str) -> None:
    """Take a token that was added to the vocabulary out of a tokenizer again, in place."""
    values = json.loads(tokenizer.backend_tokenizer.to_str())
    values["added_tokens"] = [token for token in values["added_tokens"] if token["content"] != added]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(values))


@torch.no_grad()
def initialise_from_bert(adapter: Stage1Adapter, bert_id: str) -> None:
    """Copy a masked language model's weights into stage 1's adapter; rows for added tokens such as [DEC] stay as drawn.

    What a BERT lacks of the language modelling head starts at random too, and a line says so.

    Raises: ValueError when it cannot be loaded, lacks other tensors, is not BERT-shaped, or has other sizes.
    """
    try:
        bert = load_frozen(AutoModelForMaskedLM, bert_id, None, None, may_lack=HEAD)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"qformer.init_from={bert_id!r} cannot be loaded ({one_line(error)}); "
            "give a folder or reachable hub id of a BERT, or null to start from random weights"
        ) from None
    source, target = bert.state_dict(), adapter.state_dict()
    for ours, theirs in BERT.key_map(target).items():
        _copy(target[ours], source, theirs, bert_id, may_differ=any(part in ours for part in GROWS))
    adapter.qformer.copy_text_ffn()


def _copy(target: Tensor, source: dict[str, Tensor], name: str, bert_id: str, *, may_differ: bool) -> None:
    if name not in source:
        raise ValueError(f"qformer.init_from={bert_id!r} has no {name}: it is not BERT-shaped or has fewer layers")
    rows = min(len(target), len(source[name]))
    if target.shape[1:] != source[name].shape[1:] or (len(target) != len(source[name]) and not may_differ):
        raise ValueError(
            f"qformer.init_from={bert_id!r}: {name} is {list(source[name].shape)}, the config wants {list(target.shape)}; "
            "set qformer.width, qformer.layers, qformer.heads and qformer.ffn_width to that model's"
        )
    target[:rows] = source[name][:rows]
