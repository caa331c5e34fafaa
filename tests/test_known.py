"""Known data sets: excerpts in the schema in which each is published, written by hand, become records."""

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest
from test_photographs import PHOTOS

from qformer.data import read_records
from qformer.data.known import KNOWN, WEB, read_known, recognise, web_source, write_known
from qformer.data.known import reading as known_reading
from qformer.data.known.__main__ import main
from qformer.data.known.reading import stream_json

ANSWERS = [
    {"answer": answer, "answer_confidence": "yes", "answer_id": i}
    for i, answer in enumerate(["net"] * 7 + ["netting", "mesh", ""], 1)
]


def vqa_files(subtype: str, question_id: int = 458752000) -> tuple[dict, dict]:
    head = {"info": {"version": "2.0"}, "license": {"name": "CC"}, "data_subtype": subtype}
    question = {"image_id": 458752, "question": "What is this photo taken looking through?", "question_id": question_id}
    answer = {"question_type": "what is this", "multiple_choice_answer": "net", "answers": ANSWERS, "image_id": 458752,
              "answer_type": "other", "question_id": question_id}  # fmt: skip
    questions = {**head, "task_type": "Open-Ended", "data_type": "mscoco", "questions": [question]}
    return questions, {**head, "data_type": "mscoco", "annotations": [answer]}


def karpathy(name: str) -> dict:
    def image(number: int, split: str, **fields: object) -> dict:
        texts = [f"A man in hat {number} .", f"Someone, number {number}."]
        return {
            **fields, "sentids": [2 * number, 2 * number + 1], "imgid": number, "split": split,
            "sentences": [{"tokens": t.lower().split(), "raw": t, "imgid": number, "sentid": number} for t in texts],
        }  # fmt: skip

    if name != "coco":
        names = ["2513260012_03d33305cf.jpg", "2903617548_d3e38d7f88.jpg"]
        return {"images": [image(i, ("train", "test")[i], filename=n) for i, n in enumerate(names)], "dataset": name}
    rows = [("val2014", "test", 391895), ("train2014", "train", 57870), ("val2014", "restval", 522418)]
    images = [
        image(i, split, filepath=folder, filename=f"COCO_{folder}_{cocoid:012d}.jpg", cocoid=cocoid)
        for i, (folder, split, cocoid) in enumerate(rows)
    ]
    return {"images": images, "dataset": "coco"}


