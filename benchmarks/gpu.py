"""What a CPU cannot show: both stages on one GPU in bf16 and fp16, then a step's time and memory at BLIP-2's sizes.

    python benchmarks/gpu.py            # under 6 minutes on an H100
    python benchmarks/gpu.py --tiny     # every row at toy size on the CPU

Weights and features are random: stage 1 with BERT-base's Q-Former on 257 x 1408 features (ViT-g), stage 2 before an
OPT-2.7B. A row that fails says why and the others go on; the exit code is then 1.
"""

import argparse
import contextlib
import functools
import gc
import importlib.util
import io
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import AcceleratorState
from shapes import TOY_LLMS, Shapes, on_features
from sides.data import captions
from sides.ours import Training
from sides.prepare import llm_config, write_bert_tokenizer, write_llm, write_llm_tokenizer
from torch.utils.flop_counter import FlopCounterMode

from qformer.build import STAGES, build_dataset, build_stage
from qformer.checkpoint import read_adapter
from qformer.config import load_config
from qformer.data import Batch
from qformer.doctor import trial
from qformer.doctor.examine import examine
from qformer.doctor.report import FAILED
from qformer.launch import start_accelerator
from qformer.training import fit

REPO = Path(__file__).resolve().parent.parent
OPT_2_7B: Shapes = {"kind": "opt", "vocab_size": 50272, "hidden_size": 2560, "ffn_dim": 10240, "num_hidden_layers": 32,
                    "num_attention_heads": 32, "word_embed_proj_dim": 2560,
                    "max_position_embeddings": 2048}  # fmt: skip
MICRO_BATCH = {"stage1": 105, "stage2": 60}  # of configs/stage1.yaml and configs/stage2.yaml
TOLERANCE = 1e-4  # between devices, float32, relative to the largest value
STEPS = 12
ATTENTION = ("flash", "efficient", "cudnn", "math")


class Bench:
    """Where everything lies, on which device it runs, and the rows that were printed."""

    def __init__(self, folder: Path, tiny: bool) -> None:
        self.folder, self.tiny, self.device = folder, tiny, torch.device("cpu" if tiny else "cuda")
        self.rows: list[dict[str, str]] = []
        self.small, self.large = on_features(True), on_features(tiny)
        for name, task, llm in (("small", self.small, TOY_LLMS["opt"]), ("large", self.large, OPT_2_7B)):
            llm = TOY_LLMS["opt"] if tiny else llm
            write_bert_tokenizer(folder / name / "bert", task["vocab"])
            write_llm_tokenizer(folder / name / "llm", llm)
            llm_config(llm).save_pretrained(folder / name / "llm")
            write_features(folder / name, task, 8 if name == "large" else 32)
        write_llm(folder / "small" / "llm", TOY_LLMS["opt"])

    def row(self, name: str, measure: Callable[[], str]) -> None:
        """Run one row and print it; what goes wrong stands in its place."""
        start = time.perf_counter()
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # progress of the runs
                result = measure()
        except Exception as error:  # of any library: the other rows are to be seen as well
            result = f"FAILED: {type(error).__name__}: {' '.join(str(error).split())[:600]}"
        self.rows.append({"row": name, "result": result})
        print(f"| {name} | {result} | {time.perf_counter() - start:.0f} s |", flush=True)

    def config(self, stage: str, size: str, run: str = "none", *more: str) -> Any:
        return load_config(STAGES[stage][0], self.arguments(stage, size, run, *more))

    def arguments(self, stage: str, size: str, run: str, *more: str) -> list[str]:
        task, folder = (self.small, self.large)[size == "large"], self.folder / size
        batch = 8 if size == "small" or self.tiny else MICRO_BATCH[stage]
        llm = [f"llm.id={folder / 'llm'}"] if stage == "stage2" else []
        return [
            f"stage={stage}", f"run.dir={self.folder / run}", f"data.train=[{folder / 'records.jsonl'}]",
            "data.workers=0",
            f"train.max_steps={STEPS}", f"train.global_batch_size={batch}", f"train.micro_batch_size={batch}",
            "train.log_every_steps=1", "train.checkpoint_every_steps=6", f"train.cpu={str(self.tiny).lower()}",
            "optim.warmup_steps=2", "optim.lr=3e-3", "encoder.loader=features",
            f"encoder.width={task['encoder_width']}",
            f"encoder.num_tokens={task['tokens']}", f"qformer.tokenizer={folder / 'bert'}",
            f"qformer.max_text_tokens={task['max_text_tokens']}",
            *(f"qformer.{key}={value}" for key, value in task["qformer"].items()), *llm, *more,
        ]  # fmt: skip

    def train(self, stage: str, run: str, *more: str) -> Path:
        """A run of `STEPS` steps in this process, as the stage's command makes it."""
        AcceleratorState._reset_state(reset_partial_state=True)
        config = self.config(stage, "small", run, *more)
        accelerator = start_accelerator(config)
        model = build_stage(config)
        data = build_dataset(config.data, model.encoder, "train", config.train.seed)
        assert fit(model, data, None, config=config, accelerator=accelerator)
        return self.folder / run


