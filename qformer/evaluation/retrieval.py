"""Image-text retrieval: a whole collection searched both ways, scored by recall at 1, 5 and 10."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qformer.evaluation.collection import LONGEST, Collection
from qformer.evaluation.task import WITH_IMAGE, Scores, Task

if TYPE_CHECKING:
    from qformer.data import Record
    from qformer.evaluation.choosing import Chosen

ITM_ITC, PRODUCT, ITM, ITC = "itm+itc", "product", "itm", "itc"
RULES = (ITM_ITC, PRODUCT, ITM, ITC)  # all but the last match pairs, and have the lists of the others for nothing
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
    for other in RULES:
        if all(isinstance(output, Mapping) and other in output.get("by_rule", ()) for output in outputs):
            others[other] = collection.recall([output["by_rule"][other] for output in outputs])
    best = max([rule, *others], key=lambda name: sum(way["1"] for way in others.get(name, recall).values()))
    if best != rule:
        warnings.append(f"--rule {best} finds more: {_named_at_1(others[best])}")
    if repeated := collection.repeated():
        others[f"{rule}, equal captions right"] = equal = collection.recall(outputs, equal=True)
        warnings.append(
            f"{repeated} of {len(collection.caption_ids)} captions stand with another image too, and are right for their "
            f"own alone, as in published numbers; with equal captions right: {_named_at_1(equal)}"
        )
    n = {"images": len(records), "captions": len(collection.caption_ids)}
    return Scores(recall, n, rule, "recall in percent", others=others, warnings=tuple(warnings))


def _named_at_1(recall: Mapping[str, Mapping[str, float]]) -> str:
    return ", ".join(f"{way}@1 {of_way['1']:.1f}" for way, of_way in recall.items())


TASK = Task(
    id_field="image_id",
    output_field="retrieved",
    modes=(WITH_IMAGE,),
    rules=RULES,
    lacks=lambda record, mode: None if record.captions else "it has no caption",
    has_reference=lambda record: bool(record.captions),
    search=_search,
    score=_score,
    describe=lambda record: {"captions": list(record.captions)},
    options=("candidates",),
    noun="images",
    by_image=True,
)
