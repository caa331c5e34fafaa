"""Writes the Shapes world to disk as any data set comes: pictures in files, records in JSON lines.

    python -m qformer.shapes.write runs/shapes

leaves `train.jsonl` (pictures with captions, never a question), `validation.jsonl` (held-out scenes with captions) and
`questions.jsonl` (held-out scenes with questions, equally many of each type, and the caption for the row "oracle caption").
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

from qformer.shapes import grammar, world


def write_world(folder: Path, *, n_train: int, n_validation: int, n_questions: int, seed: int = 0) -> None:
    """Write `n_train` and `n_validation` captioned pictures and `n_questions` questions, all from one seed."""
    for split, count in (("train", n_train), ("validation", n_validation)):
        rng = random.Random(f"{seed} {split}")
        records = []
        for i in range(count):
            scene = world.draw_split(rng, split == "validation")
            captions = [grammar.caption(scene, rng) for _ in range(5)]
            records.append({"image": _draw(folder, f"{split}/{i:05d}.png", scene, rng), "caption": captions})
        _write_lines(folder / f"{split}.jsonl", records)
    rng = random.Random(f"{seed} questions")
    records = []
    while len(records) < n_questions:
        scene = world.draw_split(rng, True)
        picture = f"questions/{len(records):05d}.png"
        caption = grammar.caption(scene, rng)
        question_types = grammar.QUESTION_TYPES[len(records) % len(grammar.QUESTION_TYPES) :]
        for question_type in question_types[: n_questions - len(records)]:
            if not (pair := grammar.ask(scene, rng, question_type)):
                break
            records.append({
                "image": picture, "caption": caption, "question": pair[0], "answers": [pair[1]],
                "question_id": str(len(records)), "question_type": question_type,
            })  # fmt: skip
        if records and records[-1]["image"] == picture:
            _draw(folder, picture, scene, rng)
    _write_lines(folder / "questions.jsonl", records)


def _draw(folder: Path, name: str, scene: world.Scene, rng: random.Random) -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    world.render(scene, rng).save(path)
    return name


def _write_lines(path: Path, records: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--train", type=int, default=10000, help="captioned training pictures")
    parser.add_argument("--validation", type=int, default=512, help="captioned held-out pictures")
    parser.add_argument("--questions", type=int, default=700, help="questions about held-out pictures")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    counts = {"n_train": args.train, "n_validation": args.validation, "n_questions": args.questions}
    write_world(args.folder, **counts, seed=args.seed)
    print(f"wrote {args.train} + {args.validation} captioned pictures and {args.questions} questions to {args.folder}")


if __name__ == "__main__":
    main()
