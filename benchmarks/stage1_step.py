"""A training step of stage 1 (ITC, ITM and ITG; forward, backward, AdamW), image features given.

python benchmarks/stage1_step.py                            # against LAVIS's Blip2Qformer
python benchmarks/stage1_step.py --peer transformers        # against ITC and ITM by hand: less work, it has no ITG
"""

from shapes import on_features
from sidebyside import parser, run


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, ("lavis", "transformers"))
    args = options.parse_args(argv)
    args.peer = args.peer or ["lavis"]
    run(args, "stage-1 training step, features given", "stage1", on_features(args.tiny))


if __name__ == "__main__":
    main()
