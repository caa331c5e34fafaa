"""Records, order, transforms and loading: what a run reads, and that it reads it again exactly."""

from __future__ import annotations

import io
import itertools
import json
import logging
import math
import pickle
from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision import transforms as tv

from qformer import data
from qformer.data import (
    BrokenRecord,
    Draw,
    GlobalBatches,
    ImageTransform,
    Mixture,
    Order,
    Record,
    RecordDataset,
    build_order,
    clean_caption,
    clean_question,
    collate,
    evaluation_loader,
    load_features,
    load_image,
    read_records,
    to_rgb,
    training_loader,
)

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
TRANSFORM = ImageTransform(8, MEAN, STD)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()


def write(path, *rows):
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def noise(width, height, channels=3, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def record_of(image, tmp_path, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return Record(str(tmp_path / name), "a", captions=("x",))


# --- records


def test_every_public_name_exists():
    assert all(hasattr(data, name) for name in data.__all__)
    assert data.__all__ == sorted(data.__all__)


def test_records_of_several_files(tmp_path):
    captions = write(
        tmp_path / "c.jsonl",
        {"image": "a/1.jpg", "caption": ["one", "two"], "image_id": 7, "other": 1},
        {"image": "/abs/2.jpg", "caption": ["three"]},
    )
    questions = tmp_path / "q.json"
    row = {"image": "3.jpg", "question": "q?", "answers": ["x", "y"], "question_id": 5, "question_type": "how"}
    questions.write_text(json.dumps([row]))
    records = read_records([captions, str(questions)])
    assert len(records) == 3
    assert records[0] == Record(str(tmp_path / "a/1.jpg"), "7", ("one", "two"))
    assert records[1] == Record("/abs/2.jpg", "/abs/2.jpg", ("three",))
    assert records[-1] == Record(str(tmp_path / "3.jpg"), "3.jpg", (), "q?", ("x", "y"), 5, "how")
    assert [record.image_id for record in pickle.loads(pickle.dumps(records))][0::2] == [
        "7",
        "3.jpg",
    ]  # to a worker
    with pytest.raises(IndexError):
        records[3]
    rooted = read_records([str(questions)], root=str(tmp_path / "elsewhere"))
    assert rooted[0].image == str(tmp_path / "elsewhere/3.jpg")


def test_split_suffix(tmp_path, caplog):
    rows = [{"image": f"{i}.jpg", "caption": str(i), "split": "train" if i % 2 else "test"} for i in range(5)]
    path = write(tmp_path / "a.jsonl", *rows)
    assert [record.captions for record in read_records([path + ":train"])] == [("1",), ("3",)]
    assert len(read_records([path])) == 5
    assert "SOURCE:NAME" in caplog.text
    with pytest.raises(ValueError, match="no record with split 'val'"):
        read_records([path + ":val"])


def test_pictures_inside_parquet(tmp_path):
    files = [io.BytesIO(), io.BytesIO()]
    for number, file in enumerate(files):
        noise(9, 9, seed=number).save(file, "PNG")
    images = [{"bytes": file.getvalue(), "path": None} for file in files]
    table = datasets.Dataset.from_dict({"image": images, "caption": ["a", "b"]})
    table.to_parquet(tmp_path / "plain.parquet")
    table.cast_column("image", datasets.Image()).to_parquet(tmp_path / "typed.parquet")
    for name in ("plain.parquet", "typed.parquet"):
        records = read_records([str(tmp_path / name)])
        assert records[1].image == f"{tmp_path / name}#1"
        assert records[0].image_id != records[1].image_id
        assert np.array_equal(load_image(records[1]), noise(9, 9, seed=1))
    dicts = write(tmp_path / "d.jsonl", {"image": {"path": "x.jpg"}, "caption": "a"})
    assert read_records([dicts])[0].image == str(tmp_path / "x.jpg")
    with pytest.raises(ValueError, match="leaves its root"):
        read_records([write(tmp_path / "e.jsonl", {"image": {"path": "../x.jpg"}, "caption": "a"})])


GOOD = {"image": "a.jpg", "caption": "x"}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "data.train: .*a.jsonl holds no records"),
        ([GOOD, {"caption": "y"}], r"a.jsonl: record 1 \(from 0\) has no 'image'"),
        ([GOOD, {"image": "", "caption": "y"}], r"record 1 \(from 0\) has no 'image'"),
        ([{"image": "b.jpg", "caption": None}, {"image": "c.jpg", "question": None}], "neither a field 'caption' nor"),
        ([{"img": "a.jpg", "caption": "x"}], "a.jsonl has no field 'image'; did you mean 'img'"),
        ([{"image_path": "a.jpg", "caption": "x"}], "no field 'image'; did you mean 'image_path'"),
        ([{"image": "a.jpg", "captions": "x"}], "neither a field 'caption' nor 'question'; did you mean 'captions'"),
        ([{"image": "a.jpg", "question": "x", "answer": "y"}], "no field 'answers'; did you mean 'answer'"),
        ([{"image": "a.jpg", "caption": 3}], "field 'caption' is Value.*int64"),
        ([{"image": "a.jpg", "question": "q", "answers": [{"text": "y"}]}], "field 'answers' is .*list of strings"),
        ([GOOD, {"image": "../b.jpg", "caption": "y"}], r"image '../b.jpg' leaves its root '.*'; move"),
        ([GOOD, {"image": "a/../../b.jpg", "caption": "y"}], "leaves its root"),
        ([{"image": "http://x/b.jpg", "caption": "y"}], "is an address; download it"),
    ],
)
def test_records_refused(tmp_path, rows, message):
    with pytest.raises(ValueError, match=message):
        read_records([write(tmp_path / "a.jsonl", *rows)], key="data.train")


