"""Trained adapters measured on records: `TASKS` says what is asked and how it is scored, the rest is the same for all.

Nothing here imports torch but `running.py`, so that files of predictions are scored without it.
"""

from qformer.evaluation import captions, retrieval, vqa
from qformer.evaluation.task import Scores, Task

TASKS: dict[str, Task] = {"vqa": vqa.TASK, "caption": captions.TASK, "retrieval": retrieval.TASK}

__all__ = ["TASKS", "Scores", "Task"]
