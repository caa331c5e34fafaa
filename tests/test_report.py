"""stages/report.py: one file that shows runs as they are, whole or half written, new or old, and mistakes in one line."""

import importlib.util
import json
import logging
import re
import socket
import sqlite3
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from test_stages import REPO, refused, stage_main
from tiny import run_stage

from qformer.log import WarningFile
from qformer.report.curves import MOST_POINTS, Series, chart
from qformer.report.page import Card, Page, gallery, table
from qformer.report.run import Run, differences, read_run, read_runs
from qformer.report.sections import add_runs

STAGE1 = [
    {"step": 10, "itc": 4.0, "itc_chance": 4.16, "itc_accuracy": 0.02, "itc_negatives": 63, "samples_per_s": 10.0},
    {"step": 20, "itc": 3.0, "itc_chance": 4.16, "itc_accuracy": 0.3, "itc_negatives": 63, "samples_per_s": 12.0},
    {"step": 20, "validation_itc": 3.2, "validation_image_to_text_recall_1": 31.2},
]


def leave(folder: Path, lines: list[dict], config: str = "", end: str = "") -> Path:
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + end)
    if config:
        (folder / "config.yaml").write_text(config)
    return folder


def page_of(*arguments: object) -> str:
    """The page that the stage writes; checked to need nothing outside itself and to close what it opens."""
    out = Path(str(arguments[0])) / "page.html"
    stage_main("report")([*map(str, arguments), "--out", str(out)])
    page = out.read_text()
    assert "<script" not in page
    assert not re.findall(r"(?:src|href|url\()=?[\"']?(?!data:)https?:", page)
    assert "http" not in re.sub(r"<pre>.*?</pre>", "", page, flags=re.S)
    Balanced().feed(page)
    return page