def test_sources_refused(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    for source, message in [
        (str(tmp_path / "no.jsonl"), "data.validation: there is no record file .*no.jsonl"),
        ("a/b/c", "data.validation: there is no record file 'a/b/c'"),
        (str(tmp_path / "a.txt"), "is no record file; expected one that ends in .json, .jsonl, .parquet"),
        ("nobody/nothing:test", "'nobody/nothing' is neither a record file .* nor a hub data set"),
    ]:
        with pytest.raises(ValueError, match=message):
            read_records([source], key="data.validation")
    with pytest.raises(ValueError, match=r"data.train: expected at least one"):
        read_records([], key="data.train")
    (tmp_path / "bad.jsonl").write_text(json.dumps(GOOD) + "\n{oops")
    with pytest.raises(ValueError, match=r"bad.jsonl cannot be read as records: JSON parse error"):
        read_records([str(tmp_path / "bad.jsonl")])
    with pytest.raises(ValueError, match="is absolute; expected a path relative to the root"):
        read_records([write(tmp_path / "a.jsonl", {"image": "/etc/a.jpg", "caption": "x"})], root=str(tmp_path))
    assert len(read_records([write(tmp_path / "b.jsonl", {"image": "a/../b..jpg", "caption": "x"})])) == 1


def test_a_list_after_megabytes_of_strings_is_read(tmp_path):
    # `datasets` fixes the type by the first 10 MB and would hand out the list as its JSON text
    rows = [{"image": "a.jpg", "caption": "x" * 100_000}] * 120
    path = write(tmp_path / "a.jsonl", *rows, {"image": "a.jpg", "caption": ["y", "z"]})
    records = read_records([path])
    assert (len(records), records[120].captions) == (121, ("y", "z"))


# --- order


def test_each_epoch_is_another_permutation():
    order = Order(50, seed=3)
    epochs = [[order.index(epoch, position) for position in range(50)] for epoch in (0, 1)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert epochs[0] != epochs[1]
    assert epochs[0] == [Order(50, seed=3).index(0, position) for position in range(50)]
    assert epochs[0] != [Order(50, seed=4).index(0, position) for position in range(50)]
    with pytest.raises(ValueError, match="seed=-1"):
        Order(5, seed=-1)


def test_order_never_changes():
    # a run of last year must resume today: these numbers may not change, whatever the version of numpy
    assert [Order(8, seed=0).index(1, position) for position in range(8)] == [6, 5, 1, 2, 4, 3, 0, 7]
    assert [Order(8, seed=0, block_records=3).index(1, position) for position in range(8)] == [1, 2, 3, 4, 5, 6, 7, 0]


@pytest.mark.parametrize("n", [3, 4])
def test_every_order_is_as_frequent_as_any_other(n):
    epochs = 6000
    seen = Counter(tuple(Order(n, seed=1).index(epoch, i) for i in range(n)) for epoch in range(epochs))
    expected = epochs / math.factorial(n)
    assert len(seen) == math.factorial(n)
    spread = sum((count - expected) ** 2 / expected for count in seen.values()) / (len(seen) - 1)
    assert spread < 3  # 1 on average; 27 with three rounds at n = 4


def test_neighbours_are_strangers():
    n, order = 1000, Order(1000, seed=0)
    steps = Counter((order.index(e, i + 1) - order.index(e, i)) % n for e in range(20) for i in range(n - 1))
    assert max(steps.values()) < 45  # 20 on average


@pytest.mark.parametrize(("n", "block"), [(50, 7), (48, 8), (5, 100), (9, 1)])
def test_blocks_stay_together(n, block):
    order = Order(n, seed=2, block_records=block)
    starts = set()
    for epoch in range(5):
        found = [order.index(epoch, position) for position in range(n)]
        assert sorted(found) == list(range(n))
        jumps = [i for i in range(1, n) if found[i] != (found[i - 1] + 1) % n]
        assert all(i % block == 0 for i in jumps)
        starts.add(found[0])
    assert len(starts) > 1
    with pytest.raises(ValueError, match="block_records=0"):
        Order(n, 2, 0)


def take(count, order, **options):
    return list(itertools.islice(iter(GlobalBatches(order, **options)), count))


@pytest.mark.parametrize("n", [3, 24, 50])  # n < G, n = G, neither a multiple nor a divisor
def test_ranks_share_one_stream(n):
    one = take(6, Order(n, 1), world_size=1, rank=0, micro_batch_size=8)
    ranks = [take(6, Order(n, 1), world_size=4, rank=r, micro_batch_size=2) for r in range(4)]
    assert [list(itertools.chain(*micro_batches)) for micro_batches in zip(*ranks, strict=True)] == one
    stream = list(itertools.chain(*one))
    assert [(draw.epoch, draw.position) for draw in stream] == [divmod(i, n) for i in range(48)]
    for epoch in range(48 // n):
        assert sorted(draw.index for draw in stream if draw.epoch == epoch) == list(range(n))


def stream_of(order, world, micro, count, first=0):
    """What all ranks read, in the order of the stream."""
    ranks = [take(count // (world * micro), order, world_size=world, rank=r, micro_batch_size=micro, first=first)
             for r in range(world)]  # fmt: skip
    return list(itertools.chain.from_iterable(itertools.chain(*step) for step in zip(*ranks, strict=True)))


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize(
    "order", [Order(90, 3), Order(90, 3, 8), Mixture([60, 30], [1, 1], 3)], ids=["", "blocks", "mix"]
)
def test_any_number_of_ranks_goes_on_where_two_stopped(world, order):
    before = stream_of(order, 2, 6, 36)  # three steps of 12
    after = stream_of(order, world, 3, 144, first=36)
    assert before + after == [order.draw(i) for i in range(180)]
    if isinstance(order, Order):
        assert sorted(draw.index for draw in (before + after)[:90]) == list(range(90))
    else:  # in epochs of their own: the second source twice as often
        small = [draw.index for draw in before + after if draw.index >= 60]
        assert sorted(small) == sorted([*range(60, 90)] * 3)


def test_sources_are_mixed_by_weight():
    order = build_order([1000, 10, 500], 5, weights=[3, 1, 4])
    drawn = [order.draw(i) for i in range(2000)]
    source = [0 if d.index < 1000 else 1 if d.index < 1010 else 2 for d in drawn]
    assert [source.count(k) for k in range(3)] == [750, 250, 1000]
    for start in range(0, 2000, 40):  # every batch, not only on average
        found = Counter(source[start : start + 40])
        assert [abs(found[k] - expected) <= 1 for k, expected in enumerate((15, 5, 20))] == [True] * 3
    for epoch in range(25):
        assert sorted(d.index for d in drawn if 1000 <= d.index < 1010 and d.epoch == epoch) == list(range(1000, 1010))
    assert len({(d.epoch, d.position) for d in drawn}) == 2000  # so that each has an augmentation of its own
    thirds = build_order([7, 7, 7], 0, weights=[1, 1, 1])
    counts = Counter(thirds.draw(i).index // 7 for i in range(30_000))
    assert max(counts.values()) - min(counts.values()) <= 3


@pytest.mark.parametrize(
    ("weights", "message"),
    [([1], "expected one weight for each"), ([1, 0], "above 0"), ([1, 1e-6], "leave its source out"),
     ([1, float("inf")], "above 0")],
)  # fmt: skip
def test_weights_refused(weights, message):
    with pytest.raises(ValueError, match=rf"data.weights: .*{message}"):
        build_order([5, 5], 0, weights)


# --- transforms


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [(40, 23), (8, 8), (3, 5)])
def test_evaluation_transform_is_torchvisions(interpolation, size):
    mode = tv.InterpolationMode[interpolation.upper()]
    expected = tv.Compose([tv.Resize((8, 8), mode), tv.ToTensor(), tv.Normalize(MEAN, STD)])(noise(*size))
    pixels = ImageTransform(8, MEAN, STD, interpolation).apply(noise(*size))
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, rtol=0, atol=1e-6)


def test_augmentation_follows_its_generator():
    image = noise(40, 30)
    draws = [TRANSFORM.apply(image, np.random.default_rng(seed)) for seed in (1, 1, 2)]
    assert draws[0].shape == (3, 8, 8)
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])


def test_flip_and_crop_are_options():
    image = noise(8, 8)
    whole = ImageTransform(8, MEAN, STD, crop_scale=(1.0, 1.0), flip=False)
    mirrored = ImageTransform(8, MEAN, STD, crop_scale=(1.0, 1.0), flip=True)
    plain = whole.apply(image)
    seen = [mirrored.apply(image, np.random.default_rng(seed)) for seed in range(20)]
    assert any(torch.equal(pixels, plain.flip(2)) for pixels in seen)
    for width, height in [(1, 1), (300, 1), (1, 300)]:  # no crop fits: the centre
        assert TRANSFORM.apply(noise(width, height), np.random.default_rng(0)).isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0"),
        ({"interpolation": "cubic"}, "'cubic': expected one of bicubic, bilinear"),
        ({"crop_scale": (0.5, 1.5)}, "crop_scale"),
    ],
)
def test_transform_options_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ImageTransform(**{"size": 8, "mean": MEAN, "std": STD, **options})


