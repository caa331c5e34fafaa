"""Videos as records: frames uniformly from the clip, in RGB; side by side in stage 1, one after the other in stage 2."""

import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_models import run
from test_stages import refused, stage_main
from tiny import IMAGE_SIDE, WORDS, Tiny, run_stage

import qformer
from qformer.build import build_dataset, build_stage1
from qformer.config import DataConfig, Stage1Config, load_config
from qformer.config.data import FRAME_POLICIES
from qformer.data import BrokenRecord, Draw, FeatureCache, Record, RecordDataset, collate, read_records
from qformer.data.clips import POLICIES, load_frames, measure_clip

av = pytest.importorskip("av", reason="clips need the extra video (PyAV)")

RED, SIDE = (255, 0, 0), 64


def write_clip(path: Path, frames: list[Image.Image], codec: str = "mpeg4") -> Path:
    """A clip of images; mpeg4 is in every build of FFmpeg."""
    with av.open(str(path), "w") as clip:
        stream = clip.add_stream(codec, rate=10)
        stream.width, stream.height = frames[0].size
        stream.pix_fmt = "yuv420p" if codec != "gif" else "rgb8"
        stream.bit_rate = 4_000_000
        for frame in frames:
            clip.mux(stream.encode(av.VideoFrame.from_image(frame)))
        clip.mux(stream.encode())
    return path


def grey(level: int) -> Image.Image:
    return Image.new("RGB", (SIDE, SIDE), (level, level, level))


def levels(frames: list[Image.Image]) -> list[int]:
    """Which of frames of grey 0, 10, 20, ... each is."""
    return [round(float(np.asarray(frame).mean()) / 10) for frame in frames]


def record(path: Path) -> Record:
    return Record(str(path), path.name, clip=True)


@pytest.fixture(scope="module")
def twenty(tmp_path_factory) -> Path:
    return write_clip(tmp_path_factory.mktemp("clips") / "twenty.mp4", [grey(10 * i) for i in range(20)])


@pytest.fixture(scope="module")
def clips(tmp_path_factory) -> Path:
    """Eight clips of 12 frames with captions, beside them a damaged one, and an image."""
    folder = tmp_path_factory.mktemp("records")
    rows = []
    for i in range(8):
        frames = [Image.new("RGB", (IMAGE_SIDE, IMAGE_SIDE), (30 * i, 20 * n, 255 - 20 * n)) for n in range(12)]
        write_clip(folder / f"{i}.mp4", frames)
        rows.append({"image": f"{i}.mp4", "caption": f"a {WORDS[3 + i % 4]} square", "question": "what ?", "question_id": i,
                     "answers": ["red"]})  # fmt: skip
    (folder / "records.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "broken.mp4").write_bytes((folder / "0.mp4").read_bytes()[:200])
    grey(99).save(folder / "image.png")
    more = [{**rows[0], "image": "broken.mp4", "question_id": 8}, {**rows[0], "image": "image.png", "question_id": 9}]
    (folder / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, *more]))
    return folder


def test_frames_are_taken_uniformly_and_by_the_middles(twenty):
    assert levels(load_frames(record(twenty), 4)) == [0, 5, 10, 15]
    assert levels(load_frames(record(twenty), 8)) == [0, 2, 5, 7, 10, 12, 15, 17]
    assert levels(load_frames(record(twenty), 4, "middle")) == [2, 7, 12, 17]
    assert levels(load_frames(record(twenty), 1, "middle")) == [10]
    assert tuple(POLICIES) == FRAME_POLICIES
    defaults = DataConfig(train=[])
    assert (defaults.frames, defaults.frame_policy) == (8, "uniform")


@pytest.mark.parametrize("ending", ["mp4", "avi", "mkv", "mov"])
def test_a_clip_of_pure_red_is_red_and_not_blue(tmp_path, ending):
    """The reference's frames are BGR."""
    clip = write_clip(tmp_path / f"red.{ending}", [Image.new("RGB", (SIDE, SIDE), RED)] * 5)
    for frame in load_frames(record(clip), 3):
        red, green, blue = np.asarray(frame).reshape(-1, 3).mean(0)
        assert red > 240
        assert max(green, blue) < 15