# The published files of each set, and of its rows: how many, the first.
EXCERPTS: dict[str, tuple[dict[str, object], int, dict]] = {
    "coco": ({"dataset_coco.json": karpathy("coco")}, 3, {
        "image": "val2014/COCO_val2014_000000391895.jpg", "caption": ["A man in hat 0 .", "Someone, number 0."],
        "image_id": 391895, "split": "test"}),
    "flickr8k": ({"dataset_flickr8k.json": karpathy("flickr8k")}, 2, {
        "image": "2513260012_03d33305cf.jpg", "caption": ["A man in hat 0 .", "Someone, number 0."], "image_id": 0,
        "split": "train"}),
    "flickr30k": ({"dataset_flickr30k.json": karpathy("flickr30k")}, 2, {
        "image": "2513260012_03d33305cf.jpg", "caption": ["A man in hat 0 .", "Someone, number 0."], "image_id": 0,
        "split": "train"}),
    "nocaps": ({"nocaps_val_4500_captions.json": {
        "licenses": [], "info": {"year": 2018},
        "images": [{"license": 0, "file_name": "0013ea2087020901.jpg", "height": 1024, "width": 732, "id": 0,
                    "coco_url": "https://s3.amazonaws.com/nocaps/val/0013ea2087020901.jpg", "domain": "near-domain",
                    "open_images_id": "0013ea2087020901", "date_captured": "2018-11-06 11:04:33"}],
        "annotations": [{"image_id": 0, "id": 0, "caption": "A baby is standing in front of a house."},
                        {"image_id": 0, "id": 1, "caption": "A little girl in a white jacket."}]}}, 1, {
        "image": "val/0013ea2087020901.jpg", "image_id": 0, "split": "val",
        "caption": ["A baby is standing in front of a house.", "A little girl in a white jacket."]}),
    "vg": ({
        "image_data.json": [{"width": 800, "url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg",
                             "height": 600, "image_id": 1, "coco_id": None, "flickr_id": None}],
        "region_descriptions.json": [{"id": 1, "regions": [
            {"region_id": 1382, "width": 82, "height": 139, "image_id": 1, "phrase": "the clock is green", "y": 57, "x": 421},
            {"region_id": 1383, "width": 182, "height": 139, "image_id": 1, "phrase": "shade is along the street ", "y": 1,
             "x": 2}]}]}, 1, {
        "image": "VG_100K_2/1.jpg", "caption": ["the clock is green", "shade is along the street"], "split": "train"}),
    "vg_vqa": ({
        "image_data.json": [{"url": "https://cs.stanford.edu/people/rak248/VG_100K_2/1.jpg", "image_id": 1,
                             "coco_id": None}],
        "question_answers.json": [{"id": 1, "qas": [{
            "a_objects": [], "question": "What color is the clock?", "image_id": 1, "qa_id": 986768, "answer": "Green.",
            "q_objects": []}]}]}, 1, {
        "image": "VG_100K_2/1.jpg", "question": "What color is the clock?", "answers": ["Green"], "question_id": 986768,
        "split": "train"}),
    "vqav2": (dict(zip(("v2_OpenEnded_mscoco_train2014_questions.json", "v2_mscoco_train2014_annotations.json"),
                       vqa_files("train2014"), strict=True)), 1, {
        "image": "train2014/COCO_train2014_000000458752.jpg", "question": "What is this photo taken looking through?",
        "image_id": 458752, "question_id": 458752000, "answers": tuple(a["answer"] for a in ANSWERS),
        "question_type": "what is this", "answer_type": "other", "split": "train"}),
    "okvqa": (dict(zip(("OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json"),
                       vqa_files("val2014"), strict=True)), 1, {
        "image": "val2014/COCO_val2014_000000458752.jpg", "question": "What is this photo taken looking through?",
        "image_id": 458752, "question_id": 458752000, "answers": tuple(a["answer"] for a in ANSWERS),
        "question_type": "what is this", "answer_type": "other", "split": "val"}),
    "aokvqa": ({"aokvqa_v1p0_val.json": [{
        "split": "val", "image_id": 461751, "question_id": "22jbM6gDxdaMaunuzgrsBB", "question": "What is in the motor?",
        "choices": ["oil", "water", "paint", "sand"], "correct_choice_idx": 0, "direct_answers": ["oil"] * 6 + ["gas"] * 4,
        "difficult_direct_answer": False, "rationales": ["Motors need oil."]}]}, 1, {
        "image": "val2017/000000461751.jpg", "image_id": 461751, "question_id": "22jbM6gDxdaMaunuzgrsBB",
        "question": "What is in the motor?", "choices": ["oil", "water", "paint", "sand"],
        "answers": ["oil"] * 6 + ["gas"] * 4, "split": "val"}),
    "gqa": ({"testdev_balanced_questions.json": {"201307251": {
        "semantic": [{"operation": "select", "dependencies": [], "argument": "vest (1)"}], "entailed": [],
        "equivalent": ["201307251"], "question": "Is it overcast?", "imageId": "n289055", "isBalanced": True,
        "groups": {"global": None, "local": "13-weather"}, "answer": "no", "semanticStr": "select",
        "annotations": {"answer": {}, "question": {}, "fullAnswer": {}},
        "types": {"detailed": "weatherVerify", "semantic": "global", "structural": "verify"},
        "fullAnswer": "No, it is clear."}}}, 1, {
        "image": "images/n289055.jpg", "question": "Is it overcast?", "answers": ["no"], "question_id": "201307251",
        "question_type": "verify", "split": "testdev"}),
    "vizwiz": ({"val.json": [{
        "image": "VizWiz_val_00000000.jpg", "question": "Ok. There is another picture I hope it is a better one.",
        "answers": [{"answer_confidence": "yes", "answer": "unanswerable"}] * 9 + [{"answer_confidence": "no",
                                                                                   "answer": "dark"}],
        "answer_type": "unanswerable", "answerable": 0}]}, 1, {
        "image": "val/VizWiz_val_00000000.jpg", "answers": ["unanswerable"] * 9 + ["dark"],
        "question": "Ok. There is another picture I hope it is a better one.", "question_id": "VizWiz_val_00000000.jpg",
        "answer_type": "unanswerable", "split": "val"}),
    "textvqa": ({"TextVQA_0.5.1_val.json": {"dataset_type": "val", "dataset_name": "textvqa", "dataset_version": "0.5.1",
        "data": [{"question": "what is the brand?", "image_id": "003a8ae2ef43b901", "image_classes": ["Camera"],
                  "flickr_original_url": "https://", "answers": ["nokia"] * 10, "question_tokens": ["what"],
                  "question_id": 34602, "set_name": "val"}]}}, 1, {
        "image": "train_images/003a8ae2ef43b901.jpg", "question": "what is the brand?", "answers": ["nokia"] * 10,
        "question_id": 34602, "split": "val"}),
    "pope": ({"coco_pope_popular.json": [
        {"question_id": 1, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a snowboard in the image?",
         "label": "yes"},
        {"question_id": 2, "image": "COCO_val2014_000000310196.jpg", "text": "Is there a car in the image?",
         "label": "no"}]}, 2, {
        "image": "val2014/COCO_val2014_000000310196.jpg", "question": "Is there a snowboard in the image?",
        "answers": ["yes"], "question_id": 1, "question_type": "popular", "split": "popular"}),
    "scienceqa": ({"problems.json": {
        "1": {"question": "Which is the farthest north?", "choices": ["Texas", "Maine"], "answer": 1, "hint": "",
              "image": "image.png", "task": "closed choice", "grade": "grade2", "subject": "social science",
              "topic": "geography", "split": "train", "solution": "See the compass."},
        "2": {"question": "No image?", "choices": ["yes", "no"], "answer": 0, "hint": "", "image": None, "grade": "grade2",
              "subject": "natural science", "split": "train"}}}, 1, {
        "image": "train/1/image.png", "question": "Which is the farthest north?", "answers": ["Maine"],
        "choices": ["Texas", "Maine"], "question_id": "1", "question_type": "social science", "split": "train"}),
    "nlvr2": ({"train.json": [
        {"sentence": "One image shows exactly two pandas.", "left_url": "https://", "right_url": "https://", "writer": 9,
         "label": "True", "identifier": "train-10171-0-3", "directory": 86, "synset": "panda", "query": "pandas2"}]}, 1, {
        "images": ["images/train/86/train-10171-0-img0.png", "images/train/86/train-10171-0-img1.png"],
        "question": "One image shows exactly two pandas.", "answers": ["true"], "question_id": "train-10171-0-3",
        "split": "train"}),
    "msrvtt": ({"train_val_videodatainfo.json": {
        "info": {"year": "2016"},
        "videos": [{"category": 9, "url": "https://", "video_id": "video0", "start time": 137.72, "end time": 149.44,
                    "split": "train", "id": 0}],
        "sentences": [{"caption": "a car is shown", "video_id": "video0", "sen_id": 0},
                      {"caption": "a man drives", "video_id": "video0", "sen_id": 1}]}}, 1, {
        "video": "TrainValVideo/video0.mp4", "caption": ["a car is shown", "a man drives"], "image_id": "video0",
        "split": "train"}),
    "msrvtt_qa": ({"test_qa.json": [
        {"answer": "couch", "category_id": 14, "id": 158581, "question": "what are three people sitting on?",
         "video_id": 7010}]}, 1, {
        "video": "TestVideo/video7010.mp4", "question": "what are three people sitting on?", "answers": ["couch"],
        "question_id": 158581, "split": "test"}),
    "msvd": ({"AllVideoDescriptions.txt": "# English\n\n-4wsuPCjDBc_5_15 a squirrel is eating a peanut\n"
                                          "-4wsuPCjDBc_5_15 a squirrel eats\nzzz_1_2 a test clip\n",
              "youtube_mapping.txt": "-4wsuPCjDBc_5_15 vid1\nzzz_1_2 vid1301\n"}, 2, {
        "video": "YouTubeClips/-4wsuPCjDBc_5_15.avi", "caption": ["a squirrel is eating a peanut", "a squirrel eats"],
        "image_id": "-4wsuPCjDBc_5_15", "split": "train"}),
    "msvd_qa": ({"val_qa.json": [{"answer": "peanut", "id": 30933, "question": "what is a squirrel eating?",
                                  "video_id": 1}], "youtube_mapping.txt": "-4wsuPCjDBc_5_15 vid1\n"}, 1, {
        "video": "YouTubeClips/-4wsuPCjDBc_5_15.avi", "question": "what is a squirrel eating?", "answers": ["peanut"],
        "question_id": 30933, "split": "val"}),
}  # fmt: skip
LINES = ("pope", "nlvr2")  # are published as one object a line


