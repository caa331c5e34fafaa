"""How answers are scored: each rule against numbers worked out by hand from the official programs, and through evaluate.py."""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from test_evaluation import scored, textual, write
from test_known import publish, vqa_files
from test_photographs import PHOTOS
from test_stages import refused
from tiny import run_stage

from qformer.metrics import vqa_accuracy
from qformer.metrics.answers import (
    average_precision,
    choose,
    exact_match,
    score_binary,
    three_match,
    vizwiz_accuracy,
    yes_or_no,
)


def results(folder: Path, rows: list[dict], name: str = "results.json") -> str:
    (folder / name).write_text(json.dumps(rows))
    return str(folder / name)


def answered(folder: Path, *answers: str) -> str:
    return results(folder, [{"question_id": i, "answer": answer} for i, answer in enumerate(answers)])


def test_gqa_is_exact_match_of_the_normalised_answer_or_by_its_own_program_as_it_is():
    # lavis/tasks/vqa.py: processPunctuation, processDigitArticle, then pred == gt
    assert [exact_match(p, "yes") for p in ("yes", "Yes", "Yes.", "the yes", "yes sir")] == [1, 1, 1, 1, 0]
    assert exact_match("t-shirt", "t-shirt") == 1, "an answer with a mark, which GQA has"


def test_five_answers_of_okvqa_count_twice_each():
    five = ["surf", "surf", "surfing", "wave", "sea"]
    for rule in ("official-2021", "official-2017", "always"):
        for answer in ("surf", "wave", "none"):
            assert vqa_accuracy(answer, five, rule) == vqa_accuracy(answer, five * 2, rule)
    # 4 of 10: whoever is left out, three remain; 2 of 10: (2 * 1/3 + 8 * 2/3) / 10
    assert vqa_accuracy("surf", five) == 1
    assert vqa_accuracy("wave", five) == pytest.approx(0.6)


def test_aokvqa_leaves_nobody_out():
    # eval_predictions.py: min(1, sum(pred.lower() == da) / 3)
    answers = ["oil"] * 2 + ["gas"] * 5 + ["air"]
    assert [three_match(p, answers) for p in ("Oil", "gas", "air", "water")] == pytest.approx([2 / 3, 1, 1 / 3, 0])


def test_vizwiz_normalises_the_answer_only_and_leaves_each_person_out():
    # vqaEval.py of VizWiz: for i: others of index != i, min(1, matches / 3)
    assert vizwiz_accuracy("Unanswerable.", ["unanswerable"] * 10) == 1
    assert vizwiz_accuracy("unanswerable", ["unanswerable"] * 2 + ["can"] * 8) == pytest.approx(0.6)
    assert vizwiz_accuracy("two", ["2"] * 10) == 1
    assert vizwiz_accuracy("two", ["two"] * 10) == 0, "people's answers stay as they are"
    with pytest.raises(ValueError, match="at least one"):
        vizwiz_accuracy("a", [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("yes", "yes"), ("no", "no"), ("No, there is not.", "no"), ("There is not a car.", "no"),
        ("Yes. There is no car.", "yes"),  # the first sentence alone
        ("There is a snowboard", "yes"), ("nothing", "yes"), ("NO", "yes"),  # whole words, two spellings
        ("yes, no", "no"), ("", "yes"),
    ],
)  # fmt: skip
def test_pope_reads_yes_or_no_as_its_program_does(text, expected):
    assert yes_or_no(text) == expected


def test_precision_recall_and_f1_by_hand():
    # TP 3, FP 1, TN 4, FN 2
    predictions = [True] * 3 + [True] + [False] * 4 + [False] * 2
    labels = [True] * 3 + [False] * 5 + [True] * 2
    score = score_binary(predictions, labels)
    assert (score.accuracy, score.precision, score.recall, score.yes_ratio) == pytest.approx((70, 75, 60, 40))
    assert score.f1 == pytest.approx(100 * 2 * 0.75 * 0.6 / (0.75 + 0.6))
    # steps of the curve: recall 0.6 at precision 0.75, then recall 1 at 5/10
    assert average_precision(predictions, labels) == pytest.approx(100 * (0.6 * 0.75 + 0.4 * 0.5))
    never = score_binary([False] * 4, [True, False, False, False])
    assert (never.precision, never.recall, never.f1, never.accuracy) == (0, 0, 0, 75)
    with pytest.raises(ValueError, match="one each"):
        score_binary([], [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("B", 1), ("b", 1), ("(b)", 1), ("B.", 1), ("B) a dog", 1), ("b: dog", 1), ("The answer is B.", 1),
        ("a dog", 1), ("A dog.", 1), ("Dog", 1),  # the text goes before the letter
        ("Answer is (C)", 2), ("the answer is a dog", 0),  # the letter that is named
        ("D", None), ("bird", None), ("", None), ("a horse", None),
    ],
)  # fmt: skip
def test_a_choice_is_named_by_its_letter_or_its_text(text, expected):
    assert choose(text, ["a cat", "a dog", "two horses"]) == expected


