"""Answering by rank: the loss of every candidate, equal to its loss alone, and what evaluate.py makes of it."""

import json
import os
from pathlib import Path

import pytest
import torch
from test_asking import chatting
from test_evaluation import error_of, evaluate, scored, write
from test_language import build
from test_stages import stage_main
from tiny import run_stage, shake
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from qformer.build import build_stage2
from qformer.config import ConfigError, Stage2Config, load_config
from qformer.config.protocol import read_protocol
from qformer.inference import VisionLanguageModel, load
from qformer.language import PromptTooLong
from tests import test_language_sweep as sweep

CANDIDATES = ["a red circle", "blue", "two green square left of a circle", "red", "left of"]
PROMPTS = ["question : what is the red circle left of answer :", "red", ""]


def alone(llm, visual_prompt, prompt):
    losses = [llm.loss(visual_prompt, [prompt], [c], max_target_tokens=99) for c in CANDIDATES]
    return torch.stack([loss.total for loss in losses]), [int(loss.tokens) for loss in losses]


@torch.no_grad()
def assert_as_alone(llm, prompts=PROMPTS, batch_size=2):
    noise = torch.randn(1, 4, llm.width, generator=torch.Generator().manual_seed(1))
    for visual_prompt in (noise, None):
        for prompt in prompts:
            if not prompt and visual_prompt is None:
                continue
            total, tokens = alone(llm, visual_prompt, prompt)
            together = llm.candidate_losses(visual_prompt, prompt, CANDIDATES, batch_size=batch_size)
            torch.testing.assert_close(together.total, total, atol=1e-3, rtol=0)
            assert together.tokens.tolist() == tokens


@pytest.mark.parametrize("family", ["opt", "t5", "llama", "gemma3"])
def test_candidates_together_have_the_loss_that_each_has_alone(family):
    llm = build(family)
    assert_as_alone(llm)
    assert llm._remembers, "the prompt is read once"
    many = llm.candidate_losses(None, "red", CANDIDATES * 3, batch_size=64).total
    torch.testing.assert_close(many.reshape(3, -1), many[None, :5].expand(3, -1), atol=1e-4, rtol=0)


def test_in_a_chat_too():
    assert_as_alone(chatting(), ["what is red", ["what", "red", "is"]])


@pytest.mark.parametrize(
    ("kind", "auto"),
    [("jamba", AutoModelForCausalLM), ("mamba", AutoModelForCausalLM), ("switch_transformers", AutoModelForSeq2SeqLM)],
)
def test_models_whose_memory_cannot_be_repeated_read_every_row_whole(kind, auto):
    llm = sweep.build(kind, auto)
    assert_as_alone(llm, [sweep.LONG])
    assert not llm._remembers


def test_the_prompt_is_read_once_for_all_candidates(monkeypatch):
    llm, positions = build("opt"), []
    llm._try_memory()
    forward = llm.model.forward

    def count(*args, **inputs):
        positions.append(inputs["inputs_embeds"].shape[0] * inputs["inputs_embeds"].shape[1])
        return forward(*args, **inputs)

    monkeypatch.setattr(llm.model, "forward", count)
    llm.candidate_losses(torch.zeros(1, 32, llm.width), PROMPTS[0], ["red"] * 100, batch_size=50)
    read_whole = 100 * (32 + 1 + 10 + 1)
    assert sum(positions) < read_whole / 10
    assert max(positions) <= 50 * 2


def test_too_long_a_candidate_is_named_and_nothing_is_cut():
    with pytest.raises(PromptTooLong, match="prompt and target take"):
        build("opt").candidate_losses(None, "red", ["a " * 3000])
    with pytest.raises(ValueError, match="candidates='red' is one text"):
        build("opt").candidate_losses(None, "red", "red")


# ---- with images ----


@pytest.fixture(scope="module")
def model(tiny) -> VisionLanguageModel:
    config = load_config(Stage2Config, tiny.stage2(tiny.folder, "stage2.instructed=true"))
    stage = build_stage2(config)
    shake(stage.adapter, by=0.2)
    return VisionLanguageModel(stage.eval(), config)


