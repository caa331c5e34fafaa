"""A stage is an interface: a third one, of a class, a section and a line, is trained, resumed, validated and loaded."""

import json
import subprocess
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from torch import nn

from qformer import build
from qformer.build import build_dataset, build_encoder, build_stage
from qformer.checkpoint import list_checkpoints, read_adapter
from qformer.config import ConfigError, ModelPart, RunPart, Stage1Config, load_config, read_values
from qformer.data import GlobalBatches, Order, training_loader
from qformer.inference import load
from qformer.launch import start_accelerator
from qformer.models import Output, Prepared, Stage
from qformer.training import fit

REPO = Path(__file__).resolve().parent.parent


@dataclass
class ToySection:
    """A stage that learns how many words a caption has."""

    scale: float = field(default=10.0, metadata={"help": "words a predicted 1 stands for", "choices": (), "above": 0})


@dataclass
class ToyPart(ModelPart):
    stage: str = "toy"
    toy: ToySection = field(default_factory=ToySection)


@dataclass
class ToyConfig(ToyPart, RunPart):
    pass


class Toy(Stage[torch.Tensor]):
    name = "toy"

    def __init__(self, config: ToyPart) -> None:
        super().__init__()
        self.encoder, self.scale = build_encoder(config.encoder), config.toy.scale
        self.adapter = nn.Linear(self.encoder.width, 1)

    def prepare(self, batch, seed):
        return Prepared(batch, torch.tensor([len(text.split()) / self.scale for text in batch.texts]), len(batch), seed)

    def forward(self, prepared, targets_per_rank, adapter=None):
        tokens = self.encoder(prepared.batch.images, prepared.batch.image_mask).tokens.mean(1)
        loss = (
            (self.adapter if adapter is None else adapter)(tokens)[:, 0] - prepared.text
        ).square().sum() / targets_per_rank
        return Output(loss, {"words": loss.detach()})


@pytest.fixture
def toy(tiny, monkeypatch):
    monkeypatch.setitem(build.STAGES, "toy", (ToyConfig, Toy))
    return lambda run_dir, *more: load_config(ToyConfig, [*tiny.stage1(run_dir)[1:], "optim.lr=0.05", *more])


def run(config) -> bool:
    torch.manual_seed(config.train.seed)
    model, accelerator = build_stage(config), start_accelerator(config)
    datasets = [build_dataset(config.data, model.encoder, split, 0) for split in ("train", "validation")]
    return fit(model, *datasets, config=config, accelerator=accelerator)


def test_a_third_stage_trains_validates_and_loads(toy, tmp_path):
    assert run(toy(tmp_path, "train.max_steps=12", "train.validate_every_steps=6", "toy.scale=8"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    losses = [line["words"] for line in lines if "words" in line]
    assert losses[-1] < 0.5 * losses[0]
    assert [line["step"] for line in lines if "validation_words" in line] == [6, 12]
    assert read_values(tmp_path / "adapter")["stage"] == "toy"
    loaded = load(tmp_path / "adapter", device="cpu")
    assert loaded.model.scale == 8
    assert {n: t.shape for n, t in loaded.model.adapter.state_dict().items()} == {"weight": (1, 32), "bias": (1,)}


def test_a_third_stage_resumes_exactly(toy, tmp_path):
    every = ["train.max_steps=6", "train.checkpoint_every_steps=3"]
    run(toy(tmp_path / "whole", *every))
    run(toy(tmp_path / "cut", "train.max_steps=3", "train.checkpoint_every_steps=3", "optim.warmup_steps=1"))
    assert [c.name for c in list_checkpoints(tmp_path / "cut")] == ["step-3"]
    run(toy(tmp_path / "again", *every, f"train.resume={tmp_path / 'whole/checkpoints/step-3'}"))
    whole, again = read_adapter(tmp_path / "whole/adapter"), read_adapter(tmp_path / "again/adapter")
    assert all(torch.equal(whole[name], again[name]) for name in whole)


def test_a_config_of_another_stage_names_what_to_launch(tiny, tmp_path):
    (tmp_path / "two.yaml").write_text("stage: stage2\nllm: {id: x}\n")
    with pytest.raises(
        ConfigError, match=r"two\.yaml is of stage=stage2, this is stage1: launch stages/stage2\.py with it"
    ):
        load_config(Stage1Config, [*tiny.stage1(tmp_path), str(tmp_path / "two.yaml")])


def test_the_stage_is_asked_for_its_type_in_two_places_at_most():
    grep = ["git", "grep", "-lE", r"isinstance\(.*Stage[12]", "--", "qformer", "stages"]
    files = subprocess.run(grep, cwd=REPO, capture_output=True, text=True, check=False).stdout.split()
    assert set(files) <= {"qformer/build.py", "qformer/inference.py"}


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_a_compiled_adapter_takes_the_bare_ones_place(tiny, tmp_path, stage):
    arguments = {"stage1": tiny.stage1, "stage2": tiny.stage2}[stage](tmp_path, *tiny.on_features())
    config = load_config(build.STAGES[stage][0], arguments)
    model = build_stage(config).eval()
    data = build_dataset(config.data, model.encoder, "train", 0)
    batches = training_loader(data, GlobalBatches(Order(len(data), 0), 1, 0, 2), 0)
    prepared = model.prepare(next(iter(batches)), 0)
    compiled = torch.compile(model.adapter, backend="eager")
    losses = [float(model(prepared, torch.tensor(4.0), adapter).loss.detach()) for adapter in (None, compiled)]
    assert losses[0] == pytest.approx(losses[1])