@pytest.mark.parametrize(("ending", "codec"), [("webm", "libvpx"), ("gif", "gif"), ("mp4", "libx264")])
def test_other_codecs_are_read_where_the_build_has_them(tmp_path, ending, codec):
    if codec not in av.codecs_available:
        pytest.skip(f"this FFmpeg has no {codec}")
    clip = write_clip(tmp_path / f"clip.{ending}", [grey(10 * i) for i in range(20)], codec)
    frames = levels(load_frames(record(clip), 4))
    assert frames == pytest.approx([0, 5, 10, 15], abs=1)


def test_a_clip_shorter_than_the_frames_asked_for_gives_each_once(tmp_path):
    assert levels(load_frames(record(write_clip(tmp_path / "one.mp4", [grey(70)])), 8)) == [7]
    assert levels(load_frames(record(write_clip(tmp_path / "two.mp4", [grey(70), grey(120)])), 8)) == [7, 12]


def test_what_is_no_whole_clip_is_a_broken_record(tmp_path, twenty):
    content = twenty.read_bytes()
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "text.mp4").write_text("no video")
    (tmp_path / "cut.mp4").write_bytes(content[: len(content) // 2])
    with av.open(str(tmp_path / "sound.mkv"), "w") as clip:
        stream = clip.add_stream("pcm_s16le", rate=8000)
        sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
        sound.sample_rate = 8000
        clip.mux(stream.encode(sound))
    for name, problem in [
        ("gone.mp4", "No such file"), ("empty.mp4", "."), ("text.mp4", "."), ("cut.mp4", "."), ("sound.mkv", "no video"),
    ]:  # fmt: skip
        with pytest.raises(BrokenRecord, match=problem):
            load_frames(record(tmp_path / name), 4)
    with pytest.raises(BrokenRecord, match=r"64 x 64 pixels are more than 100; set data\.max_pixels"):
        load_frames(record(twenty), 4, max_pixels=100)


def test_a_file_that_ends_before_its_last_frame_is_broken(tmp_path):
    whole = tmp_path / "front.mp4"
    with av.open(str(whole), "w", options={"movflags": "faststart"}) as clip:
        stream = clip.add_stream("mpeg4", rate=10)
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        rng = np.random.default_rng(0)
        for _ in range(20):
            noise = Image.fromarray(rng.integers(0, 255, (SIDE, SIDE, 3), np.uint8))
            clip.mux(stream.encode(av.VideoFrame.from_image(noise)))
        clip.mux(stream.encode())
    whole.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * 0.6)])
    with pytest.raises(BrokenRecord, match=r"ends after \d+ of 20 frames"):
        load_frames(record(whole), 4)


