"""Published question files as records: VQA v2 and OK-VQA, A-OKVQA, GQA, VizWiz, TextVQA, POPE, ScienceQA, NLVR2, videos.

As in `captions.py`: files in, rows of the schema out, images named as the published archives unpack, ids as published.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qformer.data.known.captions import Row, msvd_clip, split_in
from qformer.data.known.reading import File, json_lines, stream_json


def vqa(questions: File, annotations: Sequence[File]) -> Iterator[Row]:
    """VQA v2's or OK-VQA's questions, with the answers of the annotation files, one entry per person.

    The answers are kept in memory: some 250 bytes a question, 0.1 GB for the largest split.

    Args:
        annotations: none for a test split, whose questions then have no answers.

    Raises: ValueError when no annotation is of any of the questions.
    """
    answered: dict[Any, Row] = {}
    for file in annotations:
        answered |= {
            entry["question_id"]: _answers_of(entry) for key, entry in stream_json(file) if key == "annotations"
        }
    subtype, matches = _subtype_of(questions), 0
    for key, entry in stream_json(questions):
        if key == "questions":
            answers = answered.get(entry["question_id"], {})
            matches += bool(answers)
            ids = {name: entry[name] for name in ("image_id", "question_id") if name in entry}
            image = entry.get("image") or coco_image(subtype, entry["image_id"])
            yield {"image": image, "question": entry["question"], **ids, **answers, "split": split_in(subtype)}
    if answered and not matches:
        names = " and ".join(str(file) for file in annotations)
        raise ValueError(f"{names} has no annotation of any question in {questions}; give the two of one split")


def _answers_of(entry: Mapping[str, Any]) -> Row:
    answers = tuple(sys.intern(answer["answer"]) for answer in entry["answers"])  # the same few thousand come again
    kinds = {name: sys.intern(entry[name]) for name in ("question_type", "answer_type") if name in entry}
    return {"answers": answers, **kinds}


def coco_image(subtype: str, image_id: int) -> str:
    """The path of a COCO image of 2014 or 2015: "val2014", 9 -> val2014/COCO_val2014_000000000009.jpg."""
    if not subtype or not isinstance(image_id, int):
        return str(image_id)  # not COCO's: its answers can be scored all the same
    folder = subtype.replace("-dev", "")
    return f"{folder}/COCO_{folder}_{image_id:012d}.jpg"


def _subtype_of(questions: File) -> str:
    """COCO's name of a split, "val2014": `data_subtype`, which stands before the questions, or part of the file's name."""
    subtype = next((str(item) for key, item in stream_json(questions) if key == "data_subtype"), "")
    match = re.search(r"(train|val|test-dev|test)20\d\d", subtype or questions.name)
    return match[0] if match else subtype


def aokvqa(file: File, choices: bool = False) -> Iterator[Row]:
    """A-OKVQA's aokvqa_v1p0_val.json: the direct answers, or as `answers` the right one of the choices."""
    for _, entry in stream_json(file):
        split = entry.get("split") or split_in(file.name)
        answers = entry.get("direct_answers", [])
        if choices:
            right = entry.get("correct_choice_idx")
            answers = [] if right is None else [entry["choices"][right]]
        ids = {name: entry[name] for name in ("image_id", "question_id", "question", "choices")}
        yield {"image": f"{split}2017/{entry['image_id']:012d}.jpg", **ids, "answers": answers, "split": split}


def gqa(file: File) -> Iterator[Row]:
    """GQA's train_balanced_questions.json and alike; `question_type` is the structural one: query, verify, ..."""
    for question_id, entry in stream_json(file):
        yield {
            "image": f"images/{entry['imageId']}.jpg",
            "question": entry["question"],
            "answers": [entry["answer"]] if "answer" in entry else [],
            "question_id": question_id,
            "question_type": entry.get("types", {}).get("structural"),
            "split": split_in(file.name),
        }


