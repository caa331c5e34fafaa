"""The Shapes world keeps its promises: held-out scenes are unseen, answers are true, and nothing trains on a question."""

import json
import random

import pretrain
import pytest
import texts
from PIL import Image

from qformer.config import EncoderConfig
from qformer.data import read_records
from qformer.encoders import load_encoder
from qformer.language import load_language_model
from qformer.shapes import grammar, world
from qformer.shapes.world import Item
from qformer.shapes.write import write_world

SCENE = (Item("small", "red", "circle", "top-left"), Item("large", "blue", "square", "middle"), Item("large", "red", "cross", "bottom-right"))  # fmt: skip
WEIGHTS = pretrain.WEIGHTS


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shapes")
    write_world(path, n_train=60, n_validation=20, n_questions=70)
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_scene_is_of_one_split_whatever_its_order():
    rng = random.Random(0)
    scenes = [world.draw_scene(rng) for _ in range(500)]
    assert all(world.held_out(scene) == world.held_out(tuple(reversed(scene))) for scene in scenes)
    assert 20 < sum(map(world.held_out, scenes)) < 90  # one in ten
    train = {frozenset(world.draw_split(rng, False)) for _ in range(500)}
    held_out = {frozenset(world.draw_split(rng, True)) for _ in range(500)}
    assert not train & held_out


def test_nothing_trains_on_a_question(folder):
    for name in ("train", "validation"):
        assert all(set(record) == {"image", "caption"} for record in lines(folder / f"{name}.jsonl"))
        assert not any("?" in caption for record in lines(folder / f"{name}.jsonl") for caption in record["caption"])


def test_every_school_text_is_about_a_training_scene(monkeypatch):
    seen = []
    monkeypatch.setattr(texts.world, "draw_split", lambda rng, validation, n=None: seen.append(validation) or SCENE)
    for level in texts.LEVELS:
        texts.document(random.Random(0), level)
        texts.seq2seq_pair(random.Random(0), level)
    assert seen
    assert not any(seen)


def test_comparisons_ask_who_is_further_to_the_left_or_right_as_often_yes_as_no():
    rng = random.Random(0)
    pairs = [texts.seq2seq_pair(rng, texts.COMPARISONS) for _ in range(400)]
    assert all(" to the left of " in asked or " to the right of " in asked for _, asked, _ in pairs)
    assert {len(pieces) for *_, pieces in pairs} == {1}, "the answer alone: nothing else is left to learn"
    assert 140 < sum(pieces == [("yes", 1.0)] for *_, pieces in pairs) < 260


def test_merged_positions_hold_the_words_of_one_item_each():
    sizes = set()
    for seed in range(300):
        rng = random.Random(seed)
        description = texts.context(world.draw_scene(rng, 3), rng, texts.LEVELS[-1])
        positions = texts.merge(description, rng)
        words = [w for w in texts.WORD.findall(description) if w not in (",", "and", ".", ":")]
        said = [w for position in positions for w in position if w not in (",", "and", ".", ":")]
        assert sorted(said) == sorted(words)
        assert all(sum(w in world.PLACES for w in position) <= 1 for position in positions)
        assert all(len(position) == 1 for position in texts.merge(description, rng, plain=1.0))
        sizes.add(max(map(len, positions)))
    assert {1, 2, 4} <= sizes


def test_the_same_seed_writes_the_same_world(folder, tmp_path):
    write_world(tmp_path, n_train=60, n_validation=20, n_questions=70)
    assert (tmp_path / "questions.jsonl").read_text() == (folder / "questions.jsonl").read_text()
    assert (tmp_path / "train/00007.png").read_bytes() == (folder / "train/00007.png").read_bytes()


def test_records_are_those_of_any_data_set(folder):
    records = read_records([str(folder / "questions.jsonl")])
    assert {r.question_type for r in (records[i] for i in range(len(records)))} == set(grammar.QUESTION_TYPES)
    assert Image.open(records[0].image).size == (64, 64)


@pytest.mark.parametrize(
    ("question_type", "expected"),
    {
        "colour": {("what colour is the circle?", "red"), ("what colour is the shape middle?", "blue")},
        "shape": {("what is middle?", "square"), ("what shape is blue?", "square")},
        "size": {("how big is the circle?", "small"), ("is the square small or large?", "large")},
        "place": {("where is the cross?", "bottom-right"), ("where is the blue shape?", "middle")},
        "count": {("how many red shapes are there?", "two"), ("how many circles are there?", "one")},
        "existence": {("is there a triangle?", "no"), ("is there a red cross?", "yes")},
        "relation": {("is the circle above the square?", "yes"), ("are the circle and the cross the same size?", "no")},
    }.items(),
)
def test_answers_are_true_and_unambiguous(question_type, expected):
    rng = random.Random(0)
    asked = {}
    for _ in range(3000):
        if found := grammar.ask(SCENE, rng, question_type):
            assert asked.setdefault(found[0], found[1]) == found[1], "a question has one answer"
    assert expected <= set(asked.items())
    assert not any(q.endswith(" the red shape?") for q in asked), "two shapes are red"


def test_the_tokenizers_know_every_word_of_the_world():
    rng = random.Random(5)
    ids = texts.lm_vocabulary()
    opt, t5 = (load_language_model(str(WEIGHTS / name)) for name in ("opt", "t5"))
    for _ in range(50):
        text = (
            f"{grammar.caption(world.draw_scene(rng), rng)} Question: {(grammar.ask(SCENE, rng) or ('',))[0]} Answer:"
        )
        own = [ids[word] for word in pretrain.WORD.findall(text.lower())]
        assert [opt.tokenizer(text, add_special_tokens=False).input_ids] == [own]
        assert t5.tokenizer(text).input_ids == [*own, ids[pretrain.BOS]]


@pytest.mark.parametrize("name", ["opt", "t5"])
def test_the_language_models_answer_when_told(name):
    llm, rng = load_language_model(str(WEIGHTS / name)), random.Random(11)
    pairs = []
    for question_type in grammar.QUESTION_TYPES * 60:  # the share of 68 is too uncertain
        scene = world.draw_split(rng, True)
        if qa := grammar.ask(scene, rng, question_type):
            pairs.append((f"{grammar.caption(scene, rng)} Question: {qa[0]} Answer:", qa[1]))
    said = llm.generate(None, [text for text, _ in pairs], num_beams=1, max_new_tokens=4)
    right = sum(answer == wanted for answer, (_, wanted) in zip(said, pairs, strict=True))
    assert right >= 0.97 * len(pairs), f"{right} of {len(pairs)}"


def test_the_encoder_is_an_open_clip_folder_and_small():
    encoder = load_encoder(EncoderConfig("open_clip", f"local-dir:{WEIGHTS / 'vit'}"))
    assert (encoder.width, encoder.num_tokens) == (128, 65)
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 12e6
