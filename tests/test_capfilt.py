"""CapFilt end to end: what is dropped, what decides it, and the same bytes from any number of processes and after a kill."""

import dataclasses
import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from test_stages import refused, stage_main
from tiny import COLOURS, exit_codes, run_stage

import qformer
from qformer.capfilt import shards as shards_module
from qformer.capfilt.captions import caption_seed
from qformer.checkpoint import save_adapter
from qformer.data import Records, read_records
from qformer.language import load_language_model
from qformer.language.sampling import SeededNucleus

REPO = Path(__file__).resolve().parent.parent
NAMES = list(COLOURS)
COUNT, WRONG, BROKEN = 24, 8, 5  # the first WRONG captions are of another colour; one image is no image


@pytest.fixture(scope="module")
def captioner(tiny, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("captioner")
    run_stage(2, tiny.stage2(run_dir, "train.max_steps=1", "data.validation=[]", "llm.caption_max_new_tokens=8",
                             "llm.caption_min_new_tokens=2"))  # fmt: skip
    return run_dir / "adapter"


@pytest.fixture(scope="module")
def matcher(tiny, tmp_path_factory) -> Path:
    """A matching head that knows four colours: each beside each of four captions, a few dozen times."""
    run_dir = tmp_path_factory.mktemp("matcher")
    run_stage(1, tiny.stage1(run_dir, "train.max_steps=1", "data.validation=[]", "qformer.init_std=0.15"))
    model = qformer.load(run_dir, device="cpu")
    stage, folder = model.model, run_dir / "taught"
    features = model.encode([Image.new("RGB", (32, 32), colour) for colour in COLOURS.values()])
    rows, columns = torch.arange(4).repeat_interleave(4), torch.arange(4).repeat(4)
    text = stage.tokenize([f"a photo of a {NAMES[column]} field" for column in columns])
    optimizer = torch.optim.AdamW(stage.adapter.parameters(), lr=3e-3)
    for _ in range(70):
        logits = stage.adapter.match([stage.adapter.project_images(*features).select(rows)], *text)
        weights = torch.tensor([1.0, 3.0])
        loss = torch.nn.functional.cross_entropy(logits, (rows == columns).long(), weight=weights)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.1
    save_adapter(folder, stage.adapter, (run_dir / "adapter/config.yaml").read_text(), "")
    return folder


@pytest.fixture(scope="module")
def web(tmp_path_factory) -> Path:
    folder, rng, lines = tmp_path_factory.mktemp("web"), random.Random(1), []
    for i in range(COUNT):
        colour = tuple(min(255, max(0, value + rng.randint(-8, 8))) for value in COLOURS[NAMES[i % 4]])
        name = f"{i:02d}.png"
        Image.new("RGB", (32, 32), colour).save(folder / name)
        text = NAMES[(i + 1 if i < WRONG else i) % 4]
        lines.append({"image": name, "caption": f"A photo of a {text} field.", "image_id": 100 + i, "split": "web"})
    (folder / f"{BROKEN:02d}.png").write_bytes(b"no image")
    path = folder / "web.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def command(sources: list[Path | str], out: Path, *more: str | Path) -> list[str]:
    settings = ["--out", out, "--shard-records", "5", "--batch-size", "3", "--workers", "0", "--device", "cpu", *more]
    return [*map(str, sources), *map(str, settings)]


@pytest.fixture(scope="module")
def both(captioner, matcher, web, tmp_path_factory) -> tuple[Path, list[str | Path]]:
    """The out folder of a run with both parts and two captions an image, and its options."""
    out = tmp_path_factory.mktemp("both") / "out"
    options: list[str | Path] = ["--captioner", captioner, "--filter", matcher, "--captions", "2"]
    stage_main("capfilt")(command([web], out, *options))
    return out, options


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def scores(folder: Path) -> list[dict]:
    return [json.loads(line) for path in sorted((folder / "scores").glob("*")) for line in path.open()]


def test_planted_wrong_captions_are_dropped_and_right_ones_kept(both):
    out, _ = both
    rows = scores(out)
    assert [row["record"] for row in rows] == list(range(COUNT))
    web = {row["record"]: caption for row in rows for caption in row["captions"] if caption["origin"] == "web"}
    assert sorted(web.keys() | {BROKEN}) == list(range(COUNT))
    assert {i for i, caption in web.items() if caption["why"] is not None} == set(range(WRONG)) - {BROKEN}
    assert all(caption["why"] == "itm below 0.5" for i, caption in web.items() if i < WRONG)
    assert all(0 <= caption["itm"] <= 1 and -1.001 <= caption["itc"] <= 1.001 for caption in web.values())
    assert rows[BROKEN]["captions"] == []
    assert "UnidentifiedImageError" in rows[BROKEN]["problem"]
    written = [caption for row in rows for caption in row["captions"] if caption["origin"] == "synthetic"]
    assert len(written) == 2 * (COUNT - 1)
    assert len({caption["text"] for caption in written}) > COUNT


def test_scores_are_those_of_the_adapter_asked_alone(both, matcher, web):
    rows = scores(both[0])
    model = qformer.load(matcher, device="cpu")
    row = rows[WRONG]
    image = model.encode([row["image"]])
    for caption in row["captions"]:
        text = " ".join(re.sub(r"[.:]", " ", caption["text"].lower()).split())
        if caption["why"] != "empty":
            assert caption["itm"] == pytest.approx(model.match(image, [text]).item(), abs=1e-5)
            cosine = (model.embed_image(image)[0] @ model.embed_text(text)[0]).max().item()
            assert caption["itc"] == pytest.approx(cosine, abs=1e-5)


def test_kept_captions_are_records_with_their_origin(both):
    records = read_records([str(both[0] / "records.jsonl")])
    kept = {row["image_id"]: [c for c in row["captions"] if c["why"] is None] for row in scores(both[0])}
    assert len(records) == sum(bool(captions) for captions in kept.values()) >= COUNT - WRONG
    for i in range(len(records)):
        record = records[i]
        assert record.captions == tuple(caption["text"] for caption in kept[record.image_id])
        assert record.origins == tuple(caption["origin"] for caption in kept[record.image_id])
        assert (record.number_id, record.split) == (True, "web")
        assert Path(record.image).is_file()


def test_a_second_run_does_nothing(both, captioner, web, monkeypatch):
    out, options = both
    before = {p: p.stat().st_mtime_ns for p in [*(out / "scores").iterdir(), *(out / "shards").iterdir()]}
    whole = contents(out)
    monkeypatch.setattr("qformer.capfilt.command.load", None)
    stage_main("capfilt")(command([web], out, *options))
    assert contents(out) == whole
    assert {p: p.stat().st_mtime_ns for p in before} == before
    assert not (out / "locks").exists()


def test_what_is_sampled_depends_on_seed_and_record_alone(both, captioner, web, tmp_path):
    out, _ = both
    more = ["--captioner", captioner, "--captions", "2", "--shard-records", "24", "--batch-size", "7"]
    texts = {}
    for seed in ("0", "1"):
        stage_main("capfilt")(command([web], tmp_path / seed, *more, "--seed", seed))
        texts[seed] = [[c["text"] for c in row["captions"]] for row in scores(tmp_path / seed)]
    assert texts["0"] == [[c["text"] for c in row["captions"]] for row in scores(out)]
    assert texts["0"] != texts["1"]
    records = read_records([str(tmp_path / "0" / "records.jsonl")])
    assert len(records) == COUNT - 1, "without a filter every readable image keeps its captions"
    assert set(records[0].origins) == {"web", "synthetic"}


def in_a_process(words: list[str], printed: Path, *, killed_at: int | None = None) -> Any:
    """A copy of this process that runs the stage; with `killed_at` it dies between the scores and the rest of a shard."""

    def run() -> None:
        whole, shards = shards_module.atomic_file, []

        def stop(path: Path) -> Any:
            shards.append(path.parent.name == "shards")
            if sum(shards) == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)
            return whole(path)

        shards_module.atomic_file = stop
        sys.stdout = printed.open("w", buffering=1)
        stage_main("capfilt")(words)

    return multiprocessing.get_context("fork").Process(target=run)


