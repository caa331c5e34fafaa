"""Memory: peak of a training step against micro-batch and gradient checkpointing, what fits a card, and what loading takes.

python benchmarks/memory.py steps      # measured: resident memory of real steps of a middling Q-Former (width 384)
python benchmarks/memory.py cards      # computed: BLIP-2's sizes, from bytes counted in forward passes of few layers
python benchmarks/memory.py loading    # measured: what loading holds at most, against the size of the weights
"""

import argparse
import gc
import json
import multiprocessing
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import torch
from shapes import BERT_BASE, OPT_125M, T5_SMALL, TOY, TOY_LLMS, on_features
from sides.ours import Stage1, Stage2
from sides.prepare import build as prepare
from sides.prepare import write_llm
from torch import Tensor

from qformer.config import EncoderConfig
from qformer.encoders import load_encoder
from qformer.language import load_language_model
from qformer.tuning import checkpoint_activations

Task = dict[str, Any]
MIDDLING = {**BERT_BASE, "width": 384, "heads": 6, "ffn_width": 1536}
OPT_MIDDLING = {**OPT_125M, "hidden_size": 512, "ffn_dim": 2048, "num_attention_heads": 8, "word_embed_proj_dim": 512}
OPT_27B = {**OPT_125M, "hidden_size": 2560, "ffn_dim": 10240, "num_attention_heads": 32, "word_embed_proj_dim": 2560}
T5_XL = {**T5_SMALL, "d_model": 2048, "d_kv": 64, "d_ff": 5120, "num_heads": 32, "feed_forward_proj": "gated-gelu"}
VIT_G_BYTES = 985e6 * 2  # 39 blocks in half precision
LLMS = {"OPT-2.7B": (OPT_27B, 32, 2.65e9, 50272 * 2560), "FlanT5-XL": (T5_XL, 24, 2.85e9, 2 * 32128 * 2048)}
BITS = {"bf16": 16, "8bit": 8, "4bit": 4.5}  # NF4 keeps a float32 scale for 64 numbers; embeddings stay in bf16
CARDS, CONTEXT = (24e9, 80e9), 1e9  # CUDA's own gigabyte, and 5 % that nobody can use
TRAINED_BYTES = 4 + 4 + 8 + 2  # weight, gradient, two moments, autocast's copy in bfloat16

_counted: dict[str, Task] = {}


def main(argv: list[str] | None = None) -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("what", choices=("steps", "cards", "loading"))
    options.add_argument("--json", type=Path, help="write the figures there too")
    options.add_argument("--micro", type=int, nargs="+", default=[4, 16], help="micro-batches of `steps`")
    options.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    args = options.parse_args(argv)
    rows = {"steps": steps, "cards": cards, "loading": loading}[args.what](args)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


def steps(args: argparse.Namespace) -> list[Task]:
    sizes = TOY if args.tiny else MIDDLING
    llm = TOY_LLMS["opt"] if args.tiny else OPT_MIDDLING
    rows = []
    print(
        "| stage | gradient checkpointing | micro-batch | peak | of which activations | seconds |\n|---|---|---|---|---|---|"
    )
    for work, parts in (("stage1", []), ("stage1", ["qformer"]), ("stage2", []), ("stage2", ["qformer", "llm"])):
        for micro in args.micro:
            task = on_features(args.tiny) | {"work": work, "batch": micro, "qformer": sizes, "llm": llm}
            row = apart(_measure_step, task | {"dtype": "float32", "device": "cpu", "parts": parts})
            rows.append({"stage": work, "gradient_checkpointing": parts, "micro_batch": micro, **row})
            said = f"{work} | {' + '.join(parts) or 'none'} | {micro} | {_gb(row['peak_bytes'])}"
            print(f"| {said} | {_gb(row['activation_bytes'])} | {row['seconds']:.1f} |", flush=True)
    return rows


def _measure_step(task: Task) -> Task:
    with tempfile.TemporaryDirectory(prefix="qformer-bench-") as folder:
        prepare(Path(folder), task)
        gc.collect()
        side = (Stage1 if task["work"] == "stage1" else Stage2)(Path(folder), task)
        checkpoint_activations(side.model, task["parts"])
        before = psutil.Process().memory_info().rss
        libraries = before - sum(p.numel() * p.element_size() for p in side.model.parameters())
        side.forward(2, 0).loss.backward()  # gradients and moments are there from now on
        side.optimizer.step()
        held = psutil.Process().memory_info().rss
        _reset_peak()
        start = time.perf_counter()
        side.forward(task["batch"], 0).loss.backward()
        seconds = time.perf_counter() - start
        return {"peak_bytes": _peak() - libraries, "activation_bytes": _peak() - held, "seconds": seconds}


