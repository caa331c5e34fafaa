"""BERT into the Q-Former: any BERT-shaped masked language model starts its blocks, word embeddings and language head.

Source: BLIP-2 section 3.1; token types are dropped, the query feed-forward networks start as copies of the text ones.
"""

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from qformer.interop.keys import BERT
from qformer.models import Stage1Adapter

GROWS = (
    "word_embeddings",
    "position_embeddings",
    "lm_bias",
)  # the vocabulary may have gained tokens, positions may be fewer


@torch.no_grad()
def initialise_from_bert(adapter: Stage1Adapter, bert_id: str) -> None:
    """Copy a masked language model's weights into stage 1's adapter; rows for added tokens such as [DEC] stay as drawn.

    Raises: ValueError when it cannot be found, is not BERT-shaped, or has other sizes.
    """
    try:
        bert = AutoModelForMaskedLM.from_pretrained(bert_id)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"qformer.init_from={bert_id!r} cannot be loaded ({' '.join(str(error).split())[:160]}); "
            "give a folder or reachable hub id of a BERT, or null to start from random weights"
        ) from None
    source, own = bert.state_dict(), adapter.state_dict()
    for ours, theirs in BERT.key_map(own).items():
        _copy(own[ours], source, theirs, bert_id, may_differ=any(part in ours for part in GROWS))
    adapter.qformer.copy_text_ffn()


def _copy(target: Tensor, source: dict[str, Tensor], name: str, bert_id: str, may_differ: bool) -> None:
    if name not in source:
        raise ValueError(f"qformer.init_from={bert_id!r} has no {name}: it is not BERT-shaped or has fewer layers")
    rows = min(len(target), len(source[name]))
    if target.shape[1:] != source[name].shape[1:] or (len(target) != len(source[name]) and not may_differ):
        raise ValueError(
            f"qformer.init_from={bert_id!r}: {name} is {list(source[name].shape)}, the config wants {list(target.shape)}; "
            "set qformer.width, qformer.layers, qformer.heads and qformer.ffn_width to that model's"
        )
    target[:rows] = source[name][:rows]
