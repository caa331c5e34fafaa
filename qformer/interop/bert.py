"""BERT into the Q-Former: any BERT-shaped masked language model starts its blocks, word embeddings and language head.

Source: BLIP-2 section 3.1; token types are dropped, the query feed-forward networks start as copies of the text ones.
"""

import torch
from torch import Tensor
from transformers import AutoModelForMaskedLM

from qformer.models import Stage1Adapter

TENSORS = {
    "bert.embeddings.word_embeddings.weight": "qformer.word_embeddings.weight",
    "bert.embeddings.position_embeddings.weight": "qformer.position_embeddings.weight",
    "cls.predictions.bias": "lm_bias",
}
MODULES = {  # each has a weight and a bias
    "bert.embeddings.LayerNorm": "qformer.embedding_norm",
    "cls.predictions.transform.dense": "lm_transform",
    "cls.predictions.transform.LayerNorm": "lm_norm",
}
LAYER = {
    "attention.self.query": "attention.query",
    "attention.self.key": "attention.key",
    "attention.self.value": "attention.value",
    "attention.output.dense": "attention.dense",
    "attention.output.LayerNorm": "attention.norm",
    "intermediate.dense": "text_ffn.up",
    "output.dense": "text_ffn.down",
    "output.LayerNorm": "text_ffn.norm",
}


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
    for theirs, ours in key_map(len(adapter.qformer.blocks)).items():
        _copy(own[ours], source, theirs, bert_id)
    adapter.qformer.copy_text_ffn()


def key_map(layers: int) -> dict[str, str]:
    """BERT's tensor names -> those of stage 1's adapter."""
    modules = dict(MODULES)
    for i in range(layers):
        modules |= {f"bert.encoder.layer.{i}.{theirs}": f"qformer.blocks.{i}.{ours}" for theirs, ours in LAYER.items()}
    return TENSORS | {f"{a}.{kind}": f"{b}.{kind}" for a, b in modules.items() for kind in ("weight", "bias")}


def _copy(target: Tensor, source: dict[str, Tensor], name: str, bert_id: str) -> None:
    if name not in source:
        raise ValueError(f"qformer.init_from={bert_id!r} has no {name}: it is not BERT-shaped or has fewer layers")
    rows = min(len(target), len(source[name]))
    may_differ = name in TENSORS  # the vocabulary may have gained tokens, positions may be fewer
    if target.shape[1:] != source[name].shape[1:] or (len(target) != len(source[name]) and not may_differ):
        raise ValueError(
            f"qformer.init_from={bert_id!r}: {name} is {list(source[name].shape)}, the config wants {list(target.shape)}; "
            "set qformer.width, qformer.layers, qformer.heads and qformer.ffn_width to that model's"
        )
    target[:rows] = source[name][:rows]