def vizwiz(file: File) -> Iterator[Row]:
    """VizWiz' train.json, val.json or test.json; a question's id is the name of its image, as its server has it."""
    for _, entry in stream_json(file):
        split = split_in(entry["image"]) or split_in(file.name)
        yield {
            "image": f"{split}/{entry['image']}",
            "question": entry["question"],
            "answers": [answer["answer"] for answer in entry.get("answers", [])],
            "question_id": entry["image"],
            "answer_type": entry.get("answer_type"),
            "split": split,
        }


def textvqa(file: File) -> Iterator[Row]:
    """TextVQA's TextVQA_0.5.1_val.json; train and val share the folder train_images."""
    for key, entry in stream_json(file):
        if key == "data":
            split = entry.get("set_name") or split_in(file.name)
            folder = "test_images" if split == "test" else "train_images"
            yield {
                "image": f"{folder}/{entry['image_id']}.jpg",
                "question": entry["question"],
                "answers": entry.get("answers", []),
                "question_id": entry["question_id"],
                "split": split,
            }


def pope(file: File) -> Iterator[Row]:
    """POPE's coco_pope_random.json, one object a line; its subset is `split` and `question_type`, ids start in each at 1."""
    subset = re.search(r"random|popular|adversarial", file.name)
    for entry in json_lines(file):
        folder = re.match(r"COCO_(\w+?)_\d+\.", entry["image"])
        yield {
            "image": f"{folder[1]}/{entry['image']}" if folder else entry["image"],
            "question": entry["text"],
            "answers": [entry["label"]],
            "question_id": entry["question_id"],
            "question_type": entry.get("category") or (subset[0] if subset else None),
            "split": subset[0] if subset else None,
        }


def scienceqa(file: File) -> Iterator[Row]:
    """ScienceQA's problems.json, those with an image; the hint stands before the question, `answers` is the right choice."""
    for number, entry in stream_json(file):
        if entry.get("image"):
            yield {
                "image": f"{entry['split']}/{number}/{entry['image']}",
                "question": " ".join(filter(None, (entry.get("hint", "").strip(), entry["question"].strip()))),
                "answers": [entry["choices"][entry["answer"]]],
                "choices": entry["choices"],
                "question_id": number,
                "question_type": entry.get("subject"),
                "split": entry["split"],
            }


def nlvr2(file: File) -> Iterator[Row]:
    """NLVR2's train.json, dev.json and test1.json, one object a line: two images and a statement, true or false."""
    for entry in json_lines(file):
        split, *rest, _ = entry["identifier"].split("-")
        folder = f"images/train/{entry['directory']}" if "directory" in entry else split
        name = "-".join([split, *rest])
        yield {
            "images": [f"{folder}/{name}-img{side}.png" for side in (0, 1)],
            "question": entry["sentence"],
            "answers": [str(entry["label"]).lower()] if "label" in entry else [],
            "question_id": entry["identifier"],
            "split": split,
        }


def vg_questions(file: File, images: Mapping[int, str]) -> Iterator[Row]:
    """Visual Genome's question_answers.json, one record a question, as fine-tuning for VQA adds them."""
    for _, entry in stream_json(file):
        for pair in entry["qas"]:
            texts = {"question": pair["question"], "answers": [pair["answer"].strip().rstrip(".")]}
            yield {"image": images[entry["id"]], **texts, "question_id": pair["qa_id"], "split": "train"}


def video_questions(file: File, names: Mapping[int, str] | None = None) -> Iterator[Row]:
    """MSVD-QA's or MSRVTT-QA's train_qa.json, val_qa.json, test_qa.json.

    Args:
        names: of MSVD's clips by number (`msvd_names`); None = MSR-VTT, whose clips are numbered.
    """
    for _, entry in stream_json(file):
        number, split = entry["video_id"], split_in(file.name)
        if names is None:
            video = f"{'TestVideo' if split == 'test' else 'TrainValVideo'}/video{number}.mp4"
        else:
            video = msvd_clip(names[number])
        texts = {"question": entry["question"], "answers": [entry["answer"]]}
        yield {"video": video, **texts, "question_id": entry["id"], "split": split}
