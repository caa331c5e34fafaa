"""Records as users have them: other encodings, mixed forms, files of macOS, and caches that move with their folder."""

from __future__ import annotations

import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet as pq
import pytest
from PIL import Image
from tiny import Tiny, run_stage

from qformer.data import FeatureCache, read_records
from qformer.data.records import distinct_captions
from qformer.data.rows import RECODE
from qformer.data.tars import decode_text

CASES = Path(__file__).resolve().parents[2] / "shared/cases/records"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / ".cache"))
    datasets.disable_progress_bars()


def png() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), "red").save(file, "PNG")
    return file.getvalue()


def write(path: Path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def tar(path: Path, files: dict[str, bytes]) -> str:
    with tarfile.open(path, "w") as file:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
    return str(path)


# ---- encodings ----


@pytest.mark.parametrize("encoding", ["latin-1", "cp1252", "utf-16"])
@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_record_files_that_are_not_utf8_are_named_with_their_row(tmp_path, form, encoding):
    rows = [{"file_name": f"{i}.jpg", "text": "a café" if i == 2 else "tea"} for i in range(4)]
    text = "\n".join(["file_name,text", *(f"{r['file_name']},{r['text']}" for r in rows)])
    if form != "csv":
        text = "\n".join(json.dumps(r, ensure_ascii=False) for r in rows)
    if form == "json":
        text = "[" + text.replace("\n", ",\n") + "]"
    path = tmp_path / ("metadata.csv" if form == "csv" else f"a.{form}")
    path.write_bytes(text.encode(encoding))
    row = 0 if encoding == "utf-16" else 3 if form == "csv" else 2
    with pytest.raises(ValueError, match=rf"data.train: {path}.* {row} \(from 0\)") as error:
        read_records([str(tmp_path if form == "csv" else path)], key="data.train")
    assert RECODE in str(error.value)


@pytest.mark.parametrize("field", ["image", "caption", "image_id", "question_type"])
def test_parquet_that_is_not_utf8_is_named_with_its_record(tmp_path, field):
    columns = {
        name: [f"{name} {i}".encode() for i in range(5)] for name in ("image", "caption", "image_id", "question_type")
    }
    columns[field][3] = b"caf\xe9"
    arrays = {name: pyarrow.array(values, pyarrow.binary()).view(pyarrow.string()) for name, values in columns.items()}
    pq.write_table(pyarrow.table(arrays), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=rf"a.parquet: record 3 \(from 0\) is not UTF-8 in field '{field}'"):
        read_records([str(tmp_path / "a.parquet")])
    lists = pyarrow.array([[b"x"], [b"y", b"\xff"]], pyarrow.list_(pyarrow.binary())).cast(
        pyarrow.list_(pyarrow.binary())
    )
    strings = pyarrow.ListArray.from_arrays(lists.offsets, lists.values.view(pyarrow.string()))
    pq.write_table(pyarrow.table({"image": ["a", "b"], "caption": strings}), tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b.parquet: record 1 \(from 0\) is not UTF-8 in field 'caption'"):
        read_records([str(tmp_path / "b.parquet")])


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (b"\xef\xbb\xbfa dog", "a dog"),
        ("a café".encode("utf-16"), "a café"),
        ("a café".encode("utf-16-be").join([b"\xfe\xff", b""]), "a café"),
        ("a café – “old”".encode("cp1252"), "a café – “old”"),
        ("grün".encode(), "grün"),
        (b"\xff\xfe", None),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF\x00\x01", None),
        (b"caf\x81\xe9", None),
    ],
)
@pytest.mark.parametrize("form", ["folder", "tar"])
def test_texts_beside_images_are_decoded_or_counted(tmp_path, content, text, form):
    if form == "tar":
        source = tar(tmp_path / "a.tar", {"a.png": png(), "a.txt": content})
    else:
        (tmp_path / "f").mkdir()
        (tmp_path / "f/a.png").write_bytes(png())
        (tmp_path / "f/a.txt").write_bytes(content)
        source = str(tmp_path / "f")
    record = read_records([source])[0]
    assert record.captions == ((text,) if text else ())
    assert (record.problem is None) is (text is not None)


def test_names_of_files_need_not_be_utf8(tmp_path):
    name = os.fsdecode(b"caf\xe9")
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / f"{name}.png").write_bytes(png())
    (tmp_path / "f" / f"{name}.txt").write_text("x")
    record = read_records([str(tmp_path / "f")])[0]
    assert record.captions == ("x",)
    assert Path(record.image).exists()


