"""Evaluate an adapter, or a file of predictions, on records; alone or over all ranks of a launcher.

python stages/evaluate.py runs/s2/adapter questions.jsonl --json scores.json
python stages/evaluate.py runs/s2/adapter questions.jsonl --mode text-only      # without the image
python stages/evaluate.py runs/s2/adapter questions.jsonl --mode oracle-caption # its caption
python stages/evaluate.py runs/s2/adapter coco.jsonl --task coco_caption   # configs/tasks
python stages/evaluate.py runs/s2/adapter test.jsonl --submit vqa.json          # for a server
python stages/evaluate.py --predictions vqa.json questions.jsonl                # without a model
python stages/evaluate.py --predictions r.json captions_val2014.json --task caption  # published
accelerate launch stages/evaluate.py runs/s2/adapter questions.jsonl --answers out.jsonl  # resumes
accelerate launch stages/evaluate.py runs/s1/adapter coco.jsonl --task retrieval_coco --answers DIR
"""

import argparse
from pathlib import Path

from qformer.config import protocol_options, read_protocol, task_names
from qformer.config.help import HelpFormatter
from qformer.environment import prepare_environment
from qformer.evaluation import TASKS


def main(argv: list[str] | None = None) -> None:
    names = f"{', '.join(TASKS)}; with a protocol: {', '.join(task_names())}"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="adapter folder, then record files (docs/evaluation.md)"
    )
    parser.add_argument("--task", default="vqa", help=f"{names}; or a YAML file as in configs/tasks (vqa)")
    for name, kind, text in protocol_options():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help=f"{text}; overrides the YAML")
    parser.add_argument("--predictions", type=Path, help="score these outputs instead of asking a model")
    parser.add_argument("--root", help="folder that relative image paths start from; default: the record file's own")
    parser.add_argument("--limit", type=int, help="only the first so many records")
    parser.add_argument(
        "--answers",
        type=Path,
        help="file that grows with every batch (retrieval: a folder); with it a stopped run goes on",
    )
    parser.add_argument("--json", type=Path, dest="json_file", help="write scores and every answer to this file")
    parser.add_argument("--submit", type=Path, help="write the answers as official servers take them")
    parser.add_argument("--batch-size", type=int, default=64, help="records of a rank at a time (64)")
    parser.add_argument("--workers", type=int, default=2, help="processes of a rank that read images (2)")
    parser.add_argument(
        "--similarity", metavar="ADAPTER", help="stage-1 adapter that compares captions with images too"
    )
    parser.add_argument("--device", help="as cpu, cuda; default: the accelerator, if there is one")
    args = vars(parser.parse_intermixed_args(argv))
    options = {name: args.pop(name) for name, _, _ in protocol_options()}
    # Only now what imports torch.
    prepare_environment()
    from qformer.evaluation.command import evaluate
    from qformer.launch import reported_errors

    with reported_errors():
        evaluate(args.pop("paths"), read_protocol(args.pop("task"), tuple(TASKS), options), **args)


if __name__ == "__main__":
    main()
