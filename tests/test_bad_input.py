"""Bad pictures, texts, features, hubs and paths, tried one by one: docs/reliability.md says what each does to a run."""

import ast
import contextlib
import functools
import json
import math
import os
import re
import shutil
import socket
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_faults import life, on_features, read
from test_training import free_port, metrics, refused
from tiny import Tiny, run_stage

from qformer.checkpoint import list_checkpoints
from qformer.data import BrokenRecord, FeatureCache, Record, load_image, read_records

REPO = Path(__file__).resolve().parent.parent


# ---- pictures, captions, features ----


def oversized_png(path: Path, side: int) -> None:
    """A picture of side * side pixels in some kilobytes."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + name + content + zlib.crc32(name + content).to_bytes(4, "big")

    header = side.to_bytes(4, "big") * 2 + bytes([1, 0, 0, 0, 0])  # one bit a pixel
    rows = zlib.compress(bytes((side // 8 + 1) * side))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b""))


def odd_pictures(folder: Path) -> tuple[list[str], list[str]]:
    """Pictures that can be used, and pictures that cannot."""
    red = Image.new("RGB", (32, 32), (220, 40, 40))
    red.convert("CMYK").save(folder / "cmyk.jpg")
    Image.fromarray(np.full((32, 32), 40_000, dtype=np.uint16)).save(folder / "sixteen.png")
    red.save(folder / "animated.gif", save_all=True, append_images=[Image.new("RGB", (32, 32), "blue")] * 3)
    red.save(folder / "truncated.png")
    (folder / "truncated.png").write_bytes((folder / "truncated.png").read_bytes()[:-30])
    (folder / "empty.png").write_bytes(b"")
    oversized_png(folder / "oversized.png", 20_000)
    return ["cmyk.jpg", "sixteen.png", "animated.gif"], ["truncated.png", "empty.png", "oversized.png", "missing.png"]


def write_lines(path: Path, lines: list[dict]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_pictures_of_every_kind_in_a_run(tiny, tmp_path, capsys):
    good, bad = odd_pictures(tmp_path)
    shutil.copytree(tiny.records.parent, tmp_path / "good")
    for name, size in (("oversized.png", 100_000), ("empty.png", 1)):
        assert (tmp_path / name).stat().st_size < size
    assert load_image(Record(str(tmp_path / "animated.gif"), "a")).getpixel((0, 0)) == (220, 40, 40)
    assert load_image(Record(str(tmp_path / "sixteen.png"), "a")).getpixel((0, 0)) == (156, 156, 156)
    with pytest.raises(BrokenRecord, match="DecompressionBomb"):
        load_image(Record(str(tmp_path / "oversized.png"), "a"))
    lines = [{"image": name, "caption": "a red square"} for name in (*good, *bad)]
    lines += [{"image": f"good/{i:02d}.png", "caption": "a blue square"} for i in range(9)]
    records = write_lines(tmp_path / "records.jsonl", lines)
    run_stage(1, tiny.stage1(tmp_path / "run", f"data.train=[{records}]", "train.max_steps=4",
                             "data.max_dropped_fraction=0.5"))  # fmt: skip
    said = "".join(capsys.readouterr().out.split())
    dropped = metrics(tmp_path / "run")[-1 if "dropped" in metrics(tmp_path / "run")[-1] else -2]["dropped"]
    assert dropped >= 8, "four records in each of two epochs"
    assert f"{dropped}brokenrecordsweremetandreplacedbyothers" in said
    assert [name for name in bad if f"brokenrecord{tmp_path / name}:" not in said] == []
    assert [name for name in good if f"brokenrecord{tmp_path / name}:" in said] == []


def test_captions_of_every_kind_in_a_run(tiny, tmp_path, capsys):
    captions = {
        "none": None, "empty": "", "controls only": "\x00\x1b\u2028\t", "punctuation only": '"..."',
        "long": "a red square " * 8000, "long word": "x" * 100_000, "controls": "a\x00 red\x1b[31m\r\nsquare\u2028!",
        "direction": "\u202ea red\u200b square",
    }  # fmt: skip
    shutil.copy(tiny.records.parent / "00.png", tmp_path / "a.png")
    lines = [{"image": "a.png", "caption": text, "image_id": name} for name, text in captions.items()]
    lines += [{"image": "a.png", "caption": "a blue square", "image_id": f"good {i}"} for i in range(16)]
    records = write_lines(tmp_path / "records.jsonl", lines)
    more = [f"data.train=[{records}]", "train.max_steps=3", "data.max_dropped_fraction=0.5", "data.augment=false"]
    run_stage(1, tiny.stage1(tmp_path / "run", *more))
    told = " ".join(capsys.readouterr().out.split())
    assert "1 of 24 records have neither 'caption' nor 'question', the first is record 0" in told
    assert metrics(tmp_path / "run")[2]["dropped"] >= 4
    assert all(math.isfinite(line["itg"]) for line in metrics(tmp_path / "run")[:3])
    run_stage(2, tiny.stage2(tmp_path / "s2", *more))  # the language model's tokenizer reads them too


def test_records_that_are_no_json_name_the_line(tiny, tmp_path, capsys):
    for caption in ('"a \\ud800 square"', '"a red', "{"):  # half of a surrogate pair; a line cut short
        records = tmp_path / "records.jsonl"
        records.write_text('{"image": "a.png", "caption": "x"}\n' * 2 + f'{{"image": "b.png", "caption": {caption}}}\n')
        said = refused(capsys, 1, tiny.stage1(tmp_path / "run", f"data.train=[{records}]"))
        assert re.search(r"error: data\.train: .*records\.jsonl cannot be read as records: .* in row 2", said)


def test_a_nan_in_a_feature_file_is_a_broken_record(tiny, tmp_path, capsys):
    shutil.copytree(tiny.features.parent, tmp_path / "features")
    for number, value in ((3, np.nan), (4, np.inf)):
        features = np.load(tmp_path / f"features/{number:02d}.npy")
        features[1, 2] = value
        np.save(tmp_path / f"features/{number:02d}.npy", features)
    arguments = [*on_features(tiny, tmp_path / "run"), f"data.train=[{tmp_path / 'features/records.jsonl'}]"]
    run_stage(1, arguments)
    assert metrics(tmp_path / "run")[2]["dropped"] >= 2
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("the tensor has values that are NaN or infinite") == 2
    assert all(math.isfinite(line["itc"]) for line in metrics(tmp_path / "run"))


@pytest.fixture(scope="module")
def cache(tiny, tmp_path_factory) -> Path:
    import importlib.util

    spec = importlib.util.spec_from_file_location("cache_features", REPO / "stages/cache_features.py")
    assert spec
    assert spec.loader
    stage = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(stage)
    folder = tmp_path_factory.mktemp("cache") / "cache"
    pictures = [{"image": str(p), "caption": "a red square"} for p in sorted(tiny.records.parent.glob("*.png"))]
    records = write_lines(folder.parent / "records.jsonl", pictures)
    arguments = from_cache(tiny, folder.parent / "run", folder)
    assert f"data.train=[{records}]" in arguments
    stage.main([*arguments, "--dtype", "float32", "--shard-mb", "0.005"])
    return folder


def from_cache(tiny: Tiny, run_dir: Path, cache: Path) -> list[str]:
    records = run_dir.parent / "records.jsonl"
    return tiny.stage1(run_dir, f"data.features={cache}", f"data.train=[{records}]", "data.augment=false",
                       "data.validation=[]")  # fmt: skip


def test_a_nan_in_a_cache_is_a_broken_record(tiny, cache, tmp_path, capsys):
    copy = shutil.copytree(cache, tmp_path / "cache")
    path = copy / "shard-00000.safetensors"
    content, start = path.read_bytes(), 8 + int.from_bytes(path.read_bytes()[:8], "little")
    first = start + json.loads(content[8:start])["tokens"]["data_offsets"][0]
    path.write_bytes(content[:first] + np.float32(np.nan).tobytes() + content[first + 4 :])
    shutil.copy(cache.parent / "records.jsonl", tmp_path)
    run_stage(1, from_cache(tiny, tmp_path / "run", copy))
    assert metrics(tmp_path / "run")[2]["dropped"] >= 1
    assert "its cached features have values that are NaN" in " ".join(capsys.readouterr().out.split())


def test_a_missing_shard_is_refused_before_the_run(tiny, cache, tmp_path, capsys):
    copy = shutil.copytree(cache, tmp_path / "cache")
    shards = sorted(copy.glob("shard-*"))
    assert len(FeatureCache(copy)) == 24
    shards[1].unlink()
    shutil.copy(cache.parent / "records.jsonl", tmp_path)
    said = refused(capsys, 1, from_cache(tiny, tmp_path / "run", copy))
    assert f"is unfinished, {len(shards) - 1} of {len(shards)} shards are there; run stages/cache_features.py" in said


# ---- too many ----


def join_as(rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1",
                      MASTER_PORT=str(port))  # fmt: skip


def half_broken(tiny: Tiny, folder: Path) -> Path:
    shutil.copytree(tiny.features.parent, folder)
    for number in range(0, 24, 2):
        (folder / f"{number:02d}.npy").write_bytes(b"")
    return folder / "records.jsonl"


def test_too_many_broken_records_stop_all_ranks_together(tiny, tmp_path):
    records, port = half_broken(tiny, tmp_path / "features"), free_port()
    arguments = on_features(tiny, tmp_path / "run", f"data.train=[{records}]", "train.max_steps=50",
                            "train.micro_batch_size=4")  # fmt: skip
    said = [tmp_path / "rank 0", tmp_path / "rank 1"]
    with contextlib.ExitStack() as ranks:
        processes = [ranks.enter_context(life(arguments, said[r], functools.partial(join_as, r, port))) for r in (0, 1)]
        for process in processes:
            process.join(100)
        assert [process.exitcode for process in processes] == [2, 2]
    found = [re.search(r"error: (\d+ of \d+) records met were broken \(.*%\), more than data\.max_dropped_fraction=0\.1;",
                       read(path)) for path in said]  # fmt: skip
    assert found[0]
    assert found[1]
    assert found[0][1] == found[1][1]
    assert [p.name for p in list_checkpoints(tmp_path / "run")] == ["step-3"], "three steps of 8 are all records once"


def test_a_worker_that_finds_nothing_readable_says_so_in_one_line(tiny, tmp_path, capsys):
    records = half_broken(tiny, tmp_path / "features")
    for path in records.parent.glob("*.npy"):
        path.write_bytes(b"")
    arguments = on_features(tiny, tmp_path / "run", f"data.train=[{records}]", "data.workers=1")
    said = refused(capsys, 1, arguments)
    assert re.fullmatch(r"error: 20 records in a row are broken, the last: .*\.npy: EOFError.*; check the data", said)


# ---- what comes from elsewhere ----


def no_network(*address, **more):
    raise socket.gaierror(-2, "Name or service not known")


def test_a_hub_that_cannot_be_reached_names_the_id_and_what_to_do(tiny, tmp_path, capsys, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)  # it is tried five times, with pauses
    for stage, argument, todo in [
        (1, "qformer.tokenizer=nobody/nothing", "give a folder, or a hub id that can be reached"),
        (1, "encoder.id=hf-hub:nobody/nothing", ""),
        (2, "llm.id=nobody/nothing", "download it while online and set llm.id to its folder"),
        (1, "data.train=[nobody/nothing]", ""),
    ]:
        arguments = getattr(tiny, f"stage{stage}")(tmp_path / "run", argument)
        said = refused(capsys, stage, arguments)
        assert argument.split("=")[0] in said, said
        assert "nobody/nothing" in said
        assert todo in said


@pytest.mark.parametrize(
    "path",
    [
        "../outside.png",
        "inside/../../outside.png",
        "/etc/passwd",
        "./../outside.png",
        "file:///etc/passwd",
        "..\\..\\x.png",
    ],
)
def test_no_path_leaves_its_root(tiny, tmp_path, capsys, path):
    records = write_lines(tmp_path / "records.jsonl", [{"image": path, "caption": "a red square"}])
    (tmp_path / "root").mkdir()
    arguments = tiny.stage1(tmp_path / "run", f"data.train=[{records}]", f"data.root={tmp_path / 'root'}")
    if "\\" in path:  # a name like any other where folders are not parted so
        assert read_records([str(records)], root=str(tmp_path / "root"))[0].image.startswith(str(tmp_path / "root"))
        return
    assert re.search(r"leaves its root|is absolute|is an address", refused(capsys, 1, arguments))


def test_nothing_is_loaded_with_pickle_and_no_code_comes_with_a_model():
    for path in [*(REPO / "qformer").rglob("*.py"), *(REPO / "stages").glob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call):
                called, given = ast.unparse(node.func), {k.arg: ast.unparse(k.value) for k in node.keywords}
                where = f"{path.name}:{node.lineno}"
                assert called not in ("pickle.load", "pickle.loads", "pickle.Unpickler", "joblib.load"), where
                assert called != "torch.load" or given.get("weights_only") == "True", where
                assert called != "np.load" or given.get("allow_pickle") == "False", where
                assert given.get("trust_remote_code") != "True", where


def test_code_that_comes_with_a_model_is_not_run(tiny, tmp_path, capsys):
    folder, ran = shutil.copytree(tiny.opt, tmp_path / "llm"), tmp_path / "ran"
    (folder / "code.py").write_text(f"open({str(ran)!r}, 'w')\nclass Model: pass\n")
    config = json.loads((folder / "config.json").read_text()) | {
        "model_type": "of-nobody", "auto_map": {"AutoConfig": "code.Model", "AutoModelForCausalLM": "code.Model"},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    assert "llm.trust_remote_code=true" in refused(capsys, 2, tiny.stage2(tmp_path / "run", f"llm.id={folder}"))
    assert not ran.exists()