@pytest.mark.skipif(not CASES.exists(), reason="no ../shared")
def test_the_records_that_failed():
    with pytest.raises(ValueError, match=r"latin1.jsonl: record 20 \(from 0\) is not UTF-8 in field 'caption'"):
        read_records([str(CASES / "latin1.jsonl")])
    assert decode_text((CASES / "bom.txt").read_bytes(), "bom.txt") == "a dog"


# ---- macOS ----


def test_what_macos_leaves_beside_files_is_no_record(tmp_path):
    fork = b"Mac resource fork"
    (tmp_path / "f/sub").mkdir(parents=True)
    for folder in (tmp_path / "f", tmp_path / "f/sub"):
        for name, content in (("a.png", png()), ("a.txt", b"a dog"), ("._a.png", fork), ("._a.txt", fork)):
            (folder / name).write_bytes(content)
    assert [r.captions for r in read_records([str(tmp_path / "f")])] == [("a dog",)] * 2
    (tmp_path / "t").mkdir()
    files = {"._a.png": fork, "a.png": png(), "._a.txt": fork, "a.txt": b"a dog", "d/._b.png": fork, "d/._b.txt": fork}
    tar(tmp_path / "t/0.tar", files)
    (tmp_path / "t/._0.tar").write_bytes(fork)
    assert [r.captions for r in read_records([f"{tmp_path}/t/*.tar"])] == [("a dog",)]


# ---- forms ----


def test_a_file_rewritten_at_the_same_time_is_read_anew(tmp_path):
    for text in ("one", "two", "six"):
        path = write(tmp_path / "a.jsonl", {"image": "a.jpg", "caption": text})
        os.utime(path, (1_700_000_000, 1_700_000_000))
        assert read_records([path])[0].captions == (text,)


def test_one_caption_and_lists_of_them_may_stand_in_one_file(tmp_path):
    values = ["a", ["b", "c"], ["d"], None, 3, [None, "e"], ""]
    for order in (values, values[::-1]):
        path = write(tmp_path / "a.jsonl", *({"image": "a.jpg", "caption": v} for v in order))
        records = {json.dumps(v): r for v, r in zip(order, read_records([path]), strict=True)}
        texts = {key: r.captions for key, r in records.items()}
        assert texts == {'"a"': ("a",), '["b", "c"]': ("b", "c"), '["d"]': ("d",), "null": (), "3": (), '[null, "e"]': ("e",),
                         '""': ()}  # fmt: skip
        assert "its 'caption' holds int" in (records["3"].problem or "")


def test_answers_are_read_in_every_official_form(tmp_path):
    official = [{"answer": "net", "answer_confidence": "yes", "answer_id": 1}, {"answer": "nets", "answer_id": 2}]
    question = {"image": "a.jpg", "question": "q?", "answer_type": "other"}
    for number, (answers, expected) in enumerate(
        [(official, ("net", "nets")), ("net", ("net",)), (["x", ""], ("x", ""))]
    ):
        record = read_records([write(tmp_path / f"{number}.jsonl", {**question, "answers": answers})])[0]
        assert (record.answers, record.answer_type) == (expected, "other")
        files = {"0.png": png(), "0.json": json.dumps({**question, "answers": answers}).encode()}
        record = read_records([tar(tmp_path / f"{number}.tar", files)])[0]
        assert (record.answers, record.answer_type, record.problem) == (expected, "other", None)
    mixed = write(tmp_path / "m.jsonl", {**question, "answers": "a"}, {**question, "answers": ["b"]},
                  {**question, "answers": official})  # fmt: skip
    assert [r.answers for r in read_records([mixed])] == [("a",), ("b",), ("net", "nets")]


def test_lines_of_a_text_are_captions(tmp_path):
    lines = b"one\r\ntwo\n\n three \nfour\nfive\n"
    records = read_records([tar(tmp_path / "a.tar", {"a.png": png(), "a.txt": lines})])
    assert [c.strip() for c in records[0].captions] == ["one", "two", "three", "four", "five"]


def test_tars_with_other_text_fields_list_them(tmp_path):
    files = {}
    for i in range(12):
        files |= {f"{i}.jpg": png(), f"{i}.json": b'{"alt_text": "a dog", "url": "x"}', f"{i}.cls": b"3"}
    with pytest.raises(
        ValueError, match=r"no caption: no .txt \(only jpg, json, cls\).*only alt_text, url; expected"
    ) as error:
        read_records([tar(tmp_path / "a.tar", files)], key="data.train")
    assert "\n" not in str(error.value)


