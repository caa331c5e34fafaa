"""Questions about clips that no single frame answers: which shape moves, and where to; one frame against eight.

    make demo                                                      # leaves runs/demo/opt/adapter
    python examples/shapes/video.py --adapter runs/demo/opt/adapter

Rows: the adapter of the demo as it is (it never saw a clip), and the same trained on clips of training scenes, each
with one frame and with eight, whose visual prompts stand one after the other. Needs pip install 'qformer[video]'.
"""

import argparse
import json
import math
import subprocess
import sys
from pathlib import Path

STAGE2 = "configs/shapes/stage2.yaml"
FRAMES = (1, 8)
# From the demo's adapter; the small language model learns to compare frames by a LoRA, for its own layers never met two.
TRAINING = [
    "stage2.init_share=1", "data.text=vqa", "tune.llm=lora", "tune.lora_rank=16", "tune.lora_alpha=32",
    "optim.lr=1.5e-3", "train.global_batch_size=32", "train.micro_batch_size=32", "train.log_every_steps=20",
]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapter", required=True, help="a stage-2 adapter of the Shapes world")
    parser.add_argument("--out", type=Path, default=Path("runs/video"), help="clips, runs and answers (runs/video)")
    parser.add_argument("--clips", type=int, default=2500, help="training clips, two questions each (2500)")
    parser.add_argument("--test", type=int, default=200, help="held-out clips, two questions each (200)")
    parser.add_argument("--steps", type=int, default=300, help="of each training (300)")
    args = parser.parse_args(argv)
    clips = args.out / "clips"
    if not (clips / "test.jsonl").is_file():
        run("-m", "qformer.shapes.moving", str(clips), "--train", str(args.clips), "--test", str(args.test))
    rows = {}
    for frames in FRAMES:
        rows["zero-shot", frames] = evaluate(args.adapter, clips, frames, args.out / f"zero_shot_{frames}.json")
    for frames in FRAMES:
        run_dir = args.out / f"trained_{frames}"
        data = [f"data.train=[{clips / 'train.jsonl'}]", "data.validation=[]", f"data.frames={frames}"]
        data.append(f"data.features={args.out / f'features_{frames}'}")
        start = [f"stage2.init_from={args.adapter}", f"train.max_steps={args.steps}"]
        if not (run_dir / "adapter").is_dir():
            run("stages/cache_features.py", STAGE2, "run.dir=unused", *data)
            run("stages/stage2.py", STAGE2, f"run.dir={run_dir}", *data, *start, *TRAINING)
        rows["trained on clips", frames] = evaluate(
            str(run_dir / "adapter"), clips, frames, args.out / f"trained_{frames}.json"
        )
    print(f"{'row':<18}{'frames':>8}{'overall':>16}{'which moves':>14}{'where to':>12}{'n':>6}")
    for (name, frames), row in rows.items():
        n, share = row["n"], row["scores"]["overall"] / 100
        error = 100 * math.sqrt(share * (1 - share) / n)
        kinds = row["by_type"]
        print(
            f"{name:<18}{frames:>8}{100 * share:>9.1f} +- {error:.1f}{kinds['mover']:>14.1f}{kinds['goal']:>12.1f}{n:>6}"
        )


def run(*arguments: str) -> None:
    """A process of its own, as it would be typed."""
    print("$ python", *arguments, flush=True)
    if subprocess.run([sys.executable, *arguments]).returncode:  # it has said why
        raise SystemExit(1)


def evaluate(adapter: str, clips: Path, frames: int, out: Path) -> dict:
    """The scores of an adapter that is given so many frames of the held-out clips; kept in a file."""
    if not out.is_file():
        options = ["--frames", str(frames), "--rule", "exact", "--num-beams", "1", "--json", str(out)]
        run("stages/evaluate.py", adapter, str(clips / "test.jsonl"), *options)
    return json.loads(out.read_text())


if __name__ == "__main__":
    main()
