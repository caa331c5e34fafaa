"""Scores: predictions and references in, a dataclass of percentages out."""

from typing import TYPE_CHECKING, Any

from qformer.metrics.captions import CaptionScores, score_captions
from qformer.metrics.vqa import RULES, VqaScore, normalize_answer, score_vqa, vqa_accuracy

if TYPE_CHECKING:
    from qformer.metrics.retrieval import RetrievalScore, recall_at_k

__all__ = [
    "RULES", "CaptionScores", "RetrievalScore", "VqaScore", "normalize_answer", "recall_at_k", "score_captions", "score_vqa",
    "vqa_accuracy",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    """Import on first use what needs torch: answers are scored without it."""
    if name not in __all__:
        raise AttributeError(f"module 'qformer.metrics' has no attribute {name!r}")
    from qformer.metrics import retrieval

    return getattr(retrieval, name)