def test_lists_for_all_or_for_each_question_and_several_images(model, tiny):
    first, second = sorted(str(p) for p in tiny.records.parent.glob("*.png"))[:2]
    questions = ["what colour ?", "where is it ?"]
    together = model.rank([first, second], questions, ["red", "blue"])
    one_by_one = [model.rank(image, q, ["red", "blue"])[0] for image, q in zip([first, second], questions, strict=True)]
    for ours, theirs in zip(together, one_by_one, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    lists = model.rank([first, second], questions, [["red", "blue"], ["on the left", "right", "left"]])
    assert [len(losses) for losses in lists] == [2, 3]
    torch.testing.assert_close(lists[0], together[0], atol=1e-4, rtol=0)
    prompt = model.ask(questions[0])
    visual_prompt = model.model.visual_prompt(model.encode([first]), [prompt])
    total = model.model.llm.loss(visual_prompt, [prompt], ["red"]).total
    assert together[0][0].item() == pytest.approx(total.item(), abs=1e-4)
    per_token = model.rank([first], questions[1:], ["on the left", "left"], per_token=True)[0]
    summed = model.rank([first], questions[1:], ["on the left", "left"])[0]
    torch.testing.assert_close(per_token, summed / torch.tensor([4.0, 2.0]))
    both = model.rank([[first, second], [first]], questions, ["red", "blue"])
    torch.testing.assert_close(
        both[0], model.rank([[first, second]], questions[:1], ["red", "blue"])[0], atol=1e-4, rtol=0
    )
    assert model.rank(None, [], ["red"]) == []
    assert len(model.rank(None, questions, ["red", "blue"], "a dog .")) == 2


def test_pmi_is_the_loss_minus_that_of_the_question_alone(model, tiny, monkeypatch):
    picture = str(tiny.records.parent / "00.png")
    questions, lists = (
        ["what colour ?", "where ?", "what colour ?"],
        [["red", "blue"], ["left", "right"], ["red", "blue"]],
    )
    seen = model.rank([picture], questions, lists)
    alone = model.rank(None, questions, lists)
    told = model.rank(None, questions, lists, "a red dog .")
    asked = []
    candidate_losses = model.model.llm.candidate_losses
    monkeypatch.setattr(
        model.model.llm, "candidate_losses", lambda row, *a, **k: asked.append(row) or candidate_losses(row, *a, **k)
    )
    for ours, loss, prior in zip(model.rank([picture], questions, lists, pmi=True), seen, alone, strict=True):
        torch.testing.assert_close(ours, loss - prior, atol=1e-4, rtol=0)
    assert sum(row is None for row in asked) == 2, "a question that comes twice is asked alone once"
    for ours, loss, prior in zip(model.rank(None, questions, lists, "a red dog .", pmi=True), told, alone, strict=True):
        torch.testing.assert_close(ours, loss - prior, atol=1e-4, rtol=0)
    per_token = model.rank([picture], ["where ?"], ["on the left", "left"], pmi=True, per_token=True)[0]
    both = model.rank([picture], ["where ?"], ["on the left", "left"], pmi=True)[0]
    torch.testing.assert_close(per_token, both / torch.tensor([4.0, 2.0]), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match="neither images nor a context"):
        model.rank(None, questions, lists, pmi=True)


@pytest.mark.parametrize("candidates", [[], [[], ["red"]], [["red"]], [["red"], "blue"]])
def test_lists_that_do_not_fit_are_refused(model, candidates):
    with pytest.raises(ValueError, match="for 2 questions; give one list of texts for all, or one for each question"):
        model.rank(None, ["what ?", "where ?"], candidates)


# ---- evaluate.py ----


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory) -> str:
    run_dir = tmp_path_factory.mktemp("ranked")
    run_stage(2, tiny.stage2(run_dir, "train.max_steps=1", "data.validation=[]"))
    return str(run_dir / "adapter")


def records(tiny, folder: Path, *, choices: bool) -> str:
    rows = [json.loads(line) for line in Path(tiny.records).read_text().splitlines()][:6]
    for i, row in enumerate(rows):
        row["image"] = os.path.join(os.path.dirname(tiny.records), row["image"])
        row |= {"question_id": i}
        row |= {"choices": [*row["answers"], "two", "square"]} if choices else {}
    return str(write(folder / "records.jsonl", rows))


