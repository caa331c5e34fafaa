"""The loop: both stages end to end, and a run that was interrupted is the run that was not, bit for bit."""

import contextlib
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tiny import Tiny, build_encoder, exit_codes, run_stage

import qformer
from qformer import training
from qformer.build import build_dataset, build_stage1
from qformer.checkpoint import list_checkpoints, read_adapter
from qformer.config import Stage1Config, Stage1Part, load_config, only_model, read_config, read_values
from qformer.launch import start_accelerator
from qformer.log import TIMING_FIELDS
from qformer.models import contrast, stage1
from qformer.training import NonFiniteLoss, derive_seed, fit

REPO = Path(__file__).resolve().parent.parent
ADAPTER = "adapter/adapter.safetensors"
LONG = ["train.max_steps=40", "train.log_every_steps=3", "train.checkpoint_every_steps=7",
        "train.validate_every_steps=11", "train.keep_checkpoints=1"]  # fmt: skip


def metrics(run_dir: Path) -> list[dict]:
    """What the run logged, without what differs between two equal runs."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in TIMING_FIELDS} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    """Same metrics, same trained tensors and same optimizer, bit for bit."""
    assert metrics(a) == metrics(b)
    (last_a,), (last_b,) = list_checkpoints(a), list_checkpoints(b)
    assert last_a.name == last_b.name
    assert_same_tensors(a / ADAPTER, b / ADAPTER)
    for name in ("adapter.safetensors", "optimizer.safetensors"):
        assert_same_tensors(last_a / name, last_b / name)


def assert_same_tensors(a: Path, b: Path) -> None:
    """Bit for bit; the files' bytes may differ in the order of their metadata."""
    first, second = load_file(a), load_file(b)
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