def publish(folder: Path, name: str) -> Path:
    folder.mkdir(exist_ok=True)
    for file, content in EXCERPTS[name][0].items():
        if name in LINES:
            content = "".join(json.dumps(row) + "\n" for row in content)
        (folder / file).write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def filled(row: dict) -> dict:
    return {key: value for key, value in row.items() if value is not None}


@pytest.mark.parametrize("name", EXCERPTS)
def test_published_files_become_records(name, tmp_path):
    rows = list(read_known(name, [publish(tmp_path, name)]))
    assert (len(rows), filled(rows[0])) == EXCERPTS[name][1:]


def test_every_known_set_has_an_excerpt():
    assert set(KNOWN) - set(EXCERPTS) == {"aokvqa_choice"}  # other answers of the same file
    assert set(WEB) == {"cc3m", "cc12m", "sbu", "laion"}


def test_of_multiple_choice_the_right_one_is_the_answer(tmp_path):
    (row,) = read_known("aokvqa_choice", [publish(tmp_path, "aokvqa")])
    assert row["answers"] == ["oil"]


def test_flickr8k_is_read_from_its_published_text_files(tmp_path):
    lines = [f"{name}.jpg#{i}\tA child {i} .\n" for name in ("1_a", "2_b", "3_c") for i in range(5)]
    (tmp_path / "Flickr8k.token.txt").write_text("".join(lines))
    for split, name in (("train", "1_a"), ("dev", "2_b"), ("test", "3_c")):
        (tmp_path / f"Flickr_8k.{split}Images.txt").write_text(f"{name}.jpg\n")
    rows = list(read_known("flickr8k", [tmp_path]))
    assert [(row["image"], row["split"], len(row["caption"])) for row in rows] == [
        ("1_a.jpg", "train", 5), ("2_b.jpg", "dev", 5), ("3_c.jpg", "test", 5)
    ]  # fmt: skip


