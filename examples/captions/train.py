"""Your own captions: a folder of pictures and a table -> stage 1 -> stage 2 -> captions of pictures held out.

    python examples/captions/train.py PICTURES CAPTIONS.csv OUT --encoder configs/encoder/clip_b32.yaml \\
        --llm configs/llm/opt_125m.yaml train.max_steps=2000 train.global_batch_size=64 train.micro_batch_size=32
    python examples/captions/train.py --toy OUT         # draws 64 pictures first; half a minute of one core

CAPTIONS is a .csv with the columns `image` (a path below PICTURES) and `caption`, or a .jsonl with these keys. An image
may have several lines, or in a .jsonl a list of captions. One image in ten is held out. Without --encoder and --llm the
small models of configs/shapes are used, which know few words. Key=value overrides go to both stages. Several GPUs: the
two lines that are printed, after `accelerate launch`. Leaves OUT/stage1 and OUT/stage2, and prints a caption of each of
four held-out pictures.
"""

import argparse
import csv
import json
from pathlib import Path

import qformer
from qformer.stages import stage1, stage2

SMALL = [
    "train.max_steps=40", "train.global_batch_size=16", "train.micro_batch_size=16", "train.validate_every_steps=40",
    "train.validation_records=32", "train.checkpoint_every_steps=40", "optim.warmup_steps=10", "data.workers=0",
]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="draw pictures and captions first")
    parser.add_argument("--encoder", help="YAML of the frozen encoder, e.g. configs/encoder/clip_b32.yaml")
    parser.add_argument("--llm", help="YAML of the frozen language model, e.g. configs/llm/opt_125m.yaml")
    parser.add_argument("paths", nargs="+", help="PICTURES CAPTIONS OUT, or with --toy only OUT; then key=value ...")
    args = parser.parse_intermixed_args(argv)
    names, overrides = [p for p in args.paths if "=" not in p], [p for p in args.paths if "=" in p]
    if len(names) != (1 if args.toy else 3) or bool(args.encoder) != bool(args.llm):
        parser.error("expected PICTURES CAPTIONS OUT, or --toy OUT; and --encoder with --llm, or neither")
    out = Path(names[-1])
    out.mkdir(parents=True, exist_ok=True)
    pictures, table = draw_toy(out / "pictures") if args.toy else map(Path, names[:2])
    held_out = write_records(pictures, table, out)

    data = [f"data.train=[{out / 'train.jsonl'}]", f"data.validation=[{out / 'validation.jsonl'}]", *SMALL, *overrides]
    recipes = "configs" if args.encoder else "configs/shapes"
    run(stage1.main, [f"{recipes}/stage1.yaml", *filter(None, [args.encoder]), *data, f"run.dir={out / 'stage1'}"])
    run(stage2.main, [f"{recipes}/stage2.yaml", *filter(None, [args.encoder, args.llm]), *data,
                      f"stage2.init_from={out / 'stage1/adapter'}", f"run.dir={out / 'stage2'}"])  # fmt: skip
    model = qformer.load(out / "stage2/adapter")
    for picture, caption in zip(held_out[:4], model.caption(held_out[:4]), strict=True):
        print(f"{picture}: {caption}")


def write_records(pictures: Path, table: Path, out: Path) -> list[str]:
    """OUT/train.jsonl and OUT/validation.jsonl, one record a picture; returns the pictures held out."""
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file)) if table.suffix == ".csv" else [json.loads(line) for line in file]
    captions: dict[str, list[str]] = {}
    for row in rows:
        texts = [row["caption"]] if isinstance(row["caption"], str) else row["caption"]
        captions.setdefault(str((pictures / row["image"]).resolve()), []).extend(texts)
    if missing := [picture for picture in captions if not Path(picture).is_file()]:
        raise SystemExit(f"{table}: {len(missing)} of {len(captions)} images are not there, the first: {missing[0]}")
    if len(captions) < 2:
        raise SystemExit(f"{table}: {len(captions)} images; expected two or more, of which one in ten is held out")
    held_out = sorted(captions)[::10]
    for name, chosen in (("train", captions.keys() - set(held_out)), ("validation", held_out)):
        lines = (json.dumps({"image": picture, "caption": captions[picture]}) + "\n" for picture in sorted(chosen))
        (out / f"{name}.jsonl").write_text("".join(lines))
    return held_out


def draw_toy(folder: Path, count: int = 64) -> tuple[Path, Path]:
    """Pictures of the embedded world of shapes, and captions.csv."""
    from qformer.shapes.write import write_world

    write_world(folder, n_train=count, n_validation=0, n_questions=0)
    with (folder / "captions.csv").open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["image", "caption"])
        for record in map(json.loads, (folder / "train.jsonl").read_text().splitlines()):
            table.writerows([record["image"], caption] for caption in record["caption"])
    return folder, folder / "captions.csv"


def run(stage, arguments: list[str]) -> None:
    print(f"$ python stages/{stage.__module__.split('.')[-1]}.py", *arguments, flush=True)
    stage(arguments)
    if not Path(arguments[-1].removeprefix("run.dir="), "adapter").is_dir():  # stopped by Ctrl-C, and saved
        raise SystemExit("stopped; the same command with train.resume=auto goes on")


if __name__ == "__main__":
    main()
