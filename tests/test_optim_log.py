import io
import json
import math
import mmap
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console
from tiny import run_stage
from torch import nn

from qformer.log import (
    PARTS,
    TIMING_FIELDS,
    ChanceWatch,
    CollapseWatch,
    MetricWindow,
    RunLog,
    StepProgress,
    describe_losses,
    gradient_norms,
    memory_bytes,
)
from qformer.metrics.queries import mean_cosine
from qformer.models import Stage1Adapter, Stage2Adapter
from qformer.optim import build_optimizer, lr_at, parameter_groups
from qformer.qformer import QFormer

REPO = Path(__file__).resolve().parent.parent
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


def test_a_parameter_may_learn_slower_than_the_rest():
    groups = parameter_groups(Model(), 0.05, {"linear.weight": 0.5, "norm.bias": 0.5})
    assert [(g["name"], g.get("lr_scale", 1.0), g["param_names"]) for g in groups] == [
        ("decay", 1.0, ["query_tokens"]),
        ("no_decay", 1.0, ["temperature", "norm.weight", "linear.bias"]),
        ("decay", 0.5, ["linear.weight"]),
        ("no_decay", 0.5, ["norm.bias"]),
    ]


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
    assert list(warned) == [181]  # steps 102..181 are the first four full windows after the warm-up
    assert warned[181].startswith("itc has sat at its chance level for 80 steps (mean 4.16, chance 4.16)")


