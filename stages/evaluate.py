"""Evaluate an adapter, or a file of predictions, on records; alone or over all ranks of a launcher.

python stages/evaluate.py runs/s2/adapter questions.jsonl --json scores.json
python stages/evaluate.py runs/s2/adapter questions.jsonl --mode text-only      # without the image
python stages/evaluate.py runs/s2/adapter questions.jsonl --mode oracle-caption # its caption
python stages/evaluate.py runs/s2/adapter test.jsonl --submit vqa.json          # for a server
python stages/evaluate.py --predictions vqa.json questions.jsonl                # without a model
accelerate launch stages/evaluate.py runs/s2/adapter questions.jsonl --answers out.jsonl  # resumes
"""

import argparse
from pathlib import Path

from qformer.config.help import HelpFormatter
from qformer.environment import prepare_environment
from qformer.evaluation import TASKS


def main(argv: list[str] | None = None) -> None:
    modes = dict.fromkeys(mode for task in TASKS.values() for mode in task.modes)
    rules = dict.fromkeys(rule for task in TASKS.values() for rule in task.rules)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument(
        "paths", nargs="+", metavar="PATH", help="adapter folder, then record files (docs/evaluation.md)"
    )
    parser.add_argument("--task", choices=TASKS, default="vqa", help="what is asked and how it is scored (vqa)")
    parser.add_argument("--mode", choices=modes, help="what the model is given (image)")
    parser.add_argument("--rule", choices=rules, help="how the metric normalises (official-2021)")
    parser.add_argument("--predictions", type=Path, help="score these outputs instead of asking a model")
    parser.add_argument("--root", help="folder that relative image paths start from; default: the record file's own")
    parser.add_argument("--limit", type=int, help="only the first so many records")
    parser.add_argument("--answers", type=Path, help="file that grows with every batch; with it a stopped run goes on")
    parser.add_argument("--json", type=Path, dest="json_file", help="write scores and every answer to this file")
    parser.add_argument("--submit", type=Path, help="write the answers as official servers take them")
    parser.add_argument("--batch-size", type=int, default=64, help="records of a rank at a time (64)")
    parser.add_argument("--workers", type=int, default=2, help="processes of a rank that read images (2)")
    parser.add_argument("--device", help="as cpu, cuda; default: the accelerator, if there is one")
    parser.add_argument("--num-beams", type=int, help="beams; default: as in the adapter's config")
    args = parser.parse_intermixed_args(argv)
    # Only now what imports torch.
    prepare_environment()
    from qformer.evaluation.command import evaluate
    from qformer.launch import reported_errors

    with reported_errors():
        evaluate(**vars(args))


if __name__ == "__main__":
    main()
