import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
import threading
import time

import capfilt
import pytest
from experiment import average, markdown_table
from PIL import Image
from recipe import STAGE2_STEPS, Recipe, add_options
from results import write_report
from resumable import LAUNCHER, Experiment, Part, PartFailed, duration

from qformer.config import Stage1Config, Stage2Config, load_config
from qformer.report.answers import choose_examples
from qformer.report.run import Run


def result(image, said, truth, kind="colour", question="what colour is it?"):
    return {"image": str(image), "question": question, "answer": said, "answers": [truth], "question_type": kind}


SCORE = {"overall": 50.0, "by_type": {"colour": 40.0, "shape": 60.0}, "n": 20}
TABLE = {
    "opt": {"text_only": SCORE, "stage1_2": average({0: SCORE | {"overall": 90.0}, 1: SCORE | {"overall": 94.0}})},
    "t5": {"text_only": SCORE},
}


@pytest.fixture
def pictures(tmp_path):
    paths = [tmp_path / f"{name}.png" for name in ("a", "b", "c")]
    for path in paths:
        Image.new("RGB", (4, 4), "red").save(path)
    return paths


def test_report_holds_everything_and_escapes_text(tmp_path, pictures):
    stage1 = [
        {"step": 20, "itc": 4.0, "itc_chance": 4.16, "itm": "nan"},
        {"step": 40, "itc": 2.0, "itc_chance": 4.16, "itm": "nan"},
        {"step": 40, "validation_itc": 2.5, "validation_image_to_text_recall_1": 31.2},
    ]
    examples = [
        result(pictures[0], "red", "red"),
        result(pictures[1], "<script>alert(1)</script>", "red & blue", question="what's <b>here</b>?"),
        result(pictures[2], "", "cross"),
    ]
    results = {"seconds": 3725.0, "cpu": "A <fast> CPU", "cores": 1, "device": "cpu", "table": TABLE}
    runs = [Run("Stage 1", stage1), Run("Stage 2", [{"step": 1, "lm": 0.5}]), Run("empty", [])]
    path = tmp_path / "made" / "report.html"
    write_report(path, title="One & all", results=results, runs=runs, examples=examples)
    page = path.read_text()

    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    assert "<script" not in page
    assert "<b>here</b>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "red &amp; blue" in page
    assert "A &lt;fast&gt; CPU (1 core)" in page
    assert "in 1 h 02 min on" in page
    assert page.count("✗ wrong") == 2
    assert page.count("✓") == 1
    assert page.count("<svg") == 3  # itc, recall, lm; itm was never a number
    assert page.count('class="chance"') == 1
    assert "92.0 (90.0-94.0)" in page
    assert "stage 2 only" not in page  # a row that was not measured is not explained either


def test_the_report_of_capfilt_shows_every_set(tmp_path, capsys):
    seed = capfilt.Seed(Recipe(), tmp_path, seed=0, threshold=0.5)
    for name, place in itertools.product(capfilt.SETS, (1, 2)):
        folder = seed.run_dir(f"{name}_stage{place}")
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(json.dumps({"step": 1, ("itc", "lm")[place - 1]: 2.0}) + "\n")
    scores = {name: {"vqa": [50.0 + i], "recall": [9.0]} for i, name in enumerate(capfilt.SETS)}
    capfilt.report(tmp_path, scores, [{"precision": 90.0, "recall": 80.0}], seed)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 2
    assert all(page.count(f"— {name} 2<") == 2 for name in capfilt.SETS)
    assert "| both_beam | 54.0 | 9.0 | 80 % |" in (tmp_path / "table.md").read_text()
    assert "precision 90.0, recall 80.0" in page
    assert "report: " in capsys.readouterr().out