@pytest.mark.parametrize("every", [1, 10, 20])
def test_chance_watch_judges_a_trend_and_names_repeated_captions(every):
    """At 3.42 of 3.47 a run was called not learning, and then fell to 2.95."""
    steps = range(every, 401, every)
    falling = {s: max(2.95, 3.47 - 0.05 * s / 80) for s in steps}  # 3.42 at step 80
    watch = ChanceWatch({"itc": 3.47}, patience_steps=20, after_step=0)
    assert [w for s in steps for w in watch.update(s, {"itc": falling[s] + 0.004 * (-1) ** (s // every)})] == []
    for flat in (3.47, 3.42):
        watch = ChanceWatch({"itc": 3.47}, patience_steps=20, after_step=0)
        (warning,) = [w for s in steps for w in watch.update(s, {"itc": flat + 0.004 * (-1) ** (s // every)})]
        assert "is not falling, so it is not learning" in warning
        assert "few distinct captions" in warning


def test_queries_that_have_become_one_are_reported_once_after_the_warm_up():
    watch = CollapseWatch(8, after_step=100)
    metrics = {"query_output_cosine": 0.999, "query_effective_rank": 2.4}
    assert watch.update(100, metrics) == []
    assert watch.update(120, {"query_output_cosine": 0.9, "query_effective_rank": 3.0}) == []
    (warning,) = watch.update(140, metrics)
    assert "effective rank of 2.4 and a mean cosine of 0.999" in warning
    assert "stage1.diversity=0.2" in warning
    assert watch.update(160, metrics) == []


def test_queries_that_have_become_two_are_reported_by_validation_which_has_no_dropout():
    watch = CollapseWatch(16, after_step=100)
    assert watch.update(200, {"query_output_cosine": 0.34, "query_effective_rank": 12.2}) == []
    validated = {"validation_itc": 1.9, "captions": [], "validation_query_output_cosine": 0.488}
    (warning,) = watch.update(200, {**validated, "validation_query_effective_rank": 2.16})
    assert "16 queries" in warning
    assert "effective rank of 2.16" in warning
    apart = {"validation_query_output_cosine": 0.5, "validation_query_effective_rank": 8.5}
    assert CollapseWatch(16, after_step=0).update(50, apart) == []


# ---- what is measured ----


def adapter_of(stage: int) -> Stage1Adapter | Stage2Adapter:
    sizes = {"width": 8, "layers": 2, "heads": 2, "ffn_width": 8, "queries": 3, "encoder_width": 6}
    if stage == 1:
        return Stage1Adapter(QFormer(**sizes, vocab_size=11), encoder_width=6, contrastive_width=4, dec_id=1)
    return Stage2Adapter(QFormer(**sizes, vocab_size=None), encoder_width=6, llm_width=10)


@pytest.mark.parametrize("stage", [1, 2])
def test_gradient_norms_of_the_parts_are_those_before_clipping(stage):
    torch.manual_seed(0)
    adapter = adapter_of(stage)
    for parameter in adapter.parameters():
        parameter.grad = torch.randn_like(parameter)
    expected = {
        "query_tokens": [adapter.qformer.query_tokens],
        "self_attention": [p for block in adapter.qformer.layers for p in block.attention.parameters()],
        "cross_attention": [*adapter.qformer.layers[0].cross_attention.parameters()],
        "query_ffn": [p for block in adapter.qformer.layers for p in block.query_ffn.parameters()],
        "feature_norm": [*adapter.feature_norm.parameters()],
    }
    if stage == 1:
        heads = [adapter.image_projection, adapter.text_projection, adapter.itm_head, adapter.lm_transform]
        parameters = [p for module in [*heads, adapter.lm_norm] for p in module.parameters()]
        expected["heads"] = [*parameters, adapter.temperature, adapter.lm_bias]
    else:
        expected["language_projection"] = [*adapter.language_projection.parameters()]
    before = {part: math.sqrt(sum(float(p.grad.square().sum()) for p in ps)) for part, ps in expected.items()}

    for clip_norm in (0.5, 1e9):
        total = float(nn.utils.clip_grad_norm_(adapter.parameters(), clip_norm))
        found = gradient_norms(adapter, total, clip_norm)
        assert set(found) <= {f"gradient_norm_{part}" for part in PARTS}
        assert {part: found[f"gradient_norm_{part}"] for part in before} == pytest.approx(before, rel=1e-4)
        assert math.sqrt(sum(norm**2 for norm in found.values())) == pytest.approx(total, rel=1e-4)
        for parameter in adapter.parameters():  # as before the clipping, for the next turn
            parameter.grad *= max(1.0, (total + 1e-6) / clip_norm)
    assert ("gradient_norm_text_ffn" in found) is (stage == 1)


def test_gradient_norms_without_gradients():
    assert gradient_norms(adapter_of(1), math.nan, 1.0) == {}


def test_mean_cosine_of_queries_is_that_of_all_pairs():
    torch.manual_seed(0)
    output = torch.randn(3, 5, 7)
    pairs = [(i, j) for i in range(5) for j in range(5) if i != j]
    cosines = [nn.functional.cosine_similarity(output[:, i], output[:, j], dim=-1) for i, j in pairs]
    torch.testing.assert_close(mean_cosine(output), torch.stack(cosines).mean())
    assert mean_cosine(torch.randn(2, 1, 7).expand(2, 4, 7)).item() == pytest.approx(1)
    assert mean_cosine(torch.eye(4)[None]).item() == pytest.approx(0)
    assert mean_cosine(torch.randn(2, 1, 7)).item() == pytest.approx(0, abs=1e-6)


def test_window_gives_means_and_speeds_and_begins_anew(monkeypatch):
    clock = iter([10.0, 14.0, 20.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    window = MetricWindow({"itc": 6.0, "count": 2.0})  # of a checkpoint in the middle of a window
    window.add({"itc": 3.0}, samples=8, tokens=100.0)
    window.waited_s += 1.0
    means, timing = window.close()
    assert means == {"itc": 3.0}
    assert timing == {"samples_per_s": 2.0, "tokens_per_s": 25.0, "data_wait": 0.25}
    assert timing.keys() <= set(TIMING_FIELDS)
    assert window.sums == {}


def test_memory_is_that_of_this_process():
    before, size = memory_bytes(torch.device("cpu")), 200_000_000
    pages = mmap.mmap(-1, size)  # of the kernel: the allocator may hold that much of earlier tests
    torch.frombuffer(pages, dtype=torch.uint8).fill_(1)
    assert memory_bytes(torch.device("cpu")) - before > 0.8 * size


@pytest.mark.parametrize("stage", [1, 2])
def test_every_key_of_a_run_is_there_and_documented(tiny, tmp_path, stage):
    run_stage(stage, (tiny.stage1 if stage == 1 else tiny.stage2)(tmp_path, "train.log_every_steps=2"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    second, last, validation = lines  # steps 2, 3 and the validation at the end
    parts = {"query_tokens", "self_attention", "cross_attention", "query_ffn", "embeddings", "feature_norm"}
    parts |= {"heads", "text_ffn"} if stage == 1 else {"language_projection"}
    measured = {
        "samples_per_s",
        "tokens_per_s",
        "data_wait",
        "memory_bytes",
        "lr",
        "gradient_norm",
        "query_output_cosine",
        "query_effective_rank",
    }
    for line in (second, last):
        assert {name.removeprefix("gradient_norm_") for name in line if name.startswith("gradient_norm_")} == parts
        assert all(line[f"gradient_norm_{part}"] > 0 for part in parts)
        assert measured <= line.keys()
        assert -1 <= line["query_output_cosine"] <= 1
        assert line["tokens_per_s"] > 2 * line["samples_per_s"], "a caption has at least three tokens"
        assert 1e7 < line["memory_bytes"] < 1e11
        assert 0 <= line["data_wait"] <= 1
    # the last window is one step, so the parts add up to the whole
    whole = math.sqrt(sum(last[f"gradient_norm_{part}"] ** 2 for part in parts))
    assert whole == pytest.approx(last["gradient_norm"], rel=1e-4)
    assert "validation_query_output_cosine" in validation

    documented = set(re.findall(r"`(\w+)`", (REPO / "docs/observability.md").read_text()))
    assert {name for line in lines for name in line} <= documented
