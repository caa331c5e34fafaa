"""examples/: each short one is run from end to end, as its docstring says, with fewer steps."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

REPO = Path(__file__).resolve().parent.parent
SHORT = ("captions/train.py", "chat/train.py", "audio/train.py", "leaving/leave.py", "arrays/train.py")
FEW = ["train.max_steps=4", "train.validate_every_steps=4", "train.checkpoint_every_steps=4", "train.log_every_steps=1",
       "optim.warmup_steps=1", "train.cpu=true", "train.mixed_precision=no"]  # fmt: skip


def run(name: str, arguments: list[str], monkeypatch) -> None:
    """The example's `main` in this process, from the repository's folder as its docstring has it."""
    monkeypatch.chdir(REPO)
    spec = importlib.util.spec_from_file_location(name.split("/")[0] + "_example", REPO / "examples" / name)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.main([*map(str, arguments)])


@pytest.mark.parametrize("name", SHORT)
def test_an_example_says_how_it_is_run_and_is_short(name):
    text = (REPO / "examples" / name).read_text()
    assert len(text.splitlines()) <= 125
    docstring = text.split('"""')[1]
    assert f"python examples/{name} " in docstring
    assert re.search(r"--toy OUT", docstring)


def test_pictures_and_a_table_become_captions_through_both_stages(tmp_path, monkeypatch, capsys):
    run(
        "captions/train.py",
        ["--toy", tmp_path, *FEW, "train.global_batch_size=8", "train.micro_batch_size=8"],
        monkeypatch,
    )
    for stage in ("stage1", "stage2"):
        assert (tmp_path / stage / "adapter/adapter.safetensors").is_file()
    lines = capsys.readouterr().out.splitlines()
    captions = [line for line in lines if re.match(rf"{tmp_path}/pictures/train/\d+\.png: .+", line)]
    assert len(captions) == 4
    held_out = {json.loads(line)["image"] for line in (tmp_path / "validation.jsonl").open()}
    trained = {json.loads(line)["image"] for line in (tmp_path / "train.jsonl").open()}
    assert {line.split(":")[0] for line in captions} <= held_out
    assert not held_out & trained
    assert len(held_out | trained) == 64


def test_a_table_that_names_a_missing_picture_is_refused_in_words(tmp_path, monkeypatch):
    (tmp_path / "a.csv").write_text("image,caption\ngone.jpg,a dog\n")
    with pytest.raises(SystemExit, match=r"1 of 1 images are not there, the first: .*gone\.jpg"):
        run("captions/train.py", [tmp_path, tmp_path / "a.csv", tmp_path / "out"], monkeypatch)
    (tmp_path / "a.csv").write_text("image,caption\n")
    with pytest.raises(SystemExit, match=r"a\.csv: 0 images; expected two or more"):
        run("captions/train.py", [tmp_path, tmp_path / "a.csv", tmp_path / "out"], monkeypatch)


def test_a_table_of_json_lines_is_read_like_one_of_commas(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("captions_example", REPO / "examples/captions/train.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    rows = [(f"{i}.png", f"number {i}, {word}") for i in range(3) for word in ("a", "b")]
    (tmp_path / "t.jsonl").write_text("".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in rows))
    lists = [(f"{i}.png", [f"number {i}, {word}" for word in ("a", "b")]) for i in range(3)]
    (tmp_path / "l.jsonl").write_text("".join(json.dumps({"image": i, "caption": c}) + "\n" for i, c in lists))
    (tmp_path / "t.csv").write_text("image,caption\n" + "".join(f'{i},"{c}"\n' for i, c in rows))
    files = []
    for table in ("t.jsonl", "l.jsonl", "t.csv"):
        assert module.write_records(tmp_path, tmp_path / table, tmp_path) == [str((tmp_path / "0.png").resolve())]
        files.append([(tmp_path / f"{split}.jsonl").read_text() for split in ("train", "validation")])
    assert files[0] == files[1] == files[2]


def test_a_chat_template_stands_around_the_picture(tmp_path, monkeypatch, capsys):
    run("chat/train.py", ["--toy", tmp_path, *FEW, "llm.vqa_max_new_tokens=4", "llm.num_beams=1"], monkeypatch)
    out = capsys.readouterr().out
    assert (
        "a turn: <|im_start|>user\n[the picture's visual prompt]what is red?<|im_end|>\n<|im_start|>assistant\n" in out
    )
    assert out.count("question: ") == 2
    assert out.count("answer: ") == 2


def test_sounds_are_log_mel_frames_and_are_found_by_their_words(tmp_path, monkeypatch, capsys):
    import numpy as np

    run("audio/train.py", ["--toy", tmp_path, *FEW], monkeypatch)
    assert re.search(r"\d+ of 20 sounds held out have their own caption first of 9", capsys.readouterr().out)
    frames = [np.load(file) for file in sorted((tmp_path / "features").glob("*.npy"))]
    assert len(frames) == 200
    assert {frame.shape[1] for frame in frames} == {64}
    assert len({frame.shape[0] for frame in frames}) > 10  # of all lengths, side by side under a mask
    captions = json.loads((tmp_path / "wavs/captions.json").read_text())
    low, high = (
        next(i for i, c in enumerate(captions.values()) if f"{pitch} tone that stays" in c) for pitch in ("low", "high")
    )
    assert frames[low].mean(0).argmax() < frames[high].mean(0).argmax()  # a higher tone, a higher band


def test_transformers_says_what_we_say_after_leaving(tmp_path, monkeypatch, capsys):
    run("leaving/leave.py", ["--toy", tmp_path], monkeypatch)
    ours, theirs = re.findall(r"^(?:ours|transformers): +(.+)$", capsys.readouterr().out, re.M)
    assert ours == theirs
    assert (tmp_path / "blip2/model.safetensors").is_file()


@pytest.mark.parametrize("name", ["captions/train.py", "chat/train.py", "arrays/train.py"])  # those that start quickly
def test_wrong_arguments_are_told_in_one_line(name):
    done = subprocess.run(
        [sys.executable, REPO / "examples" / name, "one"], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert "expected " in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
