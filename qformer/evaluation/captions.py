"""Captioning: generated captions, scored by coco-caption's programs; one an image, against all of its references."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qformer.data.captions import clean_caption
from qformer.evaluation.task import WITH_IMAGE, Scores, Task
from qformer.metrics.captions import TOKENIZERS, require_caption_metrics, score_captions
from qformer.metrics.tokens import APPROXIMATE

if TYPE_CHECKING:
    from qformer.data import Record


def _ask(model: Any, records: "Sequence[Record]", images: list, mode: str, **generation: Any) -> list[str]:
    return model.caption(images, **generation)


def _compare(model: Any, captions: Sequence[str], images: list) -> list[float]:
    """Cosine of caption and image as stage 1 contrasts them: the largest over the queries.

    One by one: beside others the last bits of a number would depend on how many there are.
    """
    pairs = [
        (model.embed_image([image])[0], model.embed_text([clean_caption(c)])[0])
        for image, c in zip(images, captions, strict=True)
    ]
    return [(queries @ text).max().item() for queries, text in pairs]


def _score(records: "Sequence[Record]", captions: Sequence[str], tokenizer: str) -> Scores:
    scores = score_captions(list(captions), [record.captions for record in records], tokenizer)
    warnings = []
    if scores.tokenizer == APPROXIMATE:
        warnings.append("tokens are approximately the Penn Treebank's: scores may differ from coco-caption's")
    if scores.n == 1:
        warnings.append("CIDEr weighs words by how rare they are among the images: of one image it is 0")
    return Scores(
        scores.values, scores.n, scores.tokenizer, "coco-caption", warnings=tuple(warnings), each=scores.each,
        absent=scores.absent, form="6.3f",
    )  # fmt: skip


TASK = Task(
    id_field="image_id",
    output_field="caption",
    modes=(WITH_IMAGE,),
    rules=TOKENIZERS,
    lacks=lambda record, mode: None,
    has_reference=lambda record: bool(record.captions),
    ask=_ask,
    score=_score,
    describe=lambda record: {"references": list(record.captions)},
    noun="images",
    rule_field="tokenizer",
    reference_noun="captions",
    require=require_caption_metrics,
    compare=_compare,
    by_image=True,
    some_suffice=True,
)