def test_pictures_of_every_kind(tmp_path):
    rgb = noise(6, 4)
    assert np.array_equal(load_image(record_of(rgb, tmp_path)), rgb)

    grey = noise(6, 4, channels=1)
    assert np.array_equal(np.asarray(load_image(record_of(grey, tmp_path)))[..., 2], grey)

    cmyk = load_image(record_of(Image.new("CMYK", (4, 4), (0, 255, 255, 0)), tmp_path, "a.jpg"))
    assert cmyk.mode == "RGB"
    assert np.abs(np.asarray(cmyk).astype(int) - (255, 0, 0)).max() < 8

    deep = Image.fromarray(np.array([[0, 257, 32896, 65535]], dtype=np.uint16))
    for name in ("a.png", "a.tif"):
        levels = np.asarray(load_image(record_of(deep, tmp_path, name)))
        assert levels.tolist() == [[[v] * 3 for v in (0, 1, 128, 255)]]

    glass = Image.new("RGBA", (2, 2), (255, 0, 0, 0))
    glass.putpixel((0, 0), (255, 0, 0, 255))
    image = load_image(record_of(glass, tmp_path))
    assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == ((255, 0, 0), (255, 255, 255))
    palette = glass.quantize()
    image = load_image(record_of(palette, tmp_path))
    assert (image.getpixel((0, 0)), image.getpixel((1, 1))) == ((255, 0, 0), (255, 255, 255))

    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees clockwise
    turned = load_image(record_of(rgb, tmp_path, exif=exif))
    assert np.array_equal(turned, rgb.transpose(Image.Transpose.ROTATE_270))

    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    gif = record_of(frames[0], tmp_path, "a.gif", save_all=True, append_images=frames[1:])
    assert load_image(gif).getpixel((0, 0)) == (255, 0, 0)

    with pytest.raises(BrokenRecord, match="floating-point pixels"):
        load_image(record_of(Image.new("F", (2, 2), 0.5), tmp_path, "f.tif"))
    assert to_rgb(grey).mode == "RGB"


