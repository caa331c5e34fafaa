"""Captions of 16 pictures: ViT-B, OPT-125m, 5 beams, 30 new tokens.

python benchmarks/captioning.py
"""

from shapes import language_model, on_pictures
from sidebyside import parser, run


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, ("transformers",)).parse_args(argv)
    shapes = {**on_pictures(args.tiny), "llm": language_model("opt", args.tiny)}
    run(args, "captions of a batch of pictures", "captioning", shapes)


if __name__ == "__main__":
    main()