def test_a_test_split_has_questions_only_and_several_splits_do_not_mix(tmp_path):
    publish(tmp_path, "vqav2")
    questions, _ = vqa_files("test-dev2015", 2)
    (tmp_path / "v2_OpenEnded_mscoco_test-dev2015_questions.json").write_text(json.dumps(questions))
    rows = {row["split"]: row for row in read_known("vqav2", [tmp_path])}
    assert rows["test-dev"]["image"] == "test2015/COCO_test2015_000000458752.jpg"
    assert "answers" not in rows["test-dev"]
    assert len(rows["train"]["answers"]) == 10


def placed(row, folder):
    """What a record of the row names, one image or several."""
    if "images" in row:
        return [str(folder / name) for name in row["images"]]
    return str(folder / (row.get("image") or row["video"]))


@pytest.mark.parametrize("name", EXCERPTS)
def test_records_are_written_by_split_and_read_back(name, tmp_path):
    written = write_known(name, [publish(tmp_path / "files", name)], tmp_path / "out")
    first = EXCERPTS[name][2]
    records = read_records([str(tmp_path / "out" / f"{first['split']}.jsonl")])
    record = records.text(0)
    assert sum(written.counts.values()) == EXCERPTS[name][1]
    assert record.names == placed(first, tmp_path / "out")
    assert record.clip == ("video" in first)
    assert record.captions == tuple(first.get("caption", ()))
    assert record.answers == tuple(first.get("answers", ()))
    assert record.choices == tuple(first.get("choices", ()))
    for field in ("question", "question_id", "question_type", "answer_type"):
        assert getattr(record, field) == first.get(field)


