"""What a published file is, format_name from its content, whatever it is called."""

from __future__ import annotations

from typing import Any

from qformer.data.known.reading import File, stream_json

# Fields enough that no record file of somebody's own has them all.
# By the first item of a list under a top-level key ("" where the file is one list): the fields that tell the format.
_ITEMS: dict[str, dict[str, tuple[str, ...]]] = {
    "images": {"karpathy": ("sentences", "filename", "split")},
    "annotations": {"vqa_annotations": ("answers", "question_id"), "coco_captions": ("caption", "image_id")},
    "questions": {"vqa_questions": ("question", "question_id")},
    "data": {"textvqa": ("question", "image_id", "set_name")},
    "videos": {"msrvtt": ("video_id", "split")},
    "": {
        "vg_regions": ("regions", "id"),
        "vg_questions": ("qas", "id"),
        "vg_images": ("image_id", "url", "coco_id"),
        "aokvqa": ("question_id", "choices", "difficult_direct_answer"),
        "vizwiz": ("image", "question", "answerable"),
        "video_questions": ("video_id", "question", "answer"),
    },
}
# An object by id under every top-level key.
_ENTRIES = {"gqa": ("imageId", "question"), "scienceqa": ("choices", "question", "split", "subject")}
# An object a line.
_LINES = {"pope": ("text", "label", "image", "question_id"), "nlvr2": ("sentence", "identifier")}


def recognise(file: File) -> str | None:
    """The format of a published file, None when it is none of them, as record files are.

    The file is read up to the item that tells; of record files, no more than the first record.

    Raises: ValueError when it is no JSON.
    """
    fields: set[str] = set()
    for key, item in stream_json(file):
        if isinstance(item, dict):
            format_name = _match(_ITEMS.get(key, {}) | (_ENTRIES if key else {}), set(item))
            if format_name or not key:
                return format_name
        fields.add(key)
        if format_name := _match(_LINES, fields):
            return format_name
    return None


def _match(formats: dict[str, tuple[str, ...]], fields: Any) -> str | None:
    return next((name for name, needed in formats.items() if fields.issuperset(needed)), None)