def refused(capsys, stage: int, arguments: list[str]) -> str:
    """What a stage says on standard error when it refuses: one line, and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run_stage(stage, arguments)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


# ---- both stages ----


@pytest.fixture(scope="module")
def stage1_run(tiny: Tiny, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "s1"
    run_stage(1, tiny.stage1(run_dir, "train.max_steps=4", "train.checkpoint_every_steps=2"))
    return run_dir


def test_stage1_leaves_the_run_folder(stage1_run, tiny):
    left = sorted(p.relative_to(stage1_run).as_posix() for p in stage1_run.rglob("*") if p.is_file())
    checkpoint = ["SHA256SUMS", "adapter.safetensors", "config.yaml", "optimizer.safetensors", "state.json"]
    assert left == sorted(
        [f"adapter/{name}" for name in ("README.md", "SHA256SUMS", "adapter.safetensors", "config.yaml")]
        + [f"checkpoints/step-{n}/{name}" for n in (2, 4) for name in checkpoint]
        + [".lock", "config.yaml", "metrics.jsonl", "warnings.jsonl"]
    )
    whole = read_config(stage1_run, Stage1Config)
    assert only_model(whole) == read_config(stage1_run / "adapter", Stage1Part) == read_config(stage1_run, Stage1Part)
    assert "train" not in read_values(stage1_run / "adapter")
    card = (stage1_run / "adapter/README.md").read_text()
    assert "stage 1" in card
    assert tiny.encoder in card
    assert not [name for name in read_adapter(stage1_run / "adapter") if "encoder" in name or "visual" in name]


def test_stage1_metrics_have_chance_levels(stage1_run):
    lines = metrics(stage1_run)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 4]
    for line in lines[:4]:
        assert line["itc_chance"] == pytest.approx(math.log(8), rel=1e-5)
        assert line["itm_chance"] == pytest.approx(0.636514, rel=1e-5)
        assert line["itg_chance"] == pytest.approx(math.log(29), rel=1e-5)  # words, five special tokens, [DEC]
        assert line["itc_negatives"] == 7
        assert line["dropped"] == 0
        assert all(math.isfinite(line[name]) for name in ("itc", "itm", "itg", "temperature", "gradient_norm"))
    assert lines[0]["lr"] == pytest.approx(1e-6)
    assert lines[1]["lr"] == pytest.approx(1e-3)
    assert {"validation_itc", "validation_image_to_text_recall_1", "validation_text_to_image_recall_1"} <= set(
        lines[-1]
    )


@pytest.mark.parametrize("kind", ["opt", "t5"])
def test_stage2_starts_from_stage1_and_speaks(stage1_run, tiny, tmp_path, kind, capsys):
    run_stage(2, tiny.stage2(tmp_path / "s2", f"llm.id={getattr(tiny, kind)}",
                             f"stage2.init_from={stage1_run / 'adapter'}"))  # fmt: skip
    said = " ".join(capsys.readouterr().out.split())
    assert re.search(r"47 tensors loaded from .*; 2 new: language_projection; .* left out: .*itm_head", said)
    lines = metrics(tmp_path / "s2")
    assert not any(name.endswith("chance") for name in lines[0])
    assert math.isfinite(lines[0]["lm"])
    assert len(lines[-1]["captions"]) == 4
    assert not [name for name in read_adapter(tmp_path / "s2/adapter") if "llm" in name or "encoder" in name]
    model = qformer.load(tmp_path / "s2/adapter", device="cpu")
    picture = tiny.records.parent / "00.png"
    assert isinstance(model.answer([picture], ["What colour is the square?"])[0], str)
    with pytest.raises(ValueError, match=r"needs a stage-1 adapter"):
        model.match([picture], ["a red square"])


def test_stage1_continues_from_an_adapter_of_stage1(stage1_run, tiny, tmp_path, capsys):
    still = ["optim.lr=1e-12", "optim.min_lr=0", "optim.warmup_lr=0", "train.max_steps=1", "optim.warmup_steps=0"]
    init_from = f"stage1.init_from={stage1_run / 'adapter'}"
    run_stage(1, tiny.stage1(tmp_path / "s1", init_from, *still))
    before, after = read_adapter(stage1_run / "adapter"), read_adapter(tmp_path / "s1/adapter")
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
    assert "qformer.query_tokens is" in refused(capsys, 1, tiny.stage1(tmp_path / "x", init_from, "qformer.queries=6"))
    assert "encoder.block=-1" in refused(capsys, 1, tiny.stage1(tmp_path / "y", init_from, "encoder.block=-1"))


def test_stage1_and_stage2_learn_from_features(tiny, tmp_path):
    features = tiny.on_features()
    run_stage(1, tiny.stage1(tmp_path / "s1", *features))
    run_stage(2, tiny.stage2(tmp_path / "s2", *features, f"stage2.init_from={tmp_path / 's1/adapter'}"))
    assert math.isfinite(metrics(tmp_path / "s2")[-1]["lm"])


def test_the_kept_config_alone_reproduces_the_run(stage1_run, tmp_path):
    run_stage(1, [str(stage1_run / "config.yaml"), f"run.dir={tmp_path}"])
    assert metrics(tmp_path) == metrics(stage1_run)
    assert_same_tensors(stage1_run / ADAPTER, tmp_path / ADAPTER)


def test_another_seed_is_another_run(stage1_run, tiny, tmp_path):
    run_stage(1, tiny.stage1(tmp_path, "train.seed=1", "train.max_steps=1"))
    assert metrics(tmp_path)[0]["itc"] != metrics(stage1_run)[0]["itc"]


def test_validation_and_checkpoints_do_not_change_the_run(stage1_run, tiny, tmp_path):
    run_stage(1, tiny.stage1(tmp_path, "train.max_steps=4", "train.validate_every_steps=1",
                             "train.checkpoint_every_steps=1"))  # fmt: skip
    training_lines = [line for line in metrics(tmp_path) if "itc" in line]
    assert training_lines == [line for line in metrics(stage1_run) if "itc" in line]
    assert_same_tensors(stage1_run / ADAPTER, tmp_path / ADAPTER)


def test_bf16_keeps_float32_weights(tiny, tmp_path):
    run_stage(1, tiny.stage1(tmp_path, "train.mixed_precision=bf16", "train.max_steps=2"))
    assert {value.dtype for value in read_adapter(tmp_path / "adapter").values()} == {torch.float32}
    assert math.isfinite(metrics(tmp_path)[-1]["validation_itc"])


@pytest.mark.parametrize("inputs", ["pictures", "features"])
def test_accumulation_is_one_large_batch_in_stage2(tiny, tmp_path, inputs):
    """Stage 1's ITC and ITM see fewer candidates in smaller micro-batches, by design."""
    found = {}
    for micro in (4, 8):
        run_dir = tmp_path / str(micro)
        more = tiny.on_features() if inputs == "features" else []
        run_stage(2, tiny.stage2(run_dir, *more, "train.max_steps=1", f"train.micro_batch_size={micro}",
                                 "qformer.dropout=0", "optim.warmup_steps=0"))  # fmt: skip
        found[micro] = metrics(run_dir)[0], read_adapter(run_dir / "adapter")
    for name in ("lm", "gradient_norm"):
        assert found[4][0][name] == pytest.approx(found[8][0][name], rel=1e-5)
    # after one step of Adam tiny gradients are all sign, so weights are compared where the gradient is not noise
    for name in ("language_projection.weight", "qformer.blocks.0.cross_attention.value.weight"):
        torch.testing.assert_close(found[4][1][name], found[8][1][name], atol=2e-5, rtol=1e-3)


