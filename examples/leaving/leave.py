"""Leave for transformers and vLLM: a trained adapter becomes a model of theirs that says the same.

    python examples/leaving/leave.py ADAPTER PICTURE OUT       # of stage 2, with an encoder that fits Blip2VisionModel
    python examples/leaving/leave.py --toy OUT                 # a few steps on drawn pictures first: 15 s

Writes OUT/blip2, loads it again with transformers alone, and compares the captions; prints

    ours:         a large red circle is ...
    transformers: a large red circle is ...

OUT/blip2 is Blip2ForConditionalGeneration as transformers writes it, which vLLM serves: `vllm serve OUT/blip2`; how far
that was run, and how a server of the language model alone takes the visual prompts: docs/serving.md.
"""

import argparse
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import qformer
from qformer.stages import export, stage2

TOY = ["encoder={loader: timm, id: vit_tiny_patch16_224, random_weights: true, image_size: 64}", "encoder.block=-2",
       "train.max_steps=10", "train.global_batch_size=16", "train.micro_batch_size=16", "train.validate_every_steps=10",
       "train.checkpoint_every_steps=10", "optim.warmup_steps=2", "data.workers=0", "data.validation=[]"]  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true", help="train a small adapter first")
    parser.add_argument("paths", nargs="+", help="ADAPTER PICTURE OUT, or with --toy only OUT")
    args = parser.parse_args(argv)
    if len(args.paths) != (1 if args.toy else 3):
        parser.error("expected ADAPTER PICTURE OUT, or --toy OUT")
    out = Path(args.paths[-1])
    adapter, picture = train_toy(out) if args.toy else args.paths[:2]

    export.main([adapter, str(out / "blip2"), "--to", "transformers", "--picture", picture])

    model = qformer.load(adapter, device="cpu")
    settings = {"num_beams": 5, "max_new_tokens": 20, "min_new_tokens": 1}
    ours = model.caption([picture], **settings)[0]

    processor = AutoProcessor.from_pretrained(out / "blip2", backend="pil")  # resizes as ours does
    theirs = AutoModelForImageTextToText.from_pretrained(out / "blip2").eval()
    inputs = processor(images=Image.open(picture), text=model.config.llm.prompt, return_tensors="pt")
    ids = theirs.generate(**inputs, **settings)
    text = processor.batch_decode(ids, skip_special_tokens=True)[0].strip()
    print(f"ours:         {ours}\ntransformers: {text}")
    if text != ours:
        raise SystemExit("the texts differ")


def train_toy(out: Path) -> tuple[str, str]:
    """An adapter between a small ViT of random weights and the small OPT of configs/shapes; and one of its pictures."""
    from qformer.shapes.write import write_world

    write_world(out / "pictures", n_train=32, n_validation=0, n_questions=0)
    stage2.main(
        ["configs/shapes/stage2.yaml", *TOY, f"data.train=[{out / 'pictures/train.jsonl'}]", f"run.dir={out / 'run'}"]
    )
    return str(out / "run/adapter"), str(out / "pictures/train/00000.png")


if __name__ == "__main__":
    main()
