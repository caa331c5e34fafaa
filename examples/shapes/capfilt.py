"""CapFilt on Shapes: what noise costs, and what of it comes back with filtered and newly written captions.

python examples/shapes/capfilt.py              # leaves results.json, table.md and report.html in runs/capfilt
python examples/shapes/capfilt.py --jobs 2     # two runs side by side, each on half of the cores

Of the captions 40 % belong to other pictures and 20 % are vague. A quarter of the pictures also has a clean caption, on which the
captioner and the filter, trained on the noise, are fine-tuned, as BLIP does on COCO. Stage 1 and 2 are then trained alike on each
set of captions. Both parts of what noise costs are then read off one table: accuracy of answers and recall@1.
"""

import argparse
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from experiment import read_answers
from recipe import Recipe, add_options
from resumable import Experiment, Part

from qformer.report.page import Page, table
from qformer.report.run import read_run
from qformer.report.sections import LOSSES, MEASURES, add_runs, draw

LLM = "opt"
OTHERS, VAGUE, CLEAN = 0.4, 0.2, 0.25
PHRASES = ("a picture of some shapes", "shapes on a background", "a nice picture", "an image")
CAPTIONER_STEPS = 300
CAPTIONER = ["optim.lr=5e-4", "optim.warmup_steps=10", "stage2.init_share=1"]  # it goes on, and does not begin anew
# What is trained on, and how capfilt.py makes it; None = it is there.
SETS: dict[str, list[str] | None] = {
    "noisy": None,
    "filtered": ["filter"],
    "captioned": ["captioner"],
    "both": ["captioner", "filter"],
    "both_beam": ["captioner", "filter", "--num-beams", "3"],
    "clean": None,
}


def write_sets(data: Path, out: Path, seed: int) -> None:
    """Write noisy.jsonl, clean.jsonl and pairs.jsonl (the clean quarter), one caption a picture; validation.jsonl, truth.json.

    Pictures are named by their whole paths, under the image_ids that the feature cache has.
    """
    rng, truth = random.Random(f"{seed} noise"), {}
    records = {}
    for split in ("train", "validation"):
        lines = [json.loads(line) for line in (data / f"{split}.jsonl").read_text().splitlines()]
        records[split] = [{**r, "image": str((data / r["image"]).resolve()), "image_id": r["image"]} for r in lines]
    noisy, clean = [], [{**record, "caption": record["caption"][0]} for record in records["train"]]
    for number, right in enumerate(clean):
        draw, other = rng.random(), clean[(number + rng.randrange(1, len(clean))) % len(clean)]["caption"]
        caption = other if draw < OTHERS else rng.choice(PHRASES) if draw < OTHERS + VAGUE else right["caption"]
        truth[right["image_id"]] = caption == right["caption"]
        noisy.append({**right, "caption": caption})
    pairs = clean[: max(1, int(CLEAN * len(clean)))]
    sets = {"noisy": noisy, "clean": clean, "pairs": pairs, "validation": records["validation"]}
    for name, rows in sets.items():
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "truth.json").write_text(json.dumps(truth))


class Seed:
    """The parts of one seed, in its folder."""

    def __init__(self, recipe: Recipe, out: Path, seed: int, threshold: float):
        self.recipe, self.folder, self.seed, self.threshold = recipe, out, seed, threshold

    def run_dir(self, name: str) -> Path:
        """Beside the features, which all seeds have in common."""
        return self.folder / f"{name}_seed{self.seed}"

    def records(self, name: str) -> Path:
        """The records of a set."""
        made = SETS.get(name)
        return self.run_dir(name) / "records.jsonl" if made else self.folder / f"{name}.jsonl"

    def data(self, records: Path) -> list[str]:
        """Overrides that train on records."""
        return [f"data.train=[{records}]", f"data.validation=[{self.folder / 'validation.jsonl'}]"]

    def training(self, name: str) -> list[Part]:
        """Stage 1 and stage 2 on a set, and what they can do."""
        first, second = self.run_dir(f"{name}_stage1"), self.run_dir(f"{name}_stage2")
        data = self.data(self.records(name))
        title = f"{name} seed {self.seed}"
        return [
            self.recipe.stage1(first, f"{title}, stage 1", self.seed, overrides=data),
            self.recipe.stage2(second, LLM, first, name=f"{title}, stage 2", seed=self.seed, overrides=data),
            self.recipe.evaluation(second, "stage1_2", self.answers(name), f"{title}, questions"),
            self.retrieval(first, name, f"{title}, retrieval"),
        ]

    def answers(self, name: str) -> Path:
        """Scores and answers of a set's stage 2."""
        return self.folder / "answers" / f"{name}_seed{self.seed}.json"

    def retrieval(self, run_dir: Path, name: str, title: str) -> Part:
        """Recall among the held-out pictures."""
        file = self.folder / "retrieval" / f"{name}_seed{self.seed}.json"
        command = [
            sys.executable,
            "stages/evaluate.py",
            str(run_dir / "adapter"),
            str(self.recipe.data / "validation.jsonl"),
        ]
        return Part(title, [*command, "--task", "retrieval", "--candidates", "16", "--json", str(file)], file.is_file)

    def parts_of_capfilt(self) -> list[Part]:
        """Fine-tune filter and captioner, trained on the noise, on clean pairs."""
        data = self.data(self.folder / "pairs.jsonl")
        first, second = self.run_dir("noisy_stage1"), self.run_dir("noisy_stage2")
        filters = self.recipe.stage1(
            self.run_dir("filter"), f"filter seed {self.seed}", self.seed,
            overrides=[*data, f"stage1.init_from={first / 'adapter'}"],
        )  # fmt: skip
        writes = self.recipe.stage2(
            self.run_dir("captioner"), LLM, second, name=f"captioner seed {self.seed}", seed=self.seed,
            overrides=[*data, *CAPTIONER], steps=CAPTIONER_STEPS,
        )  # fmt: skip
        return [filters, writes]

    def capfilt(self, name: str) -> Part:
        """Make a set of the noisy one."""
        words = SETS[name] or []
        options = [w for part in ("captioner", "filter") if part in words
                   for w in (f"--{part}", str(self.run_dir(part) / "adapter"))]  # fmt: skip
        options += [word for word in words if word not in ("captioner", "filter")]
        options += ["--threshold", str(self.threshold)]
        command = [sys.executable, "stages/capfilt.py", str(self.folder / "noisy.jsonl"), *options, "--out"]
        done = self.run_dir(name) / "summary.json"
        return Part(f"{name} seed {self.seed}", [*command, str(self.run_dir(name))], done.is_file)


