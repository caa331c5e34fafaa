"""Protocols of tasks: every YAML of configs/tasks, options over it, mistakes by the nearest name, what a task reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from test_evaluation import predicted, scored, textual, write
from test_stages import refused

from qformer.config import ConfigError, Protocol, protocol_options, read_protocol, task_names
from qformer.evaluation import TASKS
from qformer.evaluation.task import GENERATION

REPO = Path(__file__).resolve().parent.parent
NAMES = tuple(TASKS)


def split_of(folder: Path, *splits: str | None) -> str:
    answers = [["yes"], ["no"], ["yes"], ["no"]]
    return textual(
        folder, *[{"answers": a, **({"split": s} if s else {})} for a, s in zip(answers, splits, strict=False)]
    )


@pytest.mark.parametrize("name", task_names())
def test_every_protocol_names_a_task_that_reads_all_it_says(name):
    protocol = read_protocol(name, NAMES)
    task = TASKS[protocol.task]
    text = (REPO / "configs/tasks" / f"{name}.yaml").read_text()
    assert text.startswith("# ")
    assert f"--task {name}" in text, "its command"
    assert protocol.reported, "what was published under it, and where"
    assert protocol.rule in (None, *task.rules)
    assert protocol.mode in (None, *task.modes)
    assert all(getattr(protocol, key) is None or key in task.options for key in GENERATION)
    assert name not in TASKS, "a protocol of a task's own name could not be called"


def test_a_protocol_is_called_by_its_name_or_its_path_and_a_task_by_its_own():
    path = REPO / "configs/tasks/vqav2.yaml"
    assert read_protocol("vqav2", NAMES) == read_protocol(str(path), NAMES)
    assert read_protocol("vqav2", NAMES) == read_protocol("configs/tasks/vqav2.yaml", NAMES)
    assert read_protocol("vqa", NAMES) == Protocol(task="vqa")


def test_it_is_called_by_name_in_any_folder(tmp_path):
    code = "from qformer.config import read_protocol; print(read_protocol('vqav2', ('vqa',)).split)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "val", done.stderr


def test_options_take_the_place_of_what_the_file_says(tmp_path):
    (tmp_path / "mine.yaml").write_text("task: vqa\nnum_beams: 2\nsplit: val\nlength_penalty: -1\n")
    protocol = read_protocol(str(tmp_path / "mine.yaml"), NAMES, {"num_beams": 7, "split": None, "prompt": "Q: {}"})
    assert protocol == Protocol(task="vqa", num_beams=7, split="val", prompt="Q: {}", length_penalty=-1.0)
    assert {name for name, _, _ in protocol_options()} == {*vars(protocol)} - {"task", "reported"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("task: vqa\nnum_beam: 2\n", "unknown key num_beam in .*mine.yaml; nearest is num_beams"),
        ("task: vqa\nnum_beams: many\n", r"num_beams: 'many' in .*mine.yaml is not int \| None"),
        ("task: vqa\nnum_beams: 0\n", "num_beams: 0 must be at least 1"),
        ("task: vqaa\n", "task: 'vqaa' in .*mine.yaml is no task; nearest is vqa"),
        ("num_beams: 2\n", "missing value: task in .*mine.yaml"),
        ("- vqa\n", "must hold keys and values"),
    ],
)
def test_a_mistake_in_a_protocol_is_named(tmp_path, text, message):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        read_protocol(str(tmp_path / "mine.yaml"), NAMES)


def test_an_unknown_task_is_refused_with_the_nearest(tmp_path, capsys):
    records = textual(tmp_path, {"answers": ["a"]})
    assert "no task and no file of configs/tasks; nearest is vqav2" in refused(
        "evaluate", ["x", records, "--task", "vqav"], capsys
    )
    missing = refused("evaluate", ["x", records, "--task", "configs/tasks/vqav3.yaml"], capsys)
    assert "no config file configs/tasks/vqav3.yaml; nearest is configs/tasks/vqav2.yaml" in missing
    assert "num_beams: 0 must be at least 1" in refused("evaluate", ["x", records, "--num-beams", "0"], capsys)


def test_only_records_of_the_split_are_asked_where_they_name_one(tmp_path, capsys):
    records = split_of(tmp_path, "val", "test", "val", "test")
    arguments = ["--predictions", predicted(tmp_path, "yes", "yes", ids=[0, 2]), records, "--task", "vqav2"]
    scores = scored(tmp_path, *arguments)
    assert (scores["n"], scores["scores"], scores["task"]) == (2, {"overall": 100.0}, "vqa")
    assert scores["protocol"]["split"] == "val"
    assert "reported: BLIP-2 table 2" in capsys.readouterr().out
    arguments[1] = predicted(tmp_path, "yes", "no", ids=[1, 3])
    assert scored(tmp_path, *arguments, "--split", "test")["scores"] == {"overall": 50.0}
    message = "no record is of split 'dev'; they are of val, test; give --split NAME"
    assert message in refused("evaluate", [*arguments, "--split", "dev"], capsys)


def test_records_without_a_split_are_taken_and_counted(tmp_path, capsys):
    records = split_of(tmp_path, None, None)
    scored(tmp_path, "--predictions", predicted(tmp_path, "yes", "no"), records, "--task", "vqav2")
    assert "2 records name no split: they were taken as the protocol's" in capsys.readouterr().err


def test_what_a_task_does_not_read_is_refused(tmp_path, capsys, monkeypatch):
    task = TASKS["vqa"]
    monkeypatch.setitem(TASKS, "vqa", task.__class__(**{**vars(task), "options": ("num_beams",)}))
    records = textual(tmp_path, {"answers": ["a"]})
    arguments = ["--predictions", predicted(tmp_path, "a"), records, "--num-beams", "2"]
    assert scored(tmp_path, *arguments)["n"] == 1
    assert "prompt: task vqa does not read it" in refused("evaluate", [*arguments, "--prompt", "{}"], capsys)


def test_records_of_one_image_are_one_and_numbers_stay_numbers(tmp_path, monkeypatch):
    task = TASKS["vqa"]
    changed = {
        "id_field": "image_id", "output_field": "caption", "by_image": True,
        "lacks": lambda record, mode: None, "has_reference": lambda record: False,
        "describe": lambda record: {"captions": list(record.captions)},
    }  # fmt: skip
    monkeypatch.setitem(TASKS, "captions", task.__class__(**{**vars(task), **changed}))
    rows = [(7, "a"), (9, "b"), (7, ["c", "d"])]
    rows = [{"image": f"{image_id}.png", "image_id": image_id, "caption": caption} for image_id, caption in rows]
    records = str(write(tmp_path / "records.jsonl", rows))
    (tmp_path / "p.json").write_text(json.dumps([{"image_id": 9, "caption": "x"}, {"image_id": "7", "caption": "y"}]))
    arguments = ["--predictions", str(tmp_path / "p.json"), records, "--task", "captions"]
    scores = scored(tmp_path, *arguments, "--submit", str(tmp_path / "official.json"))
    assert [result["captions"] for result in scores["results"]] == [["a", "c", "d"], ["b"]]
    official = json.loads((tmp_path / "official.json").read_text())
    assert official == [{"image_id": 7, "caption": "y"}, {"image_id": 9, "caption": "x"}]
    assert len(scored(tmp_path, *arguments, "--limit", "1")["results"]) == 1