class Balanced(HTMLParser):
    """Fails where a tag closes another than the last one opened."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: object) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.fixture(scope="module")
def speaking(tiny, tmp_path_factory) -> Path:
    """A run of stage 2, that meets a broken record in training."""
    run_dir = tmp_path_factory.mktemp("report") / "s2"
    lines = Path(tiny.records).read_text().splitlines()
    broken = Path(tiny.records).with_name("broken.jsonl")
    broken.write_text("\n".join([*lines, json.dumps({"image": "none.png", "caption": "a red square"})]) + "\n")
    validated = ["train.validate_every_steps=2", "train.log_every_steps=1", "data.max_dropped_fraction=1"]
    run_stage(
        2, tiny.stage2(run_dir, "train.max_steps=4", f"data.train=[{broken}]", "train.global_batch_size=24", *validated)
    )
    return run_dir


def test_texts_stand_over_time_beside_the_image_they_are_of(speaking, tiny):
    lines = [json.loads(line) for line in (speaking / "metrics.jsonl").read_text().splitlines()]
    samples = [line["captions"] for line in lines if "captions" in line]
    assert len(samples) == 2
    assert [s["image_id"] for s in samples[0]] == [s["image_id"] for s in samples[1]]
    page = page_of(speaking)
    assert page.count("data:image/jpeg;base64,") == len({s["image_id"] for s in samples[0]}) == 4
    assert page.count("step 2: </span>") == page.count("step 4: </span>") == 4
    assert samples[0][0]["caption"] in page
    assert ">4 of 4<" in page


def kept_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "warnings.jsonl").read_text().splitlines()]


def test_a_run_keeps_its_warnings(speaking):
    kept = kept_of(speaking)
    assert [(line["level"], line["message"]) for line in kept][:1] == [("INFO", "started")]
    broken = [line for line in kept if line["message"].startswith("broken record")]
    assert broken
    assert "none.png" in broken[0]["message"]
    assert "none.png" in page_of(speaking)


def test_a_resumed_run_goes_on_with_its_warnings_and_a_fresh_one_begins_anew(tmp_path):
    logger = logging.getLogger("qformer.training")
    for resumes, step in ((False, 3), (True, 7)):
        with WarningFile(tmp_path, is_main=True, resumes=resumes) as warnings:
            warnings.step = lambda step=step: step
            logger.warning("slow at %d", step)
            logger.info("all is well")
    assert [(line["step"], line["message"]) for line in kept_of(tmp_path)] == [
        (None, "started"), (3, "slow at 3"), (None, "resumed"), (7, "slow at 7"),
    ]  # fmt: skip
    logger.warning("after its end")
    with WarningFile(tmp_path, is_main=False, resumes=False):
        logger.warning("of another rank")
    assert len(kept_of(tmp_path)) == 4
    with pytest.raises(KeyError), WarningFile(tmp_path, is_main=True, resumes=False):
        raise KeyError("x")
    assert [line["level"] for line in kept_of(tmp_path)] == ["INFO", "ERROR"]
    assert (tmp_path / "warnings.1.jsonl").is_file()


def test_the_error_that_ends_a_run_is_kept(tiny, tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_stage(1, tiny.stage1(tmp_path / "s1", "train.max_steps=3", "optim.lr=1e30", "optim.warmup_steps=0"))
    capsys.readouterr()
    kept = kept_of(tmp_path / "s1")
    assert kept[-1]["level"] == "ERROR"
    assert "not finite" in kept[-1]["message"]


def test_two_runs_stand_over_each_other_with_what_differs(tmp_path):
    a = leave(tmp_path / "a" / "s1", STAGE1, "stage: stage1\nrun: {dir: a}\noptim: {lr: 0.001, clip_norm: 1.0}\n")
    b = leave(tmp_path / "b" / "s1", STAGE1, "stage: stage1\nrun: {dir: b}\noptim: {lr: 0.002, clip_norm: 1.0}\n")
    page = page_of(a, b)
    assert "a/s1" in page
    assert "b/s1, held-out" in page
    assert page.count('aria-label="image-text contrast (itc), nats, over steps"') == 1
    (losses,) = re.findall(r"<h2>Losses</h2>.*?<h2>", page, re.S)
    assert losses.count("<polyline") == 2
    assert losses.count('class="chance"') == 1  # of both
    assert differences(read_runs([a, b])) == {"optim.lr": ["0.001", "0.002"]}
    assert "Where the configs differ" in page
    assert "chance 0.0156" in page  # of 64 texts


def test_runs_of_two_stages_compare_only_what_both_have(tmp_path):
    a = leave(tmp_path / "a", STAGE1, "stage: stage1\noptim: {lr: 0.001}\nstage1: {itc: 1.0}\n")
    b = leave(tmp_path / "b", [{"step": 5, "lm": 2.0}], "stage: stage2\noptim: {lr: 0.001}\nllm: {id: x}\n")
    assert differences(read_runs([a, b])) == {"stage": ["stage1", "stage2"]}
    assert "only keys that all of them have" in page_of(a, b)


def test_values_that_are_not_finite_are_gaps_that_are_counted(tmp_path):
    lines = [{"step": i, "itc": v, "itm": "nan"} for i, v in enumerate([4.0, 3.9, "nan", "inf", 3.0, 2.9], start=1)]
    page = page_of(leave(tmp_path / "run", lines))
    assert page.count("<svg") == 1
    assert page.count("<polyline") == 2
    assert "(2 not finite)" in page
    assert "nan" not in "".join(re.findall("<svg.*?</svg>", page, re.S))
    assert "<td>nan</td>" in page  # the last value of itm


def test_a_line_that_is_being_written_is_left_out_and_a_broken_one_named(tmp_path, capsys):
    run = leave(tmp_path / "run", STAGE1, end='{"step": 30, "itc": 2.')
    assert read_run(run).step == 20
    assert ">last line<" in page_of(run)
    bad = leave(tmp_path / "bad", [], end='{"step": 1}\n{"st\n{"step": 3}\n')
    assert f"{bad / 'metrics.jsonl'}, line 2: expected a JSON object with 'step'" in refused(
        "report", [str(bad)], capsys
    )


def test_a_run_that_went_on_from_another_is_joined_with_it(tmp_path):
    first = leave(tmp_path / "first", [{"step": s, "itc": 5.0 - s} for s in (1, 2, 3)])
    second = leave(
        tmp_path / "second", [{"step": s, "itc": 5.0 - s} for s in (3, 4)],
        f"train: {{resume: {first}/checkpoints/step-2, max_steps: 9}}\n",
    )  # fmt: skip
    assert read_run(second).points("itc") == [(1, 4.0), (2, 3.0), (3, 2.0), (4, 1.0)]
    again = leave(tmp_path / "again", [{"step": s, "itc": 1.0} for s in (1, 2, 3, 2, 3)])  # resumed, lines left
    assert [step for step, _ in read_run(again).points("itc")] == [1, 2, 3]


def test_a_run_of_an_older_version_is_shown_with_what_it_has(tmp_path):
    old = leave(
        tmp_path / "old", [{"step": 1, "lm": 2.0}, {"step": 1, "captions": [{"generated": "a", "caption": "b"}]}]
    )
    page = page_of(old)
    assert "kept no image_id" in page
    assert "of a version that kept no warnings" in page


def test_captions_and_names_cannot_break_out(tmp_path):
    evil = "<script>alert(1)</script>"
    lines = [{"step": 1, "lm": 2.0, evil: 1.0}, {"step": 1, "captions": [{"generated": evil, "caption": f'"{evil}'}]}]
    run = leave(tmp_path / "run & co", lines, 'run: {dir: "<img src=x>"}\n')
    (run / "warnings.jsonl").write_text(json.dumps({"time": "", "step": 1, "level": "WARNING", "message": evil}) + "\n")
    page = page_of(run)
    assert page.count("&lt;script&gt;") >= 4
    assert "<img src=x" not in page
    assert "run &amp; co" in page
    made = Page("a", "b")
    made.add(
        "c", gallery([Card('x" onerror="y', [evil], kind='" onload="z', alt='"')]), table([evil], [[evil, None]]), evil
    )
    made.write(tmp_path / "made.html")
    assert evil not in (tmp_path / "made.html").read_text()
    assert '" onerror' not in (tmp_path / "made.html").read_text()


def test_what_is_no_run_is_one_line_that_names_the_folder(tmp_path, capsys):
    run = leave(tmp_path / "demo" / "stage1", STAGE1)
    (run / "adapter").mkdir()
    empty = leave(tmp_path / "empty", [])
    for arguments, message in (
        ([tmp_path / "demo" / "stage2"], f"there is no such folder; nearest is {run}"),
        ([tmp_path / "demo"], f"is no run folder: it has no metrics.jsonl; runs are {run}"),
        ([run / "adapter"], f"it has no metrics.jsonl; the run is {run}"),
        ([empty], f"{empty}: metrics.jsonl is empty"),
        ([run, run], f"{run} stands twice"),
        ([run, "--out", tmp_path], f"--out {tmp_path} is a folder"),
    ):
        told = refused("report", [str(a) for a in arguments], capsys)
        assert message in told
        assert told.count("\n") == 1


def test_a_long_run_is_thinned_and_a_short_one_is_a_dot():
    long = chart("x", "", [Series("a", [(i, float(i)) for i in range(10 * MOST_POINTS)])])
    (points,) = re.findall(r'points="([^"]*)"', long)
    assert len(points.split()) == MOST_POINTS
    assert "<circle" in chart("x", "", [Series("a", [(1, 0.0)])])
    assert chart("x", "", [Series("a", [(1, float("nan"))])]) == ""
    same = chart("x", "", [Series("a", [(1, 2.0), (2, 2.0)])], chance=[2.0])
    assert "nan" not in same


def test_every_key_of_a_run_is_shown_somewhere(speaking):
    run = read_run(speaking)
    page = Page("all")
    add_runs(page, [run, Run("b", run.lines)])
    hidden = {"itc_negatives"}
    page.write(speaking / "all.html")
    text = (speaking / "all.html").read_text()
    assert {"lm", "validation_lm", "samples_per_s", "memory_bytes", "lr"} <= set(run.metrics())
    assert text.count("<svg") >= len({k.removeprefix("validation_") for k in run.metrics()} - hidden)


@pytest.mark.parametrize("tracker", ["tensorboard", "trackio"])
def test_a_tracker_gets_the_metrics_and_asks_no_network(tracker, tiny, tmp_path, monkeypatch):
    if importlib.util.find_spec(tracker) is None:
        pytest.skip(f"pip install 'qformer[{tracker}]'")
    asked: list[object] = []
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    monkeypatch.setattr(socket, "getaddrinfo", lambda *address, **more: asked.append(address))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    run_stage(1, tiny.stage1(tmp_path / "run", "train.max_steps=2", f"run.trackers=[{tracker}]", "data.validation=[]"))
    assert not asked
    if tracker == "trackio":
        with sqlite3.connect(tmp_path / "trackio" / "run.db") as database:
            assert [step for (step,) in database.execute("select step from metrics order by step")] == [1, 2]
    else:
        assert list((tmp_path / "run").rglob("events.out.tfevents.*"))


def test_help_needs_no_torch():
    code = f"import runpy, sys; sys.argv = ['report.py', '--help']\ntry: runpy.run_path({str(REPO / 'stages/report.py')!r}, run_name='__main__')\nfinally: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=REPO)
    assert done.returncode == 0, done.stderr
    assert "RUN" in done.stdout