def judge_filter(folder: Path, truth: dict[str, bool]) -> dict[str, float]:
    """Precision and recall in percent of keeping the web's right captions."""
    rows = [json.loads(line) for path in sorted((folder / "scores").glob("*.jsonl")) for line in path.open()]
    kept = {row["image_id"]: row["captions"][0]["why"] is None for row in rows if row["captions"]}
    hits = sum(truth[image_id] for image_id, is_kept in kept.items() if is_kept)
    return {
        "precision": 100 * hits / max(1, sum(kept.values())),
        "recall": 100 * hits / max(1, sum(truth[image_id] for image_id in kept)),
    }


def table_of(seeds: Sequence[Seed]) -> dict[str, dict[str, Any]]:
    """Scores of every set, a list with one of each seed."""
    scores: dict[str, dict[str, Any]] = {}
    for name in SETS:
        recalls = [
            json.loads((s.folder / "retrieval" / f"{name}_seed{s.seed}.json").read_text())["scores"] for s in seeds
        ]
        scores[name] = {
            "vqa": [read_answers(seed.answers(name))["scores"]["overall"] for seed in seeds],
            "image_to_text@1": [recall["image_to_text"]["1"] for recall in recalls],
            "text_to_image@1": [recall["text_to_image"]["1"] for recall in recalls],
        }
    return scores


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_options(parser, out="runs/capfilt")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds of training (0 1 2)")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side; they share the cores (1)")
    parser.add_argument("--threshold", type=float, default=0.5, help="of the filter; 0 in a trial of few steps (0.5)")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    recipe, out = Recipe.from_arguments(args), args.out
    seeds = [Seed(recipe, out, seed, args.threshold) for seed in dict.fromkeys(args.seeds)]
    try:
        experiment = Experiment(
            out, recipe, owned=(), resume=True, go_on=["examples/shapes/capfilt.py", *words], jobs=args.jobs
        )
    except ValueError as error:
        parser.error(str(error))
    with experiment:
        experiment.run(recipe.pictures())
        experiment.run(recipe.features(out))
        if not (out / "truth.json").is_file():
            write_sets(recipe.data, out, seed=0)
        made = [name for name, parts in SETS.items() if parts]
        experiment.run_side_by_side([s.training(name) for s in seeds for name in SETS if name not in made])
        experiment.run_side_by_side([s.parts_of_capfilt() for s in seeds])
        experiment.run_side_by_side([[s.capfilt(name), *s.training(name)] for s in seeds for name in made])
        truth = json.loads((out / "truth.json").read_text())
        judged = [judge_filter(s.run_dir("filtered"), truth) for s in seeds]
        scores = table_of(seeds)
        report(out, scores, judged, seeds[0])


def report(
    out: Path, scores: dict[str, dict[str, list[float]]], judged: Sequence[dict[str, float]], seed: Seed
) -> None:
    """Write results.json, table.md and report.html, the latter with the runs of one seed over each other.

    The share of what noise costs that comes back is by the means over seeds.
    """
    head = ["captions", *scores["clean"], "of the VQA loss comes back"]
    worst, best = mean(scores["noisy"]["vqa"]), mean(scores["clean"]["vqa"])
    rows = []
    for name, of_set in scores.items():
        back = f"{100 * (mean(of_set['vqa']) - worst) / (best - worst):.0f} %" if best != worst else "-"
        rows.append([name, *map(_shown, of_set.values()), back])
    precision, recall = (_shown([each[key] for each in judged]) for key in ("precision", "recall"))
    words = f"The filter on the web's captions: precision {precision}, recall {recall}."
    lines = [f"| {' | '.join(row)} |" for row in (head, *rows)]
    lines = [lines[0], "|---|" + "---|" * 4, *lines[1:], "", words]
    (out / "table.md").write_text("\n".join(lines) + "\n")
    (out / "results.json").write_text(json.dumps({"table": scores, "filter": list(judged)}, indent=1) + "\n")
    first, second = ([read_run(seed.run_dir(f"{name}_stage{n}"), name) for name in SETS] for n in (1, 2))
    page = Page("CapFilt on Shapes", "What noise in captions costs, and what of it comes back.")
    page.add("Scores", table(head, rows), words)
    page.add("Stage 1 on each set of captions", draw([*LOSSES, *MEASURES], first), note="Dots are held-out records.")
    add_runs(page, second)
    page.write(out / "report.html")
    print("\n".join([*lines, f"report: {out / 'report.html'}"]))


def _shown(values: Sequence[float]) -> str:
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


if __name__ == "__main__":
    main()
