"""Scores: predictions and references in, a dataclass of percentages out."""

from qformer.metrics.retrieval import RetrievalScore, recall_at_k
from qformer.metrics.vqa import VqaScore, normalize_answer, score_vqa, vqa_accuracy

__all__ = ["RetrievalScore", "VqaScore", "normalize_answer", "recall_at_k", "score_vqa", "vqa_accuracy"]
