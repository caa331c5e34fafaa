"""Ranks change nothing but time: the loop's own gradient on 1, 2 and 4 processes, the bytes they move, the death of one."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from tiny import FEATURE_WIDTH, Tiny, exit_codes, run_stage, shake

from qformer import training
from qformer.build import build_dataset, build_language_model, build_stage1, build_stage2
from qformer.checkpoint import read_adapter
from qformer.config import Stage1Config, Stage2Config, load_config
from qformer.data import GlobalBatches, Order, training_loader
from qformer.distributed import sum_over_ranks
from qformer.encoders import Features
from qformer.launch import start_accelerator
from qformer.log import TIMING_FIELDS
from qformer.sharding import take_over_sharding
from qformer.training import _forward_backward

REPO = Path(__file__).resolve().parent.parent
BENCHMARKS = str(REPO / "benchmarks")
ACCUMULATION, GLOBAL_BATCH = 2, 8
CASES = {
    "stage 1 on pictures": (1, []),
    "stage 1 on features": (1, ["features"]),
    "stage 2 with opt on pictures": (2, []),
    "stage 2 with t5 on features": (2, ["features", "t5"]),
}


@pytest.fixture(scope="module")
def arguments(tiny: Tiny, tmp_path_factory) -> dict[str, tuple[int, list[str]]]:
    """Command lines of the cases; eight records of five pictures, so that every rank meets some of another's."""
    folder = tmp_path_factory.mktemp("ranks")
    found = {}
    for case, (stage, what) in CASES.items():
        source = tiny.features if "features" in what else tiny.records
        lines = [json.loads(line) for line in source.read_text().splitlines()][:GLOBAL_BATCH]
        lines = [
            {**line, "image": str(source.parent / line["image"]), "image_id": f"{i % 5}"}
            for i, line in enumerate(lines)
        ]
        records = folder / f"{len(found)}.jsonl"
        records.write_text("".join(json.dumps(line) + "\n" for line in lines))
        more = tiny.on_features() if "features" in what else []
        more = [*more, f"data.train=[{records}]", "data.validation=[]", "data.augment=false", "qformer.dropout=0"]
        more += [f"llm.id={tiny.t5}"] if "t5" in what else []
        found[case] = (stage, (tiny.stage1 if stage == 1 else tiny.stage2)(folder / "none", *more))
    return found


def one_step(stage: int, arguments: list[str], ranks: int, me: int) -> dict[str, Any]:
    """Metrics, gradients and what was seen, of one step of the loop with accumulation; ranks share the global batch."""
    config: Any = load_config(Stage1Config if stage == 1 else Stage2Config, arguments)
    accelerator = start_accelerator(config)
    model: Any = build_stage1(config) if stage == 1 else build_stage2(config)
    adapter = model.adapter
    shake(adapter, by=0.05)
    wrapped = accelerator.prepare_model(adapter)
    micro = GLOBAL_BATCH // ranks // ACCUMULATION
    batches = GlobalBatches(Order(GLOBAL_BATCH, seed=0), ranks, me, micro)
    loader = iter(training_loader(build_dataset(config.data, model.encoder, "train", 0), batches, 0))
    model.train()
    prepared = [model.prepare(next(loader), 5 + i) for i in range(ACCUMULATION)]
    metrics, norm = _forward_backward(model, wrapped, prepared, accelerator=accelerator, clip_norm=1e9)
    means = {name: sum_over_ranks(torch.tensor(value)) / ranks for name, value in metrics.items()}
    gradients = {f"gradient {name}": p.grad for name, p in adapter.named_parameters() if p.grad is not None}
    seen = {
        "targets": sum(p.target_tokens for p in prepared),
        "lengths": [p.batch.images.shape[1] for p in prepared],
        "pictures": [p.batch.image_ids for p in prepared],
    }
    return {**means, "norm": torch.tensor(norm), **gradients, "seen": seen}


