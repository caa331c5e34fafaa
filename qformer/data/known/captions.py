"""Published caption files as records: Karpathy's, COCO's own form (NoCaps has it too), Flickr, Visual Genome, videos.

Every function takes files and gives rows in the schema of `qformer.data.records`; images are named as the published
archives unpack, relative to the folder they are unpacked in. Captions and ids are as published.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Mapping
from typing import Any

from qformer.data.known.reading import File, stream_json, text_lines

Row = dict[str, Any]
_SPLIT = re.compile(r"(?<![a-z])(train|validate|val|testdev|test-dev|test|dev|challenge|submission)(?![a-z])", re.I)


def split_in(name: str) -> str | None:
    """The split that the name of a published file tells: "captions_val2014.json" -> "val"."""
    match = _SPLIT.search(name)
    return match[1].lower() if match else None


def karpathy(file: File) -> Iterator[Row]:
    """Karpathy's dataset_coco.json, dataset_flickr8k.json or dataset_flickr30k.json; `restval` stays a split of its own.

    image_id is COCO's own number, of Flickr the file's `imgid`.
    """
    for key, entry in stream_json(file):
        if key == "images":
            path = [entry["filepath"]] if "filepath" in entry else []
            yield {
                "image": "/".join([*path, entry["filename"]]),
                "caption": [sentence["raw"] for sentence in entry["sentences"]],
                "image_id": entry.get("cocoid", entry.get("imgid")),
                "split": entry["split"],
            }


def coco_captions(file: File) -> Iterator[Row]:
    """COCO's captions_val2014.json and all in its form, as NoCaps; the captions are kept until their images are known."""
    images: dict[int, Mapping[str, Any]] = {}
    captions: dict[int, list[str]] = {}
    for key, entry in stream_json(file):
        if key == "images":
            images[entry["id"]] = entry
        elif key == "annotations":
            captions.setdefault(entry["image_id"], []).append(entry["caption"])
    if unknown := captions.keys() - images.keys():
        raise ValueError(f"{file}: captions of image_id {min(unknown)}, which is none of its images")
    for image_id, entry in images.items():
        image = _image_of(entry)
        split = split_in(image.split("/")[0]) or split_in(file.name)
        yield {"image": image, "caption": captions.get(image_id, []), "image_id": image_id, "split": split}


def _image_of(entry: Mapping[str, Any]) -> str:
    """The path of an image of COCO's files: the last folder of its address, as the archives unpack, and its name."""
    name = str(entry.get("file_name", entry["id"]))
    parts = str(entry.get("coco_url", "")).split("/")
    if len(parts) > 1 and parts[-1] == name:
        return f"{parts[-2]}/{name}"
    match = re.match(r"COCO_(\w+?)_\d+\.", name)
    return f"{match[1]}/{name}" if match else name


def flickr_tokens(file: File, splits: Mapping[str, str]) -> Iterator[Row]:
    """Flickr8k.token.txt or results_20130124.token: "NAME.jpg#0<tab>caption", the captions of an image in a row.

    Args:
        splits: of file names; images that are in none have no split.
    """
    name, captions = "", list[str]()
    for line in [*text_lines(file), "#\t"]:
        head, _, caption = line.partition("\t")
        image = head.rpartition("#")[0]
        if image != name:
            if captions:
                yield {"image": name, "caption": captions, "image_id": name, "split": splits.get(name)}
            name, captions = image, []
        captions.append(caption.strip())


def vg_images(file: File) -> dict[int, str]:
    """The path of every image of Visual Genome by its id, from image_data.json: VG_100K/2.jpg or VG_100K_2/1.jpg."""
    return {entry["image_id"]: "/".join(entry["url"].split("/")[-2:]) for _, entry in stream_json(file)}


def vg_regions(file: File, images: Mapping[int, str]) -> Iterator[Row]:
    """Visual Genome's region_descriptions.json: the phrases of all regions of an image are its captions."""
    for _, entry in stream_json(file):
        if phrases := [region["phrase"].strip() for region in entry["regions"] if region["phrase"].strip()]:
            yield {"image": images[entry["id"]], "caption": phrases, "split": "train"}


def msrvtt(file: File) -> Iterator[Row]:
    """MSR-VTT's train_val_videodatainfo.json or test_videodatainfo.json; the sentences are kept until the end."""
    videos: dict[str, str] = {}
    captions: dict[str, list[str]] = {}
    for key, entry in stream_json(file):
        if key == "videos":
            videos[entry["video_id"]] = entry["split"]
        elif key == "sentences":
            captions.setdefault(entry["video_id"], []).append(entry["caption"])
    for name, split in videos.items():
        folder = "TestVideo" if split == "test" else "TrainValVideo"
        yield {"video": f"{folder}/{name}.mp4", "caption": captions.get(name, []), "image_id": name, "split": split}


def msrvtt_1k(file: File) -> Iterator[Row]:
    """The test split 1k-A of MSR-VTT, one sentence a clip, on which BLIP searches: MSRVTT_JSFUSION_test.csv.

    Source: Yu et al., 2018 (JSFusion); BLIP (arXiv 2201.12086), section 5.6.
    """
    for entry in csv.DictReader(text_lines(file)):
        name = entry["video_id"]
        yield {"video": f"TestVideo/{name}.mp4", "caption": [entry["sentence"]], "image_id": name, "split": "test_1k"}


def msvd(file: File, mapping: File) -> Iterator[Row]:
    """MSVD's AllVideoDescriptions.txt: "NAME caption", split by the numbers of youtube_mapping.txt as all papers do.

    Source: Venugopalan et al., 2015: 1200 clips train, 100 val, 670 test.
    """
    numbers = {name: number for number, name in msvd_names(mapping).items()}
    captions: dict[str, list[str]] = {}
    for line in text_lines(file):
        name, _, caption = line.partition(" ")
        if name in numbers:  # others are the file's own comments
            captions.setdefault(name, []).append(caption.strip())
    for name, texts in captions.items():
        number = numbers[name]
        split = "train" if number <= 1200 else "val" if number <= 1300 else "test"
        yield {"video": msvd_clip(name), "caption": texts, "image_id": name, "split": split}


def msvd_names(mapping: File) -> dict[int, str]:
    """The names of MSVD's clips by the numbers that its data sets use, from youtube_mapping.txt: "NAME vid1"."""
    lines = (line.split() for line in text_lines(mapping))
    return {int(number.removeprefix("vid")): name for name, number in lines}


def msvd_clip(name: str) -> str:
    """The path of a clip of MSVD."""
    return f"YouTubeClips/{name}.avi"