def cards(args: argparse.Namespace) -> list[Task]:
    sizes = TOY if args.tiny else BERT_BASE
    rows = []
    print(
        "| stage | language model | gradient checkpointing | fixed | a record | 24 GB | 80 GB |\n|---|---|---|---|---|---|---|"
    )

    def say(stage: str, llm: str, parts: list[str], fixed: float, record: float) -> None:
        fits = [max(0, int((0.95 * card - CONTEXT - fixed) / record)) for card in CARDS]
        rows.append({"stage": stage, "llm": llm, "gradient_checkpointing": parts, "fixed_bytes": fixed,
                     "bytes_a_record": record, "micro_batch": fits})  # fmt: skip
        said = f"{stage} | {llm} | {' + '.join(parts) or 'none'} | {_gb(fixed)} | {record / 1e6:.0f} MB"
        print(f"| {said} | {fits[0]} | {fits[1]} |", flush=True)

    common = on_features(args.tiny) | {"batch": 4, "dtype": "bfloat16", "device": "cpu"}
    for parts in ([], ["qformer"]):
        task = common | {"work": "stage1", "llm": {}, "qformer": sizes, "parts": parts}
        record, trained = _extended(task, {"layers": 12})
        say("1", "-", parts, VIT_G_BYTES + TRAINED_BYTES * trained, record)
    for name, (llm, layers, parameters, embedded) in LLMS.items():
        llm = TOY_LLMS[llm["kind"]] if args.tiny else llm
        for parts in ([], ["qformer", "llm"]):
            task = common | {"work": "stage2", "llm": llm, "qformer": sizes, "parts": parts}
            record, trained = _extended(task, {"layers": 12, "llm": layers})
            for bits, each in BITS.items():
                held = (parameters - embedded) * each / 8 + embedded * 2
                say("2", f"{name} {bits}", parts, VIT_G_BYTES + held + TRAINED_BYTES * trained, record)
    return rows


def _extended(task: Task, layers: dict[str, int]) -> tuple[float, int]:
    """Bytes a record and trainable parameters at full depth, on the line through two and four layers."""
    few = counted(task, 2, 2)
    record, trained, block = few["record_bytes"], few["trained"], 0.0
    for part, depth in layers.items():
        deeper = (4, 2) if part == "layers" else (2, 4)
        more = counted(task, *deeper)
        record += (more["record_bytes"] - few["record_bytes"]) / 2 * (depth - 2)
        trained += (more["trained"] - few["trained"]) // 2 * (depth - 2)
        if task["parts"]:  # one block at a time is there whole
            shallow, deep = (counted(task | {"parts": []}, *n)["record_bytes"] for n in ((2, 2), deeper))
            block = max(block, (deep - shallow) / 2)
    return record + block + few["head_bytes"], trained


def counted(task: Task, qformer: int, llm: int) -> Task:
    """`_count` of so many layers, each but once."""
    deep = _deep(task, qformer, llm)
    if (key := json.dumps(deep, sort_keys=True)) not in _counted:
        _counted[key] = apart(_count, deep)
    return _counted[key]


def _deep(task: Task, qformer: int, llm: int) -> Task:
    key = "num_hidden_layers" if task["llm"].get("kind") == "opt" else "num_layers"
    deep = {**task["llm"], key: llm} if task["llm"] else {}
    return task | {"qformer": {**task["qformer"], "layers": qformer}, "llm": deep}


def _count(task: Task) -> Task:
    with tempfile.TemporaryDirectory(prefix="qformer-bench-") as folder:
        prepare(Path(folder), task)
        side = (Stage1 if task["work"] == "stage1" else Stage2)(Path(folder), task)
        checkpoint_activations(side.model, task["parts"])
        kept = [_kept(lambda n=n: side.forward(n, 0), side.model) for n in (2, 4)]
        words = task["llm"].get("vocab_size", task["vocab"])
        targets = side.prepare(4, 0).target_tokens / 4
        trained = sum(p.numel() for p in side.model.adapter.parameters())
        # two gradients of the logits in float32, while the backward pass begins
        return {"record_bytes": (kept[1] - kept[0]) / 2, "trained": trained, "head_bytes": 8 * targets * words}


