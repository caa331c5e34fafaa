"""Retrieval: recall as of every pair scored, ranks, going on after a stop, ties, files, mistakes."""

import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from test_evaluation import scored, write
from test_stages import refused, stage_main
from tiny import TEXT, TWO_RANKS, Tiny, run_stage

import qformer
from qformer.data import clean_caption
from qformer.evaluation import TASKS, matching
from qformer.metrics.retrieval import order_keys, read_keys, recall_at_k
from qformer.shapes.write import write_world

REPO = Path(__file__).resolve().parent.parent
PHOTOS = Path(os.environ.get("QFORMER_PHOTOS", REPO.parent / "shared" / "photos"))
evaluate = stage_main("evaluate")
WORDS = TEXT.replace(" ? :", "").split()
RETRIEVAL = ["--task", "retrieval", "--device", "cpu", "--workers", "0", "--batch-size", "5"]


@pytest.fixture(scope="module")
def adapter(tiny: Tiny, tmp_path_factory) -> str:
    """Trained a little, so that images and texts differ."""
    run_dir = tmp_path_factory.mktemp("searched")
    run_stage(1, tiny.stage1(run_dir, "train.max_steps=12", "optim.lr=3e-3", "data.validation=[]"))
    return str(run_dir / "adapter")


@pytest.fixture(scope="module")
def collection(tiny: Tiny, tmp_path_factory) -> str:
    """22 images of two or three captions that all differ; every third image has its captions in records of their own."""
    rows = [json.loads(line) for line in Path(tiny.records).read_text().splitlines()][:22]
    generator = np.random.default_rng(0)
    captions = list(dict.fromkeys(" ".join(generator.choice(WORDS, generator.integers(3, 9))) for _ in range(90)))
    lines = []
    for i, row in enumerate(rows):
        image = os.path.join(os.path.dirname(tiny.records), row["image"])
        mine = [captions.pop() for _ in range(2 + i % 2)]
        image_id = {"image_id": 500 + i}
        if i % 3:
            lines.append({"image": image, "caption": mine, **image_id})
        else:
            lines += [{"image": image, "caption": caption, **image_id} for caption in mine]
    return str(write(tmp_path_factory.mktemp("collection") / "captions.jsonl", lines))


def every_pair(adapter: str, records: str) -> tuple[dict[str, torch.Tensor], list[str], list[str], torch.Tensor]:
    """Scores [I, T] of all pairs by each rule, one image beside all captions, ids, and each caption's image."""
    model = qformer.load(adapter, "cpu")
    captions: dict[int, list[str]] = {}
    images: dict[int, str] = {}
    for row in map(json.loads, Path(records).read_text().splitlines()):
        mine = row["caption"] if isinstance(row["caption"], list) else [row["caption"]]
        captions.setdefault(row["image_id"], []).extend(mine)
        images.setdefault(row["image_id"], row["image"])
    texts = [clean_caption(text) for mine in captions.values() for text in mine]
    near = (model.embed_image(list(images.values())) @ model.embed_text(texts).T).amax(1)
    with torch.no_grad():
        rows = [model.model.adapter.project_images(*model.encode([image] * len(texts))) for image in images.values()]
        logits = torch.stack([model.model.adapter.match([row], *model.model.tokenize(texts)) for row in rows])
    image_of = torch.tensor([i for i, mine in enumerate(captions.values()) for _ in mine])
    caption_ids = [f"{image_id}#{n}" for image_id, mine in captions.items() for n in range(len(mine))]
    no, yes = logits.unbind(-1)
    by_rule = {
        "itm+itc": yes + near,
        "product": yes - no + near / model.model.adapter.temperature.detach(),
        "itm": yes,
        "itc": near,
    }
    return by_rule, list(images), caption_ids, image_of


def as_json(similarity: torch.Tensor, image_of: torch.Tensor) -> dict:
    score = recall_at_k(similarity, image_of)
    by_direction = {"image_to_text": score.image_to_text, "text_to_image": score.text_to_image}
    return {name: {str(k): value for k, value in recall.items()} for name, recall in by_direction.items()}


