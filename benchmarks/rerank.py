"""Matching logits of 64 pictures with 64 captions, image features given, as retrieval re-ranks its candidates.

python benchmarks/rerank.py                 # against LAVIS; 2 of the 64 pictures with all captions a turn
python benchmarks/rerank.py --rounds 32     # each picture once
"""

from shapes import on_features
from sidebyside import parser, run


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, ("lavis", "transformers")).parse_args(argv)
    args.peer = args.peer or ["lavis"]
    many = 4 if args.tiny else 64
    pairs = {"pictures": many, "captions": many, "pictures_a_turn": 2}
    run(args, "ITM re-rank, 64 pictures x 64 captions", "rerank", {**on_features(args.tiny), **pairs})


if __name__ == "__main__":
    main()
