"""What ranks cost: seconds, bytes and memory of a step on several processes, beside what one process predicts.

python benchmarks/scaling.py                     # 1, 2 and 4 processes of this machine, one thread each; minutes
python benchmarks/scaling.py --json results/scaling.json
python benchmarks/scaling.py --table             # the model at 1, 16, 256 and 1024 GPUs, as docs/scaling.md has it

The prediction: a step of B records takes a + b B seconds on a core (fitted to one process at three B), longer by W/cores
where there are fewer cores than ranks, and then its bytes travel at the rate of a lone all-reduce on as many ranks.
Memory is c + d B, fitted likewise, and DDP's buckets.
"""

import argparse
import datetime
import json
import multiprocessing
import os
import resource
import socket
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from cost import (
    Machine,
    gradient_bytes,
    sharding_bytes,
    similarity_bytes,
    stage1_bytes,
    step_seconds,
    trainable_bytes,
    transformer_flop,
)
from sidebyside import machine
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from traffic import Traffic
from transformers import OPTConfig, OPTForCausalLM

from qformer.models import Stage1Adapter, Stage2Adapter, TextTokens
from qformer.optim import build_optimizer
from qformer.qformer import QFormer

Sizes = dict[str, Any]
SMALL: Sizes = {"layers": 4, "width": 256, "heads": 4, "ffn_width": 1024, "queries": 32, "vocab": 30522, "tokens": 65,
                "encoder_width": 512, "contrastive_width": 128, "text_tokens": 16, "llm": (4, 256, 1024),
                "batches": (4, 8, 16), "buffer": 2**24}  # fmt: skip
TINY: Sizes = {"layers": 2, "width": 32, "heads": 2, "ffn_width": 48, "queries": 4, "vocab": 100, "tokens": 5,
               "encoder_width": 24, "contrastive_width": 16, "text_tokens": 6, "llm": (1, 32, 48),
               "batches": (1, 2, 4), "buffer": 2**10}  # fmt: skip


class Step:
    """Forward, backward and update of one stage on random features and captions, under DDP where there are ranks."""

    def __init__(self, stage: int, sizes: Sizes, batch: int, ranks: int, rank: int) -> None:
        torch.manual_seed(0)
        self.stage, self.ranks, length = stage, ranks, sizes["text_tokens"]
        qformer = QFormer(
            dropout=0.1, vocab_size=sizes["vocab"] if stage == 1 else None, max_text_positions=64,
            **{k: sizes[k] for k in ("width", "layers", "heads", "ffn_width", "queries", "encoder_width")},
        )  # fmt: skip
        layers, width, ffn_width = sizes["llm"]
        if stage == 1:
            self.adapter: nn.Module = Stage1Adapter(
                qformer,
                encoder_width=sizes["encoder_width"],
                contrastive_width=sizes["contrastive_width"],
                dec_id=sizes["vocab"] - 1,
            )
        else:
            self.adapter = Stage2Adapter(qformer, encoder_width=sizes["encoder_width"], llm_width=width)
            opt = OPTConfig(vocab_size=sizes["vocab"], hidden_size=width, ffn_dim=ffn_width, num_hidden_layers=layers,
                            num_attention_heads=4, word_embed_proj_dim=width, max_position_embeddings=128)  # fmt: skip
            self.llm = OPTForCausalLM(opt).eval().requires_grad_(False)
        self.parameters = sum(p.numel() for p in self.adapter.parameters() if p.requires_grad)
        self.optimizer = build_optimizer(self.adapter, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.05, eps=1e-8)
        self.wrapped = DistributedDataParallel(self.adapter) if ranks > 1 else self.adapter
        torch.manual_seed(1 + rank)
        self.features = torch.randn(batch, sizes["tokens"], sizes["encoder_width"])
        self.ids = torch.randint(1, sizes["vocab"] - 1, (batch, length))
        self.pictures = torch.arange(batch) + batch * rank

    def __call__(self) -> None:
        self._loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def _loss(self) -> Tensor:
        targets = torch.tensor(float(self.ids.numel()))
        if self.stage == 1:
            return self.wrapped(
                self.features, None, TextTokens(self.ids, self.ids > 0), self.pictures, targets, 5
            ).loss  # fmt: skip
        prompt = self.wrapped(self.features, None)[0]
        embeds = torch.cat([prompt, self.llm.get_input_embeddings()(self.ids)], 1)
        logits = self.llm(inputs_embeds=embeds, use_cache=False, logits_to_keep=self.ids.shape[1]).logits
        return nn.functional.cross_entropy(logits.flatten(0, 1), self.ids.flatten(), reduction="sum") / targets