def work(me: int, ranks: int, folder: Path, cases: dict[str, tuple[int, list[str]]]) -> None:
    found: dict[str, Any] = {case: one_step(*how, ranks, me) for case, how in cases.items()}
    found["traffic"] = {masked: count_traffic(me, ranks, masked) for masked in (False, True)}
    torch.save(found, folder / f"{me}.pt")


# ---- processes ----


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def be_rank(act: Callable[..., None], me: int, ranks: int, port: int, folder: Path, *more: Any) -> None:
    os.environ.update(
        RANK=str(me), LOCAL_RANK=str(me), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with (folder / f"{me}.log").open("w") as log, contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
        act(me, ranks, folder, *more)


def run_ranks(act: Callable[..., None], ranks: int, folder: Path, *more: Any) -> list[int | None]:
    """Run `act(me, ranks, folder, *more)` on processes that import torch once between them; returns their exit codes."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "qformer.training", "qformer.build", "test_ranks"])
    port = free_port()
    processes = [context.Process(target=be_rank, args=(act, me, ranks, port, folder, *more)) for me in range(ranks)]
    return exit_codes(processes)


def said(folder: Path) -> str:
    return "\n".join(path.read_text()[-3000:] for path in sorted(folder.glob("*.log")))


# ---- the same gradient ----


@pytest.fixture(scope="module", params=[2, 4])
def together(request, arguments, tmp_path_factory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("together")
    assert run_ranks(work, request.param, folder, arguments) == [0] * request.param, said(folder)
    return [torch.load(folder / f"{me}.pt", weights_only=True) for me in range(request.param)]


@pytest.fixture(scope="module")
def alone(arguments) -> dict[str, dict[str, Any]]:
    return {case: one_step(*how, 1, 0) for case, how in arguments.items()}


@pytest.mark.parametrize("case", CASES)
def test_a_step_of_many_ranks_is_the_step_of_one(together, alone, case):
    """Accumulated over two micro-batches; on four ranks one record each, whose negatives are all on other ranks."""
    expected = dict(alone[case])
    seen = expected.pop("seen")
    assert len(expected) > 40
    for found in together:
        assert found[case].keys() == alone[case].keys()
        for name, value in expected.items():
            difference = (found[case][name] - value).abs().max()
            assert difference < 2e-6 + 5e-4 * value.abs().max(), (name, found[case][name], value)
    # what makes this hard is there: unequal numbers of targets, unequal lengths, the same picture on several ranks
    ranks = [found[case]["seen"] for found in together]
    assert sum(r["targets"] for r in ranks) == seen["targets"]
    assert len({r["targets"] for r in ranks}) > 1
    if "features" in case:
        assert len({tuple(r["lengths"]) for r in ranks}) > 1
    for m in range(ACCUMULATION):
        assert [i for r in ranks for i in r["pictures"][m]] == seen["pictures"][m]
    assert any(len(set(pictures)) < len(pictures) for pictures in seen["pictures"])


# ---- bytes ----

SIZES = {"tokens": 7, "encoder_width": FEATURE_WIDTH, "contrastive_width": 16, "text_tokens": 9}


def count_traffic(me: int, ranks: int, masked: bool, batch: int = 3) -> dict[str, int]:
    """Bytes that this rank receives in forward and backward of stage 1, gradients of weights aside."""
    sys.path.insert(0, BENCHMARKS)
    from traffic import Traffic

    from qformer.models import Stage1Adapter, TextTokens
    from qformer.qformer import QFormer

    torch.manual_seed(me)
    qformer = QFormer(width=32, layers=2, heads=2, ffn_width=48, queries=4, encoder_width=FEATURE_WIDTH, dropout=0.0,
                      vocab_size=40, max_text_positions=12)  # fmt: skip
    adapter = Stage1Adapter(
        qformer, encoder_width=FEATURE_WIDTH, contrastive_width=SIZES["contrastive_width"], dec_id=39
    )
    ids = torch.randint(1, 39, (batch, SIZES["text_tokens"]))
    features = torch.randn(batch, SIZES["tokens"], FEATURE_WIDTH)
    mask = torch.ones(batch, SIZES["tokens"], dtype=torch.bool) if masked else None
    keys = torch.arange(batch)[:, None] + me * batch
    with Traffic() as traffic:
        output = adapter(
            Features(features, mask), TextTokens(ids, ids > 0), keys=keys, targets_per_rank=torch.tensor(1.0),
            seed=3,
        )  # fmt: skip
        output.loss.backward()
    return dict(traffic.received)


@pytest.mark.parametrize("masked", [False, True])
def test_bytes_are_as_the_cost_model_says(together, monkeypatch, masked):
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cost

    ranks, batch = len(together), 3
    expected = cost.stage1_bytes(ranks, batch, **SIZES, masked=masked)
    fetched = expected["features"] + expected["texts"]
    others, embeds = ranks - 1, batch * SIZES["contrastive_width"] * 4
    for found in together:
        received = found["traffic"][masked]
        assert received["allgather"] == others * (embeds + batch * 8 * (4 if masked else 3))
        assert sum(received.values()) <= sum(expected.values()) + 8
        # a rank may draw its own pictures and texts, which then do not travel; everything else is to the byte
        assert sum(received.values()) - received["alltoall"] == pytest.approx(
            sum(expected.values()) - fetched - expected["scores"], abs=8
        )
        assert expected["scores"] <= received["alltoall"] <= expected["scores"] + fetched
    assert sum(found["traffic"][masked]["alltoall"] for found in together) > ranks * expected["scores"]


def test_the_paper_s_batch_moves_a_tenth_of_the_reference(monkeypatch):
    """16 ranks of 100 with ViT-g: the reference gathers 1.16 GB (of 1600 pictures 15/16 come from others) each way."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import cost

    sizes = {"tokens": 257, "encoder_width": 1408, "contrastive_width": 256, "text_tokens": 32, "feature_bytes": 2}
    ours, reference = cost.stage1_bytes(16, 100, **sizes), cost.reference_stage1_bytes(16, 100, queries=32, **sizes)
    assert reference["features"] == pytest.approx(1.16e9 * 15 / 16, rel=0.01)
    assert sum(ours.values()) < sum(reference.values()) / 30
    assert ours["features"] == cost.stage1_bytes(1024, 100, **sizes)["features"]  # does not grow with the ranks


# ---- the same records ----


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_every_rank_draws_as_many_whatever_is_broken(tiny, tmp_path, ranks):
    shutil.copytree(tiny.records.parent, tmp_path / "broken")
    for i in range(0, 24, 2):
        (tmp_path / f"broken/{i:02d}.png").write_bytes(b"")
    config = load_config(Stage1Config, tiny.stage1(tmp_path, f"data.train=[{tmp_path / 'broken/records.jsonl'}]"))
    dataset = build_dataset(config.data, build_stage1(config).encoder, "train", 0)
    loaders = [
        iter(training_loader(dataset, GlobalBatches(Order(len(dataset), 0), ranks, me, 8 // ranks), 0))
        for me in range(ranks)
    ]
    dropped = 0
    for _ in range(6):
        batches = [next(loader) for loader in loaders]
        assert [len(batch) for batch in batches] == [8 // ranks] * ranks
        dropped += sum(len(batch.dropped) for batch in batches)
    assert dropped >= 24  # two epochs of 24, half of it broken; replacements may be broken as well


# ---- frozen models in shards ----


def train_plain_and_sharded(me: int, ranks: int, folder: Path, arguments: list[str]) -> None:
    """The same run twice in one process: as under DDP, then as `accelerate launch` with fsdp2.yaml would have it."""
    run_stage(2, [*arguments, f"run.dir={folder / 'ddp'}"])
    held: dict[str, list[int]] = {}
    original = training.shard_blocks

    def shard_and_look(model: torch.nn.Module, device: torch.device) -> None:
        whole = {name: p.numel() for name, p in model.named_parameters()}
        original(model, device)
        for name, p in model.named_parameters():
            held[f"{type(model).__name__} {name}"] = [
                whole[name],
                (p.to_local() if hasattr(p, "to_local") else p).numel(),
            ]

    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2", FSDP_RESHARD_AFTER_FORWARD="true")
    training.shard_blocks = shard_and_look
    run_stage(2, [*arguments, f"run.dir={folder / 'fsdp'}"])
    (folder / f"{me}.json").write_text(json.dumps(held))

    # one rank has to write longer than the other, which runs the model as often all the same
    llm = build_language_model(load_config(Stage2Config, arguments).llm)
    for beams in (1, 2):
        ask = {"max_new_tokens": 2 + 4 * me, "min_new_tokens": 2 + 4 * me, "num_beams": beams}
        alone = llm.generate(None, ["a photo of", "the"], **ask)
        if beams == 1:
            original(llm.model, torch.device("cpu"))
        assert llm.generate(None, ["a photo of", "the"], **ask) == alone


def metrics(run_dir: Path) -> list[dict]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in (*TIMING_FIELDS, "memory_bytes")} for line in lines]


@pytest.mark.parametrize("llm", ["opt", "t5"])
def test_a_sharded_frozen_model_trains_the_same_adapter(tiny, tmp_path, llm):
    """With OPT bit for bit. With T5, whose products round by where weights lie, all but still: else roundings would grow."""
    still = ["optim.lr=1e-12", "optim.min_lr=0", "optim.warmup_lr=0"] if llm == "t5" else []
    arguments = tiny.stage2(tmp_path, "train.micro_batch_size=2", "train.validate_every_steps=2", "train.max_steps=4",
                            f"llm.id={getattr(tiny, llm)}", "llm.caption_max_new_tokens=6", *still)  # fmt: skip
    assert run_ranks(train_plain_and_sharded, 2, tmp_path, arguments) == [0, 0], said(tmp_path)
    ddp, fsdp = metrics(tmp_path / "ddp"), metrics(tmp_path / "fsdp")
    plain, sharded = read_adapter(tmp_path / "ddp/adapter"), read_adapter(tmp_path / "fsdp/adapter")
    assert plain.keys() == sharded.keys()
    assert "captions" in fsdp[-1]
    assert "gradient_norm" in fsdp[0]
    if llm == "opt":
        assert fsdp == ddp
        assert [name for name in plain if not plain[name].equal(sharded[name])] == []
    else:
        for one, other in zip(fsdp, ddp, strict=True):
            assert one.pop("captions", None) == other.pop("captions", None)
            assert one == pytest.approx(other, rel=1e-4)

    held = json.loads((tmp_path / "0.json").read_text())
    blocks = {name: sizes for name, sizes in held.items() if ".0." in name or ".1." in name}
    assert len({name.split()[0] for name in blocks}) == 2  # the encoder and the language model
    assert all(2 * here == whole for whole, here in blocks.values())
    assert all(here == whole for name, (whole, here) in held.items() if name not in blocks)


def test_what_cannot_be_sharded_is_refused(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "1")
    with pytest.raises(ValueError, match=r"fsdp_version: 1 .* set it to 2, as in configs/accelerate/fsdp2\.yaml"):
        take_over_sharding()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("FSDP_VERSION", "2")
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    with pytest.raises(ValueError, match="fsdp_cpu_ram_efficient_loading: true"):
        take_over_sharding()
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="DEEPSPEED: its engine updates weights inside the backward pass"):
        take_over_sharding()


ACCELERATE = sorted((REPO / "configs/accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", ACCELERATE, ids=lambda path: path.stem)
def test_accelerate_reads_every_launch_file(path):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser

    assert path.read_text().startswith("# ")
    assert load_config_from_file(str(path)).mixed_precision == "no", "precision is train.mixed_precision"
    args = launch_command_parser().parse_args(["--config_file", str(path), "stages/stage1.py"])
    args, *_ = _validate_launch_command(args)
    assert args.use_fsdp == (path.stem == "fsdp2")
    assert args.num_machines == (2 if path.stem == "multi_node" else 1)
    assert args.num_processes == {"single_gpu": 1, "multi_node": 16}.get(path.stem, 8)


def test_there_is_a_launch_file_of_each_kind():
    names = {path.stem for path in ACCELERATE}
    assert names == {"single_gpu", "multi_gpu", "multi_node", "fsdp2"}


# ---- a rank that is lost ----


def fall_asleep(me: int, ranks: int, folder: Path, arguments: list[str]) -> None:
    """The second rank is late by much more than the others wait."""
    if me == 1:
        original = training._forward_backward

        def late(*args, **kwargs):
            time.sleep(8)
            return original(*args, **kwargs)

        training._forward_backward = late
    run_stage(1, arguments)


def test_a_rank_that_hangs_ends_the_others_in_time(tiny, tmp_path):
    start = time.monotonic()
    more = ["train.micro_batch_size=4", "train.timeout_s=2", "data.validation=[]"]
    assert run_ranks(fall_asleep, 2, tmp_path, tiny.stage1(tmp_path / "run", *more)) == [2, 2], said(tmp_path)
    assert time.monotonic() - start < 40
    first = (tmp_path / "0.log").read_text()
    assert "error: rank 0 of 2 lost another rank, which died or did not answer within train.timeout_s" in first
    assert "Traceback" not in first


def test_a_killed_rank_ends_the_launch_with_its_reason(tiny, tmp_path):
    """As users launch it: `accelerate launch` with the repository's own file, frozen models in shards."""
    arguments = tiny.stage2(tmp_path / "run", "train.micro_batch_size=4", "train.max_steps=100000", "data.validation=[]",
                            "train.checkpoint_every_steps=100000")  # fmt: skip
    command = f"{sys.executable} -m accelerate.commands.launch --config_file {REPO / 'configs/accelerate/fsdp2.yaml'} "
    command += f"--num_processes 2 --main_process_port {free_port()} {REPO / 'stages/stage2.py'}"
    log = (tmp_path / "log").open("w+")
    process = subprocess.Popen([*command.split(), *arguments], stdout=log, stderr=log)
    try:
        lines = tmp_path / "run/metrics.jsonl"
        deadline = time.monotonic() + 120
        while not lines.exists() or '"step": 3,' not in lines.read_text():
            assert process.poll() is None, (tmp_path / "log").read_text()[-3000:]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (second,) = [p for p in psutil.Process(process.pid).children() if p.environ()["RANK"] == "1"]
        killed_at = time.monotonic()
        second.send_signal(signal.SIGKILL)
        assert process.wait(60) != 0
        assert time.monotonic() - killed_at < 40
    finally:
        for one in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            one.kill()
    found = (tmp_path / "log").read_text()
    cause = found[found.index("Root Cause") :]
    assert "rank      : 1" in cause
    assert "(SIGKILL)" in cause
    assert {"lm", "gradient_norm"} <= json.loads(lines.read_text().splitlines()[2]).keys()


def test_the_table_of_the_document_is_what_the_model_prints(monkeypatch):
    """Everything but what is counted from the code of the day."""
    monkeypatch.syspath_prepend(BENCHMARKS)
    import scaling

    document = (REPO / "docs/scaling.md").read_text()
    printed = scaling.table(170e9, 32e9, (186_000_000, 107_000_000), (0.16e9, 0.12e9)).splitlines()
    assert len(printed) == 16
    assert all(line.split("|")[1:3] in [row.split("|")[1:3] for row in document.splitlines()] for line in printed[4:])
    fits = [{"batch": b, "seconds": 1 + b, "peak_bytes": 100 + 2 * b, "parameters": 10} for b in (2, 4, 8)]
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    assert scaling.predict(fits, 4, 4, received=30.0, rate=10.0) == {"seconds": 2 * 5 + 3, "peak_bytes": 108 + 40}
