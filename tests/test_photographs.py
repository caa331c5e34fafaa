"""Real JPEGs of odd sizes with human captions, through records, configs and both stages, with a real ViT-B/32."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from tiny import Tiny, run_stage

import qformer

PHOTOS = Path(os.environ.get("QFORMER_PHOTOS", Path(__file__).parents[2] / "shared" / "photos"))
ENCODER = ["encoder.loader=open_clip", "encoder.id=ViT-B-32", "encoder.random_weights=true"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """12 photographs, and among them a grey one, one that EXIF turns, and one cut short."""
    if not (PHOTOS / "captions.json").is_file():
        pytest.skip(f"no photographs in {PHOTOS}; set QFORMER_PHOTOS to a folder with captions.json")
    folder = tmp_path_factory.mktemp("photos")
    lines = []
    for i, entry in enumerate(json.loads((PHOTOS / "captions.json").read_text())[:12]):
        source, name = PHOTOS / entry["image"], f"{i:02d}.jpg"
        if i == 3:
            Image.open(source).convert("L").save(folder / name)
        elif i == 5:
            exif = Image.Exif()
            exif[0x0112] = 6
            Image.open(source).save(folder / name, exif=exif)
        elif i == 7:
            (folder / name).write_bytes(source.read_bytes()[:2000])
        else:
            (folder / name).write_bytes(source.read_bytes())
        lines.append({"image": name, "caption": entry["captions"]})
    path = folder / "records.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_both_stages_on_photographs(records, tiny: Tiny, tmp_path):
    data = [
        f"data.train=[{records}]",
        f"data.validation=[{records}]",
        "data.augment=true",
        "train.max_steps=3",
        "data.max_dropped_fraction=0.5",  # one in nine is broken
    ]
    run_stage(1, tiny.stage1(tmp_path / "s1", *ENCODER, *data))
    run_stage(2, tiny.stage2(tmp_path / "s2", *ENCODER, *data, f"stage2.init_from={tmp_path / 's1' / 'adapter'}"))
    lines = [json.loads(line) for line in (tmp_path / "s1" / "metrics.jsonl").read_text().splitlines()]
    assert lines[2]["dropped"] >= 1, "24 draws of 12 records meet the one that is cut short"
    photos = [records.parent / f"{i:02d}.jpg" for i in (0, 3, 5)]
    captions = qformer.load(tmp_path / "s2" / "adapter").caption(photos, max_new_tokens=4, min_new_tokens=0)
    assert len(captions) == 3
    with pytest.raises(ValueError, match=r"07\.jpg"):
        qformer.load(tmp_path / "s1" / "adapter").embed_image([records.parent / "07.jpg"])
