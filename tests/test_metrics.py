import random
import re

import pytest
import torch

from qformer.metrics import RULES, normalize_answer, recall_at_k, score_vqa, vqa_accuracy


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The Cat", "cat"),
        ("two dogs", "2 dogs"),
        ("none", "0"),
        ("eleven", "eleven"),  # the table ends at ten
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("couldntve", "couldntve"),  # two apostrophes lost: not in the table
        ("it's", "it's"),
        ("t-shirt", "t shirt"),  # a mark inside a word becomes a space
        ("yes, sir", "yes sir"),  # a mark next to a space disappears
        ("a-b - c", "ab c"),  # ... and so does every other one of its kind, "a-b" included
        ("1,000", "1000"),  # a comma between digits removes marks instead of spacing them
        ("1,000/day", "1000day"),
        ("red.", "red"),
        ("3.5", "3.5"),
        ("5.", "5"),  # would stay with the lookbehind the tool meant to write
        ("u.s.a.", "usa"),
        ("10:30", "10:30"),  # colons are not in the table
        (" on\nthe\ttable ", "on table"),
        ("." * 33 + "x", ".x"),  # only 32 periods are removed
        ("", ""),
    ],
)
def test_normalize_answer(text, expected):
    assert normalize_answer(text) == expected


def ten(**counts: int) -> list[str]:
    answers = [answer for answer, count in counts.items() for _ in range(count)]
    return answers + [f"other {i}" for i in range(10 - len(answers))]


@pytest.mark.parametrize(
    ("matches", "expected"),
    [
        (0, 0.0),
        (1, 0.3),  # leave the match out: 0; leave one of 9 others out: 1/3.        (1 * 0 + 9 * 1/3) / 10
        (2, 0.6),  # leave a match out: 1/3; leave one of 8 others out: 2/3.        (2 * 1/3 + 8 * 2/3) / 10
        (3, 0.9),  # leave a match out: 2/3; leave one of 7 others out: 1.          (3 * 2/3 + 7 * 1) / 10
        (4, 1.0),  # three matches remain whoever is left out
        (10, 1.0),
    ],
)
def test_vqa_accuracy_leaves_each_of_ten_people_out(matches, expected):
    for rule in RULES:
        assert vqa_accuracy("cat", ten(cat=matches), rule) == pytest.approx(expected)


class OfficialTool:
    """The accuracy loop of vqaEval.py over published entries with their answer_id, step by step; tables shortened.

    Source: GT-Vision-Lab/VQA, PythonEvaluationTools/vqaEvaluation/vqaEval.py, `evaluate`, and LAVIS' copy of the version before.
    """

    PUNCT = (";", "/", "[", "]", '"', "{", "}", "(", ")", "=", "+", "\\", "_", "-", ">", "<", "@", "`", ",", "?", "!")
    NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "ten": "10"}
    CONTRACTIONS = {"dont": "don't", "isnt": "isn't", "couldnt've": "couldn't've"}

    def __init__(self, rule: str):
        self.rule = rule

    def process_punctuation(self, text: str) -> str:
        out = text
        for mark in self.PUNCT:
            if (mark + " " in text or " " + mark in text) or re.search(r"(\d)(\,)(\d)", text) is not None:
                out = out.replace(mark, "")
            else:
                out = out.replace(mark, " ")
        return re.sub(r"(?!<=\d)(\.)(?!\d)", "", out, count=int(re.UNICODE))

    def process_digit_article(self, text: str) -> str:
        words = [self.NUMBERS.get(word, word) for word in text.lower().split()]
        words = [word for word in words if word not in ("a", "an", "the")]
        return " ".join(self.CONTRACTIONS.get(word, word) for word in words)

    def accuracy(self, answer: str, people: list[str]) -> float:
        entries = [{"answer": text, "answer_id": i} for i, text in enumerate(people)]
        for entry in entries:
            entry["answer"] = entry["answer"].replace("\n", " ").replace("\t", " ").strip()
        answer = answer.replace("\n", " ").replace("\t", " ").strip()
        differ = len({entry["answer"] for entry in entries}) > 1
        if self.rule != "official-2021" or differ:
            answer = self.process_digit_article(self.process_punctuation(answer))
        if self.rule == "always" or differ:
            for entry in entries:
                entry["answer"] = self.process_punctuation(entry["answer"])
                if self.rule != "official-2017":
                    entry["answer"] = self.process_digit_article(entry["answer"])
        accuracies = []
        for entry in entries:
            others = [item for item in entries if item != entry]
            matching = [item for item in others if item["answer"] == answer]
            accuracies.append(min(1, float(len(matching)) / 3))
        return float(sum(accuracies)) / len(accuracies)


@pytest.mark.parametrize("rule", RULES)
def test_accuracy_is_that_of_the_official_loop_on_answers_of_every_odd_kind(rule):
    pieces = ["a", "the", "Two", "none", "dont", "couldnt've", "t-shirt", "1,000", "3.5", "u.s.", "yes", "Yes", "no.", ", sir",
              "10:30", "-", "[x]", "\n", "  ", "red/blue", "?", "isnt"]  # fmt: skip
    draw = random.Random(rule)
    texts = [draw.choice(("", " ")).join(draw.choices(pieces, k=draw.choice((1, 1, 1, 2, 3)))) for _ in range(40)]
    tool, scores = OfficialTool(rule), []
    for _ in range(3000):
        few = draw.sample(texts, draw.choice((1, 2, 3)))  # so that answers meet
        people = draw.choices(few, k=10)
        prediction = draw.choice([*few, *texts[:3], draw.choice(few).upper()])
        scores.append(tool.accuracy(prediction, people))
        assert vqa_accuracy(prediction, people, rule) == pytest.approx(scores[-1]), (prediction, people)
    assert 0.2 < sum(scores) / len(scores) < 0.8


