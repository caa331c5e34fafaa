"""Sources larger than a disk: tars, folders and parquet at any address, and runs over them that go on exactly."""

from __future__ import annotations

import importlib.util
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import signal
import socket
import tarfile
import time
from pathlib import Path

import datasets
import fsspec
import numpy as np
import psutil
import pytest
import torch
from PIL import Image
from tiny import Tiny, run_stage

from qformer.config import ConfigError, Stage1Config, load_config
from qformer.data import (
    BrokenRecord,
    GlobalBatches,
    ImageTransform,
    Order,
    RecordDataset,
    build_order,
    evaluation_loader,
    load_image,
    read_records,
    tars,
    training_loader,
)
from qformer.data.addresses import Files
from qformer.data.tars import Tars

TRANSFORM = ImageTransform(8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    datasets.disable_progress_bars()
    yield
    fsspec.filesystem("memory").store.clear()


def picture(number: int) -> bytes:
    """A PNG that tells its number by its colour."""
    file = io.BytesIO()
    Image.new("RGB", (10, 10), (number % 256, number // 256, 7)).save(file, "PNG")
    return file.getvalue()


def number_of(record) -> int:
    red, green, _ = load_image(record).getpixel((0, 0))
    return red + 256 * green


def tar_of(*members: tuple[str, bytes] | tarfile.TarInfo, format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as tar:
        for member in members:
            info = member if isinstance(member, tarfile.TarInfo) else tarfile.TarInfo(member[0])
            content = b"" if isinstance(member, tarfile.TarInfo) else member[1]
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def hole(name: str, size: int) -> bytes:
    """A file that takes no place in its tar, but `size` bytes when it is read."""
    info = tarfile.TarInfo(name)
    info.type = tarfile.GNUTYPE_SPARSE
    header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
    header[386:410] = b"00000000000\0" * 2  # the only part of it: nothing, at its beginning
    header[483:495] = b"\x80" + size.to_bytes(11, "big")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def files_of(number: int, folder: str = "") -> list[tuple[str, bytes]]:
    """What img2dataset writes of a picture."""
    said = {"key": str(number), "status": "success", "width": 10, "caption": "not this", "image_id": f"id {number}"}
    name = f"{folder}{number:09d}"
    return [(f"{name}.png", picture(number)), (f"{name}.txt", b"number %d" % number),
            (f"{name}.json", json.dumps(said).encode())]  # fmt: skip


def shards(folder: Path, sizes=(7, 1, 12)) -> str:
    """Tars of numbered records; returns their source."""
    folder.mkdir(exist_ok=True)
    numbers = itertools.count()
    for i, size in enumerate(sizes):
        members = [m for _ in range(size) for m in files_of(next(numbers))]
        (folder / f"{i:02d}.tar").write_bytes(tar_of(*members))
    return f"{folder}/{{00..{len(sizes) - 1:02d}}}.tar"


def dataset_of(records, **options) -> RecordDataset:
    return RecordDataset(records, TRANSFORM, **{"seed": 0, "augment": False, "text": "caption", **options})


# ---- tars ----


def test_tars_are_read_in_any_order(tmp_path, monkeypatch):
    source = shards(tmp_path / "t")
    records = read_records([source])
    assert (len(records), records.sizes) == (20, [20])
    for number in random.Random(0).sample(range(20), 20):
        record = records[number]
        assert number_of(record) == number
        assert (record.captions, record.image_id) == ((f"number {number}",), f"id {number}")
        assert record.image.endswith(f".tar#{number:09d}")
    assert list(records.first_of_each_picture().items())[3] == ("id 3", 3)

    monkeypatch.setattr(tars, "index_tar", None)  # from here on the index is there
    again = read_records([source])
    for found in (again, pickle.loads(pickle.dumps(again)), read_records([f"{tmp_path}/t/*.tar"])):
        assert [number_of(found[i]) for i in (19, 0, 7)] == [19, 0, 7]
    assert len(pickle.dumps(again)) < 1000  # not the index itself
    monkeypatch.undo()
    (tmp_path / "t/01.tar").write_bytes(tar_of(*files_of(40), *files_of(41)))
    assert [number_of(r) for r in (read_records([source])[i] for i in range(6, 10))] == [6, 40, 41, 8]


def test_a_tar_says_what_a_record_can_hold(tmp_path):
    question = {"question": "q?", "answers": ["a", "b"], "question_id": 3, "question_type": "how", "extra": [1]}
    long = "d" * 90 + "/" + "n" * 90
    members = [
        ("a/0.JPG", picture(1)), ("a/0.json", json.dumps(question).encode()),
        ("a.b/1.jpg", picture(2)), ("a.b/1.json", b'{"caption": ["x", "y"]}'), ("a.b/1.seg.png", b"not a picture"),
        ("README", b"of no record"), ("._2.jpg", b"of a Mac"),
        (f"{long}.png", picture(3)), (f"{long}.txt", "grün".encode()),
    ]  # fmt: skip
    for format in (tarfile.PAX_FORMAT, tarfile.GNU_FORMAT):
        (tmp_path / "x.tar").write_bytes(tar_of(*members, format=format))
        records = read_records([str(tmp_path / "x.tar")])
        assert len(records) == 3
        assert [number_of(r) for r in records] == [1, 2, 3]
        assert (records[0].question, records[0].answers, records[0].question_id) == ("q?", ("a", "b"), 3)
        assert (records[1].captions, records[2].captions) == (("x", "y"), ("grün",))
        assert records[2].image == f"{tmp_path}/x.tar#{long}"
        assert len({r.image_id for r in records}) == 3


def test_the_part_of_a_record_is_read_by_tarfile():
    link = tarfile.TarInfo("a.png")
    link.type, link.linkname = tarfile.SYMTYPE, "b.png"
    folder = tarfile.TarInfo("a.jpg")
    folder.type = tarfile.DIRTYPE
    long, content = "d" * 90 + "/" + "n" * 120, b"x" * 1500
    for name in ("a", long, "d/ü", "e\udcff", "\n"):
        for format in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
            part = tar_of(("README", b"y"), (f"{name}.PNG", content), link, folder, (f"{name}.txt", b""), format=format)
            key, files = tars.read_members(part)
            assert (key, files) == (name, {"png": content, "txt": b""})
    assert tars.read_members(hole("a.png", 10**10) + tar_of(("a.txt", b"x"))) == ("a", {"txt": b"x"})
    with pytest.raises(tarfile.ReadError, match="unexpected end"):
        tars.read_members(tar_of(("a.png", content))[:1500])


def test_tars_at_an_address(tmp_path):
    memory = fsspec.filesystem("memory")
    shards(tmp_path / "t")
    for path in (tmp_path / "t").iterdir():
        memory.pipe(f"/bucket/t/{path.name}", path.read_bytes())
    for source, n in [
        ("memory://bucket/t/{00..02}.tar", 20),
        ("memory://bucket/t/*.tar", 20),
        ("simplecache::memory://bucket/t/{00..02}.tar", 20),
    ]:
        records = read_records([source])
        assert len(records) == n, source
        for i in random.Random(0).sample(range(n), n):
            assert (number_of(records[i]), records[i].captions) == (i, (f"number {i}",))
        loader = training_loader(dataset_of(records), GlobalBatches(Order(n, 0, 4), 1, 0, n), 2)
        assert sorted(next(iter(loader)).texts) == sorted(f"number {i}" for i in range(n))
        assert len(records.first_of_each_picture()) == n


def test_sources_refused(tmp_path):
    source = shards(tmp_path / "t")
    whole = (tmp_path / "t/00.tar").read_bytes()
    header_of_the_third = whole.index(b"000000002.png")
    bad = {
        "cut.tar": whole[: whole.index(b"number 3") + 4],
        "cut_in_header.tar": whole[: header_of_the_third + 100],
        "flipped.tar": whole[:header_of_the_third] + b"9" + whole[header_of_the_third + 1 :],
        "zip.tar": b"PK" + bytes(2000),
        "gz.tar": b"\x1f\x8b" + bytes(2000),
        "none.tar": b"",
        "other.tar": tar_of(("README", b"x")),
    }
    for name, content in bad.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures/a.png").write_bytes(picture(0))
    for name, message in [
        (source.replace("02}", "04}"), "there is no file '.*03.tar', one of '.*04}.tar'"),
        (f"{tmp_path}/no*.tar.gz", "is compressed"),
        (f"{tmp_path}/nothing*.tar", "there is no file"),
        (f"{tmp_path}/cut.tar", "cut.tar cannot be read as a tar: unexpected end of data; .*fetch it again"),
        (f"{tmp_path}/cut_in_header.tar", "cut_in_header.tar is damaged at byte .*, after 2 records"),
        (f"{tmp_path}/flipped.tar", "flipped.tar is damaged at byte .*, after 2 records"),
        (f"{tmp_path}/zip.tar", "cannot be read as a tar"),
        (f"{tmp_path}/gz.tar", "cannot be read as a tar"),
        (f"{tmp_path}/none.tar", "cannot be read as a tar: empty file"),
        (f"{tmp_path}/other.tar", "holds no records; expected files such as 0001.jpg and 0001.txt"),
        ("memory://bucket/none.tar", "there is no file '/bucket/none.tar'"),
        ("nowhere://bucket/none.tar", "'nowhere://bucket/none.tar' cannot be read: .*nowhere"),
        ("memory://a.jsonl", "only .tar files are read at one; download it, or pack tars"),
        ("memory://a.parquet", "only .tar files are read at one; download it, or pack tars"),
        (str(tmp_path / "pictures"), "holds 1 images but no text beside them; expected metadata.jsonl"),
        (str(tmp_path / "cache"), "holds no images"),
    ]:
        with pytest.raises(ValueError, match=message) as found:
            read_records([name], key="data.train")
        assert "\n" not in str(found.value)


def test_a_tar_without_an_end_is_warned_of(tmp_path, caplog):
    whole = tar_of(*files_of(0))
    (tmp_path / "x.tar").write_bytes(whole.rstrip(b"\0").ljust(-(-len(whole.rstrip(b"\0")) // 512) * 512, b"\0"))
    assert number_of(read_records([str(tmp_path / "x.tar")])[0]) == 0
    assert "x.tar ends without the mark of an end" in caplog.text


def test_nothing_in_a_tar_reaches_beyond_it(tmp_path):
    (tmp_path / "secret.png").write_bytes(picture(9))
    members: list[tuple[str, bytes] | tarfile.TarInfo] = [("../../0.png", picture(0)), ("../../0.txt", b"up")]
    for number, kind in enumerate((tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE), start=1):
        info = tarfile.TarInfo(f"{number}.png")
        info.type, info.linkname = kind, str(tmp_path / "secret.png")
        members += [(f"{number}.txt", b"x"), info]
    with tarfile.open(fileobj=io.BytesIO(hole("5.png", 10**10))) as sparse:
        assert sparse.next().size == 10**10
    (tmp_path / "x.tar").write_bytes(tar_of(("5.txt", b"x"))[:1024] + hole("5.png", 10**10) + tar_of(*members))
    before = sorted(tmp_path.rglob("*.png"))
    records = read_records([str(tmp_path / "x.tar")])
    assert [r.captions for r in records] == [(), ("up",), (), (), (), ()]
    for record in (r for r in records if not r.captions):
        with pytest.raises(BrokenRecord, match="it has no image"):
            record.require_sound()
    assert number_of(records[1]) == 0  # a name like any other: nothing is written
    assert sorted(tmp_path.rglob("*.png")) == before


def test_broken_records_of_a_tar_are_replaced_and_counted(tmp_path, caplog):
    members = [
        *files_of(0), ("1.png", picture(1)), ("2.txt", b"no picture"), ("3.png", picture(3)), ("3.json", b"{oops"),
        ("4.png", picture(4)), ("4.txt", b"\xff\xfe"), ("5.png", picture(5)), ("5.json", b'{"caption": 5}'),
        ("6.png", picture(6)[:-30]), ("6.txt", b"cut"), ("7.png", picture(7)), ("7.json", b"[1]"),
        ("8.png", picture(8)), ("8.json", b'{"caption": "x", "answers": 4}'), ("9.png", b""), ("9.txt", b"empty"),
        *(file for number in range(10, 30) for file in files_of(number)),
    ]  # fmt: skip
    (tmp_path / "x.tar").write_bytes(tar_of(*members))
    records = read_records([str(tmp_path / "x.tar")])
    assert len(records) == 30
    told = [reason for b in evaluation_loader(dataset_of(records, in_order=True), 4, 0) for reason in b.dropped]
    expected = ["#1: the record has no caption", "#2: it has no image .*only txt", "#3: Expecting property name",
                "#4: 'utf-8' codec", "#5: 'caption' in its .json is int", "#6: .*(truncated|broken)",
                "#7: its .json holds list", "#8: 'answers' in its .json is int", "#9: .*cannot identify"]  # fmt: skip
    assert len(told) == len(expected)
    for reason, wanted in zip(told, expected, strict=True):
        assert re.search(wanted, reason), reason
    batch = next(iter(training_loader(dataset_of(records), GlobalBatches(Order(30, 0), 1, 0, 60), 0)))
    assert set(batch.texts) == {f"number {number}" for number in (0, *range(10, 30))}
    assert len(batch.dropped) >= 18
    (tmp_path / "x.tar").unlink()  # the disk went away while training
    assert "FileNotFoundError" in str(records[0].problem)
    with pytest.raises(ValueError, match=r"20 records in a row are broken, the last: .*x.tar#byte \d+: FileNotFound"):
        dataset_of(records)[Order(30, 0).draw(0)]


def open_and_report(source: str, cache: str, log: str) -> None:
    datasets.config.HF_DATASETS_CACHE = cache
    real = tars.index_tar

    def slow(file, name, key):
        with open(log, "a") as lines:
            lines.write(f"{name}\n")
        time.sleep(0.02)
        return real(file, name, key)

    tars.index_tar = slow
    records = read_records([source])
    assert [number_of(records[i]) for i in range(24)] == list(range(24))


def test_processes_share_the_indexing(tmp_path):
    source = shards(tmp_path / "t", (1,) * 24)
    arguments = (source, str(tmp_path / "together"), str(tmp_path / "log"))
    processes = [multiprocessing.get_context("fork").Process(target=open_and_report, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    done = (tmp_path / "log").read_text().splitlines()
    assert len(set(done)) == 24
    assert len(done) < 60  # 72 if each did all


def test_memory_stays_flat_over_ten_million_records(tmp_path):
    """An index of 1000 tars of 10 000 records; what is read of it are pages of a mapped file."""
    n, tar_count = 10_000_000, 1000
    with (tmp_path / "index.npy").open("wb") as file:
        index = np.arange(n + 2 * tar_count, dtype=np.int64)
        index[:tar_count] = np.arange(1, tar_count + 1) * (n // tar_count)
        np.save(file, index)
        del index
    (tmp_path / "x.tar").write_bytes(tar_of(*files_of(0)))
    list(itertools.islice(GlobalBatches(Order(100, 0), 1, 0, 10), 10))

    def anonymous() -> int:
        lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        return int(lines["RssAnon"].split()[0]) * 1024

    before, rss = anonymous(), psutil.Process().memory_info().rss
    files = Files(str(tmp_path / "x.tar"), [f"{tmp_path}/x.tar"] * tar_count)
    table = Tars("x", files, tmp_path / "index.npy")
    assert len(table) == n
    for order in (build_order([n], 0), build_order([n], 0, block_records=1000), build_order([n, n], 0, [1, 2])):
        for first in (0, n - 2500, 5 * n):  # over the end of an epoch and in a late one
            for draws in itertools.islice(GlobalBatches(order, 2, 1, 500, first=first), 5):
                for draw in draws:
                    table.read(draw.index % n)
    assert anonymous() - before < 8e6
    assert psutil.Process().memory_info().rss - rss < 8 * n + 16e6  # eight bytes a record if every page was looked at


# ---- folders ----


def test_image_folders(tmp_path, caplog):
    for kind in ("beside", "jsonl", "csv"):
        (tmp_path / kind / "sub").mkdir(parents=True)
        for i in range(4):
            (tmp_path / kind / ("sub" if i > 1 else "") / f"{i}.png").write_bytes(picture(i))
    names = ["0.png", "1.png", "sub/2.png", "sub/3.png"]
    for name in names[:3]:
        (tmp_path / "beside" / name).with_suffix(".txt").write_text(f"number {name}")
    (tmp_path / "beside/sub/2.json").write_text('{"question": "q?", "answers": ["a"], "caption": "not this"}')
    lines = [json.dumps({"file_name": name, "text": f"number {name}"}) for name in names]
    (tmp_path / "jsonl/metadata.jsonl").write_text("\n".join(lines))
    (tmp_path / "csv/metadata.csv").write_text("\n".join(["file_name,caption", *(f"{n},number {n}" for n in names)]))
    for kind, n in (("beside", 3), ("jsonl", 4), ("csv", 4)):
        records = read_records([str(tmp_path / kind)])
        assert [number_of(r) for r in records] == list(range(n))
        assert [r.captions for r in records] == [(f"number {name}",) for name in names[:n]]
        assert records[2].image == str(tmp_path / kind / "sub/2.png")
        assert records[2].image_id == "sub/2.png"
        assert number_of(pickle.loads(pickle.dumps(records))[1]) == 1
        assert len(records.first_of_each_picture()) == n
        if kind == "beside":
            assert (records[2].question, records[2].answers) == ("q?", ("a",))
            assert "1 images of" in caplog.text
    (tmp_path / "jsonl/metadata.jsonl").write_text(json.dumps({"file_name": "../csv/0.png", "text": "x"}))
    with pytest.raises(ValueError, match=r"metadata.jsonl: image '../csv/0.png' leaves its root"):
        read_records([str(tmp_path / "jsonl")])
    (tmp_path / "jsonl/metadata.jsonl").write_text(json.dumps({"file_name": str(tmp_path / "csv/0.png"), "text": "x"}))
    with pytest.raises(ValueError, match="is absolute; expected a path relative"):
        read_records([str(tmp_path / "jsonl")])


# ---- runs ----


def be_rank(rank: int, world: int, port: int, arguments: list[str], log: Path, dies_at: int | None) -> None:
    """Stage 1 as one of several processes, which notes what it draws and may be killed in the middle of an update."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), MASTER_ADDR="127.0.0.1")
    os.environ["MASTER_PORT"] = str(port)
    torch.set_num_threads(1)
    draw_sample, update, made = RecordDataset._draw, torch.optim.AdamW.step, itertools.count(1)

    def noted(self, draw):
        with (log / str(rank)).open("a") as lines:
            lines.write(f"{draw.index} {draw.epoch} {draw.position}\n")
        return draw_sample(self, draw)

    def deadly(self, *args, **kwargs):
        if next(made) == dies_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return update(self, *args, **kwargs)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(RecordDataset, "_draw", noted)
        monkeypatch.setattr(torch.optim.AdamW, "step", deadly)
        run_stage(1, arguments)


def run_ranks(world: int, arguments: list[str], log: Path, dies_at: int | None = None) -> list[tuple[int, ...]]:
    """What `world` processes drew, until all are through or killed: index, epoch and position of each record."""
    log.mkdir()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "transformers", "qformer.training", "qformer.build"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = [context.Process(target=be_rank, args=(r, world, port, arguments, log, dies_at)) for r in range(world)]
    for rank in ranks:
        rank.start()
    deadline = time.monotonic() + 150
    for rank in ranks:
        rank.join(max(0, deadline - time.monotonic()))
    codes = [rank.exitcode for rank in ranks]
    for rank in ranks:
        rank.kill()
    assert codes == [0 if dies_at is None else -signal.SIGKILL] * world
    return [tuple(map(int, line.split())) for path in log.iterdir() for line in path.read_text().splitlines()]


def test_a_run_killed_on_two_processes_goes_on_with_four_and_ends_on_one(tiny: Tiny, tmp_path):
    """Every record of every epoch is drawn once: counted are draws of the steps that a checkpoint kept."""
    arguments = tiny.stage1(tmp_path / "run", *tiny.on_features(), "data.shuffle_block_records=4", "train.max_steps=10",
                            "train.global_batch_size=12", "train.checkpoint_every_steps=3", "data.validation=[]",
                            "train.resume=auto")  # fmt: skip
    drawn = {
        (0, 36): run_ranks(2, [*arguments, "train.micro_batch_size=6"], tmp_path / "two", dies_at=5),
        (36, 72): run_ranks(4, [*arguments, "train.micro_batch_size=3"], tmp_path / "four", dies_at=4),
        (72, 120): run_ranks(1, [*arguments, "train.micro_batch_size=4"], tmp_path / "one"),
    }
    order = build_order([24], 0, block_records=4)
    kept: list[tuple[int, ...]] = []
    for (first, last), found in drawn.items():
        expected = [tuple(order.draw(i)) for i in range(first, last)]
        lost = [tuple(order.draw(i)) for i in range(last, last + 24)]  # after the last checkpoint
        assert set(found) <= {*expected, *lost}
        kept += [draw for draw in found if draw in set(expected)]
    assert len(kept) == 120
    for epoch in range(5):
        assert sorted(index for index, e, _ in kept if e == epoch) == list(range(24))


def test_another_batch_size_goes_on_where_the_run_stopped(tiny: Tiny, tmp_path, capsys):
    arguments = tiny.stage1(tmp_path / "run", "train.checkpoint_every_steps=1", "data.validation=[]")
    run_stage(1, [*arguments, "train.max_steps=2"])
    fewer = tiny.records.with_name("fewer.jsonl")
    fewer.write_text("".join(line + "\n" for line in tiny.records.read_text().splitlines()[:20]))
    for samples, options in [
        (16 + 2 * 4, ["train.max_steps=4", "train.global_batch_size=4", "train.micro_batch_size=4"]),
        (24 + 8, ["train.max_steps=5", f"data.train=[{fewer}]"]),
    ]:
        run_stage(1, [*arguments, *options, "train.resume=auto"])
        *_, last = sorted((tmp_path / "run/checkpoints").iterdir())
        assert json.loads((last / "state.json").read_text())["samples"] == samples
        said = " ".join(capsys.readouterr().out.split())
        assert ("records of data.train: [20], were [24]" in said) is (samples == 32)


def test_weights_and_blocks_are_checked_before_anything_loads(tiny, tmp_path):
    for argument, message in [
        ("data.weights=[1]", "data.weights: .1.0. must hold a number above 0 for each of data.train"),
        ("data.weights=[1,-1]", "data.weights"),
        ("data.shuffle_block_records=0", "data.shuffle_block_records: 0 must be at least 1"),
    ]:
        with pytest.raises(ConfigError, match=message):
            load_config(Stage1Config, tiny.stage1(tmp_path, "data.train=[a.jsonl,b.jsonl]", argument))
    load_config(Stage1Config, tiny.stage1(tmp_path, "data.train=[a.jsonl,b.jsonl]", "data.weights=[2,1]"))


# ---- the benchmark ----


@pytest.mark.parametrize("as_bytes", [False, True])
def test_every_side_of_the_benchmark_reads_the_same(tmp_path, monkeypatch, as_bytes):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parent.parent / "benchmarks"))
    from sides import reading

    reading.write(tmp_path, 10, (32, 32), 2)
    task = {"folder": str(tmp_path), "bytes": as_bytes, "all": 10, "pictures": 12, "image_size": 16}
    sides = ["ours", "ours, in blocks", "ours, files", "datasets", "datasets, Arrow"]
    sides += ["webdataset"] if importlib.util.find_spec("webdataset") else []
    found = [reading.build(tmp_path, {**task, "side": side}) for side in sides]
    first, *others = [side.check() for side in found]
    assert len(set(first["captions"])) == len(set(first["pictures"])) == 10
    for side, other in zip(sides[1:], others, strict=True):
        assert other["captions"] == first["captions"], side
        assert other["pictures"] == pytest.approx(first["pictures"], abs=1e-6), side
    assert all(side.step(0)["core_s"] > 0 for side in found)