def test_with_all_candidates_it_is_recall_over_every_pair(adapter, collection, tmp_path, capsys):
    expected, image_ids, caption_ids, image_of = every_pair(adapter, collection)
    recall = {rule: as_json(similarity, image_of) for rule, similarity in expected.items()}
    found = {rule: value["image_to_text"]["1"] + value["text_to_image"]["1"] for rule, value in recall.items()}
    assert len(set(found.values())) > 1
    for rule, similarity in expected.items():
        scores = scored(tmp_path, adapter, collection, *RETRIEVAL, "--rule", rule, "--candidates", "1000")
        assert scores["scores"] == recall[rule]
        assert (scores["task"], scores["rule"]) == ("retrieval", rule)
        assert scores["n"] == {"images": 22, "captions": len(caption_ids)}
        others = {name: value for name, value in recall.items() if name != rule}
        assert scores.get("other_rules", {}) == ({} if rule == "itc" else others)
        more = rule != "itc" and found[rule] < max(found.values())
        assert ("finds more: image_to_text@1" in capsys.readouterr().err) == more
        for i, row in enumerate(scores["results"]):
            best = similarity[i].sort(descending=True, stable=True)
            assert row["image_id"] == image_ids[i]
            assert row["retrieved"]["captions"] == [caption_ids[n] for n in best.indices[:10]]
            torch.testing.assert_close(torch.tensor(row["retrieved"]["caption_scores"]), best.values[:10])
            for number, ids in zip((image_of == i).nonzero()[:, 0], row["retrieved"]["images"], strict=True):
                best = similarity[:, number].sort(descending=True, stable=True)
                assert ids == [image_ids[n] for n in best.indices[:10]]


def test_only_the_best_by_similarity_are_matched_each_way(adapter, collection, tmp_path):
    by_rule, _, _, image_of = every_pair(adapter, collection)
    k, near = 10, by_rule["itc"]
    of_images = torch.full_like(near, -torch.inf).scatter(1, near.topk(k, 1).indices, 1.0)
    of_texts = torch.full_like(near, -torch.inf).scatter(0, near.topk(k, 0).indices, 1.0)
    scores = scored(tmp_path, adapter, collection, *RETRIEVAL, "--candidates", str(k))["scores"]
    for direction, chosen in {"image_to_text": of_images, "text_to_image": of_texts}.items():
        assert scores[direction] == as_json(by_rule["itm+itc"].where(chosen > 0, -torch.inf), image_of)[direction]


def test_matching_scores_are_those_of_match_and_each_pair_is_matched_once(adapter, collection, tmp_path, monkeypatch):
    model, matched, encoded = qformer.load(adapter, "cpu"), Counter(), Counter()
    match_image, encode = matching.Search.match_image, qformer.inference.VisionLanguageModel.encode

    def counted(search, features, texts, passing):
        matched.update((float(features.tokens.sum()), text) for text in texts.tolist())
        return match_image(search, features, texts, passing)

    def encoding(model, images):
        encoded["images"] += len(images) if isinstance(images, list) else 0
        return encode(model, images)

    monkeypatch.setattr(matching.Search, "match_image", counted)
    monkeypatch.setattr(qformer.inference.VisionLanguageModel, "encode", encoding)
    rows = scored(tmp_path, adapter, collection, *RETRIEVAL, "--rule", "itm", "--candidates", "12")["results"]
    assert encoded["images"] == 22, "each image once"
    assert set(matched.values()) == {1}
    assert len(matched) < 22 * 12 + len(rows) * 3 * 12, "what is among the best both ways counts once"
    texts = {f"{row['image_id']}#{n}": text for row in rows for n, text in enumerate(row["captions"])}
    for row in rows[:4]:
        probabilities = model.match([row["image"]] * 10, [texts[i] for i in row["retrieved"]["captions"]])
        with torch.no_grad():
            memory = model.model.adapter.project_images(*model.encode([row["image"]] * 10))
            tokens = model.model.tokenize([texts[i] for i in row["retrieved"]["captions"]])
            logits = model.model.adapter.match([memory], *tokens)
        torch.testing.assert_close(logits.softmax(1)[:, 1], probabilities)
        torch.testing.assert_close(logits[:, 1], torch.tensor(row["retrieved"]["caption_scores"]))


