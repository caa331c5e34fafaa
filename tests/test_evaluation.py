"""evaluate.py and its room: rules beside numbers, ranks, going on after a stop, files of servers, a second task."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_stages import refused, stage_main
from tiny import TWO_RANKS, run_stage

from qformer import evaluation
from qformer.data import read_records
from qformer.evaluation import TASKS, Scores, Task, vqa
from qformer.evaluation.command import fingerprint

REPO = Path(__file__).resolve().parent.parent
evaluate = stage_main("evaluate")


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> str:
    run_dir = tmp_path_factory.mktemp("evaluated")
    run_stage(2, tiny.stage2(run_dir, "train.max_steps=1", "data.validation=[]"))
    return str(run_dir / "adapter")


@pytest.fixture(scope="module")
def questions(tiny, tmp_path_factory) -> str:
    """22 questions, answers, ids that are numbers, kinds."""
    rows = [json.loads(line) for line in Path(tiny.records).read_text().splitlines()][:22]
    folder = tmp_path_factory.mktemp("questions")
    for i, row in enumerate(rows):
        row["image"] = os.path.join(os.path.dirname(tiny.records), row["image"])
        row |= {"question_id": 100 + i, "question_type": ("even", "odd")[i % 2], "answers": row["answers"] * 10}
    return str(write(folder / "questions.jsonl", rows))


def write(path: Path, rows: list[dict]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def textual(folder: Path, *rows: dict) -> str:
    """Records whose images are never read."""
    rows = [{"image": f"{i}.png", "question": "q ?", "question_id": i, **row} for i, row in enumerate(rows)]
    return str(write(folder / "records.jsonl", rows))


def predicted(folder: Path, *answers: str, ids=None) -> str:
    rows = [{"question_id": i, "answer": a} for i, a in zip(ids or range(len(answers)), answers, strict=True)]
    (folder / "predictions.json").write_text(json.dumps(rows))
    return str(folder / "predictions.json")


def error_of(arguments: list[str], capsys) -> str:
    """The last line on standard error; before it stands nothing but the progress of `datasets`."""
    *before, error = refused("evaluate", arguments, capsys).splitlines()
    assert error.startswith("error: ")
    assert not "".join(before).replace("\r", "").strip() or "examples/s" in before[-1]
    return error


def scored(folder: Path, *arguments: str) -> dict:
    evaluate([*arguments, "--json", str(folder / "scores.json")])
    return json.loads((folder / "scores.json").read_text())


def test_the_rule_stands_beside_the_number_and_changes_it(tmp_path, capsys):
    same, differing = ["Yes."] * 10, ["no"] * 9 + ["No!"]
    records = textual(tmp_path, {"answers": same}, {"answers": ["yes"] * 10}, {"answers": differing})
    arguments = ["--predictions", predicted(tmp_path, "Yes.", "Yes", "No"), records]
    overall = {}
    for rule in ("official-2021", "official-2017", "always"):
        scores = scored(tmp_path, *arguments, "--rule", rule)
        printed = capsys.readouterr()
        assert (scores["task"], scores["rule"], scores["n"]) == ("vqa", rule, 3)
        assert f"{scores['scores']['overall']:5.1f}  (3 questions, VQA accuracy in percent, rule {rule}," in printed.out
        assert "the rule matters here" in printed.err
        overall[rule] = scores["scores"]["overall"]
        assert set(scores["other_rules"]) == {"official-2021", "official-2017", "always"} - {rule}
    assert overall == pytest.approx({"official-2021": 200 / 3, "official-2017": 200 / 3, "always": 100})
    assert scored(tmp_path, *arguments)["rule"] == "official-2021"


def test_the_rule_of_2017_normalises_every_prediction_and_punctuation_of_differing_answers(tmp_path):
    records = textual(
        tmp_path, {"answers": ["yes"] * 10}, {"answers": ["The dog"] * 10}, {"answers": ["2!", *["2"] * 9]}
    )
    arguments = ["--predictions", predicted(tmp_path, "Yes", "The dog", "two"), records, "--rule", "official-2017"]
    assert [r["answer"] for r in scored(tmp_path, *arguments)["results"]] == ["Yes", "The dog", "two"]
    # right: "yes" is "yes"; wrong: "dog" is not "The dog"; right: "2" is "2", punctuation gone
    assert scored(tmp_path, *arguments)["scores"]["overall"] == pytest.approx(200 / 3)


def test_a_single_reference_is_always_normalised(tmp_path):
    records = textual(tmp_path, *[{"answers": ["yes"]}] * 4)
    for rule in ("official-2021", "official-2017", "always"):
        arguments = ["--predictions", predicted(tmp_path, "Yes", "Yes.", "yes", "No"), records, "--rule", rule]
        assert scored(tmp_path, *arguments)["scores"]["overall"] == 75


def test_empty_answers_of_people_count(tmp_path):
    records = textual(tmp_path, {"answers": [""] * 8 + ["yes"] * 2})
    arguments = ["--predictions", predicted(tmp_path, "yes"), records]
    assert scored(tmp_path, *arguments)["scores"]["overall"] == pytest.approx(60)


def test_empty_answers_of_a_model_are_warned_of(tmp_path, capsys):
    records = textual(tmp_path, {"answers": ["a"]}, {"answers": ["b"]}, {"answers": ["c"]})
    evaluate(["--predictions", predicted(tmp_path, "a", "", ""), records])
    assert "warning: 2 of 3 answers are empty; if a model ended them at once, give" in capsys.readouterr().err


def test_a_question_id_that_stands_twice_is_warned_of(tmp_path, capsys):
    records = textual(tmp_path, {"question_id": 7, "answers": ["a"]}, {"question_id": 7, "answers": ["b"]})
    evaluate(["--predictions", predicted(tmp_path, "a", ids=[7]), records])
    printed = capsys.readouterr()
    assert "50.0" in printed.out
    assert "question_id 7 stands 2 times among the records" in printed.err


def test_predictions_are_scored_without_torch_and_help_without_a_wait(tmp_path):
    records = textual(tmp_path, {"answers": ["a"]}, {"answers": ["b"]})
    arguments = ["--predictions", predicted(tmp_path, "a", "c"), records]
    code = f"import evaluate, sys; evaluate.main({arguments}); print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{REPO / 'stages'}:{REPO}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert "50.0" in done.stdout
    code = "import evaluate, sys; print([m for m in ('torch', 'datasets', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 9], "question_id 9 is of none of the records"),
        ([0, 8, 9], "question_id 1 is missing, which the records have"),
        ([0, 1, 1], "question_id 1 stands 2 times"),
    ],
)
def test_predictions_of_other_questions_are_named(tmp_path, capsys, ids, message):
    records = textual(tmp_path, {"answers": ["a"]}, {"answers": ["b"]})
    assert message in error_of(["--predictions", predicted(tmp_path, *"abc", ids=ids), records], capsys)


def test_mistakes_are_one_line_and_cost_no_loading(tmp_path, capsys):
    records = textual(tmp_path, {"answers": ["a"]})
    for arguments, message in (
        (["nowhere", records, "--mode", "oracle-caption"], "0.png: it has no caption"),
        (["--predictions", str(tmp_path / "none.json"), records], f"there is no file {tmp_path / 'none.json'}"),
        (["--predictions", records, records], "entry 0 (from 0) has no question_id or no answer"),
        (["--predictions", __file__, records], "is no JSON"),
        (["nowhere", str(tmp_path / "none.jsonl")], "there is no record file"),
        ([records], "expected an adapter folder and records"),
        (["nowhere", records], "nowhere"),
    ):
        assert message in error_of(arguments, capsys)
    captions = str(write(tmp_path / "captions.jsonl", [{"image": "0.png", "caption": "a dot"}]))
    assert "it has no question" in refused("evaluate", ["nowhere", captions], capsys)


def test_questions_without_answers_are_answered_for_a_server_and_ids_keep_their_type(
    adapter, questions, tmp_path, capsys
):
    rows = [json.loads(line) for line in Path(questions).read_text().splitlines()][:3]
    for row in rows:
        del row["answers"]
    records = str(write(tmp_path / "test.jsonl", rows))
    assert "--submit FILE" in refused("evaluate", [adapter, records], capsys)
    evaluate([adapter, records, "--submit", str(tmp_path / "official.json"), "--workers", "0"])
    official = json.loads((tmp_path / "official.json").read_text())
    assert [row["question_id"] for row in official] == [100, 101, 102]
    assert all(row.keys() == {"question_id", "answer"} and isinstance(row["answer"], str) for row in official)
    assert "3 of 3 records have no answers" in capsys.readouterr().err


def test_what_json_wrote_is_scored_to_the_same_numbers_by_limit(adapter, questions, tmp_path):
    first = scored(tmp_path, adapter, questions, "--limit", "5", "--batch-size", "2")
    assert (first["n"], first["mode"], len(first["results"])) == (5, "image", 5)
    assert first["n_by_type"] == {"even": 3, "odd": 2}
    (tmp_path / "scores.json").rename(tmp_path / "first.json")
    again = scored(tmp_path, "--predictions", str(tmp_path / "first.json"), questions, "--limit", "5")
    assert {**again, "mode": "image", "predictions": None} == first


def test_each_mode_gives_the_model_what_it_says(adapter, questions, monkeypatch):
    from qformer.inference import VisionLanguageModel

    calls = []

    def answer(self, images, asked, context=None, **generation):
        calls.append((images is not None and len(images), context and context[0], generation))
        return ["x"] * len(asked)

    monkeypatch.setattr(VisionLanguageModel, "answer", answer)
    for mode in ("image", "text-only", "oracle-caption"):
        evaluate([adapter, questions, "--mode", mode, "--limit", "2", "--num-beams", "2", "--workers", "0"])
    caption = json.loads(Path(questions).read_text().splitlines()[0])["caption"][0]
    assert calls == [(2, None, {"num_beams": 2}), (False, None, {"num_beams": 2}), (False, caption, {"num_beams": 2})]


@pytest.mark.parametrize("cut", [0, 9])
def test_a_stopped_evaluation_goes_on_where_it_was(adapter, questions, tmp_path, monkeypatch, cut):
    asked, ask = Counter(), TASKS["vqa"].ask

    def failing(stop_after):
        def ask_or_stop(model, records, *rest, **more):
            if sum(asked.values()) >= stop_after:
                raise KeyboardInterrupt
            asked.update(record.question_id for record in records)
            return ask(model, records, *rest, **more)

        return ask_or_stop

    whole = scored(tmp_path, adapter, questions, "--batch-size", "4", "--workers", "0")
    answers = tmp_path / "answers.jsonl"
    arguments = [adapter, questions, "--batch-size", "4", "--answers", str(answers), "--workers", "0"]
    for stop_after in (8, 14):
        monkeypatch.setitem(TASKS, "vqa", vqa.TASK.__class__(**{**vars(vqa.TASK), "ask": failing(stop_after)}))
        with pytest.raises(KeyboardInterrupt):
            evaluate(arguments)
        assert not answers.exists()
    part = Path(f"{answers}.rank0")
    os.truncate(part, part.stat().st_size - cut)  # killed while it wrote a line
    monkeypatch.setitem(TASKS, "vqa", vqa.TASK.__class__(**{**vars(vqa.TASK), "ask": failing(1000)}))
    assert scored(tmp_path, *arguments) == whole
    assert len(answers.read_text().splitlines()) == 1 + 22
    scored_file = scored(tmp_path, "--predictions", str(answers), questions)
    assert (scored_file["scores"], scored_file["results"]) == (whole["scores"], whole["results"])
    assert not part.exists()
    assert asked == Counter(range(100, 122)) + (Counter({115: 1}) if cut else Counter())
    monkeypatch.setitem(TASKS, "vqa", vqa.TASK)
    monkeypatch.setattr("qformer.evaluation.running.load", None)  # everything is answered: no model is loaded
    assert scored(tmp_path, *arguments) == whole
    assert scored(tmp_path, *arguments, "--limit", "3")["results"] == whole["results"][:3]


def test_answers_to_something_else_are_refused(adapter, questions, tmp_path, capsys):
    answers = str(tmp_path / "answers.jsonl")
    evaluate([adapter, questions, "--mode", "text-only", "--limit", "2", "--answers", answers])
    arguments = [adapter, questions, "--limit", "2", "--answers", answers]
    assert "was begun with mode 'text-only', not 'image'" in refused("evaluate", arguments, capsys)
    other = tmp_path / "other.jsonl"
    other.write_text(Path(questions).read_text())
    arguments = [adapter, str(other), "--limit", "2", "--answers", answers, "--mode", "text-only"]
    assert "was begun with records" in refused("evaluate", arguments, capsys)
    retrained = tmp_path / "adapter"
    retrained.mkdir()
    for path in Path(adapter).iterdir():
        (retrained / path.name).write_bytes(path.read_bytes() + (b" " if path.suffix == ".safetensors" else b""))
    arguments = [str(retrained), questions, "--limit", "2", "--answers", answers, "--mode", "text-only"]
    assert "was begun with adapter" in refused("evaluate", arguments, capsys)
    assert fingerprint(str(tmp_path)).split()[1] == fingerprint(str(retrained)).split()[1]  # a run by its folder too


def test_broken_images_are_left_out_and_counted(adapter, questions, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(questions).read_text().splitlines()][:4]
    rows[1]["image"] = "/none.png"
    records = str(write(tmp_path / "test.jsonl", rows))
    scores = scored(tmp_path, adapter, records, "--submit", str(tmp_path / "official.json"), "--workers", "0")
    assert (scores["n"], scores["dropped"]) == (3, 1)
    assert "1 broken images were left out, the first: /none.png" in capsys.readouterr().err
    assert [row["answer"] == "" for row in json.loads((tmp_path / "official.json").read_text())][1]


def test_two_processes_give_the_numbers_of_one(adapter, questions, tmp_path):
    arguments = [adapter, questions, "--batch-size", "4", "--workers", "1", "--device", "cpu"]
    one = scored(tmp_path, *arguments)
    launch = [*TWO_RANKS, str(REPO / "stages/evaluate.py"), *arguments, "--answers", str(tmp_path / "answers.jsonl")]
    done = subprocess.run([*launch, "--json", str(tmp_path / "two.json")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two.json").read_text()) == one
    assert done.stdout.count("overall") == 1, "the first rank prints"
    assert sorted(path.name for path in tmp_path.glob("answers*")) == ["answers.jsonl"]


def test_one_batch_of_images_is_in_memory_at_a_time(adapter, tmp_path, monkeypatch):
    import weakref

    from qformer.evaluation import running

    pixels = np.random.default_rng(0).integers(0, 255, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    import datasets

    columns = {"image": [{"bytes": content, "path": None}] * 30, "question": ["what ?"] * 30, "answers": [["a"]] * 30}
    datasets.Dataset.from_dict(columns).to_parquet(tmp_path / "a.parquet")
    alive, most, load_input = weakref.WeakSet(), [], running.load_input

    def counted(*arguments):
        images = load_input(*arguments)
        alive.update(images)
        most.append(len(alive))
        return images

    monkeypatch.setattr(running, "load_input", counted)
    evaluate([adapter, str(tmp_path / "a.parquet"), "--batch-size", "4", "--workers", "0"])
    assert len(most) == 30
    assert max(most) <= 8, "the batch that is answered and the one that is read"
    records = read_records([str(tmp_path / "a.parquet")])
    assert records.text(3).image_bytes is None
    assert records[3].image_bytes == content


def test_a_second_task_is_one_object_and_one_line(adapter, questions, tmp_path, monkeypatch, capsys):
    def ask(model, records, images, mode, **generation):
        return model.caption(images, **generation)

    def score(records, outputs, rule):
        mean = sum(len(output.split()) for output in outputs) / len(outputs)
        return Scores({"words": mean}, len(outputs), rule, "words a caption")

    task = Task(
        id_field="image_id", output_field="caption", modes=("image",), rules=("white space",),
        lacks=lambda record, mode: None if record.captions else "it has no caption",
        has_reference=lambda record: bool(record.captions), ask=ask, score=score,
        describe=lambda record: {"captions": list(record.captions)},
    )  # fmt: skip
    monkeypatch.setitem(evaluation.TASKS, "length", task)
    arguments = ["--task", "length", questions, "--limit", "6"]
    first = scored(tmp_path, adapter, *arguments, "--submit", str(tmp_path / "official.json"), "--workers", "0")
    assert (first["task"], first["rule"], first["n"]) == ("length", "white space", 6)
    assert set(first["results"][0]) == {"image_id", "caption", "image", "captions"}
    again = scored(tmp_path, "--predictions", str(tmp_path / "official.json"), *arguments)
    assert again["scores"] == first["scores"]
    assert "words a caption, rule white space" in capsys.readouterr().out