def _kept(forward: Callable[[], Any], model: torch.nn.Module) -> int:
    """Bytes that a forward pass keeps for the backward pass."""
    known, held = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def note(tensor: Tensor) -> Tensor:
        if (storage := tensor.untyped_storage()).data_ptr() not in known:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = forward()
    assert output.loss.requires_grad
    return sum(held.values())


def loading(args: argparse.Namespace) -> list[Task]:
    rows = []
    print("| model | weights | own memory at its peak | with the mapped file |\n|---|---|---|---|")
    with tempfile.TemporaryDirectory(prefix="qformer-bench-") as scratch:
        for kind in ("language model", "encoder of transformers", "encoder of open_clip"):
            folder = Path(scratch) / kind.split()[-1]
            apart(_write, {"kind": kind, "folder": str(folder), "tiny": args.tiny})
            row = apart(_measure_loading, {"kind": kind, "folder": str(folder)})
            rows.append({"model": kind, **row})
            weights = row["weight_bytes"]
            own, peak = (f"{row[key] / weights:.2f}" for key in ("own_bytes", "peak_bytes"))
            print(f"| {kind} | {_gb(weights)} | {own} x | {peak} x |", flush=True)
    return rows


def _write(task: Task) -> Task:
    folder, tiny = Path(task["folder"]), task["tiny"]
    torch.manual_seed(0)
    if task["kind"] == "language model":
        write_llm(folder, TOY_LLMS["opt"] if tiny else {**OPT_125M, "num_hidden_layers": 6})
        return {}
    sizes = {"width": 32, "layers": 2, "heads": 2} if tiny else {"width": 1024, "layers": 6, "heads": 16}
    folder.mkdir()
    if task["kind"].endswith("transformers"):
        from transformers import ViTConfig, ViTModel

        config = {"hidden_size": sizes["width"], "num_hidden_layers": sizes["layers"],
                  "num_attention_heads": sizes["heads"], "intermediate_size": 4 * sizes["width"]}  # fmt: skip
        ViTModel(ViTConfig(**config), add_pooling_layer=False).save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text("{}")
        return {}
    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": 224, "layers": sizes["layers"], "width": sizes["width"], "head_width": 16, "patch_size": 14}
    text = {"context_length": 8, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1}
    config = {"model_cfg": {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text},
              "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "size": 224}}  # fmt: skip
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    save_file(model.state_dict(), folder / "open_clip_model.safetensors")
    return {}


def _measure_loading(task: Task) -> Task:
    """Memory of our own at its peak; pages of the file that are mapped are its own, and given back when others need them."""
    import open_clip  # noqa: F401  # what importing takes is not counted

    folder, done, seen = task["folder"], threading.Event(), [_status("RssAnon")]

    def watch() -> None:
        while not done.wait(0.002):
            seen.append(_status("RssAnon"))

    watcher = threading.Thread(target=watch)
    watcher.start()
    _reset_peak()
    base = _peak()
    if task["kind"] == "language model":
        model: torch.nn.Module = load_language_model(folder)
    elif task["kind"].endswith("transformers"):
        model = load_encoder(EncoderConfig("transformers", folder, block=-1))
    else:
        model = load_encoder(EncoderConfig("open_clip", f"local-dir:{folder}", block=-1))
    for parameter in model.parameters():
        parameter.sum()  # mapped weights are read when they are first used
    done.set()
    watcher.join()
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    return {"weight_bytes": weights, "own_bytes": max(seen) - seen[0], "peak_bytes": _peak() - base}


def apart(work: Callable[[Task], Task], task: Task) -> Task:
    """In a fork of this process, whose memory is then given back whole."""
    with multiprocessing.get_context("fork").Pool(1) as pool:
        return pool.apply(work, (task,))


def _reset_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def _peak() -> int:
    return _status("VmHWM")


def _status(key: str) -> int:
    """Bytes, by the kernel's count of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def _gb(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:.2f} GB"


if __name__ == "__main__":
    main()
