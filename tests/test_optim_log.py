import io
import json
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from qformer.log import TIMING_FIELDS, ChanceWatch, RunLog, StepProgress, describe_losses
from qformer.optim import build_optimizer, lr_at, parameter_groups

SCHEDULE = {"peak_lr": 1e-4, "min_lr": 1e-5, "warmup_steps": 10, "warmup_lr": 1e-6, "max_steps": 110}


@pytest.mark.parametrize(
    ("step", "lr"),
    [(0, 1e-6), (5, 5.05e-5), (10, 1e-4), (60, 5.5e-5), (110, 1e-5), (10_000, 1e-5)],  # the docstring's table
)
def test_lr_at(step, lr):
    assert lr_at(step, **SCHEDULE) == pytest.approx(lr)


def test_lr_at_without_warmup_and_without_decay():
    assert lr_at(0, **SCHEDULE | {"warmup_steps": 0}) == pytest.approx(1e-4)
    assert lr_at(7, **SCHEDULE | {"warmup_steps": 8, "max_steps": 8}) < 1e-4
    assert lr_at(8, **SCHEDULE | {"warmup_steps": 8, "max_steps": 8}) == pytest.approx(1e-5)


@pytest.mark.parametrize("wrong", [{"max_steps": 0}, {"warmup_steps": 111}, {"min_lr": 1e-3}, {"warmup_lr": -1.0}])
def test_lr_at_errors(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        lr_at(0, **SCHEDULE | wrong)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.temperature = nn.Parameter(torch.tensor(0.07))
        self.query_tokens = nn.Parameter(torch.randn(1, 4, 8))
        self.norm = nn.LayerNorm(8)
        self.linear = nn.Linear(8, 3)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)


def test_parameter_groups():
    decay, no_decay = parameter_groups(Model(), 0.05)
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.05)
    assert decay["param_names"] == ["query_tokens", "linear.weight"]
    assert (no_decay["name"], no_decay["weight_decay"]) == ("no_decay", 0.0)
    assert no_decay["param_names"] == ["temperature", "norm.weight", "norm.bias", "linear.bias"]
    with pytest.raises(ValueError):
        parameter_groups(Model().requires_grad_(False), 0.05)


def test_build_optimizer_decays_only_what_should():
    model = Model()
    optimizer = build_optimizer(model, lr=0.1, betas=(0.9, 0.98), weight_decay=0.5, eps=1e-8)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()  # without a gradient only decay moves anything: by 1 - 0.1 * 0.5
    for name, parameter in model.named_parameters():
        factor = 0.95 if name in {"query_tokens", "linear.weight"} else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)
    names = [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
    assert names == [group["param_names"] for group in parameter_groups(model, 0.5)]


def run(folder, steps, resume_step=None):
    with RunLog(folder, is_main=True, resume_step=resume_step) as log:
        for step in steps:
            log.log(step, {"itc": 4 / (step + 3), "seconds": float(step) + len(steps)})


def reproducible(folder):
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in TIMING_FIELDS} for line in lines]


def test_interrupted_and_resumed_leaves_the_same_lines(tmp_path):
    run(tmp_path / "whole", range(1, 9))
    run(tmp_path / "cut", range(1, 7))
    with (tmp_path / "cut" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "it')  # killed while writing
    run(tmp_path / "cut", range(5, 9), resume_step=4)
    assert reproducible(tmp_path / "cut") == reproducible(tmp_path / "whole")
    assert [path.name for path in (tmp_path / "cut").iterdir()] == ["metrics.jsonl"]


def test_half_line_is_dropped_even_if_nothing_else_is_cut(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "itc": 1.0}\n{"st')
    run(tmp_path, [2], resume_step=1)
    assert [line["step"] for line in reproducible(tmp_path)] == [1, 2]


def test_broken_line_in_the_middle_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnonsense\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2"):
        RunLog(tmp_path, is_main=True, resume_step=3)


def test_log_line_is_plain_json_and_readable_at_once(tmp_path):
    log = RunLog(tmp_path, is_main=True, resume_step=None)
    log.log(3, {"itc": 2.3456789, "itm": math.nan, "itg": -math.inf, "negatives": 1234567, "x": None})
    expected = '{"step": 3, "itc": 2.34568, "itm": "nan", "itg": "-inf", "negatives": 1234567, "x": null}'
    assert (tmp_path / "metrics.jsonl").read_text() == expected + "\n"
    with pytest.raises(AssertionError):
        log.log(4, {"itc": torch.tensor(1.0)})
    log.close()


def test_fresh_start_keeps_the_earlier_metrics_aside(tmp_path):
    for steps in (1, 2, 3):
        run(tmp_path, range(steps))
    counts = {path.name: len(path.read_text().splitlines()) for path in tmp_path.iterdir()}
    assert counts == {"metrics.1.jsonl": 1, "metrics.2.jsonl": 2, "metrics.jsonl": 3}


def test_other_ranks_write_nothing(tmp_path, capsys):
    log = RunLog(tmp_path / "run", is_main=False, resume_step=None)
    log.log(1, {"itc": 1.0})
    with log.progress(2, 0, every_steps=1) as progress:
        progress.update(1, "itc 1")
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr() == ("", "")


def test_progress_prints_plain_lines_without_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=False, width=20)
    with StepProgress(25, 5, every_steps=10, console=console) as progress:
        for step in range(6, 26):
            progress.update(step, f"itc {step} (chance 4.16)" if step % 5 == 0 else None)
    lines = console.file.getvalue().splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 10/25 (40 %)", "step 20/25 (80 %)", "step 25/25 (100 %)"]
    assert lines[0].endswith("left: itc 10 (chance 4.16)")


def test_progress_draws_a_bar_on_a_terminal():
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with StepProgress(10, 2, console=console) as progress:
        progress.update(7, "itc 2.31")
    assert "7/10" in console.file.getvalue()
    assert "itc 2.31" in console.file.getvalue()


def test_describe_losses():
    assert describe_losses({"itc": 2.3123, "itg": 10.31}, {"itc": math.log(64)}) == "itc 2.31 (chance 4.16), itg 10.3"


def test_chance_watch_warns_once_per_stuck_loss():
    watch = ChanceWatch({"itc": 4.16, "itm": 0.6365}, patience_steps=20, after_step=100)
    warned = {}
    for step in range(1, 200):
        # itc wobbles around chance; itm is at chance during warm-up only, then falls.
        losses = {"itc": 4.16 + 0.3 * (-1) ** step, "itm": 0.6365 if step <= 110 else 0.5, "itg": 1.0}
        for warning in watch.update(step, losses):
            warned[step] = warning
    assert list(warned) == [121]  # steps 102..121 are the first full window after the warm-up
    assert warned[121].startswith("itc has sat at its chance level for 20 steps (mean 4.16, chance 4.16)")