def test_folders_of_save_to_disk_are_recognised(tmp_path):
    images = [{"bytes": png(), "path": None}] * 3
    table = datasets.Dataset.from_dict({"image": images, "caption": ["a", "b", "c"]}).cast_column(
        "image", datasets.Image()
    )
    table.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": table, "test": table.select([1])}).save_to_disk(tmp_path / "two")
    for source, n in [("one", 3), ("two", 3), ("two:train", 3), ("two:test", 1)]:
        records = read_records([str(tmp_path / source)])
        assert len(records) == n
        assert records[0].image_bytes == png()
    with pytest.raises(ValueError, match="two has no split 'val'; it has train, test"):
        read_records([f"{tmp_path}/two:val"])


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.parquet", "a.tar", "f/metadata.csv"])
def test_an_empty_file_is_refused_in_one_line(tmp_path, name):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(b"")
    source = tmp_path / "f" if "/" in name else tmp_path / name
    with pytest.raises(ValueError, match=r"data.train: ") as error:
        read_records([str(source)], key="data.train")
    assert "\n" not in str(error.value)


def test_distinct_captions_are_counted_over_a_sample(tmp_path):
    rows = [{"image": f"{i}.jpg", "caption": ["A Dog", "x"] if i % 2 else "a  cat"} for i in range(100)]
    records = read_records([write(tmp_path / "a.jsonl", *rows)])
    assert distinct_captions(records) == (2, 100)
    assert distinct_captions(records, sample=9)[1] <= 10


# ---- ids and caches that move ----


def folders(place: Path) -> tuple[str, str]:
    for name in ("train", "val"):
        (place / name).mkdir(parents=True)
        for i in range(3):
            (place / name / f"{i}.png").write_bytes(png())
            (place / name / f"{i}.txt").write_text("a dog")
    return str(place / "train"), str(place / "val")


def test_image_ids_are_relative_and_still_tell_images_of_two_sources_apart(tmp_path):
    train, val = folders(tmp_path)
    assert [r.image_id for r in read_records([train])] == ["0.png", "1.png", "2.png"]
    assert [r.image_id for r in read_records([train, val])][2:4] == ["train/2.png", "val/0.png"]
    assert read_records([train], beside=[train, val])[0].image_id == "train/0.png"
    rows = write(tmp_path / "rows.jsonl", {"image": "train/1.png", "caption": "x"})
    assert read_records([rows])[0].image_id == "train/1.png"
    assert read_records([rows, train])[1].image_id == "train/0.png"
    assert read_records([rows], root=str(tmp_path))[0].image_id == "train/1.png"
    absolute = write(
        tmp_path / "abs.jsonl", {"image": f"{train}/1.png", "caption": "x"}, {"image": "/x/1.png", "caption": "x"}
    )
    assert [r.image_id for r in read_records([absolute])] == ["train/1.png", "/x/1.png"]


def test_a_feature_cache_moves_with_its_folder(tiny: Tiny, tmp_path):
    from stages import cache_features

    place = tmp_path / "here"
    shutil.copytree(tiny.records.parent, place / "data")
    records = place / "data" / tiny.records.name
    lines = [json.loads(line) for line in records.read_text().splitlines()]
    for line in lines:
        line.pop("image_id", None)
    write(records, *lines)

    def arguments(at: Path) -> list[str]:
        return tiny.stage1(tmp_path / f"run-{at.name}", f"data.train=[{at}/data/{records.name}]", "data.validation=",
                           f"data.features={at}/cache", "data.augment=false")  # fmt: skip

    cache_features.main(arguments(place))
    there = tmp_path / "there"
    shutil.move(place, there)
    assert lines[0]["image"] in FeatureCache(there / "cache")
    run_stage(1, arguments(there))


def test_a_cache_of_absolute_ids_is_still_read(tmp_path):
    train, _ = folders(tmp_path)
    record = read_records([train])[1]

    class Before(FeatureCache):
        def __init__(self) -> None:
            pass

        broken = {}  # type: ignore[assignment]

        def __contains__(self, image_id: str) -> bool:
            return image_id == f"{train}/1.png"

    assert Before().id_of(record) == f"{train}/1.png"


def test_no_id_needs_to_be_utf8():
    from qformer.data.cache import picture_key

    assert isinstance(picture_key(os.fsdecode(b"caf\xe9")), int)
    assert np.int64(picture_key("a")) == picture_key("a")