def test_evaluate_takes_the_likeliest_of_a_list_a_file_or_each_records_choices(tiny, adapter, tmp_path):
    questions = records(tiny, tmp_path, choices=True)
    (tmp_path / "answers.txt").write_text("red\nblue\n\nred\n")
    (tmp_path / "vqa.yaml").write_text('# x\ntask: vqa\nchoose_from: ["red", "blue"]\n')
    run = [adapter, questions, "--device", "cpu", "--workers", "0"]
    listed = scored(tmp_path, *run, "--task", str(tmp_path / "vqa.yaml"))
    assert {row["answer"] for row in listed["results"]} <= {"red", "blue"}
    from_file = scored(tmp_path, *run, "--choose-from", str(tmp_path / "answers.txt"), "--batch-size", "4")
    assert [row["answer"] for row in from_file["results"]] == [row["answer"] for row in listed["results"]]
    chosen = scored(tmp_path, *run, "--task", "scienceqa", "--split", "train")
    assert chosen["rule"] == "choice"
    own = [json.loads(line)["choices"] for line in Path(questions).read_text().splitlines()]
    assert all(row["answer"] in several for row, several in zip(chosen["results"], own, strict=True))
    text_only = scored(tmp_path, *run, "--choose-from", "choices", "--mode", "text-only")
    assert len({row["answer"] for row in text_only["results"] if row["answer"] in ("two", "square")}) <= 2
    by_image = scored(tmp_path, *run, "--choose-from", str(tmp_path / "answers.txt"), "--choose-by", "pmi")
    model, rows = load(adapter, device="cpu"), by_image["results"]
    losses = model.rank([r["image"] for r in rows], [r["question"] for r in rows], ["red", "blue"], pmi=True)
    assert [row["answer"] for row in rows] == [["red", "blue"][int(loss.argmin())] for loss in losses]
    assert by_image["protocol"]["choose_by"] == "pmi"


def test_mistakes_in_what_to_choose_from_are_named_before_a_model_is_loaded(tiny, adapter, tmp_path, capsys):
    questions = records(tiny, tmp_path, choices=False)
    assert "its record has no field 'choices'" in error_of([adapter, questions, "--choose-from", "choices"], capsys)
    assert "'nobody.txt' is no file of answers" in error_of([adapter, questions, "--choose-from", "nobody.txt"], capsys)
    (tmp_path / "empty.txt").write_text("\n")
    assert "holds no answers" in error_of([adapter, questions, "--choose-from", str(tmp_path / "empty.txt")], capsys)
    listed = [adapter, questions, "--choose-from", "nobody.txt", "--choose-by"]
    assert "an answer is written; name those" in error_of([adapter, questions, "--choose-by", "pmi"], capsys)
    assert "the question alone makes" in error_of([*listed, "pmi", "--mode", "text-only"], capsys)
    assert "choose_by" in error_of([*listed, "pmy"], capsys)
    for text, told in (("[yes, no]", "YAML reads yes and no as true and false"), ("5", "5 in .* is no list")):
        (tmp_path / "bad.yaml").write_text(f"# x\ntask: vqa\nchoose_from: {text}\n")
        with pytest.raises(ConfigError, match=told):
            read_protocol(str(tmp_path / "bad.yaml"), ("vqa",))
    (tmp_path / "caption.yaml").write_text("# x\ntask: caption\nchoose_from: choices\n")
    with pytest.raises(SystemExit):
        evaluate([adapter, questions, "--task", str(tmp_path / "caption.yaml")])
    assert "choose_from: task caption does not read it" in capsys.readouterr().err


def test_ask_takes_the_likeliest_of_the_answers_named(tiny, adapter, capsys):
    picture = str(tiny.records.parent / "00.png")
    stage_main("ask")([adapter, picture, "what colour ?", "where ?", "--choose-from", "red", "blue", "--device", "cpu"])
    model = load(adapter, device="cpu")
    losses = model.rank(picture, ["what colour ?", "where ?"], ["red", "blue"])
    assert capsys.readouterr().out.split() == [["red", "blue"][int(loss.argmin())] for loss in losses]
    stage_main("ask")(
        [adapter, picture, "what ?", "--choose-from", "red", "blue", "--choose-by", "pmi", "--device", "cpu"]
    )
    losses = model.rank(picture, ["what ?"], ["red", "blue"], pmi=True)
    assert capsys.readouterr().out.split() == [["red", "blue"][int(losses[0].argmin())]]
    with pytest.raises(SystemExit):
        stage_main("ask")([adapter, picture, "--choose-from", "red", "blue"])
    assert "--choose-from: a conversation has no list of answers" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        stage_main("ask")([adapter, picture, "what ?", "--choose-by", "pmi"])
    assert "--choose-by pmi: an answer is written" in capsys.readouterr().err
