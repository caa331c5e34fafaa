"""Make the whole table: two language models, stage 2 with and without stage 1, several seeds. Go on by starting it again.

python examples/shapes/reproduce.py             # leaves results.json, table.md and report.html in runs/reproduce
python examples/shapes/reproduce.py --jobs 2    # two runs side by side, each on half of the cores
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from experiment import average, conclude, markdown_table, score_of
from recipe import Recipe, add_options
from resumable import Experiment, Part

LLMS = ("opt", "t5")
TRAINED = ("stage2_only", "stage1_2")
UNTRAINED = ("text_only", "oracle_caption")  # the language model alone: the same for every seed


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, out="runs/reproduce")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of training (0 1 2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; they share the cores (1)")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    if args.jobs < 1:
        parser.error("--jobs must be at least 1")
    recipe, out, seeds = Recipe.from_arguments(args), args.out, list(dict.fromkeys(args.seeds))
    try:
        experiment = Experiment(
            out, recipe, owned=(), resume=True, go_on=["examples/shapes/reproduce.py", *words], jobs=args.jobs
        )
    except ValueError as error:
        parser.error(str(error))

    def trained(llm: str, row: str, seed: int) -> list[Part]:
        """Stage 2 and its questions: the same budget with and without stage 1."""
        run_dir, name = out / f"{llm}_{row}_seed{seed}", f"{llm} {row} seed {seed}"
        init_from = out / f"stage1_seed{seed}" if row == "stage1_2" else None
        return [
            recipe.stage2(run_dir, llm, init_from, name=name, seed=seed),
            recipe.evaluation(run_dir, row, answers(out, llm, row, seed), f"{name}, questions"),
        ]

    with experiment:
        experiment.run(recipe.pictures())
        experiment.run(recipe.features(out))
        first = [[recipe.stage1(out / f"stage1_seed{s}", f"stage 1 seed {s}", s)] for s in seeds]
        experiment.run_side_by_side(first + [trained(llm, "stage2_only", s) for s in seeds for llm in LLMS])
        experiment.run_side_by_side([trained(llm, "stage1_2", s) for s in seeds for llm in LLMS])
        whole = {llm: out / f"{llm}_stage1_2_seed{seeds[0]}" for llm in LLMS}
        experiment.run_side_by_side([
            [recipe.evaluation(whole[llm], row, answers(out, llm, row), f"{llm} {row}, questions")]
            for llm in LLMS for row in UNTRAINED
        ])  # fmt: skip

        table: dict[str, dict[str, Any]] = {}
        for llm in LLMS:
            table[llm] = {row: average({seeds[0]: score_of(answers(out, llm, row))}) for row in UNTRAINED}
            for row in TRAINED:
                table[llm][row] = average({s: score_of(answers(out, llm, row, s)) for s in seeds})
        (out / "table.md").write_text(markdown_table(table))
        runs = {"Stage 1": out / f"stage1_seed{seeds[0]}"}
        for llm in LLMS:
            runs[f"Stage 2 after stage 1, {llm.upper()}"] = whole[llm]
            runs[f"Stage 2 only, {llm.upper()}"] = out / f"{llm}_stage2_only_seed{seeds[0]}"
        title = f"Two stages, two language models, {len(seeds)} seed{'s' * (len(seeds) != 1)}"
        conclude(experiment, title, table, runs=runs, answers=answers(out, LLMS[0], "stage1_2", seeds[0]))


def answers(out: Path, llm: str, row: str, seed: int | None = None) -> Path:
    """The file of an evaluation's scores and answers."""
    return out / "answers" / f"{llm}_{row}{'' if seed is None else f'_seed{seed}'}.json"


if __name__ == "__main__":
    main()