def test_choices_that_are_letters_or_numbers_are_texts_first():
    assert choose("A", ["B", "A"]) == 1
    assert choose("two", ["1", "2"]) == 1


VQA = ("always", "official-2017", "official-2021")


def test_vqa_is_scored_against_official_files_by_answer_type_with_and_without_answer_id(tmp_path):
    """Three persons' "net" and more: by hand as below; the files in the order that nobody prescribes."""
    questions, annotations = vqa_files("val2014")
    second = {**questions["questions"][0], "question_id": 7}
    questions["questions"].append(second)
    two = [{"answer": "2", "answer_confidence": "yes", "answer_id": i} for i in range(10)]
    annotations["annotations"].append(
        {**annotations["annotations"][0], "question_id": 7, "answer_type": "number", "answers": two}
    )
    predictions = results(
        tmp_path, [{"question_id": 458752000, "answer": "Netting"}, {"question_id": 7, "answer": "two"}]
    )
    for with_ids in (True, False):
        if not with_ids:
            for entry in annotations["annotations"]:
                entry["answers"] = [{"answer": answer["answer"]} for answer in entry["answers"]]
        files = [results(tmp_path, content, f"{name}.json") for name, content in (("a", annotations), ("q", questions))]
        scores = {rule: scored(tmp_path, "--predictions", predictions, *files, "--rule", rule) for rule in VQA}
        # "netting" is 1 of 10: 0.3. "two" against ten equal "2": only rules that normalise it all the same see "2".
        assert {rule: s["scores"]["overall"] for rule, s in scores.items()} == pytest.approx(
            {"always": 65, "official-2017": 65, "official-2021": 15}
        )
        assert scores["official-2021"]["by_answer_type"] == {
            "other": {"overall": pytest.approx(30), "n": 1}, "number": {"overall": 0, "n": 1}
        }  # fmt: skip
        assert [row["question_id"] for row in scores["always"]["results"]] == [458752000, 7]
        assert [row["accuracy"] for row in scores["always"]["results"]] == pytest.approx([30, 100])


def test_the_photographs_official_files_are_scored(tmp_path):
    if not (PHOTOS / "vqa_questions.json").is_file():
        pytest.skip(f"no photographs in {PHOTOS}; set QFORMER_PHOTOS to a folder with vqa_questions.json")
    files = [str(PHOTOS / f"vqa_{what}.json") for what in ("annotations", "questions")]
    rows = json.loads(Path(files[0]).read_text())["annotations"]
    popular = [{"question_id": row["question_id"], "answer": row["multiple_choice_answer"]} for row in rows]
    done = scored(tmp_path, "--predictions", results(tmp_path, popular), *files)
    # The most popular answer by the leave-one-out formula, person by person, no normalisation needed.
    expected = []
    for row in rows:
        answers = [answer["answer"] for answer in row["answers"]]
        counts = Counter(answers)
        mine = row["multiple_choice_answer"]
        expected.append(sum(min(1, (counts[mine] - (a == mine)) / 3) for a in answers) / 10)
    assert done["scores"]["overall"] == pytest.approx(100 * sum(expected) / len(rows), abs=1e-9)
    assert [row["accuracy"] for row in done["results"]] == pytest.approx([100 * value for value in expected])
    assert {k: v["n"] for k, v in done["by_answer_type"].items()} == Counter(row["answer_type"] for row in rows)