def test_a_stopped_search_goes_on_to_the_same_bits(adapter, collection, tmp_path, monkeypatch, capsys):
    whole = scored(tmp_path, adapter, collection, *RETRIEVAL, "--candidates", "12")
    arguments = [adapter, collection, *RETRIEVAL, "--candidates", "12", "--answers", str(tmp_path / "search")]
    match_image, calls = matching.Search.match_image, []

    def failing(search, *rest):
        calls.append(1)
        if len(calls) == stop:
            raise ValueError("stopped")
        return match_image(search, *rest)

    monkeypatch.setattr(matching.Search, "match_image", failing)
    monkeypatch.setattr(matching, "KEEP_EVERY_S", 0.0)
    for stop in (9, 5):  # noqa: B007 (read in `failing`)
        calls.clear()
        assert refused("evaluate", arguments, capsys).endswith("error: stopped\n")
    calls.clear()
    stop = None
    monkeypatch.setattr(qformer.inference.VisionLanguageModel, "embed_image", None)  # every image is there already
    assert scored(tmp_path, *arguments) == whole
    assert len(calls) == 22 - 8 - 4
    calls.clear()
    assert scored(tmp_path, *arguments) == whole
    assert not calls, "nothing is left to do"
    other = scored(tmp_path, *arguments, "--candidates", "20", "--rule", "itm")
    assert 0 < len(calls) <= 22, "other pairs are matched, from the features that are there"
    monkeypatch.undo()
    assert other == scored(tmp_path, adapter, collection, *RETRIEVAL, "--candidates", "20", "--rule", "itm")
    message = refused("evaluate", [*arguments, "--limit", "12"], capsys)
    assert "was begun with images and captions" in message
    (tmp_path / "search" / "texts-00000.safetensors").write_bytes(b"half")
    assert "texts-00000.safetensors is damaged" in refused("evaluate", [*arguments], capsys)


