"""From photographs to captions, answers and a report, on three small pretrained models; every step is a command that it prints.

python examples/photographs/journey.py --photos FLICKR8K                # about three hours on two cores
python examples/photographs/journey.py --photos FLICKR8K --steps small  # about 20 minutes: shows that it works
python examples/photographs/journey.py --photos FLICKR8K --rows stage2_only stage1_2 pooled   # other rows

FLICKR8K is a folder with train-*.tar and dev-*.tar (WebDataset), or with Karpathy's dataset_flickr8k.json and the images; other
photographs are given by --train and --dev, as data.train takes them: tars, folders, record files, hub ids. It is stopped
by Ctrl-C and goes on when it is started again. Results are in runs/photographs: results.json, report.html.

With a network the frozen models come from the hub: write their ids in stage1.yaml and stage2.yaml, or give
  --stage1 encoder.id=hf-hub:timm/tf_efficientnet_lite2.in1k encoder.pretrained=null qformer.init_from=ID qformer.tokenizer=ID
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prepare import PACKAGES, PARTS

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all examples share
from resumable import Experiment, Part
from summary import conclude, training_seconds

from qformer.config import Stage1Config, Stage2Config, load_config, to_yaml
from qformer.config.help import HelpFormatter
from qformer.data.cache import INDEX

HERE = "examples/photographs"
STAGE1, STAGE2 = f"{HERE}/stage1.yaml", f"{HERE}/stage2.yaml"
OUT = Path("runs/photographs")
LEAST_CANDIDATES = 10  # of stages/evaluate.py --task retrieval
STEPS = {"full": (800, 500, 1000), "small": (40, 30, 200)}  # of stage 1, of stage 2; records of an evaluation


@dataclass(frozen=True)
class Row:
    """A way from the encoder to the language model.

    Args:
        stage1: the run of stage 1 it goes on from; None = from nothing.
        pooled: tokens of pooling.py in the Q-Former's place; "" = a Q-Former.
        as_long: trains for as long as both stages of `MAIN` took, in place of as many steps.
    """

    title: str
    stage1: str | None = None
    pooled: str = ""
    as_long: bool = False


ROWS = {
    "stage2_only": Row("stage 2 only"),
    "stage1_2": Row("stage 1 + 2", "stage1"),
    "itg_2": Row("stage 1 by ITG alone, + 2", "stage1_itg"),
    "stage2_long": Row("stage 2 only, as long", as_long=True),
    "pooled": Row("average pooling to 16 tokens + MLP, as long", pooled="16", as_long=True),
    "mlp": Row("MLP on all tokens, as long", pooled="null", as_long=True),
}
MAIN = "stage1_2"  # the row that answers questions and that the report shows
STAGE1_RUNS: dict[str, list[str]] = {
    "stage1": [],
    "stage1_itg": ["stage1.itc=0", "stage1.itm=0"],
}  # and how each differs
POOLED_LR = 2.0e-3  # four times the Q-Former's, at whose rate an MLP stays far behind (docs/photographs.md)
TIMED_STEPS = 10  # from which the steps of a row that trains `as_long` are reckoned
MODES = {"text_only": "text-only", "oracle_caption": "oracle-caption", MAIN: "image"}  # of stages/evaluate.py


@dataclass(frozen=True)
class Journey:
    """What changes the numbers, and the commands that follow from it.

    Args:
        train, dev: sources of records, as `data.train` takes them.
        steps1, steps2: optimizer updates of each stage.
        records: captioned photographs, and questions, of an evaluation.
        candidates: that the similarity leaves to the matching head in retrieval.
        stage1, stage2: YAML files and overrides beside each stage's own.
    """

    out: Path
    train: list[str]
    dev: list[str]
    steps1: int
    steps2: int
    records: int
    candidates: int = 16
    seed: int = 0
    caption_rule: str = "auto"
    stage1: list[str] = field(default_factory=list)
    stage2: list[str] = field(default_factory=list)

    @property
    def questions_file(self) -> Path:
        return self.out / "questions.jsonl"

    def config(self, root: type[Any], name: str = "") -> Any:
        """A stage's config as its command will read it.

        Raises: ConfigError when an override does not fit.
        """
        file, more = (STAGE1, self.stage1) if root is Stage1Config else (STAGE2, self.stage2)
        return load_config(root, [file, *more, *self._data(), f"run.dir={self.out / name}"])

    def models(self) -> list[Part]:
        """Fetch and convert the pretrained models, where the configs name what prepare.py makes."""
        configs = [self.config(root) for root in (Stage1Config, Stage2Config)]  # both: a mistake is said before stage 1
        if not any(str(PARTS) in to_yaml(config) for config in configs):
            return []
        targets = [PARTS / package.target for package in PACKAGES]
        command = [sys.executable, f"{HERE}/prepare.py"]
        return [Part("pretrained models", command, lambda: all(target.exists() for target in targets))]

    def features(self) -> Part:
        """Encode every photograph once, for all trainings."""
        command = [sys.executable, "stages/cache_features.py", STAGE1, *self.stage1, *self._data(), "run.dir=unused"]
        return Part("features", command, (self.out / "features" / INDEX).is_file)

    def questions(self) -> Part:
        """Derive questions from the captions of held-out photographs."""
        command = [sys.executable, f"{HERE}/questions.py", *self.dev, "--out", str(self.questions_file)]
        images = self.out / "images"
        return Part("questions", [*command, "--images", str(images)], self.questions_file.is_file)

    def training1(self, name: str) -> Part:
        """One of `STAGE1_RUNS`."""
        command = [sys.executable, "stages/stage1.py", STAGE1, *self.stage1]
        return self._training(command, name, self.steps1, STAGE1_RUNS[name], root=Stage1Config)

    def training2(self, name: str, steps: int, run: str = "") -> Part:
        """Stage 2 of one of `ROWS` in the run of its name; in another, which is timed, without validations and checkpoints."""
        row = ROWS[name]
        command = [sys.executable, "stages/stage2.py", STAGE2, *self.stage2]
        start = self.out / row.stage1 / "adapter" if row.stage1 else "null"
        overrides = [f"stage2.init_from={start}"]
        if row.pooled:
            command[1:3] = [f"{HERE}/pooling.py", "train", STAGE2, f"optim.lr={POOLED_LR}"]
            overrides = [f"pooled.tokens={row.pooled}"]
        if run:  # steps alone are timed
            overrides += ["data.validation=[]", f"train.checkpoint_every_steps={steps}"]
        return self._training(command, run or name, steps, overrides, root=Stage2Config)

    def steps_as_long(self, name: str) -> int:
        """Steps that a row makes in the time that both stages of `MAIN` took, by how fast its `TIMED_STEPS` were."""
        seconds = sum(training_seconds(self.out / run) for run in ("stage1", MAIN))
        return max(1, round(seconds / training_seconds(self.out / f"{name}_timed") * TIMED_STEPS))

    def captions(self, name: str) -> Part:
        """Caption held-out photographs by one of `ROWS`."""
        program = [f"{HERE}/pooling.py", "evaluate"] if ROWS[name].pooled else ["stages/evaluate.py"]
        options = ["--task", "caption", "--rule", self.caption_rule]
        return self._evaluation(program, name, self.dev, options, json_file=self.json_of("captions", name))

    def retrieval(self) -> Part:
        """Find captions by photographs and photographs by captions, by stage 1."""
        options = ["--task", "retrieval", "--rule", "product", "--candidates", str(self.candidates)]
        options += ["--answers", str(self.out / "retrieval")]
        return self._evaluation(
            ["stages/evaluate.py"], "stage1", self.dev, options, json_file=self.json_of("retrieval", "stage1")
        )

    def answers(self, name: str) -> Part:
        """Answer the questions by one of `MODES`."""
        options = ["--task", "vqa", "--mode", MODES[name], "--choose-from", "choices"]
        options += ["--choose-by", "pmi"] if name != "text_only" else []  # else SmolLM2 says yes, two and red to all
        return self._evaluation(
            ["stages/evaluate.py"], MAIN, [str(self.questions_file)], options, json_file=self.json_of("answers", name)
        )

    def json_of(self, kind: str, name: str) -> Path:
        """Where an evaluation leaves scores and outputs."""
        return self.out / "evaluations" / f"{kind}_{name}.json"

    def _data(self) -> list[str]:
        sources = [f"data.train={json.dumps(self.train)}", f"data.validation={json.dumps(self.dev)}"]
        return [*sources, f"data.features={self.out / 'features'}"]

    def _training(self, command: list[str], name: str, steps: int, overrides: list[str], *, root: type[Any]) -> Part:
        run_dir, config = self.out / name, self.config(root)
        every = {
            "log_every_steps": steps // 50, "validate_every_steps": -(-steps // 4), "checkpoint_every_steps": steps // 10
        }  # fmt: skip
        settings = [f"train.{key}={max(1, value)}" for key, value in every.items()]
        settings += [f"train.max_steps={steps}", f"optim.warmup_steps={min(config.optim.warmup_steps, steps // 5)}"]
        settings += [f"train.seed={self.seed}", f"run.dir={run_dir}"]
        settings.append(f"train.validation_records={min(config.train.validation_records, self.records)}")
        if (run_dir / "checkpoints").is_dir():
            settings.append("train.resume=auto")
        adapter = run_dir / "adapter" / "adapter.safetensors"  # its folder is written whole, at the end
        return Part(f"training {name}", [*command, *self._data(), *settings, *overrides], adapter.is_file)

    def _evaluation(
        self, program: list[str], name: str, records: list[str], options: list[str], *, json_file: Path
    ) -> Part:  # fmt: skip
        command = [sys.executable, *program, str(self.out / name / "adapter"), *records, *options]
        command += ["--limit", str(self.records), "--json", str(json_file)]
        return Part(json_file.stem.replace("_", " ", 1), command, json_file.is_file)


def travel(journey: Journey, rows: Sequence[str], go_on: Sequence[str]) -> dict[str, Any]:
    """Run what is not finished, and write the report.

    Raises: ValueError when the folder was begun with other options; ConfigError when an override does not fit.
    """
    if MAIN not in rows and any(ROWS[row].as_long for row in rows):
        raise ValueError(f"--rows {' '.join(rows)}: some train for as long as {MAIN}; name it too")
    runs1 = dict.fromkeys(["stage1", *(stage1 for row in rows if (stage1 := ROWS[row].stage1))])
    parts = [*journey.models(), journey.features(), journey.questions()]
    parts += [journey.training1(name) for name in runs1]
    experiment = Experiment(journey.out, journey, owned=(), resume=True, go_on=go_on, offline=False)
    with experiment:
        for part in [*parts, journey.retrieval()]:
            experiment.run(part)
        for name in sorted(rows, key=lambda name: ROWS[name].as_long):
            steps = journey.steps2
            if ROWS[name].as_long:
                experiment.run(journey.training2(name, TIMED_STEPS, f"{name}_timed"))
                steps = journey.steps_as_long(name)
            experiment.run(journey.training2(name, steps))
            experiment.run(journey.captions(name))
        for name in MODES if MAIN in rows else ():
            experiment.run(journey.answers(name))
        return conclude(experiment, journey, {name: ROWS[name] for name in rows})


def sources_of(photos: str) -> tuple[list[str], list[str]]:
    """Training and held-out sources of a folder of photographs, or of a data set of the hub.

    Raises: ValueError when the folder has neither tars nor Karpathy's file.
    """
    folder = Path(photos).expanduser()
    if not folder.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", photos):
        return [f"{photos}:train"], [f"{photos}:validation"]
    tars = [[str(path) for path in sorted(folder.glob(f"{split}-*.tar"))] for split in ("train", "dev")]
    if all(tars):
        return tars[0], tars[1]
    file = folder / "dataset_flickr8k.json"
    if file.is_file():
        return [f"{file}:train"], [f"{file}:val"]
    raise ValueError(
        f"--photos {photos}: expected a folder with train-*.tar and dev-*.tar, or with dataset_flickr8k.json, or a hub id; "
        "other photographs are given by --train and --dev"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.add_argument("--photos", default=".", help="folder of Flickr8k, or hub id with splits train and validation")
    parser.add_argument("--train", nargs="+", default=[], help="captioned photographs to learn from")
    parser.add_argument("--dev", nargs="+", default=[], help="held-out ones, best with several captions each")
    parser.add_argument("--out", type=Path, default=OUT, help=f"folder for everything that is made ({OUT})")
    parser.add_argument("--steps", choices=STEPS, default="full", help="how long everything takes (full)")
    parser.add_argument("--steps1", type=int, help="steps of stage 1, in place of --steps'")
    parser.add_argument("--steps2", type=int, help="steps of stage 2, in place of --steps'")
    parser.add_argument("--records", type=int, help="photographs of an evaluation, in place of --steps'")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["stage2_only", MAIN], help=f"of {', '.join(ROWS)}")
    parser.add_argument("--candidates", type=int, default=16, help="of retrieval, re-ranked by the matching head (16)")
    parser.add_argument("--seed", type=int, default=0, help="of training (0)")
    parser.add_argument("--caption-rule", default="auto", help="--rule of stages/evaluate.py for captions (auto)")
    parser.add_argument("--stage1", nargs="+", default=[], metavar="X", help="YAML files, key=value, after stage1.yaml")
    parser.add_argument("--stage2", nargs="+", default=[], metavar="X", help="YAML files, key=value, after stage2.yaml")
    words = sys.argv[1:] if argv is None else argv
    args = parser.parse_args(words)
    if args.candidates < LEAST_CANDIDATES:  # now, and not after hours of training
        parser.error(f"--candidates must be at least {LEAST_CANDIDATES}, the longest list that is scored")
    try:
        train, dev = (args.train, args.dev) if args.train and args.dev else sources_of(args.photos)
        steps1, steps2, records = STEPS[args.steps]
        journey = Journey(
            args.out, train, dev, args.steps1 or steps1, args.steps2 or steps2, args.records or records, args.candidates,
            args.seed, args.caption_rule, args.stage1, args.stage2,
        )  # fmt: skip
        travel(journey, args.rows, [f"{HERE}/journey.py", *words])
    except ValueError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