def test_normalising_rules_differ_only_where_all_ten_agree():
    agreed = ["the cat"] * 10
    assert vqa_accuracy("cat", agreed) == 0  # official-2021: equal answers are compared as they are
    assert vqa_accuracy("cat", agreed, "always") == 1
    assert vqa_accuracy(" the\ncat ", agreed) == 1  # white space is always tidied
    # Nine "the cat" and one other: both sides are normalised, nine matches.
    assert vqa_accuracy("Cat.", ["the cat"] * 9 + ["dog"]) == 1
    # Answers that differ only in white space are equal answers.
    assert vqa_accuracy("cat", ["the cat"] * 9 + ["the cat "]) == 0


def test_fewer_than_ten_answers_count_as_repeated_to_ten():
    assert vqa_accuracy("cat", ["cat"]) == 1
    assert vqa_accuracy("dog", ["cat"]) == 0
    # One of five repeated twice is two of ten: 0.6 as above.
    assert vqa_accuracy("a1", ["a1", "b1", "c1", "d1", "e1"]) == pytest.approx(0.6)
    # One of three is m = 10/3 of ten: (m * (m - 1) / 3 + (10 - m) * 1) / 10 = (10/3 * 7/9 + 20/3) / 10 = 25/27.
    # Whichever of the three it is.
    assert [vqa_accuracy(a, ["x", "y", "z"]) for a in "xyz"] == pytest.approx([25 / 27] * 3)


def test_score_vqa_averages_overall_and_by_type():
    score = score_vqa(["cat", "yes", "no"], [ten(cat=1), ten(yes=10), ten(no=0)], ["other", "yes/no", "yes/no"])
    assert score.overall == pytest.approx(100 * (0.3 + 1 + 0) / 3)
    assert score.by_type == pytest.approx({"other": 30, "yes/no": 50})
    assert (score.n, score.n_by_type) == (3, {"other": 1, "yes/no": 2})
    assert score_vqa(["cat"], [["cat"]]).by_type == {}


@pytest.mark.parametrize(
    "call",
    [
        lambda: vqa_accuracy("cat", []),
        lambda: vqa_accuracy("cat", ["cat"], "never"),
        lambda: score_vqa([], []),
        lambda: score_vqa(["cat"], []),
        lambda: score_vqa(["cat"], [["cat"]], []),
    ],
)
def test_vqa_errors(call):
    with pytest.raises(ValueError):
        call()


def brute_force_recall(similarity: list[list[float]], text_image: list[int], k: int) -> tuple[float, float]:
    n_images, n_texts = len(similarity), len(text_image)
    images = texts = 0
    for i in range(n_images):  # wrong captions first among equals
        order = sorted(range(n_texts), key=lambda t: (-similarity[i][t], text_image[t] == i))
        images += any(text_image[t] == i for t in order[:k])
    for t in range(n_texts):
        order = sorted(range(n_images), key=lambda i: (-similarity[i][t], text_image[t] == i))
        texts += text_image[t] in order[:k]
    return 100 * images / n_images, 100 * texts / n_texts


@pytest.mark.parametrize("levels", [3, 1000])  # 3: many ties
def test_recall_matches_brute_force(levels):
    generator = torch.Generator().manual_seed(levels)
    similarity = torch.randint(levels, (7, 20), generator=generator).float()
    text_image = torch.cat([torch.arange(7), torch.randint(7, (13,), generator=generator)])  # uneven caption counts
    score = recall_at_k(similarity, text_image, ks=(1, 2, 5))
    for k in (1, 2, 5):
        expected = brute_force_recall(similarity.tolist(), text_image.tolist(), k)
        assert (score.image_to_text[k], score.text_to_image[k]) == pytest.approx(expected)
    assert (score.n_images, score.n_texts) == (7, 20)


def test_recall_counts_ties_against_us_but_own_captions_never():
    text_image = torch.arange(12)
    constant = recall_at_k(torch.zeros(12, 12), text_image)
    assert set((constant.image_to_text | constant.text_to_image).values()) == {0.0}
    # Each picture equals both its captions and beats the rest.
    twice = recall_at_k(torch.eye(12).repeat(1, 2), text_image.repeat(2), ks=(1,))
    assert (twice.image_to_text, twice.text_to_image) == ({1: 100.0}, {1: 100.0})


@pytest.mark.parametrize(
    ("similarity", "text_image", "ks"),
    [
        (torch.zeros(2, 3), torch.tensor([0, 1]), (1,)),
        (torch.zeros(2, 2), torch.tensor([0, 2]), (1,)),
        (torch.zeros(2, 2), torch.tensor([0, 0]), (1,)),
        (torch.tensor([[1.0, torch.nan], [0.0, 1.0]]), torch.tensor([0, 1]), (1,)),
        (torch.zeros(2, 2), torch.tensor([0, 1]), (0,)),
    ],
)
def test_recall_errors(similarity, text_image, ks):
    with pytest.raises(ValueError):
        recall_at_k(similarity, text_image, ks)