def be_rank(rank: int, ranks: int, port: int, stage: int, batch: int, sizes: Sizes, rounds: int, queue: Any) -> None:
    """Time the steps of one rank; the first rank reports."""
    torch.set_num_threads(1)
    if ranks > 1:
        dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=ranks)
    step = Step(stage, sizes, batch, ranks, rank)
    step()
    received = 0
    if ranks > 1:
        with Traffic() as traffic:
            step()
        received = sum(traffic.received.values())
    seconds = [_timed(step, ranks) for _ in range(rounds)]
    rate = 0.0
    if ranks > 1:
        buffer = torch.ones(sizes["buffer"])
        moved = 2 * (ranks - 1) / ranks * buffer.numel() * 4
        rate = moved / statistics.median(_timed(lambda: dist.all_reduce(buffer), ranks) for _ in range(5))
    if rank == 0:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        queue.put({"stage": stage, "ranks": ranks, "batch": batch, "seconds": statistics.median(seconds),
                   "received_bytes": received, "bytes_per_s": rate, "peak_bytes": peak,
                   "parameters": step.parameters})  # fmt: skip
    if ranks > 1:
        dist.barrier()
        dist.destroy_process_group()


def _timed(act: Any, ranks: int) -> float:
    if ranks > 1:
        dist.barrier()
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def measure(ranks: int, stage: int, batch: int, sizes: Sizes, rounds: int) -> dict[str, Any]:
    """One configuration, on fresh processes, so that a peak of memory is its own."""
    context = multiprocessing.get_context("forkserver")  # imports once for all of them
    context.set_forkserver_preload(["torch", "qformer.models", "transformers.models.opt.modeling_opt"])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    queue = context.Queue()
    processes = [
        context.Process(target=be_rank, args=(r, ranks, port, stage, batch, sizes, rounds, queue)) for r in range(ranks)
    ]
    for process in processes:
        process.start()
    found = queue.get(timeout=600)
    for process in processes:
        process.join()
    return found


def predict(fits: list[dict[str, Any]], ranks: int, batch: int, received: float, rate: float) -> dict[str, float]:
    """Seconds and peak memory of a rank, from the lone process's runs, the bytes moved and the rate of a lone all-reduce."""
    first, last = fits[0], fits[-1]
    spread = last["batch"] - first["batch"]

    def line(key: str) -> float:
        return first[key] + (last[key] - first[key]) / spread * (batch - first["batch"])

    crowded = max(1.0, ranks / (os.cpu_count() or 1))
    return {
        "seconds": line("seconds") * crowded + (received / rate if rate else 0.0),
        "peak_bytes": line("peak_bytes") + (trainable_bytes(first["parameters"], ranks) - 16 * first["parameters"]),
    }


def run(args: argparse.Namespace) -> None:
    """Print a line a configuration: measured, predicted, and their ratio."""
    sizes = TINY if args.tiny else SMALL
    rows = []
    for stage in args.stage:
        fits = [measure(1, stage, batch, sizes, args.rounds) for batch in sizes["batches"]]
        middle, largest = sizes["batches"][1], sizes["batches"][-1]
        cases = [(ranks, middle, "weak") for ranks in args.ranks]
        cases += [(ranks, largest // ranks, "strong") for ranks in args.ranks]
        for ranks, batch, kind in cases:
            known = [f for f in fits if f["batch"] == batch]
            found = known[0] if ranks == 1 and known else measure(ranks, stage, batch, sizes, args.rounds)
            expected = predict(fits, ranks, batch, found["received_bytes"], found["bytes_per_s"])
            moved = gradient_bytes(ranks, found["parameters"])
            if stage == 1:
                keys = ("tokens", "encoder_width", "contrastive_width", "text_tokens")
                moved += sum(stage1_bytes(ranks, batch, **{k: sizes[k] for k in keys}).values())
            expected["received_bytes"] = moved
            rows.append({**found, "kind": kind, "predicted": expected})
            print(
                f"stage {stage} {kind:<6} {ranks} x {batch:<3}"
                + "".join(
                    f"  {name} {found[key] / unit:8.3f} of {expected[key] / unit:8.3f}"
                    for name, key, unit in (
                        ("s", "seconds", 1),
                        ("MB", "received_bytes", 1e6),
                        ("GB", "peak_bytes", 1e9),
                    )
                )
            )
    if args.json:
        result = {"rows": rows, "tiny": args.tiny, "machine": machine(), "date": datetime.date.today().isoformat()}
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))


# BLIP-2's sizes. Rates from data sheets, no run: A100 SXM 312 TFLOP/s in bfloat16, of which 40 % are assumed; NVLink
# 300 GB/s each way; HDR InfiniBand, 25 GB/s a GPU.
A100 = Machine("A100", 0.4 * 312e12, 300e9, 25e9, 8)
VIT_G = {"layers": 39, "width": 1408, "ffn_width": 6144, "tokens": 257}
OPT_27 = {"layers": 32, "width": 2560, "ffn_width": 10240, "tokens": 64}
STAGE1 = {"tokens": 257, "encoder_width": 1408, "contrastive_width": 256, "text_tokens": 32, "feature_bytes": 2}