def test_examples_mix_kinds_and_failures_on_different_pictures():
    kinds = ("colour", "shape", "size")
    results = [result(i // 2, "red" if i % 3 else "no", "red", kinds[i % 3 - 1]) for i in range(60)]
    chosen = choose_examples(results, count=12, failures=3)
    assert len(chosen) == 12
    assert len({r["image"] for r in chosen}) == 12
    assert sum(r["answer"] == "no" for r in chosen) == 3
    assert {r["question_type"] for r in chosen} == set(kinds)
    assert choose_examples(results[:1]) == results[:1]


def test_duration():
    assert [duration(s) for s in (0.4, 59.6, 192, 3792)] == ["0 s", "1 min 0 s", "3 min 12 s", "1 h 03 min"]


def test_average_and_markdown():
    assert TABLE["opt"]["stage1_2"]["spread"] == [90.0, 94.0]
    assert TABLE["opt"]["stage1_2"]["seeds"] == [0, 1]
    text = markdown_table(TABLE)
    assert "| stage 1 + 2 | 92.0 (90.0-94.0) |  |\n" in text
    assert "| OPT (decoder-only) | colour | shape |\n" in text


def test_commands_load_as_configs(tmp_path):
    def overrides(part):
        assert part.command[:3] == [sys.executable, "-m", LAUNCHER]
        assert not part.finished()
        script = next(i for i, word in enumerate(part.command) if word.startswith("stages/"))
        return part.command[script + 1 :]

    short = Recipe(data=tmp_path / "a, b", steps_scale=0.01)
    config = load_config(Stage1Config, overrides(short.stage1(tmp_path / "s1", seed=3)))
    assert config.data.train == [str(tmp_path / "a, b" / "train.jsonl")]
    assert config.data.validation == [str(tmp_path / "a, b" / "validation.jsonl")]
    assert config.train.seed == 3
    assert config.train.resume is None
    assert 1 <= config.train.max_steps <= 10
    assert config.train.validate_every_steps >= 1  # and load_config has checked the rest

    (tmp_path / "s2" / "checkpoints").mkdir(parents=True)
    config = load_config(Stage2Config, overrides(Recipe().stage2(tmp_path / "s2", "t5", tmp_path / "s1")))
    assert config.llm.id == "qformer/shapes/weights/t5"
    assert config.stage2.init_from == str(tmp_path / "s1" / "adapter")
    assert config.train.resume == "auto"
    alone = load_config(Stage2Config, overrides(Recipe().stage2(tmp_path / "s3", "opt", None)))
    assert alone.stage2.init_from is None
    assert config.train.max_steps == STAGE2_STEPS["t5"] > alone.train.max_steps
    scaled = load_config(Stage2Config, overrides(short.stage2(tmp_path / "s4", "t5", None)))
    assert scaled.train.max_steps == STAGE2_STEPS["t5"] // 100

    part = Recipe().evaluation(tmp_path / "s2", "oracle_caption", tmp_path / "answers.json")
    assert part.command[-4:] == ["--mode", "oracle-caption", "--json", str(tmp_path / "answers.json")]
    (tmp_path / "answers.json").write_text('{"cut off')
    assert not part.finished()


def test_options_become_a_recipe(capsys):
    parser = argparse.ArgumentParser()
    add_options(parser, out="runs/x")
    assert Recipe.from_arguments(parser.parse_args([])) == Recipe()
    with pytest.raises(SystemExit):
        parser.parse_args(["--steps-scale", "-1"])
    assert "positive number" in capsys.readouterr().err


def open_experiment(out, recipe=None, resume=True, **options):
    return Experiment(out, recipe or Recipe(), owned=("a",), resume=resume, go_on=["again", "--resume"], **options)


def python(name, code, file=None):
    return Part(name, [sys.executable, "-c", code], lambda: file is not None and file.exists())


def test_a_failing_part_ends_with_its_exit_code(tmp_path, capfd):
    with pytest.raises(SystemExit) as ended, open_experiment(tmp_path) as experiment:
        experiment.run(python("first", "import sys; print('own words', file=sys.stderr); sys.exit(7)"))
    assert ended.value.code == 7
    out, err = capfd.readouterr()
    assert "own words" in err
    assert "first failed (exit code 7)" in out
    assert "again --resume" in out


def test_parts_run_side_by_side_and_are_kept(tmp_path, capfd):
    files = [tmp_path / f"{i}" for i in range(3)]
    chains = [[python(f"part {f.name}", f"print('hi'); open({str(f)!r}, 'w')", f)] for f in files]
    with open_experiment(tmp_path, jobs=2) as experiment:
        experiment.run_side_by_side(chains)
    assert (tmp_path / "logs" / "part_1.log").read_text() == "hi\n"
    with open_experiment(tmp_path, jobs=2) as experiment:
        experiment.run_side_by_side(chains)
    assert capfd.readouterr().out.count("done before, kept") == 3


def test_side_by_side_a_failure_stops_the_others(tmp_path, capfd):
    start = time.monotonic()
    chains = [[python("slow", "import time; time.sleep(60)")], [python("bad", "print('reason'); raise SystemExit(3)")]]
    with pytest.raises(SystemExit) as ended, open_experiment(tmp_path, jobs=2) as experiment:
        experiment.run_side_by_side(chains)
    assert ended.value.code == 3
    assert time.monotonic() - start < 30
    assert "reason" in capfd.readouterr().out


def test_ctrl_c_lets_the_part_save_and_says_how_to_go_on(tmp_path, capfd):
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    code = (
        "import pathlib, signal, time\n"
        f"def save(*_): pathlib.Path({str(saved)!r}).touch(); raise SystemExit(0)\n"
        f"signal.signal(signal.SIGTERM, save); pathlib.Path({str(ready)!r}).touch(); time.sleep(60)"
    )

    def press():
        while not (ready.exists() and experiment._running):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    experiment = open_experiment(tmp_path)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    threading.Thread(target=press).start()
    with pytest.raises(SystemExit) as ended, experiment:
        experiment.run(python("training", code))
    signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert saved.exists()
    told = capfd.readouterr().out
    assert "stopped; go on with: " in told
    assert "again --resume" in told


def test_ctrl_c_while_a_part_is_being_started_stops_that_part(tmp_path, monkeypatch):
    started, popen = [], subprocess.Popen

    def press(*args, **more):
        started.append(popen(*args, **more))
        os.kill(os.getpid(), signal.SIGINT)
        return started[0]

    monkeypatch.setattr(subprocess, "Popen", press)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
    with pytest.raises(SystemExit) as ended, open_experiment(tmp_path) as experiment:
        experiment.run(python("training", "import time; time.sleep(60)"))
    signal.signal(signal.SIGINT, before)
    assert ended.value.code == 130
    assert started[0].returncode == -signal.SIGTERM


def test_a_fresh_start_removes_only_what_it_made(tmp_path, capfd):
    (tmp_path / "a").mkdir()
    (tmp_path / "other").mkdir()
    with pytest.raises(ValueError, match="another --out"):
        open_experiment(tmp_path, resume=False)
    open_experiment(tmp_path)  # begun: now the folder is ours
    with pytest.raises(ValueError, match="questions=700, not 7"):
        open_experiment(tmp_path, Recipe(questions=7))
    open_experiment(tmp_path, Recipe(questions=7), resume=False)
    assert not (tmp_path / "a").exists()
    assert (tmp_path / "other").exists()
    assert "removing" in capfd.readouterr().out
    assert json.loads((tmp_path / "experiment.json").read_text())["recipe"]["questions"] == 7


def test_an_unfinished_part_is_no_success(tmp_path):
    with pytest.raises(PartFailed, match="stopped before its end"):
        open_experiment(tmp_path).run(python("training", "pass"))