def test_two_processes_give_the_numbers_of_one_which_goes_on_after_them(adapter, collection, tmp_path):
    arguments = [adapter, collection, *RETRIEVAL, "--candidates", "12"]
    one, search = scored(tmp_path, *arguments), tmp_path / "search"
    launch = [*TWO_RANKS, str(REPO / "stages/evaluate.py"), *arguments, "--answers", str(search)]
    done = subprocess.run([*launch, "--json", str(tmp_path / "two.json")], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two.json").read_text()) == one
    assert done.stdout.count("image_to_text@10") == 1, "the first rank prints"
    assert len(list(search.glob("pairs-*"))) == 2
    for part in ("pairs-0000005", "images-00002", "texts-00000"):
        (search / f"{part}.safetensors").unlink()
    assert scored(tmp_path, *arguments, "--answers", str(search)) == one


def test_predictions_are_scored_without_a_model_and_a_submission_is_one(adapter, collection, tmp_path, capsys):
    files = ["--submit", str(tmp_path / "submission.json")]
    whole = scored(tmp_path, adapter, collection, *RETRIEVAL, *files)
    printed = capsys.readouterr().out
    assert f"image_to_text@1   {whole['scores']['image_to_text']['1']:5.1f}  (22 images, " in printed
    shutil.copy(tmp_path / "scores.json", tmp_path / "whole.json")
    for file in ("submission.json", "whole.json"):
        again = scored(tmp_path, collection, "--predictions", str(tmp_path / file), "--task", "retrieval")
        assert (again["scores"], again["n"], again["other_rules"]) == (
            whole["scores"],
            whole["n"],
            whole["other_rules"],
        )
    code = f"import evaluate, sys; evaluate.main({[collection, '--predictions', str(tmp_path / 'whole.json'), '--task', 'retrieval']}); print('torch' in sys.modules)"
    environment = os.environ | {"PYTHONPATH": f"{REPO / 'stages'}:{REPO}"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=100)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    rows = json.loads((tmp_path / "submission.json").read_text())
    assert [row["image_id"] for row in rows] == list(range(500, 522)), "ids keep their type"
    for broken, message in (
        ({"captions": ["500#0"]}, "image_id 500: expected {'captions'"),
        ({"captions": ["7#0"], "images": rows[0]["retrieved"]["images"]}, "caption '7#0' is none of the records'"),
        ({"captions": [], "images": []}, "image_id 500: 0 lists of images for its 2 captions"),
    ):
        (tmp_path / "broken.json").write_text(json.dumps([{"image_id": 500, "retrieved": broken}, *rows[1:]]))
        arguments = [collection, "--predictions", str(tmp_path / "broken.json"), "--task", "retrieval"]
        assert message in refused("evaluate", arguments, capsys)


def test_broken_images_are_left_out_with_their_captions(adapter, collection, tmp_path, capsys):
    rows = [json.loads(line) for line in Path(collection).read_text().splitlines()]
    sound = [row for row in rows if row["image_id"] not in (503, 510)]
    for row in rows:
        row["image"] = "/none.png" if row["image_id"] in (503, 510) else row["image"]
    broken = scored(tmp_path, adapter, str(write(tmp_path / "broken.jsonl", rows)), *RETRIEVAL, "--batch-size", "64")
    assert "2 broken images were left out, the first: /none.png" in capsys.readouterr().err
    whole = scored(tmp_path, adapter, str(write(tmp_path / "sound.jsonl", sound)), *RETRIEVAL, "--batch-size", "64")
    assert (broken["dropped"], broken["n"]) == (2, {"images": 20, "captions": len(whole["results"]) * 5 // 2})
    assert broken["scores"] == whole["scores"]
    assert scored(tmp_path, adapter, collection, *RETRIEVAL, "--limit", "3")["n"]["images"] == 3


def test_ties_count_against_us_and_equal_captions_are_said(adapter, tiny, tmp_path, capsys):
    """The tiny records repeat their captions: equal texts are equally similar, and the other image's stands first."""
    scores = scored(tmp_path, adapter, str(tiny.records), *RETRIEVAL, "--candidates", "100", "--rule", "itc")
    rows = scores["results"]
    model = qformer.load(adapter, "cpu")
    texts = [clean_caption(text) for row in rows for text in row["captions"]]
    distinct = list(dict.fromkeys(texts))
    embeds = model.embed_text(distinct)[[distinct.index(text) for text in texts]]
    near = (model.embed_image([row["image"] for row in rows]) @ embeds.T).amax(1)
    image_of = torch.tensor([i for i, row in enumerate(rows) for _ in row["captions"]])
    assert scores["scores"] == as_json(near, image_of)
    equal = recall_at_k(near, image_of, texts=texts)
    other = scores["other_rules"]["itc, equal captions right"]
    assert other["image_to_text"] == {str(k): value for k, value in equal.image_to_text.items()}
    assert other["text_to_image"] == {str(k): value for k, value in equal.text_to_image.items()}
    assert "captions stand with another image too" in capsys.readouterr().err


def test_keys_are_in_the_order_of_scores_whatever_they_are():
    generator = torch.Generator().manual_seed(0)
    scores = torch.cat([torch.randn(500, generator=generator), torch.tensor([0.0, -0.0, torch.inf, -torch.inf, 1e-40])])
    scores = torch.cat([scores, scores])
    right = torch.arange(len(scores)) >= len(scores) // 2
    keys = order_keys(scores, right, torch.arange(len(scores)))
    assert len(keys.unique()) == len(keys)
    order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), bool(right[i]), i))
    assert keys.argsort(descending=True).tolist() == order
    back, right_again, index = read_keys(keys)
    assert torch.equal(back, scores)
    assert torch.equal(right_again, right)
    assert torch.equal(index, torch.arange(len(scores)))
    with pytest.raises(ValueError, match="a score is NaN"):
        order_keys(torch.tensor([torch.nan]), right[:1], torch.zeros(1, dtype=torch.long))


