"""Hand a trained adapter on: to transformers, or to a language model server as embeddings.

python stages/export.py runs/s2 --to transformers OUT                   # the whole model, ...
python stages/export.py runs/s2 OUT --visual-prompts one.jpg two.jpg    # what the LLM is shown

The whole model is written where the encoder fits transformers' Blip2VisionModel (EVA-CLIP-g, ViT,
MAE, DINOv2), else the Q-Former alone; OUT/README.md says how to run it. What was written is loaded
by transformers and compared first.
"""

import argparse
from pathlib import Path
from typing import Any

from qformer.config.help import HelpFormatter
from qformer.environment import prepare_environment


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("adapter", type=Path, help="adapter folder, or the run's folder that holds it")
    parser.add_argument("out", type=Path, help="folder to write; must not exist")
    kind = parser.add_mutually_exclusive_group(required=True)
    kind.add_argument("--to", choices=("transformers",), help="the library that is to load it")
    kind.add_argument("--visual-prompts", nargs="+", metavar="PICTURE", help="pictures (or feature files) to embed")
    parser.add_argument("--picture", type=Path, help="picture that the comparison looks at; default: random pixels")
    parser.add_argument("--prompt", help="text that goes with visual prompts; default: llm.prompt")
    args = parser.parse_args(argv)
    # Only now what imports torch.
    prepare_environment()
    from qformer.inference import load
    from qformer.launch import reported_errors

    with reported_errors():
        if args.out.exists():
            raise ValueError(f"{args.out} exists already; name a folder that does not, or remove it")
        inside = args.adapter / "adapter"
        loaded = load(inside if inside.is_dir() else args.adapter, device="cpu")
        model: Any = loaded.model
        config: Any = loaded.config
        if args.to:
            from qformer.data import Record, load_image
            from qformer.interop.export import export

            picture = load_image(Record(str(args.picture), str(args.picture))) if args.picture else None
            report = export(model, config, args.out, picture)
            print("\n".join(report.lines()))
        else:
            from qformer.interop.visual_prompts import write_visual_prompts

            if config.stage != "stage2":
                raise ValueError(f"{args.adapter} is of stage 1; visual prompts need stage 2, with a language model")
            prompt = config.llm.prompt if args.prompt is None else args.prompt
            features = ((name, loaded.encode([name])) for name in args.visual_prompts)
            count = write_visual_prompts(model, config, features, prompt=prompt, out=args.out)
            print(f"{count} visual prompts for {config.llm.id}")
        print(f"{args.out}: written; README.md says how to run it")


if __name__ == "__main__":
    main()
