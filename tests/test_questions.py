"""Questions and answers in training: which text is written after which prompt, data sets mixed by size, fine-tuning runs."""

import json
import math
import re
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_bad_input import write_lines
from test_doctor import examine
from test_models import build, run
from test_training import ADAPTER, assert_same_tensors, launch, metrics
from tiny import Tiny, run_stage, write_records

from qformer.build import build_dataset
from qformer.config import ConfigError, Stage1Config, Stage2Config, load_config, to_yaml
from qformer.config.data import ANSWERS, TEXTS
from qformer.data import BrokenRecord, Draw, Record, RecordDataset, Wording, build_order, captions, collate, shares
from qformer.inference import load

REPO = Path(__file__).resolve().parent.parent
QUESTION = Record("a.png", "a", ("A dog.", "One dog!"), "What IS it?", ("dog", "dog", "a  dog\n", "", "cat"), 7)
NEEDED = [
    "run.dir=runs/x", "encoder.loader=open_clip", "encoder.id=ViT-B-32", "train.max_steps=100", "llm.id=x",
    "train.global_batch_size=8", "train.micro_batch_size=4", "optim.warmup_steps=10",
]  # fmt: skip


def drawn(wording: Wording, record: Record = QUESTION, times: int = 2000) -> Counter:
    rng = np.random.default_rng(0)
    return Counter(wording.choose(record, rng) for _ in range(times))


# ---- which text after which prompt ----


def test_an_answer_is_drawn_in_proportion_to_its_votes_and_an_empty_one_never():
    counts = drawn(Wording("vqa"))
    assert set(counts) == {("what is it?", answer) for answer in ("dog", "a dog", "cat")}
    assert counts["what is it?", "dog"] == pytest.approx(1000, abs=80)
    assert counts["what is it?", "cat"] == pytest.approx(500, abs=80)


def test_the_most_frequent_answer_is_always_the_same_and_the_first_of_equals():
    assert set(drawn(Wording("vqa", answer="most_frequent"), times=20)) == {("what is it?", "dog")}
    tied = Record("a.png", "a", (), "q", ("b", "a", "a", "b"))
    assert set(drawn(Wording("vqa", answer="most_frequent"), tied, 20)) == {("q", "b")}
    assert Wording("vqa").choose(QUESTION, None) == ("what is it?", "dog"), "in an evaluation nothing is drawn"


def test_a_template_is_drawn_for_each_record_and_holds_the_question_or_the_answer():
    counts = drawn(Wording("vqa", ("Q: {} A:", "{} Short answer:"), answer="most_frequent"))
    assert set(counts) == {("Q: what is it? A:", "dog"), ("what is it? Short answer:", "dog")}
    assert min(counts.values()) > 900
    asked = drawn(Wording("question", ("Ask for {}.",)), times=200)
    assert set(asked) == {(f"Ask for {answer}.", "what is it?") for answer in ("dog", "a dog", "cat")}
    assert set(drawn(Wording("caption", ("A photo of",)))) == {("A photo of", "a dog"), ("A photo of", "one dog")}
    assert set(drawn(Wording("caption"))) == {(None, "a dog"), (None, "one dog")}
    assert Wording("vqa", cleaning="none").choose(QUESTION, None) == ("What IS it?", "dog")


@pytest.mark.parametrize(
    ("wording", "record", "reason"),
    [
        (Wording("vqa"), Record("a.png", "a", ("x",), "what?"), "no answers"),
        (Wording("vqa"), Record("a.png", "a", (), "what?", ("", " \n")), "no answers, or only empty ones"),
        (Wording("vqa"), Record("a.png", "a", (), None, ("dog",)), "no question"),
        (Wording("question"), Record("a.png", "a", (), '"..."', ("dog",)), "no question, or an empty one"),
        (Wording("caption"), Record("a.png", "a", (), "what?", ("dog",)), "no caption"),
    ],
)
def test_a_record_without_what_is_to_be_written_is_a_broken_one(wording, record, reason):
    with pytest.raises(BrokenRecord, match=reason):
        wording.choose(record, np.random.default_rng(0))


