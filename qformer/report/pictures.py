"""The images of held-out records, small, by image_id: found by the config of the run that read them."""

from collections.abc import Mapping, Set
from typing import Any

from qformer.data import Record, Records, load_image, read_records
from qformer.data.clips import load_frames
from qformer.messages import one_line
from qformer.report.page import image_uri

SIDE = 320  # pixels of the longer side


def held_out_pictures(config: Mapping[str, Any], image_ids: Set[str]) -> tuple[dict[str, str], str]:
    """Data URIs of the images that can be read, by image_id, and why others cannot; of several images the first.

    Args:
        config: of the run; its `data` names the records.
    """
    data = config.get("data") or {}
    if not data.get("validation"):
        return {}, "the config names no validation records, so their images are not shown."
    beside = [*(data.get("train") or ()), *data["validation"]]
    try:
        records = read_records(data["validation"], data.get("root"), key="data.validation", beside=beside)
        wanted = _places(records, image_ids)
    except (ValueError, OSError) as error:
        return {}, f"the images are not shown: {one_line(error)}"
    shown, problem = {}, ""
    for image_id, place in wanted.items():
        try:
            shown[image_id] = _small(records[place].each_image()[0])
        except ValueError as error:
            problem = f"some images are not shown: {one_line(error)}"
    if not problem and len(shown) < len(image_ids):
        problem = "some images are not among the records that data.validation names now, and are not shown."
    return shown, problem


def _places(records: Records, image_ids: Set[str]) -> dict[str, int]:
    """The first record of each image_id, of those that are there; a record of several images has their ids in a row."""
    places: dict[str, int] = {}
    for index in range(len(records)):
        if len(places) == len(image_ids):
            break
        if (image_id := records[index].image_id) in image_ids:
            places.setdefault(image_id, index)
    return places


def _small(record: Record) -> str:
    return image_uri(load_frames(record, 1)[0] if record.clip else load_image(record), SIDE)
