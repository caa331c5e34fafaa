"""The parts of a Shapes experiment as commands: what demo and reproduce do can be typed by hand."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from results import ROWS
from resumable import LAUNCHER, Part

from qformer.config import Stage1Config, Stage2Config, load_config
from qformer.data.cache import INDEX

STAGE1, STAGE2 = "configs/shapes/stage1.yaml", "configs/shapes/stage2.yaml"
ROOTS: dict[str, Any] = {STAGE1: Stage1Config, STAGE2: Stage2Config}
DATA = Path("runs/shapes")  # where the configs look for the records
FEATURES = "features"  # the cache of an experiment, beside its runs
MODES = {
    "text_only": "text-only",
    "oracle_caption": "oracle-caption",
    "stage2_only": "image",
    "stage1_2": "image",
}  # of stages/evaluate.py
STAGE2_STEPS = {"t5": 2000}  # it is asked for less of a caption at a time; others take the config's own number
PROMPT_SCALE = {"t5": 16}  # what its first layer adds to an embedding is seven times as large as the embedding


@dataclass(frozen=True)
class Recipe:
    """What changes the numbers of an experiment, and the commands that follow from it."""

    data: Path = DATA
    train_pictures: int = 10000
    validation_pictures: int = 512
    questions: int = 700
    steps_scale: float = 1.0

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> "Recipe":
        return cls(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(cls)})

    def pictures(self) -> Part:
        """Write pictures and records; finished when every file has as many records as wanted."""
        counts = {"train": self.train_pictures, "validation": self.validation_pictures, "questions": self.questions}
        options = [word for split, count in counts.items() for word in (f"--{split}", str(count))]
        command = [sys.executable, "-m", "qformer.shapes.write", str(self.data), *options]
        files = {self.data / f"{split}.jsonl": count for split, count in counts.items()}
        return Part("pictures", command, lambda: all(_count_lines(path) == count for path, count in files.items()))

    def features(self, out: Path) -> Part:
        """Encode every picture once, for all trainings in `out`."""
        command = [sys.executable, "stages/cache_features.py", STAGE1, "run.dir=unused", *self._sources()]
        index = out / FEATURES / INDEX  # written last
        return Part("features", [*command, f"data.features={out / FEATURES}"], index.is_file)

    def stage1(
        self, run_dir: Path, name: str = "stage 1", seed: int | None = None, *, overrides: Sequence[str] = (),
        steps: int | None = None,
    ) -> Part:  # fmt: skip
        """Train stage 1 in `run_dir`, which lies beside the features."""
        return self._training(name, STAGE1, run_dir, overrides=overrides, seed=seed, steps=steps)

    def stage2(
        self, run_dir: Path, llm: str, init_from: Path | None, *, name: str = "stage 2", seed: int | None = None,
        overrides: Sequence[str] = (), steps: int | None = None,
    ) -> Part:  # fmt: skip
        """Train stage 2 in `run_dir` with "opt" or "t5", from the stage-1 run `init_from` or, with None, from nothing."""
        start = f"stage2.init_from={init_from / 'adapter' if init_from else 'null'}"
        overrides = [f"llm.id=qformer/shapes/weights/{llm}", start, *overrides]
        if llm in PROMPT_SCALE:
            overrides.append(f"stage2.prompt_scale={PROMPT_SCALE[llm]}")
        steps = steps or STAGE2_STEPS.get(llm)
        return self._training(name, STAGE2, run_dir, overrides=overrides, seed=seed, steps=steps)

    def evaluation(self, run_dir: Path, row: str, answers: Path, name: str | None = None) -> Part:
        """Answer the questions as `row` of the table wants it, and leave scores and answers in the file `answers`."""
        command = [sys.executable, "stages/evaluate.py", str(run_dir / "adapter"), str(self.data / "questions.jsonl")]
        command += ["--mode", MODES[row], "--json", str(answers)]
        return Part(name or f"questions, {ROWS[row][0]}", command, lambda: _is_json(answers))

    def _training(
        self, name: str, file: str, run_dir: Path, *, overrides: Sequence[str] = (), seed: int | None,
        steps: int | None = None,
    ) -> Part:  # fmt: skip
        features = f"data.features={run_dir.parent / FEATURES}"
        overrides = [f"run.dir={run_dir}", *self._sources(), features, *overrides, *self._steps(file, steps)]
        if seed is not None:
            overrides.append(f"train.seed={seed}")
        if (run_dir / "checkpoints").is_dir():
            overrides.append("train.resume=auto")
        launch = [sys.executable, "-m", LAUNCHER, "--num_processes", "1", "--num_machines", "1"]
        launch += ["--mixed_precision", "no", "--dynamo_backend", "no"]
        adapter = run_dir / "adapter" / "adapter.safetensors"  # its folder is written whole, at the end
        return Part(
            name, [*launch, f"stages/{Path(file).name.removesuffix('.yaml')}.py", file, *overrides], adapter.is_file
        )

    def _sources(self) -> list[str]:
        if self.data == DATA:
            return []
        return [f"data.{s}={json.dumps([str(self.data / f'{s}.jsonl')])}" for s in ("train", "validation")]

    def _steps(self, file: str, steps: int | None) -> list[str]:
        """Overrides for another number of steps than the config's own; `steps_scale` changes whatever counts steps."""
        if self.steps_scale == 1:
            return [f"train.max_steps={steps}"] if steps else []
        config: Any = load_config(ROOTS[file], [file, "run.dir=unused"])
        max_steps = max(1, round((steps or config.train.max_steps) * self.steps_scale))
        warmup_steps = min(max_steps, round(config.optim.warmup_steps * self.steps_scale))
        every = [
            f"train.{key}={max(1, round(getattr(config.train, key) * self.steps_scale))}"
            for key in ("log_every_steps", "validate_every_steps", "checkpoint_every_steps")
        ]
        return [f"train.max_steps={max_steps}", f"optim.warmup_steps={warmup_steps}", *every]


def add_options(parser: argparse.ArgumentParser, out: str) -> None:
    """The command-line options that the demo and the reproduction share."""
    recipe = Recipe()
    parser.add_argument("--out", type=Path, default=Path(out), help=f"folder for everything that is made ({out})")
    parser.add_argument(
        "--data", type=Path, default=recipe.data, help=f"folder of pictures and records ({recipe.data})"
    )
    for name, text in (
        ("train_pictures", "captioned pictures to train on"),
        ("validation_pictures", "captioned held-out pictures"),
        ("questions", "questions about held-out pictures"),
    ):
        default = getattr(recipe, name)
        parser.add_argument(
            f"--{name.replace('_', '-')}", type=_positive(int), default=default, help=f"{text} ({default})"
        )
    parser.add_argument(
        "--steps-scale", type=_positive(float), default=1.0, help="factor on all numbers of steps, 0.01 for a trial (1)"
    )


def _count_lines(path: Path) -> int:
    return len(path.read_text().splitlines()) if path.is_file() else -1


def _is_json(path: Path) -> bool:
    try:
        return isinstance(json.loads(path.read_text()), dict)
    except (OSError, ValueError):
        return False


def _positive(kind: type) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < float("inf"):
            raise argparse.ArgumentTypeError(f"{text!r} is not a positive {'whole ' * (kind is int)}number")
        return value

    return parse