def test_text_and_prompt_are_a_function_of_seed_epoch_and_position_and_captions_as_before(tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    np.save(tmp_path / "a.npy", np.zeros((2, 3), np.float32))
    record = Record(str(tmp_path / "a.npy"), "a", ("a", "b"), "what?", ("dog", "cat"))
    wording = Wording("vqa", ("Q {}", "{} A"))
    dataset = RecordDataset([record], None, seed=3, augment=True, text=[wording])
    samples = [dataset[Draw(0, epoch, 5)] for epoch in range(16)]
    again = [dataset[Draw(0, epoch, 5)] for epoch in range(16)]
    assert [(s.prompt, s.text) for s in samples] == [(s.prompt, s.text) for s in again]
    assert len({(s.prompt, s.text) for s in samples}) == 4
    batch = collate(samples[:2])
    assert batch.prompts == [samples[0].prompt, samples[1].prompt]
    plain = RecordDataset([record], None, seed=3, augment=True, text="caption")
    expected = [record.captions[int(np.random.default_rng([3, 1, epoch, 5]).integers(2))] for epoch in range(16)]
    assert [plain[Draw(0, epoch, 5)].text for epoch in range(16)] == expected
    assert plain[Draw(0, 0, 5)].prompt is None
    with pytest.raises(ValueError, match="text: 2 wordings for 1 sources"):
        RecordDataset([record], None, seed=3, augment=True, text=[wording, wording])


def test_the_config_and_the_data_know_the_same_texts_and_answers():
    assert (TEXTS, ANSWERS) == (captions.TEXTS, captions.ANSWERS)
    with pytest.raises(ValueError, match="answer='rarest': expected one of votes, most_frequent"):
        Wording("vqa", answer="rarest")


# ---- shares ----


def test_sources_are_drawn_by_the_square_root_of_their_sizes_times_their_weights():
    sizes = [400_000, 9000, 17_000]
    assert shares(sizes) == []
    assert shares(sizes, [3, 2, 1]) == [3, 2, 1]
    by_size = shares(sizes, size_exponent=0.5)
    assert by_size == [math.sqrt(n) for n in sizes]
    weights = shares(sizes, [1, 2, 0.5], 0.5)
    assert weights == [by_size[0], 2 * by_size[1], by_size[2] / 2]
    order = build_order(sizes, 0, weights)
    ends = np.cumsum(sizes)
    counts = Counter(int(np.searchsorted(ends, order.draw(i).index, side="right")) for i in range(10_000))
    for source, weight in enumerate(weights):
        assert counts[source] / 10_000 == pytest.approx(weight / sum(weights), abs=2e-4)


def test_each_source_has_its_own_words_and_templates(tiny, caplog):
    both = f"data.sources=[{{records: {tiny.records}, text: vqa, templates: ['Q: {{}} A:']}}, {{records: {tiny.validation}, weight: 2}}]"
    config = load_config(Stage2Config, tiny.stage2(tiny.folder, both, "data.size_exponent=0.5"))
    assert config.data.train == [str(tiny.records), str(tiny.validation)]
    model, _ = build(tiny, "opt")
    dataset = build_dataset(config.data, model.encoder, "train", 0, vqa_prompt=model.vqa_prompt)
    asked, captioned = dataset[Draw(3, 0, 3)], dataset[Draw(30, 0, 30)]
    assert (asked.prompt, asked.text) == ("Q: what colour is the square? A:", asked.answers[0])
    assert (captioned.prompt, captioned.text in captioned.captions) == (None, True)
    validation = build_dataset(config.data, model.encoder, "validation", 0)
    assert validation[Draw(0, 0, 0)].text in validation[Draw(0, 0, 0)].captions
    assert load_config(Stage2Config, tiny.stage2(tiny.folder, both)).data.sources[1].weight == 2.0


# ---- the config ----


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["data.sources=[{records: a.jsonl, txt: vqa}]"], "unknown key data.sources.txt in .*nearest is data.sources.text"),
        (["data.sources=[{records: a.jsonl, weight: x}]"], r"data.sources.weight: \['x'\] in .* is not float"),
        (["data.sources=[{records: a.jsonl, weight: 0}]"], "data.sources.weight: 0.0 must be above 0"),
        (["data.sources=[{records: a.jsonl, text: qva}]"], "data.sources.text: 'qva' is not one of caption, question, vqa"),
        (["data.sources=[{text: vqa}]"], "data.sources: each entry must name its records"),
        (["data.sources=[a.jsonl]"], "data.sources: each entry must name its records"),
        (["data.sources=[{records: a.jsonl}]", "data.train=[b.jsonl]"], "are not the records of data.sources"),
        (["data.sources=[{records: a.jsonl}]", "data.weights=[2]"], "write a weight in each of them"),
        (["data.train=[a.jsonl]", "data.text=vqa", "data.templates=['no place']"], "'no place' must hold {} once"),
        (["data.train=[a.jsonl]", "data.templates=['a {}']"], "'a {}' must hold .* with text=caption none"),
        (["data.train=[a.jsonl]", "data.text=answer"], "data.text: 'answer' is not one of caption, question, vqa"),
        (["data.train=[a.jsonl]", "data.answer=first"], "data.answer: 'first' is not one of votes, most_frequent"),
    ],
)  # fmt: skip
def test_mistakes_in_the_words_of_the_data_are_named(arguments, message):
    with pytest.raises(ConfigError, match=message):
        load_config(Stage2Config, [*NEEDED, *arguments])


