"""Train a Q-Former on signals of any kind: a folder of .npy arrays and a caption for each.

    python examples/arrays/train.py ARRAYS CAPTIONS.json OUT [key=value ...]
    python examples/arrays/train.py --toy OUT [key=value ...]     # makes 256 arrays with captions and trains on them

Every array is float[N, width]: what an encoder of yours says of one recording, protein or scan, N as it comes.
CAPTIONS.json holds {"name without .npy": "caption" or ["caption", "another"], ...}. The arrays become a feature cache,
OUT/cache, and stage 1 trains on it into OUT/stage1. Key=value overrides go to stage 1, such as train.max_steps=10000 or
qformer.tokenizer=FOLDER. Stage 2 then takes the same encoder.*, data.* and stage2.init_from=OUT/stage1/adapter.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np

STAGES = Path(__file__).resolve().parents[2] / "stages"
SETTINGS = [
    "train.max_steps=300", "train.global_batch_size=32", "train.micro_batch_size=32", "train.validate_every_steps=300",
    "train.checkpoint_every_steps=300", "optim.lr=1e-3", "optim.warmup_steps=30", "qformer.layers=2",
    "qformer.width=128", "qformer.heads=4", "qformer.ffn_width=256", "qformer.queries=8", "qformer.contrastive_width=64",
    "data.workers=0",
]  # fmt: skip
TOY_WIDTH = 32
WAVES, PITCHES = ("sine", "square", "noisy"), ("low", "middle", "high")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="make the arrays and captions first")
    parser.add_argument("paths", nargs="+", help="ARRAYS CAPTIONS.json OUT, or with --toy only OUT; then key=value ...")
    args = parser.parse_intermixed_args(argv)
    names = [p for p in args.paths if "=" not in p]
    if len(names) != (1 if args.toy else 3):
        parser.error("expected ARRAYS CAPTIONS.json OUT, or --toy OUT")
    out = Path(names[-1]).resolve()
    out.mkdir(parents=True, exist_ok=True)
    arrays, captions = (out / "arrays", out / "captions.json") if args.toy else map(Path, names[:2])
    if args.toy:
        make_toy(arrays, captions)
    width, count = write_records(arrays.resolve(), json.loads(captions.read_text()), out / "records.jsonl")
    print(f"{count} arrays of width {width}", flush=True)
    shared = ["encoder.loader=features", f"encoder.width={width}", f"data.train=[{out / 'records.jsonl'}]",
              f"data.features={out / 'cache'}"]  # fmt: skip
    run("cache_features.py", [*shared, "data.workers=0"])
    run("stage1.py", [*shared, f"run.dir={out / 'stage1'}", *SETTINGS, *(p for p in args.paths if "=" in p)])


def write_records(arrays: Path, captions: dict[str, str | list[str]], path: Path) -> tuple[int, int]:
    """One record for each caption; returns the width of the arrays and their number."""
    records = [{"image": str(arrays / f"{name}.npy"), "caption": [text] if isinstance(text, str) else text, "image_id": name}
               for name, text in sorted(captions.items())]  # fmt: skip
    missing = [record["image"] for record in records if not Path(str(record["image"])).is_file()]
    if missing or not records:
        sys.exit(f"{len(missing)} of {len(captions)} captions have no array, the first: {(missing or ['-'])[0]}")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return int(np.load(str(records[0]["image"]), mmap_mode="r").shape[1]), len(records)


def make_toy(arrays: Path, captions: Path, count: int = 256) -> None:
    """Recordings of 5 to 40 frames, each frame 32 samples of a wave, and what one hears in them."""
    arrays.mkdir(parents=True, exist_ok=True)
    texts = {}
    for i in range(count):
        rng = np.random.default_rng(i)
        wave, pitch = rng.integers(3), rng.integers(3)
        time = np.arange(rng.integers(5, 41) * TOY_WIDTH) + rng.integers(1000)
        signal = np.sin(time * (0.15, 0.5, 1.4)[pitch])
        signal = (signal, np.sign(signal), signal + rng.standard_normal(len(time)))[wave]
        np.save(arrays / f"{i:03d}.npy", signal.reshape(-1, TOY_WIDTH).astype(np.float32))
        texts[f"{i:03d}"] = f"a {WAVES[wave]} wave of {PITCHES[pitch]} pitch"
    captions.write_text(json.dumps(texts, indent=1))


def run(stage: str, arguments: list[str]) -> None:
    command = [sys.executable, str(STAGES / stage), *arguments]
    print("$", " ".join(command), flush=True)
    if code := subprocess.run(command).returncode:
        sys.exit(code)


if __name__ == "__main__":
    main()
