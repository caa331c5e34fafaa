"""The feature cache: what is trained from it is what is trained without it, and what is written is written whole."""

import itertools
import json
import pickle
import random
import runpy
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import FEATURE_WIDTH, IMAGE_SIDE, WIDTH, Tiny, draw_scene

import qformer
from qformer.build import build_dataset, build_stage1
from qformer.checkpoint import read_adapter
from qformer.config import EncoderConfig, Stage1Config, load_config
from qformer.data import (
    BrokenRecord,
    CacheWriter,
    Draw,
    FeatureCache,
    GlobalBatches,
    ImageTransform,
    Order,
    RecordDataset,
    caching,
    collate,
    load_image,
    read_records,
    training_loader,
)
from qformer.data.cache import picture_key, quantize
from qformer.data.caching import CROPS
from qformer.encoders import load_encoder
from qformer.log import TIMING_FIELDS

REPO = Path(__file__).resolve().parent.parent
STAGE = REPO / "stages" / "cache_features.py"
EXACT = ["--dtype", "float32", "--shard-mb", "0.003"]  # 5 tokens of 32 in float32: 4 pictures a shard
PLAIN = ["data.augment=false", "qformer.dropout=0", "data.max_dropped_fraction=1"]


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Eleven pictures with two captions each, no image_id; one is broken, one is named twice."""
    folder, rng = tmp_path_factory.mktemp("pictures"), random.Random(3)
    lines = []
    for i in range(11):
        picture, captions = draw_scene(rng)
        picture.resize((IMAGE_SIDE + 8, IMAGE_SIDE)).save(folder / f"{i:02d}.png")
        lines.append({"image": f"{i:02d}.png", "caption": captions})
    (folder / "04.png").write_bytes((folder / "04.png").read_bytes()[:60])
    lines.append({"image": "02.png", "caption": ["a photo of one square"]})
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "records.jsonl"


def run_stage(stage: int | str, arguments: list[str]) -> None:
    runpy.run_path(str(REPO / "stages" / f"{stage if isinstance(stage, str) else f'stage{stage}'}.py"))["main"](
        arguments
    )


def write_cache(*arguments: str) -> None:
    run_stage("cache_features", [*arguments, "train.cpu=true", "data.workers=0"])


def over(pictures: Path, cache: Path | None = None) -> list[str]:
    """What stands behind a stage's arguments to make it read these pictures, through a cache or not."""
    return [f"data.train=[{pictures}]", f"data.validation=[{pictures}]", *([f"data.features={cache}"] if cache else [])]