def test_pope_has_all_five_numbers_of_every_subset(tmp_path, capsys):
    def pope(subset: str, *labels: str) -> str:
        rows = [{"question_id": i, "image": f"COCO_val2014_{i:012d}.jpg", "text": f"Is there a {subset} {i}?", "label": label}
                for i, label in enumerate(labels, 1)]  # fmt: skip
        return str(write(tmp_path / f"coco_pope_{subset}.json", rows))

    files = [pope("random", "yes", "no", "no"), pope("adversarial", "yes", "no")]
    one = results(tmp_path, [{"question_id": i, "answer": a} for i, a in enumerate(["Yes", "no", "Yes, it is."], 1)])
    score = scored(tmp_path, "--predictions", one, files[0], "--task", "pope")
    random = {"accuracy": 200 / 3, "precision": 50, "recall": 100, "f1": 200 / 3, "yes_ratio": 200 / 3}
    assert score["scores"] == pytest.approx(random)
    assert score["by_subset"]["random"] == pytest.approx(random | {"n": 3})
    assert "by_subset random: accuracy 66.7, precision 50.0" in capsys.readouterr().out
    # Both subsets at once: ids begin at 1 in each, images and questions tell them apart, as --json writes them.
    both = [{"question_id": i, "answer": a, "image": f"COCO_val2014_{i:012d}.jpg", "question": f"Is there a {subset} {i}?"}
            for subset, answers in (("random", ["yes"] * 3), ("adversarial", ["no"] * 2))
            for i, a in enumerate(answers, 1)]  # fmt: skip
    score = scored(tmp_path, "--predictions", results(tmp_path, both), *files, "--task", "pope")
    assert {name: values["n"] for name, values in score["by_subset"].items()} == {"random": 3, "adversarial": 2}
    assert score["by_subset"]["adversarial"]["recall"] == 0
    again = scored(tmp_path, "--predictions", results(tmp_path, score["results"]), *files, "--task", "pope")
    assert again["scores"] == score["scores"]


def test_vizwiz_results_name_images_and_unanswerable_is_scored(tmp_path):
    answers = {"VizWiz_val_0.jpg": ["unanswerable"] * 10, "VizWiz_val_1.jpg": ["can"] * 9 + ["tin"]}
    rows = [{"image": image, "question": "What is it?", "answers": [{"answer": a, "answer_confidence": "yes"} for a in people],
             "answer_type": "other" if "can" in people else "unanswerable", "answerable": int("can" in people)}
            for image, people in answers.items()]  # fmt: skip
    file = results(tmp_path, rows, "val.json")
    predictions = results(tmp_path, [{"image": image, "answer": "unanswerable"} for image in answers])
    submitted = tmp_path / "submission.json"
    score = scored(tmp_path, "--predictions", predictions, file, "--task", "vizwiz", "--submit", str(submitted))
    assert score["scores"] == pytest.approx(
        {"overall": 50, "unanswerable_f1": 200 / 3, "unanswerable_average_precision": 50}
    )
    assert score["by_answer_type"]["unanswerable"] == {"overall": 100, "n": 1}
    assert json.loads(submitted.read_text()) == json.loads(Path(predictions).read_text())


def test_gqa_files_and_its_own_names_of_results(tmp_path):
    folder = publish(tmp_path, "gqa")
    predictions = results(tmp_path, [{"questionId": "201307251", "prediction": "No."}])
    score = scored(
        tmp_path, "--predictions", predictions, str(folder / "testdev_balanced_questions.json"), "--task", "gqa"
    )
    assert score["scores"] == {"overall": 100}
    assert score["other_rules"] == {"exact": 0}
    assert score["by_type"] == {"verify": 100}


def test_scienceqa_is_scored_by_letters_and_texts(tmp_path, capsys):
    rows = [{"answers": ["Maine"], "choices": ["Texas", "Maine"]} for _ in range(4)]
    records = textual(tmp_path, *rows)
    predictions = answered(tmp_path, "B", "maine", "(a)", "Ohio")
    score = scored(tmp_path, "--predictions", predictions, records, "--task", "scienceqa", "--split", "test")
    assert score["scores"] == {"overall": 50}
    assert "1 answers name none of the choices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "rule", "message"),
    [
        ({"answers": ["a"]}, "choice", "its record has no choices"),
        ({"answers": ["c"], "choices": ["a", "b"]}, "choice", "'c' is none of"),
        ({"answers": ["maybe"]}, "pope", "needs yes or no"),
        ({"answers": ["a"]}, "vqa", "this task has official-2021"),
    ],
)
def test_records_that_do_not_fit_a_rule_are_named(row, rule, message, tmp_path, capsys):
    arguments = ["--predictions", answered(tmp_path, "a"), textual(tmp_path, row), "--rule", rule]
    assert message in refused("evaluate", arguments, capsys)