def test_mistakes_end_in_one_line(adapter, collection, tiny, tmp_path, capsys):
    arguments = [adapter, collection, *RETRIEVAL]
    assert "--candidates 3: expected at least 10" in refused("evaluate", [*arguments, "--candidates", "3"], capsys)
    assert "this task has itm+itc, product, itm, itc" in refused("evaluate", [*arguments, "--rule", "clip"], capsys)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").write_text("")
    message = refused("evaluate", [*arguments, "--answers", str(tmp_path / "full")], capsys)
    assert "full holds other files" in message
    bare = write(tmp_path / "bare.jsonl", [{"image": "a.png", "question": "what?"}])
    assert "it has no caption" in refused("evaluate", [adapter, str(bare), *RETRIEVAL], capsys)
    run_stage(1, tiny.stage1(tmp_path / "itc", "train.max_steps=1", "data.validation=[]", "stage1.itm=0"))
    message = refused("evaluate", [str(tmp_path / "itc/adapter"), collection, *RETRIEVAL], capsys)
    assert "stage1.itm=0, and --rule itm+itc needs it: --rule itc does without" in message
    evaluate([str(tmp_path / "itc/adapter"), collection, *RETRIEVAL, "--rule", "itc"])
    run_stage(2, tiny.stage2(tmp_path / "s2", "train.max_steps=1", "data.validation=[]"))
    message = refused("evaluate", [str(tmp_path / "s2/adapter"), collection, *RETRIEVAL], capsys)
    assert "retrieval takes an adapter of stage 1" in message


def test_it_runs_on_feature_files_of_different_lengths(tiny, tmp_path):
    run_stage(1, tiny.stage1(tmp_path / "run", *tiny.on_features(), "train.max_steps=1"))
    adapter = str(tmp_path / "run" / "adapter")
    one = scored(tmp_path, adapter, str(tiny.features), *RETRIEVAL, "--candidates", "12")
    assert one["n"]["images"] == 24
    model = qformer.load(adapter, "cpu")
    row = one["results"][5]
    texts = {f"{r['image_id']}#{n}": clean_caption(t) for r in one["results"] for n, t in enumerate(r["captions"])}
    listed = [texts[i] for i in row["retrieved"]["captions"]]
    near = (model.embed_image(row["image"]) @ model.embed_text(listed).T).amax(1)[0]
    with torch.no_grad():
        memory = model.model.adapter.project_images(*model.encode([row["image"]] * 10))
        logits = model.model.adapter.match([memory], *model.model.tokenize(listed))[:, 1]
    torch.testing.assert_close(torch.tensor(row["retrieved"]["caption_scores"]), near + logits)


def test_photographs_are_searched_by_their_captions(tiny, tmp_path):
    if not (PHOTOS / "captions.json").is_file():
        pytest.skip(f"no photographs in {PHOTOS}; set QFORMER_PHOTOS to a folder with captions.json")
    entries = json.loads((PHOTOS / "captions.json").read_text())[:12]
    rows = [{"image": str(PHOTOS / entry["image"]), "caption": entry["captions"]} for entry in entries]
    records = write(tmp_path / "photos.jsonl", rows)
    run_stage(1, tiny.stage1(tmp_path / "run", f"data.train=[{records}]", "train.max_steps=1", "data.validation=[]"))
    scores = scored(tmp_path, str(tmp_path / "run" / "adapter"), str(records), *RETRIEVAL)
    assert scores["n"] == {"images": 12, "captions": 60}
    assert TASKS["retrieval"].rules[0] == scores["rule"]


def test_the_shapes_world_is_searched(tmp_path):
    write_world(tmp_path, n_train=48, n_validation=16, n_questions=7)
    arguments = [
        f"data.train=[{tmp_path}/train.jsonl]",
        "data.validation=[]",
        f"run.dir={tmp_path}/run",
        "train.cpu=true",
    ]
    arguments += [
        "train.max_steps=24",
        "train.global_batch_size=16",
        "train.micro_batch_size=16",
        "optim.warmup_steps=2",
    ]
    run_stage(1, [str(REPO / "configs/shapes/stage1.yaml"), *arguments, "train.mixed_precision=no", "data.workers=0"])
    held_out = [str(tmp_path / "run/adapter"), str(tmp_path / "validation.jsonl"), "--workers", "0", "--device", "cpu"]
    scores = scored(tmp_path, *held_out, "--task", "retrieval_coco", "--split", "validation")
    assert scores["n"] == {"images": 16, "captions": 80}
    assert scores["protocol"]["candidates"] == 128
    assert all(len(row["retrieved"]["images"]) == 5 for row in scores["results"])
    assert scores["scores"]["text_to_image"]["10"] > scores["scores"]["text_to_image"]["1"]