def write_features(folder: Path, task: Shapes, n: int) -> None:
    """Feature files float16[N, Dv] and 128 records of them, each file with a caption of its own."""
    rng, texts, lines = np.random.default_rng(0), captions(n, task["words"]), []
    for i in range(n):
        np.save(folder / f"{i}.npy", rng.standard_normal((task["tokens"], task["encoder_width"])).astype(np.float16))
    for i in range(128):
        lines.append({"image": f"{i % n}.npy", "caption": texts[i % n], "image_id": str(i % n)})
    (folder / "records.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


# Correctness


def falls(bench: Bench, stage: str, precision: str) -> str:
    folder = bench.train(stage, f"{stage}-{precision}", f"train.mixed_precision={precision}", "train.max_steps=40")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [sum(line[name] for name in ("itc", "itm", "itg", "lm") if name in line) for line in lines]
    first, last = statistics.mean(losses[:4]), statistics.mean(losses[-4:])
    assert np.isfinite(losses).all(), f"not finite: {losses}"
    assert last < first, f"loss does not fall: {first:.4f} to {last:.4f}"
    return f"loss {first:.3f} to {last:.3f} in 40 steps"


def resumes(bench: Bench, precision: str) -> str:
    whole = bench.train("stage1", f"whole-{precision}", f"train.mixed_precision={precision}")
    part = bench.folder / f"part-{precision}"
    shutil.copytree(whole / "checkpoints" / "step-6", part / "checkpoints" / "step-6")
    bench.train("stage1", part.name, f"train.mixed_precision={precision}", "train.resume=auto")
    return same_adapter(whole, part)


def launched(bench: Bench) -> str:
    """One rank behind a launcher: DistributedDataParallel and NCCL, against the run of this process."""
    alone = bench.train("stage1", "alone", "train.mixed_precision=bf16")
    script = str(REPO / "stages" / "stage1.py")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", script]
    more = bench.arguments("stage1", "small", "launched", "train.mixed_precision=bf16")
    environment = os.environ | {"PYTHONPATH": f"{REPO}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([*command, *more], env=environment, capture_output=True, text=True, timeout=150)
    if done.returncode:
        raise RuntimeError(done.stderr[-600:])
    return same_adapter(alone, bench.folder / "launched")


def same_adapter(one: Path, other: Path) -> str:
    first, second = read_adapter(one / "adapter"), read_adapter(other / "adapter")
    changed = [name for name in first if not torch.equal(first[name], second[name])]
    assert not changed, f"{len(changed)} of {len(first)} tensors differ: {', '.join(changed[:4])}"
    return "adapters are equal to the bit"


def agrees(bench: Bench, stage: str) -> str:
    """Losses and gradients of this device against the CPU's, float32 without dropout."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    model = build_stage(bench.config(stage, "small", "none", "qformer.dropout=0")).train()
    results: list[dict[str, torch.Tensor]] = []
    for device in ("cpu", bench.device):
        prepared = model.to(device).prepare(batch_of(bench.small, 8, torch.device(device)), 0)
        output = model(prepared, torch.tensor(float(prepared.target_tokens), device=device))
        model.adapter.zero_grad()
        output.loss.backward()
        gradients = {name: p.grad for name, p in model.adapter.named_parameters() if p.grad is not None}
        results.append({name: x.detach().float().cpu() for name, x in {"loss": output.loss, **gradients}.items()})
    largest = max(x.abs().max() for x in results[0].values())
    worst = max(float((results[0][name] - results[1][name]).abs().max() / largest) for name in results[0])
    assert worst <= TOLERANCE, f"differs by {worst:.2g} of the largest value"
    return f"losses and {len(results[0]) - 1} gradients differ by {worst:.1g} of the largest value"


def attends(bench: Bench, stage: str) -> str:
    """Which of PyTorch's kernels a step's attention takes."""
    model = build_stage(bench.config(stage, "small", "none")).to(bench.device).train()
    prepared = model.prepare(batch_of(bench.small, 8, bench.device), 0)
    with torch.profiler.profile() as profile, torch.autocast(bench.device.type, torch.bfloat16):
        model(prepared, torch.tensor(float(prepared.target_tokens), device=bench.device)).loss.backward()
    counts = {event.key: event.count for event in profile.key_averages()}
    kernels = {kind: sum(n for key, n in counts.items() if key.startswith("aten::_scaled_dot_product") and kind in key
                         and "backward" not in key) for kind in ATTENTION}  # fmt: skip
    calls = counts.get("aten::scaled_dot_product_attention", 0)
    return f"{calls} calls of SDPA: {', '.join(f'{n} {kind}' for kind, n in kernels.items() if n) or 'none fused'}"


def quantises(bench: Bench) -> str:
    if importlib.util.find_spec("bitsandbytes") is None or bench.tiny:
        return "not run: bitsandbytes is not installed, or there is no GPU"
    losses = {}
    for bits in ("no", "8bit", "4bit"):
        folder = bench.train("stage2", f"bits-{bits}", f"llm.quantise={bits}", "llm.dtype=bfloat16",
                             "train.mixed_precision=bf16")  # fmt: skip
        losses[bits] = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])["lm"]
    assert np.isfinite(list(losses.values())).all(), losses
    return ", ".join(f"{bits}: loss {loss:.3f}" for bits, loss in losses.items())


def batch_of(task: Shapes, n: int, device: torch.device) -> Batch:
    images = torch.randn(n, task["tokens"], task["encoder_width"], generator=torch.Generator().manual_seed(1))
    empty: list[Any] = [None] * n
    return Batch(images.to(device), None, captions(n, task["words"]), [str(i) for i in range(n)],
                 empty, empty, empty, empty, empty, [])  # fmt: skip


# Speed


def peak_flops(device: torch.device, side: int) -> float:
    """FLOP/s of the fastest of ten bfloat16 products."""
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * side**3 / min(seconds_of(lambda: a @ b, device, 10))


def seconds_of(work: Callable[[], Any], device: torch.device, times: int) -> list[float]:
    taken = []
    for _ in range(times):
        start = now(device)
        work()
        taken.append(now(device) - start)
    return taken


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def measure(bench: Bench, stage: str, peak: float) -> str:
    """The doctor's prediction from steps of 2 and 4 records, then a full step, plain and compiled."""
    gc.collect()
    AcceleratorState._reset_state(reset_partial_state=True)
    more = ["train.mixed_precision=bf16"] + ["llm.random_weights=true", "llm.dtype=bfloat16"] * (stage == "stage2")
    config = bench.config(stage, "large", "none", *more)
    with bench.device:  # drawn where they stay: billions of random numbers take minutes on a CPU
        model = build_stage(config)
    name = f"{stage}, {config.train.micro_batch_size} records"
    bench.row(f"{name}: doctor", functools.partial(predict, config, model))
    gc.collect()
    model.use_training_kernels(bench.device, "bf16")
    task = {**bench.large, "batch": config.train.micro_batch_size, "device": bench.device.type, "dtype": "bfloat16"}
    training = Training(task, model.to(bench.device))
    with FlopCounterMode(display=False) as counter:
        training.step(0)
    flops = counter.get_total_flops()
    bench.row(name, lambda: timed(training, bench.device, flops, peak))
    if not bench.tiny:  # a minute on a CPU
        model.forward = functools.partial(model.forward, adapter=torch.compile(model.adapter))
        bench.row(f"{name}, torch.compile", lambda: timed(training, bench.device, flops, peak))
    return "done"


def predict(config: Any, model: Any) -> str:
    trial.FULL_STEP_S, trial.build_stage = 0.0, lambda _: model  # small steps only, of the model that is there
    findings = {finding.check: finding for finding in examine(config, sample=8)}
    failed = [f"{f.check}: {f.text}" for f in findings.values() if f.status == FAILED and f.check != "memory"]
    if failed:
        raise RuntimeError("; ".join(failed))
    return findings["memory"].text


def timed(training: Training, device: torch.device, flops: float, peak: float) -> str:
    """Median of eight steps after two, the share of the card, and memory with all weights and moments in it."""
    start = now(device)
    training.step(0)
    first = now(device) - start
    training.step(1)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    taken = seconds_of(lambda: training.step(3), device, 8)
    seconds = statistics.median(taken)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else float("nan")
    return (
        f"{seconds:.4f} s a step ({min(taken):.4f} to {max(taken):.4f}, the first {first:.1f}), "
        f"{len(training.texts) / seconds:.0f} records/s, peak {memory:.1f} GB, {flops / 1e12:.2f} TFLOP, "
        f"{flops / seconds / 1e12:.0f} TFLOP/s = {flops / seconds / peak:.0%} of the card's products"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="toy sizes on the CPU, to see that it runs")
    parser.add_argument("--json", type=Path, help="write the rows to this file")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), args.tiny)
        card = "CPU" if args.tiny else torch.cuda.get_device_name()
        print(f"{card}, torch {torch.__version__}\n\n| row | result | took |\n|---|---|---|")
        for stage in ("stage1", "stage2"):
            for precision in ("no", "bf16") if args.tiny else ("bf16", "fp16"):  # fp16 needs a GPU
                bench.row(f"{stage}, {precision}: loss", functools.partial(falls, bench, stage, precision))
            bench.row(f"{stage}: this device and the CPU", functools.partial(agrees, bench, stage))
            bench.row(f"{stage}: attention", functools.partial(attends, bench, stage))
        for precision in ("bf16",) if args.tiny else ("bf16", "fp16"):
            bench.row(f"resumed, {precision}", functools.partial(resumes, bench, precision))
        bench.row("one rank of torchrun", functools.partial(launched, bench))
        bench.row("quantised", functools.partial(quantises, bench))
        peak = peak_flops(bench.device, 256 if args.tiny else 8192)
        bench.row("products in bf16", lambda: f"{peak / 1e12:.3g} TFLOP/s")
        for stage in MICRO_BATCH:
            bench.row(f"{stage}, build", functools.partial(measure, bench, stage, peak))
    if args.json:
        args.json.write_text(json.dumps(bench.rows, indent=1))
    if any(row["result"].startswith("FAILED") for row in bench.rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
