"""Data with few distinct captions (class labels, sounds): equal texts are no negatives of each other, on any rank."""

import json

import pytest
import torch
from tiny import run_stage

from qformer.metrics.retrieval import recall_at_k
from qformer.models.contrast import contrast


def compare(keys, seed=3):
    generator = torch.Generator().manual_seed(0)
    images, texts = (torch.randn(*s, 8, generator=generator) for s in ((6, 2), (6,)))
    images, texts = (torch.nn.functional.normalize(x, dim=-1) for x in (images, texts))
    return contrast(images, texts, torch.tensor(0.07), keys, label_smoothing=0.1, noise_seed=seed)


def test_equal_captions_are_never_drawn_as_negatives_and_share_the_target():
    labels = torch.tensor([7, 7, 8, 8, 8, 9])
    keys = torch.stack([torch.arange(6), labels], 1)
    for seed in range(30):
        negatives = compare(keys, seed).negatives
        assert (labels[negatives.text] != labels).all()
        assert (labels[negatives.image] != labels).all()
    alone = compare(torch.arange(6)[:, None])
    assert compare(keys).itc != alone.itc
    assert compare(torch.stack([torch.arange(6), torch.arange(6)], 1)).itc == alone.itc, "all captions differ"


def test_where_all_captions_are_equal_there_is_no_negative():
    negatives = compare(torch.stack([torch.arange(6), torch.zeros(6, dtype=torch.long)], 1)).negatives
    assert not negatives.has_text.any()
    assert not negatives.has_image.any()


def test_recall_counts_any_equal_caption():
    similarity = torch.tensor([[0.1, 0.9, 0.0], [0.8, 0.2, 0.0], [0.0, 0.1, 0.7]])
    of_image = torch.arange(3)
    score = recall_at_k(similarity, of_image, ks=(1,), texts=["a dog", "a dog", "a cat"])
    assert (score.image_to_text[1], score.text_to_image[1]) == (100, 100)
    assert recall_at_k(similarity, of_image, ks=(1,)).image_to_text[1] == pytest.approx(100 / 3)
    assert recall_at_k(similarity, of_image, ks=(1,), texts=["a", "b", "c"]) == recall_at_k(
        similarity, of_image, ks=(1,)
    )


def test_matching_learns_from_class_labels(tiny, tmp_path, capsys):
    """24 images with 4 labels: ITM could not leave chance when equal texts were negatives of each other."""
    lines = [json.loads(line) for line in tiny.records.read_text().splitlines()]
    records = tmp_path / "labels.jsonl"
    labels = [{"image": str(tiny.records.parent / r["image"]), "caption": r["answers"][0]} for r in lines]
    records.write_text("".join(json.dumps(label) + "\n" for label in labels))
    run_stage(1, tiny.stage1(
        tmp_path / "run", f"data.train=[{records}]", "data.validation=[]", "train.max_steps=250", "data.augment=false", "optim.lr=3e-3",
        "qformer.dropout=0", "qformer.init_std=0.1", "train.log_every_steps=50", "optim.warmup_steps=10",
    ))  # fmt: skip
    printed = "".join(capsys.readouterr())
    assert "24 records; 4 of 24 captions looked up are distinct" in " ".join(printed.split())
    last = json.loads((tmp_path / "run/metrics.jsonl").read_text().splitlines()[-1])
    assert last["itm"] < 0.2, "it stood at 0.6 when equal texts were negatives"
    assert last["itc_accuracy"] > 0.8
