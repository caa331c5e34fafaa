"""A training step of stage 2 (forward and backward through the frozen language model, AdamW), image features given.

python benchmarks/stage2_step.py opt        # OPT-125m; against the faster of LAVIS and transformers
python benchmarks/stage2_step.py t5         # T5-small
"""

from shapes import language_model, on_features
from sidebyside import LIBRARIES, parser, run


def main(argv: list[str] | None = None) -> None:
    options = parser(__doc__, LIBRARIES)
    options.add_argument("llm", choices=("opt", "t5"))
    args = options.parse_args(argv)
    shapes = {**on_features(args.tiny), "llm": language_model(args.llm, args.tiny)}
    name = {"opt": "OPT-125m", "t5": "T5-small"}[args.llm]
    run(args, f"stage-2 training step, {name} shape, features given", "stage2", shapes)


if __name__ == "__main__":
    main()
