"""From the command to the answer: stages/ask.py with a toy model, and what importing costs.

python benchmarks/startup.py

The peer is the same question asked through transformers alone, in the shortest script.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from shapes import language_model, on_pictures
from sidebyside import HERE, Side, parser, report

QUESTION = "ab cd ef"
PEER = """
import sys
from PIL import Image
from transformers import AutoTokenizer, Blip2ForConditionalGeneration, BlipImageProcessor
folder, picture, question = sys.argv[1:]
model = Blip2ForConditionalGeneration.from_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
pixels = BlipImageProcessor.from_pretrained(folder)(Image.open(picture), return_tensors="pt").pixel_values
places = "<image>" * model.config.num_query_tokens
text = tokenizer(f"Question: {question} Answer:", return_tensors="pt")
ids = text.input_ids
images = ids.new_full((1, model.config.num_query_tokens), model.config.image_token_id)
import torch
ids = torch.cat([images, ids], 1)
new = model.generate(pixel_values=pixels, input_ids=ids, num_beams=5, max_new_tokens=10, length_penalty=0.0,
                     eos_token_id=[2, 4])
print(tokenizer.decode(new[0, ids.shape[1]:], skip_special_tokens=True).strip())
"""
IMPORTS = {
    "torch": "import torch",
    "torch, qformer": "import torch, qformer",
    "torch, transformers": "import torch, transformers",
    "torch, qformer.load": "import torch, qformer; qformer.load",
}


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, ("transformers",)).parse_args(argv)
    shapes = {**on_pictures(True), "llm": language_model("opt", True), "pictures": 1}
    with tempfile.TemporaryDirectory(prefix="qformer-bench-") as scratch:
        folder = Path(scratch)
        task = {"work": "vqa", "threads": args.threads, "device": "cpu", "dtype": "float32", **shapes}
        (folder / "task.json").write_text(json.dumps(task))
        side = Side("sides.prepare", folder)
        side.answer()
        side.close()
        picture = folder / "picture.ppm"
        picture.write_bytes(b"P6 640 480 255\n" + bytes(range(256)) * (640 * 480 * 3 // 256))
        (folder / "peer.py").write_text(PEER)
        commands = {
            "ours": [HERE.parent / "stages" / "ask.py", folder / "adapter", picture, QUESTION],
            "transformers": [folder / "peer.py", folder / "whole", picture, QUESTION],
        }
        if not args.tiny:  # fills the disk cache
            for command in commands.values():
                _run(command, args.threads)
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in commands}
        imports: dict[str, list[float]] = {name: [] for name in (list(IMPORTS)[:2] if args.tiny else IMPORTS)}
        for round in range(args.rounds):
            for name in list(commands) if round % 2 == 0 else reversed(commands):
                turns[name].append(_run(commands[name], args.threads))
            for name in imports:
                imports[name].append(_run(["-c", IMPORTS[name]], args.threads)["seconds"])
    if (ours := turns["ours"][0]["said"]) != (theirs := turns["transformers"][0]["said"]):
        raise SystemExit(f"ask.py says {ours!r}, transformers {theirs!r}")
    seconds = {name: statistics.median(taken) for name, taken in imports.items()}
    report(args, "start of ask.py, toy model", shapes, turns, {}, None, {"imports": seconds})
    print("  " + ", ".join(f"import {name} {taken:.2f} s" for name, taken in seconds.items()))


def _run(command: list[Any], threads: int) -> dict[str, Any]:
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
    began = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, *map(str, command)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stderr is not None
    said = process.stdout.read()
    log = process.stderr.read()
    _, code, used = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(code)
    if code:
        raise SystemExit(f"{command[0]} failed:\n{log[-3000:]}")
    peak = used.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {"seconds": seconds, "peak_bytes": peak, "said": said.strip()}


if __name__ == "__main__":
    main()
