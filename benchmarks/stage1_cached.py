"""A step of stage 1 over ten epochs: ours writes and reads a feature cache, LAVIS runs the encoder (ViT-L/14) every time.

python benchmarks/stage1_cached.py

Ours encodes, and writes to disk, a tenth of each batch, which is what a picture costs where ten epochs share its cache;
it reads the whole batch from the cache and trains on it. JPEG decoding is part of our time only.
"""

from shapes import on_cached
from sidebyside import parser, run


def main(argv: list[str] | None = None) -> None:
    args = parser(__doc__, ("lavis",)).parse_args(argv)
    run(args, "stage 1, ten epochs with an encoder of ViT-L/14", "stage1_cached", on_cached(args.tiny))


if __name__ == "__main__":
    main()