def test_stage_1_learns_from_captions_alone():
    needed = [a for a in NEEDED if not a.startswith("llm.")]
    with pytest.raises(ConfigError, match="stage 1 learns from captions alone"):
        load_config(Stage1Config, [*needed, "data.train=[a.jsonl]", "data.text=vqa"])


def test_a_resolved_config_with_sources_is_the_same_again(tmp_path):
    sources = "data.sources=[{records: a.jsonl, text: vqa, templates: 'Q {}'}, {records: b.jsonl}]"
    config = load_config(Stage2Config, [*NEEDED, sources])
    assert config.data.sources[0].templates == ["Q {}"]
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load_config(Stage2Config, [str(tmp_path / "config.yaml")]) == config


# ---- training ----


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_the_loss_covers_the_answer_alone_and_the_prompt_is_that_of_questions(tiny, kind):
    model, samples = build(tiny, kind, "pictures", "data.text=vqa", "stage2.instructed=true")
    batch = collate(samples[:4])
    batch.prompts[:] = [model.vqa_prompt.replace("{}", batch.questions[0])] * 4
    prompts, targets = model.prepare(batch, 1).text
    form = "Question: {} Answer:" if kind == "opt" else "Question: {} Short answer:"
    assert prompts == [form.replace("{}", "what colour is the square?")] * 4
    assert targets == [answers[0] for answers in batch.answers]
    features = model.encoder(batch.images)
    lm = model.llm.loss(model.visual_prompt(features, prompts), prompts, targets)
    assert lm.tokens == 4 * 2, "one word and what ends it"
    assert run(model.eval(), batch).loss.item() == pytest.approx(lm.total.item() / lm.tokens.item(), rel=1e-5)
    shown = model.sample(model.prepare(batch, 1), 2)
    assert [row["caption"] for row in shown] == targets[:2]


VQA = ["data.text=vqa", "stage2.instructed=true", "train.checkpoint_every_steps=2", "train.max_steps=4"]


def test_a_run_on_questions_resumed_is_the_run_and_its_adapter_answers(tiny, tmp_path):
    vqa = [*VQA, "data.templates=['Q {} A','{} what is it']", "train.validate_every_steps=4"]
    run_stage(2, tiny.stage2(tmp_path / "whole", *vqa))
    run_stage(2, [*tiny.stage2(tmp_path / "halves", *vqa), "train.max_steps=2"])
    run_stage(2, tiny.stage2(tmp_path / "halves", *vqa, "train.resume=auto"))
    assert_same_tensors(tmp_path / "whole" / ADAPTER, tmp_path / "halves" / ADAPTER)
    assert metrics(tmp_path / "whole")[-2]["lm"] == metrics(tmp_path / "halves")[-2]["lm"]
    assert "validation_lm" in metrics(tmp_path / "whole")[-1]
    assert f"data: `{tiny.records}` (vqa)" in (tmp_path / "whole/adapter/README.md").read_text()
    captioned = tiny.stage2(tmp_path / "captions", "stage2.instructed=true", "train.max_steps=1")
    run_stage(2, captioned)
    assert metrics(tmp_path / "captions")[0]["lm"] != metrics(tmp_path / "whole")[0]["lm"]


