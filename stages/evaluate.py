"""Answer questions about pictures and score them with the official VQA accuracy.

python stages/evaluate.py runs/s2/adapter questions.jsonl --json scores.json
python stages/evaluate.py runs/s2/adapter questions.jsonl --mode blind     # the language model without the picture
python stages/evaluate.py runs/s2/adapter questions.jsonl --mode told      # ... given the record's caption as text
"""

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from rich.progress import track

from qformer.data import BrokenRecord, Record, read_records
from qformer.inference import load
from qformer.launch import reported_errors
from qformer.metrics import score_vqa


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", type=Path, help="adapter folder of stage 2")
    parser.add_argument("records", nargs="+", help="record files with image, question, answers; optional question_type")
    parser.add_argument(
        "--mode", choices=("picture", "blind", "told"), default="picture", help="what the model is given"
    )
    parser.add_argument("--root", help="folder that relative image paths start from; default: the record file's own")
    parser.add_argument("--json", type=Path, help="write scores and every answer to this file")
    parser.add_argument("--batch-size", type=int, default=64, help="questions answered at a time")
    parser.add_argument("--limit", type=int, help="at most this many questions")
    parser.add_argument("--normalize", choices=("official", "always"), default="official",
                        help="official: as the official tool since March 2021; always: both sides always")  # fmt: skip
    args = parser.parse_args(argv)
    if min(args.batch_size, 1 if args.limit is None else args.limit) < 1:
        parser.error("--batch-size and --limit must be at least 1")
    with reported_errors():
        if args.json:  # told now, not when everything is answered
            args.json.parent.mkdir(parents=True, exist_ok=True)
            args.json.open("a").close()
        records = read_records(args.records, root=args.root, key="RECORDS")
        chosen = [records[i] for i in range(len(records) if args.limit is None else min(args.limit, len(records)))]
        for record in chosen:
            if not record.question or not record.answers:
                raise ValueError(f"{record.image}: this record has no question with answers; evaluate needs both")
            if args.mode == "told" and not record.captions:
                raise ValueError(f"{record.image}: --mode told needs a caption in every record")
        model = load(args.adapter)

        scored: list[Record] = []
        said: list[str] = []
        dropped: list[str] = []
        batches = [chosen[i : i + args.batch_size] for i in range(0, len(chosen), args.batch_size)]
        for batch in track(batches, "answering", disable=not sys.stderr.isatty()):
            if args.mode == "picture":
                batch, pictures = _readable(model, batch, dropped)
            questions = [str(r.question) for r in batch]
            if args.mode == "picture":
                said += model.answer(pictures, questions) if batch else []
            else:
                said += model.answer(None, questions, [r.captions[0] if args.mode == "told" else "" for r in batch])
            scored += batch
        if dropped and not scored:
            raise ValueError(f"no picture could be read, the first: {dropped[0]}")
        types = [r.question_type or "all" for r in scored]
        score = score_vqa(said, [list(r.answers) for r in scored], types, normalize=args.normalize)

    width = max(len(t) for t in score.by_type)
    for question_type, accuracy in score.by_type.items():
        print(f"{question_type:<{width}}  {accuracy:5.1f}  ({score.n_by_type[question_type]} questions)")
    print(f"{'overall':<{width}}  {score.overall:5.1f}  ({score.n} questions, VQA accuracy in percent, {args.mode})")
    if dropped:
        print(f"{len(dropped)} broken pictures were left out, the first: {dropped[0]}", file=sys.stderr)
    if args.json:
        answers = [
            {"image": r.image, "question": r.question, "said": a, "answers": r.answers, "question_id": r.question_id,
             "question_type": r.question_type} for r, a in zip(scored, said, strict=True)
        ]  # fmt: skip
        result = {"mode": args.mode, **dataclasses.asdict(score), "dropped": len(dropped), "results": answers}
        args.json.write_text(json.dumps(result, indent=1))


def _readable(model, batch: list, dropped: list[str]) -> tuple[list, list]:
    """The records whose picture can be read, and their pictures, one object a file so that it is encoded once."""
    pictures: dict[str, object] = {}
    kept = []
    for record in batch:
        try:
            if record.image not in pictures:
                pictures[record.image] = model.read(record)
            kept.append(record)
        except BrokenRecord as broken:
            dropped.append(str(broken))
    return kept, [pictures[r.image] for r in kept]


if __name__ == "__main__":
    main()
