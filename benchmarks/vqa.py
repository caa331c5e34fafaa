"""Answering 5 questions about each picture in batches of 16 pairs: ViT-B, OPT-125m, 5 beams, 10 new tokens.

python benchmarks/vqa.py
"""

from shapes import language_model, on_pictures
from sidebyside import parser, run


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, ("transformers",)).parse_args(argv)
    asked = {"pictures": 2 if args.tiny else 16, "questions": 5, "llm": language_model("opt", args.tiny)}
    run(args, "VQA, 5 questions a picture", "vqa", {**on_pictures(args.tiny), **asked})


if __name__ == "__main__":
    main()