def test_killed_midway_and_begun_again_it_is_as_if_never_stopped(both, web, tmp_path):
    out, options = both
    words = command([web], tmp_path / "out", *options)
    assert exit_codes([in_a_process(words, tmp_path / "printed", killed_at=3)]) == [-signal.SIGKILL]
    assert len(list((tmp_path / "out/shards").glob("*.jsonl"))) == 2
    assert len(list((tmp_path / "out/scores").glob("*.jsonl"))) == 3, "scores come first"
    assert not (tmp_path / "out/records.jsonl").exists()
    stage_main("capfilt")(words)
    assert contents(tmp_path / "out") == contents(out)


def test_two_processes_write_every_shard_once(both, web, tmp_path):
    out, options = both
    words = command([web], tmp_path / "out", *options)
    files = [tmp_path / "0", tmp_path / "1"]
    assert exit_codes([in_a_process(words, file) for file in files]) == [0, 0]
    done = [int(n) for file in files for n in re.findall(r": (\d+) records by this process", file.read_text())]
    assert sum(done) == COUNT
    assert contents(tmp_path / "out") == contents(out)


def test_a_shard_that_another_process_holds_is_left_to_it(both, web, tmp_path, capsys):
    out, options = both
    words = command([web], tmp_path / "out", *options)
    (tmp_path / "out/locks").mkdir(parents=True)
    shutil.copy(out / "made_of.json", tmp_path / "out")
    code = (
        "import sys\nfrom qformer.files import lock\nfile = open(sys.argv[1], 'a+')\n"
        "assert lock(file, 'it') is None\nprint('mine', flush=True)\nsys.stdin.read()"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "out/locks/00002")], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, text=True, cwd=REPO)  # fmt: skip
    assert holder.stdout is not None
    assert holder.stdout.readline() == "mine\n"
    stage_main("capfilt")(words)
    assert "19 records by this process" in (printed := capsys.readouterr().out)
    assert "others are not" in printed
    assert [p.stem for p in sorted((tmp_path / "out/shards").iterdir())] == ["00000", "00001", "00003", "00004"]
    holder.kill()
    holder.communicate()
    stage_main("capfilt")(words)
    assert "5 records by this process" in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(out)