def shards(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def said(capsys, stage, arguments: list[str]) -> str:
    """What a stage says when it refuses, with exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_stage(stage, arguments)
    assert stopped.value.code == 2
    return capsys.readouterr().err


def losses(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING_FIELDS and isinstance(v, float | int)} for line in lines]


@pytest.fixture(scope="module")
def cache(tiny: Tiny, pictures, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("caches") / "float32"
    write_cache(*tiny.stage1(Path("unused"), *over(pictures, folder)), *EXACT)
    return folder


# ---- training from it ----


@pytest.mark.parametrize("stage", [1, 2])
def test_the_loss_curve_is_that_without_a_cache(tiny, pictures, cache, tmp_path, stage):
    arguments = tiny.stage1 if stage == 1 else tiny.stage2
    more = [*PLAIN, "train.max_steps=4"]
    run_stage(stage, arguments(tmp_path / "live", *over(pictures), *more))
    run_stage(stage, arguments(tmp_path / "cached", *over(pictures, cache), *more))
    live, cached = losses(tmp_path / "live"), losses(tmp_path / "cached")
    assert len(live) == len(cached) >= 4
    assert live[-2]["dropped"] == cached[-2]["dropped"] > 0
    for a, b in zip(live, cached, strict=True):
        assert a.keys() == b.keys()
        assert all(b[name] == pytest.approx(a[name], rel=1e-6, abs=1e-6) for name in a), (a, b)
    before, after = (read_adapter(tmp_path / name / "adapter") for name in ("live", "cached"))
    assert all(torch.allclose(before[name], after[name], atol=1e-5) for name in before)


@pytest.mark.parametrize(("dtype", "tolerance"), [("bfloat16", 0.01), ("int8", 0.02)])
def test_a_coarser_cache_trains_nearly_the_same(tiny, pictures, cache, tmp_path, dtype, tolerance):
    write_cache(*tiny.stage1(tmp_path, *over(pictures, tmp_path / "cache")), "--dtype", dtype)
    for name, folder in (("exact", cache), ("coarse", tmp_path / "cache")):
        run_stage(1, tiny.stage1(tmp_path / name, *over(pictures, folder), *PLAIN, "train.max_steps=2"))
    for a, b in zip(losses(tmp_path / "exact"), losses(tmp_path / "coarse"), strict=True):
        assert all(b[name] == pytest.approx(a[name], rel=tolerance) for name in ("itc", "itm", "itg") if name in a)
    sizes = [sum(p.stat().st_size for p in c.glob("shard*")) for c in (cache, tmp_path / "cache")]
    assert sizes[1] < sizes[0]


def test_the_encoder_is_never_built_and_an_adapter_of_a_cache_takes_pictures(tiny, pictures, cache, tmp_path):
    away = tmp_path / "vit"
    shutil.move(tiny.encoder.removeprefix("local-dir:"), away)
    try:
        run_stage(1, tiny.stage1(tmp_path / "s1", *over(pictures, cache), *PLAIN))
    finally:
        shutil.move(away, tiny.encoder.removeprefix("local-dir:"))
    model = qformer.load(tmp_path / "s1" / "adapter", device="cpu")
    first = str(pictures.parent / "00.png")
    assert model.embed_image([first]).shape == (1, 4, 16)
    torch.testing.assert_close(
        model.encode([first]).tokens[0], FeatureCache(cache).read("00.png"), rtol=1e-5, atol=1e-6
    )


def test_crops_are_drawn_as_augmentation_is(tiny, pictures, cache, tmp_path):
    arguments = [*tiny.stage1(tmp_path / "s1", *over(pictures, tmp_path / "cache")), "train.seed=7"]
    write_cache(*arguments, *EXACT, "--crops", "3")
    cropped, records = FeatureCache(tmp_path / "cache"), read_records([str(pictures)])
    encoder = load_encoder(EncoderConfig("open_clip", tiny.encoder))
    given = encoder.input_transform
    transform = ImageTransform(given.size, given.mean, given.std, given.interpolation, crop_scale=(0.5, 1.0))
    record = records[1]
    views = [cropped.read(record.image_id, view) for view in range(4)]
    assert torch.allclose(views[0], FeatureCache(cache).read(record.image_id), atol=1e-5)
    for crop in range(3):
        rng = np.random.default_rng([7, CROPS, picture_key(record.image_id) % 2**64, crop])
        expected = encoder(transform.apply(load_image(record), rng)[None]).tokens[0]
        assert torch.allclose(views[1 + crop], expected, atol=1e-5)
    dataset = RecordDataset(records, None, seed=3, augment=True, text="caption", features=cropped)
    seen = [dataset[Draw(1, epoch, 0)].image for epoch in range(30)]
    which = [[torch.equal(image, view) for view in views].index(True) for image in seen]
    assert set(which) == {1, 2, 3}
    again = [dataset[Draw(1, epoch, 0)].image for epoch in range(30)]
    assert all(torch.equal(a, b) for a, b in zip(seen, again, strict=True))
    run_stage(1, [*arguments, "data.augment=true"])


def test_a_mismatch_is_shown_line_by_line(tiny, pictures, cache, tmp_path, capsys):
    wrong = said(
        capsys, 1, [*tiny.stage1(tmp_path, *over(pictures, cache)), "encoder.block=-1", "encoder.dtype=bfloat16"]
    )
    assert "encoder.block: the cache has -2, expected -1" in wrong
    assert "encoder.dtype: the cache has float32, expected bfloat16" in wrong
    assert "data.augment: the cache has no random crops" in wrong
    assert "encoder.image_size" not in wrong
    same = [*tiny.stage1(tmp_path / "s", *over(pictures, cache), *PLAIN), f"encoder.image_size={IMAGE_SIDE}"]
    run_stage(1, [*same, "train.max_steps=1"])
    (tmp_path / "cache").mkdir()
    assert "is no feature cache" in said(capsys, 1, tiny.stage1(tmp_path, *over(pictures, tmp_path / "cache"), *PLAIN))
    others = said(capsys, 1, [*tiny.stage1(tmp_path, *PLAIN, f"data.features={cache}")])  # tiny's own records
    assert "data.train: 23 of 23 images looked up are not in data.features" in others
    again = said(
        capsys, "cache_features", [*tiny.stage1(tmp_path, *over(pictures, cache)), "--crops", "1", "train.seed=5"]
    )
    assert "holds another cache" in again
    typo = said(capsys, "cache_features", [*tiny.stage2(tmp_path, *over(pictures, cache)), "data.feature=x"])
    assert typo.startswith("config error: unknown key data.feature")
    assert typo.count("\n") == 1
    assert "features.dtype: the cache has float32, expected bfloat16" in again
    assert "crops.count: the cache has 0, expected 1" in again


# ---- writing it ----


def test_a_broken_picture_is_counted_and_absent(pictures, cache):
    found = FeatureCache(cache)
    broken = "04.png"  # relative to the folder of the records
    assert len(found) == 10
    assert list(found.broken) == [broken]
    assert broken not in found
    with pytest.raises(BrokenRecord, match=r"04.png: .*(truncated|Truncated|OSError)"):
        found.read(broken)
    with pytest.raises(BrokenRecord, match="elsewhere: not in the feature cache"):
        found.read("elsewhere")
    manifest = json.loads((cache / "manifest.json").read_text())
    assert manifest["encoder"]["block"] == -2
    assert manifest["transform"] == {"size": 32, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    assert manifest["features"] == {"dtype": "float32", "width": WIDTH, "num_tokens": 5}
    assert manifest["versions"]["torch"] == torch.__version__.split("+")[0]
    assert manifest["shards"] == {"count": 3, "pictures": 4}
    assert not list(cache.glob(".*"))
    assert len({path.stat().st_mode for path in cache.iterdir()}) == 1  # whoever may read the manifest may read all


def test_the_layout_is_as_documented(cache, pictures):
    tensors = load_file(cache / "shard-00001.safetensors")
    assert sorted(tensors) == ["ends", "tokens"]
    assert tensors["ends"].tolist() == [5, 10, 15]  # 05, 06, 07
    assert torch.equal(tensors["tokens"][5:10], FeatureCache(cache).read("06.png"))
    index = load_file(cache / "index.safetensors")
    assert index["keys"].tolist() == sorted(index["keys"].tolist())
    assert index["bounds"].shape == (10, 2)


def test_a_finished_cache_stays_as_it_is_whichever_stage_asks(tiny, pictures, cache):
    before, times = shards(cache), [path.stat().st_mtime_ns for path in sorted(cache.glob("shard*"))]
    write_cache(*tiny.stage2(Path("unused"), *over(pictures, cache)), *EXACT)
    assert shards(cache) == before
    assert [path.stat().st_mtime_ns for path in sorted(cache.glob("shard*"))] == times


def test_a_kill_in_the_middle_and_the_rest_is_the_same_bytes(tiny, pictures, cache, tmp_path, monkeypatch, capsys):
    arguments = [*tiny.stage1(tmp_path, *over(pictures, tmp_path / "cache")), *EXACT]
    code = (
        "import os, runpy, sys; from qformer.data import caching; before = caching._Shard.save; count = []\n"
        "def save(self, path):\n"
        "    before(self, path); count.append(1)\n"
        "    if len(count) == 2: path.write_bytes(path.read_bytes()[:500]); os.kill(os.getpid(), 9)\n"
        "caching._Shard.save = save; sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(STAGE), *arguments], capture_output=True, timeout=600)
    assert done.returncode == -signal.SIGKILL
    left = sorted(path.name for path in (tmp_path / "cache").iterdir())
    assert left[0].startswith(".shard-00001.safetensors.")
    assert left[1:] == ["manifest.json", "shard-00000.safetensors"]
    with pytest.raises(
        ValueError, match=r"unfinished, 1 of 3 shards are there; run stages/cache_features.py once more"
    ):
        FeatureCache(tmp_path / "cache")
    first = (tmp_path / "cache" / "shard-00000.safetensors").stat().st_mtime_ns
    write_cache(*arguments)
    assert shards(tmp_path / "cache") == shards(cache)
    assert (tmp_path / "cache" / "shard-00000.safetensors").stat().st_mtime_ns == first


def test_two_processes_write_the_same_cache(tiny, pictures, cache, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    done = subprocess.run(
        [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
         "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", str(port), str(STAGE),
         *tiny.stage1(tmp_path, *over(pictures, tmp_path / "cache")), *EXACT],
        capture_output=True, text=True, timeout=600, cwd=REPO,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "; 4 by this process" in done.stdout or "; 7 by this process" in done.stdout, done.stdout
    assert shards(tmp_path / "cache") == shards(cache)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(tiny, pictures, tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=7000))
    arguments = [*tiny.stage1(tmp_path, *over(pictures, tmp_path / "cache")), *EXACT]
    assert "needs 7.18e-06 GB more, but its disk has 7e-06 GB free" in said(capsys, "cache_features", arguments)
    assert not (tmp_path / "cache").exists()


def test_a_disk_that_fills_up_leaves_whole_shards_only(tiny, pictures, cache, tmp_path, monkeypatch, capsys):
    before = caching.save_file

    def fill(tensors, path, metadata):
        before(tensors, path, metadata)
        if "00001" in path.name:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(caching, "save_file", fill)
    arguments = [*tiny.stage1(tmp_path, *over(pictures, tmp_path / "cache")), *EXACT]
    assert "No space left" in said(capsys, "cache_features", arguments)
    assert sorted(p.name for p in (tmp_path / "cache").iterdir()) == ["manifest.json", "shard-00000.safetensors"]
    monkeypatch.undo()
    write_cache(*arguments)
    assert shards(tmp_path / "cache") == shards(cache)


def test_keys_may_lie_further_apart_than_a_number_can_say(tiny, tmp_path):
    ids = sorted(map(str, range(100)), key=picture_key)
    ids = [ids[0], ids[-1]]
    assert picture_key(ids[1]) - picture_key(ids[0]) > 2**63
    records = []
    for image_id in ids:
        picture, captions = draw_scene(random.Random(image_id))
        picture.save(tmp_path / f"{image_id}.png")
        records.append({"image": f"{image_id}.png", "caption": captions, "image_id": image_id})
    (tmp_path / "records.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    write_cache(*tiny.stage1(Path("unused"), *over(tmp_path / "records.jsonl", tmp_path / "cache")), *EXACT)
    found = FeatureCache(tmp_path / "cache")
    assert all(image_id in found for image_id in ids)


def test_damage_is_told(cache, pictures, tmp_path):
    broken = shutil.copytree(cache, tmp_path / "cache")
    path = broken / "shard-00000.safetensors"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(ValueError, match=r"shard-00000.safetensors of the feature cache is damaged"):
        FeatureCache(broken).read("00.png")
    opened = FeatureCache(broken)
    path.unlink()
    with pytest.raises(ValueError, match=r"shard-00000.safetensors of the feature cache cannot be opened"):
        opened.read("00.png")
    with pytest.raises(ValueError, match=r"2 of 3 shards are there; run stages/cache_features.py once more"):
        FeatureCache(broken)


def test_one_image_id_of_two_files_is_refused(tiny, tmp_path, capsys):
    lines = said(capsys, "cache_features", tiny.stage1(tmp_path, f"data.features={tmp_path / 'cache'}"))
    assert "image_id 'picture 22' is that of" in lines
    assert not (tmp_path / "cache").exists()


def test_scales_keep_the_error_small():
    torch.manual_seed(0)
    tame = torch.randn(64, 256) * torch.rand(64, 1) * 100  # tokens of very different sizes
    wild = tame * torch.cat([torch.tensor([100.0]), torch.ones(255)])  # one channel towers over the others
    error = {}
    for name, tokens in (("tame", tame), ("wild", wild)):
        values, scales = quantize(tokens, "int8")
        back = values.float() * scales[:, None]
        error[name] = float(((back - tokens)[:, 1:].norm(dim=1) / tokens[:, 1:].norm(dim=1)).max())
        assert ((back - tokens).abs() <= tokens.abs().amax(1, keepdim=True) / 254 * 1.001).all()
    assert error["tame"] < 0.012
    assert error["wild"] > 0.1
    assert (quantize(torch.zeros(2, 4), "int8")[0] == 0).all()


# ---- features of any length ----


def write_arrays(folder: Path, count: int, longest: int, width: int) -> Path:
    folder.mkdir()
    rng = np.random.default_rng(0)
    lines = []
    for i in range(count):
        np.save(folder / f"{i}.npy", rng.standard_normal((rng.integers(1, longest + 1), width)).astype(np.float32))
        lines.append({"image": f"{i}.npy", "caption": "a red square", "image_id": f"signal {i}"})
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "records.jsonl"


def synthetic(folder: Path, count: int, longest: int, width: int, dtype: str = "float32", shard_bytes: float = 1e6):
    records = read_records([str(write_arrays(folder / "arrays", count, longest, width))])
    encoder = load_encoder(EncoderConfig("features", "", width=width))
    options = {"width": width, "num_tokens": None, "dtype": dtype, "shard_bytes": shard_bytes}
    writer = CacheWriter(
        folder / "cache", records, ["arrays"], encoder={"loader": "features"}, transform=None, **options
    )
    writer.begin()
    assert sum(writer.write(encoder, "cpu", batch_size=16, workers=0)) == count
    assert writer.finish().pictures == count
    return records, FeatureCache(folder / "cache")


def test_any_length_comes_back_in_any_order(tmp_path):
    records, found = synthetic(tmp_path, 40, 9, FEATURE_WIDTH, shard_bytes=5000)
    for i in np.random.default_rng(1).permutation(40):
        expected = torch.from_numpy(np.load(records[int(i)].image))
        assert torch.equal(found.read(records[int(i)].image_id), expected)
    copy = pickle.loads(pickle.dumps(found))  # as to a spawned worker
    assert copy.folder == found.folder
    assert torch.equal(copy.read("signal 7"), found.read("signal 7"))


def test_padding_never_changes_a_result(tiny, tmp_path):
    """Features of 3 to 7 rows: the losses of a batch are those of a batch whose padding holds anything."""
    arguments = tiny.stage1(
        tmp_path / "s", *tiny.on_features(), f"data.features={tmp_path / 'cache'}", "qformer.dropout=0"
    )
    write_cache(*arguments, "--dtype", "float32", "--shard-mb", "0.002")
    config = load_config(Stage1Config, arguments)
    model = build_stage1(config).eval()
    dataset = build_dataset(config.data, model.encoder, "train", 0)
    batch = collate([dataset[Draw(i, 0, i)] for i in range(8)])
    assert not batch.image_mask.all()
    wider = torch.full((8, 3, FEATURE_WIDTH), 1e4)
    junk = torch.cat([batch.images.masked_fill(~batch.image_mask[..., None], -1e4), wider], 1)
    mask = torch.cat([batch.image_mask, torch.zeros(8, 3, dtype=torch.bool)], 1)
    outputs = []
    for images, image_mask in ((batch.images, batch.image_mask), (junk, mask)):
        prepared = model.prepare(replace(batch, images=images, image_mask=image_mask), 3)
        outputs.append(model(prepared, torch.tensor(float(prepared.target_tokens))).metrics)
    assert all(torch.allclose(outputs[0][name], outputs[1][name], atol=1e-6) for name in outputs[0]), outputs


def test_reading_keeps_memory_flat(tmp_path):
    """A cache of 50 MB, read three times over in random order: resident memory does not grow by a tenth of it."""
    _, found = synthetic(tmp_path, 200, 240, 512, shard_bytes=4e6)
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("shard*"))
    assert size > 40e6
    order = np.random.default_rng(2)
    for i in order.permutation(200)[:20]:
        found.read(f"signal {i}")
    before = psutil.Process().memory_info().rss
    for _ in range(3):
        for i in order.permutation(200):
            found.read(f"signal {i}")
    assert psutil.Process().memory_info().rss - before < size / 10


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_what_the_main_process_reads(tmp_path, workers):
    records, found = synthetic(tmp_path, 40, 9, FEATURE_WIDTH, "bfloat16", shard_bytes=5000)
    found.read("signal 3")  # open in this process before the others are forked
    dataset = RecordDataset(records, None, seed=0, augment=False, text="caption", features=found)
    loader = training_loader(dataset, GlobalBatches(Order(40, seed=0), 1, 0, 8), workers)
    for batch in itertools.islice(loader, 10):
        assert batch.images.dtype == torch.bfloat16
        for name, image, mask in zip(batch.image_ids, batch.images, batch.image_mask, strict=True):
            assert torch.equal(image[mask], found.read(name))


def test_the_example_turns_arrays_into_a_cache_and_trains(tiny, tmp_path, monkeypatch):
    captions = {"0": "a red square", "1": ["a blue dot", "one dot"], "2": "a dot", "3": "a photo"}
    (tmp_path / "captions.json").write_text(json.dumps(captions))
    write_arrays(tmp_path / "arrays", 4, 9, FEATURE_WIDTH)
    main = runpy.run_path(str(REPO / "examples/arrays/train.py"))["main"]
    # in this process: two more would each import torch
    monkeypatch.setitem(main.__globals__, "run", lambda stage, more: run_stage(stage.removesuffix(".py"), more))
    own = ("encoder.", "data.train", "data.validation", "run.dir")
    settings = [a for a in tiny.stage1(Path("unused")) if not a.startswith(own)]
    settings += ["train.global_batch_size=4", "train.micro_batch_size=4"]
    main([*(str(tmp_path / name) for name in ("arrays", "captions.json", "out")), *settings])
    assert len(FeatureCache(tmp_path / "out/cache")) == 4
    assert all(np.isfinite(line["itc"]) for line in losses(tmp_path / "out/stage1"))