def test_two_ranks_on_questions_are_one(tiny, tmp_path):
    vqa = [*VQA, "qformer.dropout=0", "data.validation=[]", "data.answer=most_frequent", "train.max_steps=2"]
    with launch(tiny.stage2(tmp_path / "two", *vqa, "train.micro_batch_size=4"), stage=2) as two:
        _, told = two.communicate(timeout=300)
        assert two.returncode == 0, told
    run_stage(2, tiny.stage2(tmp_path / "one", *vqa))
    for ours, theirs in zip(metrics(tmp_path / "one"), metrics(tmp_path / "two"), strict=True):
        assert ours["lm"] == pytest.approx(theirs["lm"], rel=1e-5)
        assert ours["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=1e-3)


def test_records_without_answers_are_counted_and_replaced(tiny, tmp_path, capsys):
    lines = [json.loads(line) for line in tiny.records.read_text().splitlines()]
    for number, line in enumerate(lines):
        line["image"] = str(tiny.records.parent / line["image"])
        if number % 6 == 0:
            line["answers"] = []
    records = tmp_path / "records.jsonl"
    records.write_text("".join(json.dumps(line) + "\n" for line in lines))
    run_stage(2, tiny.stage2(tmp_path / "run", f"data.train=[{records}]", *VQA, "train.max_steps=3",
                             "data.max_dropped_fraction=0.5"))  # fmt: skip
    told = "".join(capsys.readouterr().out.split())
    assert "therecordhasnoanswers" in told
    assert metrics(tmp_path / "run")[2]["dropped"] >= 4


def small(tiny: Tiny, name: str, folder: Path, *more: str) -> list[str]:
    """The command line of one of the repository's configs, its sizes and records those of the tiny models."""
    known = [a for a in tiny.stage2(folder, *more) if not a.startswith(("data.train", "stage="))]
    return [str(REPO / "configs" / name), *known, "train.mixed_precision=no", "llm.vqa_prompt=''"]


def test_configs_finetune_vqa_trains_and_answers(tiny, tmp_path):
    more = [f"data.train=[{tiny.records},{tiny.records},{tiny.validation}]", "tune.encoder=full"]
    arguments = [*small(tiny, "finetune_vqa.yaml", tmp_path / "run"), *more, "encoder.image_size=48"]
    config = load_config(Stage2Config, arguments)
    assert (config.data.text, config.data.answer, config.stage2.instructed) == ("vqa", "votes", True)
    run_stage(2, arguments)


def test_configs_instruct_trains_on_all_its_data_sets(tiny, tmp_path, capsys):
    path = tmp_path / "instruct.yaml"
    text = (REPO / "configs/instruct.yaml").read_text()
    assert len(set(re.findall(r"records: ([\w./]+)", text))) == 5
    sizes = iter(range(100))
    path.write_text(
        re.sub(r"records: data/[\w./]+", lambda m: f"records: {[tiny.records, tiny.validation][next(sizes) % 2]}", text)
    )
    arguments = [str(path), *[a for a in small(tiny, "instruct.yaml", tmp_path / "run")[1:] if "vqa_prompt" not in a]]
    config = load_config(Stage2Config, [*arguments, "llm.max_target_tokens=24"])
    texts = [text for text, _ in config.data.wordings()]
    assert texts == ["caption"] * 2 + ["vqa"] * 3 + ["question"] * 3
    assert [len(templates) for _, templates in config.data.wordings()] == [13, 13, 10, 10, 10, 6, 6, 6]
    run_stage(2, [*arguments, "llm.max_target_tokens=24", "train.max_steps=3", "qformer.max_text_positions=40"])
    told = " ".join(capsys.readouterr().out.split())
    assert "drawn by weight, source by source: " in told
    assert len(metrics(tmp_path / "run")) >= 3


def test_the_doctor_looks_at_what_is_written(tiny, tmp_path):
    verdicts, code = examine(tmp_path, *tiny.stage2(tmp_path / "run", "data.text=vqa", "stage2.instructed=true"))
    status, text = verdicts["captions"]
    assert (status, text.startswith("24 texts of ")) == ("ok", True), (code, text)
    none = write_lines(
        tmp_path / "none.jsonl", [{"image": str(tiny.records.parent / "00.png"), "caption": "a dog"}] * 24
    )
    verdicts, code = examine(tmp_path, *tiny.stage2(tmp_path / "run", f"data.train=[{none}]", "data.text=vqa"))
    assert code != 0
    assert "24 (100.0%) cannot be read, the first: " in verdicts["data"][1]
    assert "the record has no answers, or only empty ones" in verdicts["data"][1]


def test_colours_are_learnt_from_questions_and_said_and_ranked_on_other_images(tiny, tmp_path):
    train, held_out = write_records(tmp_path / "train", 64, seed=7), write_records(tmp_path / "other", 32, seed=9)
    more = [
        f"data.train=[{train}]",
        "data.validation=[]",
        "data.augment=false",
        "qformer.dropout=0",
        "train.max_steps=100",
    ]
    run_stage(2, tiny.stage2(tmp_path / "run", *VQA[:2], *more, "optim.lr=5e-3", "optim.warmup_steps=10"))
    model = load(tmp_path / "run/adapter", device="cpu")
    rows = [json.loads(line) for line in held_out.read_text().splitlines()]
    images, asked = [str(held_out.parent / row["image"]) for row in rows], [row["question"] for row in rows]
    answers = [row["answers"][0] for row in rows]
    colours = sorted(set(answers))
    ranked = [colours[int(losses.argmin())] for losses in model.rank(images, asked, colours)]
    for outputs in (ranked, model.answer(images, asked, num_beams=1)):
        right = sum(a == b for a, b in zip(outputs, answers, strict=True)) / len(answers)
        assert right > 0.6, f"{right:.0%} of {len(colours)} colours"
