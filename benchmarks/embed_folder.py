"""Contrastive embeddings of a folder of 64 JPEG pictures of 640 x 480, decoding and resizing included: ViT-B.

python benchmarks/embed_folder.py
"""

from shapes import on_pictures
from sidebyside import parser, run


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, ("transformers",)).parse_args(argv)
    shapes = {**on_pictures(args.tiny), "pictures": 6 if args.tiny else 64}
    run(args, "embedding a folder of pictures", "folder", shapes)


if __name__ == "__main__":
    main()
