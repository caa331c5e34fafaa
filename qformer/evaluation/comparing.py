"""How well captions and images belong together by a stage-1 adapter, whoever wrote the captions."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qformer.evaluation.choosing import Chosen
from qformer.evaluation.task import WITH_IMAGE, Task

if TYPE_CHECKING:
    from qformer.data import Record

NAME = "ITC similarity"  # no CLIPScore: it is of another model, and of each adapter another


@dataclass(frozen=True)
class Similarity:
    """Cosines from -1 to 1, one a record; None where the image could not be read or has no caption."""

    adapter: str
    values: list[float | None]

    @property
    def n(self) -> int:
        return sum(value is not None for value in self.values)

    @property
    def mean(self) -> float:
        return sum(value for value in self.values if value is not None) / max(1, self.n)

    def __str__(self) -> str:
        return f"{NAME}  {self.mean:.3f}  ({self.n} images, mean cosine by {self.adapter})"


def compare_outputs(adapter: str, task: Task, chosen: Chosen, outputs: Sequence[str | None], **run: Any) -> Similarity:
    """The similarity of every record's image and its output by a stage-1 adapter; the same on every rank.

    Raises: ValueError when the adapter cannot be loaded, or is of stage 2.
    """
    from qformer.evaluation.running import compute_outputs

    compare, number = task.compare, {id(record): i for i, record in enumerate(chosen.texts)}
    assert compare is not None

    def ask(model: Any, records: "Sequence[Record]", images: list[Any], mode: str) -> list[float | None]:
        captions = [outputs[number[id(record)]] for record in records]
        values = compare(model, [caption or "" for caption in captions], images)
        return [None if caption is None else value for caption, value in zip(captions, values, strict=True)]

    values, _ = compute_outputs(
        adapter, replace(task, ask=ask), chosen, mode=WITH_IMAGE, file=None, generation={}, **run
    )
    return Similarity(adapter, values)