READ_IN_PLACE = [name for name in EXCERPTS if name not in ("vg", "vg_vqa", "msvd", "msvd_qa", "msrvtt_qa")]


@pytest.mark.parametrize("name", READ_IN_PLACE)
def test_published_files_are_sources_of_records_too(name, tmp_path):
    first = EXCERPTS[name][2]
    paths = sorted(map(str, publish(tmp_path, name).iterdir()))
    for sources in (paths, paths[::-1]):  # VQA's two files in either order
        records = read_records([f"{sources[0]}:{first['split']}", *sources[1:]] if len(sources) == 1 else sources)
        record = records.text(0)
        assert record.names == placed(first, tmp_path)
        assert record.captions == tuple(first.get("caption", ()))
        assert record.answers == tuple(first.get("answers", ()))
        assert record.question_id == first.get("question_id")
        name = first.get("image") or first.get("video") or " ".join(first["images"])
        assert record.image_id == str(first.get("image_id", name))
        assert record.answer_type == first.get("answer_type")


def test_two_pairs_of_vqa_files_in_any_order_give_each_question_its_answers(tmp_path):
    paths = []
    for number, subtype in enumerate(("train2014", "val2014")):
        for what, content in zip(("questions", "annotations"), vqa_files(subtype, number), strict=True):
            paths.append(tmp_path / f"{subtype}_{what}.json")
            paths[-1].write_text(json.dumps(content))
    records = read_records([str(paths[i]) for i in (3, 0, 1, 2)])
    assert [(r.question_id, len(r.answers)) for r in map(records.text, range(2))] == [(0, 10), (1, 10)]


def test_answers_without_their_questions_and_those_of_others_are_named(tmp_path):
    questions, annotations = vqa_files("val2014")
    mine, other = tmp_path / "v2_mscoco_val2014_annotations.json", tmp_path / "other_questions.json"
    mine.write_text(json.dumps(annotations))
    with pytest.raises(
        ValueError, match=r"v2_mscoco_val2014_annotations.json has .* v2_OpenEnded_mscoco_val2014_questions"
    ):
        read_records([str(mine)])
    questions["questions"][0]["question_id"] = 1
    other.write_text(json.dumps(questions))
    with pytest.raises(ValueError, match=r"no annotation of any question in .*other_questions\.json"):
        read_records([str(mine), str(other)])


@pytest.mark.parametrize("change", [{"answers": None}, {"question_id": "x"}, {"answers": [{"text": "net"}]}])
def test_an_entry_that_is_not_as_published_is_one_line(change, tmp_path):
    questions, annotations = vqa_files("val2014")
    part = questions["questions"] if "question_id" in change else annotations["annotations"]
    part.append({**part[0], **change})
    for name, content in (("q", questions), ("a", annotations)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"q\.json has the form of vqa_questions, but is not as published"):
        read_records([str(tmp_path / "q.json"), str(tmp_path / "a.json")])


