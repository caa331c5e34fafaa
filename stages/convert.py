"""Turn another library's BLIP-2 checkpoint into an adapter that answers, embeds and trains on here.

    python stages/convert.py --from lavis blip2_pretrained_opt2.7b.pth --out adapter \\
        configs/encoder/eva_g.yaml configs/llm/opt_2.7b.yaml
    python stages/convert.py --from lavis blip2_pretrained.pth --out adapter \\
        configs/encoder/eva_g.yaml
    python stages/convert.py --from transformers Salesforce/blip2-opt-2.7b --out adapter \\
        llm.dtype=float16

lavis: a .pth of stage 1, stage 2 or InstructBLIP. Name the frozen parts that it was trained with,
as for a run; their widths are checked without loading them. An encoder inside the file (fine-tuned
ones) is written to OUT/encoder.
transformers: folder or hub id of Blip2ForConditionalGeneration, Blip2ForImageTextRetrieval or
InstructBlipForConditionalGeneration, which stays the place of the frozen parts.
"""

import argparse
import resource
import sys
from pathlib import Path

from qformer.config import to_yaml
from qformer.config.help import HelpFormatter
from qformer.environment import prepare_environment
from qformer.files import atomic_folder


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--from", dest="origin", nargs=2, required=True, metavar=("FORMAT", "SOURCE"),
                        help="lavis FILE, or transformers FOLDER_OR_ID")  # fmt: skip
    parser.add_argument("--out", type=Path, required=True, help="adapter folder to write; must not exist")
    parser.add_argument("--encoder-heads", type=int, help="attention heads of an encoder inside a LAVIS file; "
                        "default: one for 88 columns as in ViT-g, or else for 64")  # fmt: skip
    parser.add_argument("config", nargs="*", help="YAML files and key=value overrides of the adapter's config")
    args = parser.parse_intermixed_args(argv)
    # Only now what imports torch.
    prepare_environment()
    from qformer.card import converted_card, stage_name
    from qformer.checkpoint import save_adapter
    from qformer.interop.frozen import filled_adapter
    from qformer.launch import reported_errors

    library, source = args.origin
    with reported_errors():
        if args.out.exists():
            raise ValueError(f"--out={args.out} exists already; name a folder that does not, or remove it")
        if library == "lavis":
            from qformer.interop.lavis import import_lavis, save_encoder

            encoder_folder = args.out.resolve() / "encoder"
            imported = import_lavis(Path(source), args.config, encoder_folder)
        elif library == "transformers":
            from qformer.interop.blip2 import import_blip2

            imported = import_blip2(source, args.config)
        else:
            raise ValueError(f"--from {library}: expected lavis or transformers")

        report = imported.report.lines(source)
        with atomic_folder(args.out) as scratch:
            card = converted_card(imported.config, library, source, imported.report.lines(library))
            save_adapter(scratch, filled_adapter(imported), to_yaml(imported.config), card)
            if library == "lavis" and imported.config.encoder.id == str(encoder_folder):
                save_encoder(Path(source), scratch / "encoder", args.encoder_heads)
    print("\n".join([*report, f"{args.out} is an adapter of {stage_name(imported.config)}"]))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    print(f"peak memory {peak / 1e9:.2f} GB")


if __name__ == "__main__":
    main()