def test_without_pyav_the_error_names_the_extra(twenty, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(ValueError, match=re.escape("pip install 'qformer[video]'")) as error:
        load_frames(record(twenty), 4)
    assert not isinstance(error.value, BrokenRecord)


def test_records_tell_clips_by_ending_field_or_type(tmp_path, clips):
    import datasets

    content = (clips / "0.mp4").read_bytes()
    rows = [
        {"video": "odd.name", "caption": "a"},
        {"image": "x.MP4", "caption": "a"},
        {"image": "x.gif", "caption": "a"},
    ]
    rows.append({"images": ["x.mp4", "x.png"], "caption": "a"})
    (tmp_path / "r.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    records = read_records([str(tmp_path / "r.jsonl")])
    assert [[image.clip for image in records[i].each_image()] for i in range(4)] == [
        [True],
        [True],
        [False],
        [True, False],
    ]
    assert records.clips
    table = datasets.Dataset.from_dict({"video": [{"bytes": content, "path": "0.mp4"}], "caption": ["a"]})
    table.to_parquet(tmp_path / "inside.parquet")
    inside = read_records([str(tmp_path / "inside.parquet")])[0]
    assert (inside.clip, inside.image_bytes) == (True, content)
    with tarfile.open(tmp_path / "some.tar", "w") as tar:
        for name, data in (("0.mp4", content), ("0.txt", b"a red square")):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    packed = read_records([str(tmp_path / "some.tar")])
    assert packed.clips
    assert len(load_frames(packed[0], 4)) == 4
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "0.mp4").write_bytes(content)
    (tmp_path / "folder" / "0.txt").write_text("a red square")
    assert read_records([str(tmp_path / "folder")])[0].clip
    assert not read_records([str(clips / "records.jsonl")])[0].images


def on_clips(clips: Path, *more: str) -> list[str]:
    return [f"data.train=[{clips / 'records.jsonl'}]", "data.validation=[]", "data.frames=4", *more]


@torch.no_grad()
def test_stage_1_reads_the_tokens_of_all_frames_side_by_side(tiny, clips):
    config = load_config(Stage1Config, tiny.stage1(tiny.folder / "x", *on_clips(clips, "data.augment=false")))
    model = build_stage1(config).eval()
    data = build_dataset(config.data, model.encoder, "train", 0)
    batch = collate([data[Draw(i, 0, i)] for i in range(3)])
    assert (len(batch), batch.images.shape[0], batch.image_of.shape) == (3, 12, (3, 4))
    features = model.encode(batch)
    single = model.encoder(batch.images[4:8]).tokens
    assert features.mask is None
    assert torch.equal(features.tokens[1], single.flatten(0, 1))
    mixed = collate([data[Draw(0, 0, 0)], data[Draw(1, 0, 1)]._replace(images=(), image_keys=())])
    short = model.encode(mixed)
    assert short.mask.sum(1).tolist() == [20, 5]
    memory = model.adapter.project_images(*short)
    alone = model.adapter.project_images(single[:1], None)
    pairs = [model.adapter.qformer.query_pass(images).output for images in (memory, alone)]
    torch.testing.assert_close(pairs[0][1], pairs[1][0], atol=1e-5, rtol=0)
    assert run(model.train(), batch).loss.isfinite()


def test_frames_of_a_clip_are_cropped_and_mirrored_alike(tiny, tmp_path):
    stripes = Image.fromarray(np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), np.uint8))
    write_clip(tmp_path / "still.mp4", [stripes] * 6, "mpeg4")
    (tmp_path / "r.jsonl").write_text(json.dumps({"image": "still.mp4", "caption": "a"}))
    config = load_config(
        Stage1Config, tiny.stage1(tmp_path / "x", f"data.train=[{tmp_path / 'r.jsonl'}]", "data.frames=3")
    )
    data: RecordDataset = build_dataset(config.data, build_stage1(config).encoder, "train", 0)
    first, second = data[Draw(0, 0, 0)], data[Draw(0, 0, 1)]
    assert (first.images[0] - first.images[2]).abs().mean() < 0.3 < (first.images[0] - second.images[0]).abs().mean()


def logged(run_dir: Path, name: str) -> list[float]:
    rows = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [row[name] for row in rows if name in row]


@pytest.mark.parametrize("stage", [1, 2])
def test_clips_train_from_the_cache_as_they_do_live(tiny: Tiny, clips, tmp_path, stage):
    arguments = (tiny.stage1, tiny.stage2)[stage - 1]
    more = on_clips(
        clips, "data.augment=false", "train.micro_batch_size=4", "train.global_batch_size=4", "qformer.dropout=0"
    )
    if stage == 1:
        more += ["stage1.itc=0", "stage1.itm=0"]
    run_stage(stage, arguments(tmp_path / "live", *more))
    cached = [*more, f"data.features={tmp_path / 'cache'}"]
    stage_main("cache_features")([*arguments(tmp_path / "x", *cached), "--dtype", "float32"])
    run_stage(stage, arguments(tmp_path / "cached", *cached))
    name = "itg" if stage == 1 else "lm"
    assert logged(tmp_path / "cached", name) == pytest.approx(logged(tmp_path / "live", name), rel=1e-5)
    cache = FeatureCache(tmp_path / "cache")
    assert cache.manifest.transform["frames"] == 4
    assert cache.read("3.mp4").shape[0] == 4 * 5


def test_a_cache_of_other_frames_is_refused(tiny, clips, tmp_path, capsys):
    cache = f"data.features={tmp_path / 'cache'}"
    stage_main("cache_features")(tiny.stage1(tmp_path / "x", *on_clips(clips, cache, "data.augment=false")))
    other = on_clips(clips, cache, "data.augment=false", "data.frame_policy=middle", "data.frames=2")
    error = refused("stage1", tiny.stage1(tmp_path / "y", *other), capsys)
    assert "data.frames: the cache has 4, expected 2" in error
    assert "data.frame_policy: the cache has uniform, expected middle" in error