@pytest.mark.parametrize(("name", "file", "ids"), [
    ("coco", "dataset_coco.json", [391895, 57870, 522418]),
    ("flickr8k", "dataset_flickr8k.json", [0, 1]),
    ("flickr8k", "dataset_flickr8k.json", ["2513260012_03d33305cf.jpg", "2903617548_d3e38d7f88.jpg"]),
    ("nocaps", "nocaps_val_4500_captions.json", [0]),
])  # fmt: skip
def test_official_captions_are_scored_against_published_files(name, file, ids, tmp_path):
    """The numbers are tests/test_captions.py's; here, that results and files meet, and that ids keep their type."""
    captions = [{"image_id": i, "caption": "a man in a hat"} for i in ids]
    arguments = ["--predictions", results(tmp_path, captions), str(publish(tmp_path, name) / file), "--task", "caption"]
    submitted = tmp_path / "submitted.json"
    score = scored(tmp_path, *arguments, "--rule", "approximate", "--submit", str(submitted))
    assert score["n"] == len(ids)
    assert score["scores"]["Bleu_1"] > 0
    assert [type(row["image_id"]) for row in json.loads(submitted.read_text())] == [int] * len(ids)


def test_captions_of_some_images_are_scored_for_themselves_and_answers_are_not(tmp_path, capsys):
    file = publish(tmp_path, "coco") / "dataset_coco.json"
    one = results(tmp_path, [{"image_id": 57870, "caption": "a man in hat 1"}])
    score = scored(tmp_path, "--predictions", one, str(file), "--task", "caption", "--rule", "approximate")
    assert (score["n"], score["scores"]["Bleu_1"]) == (1, pytest.approx(1))
    assert len(score["results"]) == 1
    records = textual(tmp_path, {"answers": ["a"]}, {"answers": ["b"]})
    assert "question_id 1 is missing" in refused(
        "evaluate", ["--predictions", answered(tmp_path, "a"), records], capsys
    )


def test_every_protocol_of_questions_runs_from_an_adapter_to_a_file_for_the_server(tiny, tmp_path):
    run_stage(2, tiny.stage2(tmp_path / "run", "train.max_steps=1", "data.validation=[]"))
    adapter, root = str(tmp_path / "run" / "adapter"), os.path.dirname(tiny.records)
    rows = [json.loads(line) for line in Path(tiny.records).read_text().splitlines()][:3]
    rows = [row | {"image": os.path.join(root, row["image"]), "question_id": i} for i, row in enumerate(rows)]
    kinds = {
        "okvqa": {"answers": ["red"] * 5, "split": "val"},
        "aokvqa": {"answers": ["red"] * 10, "split": "val"},
        "textvqa": {"answers": ["red"] * 10, "split": "val"},
        "gqa": {"answers": ["red"], "split": "testdev"},
        "vizwiz": {"answers": ["red"] * 9 + ["unanswerable"], "split": "val", "answer_type": "other"},
        "pope": {"answers": ["yes"], "question_type": "random"},
    }
    for task, fields in kinds.items():
        records = str(write(tmp_path / f"{task}.jsonl", [row | fields for row in rows]))
        submitted = tmp_path / f"{task}_results.json"
        arguments = ["--task", task, "--device", "cpu", "--workers", "0", "--num-beams", "1", "--max-new-tokens", "2"]
        asked = scored(tmp_path, adapter, records, *arguments, "--min-new-tokens", "0", "--submit", str(submitted))
        assert (asked["rule"], asked["n"]) == ("always" if task == "textvqa" else task, 3)
        again = scored(tmp_path, "--predictions", str(submitted), records, "--task", task)
        assert again["scores"] == asked["scores"]


def test_the_photographs_official_questions_are_asked_of_an_adapter(tiny, tmp_path):
    if not (PHOTOS / "vqa_questions.json").is_file():
        pytest.skip(f"no photographs in {PHOTOS}; set QFORMER_PHOTOS to a folder with vqa_questions.json")
    run_stage(2, tiny.stage2(tmp_path / "run", "train.max_steps=1", "data.validation=[]"))
    files = [str(PHOTOS / f"vqa_{what}.json") for what in ("questions", "annotations")]
    submitted = tmp_path / "vqa.json"
    arguments = ["--task", "vqav2", "--split", "train", "--device", "cpu", "--workers", "0", "--num-beams", "1"]
    arguments += ["--max-new-tokens", "2", "--min-new-tokens", "0", "--submit", str(submitted)]
    asked = scored(tmp_path, str(tmp_path / "run" / "adapter"), *files, *arguments)
    assert (asked["n"], asked["dropped"], asked["rule"]) == (39, 0, "official-2021")
    ids = [row["question_id"] for row in json.loads(Path(files[0]).read_text())["questions"]]
    assert [row["question_id"] for row in json.loads(submitted.read_text())] == ids
    again = scored(tmp_path, "--predictions", str(submitted), *files[::-1])
    assert again["scores"] == asked["scores"]