def table(stage1_flop: float, stage2_flop: float, parameters: tuple[int, int], activations: tuple[float, float]) -> str:
    """Markdown: per GPU and step at 1, 16, 256 and 1024 GPUs, first as many records a GPU, then as many a step.

    Args:
        stage1_flop, stage2_flop: of the adapter's forward and backward pass, a record.
        parameters: that learn, in either stage.
        activations: bytes a record.
    """
    encoder = transformer_flop(**VIT_G)
    llm = 2 * (transformer_flop(**OPT_27) + 2 * 32 * 2560 * 50272)  # back to the prompt only, not to weights
    flop, frozen = (encoder + stage1_flop, encoder + stage2_flop + llm), (2 * 1.0e9, 2 * (1.0e9 + 2.65e9))
    lines = [
        "| | GPUs x records | GB received: losses | gradient | blocks (FSDP2) | GB of memory: frozen whole | in shards "
        "| seconds a step: whole | in shards | waiting |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for stage, cases in (1, ((1, 105), (16, 105), (256, 105), (1024, 105), (256, 7), (1024, 2))), (
        2, ((1, 120), (16, 120), (256, 120), (1024, 120), (256, 8), (1024, 2)),
    ):  # fmt: skip
        trained, bytes_frozen = parameters[stage - 1], frozen[stage - 1]
        for ranks, batch in cases:
            losses = sum(stage1_bytes(ranks, batch, **STAGE1).values()) if stage == 1 and ranks > 1 else 0.0
            gradient = gradient_bytes(ranks, trained)
            blocks = sharding_bytes(ranks, bytes_frozen - frozen[0]) + sharding_bytes(ranks, frozen[0], reshard=False)
            own = trainable_bytes(trained, ranks) + batch * activations[stage - 1]
            own += similarity_bytes(ranks, batch, 32) if stage == 1 else 0
            compute = batch * flop[stage - 1] / A100.flop_per_s
            whole = step_seconds(A100, batch * flop[stage - 1], gradient, losses, ranks)
            sharded = whole + max(0.0, blocks / A100.bytes_per_s(ranks) - compute)  # blocks travel while others compute
            lines.append(
                f"| stage {stage} | {ranks} x {batch} | {losses / 1e9:.2f} | {gradient / 1e9:.2f} | {blocks / 1e9:.1f} "
                f"| {(own + bytes_frozen) / 1e9:.0f} | {(own + bytes_frozen / ranks) / 1e9:.0f} "
                f"| {whole:.3f} | {sharded:.3f} | {1 - compute / whole:.0%} |"
            )
    head = f"GFLOP a record: encoder {encoder / 1e9:.0f}, stage 1 {stage1_flop / 1e9:.0f}, stage 2 {stage2_flop / 1e9:.0f}, "
    head += f"language model {llm / 1e9:.0f}; parameters {parameters[0] / 1e6:.0f} M, {parameters[1] / 1e6:.0f} M"
    return "\n".join([head, "", *lines])


def count() -> tuple[float, float, tuple[int, int]]:
    """Products of a record in forward and backward of both adapters at BERT-base, counted; and how many parameters."""
    from serving import Count
    from torch.nn.attention import SDPBackend, sdpa_kernel

    base = {"layers": 12, "width": 768, "heads": 12, "ffn_width": 3072, "queries": 32, "vocab": 30523, "tokens": 257,
            "encoder_width": 1408, "contrastive_width": 256, "text_tokens": 32, "llm": (1, 2560, 64)}  # fmt: skip
    found, parameters = [], []
    for stage in (1, 2):
        step = Step(stage, base, 2, 1, 0)
        with Count() as counted, sdpa_kernel(SDPBackend.MATH):
            loss = step._loss() if stage == 1 else step.wrapped(step.features, None)[0].sum()
            loss.backward()
        found.append(counted.flop / 2)
        parameters.append(step.parameters)
    return found[0], found[1], (parameters[0], parameters[1])


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the result to this file")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of every configuration")
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--stage", type=int, nargs="+", choices=(1, 2), default=[1, 2])
    parser.add_argument("--table", action="store_true", help="print the model's predictions for GPUs instead")
    parser.add_argument("--activation-bytes", type=float, nargs=2, default=(0.075e9, 0.12e9), metavar=("S1", "S2"),
                        help="of a record in stage 1 and 2, for --table")  # fmt: skip
    args = parser.parse_args(argv)
    if args.table:
        print(table(*count(), tuple(args.activation_bytes)))
    else:
        run(args)


if __name__ == "__main__":
    sys.exit(main())