def test_a_broken_clip_in_training_is_counted_and_replaced(tiny, clips, tmp_path):
    more = [
        f"data.train=[{clips / 'mixed.jsonl'}]",
        "data.validation=[]",
        "data.frames=2",
        "data.max_dropped_fraction=1",
    ]
    run_stage(2, tiny.stage2(tmp_path, *more, "train.max_steps=4"))
    assert logged(tmp_path, "dropped")[-1] > 0


def test_answers_about_clips_in_python_and_by_evaluate_and_ask(tiny, clips, tmp_path, capsys):
    run_stage(2, tiny.stage2(tmp_path / "run", "train.max_steps=1", "data.validation=[]"))
    adapter = str(tmp_path / "run" / "adapter")
    model = qformer.load(adapter, "cpu")
    settings = {"num_beams": 1, "max_new_tokens": 4}
    clip, image = str(clips / "0.mp4"), str(clips / "image.png")
    answers = model.answer([clip, image, [clip, image]], ["what ?"] * 3, **settings)
    frames = [list(model.read(clip)), image, [*model.read(clip), image]]
    assert model.read(clip).shape == (8, 3, IMAGE_SIDE, IMAGE_SIDE)
    assert answers == model.answer(frames, ["what ?"] * 3, **settings)
    arguments = [adapter, str(clips / "mixed.jsonl"), "--device", "cpu", "--num-beams", "1"]
    stage_main("evaluate")([*arguments, "--json", str(tmp_path / "out.json"), "--workers", "1"])
    out = json.loads((tmp_path / "out.json").read_text())
    assert out["dropped"] == 1
    assert len(out["results"]) == 9
    assert out["results"][0]["answer"] == model.answer([clip], ["what ?"], num_beams=1)[0]
    few = [*arguments, "--frames", "2", "--frame-policy", "middle", "--json", str(tmp_path / "few.json")]
    stage_main("evaluate")([*few, "--workers", "0"])
    model.sample_clips(2, "middle")
    assert model.read(clip).shape[0] == 2
    few_answer = json.loads((tmp_path / "few.json").read_text())["results"][0]["answer"]
    assert few_answer == model.answer([clip], ["what ?"], num_beams=1)[0]
    assert "'last' is not one of uniform, middle" in refused("evaluate", [*arguments, "--frame-policy", "last"], capsys)
    capsys.readouterr()
    stage_main("ask")([adapter, clip, "what ?", "--device", "cpu", "--num-beams", "1"])
    assert capsys.readouterr().out.strip() == out["results"][0]["answer"]


def test_a_stage_1_model_retrieves_clips(tiny, clips, tmp_path):
    run_stage(1, tiny.stage1(tmp_path / "run", "train.max_steps=1", "data.validation=[]"))
    model = qformer.load(tmp_path / "run" / "adapter", "cpu")
    names = [str(clips / f"{i}.mp4") for i in range(3)]
    embeds = model.embed_image(names)
    assert embeds.shape == (3, 4, 16)
    torch.testing.assert_close(embeds[1:2], model.embed_image(names[1]), atol=1e-5, rtol=0)
    torch.testing.assert_close(embeds[1:2], model.embed_image([list(model.read(names[1]))]), atol=1e-5, rtol=0)
    assert model.match(names, ["a red square"] * 3).shape == (3,)
    arguments = [
        str(tmp_path / "run" / "adapter"),
        str(clips / "records.jsonl"),
        "--task",
        "retrieval",
        "--device",
        "cpu",
    ]
    stage_main("evaluate")([*arguments, "--json", str(tmp_path / "out.json")])
    scores = json.loads((tmp_path / "out.json").read_text())["scores"]
    assert set(scores) == {"image_to_text", "text_to_image"}


def test_a_playlist_that_is_named_as_a_clip_reads_no_other_file(tmp_path, twenty):
    """FFmpeg goes by what a file holds: a list of segments would have it read whatever it names."""
    for name, text in {
        "list.mp4": f"#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{twenty}\n#EXT-X-ENDLIST\n",
        "concat.mkv": f"ffconcat version 1.0\nfile {twenty.name}\n",
    }.items():
        path = twenty.parent / name
        path.write_text(text)
        with pytest.raises(BrokenRecord, match=name):
            load_frames(record(path), 4)
        with pytest.raises(BrokenRecord, match=name):
            measure_clip(str(path))
    seconds, frames = measure_clip(str(twenty))
    assert frames == 20
    assert seconds > 0