def broken_pictures(tmp_path):
    noise(50, 50).save(tmp_path / "whole.jpg")
    (tmp_path / "truncated.jpg").write_bytes((tmp_path / "whole.jpg").read_bytes()[:-900])
    (tmp_path / "empty.jpg").write_bytes(b"")
    noise(50, 50).save(tmp_path / "bomb.png")
    (tmp_path / "text.png").write_text("hello")
    names = ["truncated.jpg", "empty.jpg", "missing.jpg", "bomb.png", "text.png", "."]
    return [Record(str(tmp_path / name), name, ("broken",)) for name in names]


# twice the limit is an error of Pillow, between once and twice only a warning: both are refused
@pytest.mark.parametrize("limit", [1000, 2000])
def test_broken_pictures_say_why(tmp_path, monkeypatch, limit):
    records = broken_pictures(tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    reasons = ["truncated|Bomb", "Unidentified", "FileNotFound", "Bomb", "Unidentified", "IsADirectory"]
    for record, reason in zip(records, reasons, strict=True):
        with pytest.raises(BrokenRecord, match=reason) as caught:
            load_image(record)
        assert caught.value.image == record.image
    assert str(caught.value) == f"{caught.value.image}: {caught.value.reason}"


def test_features(tmp_path):
    tokens = torch.randn(5, 4)
    np.save(tmp_path / "a.npy", tokens.numpy())
    np.save(tmp_path / "swapped.npy", tokens.numpy().astype(">f4"))
    save_file({"x": tokens.bfloat16()}, tmp_path / "a.safetensors")
    assert torch.equal(load_features(str(tmp_path / "a.npy")), tokens)
    assert torch.equal(load_features(str(tmp_path / "swapped.npy")), tokens)
    assert torch.equal(load_features(str(tmp_path / "a.safetensors")), tokens.bfloat16().float())

    np.save(tmp_path / "nan.npy", np.full((2, 2), np.nan))
    np.save(tmp_path / "flat.npy", np.zeros(3, np.float32))
    np.save(tmp_path / "none.npy", np.zeros((0, 3), np.float32))
    np.save(tmp_path / "whole.npy", np.zeros((2, 3), np.int64))
    np.save(tmp_path / "pickle.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "bad.safetensors").write_bytes(b"abc")
    save_file({"x": tokens, "y": tokens.clone()}, tmp_path / "two.safetensors")
    for name, reason in [
        ("nan.npy", "NaN"),
        ("flat.npy", r"float32\[3\]; expected float\[N, Dv\]"),
        ("none.npy", r"float32\[0, 3\]"),
        ("whole.npy", "int64"),
        ("pickle.npy", "Object arrays cannot be loaded"),
        ("empty.npy", "EOFError"),
        ("bad.safetensors", "header"),
        ("two.safetensors", "2 tensors"),
        ("missing.npy", "FileNotFound"),
        ("a.bin", "expected .npy or .safetensors"),
    ]:
        with pytest.raises(BrokenRecord, match=reason):
            load_features(str(tmp_path / name))


# --- captions


def test_captions_are_written_as_blip2_does():
    assert clean_caption('  A "Dog" (brown).\nRuns: fast!~ #1; *ok*\t') == "a dog brown runs fast 1 ok"
    assert clean_caption("it's a dog-house, isn't it?") == "it's a dog-house, isn't it?"
    assert clean_caption("w " * 60).count("w") == 50
    assert clean_caption("a b c", max_words=2) == "a b"
    assert clean_question('What\x00is "U.S.A."?') == "what is usa?"
    assert clean_question("w " * 60).count("w") == 50


# --- loading


@pytest.fixture
def mixed(tmp_path):
    """Twelve good records between six broken ones (five where the limit of pixels is Pillow's own)."""
    good = []
    for number in range(12):
        noise(20, 16, seed=number).save(tmp_path / f"{number}.png")
        good.append(Record(str(tmp_path / f"{number}.png"), str(number), (f"A {number}.", f"B {number}.")))
    return [record for pair in zip(good[:6], broken_pictures(tmp_path), strict=True) for record in pair] + good[6:]


def training_set(records, **options):
    defaults = {"seed": 5, "augment": True, "text": "caption"}
    return RecordDataset(records, TRANSFORM, **{**defaults, **options})


def batches_of(records, workers, count, first_step=0):
    batches = GlobalBatches(Order(len(records), 5), 1, 0, 6, first=first_step * 6)
    return list(itertools.islice(training_loader(training_set(records), batches, workers), count))


def same(a, b):
    fields = ("texts", "image_ids", "captions", "dropped")
    return torch.equal(a.images, b.images) and all(getattr(a, name) == getattr(b, name) for name in fields)


def test_broken_records_are_replaced_counted_and_told_once(mixed, caplog, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with caplog.at_level(logging.WARNING):
        batches = batches_of(mixed, 0, 9)  # three epochs
    assert all(len(batch) == 6 and batch.images.shape == (6, 3, 8, 8) for batch in batches)
    assert all(not text.startswith("broken") for batch in batches for text in batch.texts)
    reasons = [reason for batch in batches for reason in batch.dropped]
    assert len(reasons) >= 3 * 6
    told = [line.getMessage() for line in caplog.records if "broken record" in line.getMessage()]
    assert len(told) == len(set(told)) == 6


def test_workers_and_resume_change_nothing(mixed):
    expected = batches_of(mixed, 0, 8)
    state = torch.get_rng_state()
    assert all(same(a, b) for a, b in zip(batches_of(mixed, 2, 8), expected, strict=True))
    assert all(same(a, b) for a, b in zip(batches_of(mixed, 2, 3, first_step=5), expected[5:], strict=True))
    assert torch.equal(torch.get_rng_state(), state)


def test_augmentation_and_caption_depend_on_the_position_alone(mixed):
    dataset = training_set(mixed)
    first, again = dataset[Draw(0, 0, 3)], dataset[Draw(0, 0, 3)]
    assert torch.equal(first.image, again.image)
    assert first.text == again.text
    other = [dataset[Draw(0, epoch, 3)] for epoch in range(1, 9)]
    assert {sample.text for sample in other} == {"a 0", "b 0"}
    assert not any(torch.equal(first.image, sample.image) for sample in other)
    plain = training_set(mixed, augment=False)
    assert torch.equal(plain[Draw(0, 0, 3)].image, plain[Draw(0, 1, 7)].image)


def test_only_broken_records_end_the_run(tmp_path):
    record = Record(str(tmp_path / "gone.jpg"), "x", ("x",))
    with pytest.raises(ValueError, match=r"20 records in a row are broken, the last: .*gone.jpg: FileNotFound"):
        training_set([record])[Draw(0, 0, 0)]


def test_questions(tmp_path):
    noise(9, 9).save(tmp_path / "a.png")
    image = str(tmp_path / "a.png")
    records = [Record(image, "a", (), "What Is it?", ("Dog",), "3", "what"), Record(image, "a", (), "Where?")]
    batch = collate([training_set(records, text="question")[Draw(0, 0, 0)]])
    assert (batch.texts, batch.questions, batch.answers) == (["what is it?"], ["What Is it?"], [("Dog",)])
    assert (batch.question_ids, batch.question_types) == (["3"], ["what"])
    assert "no answers" in training_set(records, text="question")[Draw(1, 0, 0)].dropped[0]
    asked = training_set(records, text="question", cleaning="none", augment=False, in_order=True)
    assert asked[1].text == "Where?"  # a test set without answers can be asked
    assert "no caption" in training_set(records, augment=False, in_order=True)[0].dropped[0]
    with pytest.raises(ValueError, match="text='answer': expected one of caption, question"):
        training_set(records, text="answer")


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_reads_every_record_once_across_ranks(mixed, workers):
    dataset = training_set(mixed, augment=False, in_order=True)
    seen, dropped = [], []
    for rank in range(2):
        for batch in evaluation_loader(dataset, 4, workers, rank=rank, world_size=2):
            seen += batch.image_ids
            dropped += batch.dropped
            assert len(batch) == len(batch.images)
    assert len(dropped) == 5
    assert sorted(seen) == sorted([str(number) for number in range(12)] + ["bomb.png"])
    assert [batch.image_ids for batch in evaluation_loader(dataset, 4, 0, limit=3)] == [["0", "1"]]
    assert len(collate([dataset[1]])) == 0


def test_features_are_padded_and_masked(tmp_path):
    records = []
    for length in (2, 5):
        np.save(tmp_path / f"{length}.npy", np.full((length, 4), length, np.float16))
        records.append(Record(str(tmp_path / f"{length}.npy"), str(length), ("x",)))
    dataset = RecordDataset(records, None, seed=0, augment=False, text="caption", in_order=True)
    batch = next(iter(evaluation_loader(dataset, 2, 0)))
    assert batch.images.shape == (2, 5, 4)
    assert batch.image_mask.tolist() == [[True, True, False, False, False], [True] * 5]
    assert batch.images[0, :, 0].tolist() == [2, 2, 0, 0, 0]
    moved = batch.to("meta", non_blocking=True)
    assert moved.images.is_meta
    assert moved.image_mask.is_meta
    np.save(tmp_path / "5.npy", np.zeros((5, 3), np.float32))
    with pytest.raises(ValueError, match=r"widths \[3, 4\] in one batch"):
        collate([dataset[0], dataset[1]])
