"""See BLIP-2's two stages work: train on pictures of a small world, then answer questions about pictures held out.

python examples/shapes/demo.py              # afresh in runs/demo; leaves report.html and results.json there
python examples/shapes/demo.py --resume     # go on after Ctrl-C
"""

import argparse
import sys

from experiment import conclude, score_of
from recipe import Recipe, add_options
from resumable import Experiment

OWNED = ("features", "stage1", "opt", "answers", "results.json", "report.html")  # what a fresh start removes from --out
ROWS = ("text_only", "oracle_caption", "stage1_2")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, out="runs/demo")
    parser.add_argument("--resume", action="store_true", help="keep what is finished and go on; otherwise start afresh")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    recipe, out = Recipe.from_arguments(args), args.out
    go_on = ["examples/shapes/demo.py", *(word for word in words if word != "--resume"), "--resume"]
    try:
        experiment = Experiment(out, recipe, owned=OWNED, resume=args.resume, go_on=go_on)
    except ValueError as error:
        parser.error(str(error))

    with experiment:
        experiment.run(recipe.pictures())
        experiment.run(recipe.features(out))  # the encoder is frozen: once is enough
        experiment.run(recipe.stage1(out / "stage1"))  # which text belongs to which picture
        experiment.run(recipe.stage2(out / "opt", "opt", init_from=out / "stage1"))  # speak to the language model
        answers = {row: out / "answers" / f"opt_{row}.json" for row in ROWS}
        for row, file in answers.items():
            experiment.run(recipe.evaluation(out / "opt", row, file))

        conclude(
            experiment,
            "A Q-Former learns to see",
            {"opt": {row: score_of(file) for row, file in answers.items()}},
            runs={"Stage 1": out / "stage1", "Stage 2, OPT": out / "opt"},
            answers=answers["stage1_2"],
        )


if __name__ == "__main__":
    main()
