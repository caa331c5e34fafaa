"""The stages: frozen models with the adapter between them that learns."""

from qformer.models.batch import TextTokens, split_prefix, tokenize
from qformer.models.stage import Output, Prepared, Stage
from qformer.models.stage1 import Stage1, Stage1Adapter
from qformer.models.stage2 import Stage2, Stage2Adapter

__all__ = [
    "Output", "Prepared", "Stage", "Stage1", "Stage1Adapter", "Stage2", "Stage2Adapter", "TextTokens", "split_prefix",
    "tokenize",
]  # fmt: skip