def web_captions(records: Records) -> list[str]:
    pairs = [zip(r.captions, r.origins, strict=True) for r in (records[i] for i in range(len(records)))]
    return [text for captions in pairs for text, origin in captions if origin == "web"]


def pack(web: Path, path: Path) -> None:
    with tarfile.open(path, "w") as tar:
        for i, line in enumerate(map(json.loads, web.open())):
            tar.add(web.parent / line["image"], f"{i:04d}.png")
            (path.parent / "text").write_text(line["caption"])
            tar.add(path.parent / "text", f"{i:04d}.txt")


def test_tars_in_tars_out_and_a_second_round_over_them(both, web, captioner, matcher, tmp_path, capsys):
    out, options = both
    pack(web, tmp_path / "web.tar")
    stage_main("capfilt")(command([tmp_path / "web.tar"], tmp_path / "first", *options))
    assert "1 images could not be read" in capsys.readouterr().out
    assert (tmp_path / "first" / "00004.tar").is_file()
    first = read_records([str(tmp_path / "first/*.tar")])
    lines = read_records([str(out / "records.jsonl")])
    assert web_captions(first) == web_captions(lines) != []
    assert first[len(first) - 1].image_bytes == (web.parent / f"{COUNT - 1:02d}.png").read_bytes()
    again = ["--captioner", captioner, "--filter", matcher, "--seed", "3", "--threshold", "0"]
    stage_main("capfilt")(command([tmp_path / "first/*.tar"], tmp_path / "second", *again))
    second = read_records([str(tmp_path / "second/*.tar")])
    assert len(second) == len(first)
    assert all(
        s.captions[: len(f.captions)] == f.captions for s, f in ((second[i], first[i]) for i in range(len(first)))
    )
    assert second[0].origins == (*first[0].origins, "synthetic")


