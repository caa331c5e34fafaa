"""Image-text retrieval: a whole collection searched both ways, scored by recall at 1, 5 and 10."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.evaluation.collection import LONGEST, Collection
from qformer.evaluation.task import WITH_IMAGE, Scores, Task

if TYPE_CHECKING:
    from qformer.data import Record
    from qformer.evaluation.choosing import Chosen

ITM_ITC, ITM, ITC = "itm+itc", "itm", "itc"
CANDIDATES = 128  # BLIP-2's, on COCO and on Flickr30k


def _search(
    adapter: str, chosen: "Chosen", *, rule: str, folder: Path | None, made_of: dict[str, Any],
    candidates: int = CANDIDATES, **settings: Any,
) -> tuple[list[Any], list[str]] | None:  # fmt: skip
    if candidates < LONGEST:
        raise ValueError(f"--candidates {candidates}: expected at least {LONGEST}, the longest list that is scored")
    from qformer.evaluation.matching import search  # only now what imports torch

    return search(
        adapter, chosen, _collect(chosen.texts), rule=rule, candidates=candidates, folder=folder, made_of=made_of,
        **settings,
    )  # fmt: skip


def _collect(records: "Sequence[Record]") -> Collection:
    return Collection([TASK.identify(record) for record in records], [record.captions for record in records])


def _score(records: "Sequence[Record]", outputs: Sequence[Any], rule: str) -> Scores:
    rows = [
        (record, output) for record, output in zip(records, outputs, strict=True) if output != ""
    ]  # could not be read
    records, outputs = [record for record, _ in rows], [output for _, output in rows]
    collection = _collect(records)
    recall = collection.recall(outputs)
    others, warnings = {}, []
    if all(isinstance(output, Mapping) and output.get("by_similarity") for output in outputs):
        others[ITC] = collection.recall([output["by_similarity"] for output in outputs])
    if repeated := collection.repeated():
        others[f"{rule}, equal captions right"] = equal = collection.recall(outputs, equal=True)
        warnings.append(
            f"{repeated} of {len(collection.caption_ids)} captions stand with another image too, and are right for their "
            f"own alone, as in published numbers; with equal captions right: image_to_text@1 "
            f"{equal['image_to_text']['1']:.1f}, text_to_image@1 {equal['text_to_image']['1']:.1f}"
        )
    n = {"images": len(records), "captions": len(collection.caption_ids)}
    return Scores(recall, n, rule, "recall in percent", others=others, warnings=tuple(warnings))


TASK = Task(
    id_field="image_id",
    output_field="retrieved",
    modes=(WITH_IMAGE,),
    rules=(ITM_ITC, ITM, ITC),
    lacks=lambda record, mode: None if record.captions else "it has no caption",
    has_reference=lambda record: bool(record.captions),
    search=_search,
    score=_score,
    describe=lambda record: {"captions": list(record.captions)},
    options=("candidates",),
    noun="images",
    by_image=True,
)