# ---- interrupted ----


@pytest.fixture(scope="module")
def uninterrupted(tiny: Tiny, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("uninterrupted") / "run"
    run_stage(1, tiny.stage1(run_dir, *LONG))
    return run_dir


def start(stage: int, arguments: list[str]) -> subprocess.Popen:
    command = [sys.executable, str(REPO / "stages" / f"stage{stage}.py"), *arguments]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_step(process: subprocess.Popen, run_dir: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not (run_dir / "metrics.jsonl").exists() or f'"step": {step},' not in (run_dir / "metrics.jsonl").read_text():
        assert process.poll() is None, process.stderr and process.stderr.read()
        assert time.monotonic() < deadline, f"step {step} never came"
        time.sleep(0.002)


def test_sigterm_saves_and_the_rest_is_the_same_run(tiny, tmp_path, uninterrupted):
    arguments = tiny.stage1(tmp_path / "run", *LONG)
    process = start(1, arguments)
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=200)
    assert process.returncode == 0, said
    (saved,) = list_checkpoints(tmp_path / "run")
    assert 3 <= int(saved.name.removeprefix("step-")) < 40
    assert not (tmp_path / "run/adapter").exists()
    run_stage(1, [*arguments, "train.resume=auto"])
    assert_same_run(uninterrupted, tmp_path / "run")


def test_sigkill_at_a_random_moment_and_the_rest_is_the_same_run(tiny, tmp_path, uninterrupted):
    arguments = tiny.stage1(tmp_path / "run", *LONG)
    process = start(1, arguments)
    wait_for_step(process, tmp_path / "run", random.choice([3, 9, 18, 24]))
    time.sleep(random.uniform(0, 0.1))
    process.kill()
    process.communicate(timeout=200)
    assert process.returncode == -signal.SIGKILL
    run_stage(1, [*arguments, "train.resume=auto"])
    assert_same_run(uninterrupted, tmp_path / "run")


def test_stage2_resumes_from_a_named_checkpoint(tiny, tmp_path, monkeypatch):
    arguments = tiny.stage2(tmp_path / "whole", "train.checkpoint_every_steps=2", "train.max_steps=5")
    run_stage(2, arguments)
    halves = [a.replace("whole", "halves") for a in arguments]
    at_step(monkeypatch, 3, lambda: os.kill(os.getpid(), signal.SIGTERM))
    run_stage(2, halves)
    monkeypatch.undo()
    assert [p.name for p in list_checkpoints(tmp_path / "halves")] in (["step-2", "step-3"], ["step-2", "step-4"])
    run_stage(2, [*halves, f"train.resume={tmp_path / 'halves/checkpoints/step-2'}"])
    assert metrics(tmp_path / "halves") == metrics(tmp_path / "whole")
    assert_same_tensors(tmp_path / "whole" / ADAPTER, tmp_path / "halves" / ADAPTER)


def at_step(monkeypatch, step: int, act: Callable[[], None]) -> None:
    """Do something in the middle of a step: right before its update."""
    made, original = [0], torch.optim.AdamW.step

    def update(self, *args, **kwargs):
        made[0] += 1
        if made[0] == step:
            act()
        return original(self, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", update)


def test_a_finished_run_resumed_stays_as_it_is(stage1_run, tiny, tmp_path):
    before = metrics(stage1_run)
    shutil.copy(stage1_run / ADAPTER, tmp_path / "before.safetensors")
    run_stage(1, tiny.stage1(stage1_run, "train.max_steps=4", "train.checkpoint_every_steps=2", "train.resume=auto"))
    assert metrics(stage1_run) == before
    assert_same_tensors(stage1_run / ADAPTER, tmp_path / "before.safetensors")


def test_resume_auto_without_a_checkpoint_starts_from_the_start(stage1_run, tiny, tmp_path):
    run_stage(1, tiny.stage1(tmp_path, "train.max_steps=4", "train.checkpoint_every_steps=2", "train.resume=auto"))
    assert metrics(tmp_path) == metrics(stage1_run)


# ---- two processes ----


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@contextlib.contextmanager
def launch(arguments: list[str], stage: int = 1) -> Iterator[subprocess.Popen]:
    """A stage as users launch it on two processes of a CPU; none is left behind."""
    command = (
        f"{sys.executable} -m accelerate.commands.launch --multi_gpu --num_processes 2 --num_machines 1 "
        f"--mixed_precision no --dynamo_backend no --main_process_port {free_port()}"
    )
    process = subprocess.Popen(
        [*command.split(), str(REPO / f"stages/stage{stage}.py"), *arguments],
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        if process.poll() is None:
            for one in [*psutil.Process(process.pid).children(recursive=True), process]:
                one.kill()
        process.communicate(timeout=200)


def be_rank(me: int, port: int, arguments: list[str], told_to_stop: int | None) -> None:
    os.environ.update(RANK=str(me), LOCAL_RANK=str(me), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as monkeypatch:
        if me == told_to_stop:
            at_step(monkeypatch, 2, lambda: os.kill(os.getpid(), signal.SIGTERM))
        run_stage(1, arguments)


def run_two_ranks(arguments: list[str], told_to_stop: int | None = None) -> None:
    """Stage 1 on two processes that import torch once between them, which a launcher cannot."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "qformer.training", "qformer.build"])
    port = free_port()
    processes = [context.Process(target=be_rank, args=(me, port, arguments, told_to_stop)) for me in range(2)]
    assert exit_codes(processes) == [0, 0]


def test_two_processes_killed_and_resumed_are_the_same_run(tiny, tmp_path):
    more = [*LONG, "train.max_steps=16", "train.micro_batch_size=4", "qformer.dropout=0"]
    with launch(tiny.stage1(tmp_path / "killed", *more)) as killed:
        wait_for_step(killed, tmp_path / "killed", 9)
    assert list_checkpoints(tmp_path / "killed")
    assert not (tmp_path / "killed/adapter").exists()
    with launch(tiny.stage1(tmp_path / "killed", *more, "train.resume=auto")) as resumed:
        _, said = resumed.communicate(timeout=300)
        assert resumed.returncode == 0, said
    run_two_ranks(tiny.stage1(tmp_path / "whole", *more))
    assert_same_run(tmp_path / "whole", tmp_path / "killed")

    # and two processes of 4 are one of 8
    run_stage(1, tiny.stage1(tmp_path / "one", *more, "train.micro_batch_size=8"))
    alone, together = metrics(tmp_path / "one")[0], metrics(tmp_path / "whole")[0]
    for name in ("itc", "itm", "itg", "gradient_norm", "itc_negatives", "itc_chance"):
        assert together[name] == pytest.approx(alone[name], rel=1e-3), name


def test_ranks_stop_together_though_only_one_is_told_to(tiny, tmp_path):
    """The first rank is told after both have agreed to make this step."""
    run_two_ranks(tiny.stage1(tmp_path, "train.micro_batch_size=4", "train.max_steps=30"), told_to_stop=0)
    (saved,) = list_checkpoints(tmp_path)
    assert saved.name in ("step-2", "step-3")


# ---- what stops a run ----


def test_a_tracker_that_is_not_installed_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ValueError, match=r"run\.trackers: tensorboard cannot be imported here"):
        start_accelerator(load_config(Stage1Config, tiny.stage1(tmp_path, "run.trackers=[tensorboard]")))


def test_stage2_starts_on_two_processes(tiny, tmp_path):
    with launch(tiny.stage2(tmp_path, "train.max_steps=2", "train.micro_batch_size=4"), stage=2) as launched:
        _, said = launched.communicate(timeout=300)
    assert launched.returncode == 0, said
    assert (tmp_path / "adapter/adapter.safetensors").is_file()


def test_a_loss_that_is_not_finite_stops_before_the_update(tiny, tmp_path, monkeypatch):
    config = load_config(Stage1Config, tiny.stage1(tmp_path))
    accelerator, model = start_accelerator(config), build_stage1(config)
    before = {name: value.clone() for name, value in model.adapter.state_dict().items()}
    train = build_dataset(config.data, model.encoder, "train", 0)
    original = contrast.itc_loss
    poisons = {
        "loss": lambda similarities, *more: original(similarities, *more) * math.nan,
        # finite forward, nan backward: the derivative of a root at 0
        "gradient": lambda similarities, *more: original(similarities, *more) + (similarities.sum() * 0).sqrt(),
    }
    for what, poison in poisons.items():
        monkeypatch.setattr(contrast, "itc_loss", poison)
        with pytest.raises(NonFiniteLoss, match=r"step 1: not finite: .*nan.*no update was made.*picture \d+") as found:
            fit(model, train, None, config=config, accelerator=accelerator)
        assert ("itc nan" in str(found.value)) is (what == "loss")
        assert all(torch.equal(before[name], value) for name, value in model.adapter.state_dict().items())
    assert list_checkpoints(tmp_path) == []


def test_a_loss_that_is_not_finite_is_one_line_and_exit_code_2(tiny, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stage1, "itm_loss", lambda logits, *more: logits.sum() * math.inf)
    said = refused(capsys, 1, tiny.stage1(tmp_path))
    assert "step 1: not finite" in said
    assert "Records of this rank: picture" in said


def test_a_used_run_folder_is_refused(stage1_run, tiny, capsys):
    said = refused(capsys, 1, tiny.stage1(stage1_run))
    assert f"run.dir={stage1_run} already holds a run (step-4)" in said
    assert "train.resume=auto, or choose another run.dir" in said


def test_resuming_from_nothing_is_refused(tiny, tmp_path, capsys):
    said = refused(capsys, 1, tiny.stage1(tmp_path, f"train.resume={tmp_path / 'checkpoints/step-9'}"))
    assert re.search(r"step-9 is no .*checkpoint", said)


def test_resuming_with_other_sizes_is_refused(stage1_run, tiny, capsys):
    said = refused(capsys, 1, tiny.stage1(stage1_run, "train.resume=auto", "qformer.queries=5"))
    assert "qformer.query_tokens is [1, 4, 32], the config wants [1, 5, 32]" in said


def test_resuming_with_another_encoder_is_refused(stage1_run, tiny, capsys):
    said = refused(capsys, 1, tiny.stage1(stage1_run, "train.resume=auto", "encoder.block=-1"))
    assert "encoder.block=-2" in said
    assert "encoder.block=-1" in said


def test_resuming_past_the_end_is_refused(stage1_run, tiny, capsys):
    said = refused(capsys, 1, tiny.stage1(stage1_run, "train.resume=auto", "train.max_steps=2"))
    assert "train.max_steps" in said


def test_lone_copies_are_refused(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # launched as two, but nothing to join them
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)  # on a CPU accelerate itself refuses, below
    said = refused(capsys, 1, tiny.stage1(tmp_path, "train.cpu=false"))
    assert "2 processes were launched but this one sees 1: each would train a lone copy" in said
    assert "--multi_gpu --num_processes 2" in said


def test_lone_copies_on_a_cpu_are_refused(tiny, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "MASTER_ADDR" in refused(capsys, 1, tiny.stage1(tmp_path))


def test_a_batch_that_does_not_divide_over_the_processes_is_refused():
    with pytest.raises(
        ValueError, match=r"train\.global_batch_size=8 must be a multiple of .*size=4 times 3 processes"
    ):
        training._accumulation(8, 4, 3)


def test_fp16_on_a_cpu_is_refused(tiny, tmp_path, capsys):
    assert "fp16 needs a GPU" in refused(capsys, 1, tiny.stage1(tmp_path, "train.mixed_precision=fp16"))


def test_the_wrong_adapter_names_both_encoders(stage1_run, tiny, tmp_path, capsys):
    other = build_encoder(tmp_path / "vit", seed=7)
    init_from = f"stage2.init_from={stage1_run / 'adapter'}"
    said = refused(capsys, 2, [*tiny.stage2(tmp_path / "s2", init_from), f"encoder.id={other}"])
    assert "wrong adapter for this config" in said
    assert f"encoder.id={tiny.encoder}" in said
    assert f"encoder.id={other}" in said
    said = refused(capsys, 2, tiny.stage2(tmp_path / "s2", init_from, "encoder.block=-1"))
    assert "encoder.block=-2" in said
    assert "encoder.block=-1" in said
    assert "is no adapter" in refused(capsys, 2, tiny.stage2(tmp_path / "s2", f"stage2.init_from={tmp_path}"))


def test_an_adapter_of_other_sizes_is_refused(stage1_run, tiny, tmp_path, capsys):
    init_from = f"stage2.init_from={stage1_run / 'adapter'}"
    said = refused(capsys, 2, tiny.stage2(tmp_path / "s2", init_from, "qformer.queries=6"))
    assert "qformer.query_tokens is [1, 4, 32], the config wants [1, 6, 32]" in said


def test_a_full_disk_is_refused_before_the_first_step(tiny, tmp_path, capsys, monkeypatch):
    from types import SimpleNamespace

    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=1000))
    assert "lower train.keep_checkpoints" in refused(capsys, 1, tiny.stage1(tmp_path))


# ---- what does not stop a run ----


def test_a_corrupt_picture_is_counted_replaced_and_the_run_goes_on(tiny, tmp_path, capsys):
    folder = tmp_path / "records"
    folder.mkdir()
    for path in tiny.records.parent.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    (folder / "05.png").write_bytes((folder / "05.png").read_bytes()[:60])
    (folder / "06.png").unlink()
    run_stage(1, tiny.stage1(tmp_path / "run", f"data.train=[{folder / 'records.jsonl'}]", "train.max_steps=6"))
    lines = metrics(tmp_path / "run")
    assert lines[2]["dropped"] >= 2, "three steps of 8 are an epoch of 24"
    assert lines[5]["dropped"] >= 4
    assert math.isfinite(lines[-1]["validation_itc"])
    said = " ".join(capsys.readouterr().out.split())
    assert f"{lines[5]['dropped']} broken records were met and replaced by others" in said
    assert "05.png" in said
    assert f"{lines[5]['dropped']} broken records were replaced" in (tmp_path / "run/adapter/README.md").read_text()


def test_seeds_are_a_function_of_their_parts():
    assert derive_seed(0, 1, 2) == derive_seed(0, 1, 2)
    assert len({derive_seed(seed, step, rank) for seed in range(4) for step in range(4) for rank in range(4)}) == 64
    assert derive_seed(0, "noise") != derive_seed(0, "validation")