def test_the_summary_needs_no_other_file_and_escapes_texts(matcher, web, tmp_path):
    lines = [json.loads(line) for line in web.open()]
    lines[1]["caption"] = ["<script>alert(1)</script>", "a photo of a green field", "a photo of a Green field."]
    (web.parent / "odd.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines[:5]))
    stage_main("capfilt")(command([web.parent / "odd.jsonl"], tmp_path / "out", "--filter", matcher))
    page = (tmp_path / "out/summary.html").read_text()
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page
    assert page.count("data:image/jpeg;base64,") == 7
    assert not re.findall(r"(?:src|href)=\"(?!data:)", page)
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert summary["captions"]["web"] == Counter({"kept": 1, "itm below 0.5": 5, "equal to another of this image": 1})
    assert summary["with_captions"] == 1
    assert sum(summary["itm_in_10_bins"]["web"]) == 7


def test_mistakes_are_one_line_before_any_record_is_read_twice(both, captioner, matcher, web, tmp_path, capsys):
    out, options = both
    assert "give --captioner, --filter or both" in refused("capfilt", command([web], tmp_path / "a"), capsys)
    swapped = command([web], tmp_path / "a", "--filter", captioner)
    assert "--filter takes an adapter of stage 1" in refused("capfilt", swapped, capsys)
    swapped = command([web], tmp_path / "a", "--captioner", matcher)
    assert "--captioner takes an adapter of stage 2" in refused("capfilt", swapped, capsys)
    wrong = command([web], tmp_path / "a", "--filter", matcher, "--threshold", "50")
    assert "--threshold 50.0: expected a probability, 0 to 1" in refused("capfilt", wrong, capsys)
    other = command([web], out, *options, "--threshold", "0.9")
    assert "was begun with threshold 0.5, not 0.9" in refused("capfilt", other, capsys)
    pack(web, tmp_path / "web.tar")
    lines = command([tmp_path / "web.tar"], tmp_path / "a", "--filter", matcher, "--format", "jsonl")
    assert "use tar" in refused("capfilt", lines, capsys)
    assert not (tmp_path / "a").exists()


def test_one_frozen_encoder_of_both_adapters_encodes_each_image_once(captioner, matcher):
    from qformer.capfilt.judging import Bootstrap, Captioner, Filter, Method

    method, models = Method(), [qformer.load(folder, device="cpu") for folder in (captioner, matcher)]
    parts = Bootstrap(Captioner(models[0], method), Filter(models[1], method), method)
    assert parts.models == models[:1]
    other = dataclasses.replace(models[1].config.encoder, block=-1)
    models[1].config = dataclasses.replace(models[1].config, encoder=other)
    assert parts.models == models


def test_seeded_draws_have_the_probabilities_of_the_nucleus():
    logits = torch.tensor([[0.5, 0.3, 0.15, 0.05]]).log().repeat(4000, 1)
    seeds = [caption_seed(0, str(i), 0) for i in range(4000)]
    draw = SeededNucleus(seeds, top_p=0.9, temperature=1.0, length=3)
    for position in range(3):
        tokens = draw(torch.zeros(4000, position, dtype=torch.long), logits).argmax(1)
        shares = torch.bincount(tokens, minlength=4) / 4000
        assert shares[3] == 0, "outside of the nucleus"
        assert (shares[:3] - torch.tensor([0.5, 0.3, 0.15]) / 0.95).abs().max() < 0.025


def test_jobs_that_start_together_do_not_take_each_others_beginning_for_other_files(web, tmp_path):
    records = read_records([str(web)])
    first, second = (
        shards_module.Shards(tmp_path / "out", records, count=4, size=2, form="jsonl", made_of={"seed": 0})
        for _ in range(2)
    )
    (tmp_path / "out").mkdir()
    (tmp_path / "out/.made_of.json.1.partial").touch()
    shards_module.Shards(tmp_path / "out", records, count=4, size=2, form="jsonl", made_of={"seed": 0}).begin()
    first.begin()
    second.begin()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/file").touch()
    with pytest.raises(ValueError, match="holds other files"):
        shards_module.Shards(tmp_path / "other", records, count=4, size=2, form="jsonl", made_of={"seed": 0})


def test_processes_that_end_together_do_not_stumble_over_each_others_tidying(web, tmp_path):
    records = read_records([str(web)])
    shards = shards_module.Shards(tmp_path / "out", records, count=4, size=2, form="jsonl", made_of={"seed": 0})
    shards.begin()
    for number in range(shards.count):
        shards.save(number, [])

    def run() -> None:
        for _ in range(200):
            shards.begin()
            shards.join()

    context = multiprocessing.get_context("fork")
    assert exit_codes([context.Process(target=run) for _ in range(3)]) == [0, 0, 0]
    assert shards.join() == str(tmp_path / "out/records.jsonl")
    assert not (tmp_path / "out/locks").exists()


def test_the_experiments_noise_has_its_shares_and_its_filter_is_judged_by_what_was_planted(tmp_path):
    experiment = importlib.import_module("capfilt")  # of examples/shapes
    for split in ("train", "validation"):
        lines = [{"image": f"{split}/{i}.png", "caption": [f"{split} {i}", "more"]} for i in range(1000)]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    experiment.write_sets(tmp_path, tmp_path, seed=0)
    truth = json.loads((tmp_path / "truth.json").read_text())
    noisy = [json.loads(line) for line in (tmp_path / "noisy.jsonl").open()]
    vague = sum(row["caption"] in experiment.PHRASES for row in noisy)
    assert abs(sum(truth.values()) - 400) < 50
    assert abs(vague - 200) < 40
    assert all((row["caption"] == f"train {i}") == truth[row["image_id"]] for i, row in enumerate(noisy))
    assert len((tmp_path / "pairs.jsonl").read_text().splitlines()) == 250
    (tmp_path / "scores").mkdir()
    right, wrong = ([name for name, is_right in truth.items() if is_right == kind] for kind in (True, False))
    kept = {name: name in (*right[:30], *wrong[:10]) for name in (*right[:40], *wrong[:60])}
    rows = [{"image_id": name, "captions": [{"why": None if kept[name] else "itm below 0.5"}]} for name in kept]
    (tmp_path / "scores/00000.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert experiment.judge_filter(tmp_path, truth) == {"precision": 75.0, "recall": 75.0}


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_a_seeded_text_is_the_same_alone_and_among_others(tiny, kind):
    llm = load_language_model(getattr(tiny, kind))
    prompts, seeds = ["red ?", "what colour is the square ?", "a"], list(range(6))
    settings: dict[str, Any] = {"do_sample": True, "num_beams": 1, "num_return": 2, "max_new_tokens": 6}
    together = llm.generate(None, prompts, seeds=seeds, **settings)
    alone = [llm.generate(None, [p], seeds=seeds[2 * i : 2 * i + 2], **settings) for i, p in enumerate(prompts)]
    assert together == [text for pair in alone for text in pair]
    assert len(set(together)) > 3
    state = torch.random.get_rng_state()
    assert llm.generate(None, prompts, seeds=seeds, **settings) == together
    assert torch.equal(torch.random.get_rng_state(), state), "torch's own random state is not touched"