def test_record_files_are_no_published_files(tmp_path):
    rows = [{"image": "a.jpg", "question": "q?", "answers": [{"answer": "x"}], "caption": ["a", "b"], "question_id": 1}]
    (tmp_path / "list.json").write_text(json.dumps(rows))
    (tmp_path / "lines.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "labels.jsonl").write_text(json.dumps({"image": "a.jpg", "text": "a dog", "label": "yes"}))
    assert recognise(tmp_path / "labels.jsonl") is None, "not POPE"
    assert read_records([str(tmp_path / "labels.jsonl")]).text(0).captions == ("a dog",)
    assert recognise(tmp_path / "list.json") is None
    assert recognise(tmp_path / "lines.jsonl") is None
    assert read_records([str(tmp_path / "list.json")]).text(0).answers == ("x",)


def test_files_inside_their_zips_are_read(tmp_path):
    folder = publish(tmp_path / "files", "vqav2")
    for path in list(folder.iterdir()):
        with zipfile.ZipFile(folder / f"{path.stem}.zip", "w") as archive:
            archive.write(path, path.name)
        path.unlink()
    (row,) = read_known("vqav2", [folder])
    assert filled(row) == EXCERPTS["vqav2"][2]


def test_the_clips_of_1k_a_are_a_split_of_msrvtt(tmp_path):
    publish(tmp_path, "msrvtt")
    lines = 'key,vid_key,video_id,sentence\nret0,msr9770,video9770,"a person, connecting something"\n'
    (tmp_path / "MSRVTT_JSFUSION_test.csv").write_text(lines)
    row = list(read_known("msrvtt", [tmp_path]))[-1]
    assert (row["video"], row["split"]) == ("TestVideo/video9770.mp4", "test_1k")
    assert row["caption"] == ["a person, connecting something"]


def run(*arguments: object) -> None:
    main([str(argument) for argument in arguments])


def refused(capsys, *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_:
        run(*arguments)
    assert exit_.value.code == 2
    return capsys.readouterr().err


def test_the_command_writes_splits_and_a_config_and_says_which_images_are_missing(tmp_path, capsys):
    folder = publish(tmp_path / "files", "coco")
    images = tmp_path / "images" / "val2014"
    images.mkdir(parents=True)
    (images / "COCO_val2014_000000391895.jpg").write_bytes(b"")
    run("coco", folder / "dataset_coco.json", "--out", tmp_path / "out", "--images", tmp_path / "images")
    printed = capsys.readouterr()
    for split in ("train", "restval", "test"):
        assert f"{split}.jsonl: 1 records" in printed.out
    assert "of 2 records the image is not there, the first is" in printed.err
    row = json.loads((tmp_path / "out" / "test.jsonl").read_text())
    assert row["image"] == str(images / "COCO_val2014_000000391895.jpg")
    assert row["image_id"] == 391895
    config = (tmp_path / "out" / "data.yaml").read_text()
    assert f"{tmp_path}/out/train.jsonl" in config
    assert f"{tmp_path}/out/restval.jsonl" in config
    assert not [path for path in (tmp_path / "out").iterdir() if path.name.startswith(".")]


def test_wrong_and_missing_files_are_named(tmp_path, capsys):
    out = ["--out", tmp_path / "out"]
    folder = publish(tmp_path / "files", "vg")
    assert "'cocoo' is no known data set; nearest is coco" in refused(capsys, "cocoo", folder, *out)
    assert "dataset_coco.json is missing" in refused(capsys, "coco", folder, *out)
    message = refused(capsys, "coco", folder / "image_data.json", *out)
    assert "image_data.json has the form of vg_images; expected dataset_coco.json" in message
    (folder / "image_data.json").unlink()
    assert "image_data.json is missing" in refused(capsys, "vg", folder, *out)
    assert "there is no" in refused(capsys, "vg", folder / "nothing", *out)
    pair = publish(tmp_path / "pair", "vqav2")
    (pair / "v2_mscoco_train2014_annotations.json").rename(pair / "v2_mscoco_val2014_annotations.json")
    assert "v2_mscoco_train2014_annotations.json is missing" in refused(capsys, "vqav2", pair, *out)
    questions = publish(tmp_path / "q", "gqa") / "testdev_balanced_questions.json"
    questions.write_text(questions.read_text()[:-30])
    assert "testdev_balanced_questions.json is no JSON, or was cut short" in refused(capsys, "gqa", questions, *out)
    (tmp_path / "problems.json").write_text('{"1": {"question": "q", "image": "i.png", "split": "val"}}')
    assert "is not as published: it has no 'choices'" in refused(capsys, "scienceqa", tmp_path / "problems.json", *out)
    assert not list((tmp_path / "out").glob("*.jsonl")), "nothing half written stays"


def img2dataset(folder: Path, numbers: list[int]) -> Path:
    folder.mkdir(exist_ok=True)
    for number in numbers:
        (folder / f"{number:05d}.tar").write_bytes(b"")
        (folder / f"{number:05d}_stats.json").write_text(json.dumps({"count": 10, "successes": 8, "status_dict": {}}))
    return folder


def test_tars_of_img2dataset_are_checked_and_named(tmp_path, capsys):
    folder = img2dataset(tmp_path / "cc3m", [0, 1, 2])
    assert web_source("cc3m", folder) == (f"{folder}/{{00000..00002}}.tar", 24)
    run("cc3m", folder, "--out", tmp_path / "out")
    assert "24 records" in capsys.readouterr().out
    assert f'train: ["{folder}/{{00000..00002}}.tar"]' in (tmp_path / "out" / "data.yaml").read_text()
    with pytest.raises(ValueError, match="its tars are a source of records"):
        read_known("cc3m", [folder])
    (folder / "00001_stats.json").unlink()
    assert "lacks 00001_stats.json" in refused(capsys, "cc3m", folder, "--out", tmp_path / "out")
    (folder / "00001.tar").unlink()
    assert "lacks 00001.tar" in refused(capsys, "cc3m", folder, "--out", tmp_path / "out")
    assert "no 00000.tar" in refused(capsys, "laion", tmp_path, "--out", tmp_path / "out")


@pytest.mark.parametrize("chunk", [1, 3, 7, 1000])
def test_streamed_json_is_what_json_reads(chunk, tmp_path, monkeypatch):
    monkeypatch.setattr(known_reading, "CHUNK_CHARACTERS", chunk)
    content = {"a": [1, 23.5, {"x": ["]", "}"]}, [], 'é\\"'], "b": {"deep": [1, {"y": None}]}, "c": [], "d": 1234567}
    for indent in (None, 1):
        path = tmp_path / "file.json"
        path.write_text(json.dumps(content, indent=indent))
        assert list(stream_json(path)) == [*(("a", item) for item in content["a"]), ("b", content["b"]), ("d", 1234567)]
        path.write_text(json.dumps(content["a"], indent=indent))
        assert list(stream_json(path)) == [("", item) for item in content["a"]]
        path.write_text(json.dumps(content, indent=indent)[:-5])
        with pytest.raises(ValueError, match="no JSON"):
            list(stream_json(path))


def test_one_item_of_a_large_file_is_in_memory_at_a_time(tmp_path):
    path = tmp_path / "region_descriptions.json"
    with path.open("w") as file:
        regions = json.dumps([{"phrase": "a clock on a wall", "region_id": i, "x": 1, "y": 2} for i in range(50)])
        file.write("[" + ",".join(f'{{"id": {i}, "regions": {regions}}}' for i in range(8000)) + "]")
    code = (
        "import resource, sys; from pathlib import Path; from qformer.data.known.reading import stream_json;"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "assert sum(1 for _ in stream_json(Path(sys.argv[1]))) == 8000;"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert path.stat().st_size > 25e6
    assert int(done.stdout) < 16_000, "KB; the whole file takes 200 000"


def test_help_costs_no_wait():
    start = time.process_time()
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "qformer.data.known", "--help"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert all(name in done.stdout for name in KNOWN)
    assert not [line for line in done.stderr.splitlines() if line.endswith((" torch", " transformers", " datasets"))]
    assert time.process_time() - start < 5


def test_the_photographs_questions_are_read_as_published():
    if not (PHOTOS / "vqa_questions.json").is_file():
        pytest.skip(f"no photographs in {PHOTOS}; set QFORMER_PHOTOS to a folder with vqa_questions.json")
    sources = [str(PHOTOS / f"vqa_{what}.json") for what in ("annotations", "questions")]
    records = read_records(sources)
    rows = [records.text(i) for i in range(len(records))]
    assert len(rows) == 39
    assert {len(row.answers) for row in rows} == {10}
    assert {row.answer_type for row in rows} <= {"yes/no", "number", "other"}
    assert all(isinstance(row.question_id, int) and Path(row.image).is_file() for row in rows)
