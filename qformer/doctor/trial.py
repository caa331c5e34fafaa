"""The trial: real weights, real records, a few steps of growing size, and what they say of the whole run.

Nothing is written. Activations grow with the micro-batch along a line, so two small steps tell whether the real one fits
before it is tried.
"""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import NamedTuple

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from qformer.build import build_dataset, build_stage
from qformer.data import GlobalBatches, Order, RecordDataset, training_loader
from qformer.doctor.checks import Case, parameter_bytes, size
from qformer.doctor.report import FAILED, OK, WARNING, Finding
from qformer.log import describe_losses
from qformer.messages import one_line
from qformer.optim import build_optimizer

SMALL = (2, 4)  # records of the first two steps
FULL_STEP_S = 60.0  # a step that would take longer is not tried at its full size
TIGHT = 0.85  # share of the memory from which on it is worth a word


class Step(NamedTuple):
    """One forward and backward pass and update: wall time in seconds, memory beside weights and moments, its losses."""

    records: int
    seconds: float
    forward_s: float
    activation_bytes: int
    metrics: dict[str, float]
    gradient_norm: float


class Trial:
    """The model of a run with its optimizer on the device, for steps that are thrown away."""

    def __init__(self, case: Case):
        assert case.accelerator is not None
        config, self.accelerator = case.config, case.accelerator
        self.config = config
        self.model = build_stage(config)
        self.dataset: RecordDataset = build_dataset(
            config.data, self.model.encoder, "train", config.train.seed, vqa_prompt=self.model.vqa_prompt
        )
        self.model.require_data(self.dataset)
        self.model.use_training_kernels(self.accelerator.device, config.train.mixed_precision)
        self.model.to(self.accelerator.device)
        optimizer = build_optimizer(
            self.model.adapter, lr=config.optim.warmup_lr, betas=(0.9, 0.98), weight_decay=0.0, eps=1e-8
        )
        self.adapter, self.optimizer = self.accelerator.prepare(self.model.adapter, optimizer)
        self.model.train()

    def step(self, records: int) -> Step:
        device, adapter = self.accelerator.device, self.adapter
        before = _begin_peak(device)
        batches = GlobalBatches(Order(len(self.dataset), self.config.train.seed), 1, 0, records)
        prepared = self.model.prepare(next(iter(training_loader(self.dataset, batches, 0))).to(device), 0)
        targets = torch.tensor(float(prepared.target_tokens), device=device)
        start = _now(device)
        with _saved_bytes(adapter) as saved, self.accelerator.autocast():
            output = self.model(prepared, targets, adapter)
        forward_s = _now(device) - start
        self.accelerator.backward(output.loss)
        norm = self.accelerator.clip_grad_norm_(adapter.parameters(), self.config.optim.clip_norm)
        if device.type == "cuda":  # gradients are counted with the weights
            peak = torch.cuda.max_memory_allocated(device) - before - parameter_bytes(adapter)
        else:
            peak = sum(saved.values())
        self.optimizer.step()
        self.optimizer.zero_grad()
        seconds = _now(device) - start
        metrics = {name: float(value) for name, value in output.metrics.items()}
        return Step(records, seconds, forward_s, max(0, peak), metrics, float(norm))


def try_steps(case: Case) -> Iterator[Finding]:
    """Findings "step", "memory" and "time"."""
    micro = case.config.train.micro_batch_size
    try:
        trial = Trial(case)
        small = [trial.step(n) for n in sorted({min(n, micro) for n in SMALL})]
        small[-1] = last = trial.step(small[-1].records)  # again, for its time: the first of a size is slow
        fits = case.static_bytes + _activations(small, micro) <= case.free_bytes
        if fits and micro > last.records and last.seconds * micro / last.records < FULL_STEP_S:
            trial.step(micro)
            last = trial.step(micro)
    except torch.OutOfMemoryError:
        full = "the device's memory is full: take smaller frozen models, or bfloat16 for llm.dtype and encoder.dtype"
        yield Finding("step", FAILED, full)
        return
    except (ValueError, OSError, RuntimeError) as error:
        yield Finding("step", FAILED, one_line(error, 400))
        return
    yield _of_step(last, micro, trial.model.chance_levels(last.records), trial.accelerator)
    activations = last.activation_bytes if last.records == micro else _activations(small, micro)
    yield _of_memory(case, small, activations, measured=last.records == micro)
    yield _of_time(case, last)


def _activations(small: list[Step], records: int) -> float:
    """Bytes at `records` a forward: the line through two smaller steps."""
    return small[-1].activation_bytes + _slope(small) * (records - small[-1].records)


def _slope(small: list[Step]) -> float:
    first, last = small[0], small[-1]
    if first is last:
        return last.activation_bytes / last.records
    return max(0.0, (last.activation_bytes - first.activation_bytes) / (last.records - first.records))


def _of_step(step: Step, micro: int, chance: dict[str, float], accelerator: Accelerator) -> Finding:
    losses = describe_losses(step.metrics, chance)
    text = f"{step.records} records forward and back in {step.seconds:.3g} s: {losses}, gradient norm {step.gradient_norm:.3g}"
    if not all(map(math.isfinite, step.metrics.values())):
        return Finding("step", FAILED, f"{text}; a loss is not finite: try bfloat16 for frozen models of float16")
    if not math.isfinite(step.gradient_norm) and accelerator.scaler is None:
        return Finding("step", FAILED, f"{text}; the gradient is not finite: try train.mixed_precision=bf16")
    if step.records < micro:
        return Finding("step", WARNING, f"{text}; the full {micro} records were not tried")
    return Finding("step", OK, text)


def _of_memory(case: Case, small: list[Step], activations: float, measured: bool) -> Finding:
    micro, total = case.config.train.micro_batch_size, case.static_bytes + activations
    of_which = "measured" if measured else f"scaled from steps of {small[-1].records}"
    text = (
        f"{size(total)} of {size(case.free_bytes)} free: {size(case.static_bytes)} weights, gradients and moments, "
        f"{size(activations)} activations of {micro} records ({of_which})"
    )
    if total <= TIGHT * case.free_bytes:
        return Finding("memory", OK, text)
    room = case.free_bytes - case.static_bytes - small[-1].activation_bytes
    most = small[-1].records + math.floor(TIGHT * room / _slope(small)) if _slope(small) else micro
    fix = f"set train.micro_batch_size={max(1, min(most, micro - 1))} or less (a divisor of train.global_batch_size)"
    if total <= case.free_bytes:
        return Finding("memory", WARNING, f"{text}: that is tight; {fix} should it run out")
    return Finding("memory", FAILED, f"{text}: it does not fit; {fix}")


def _of_time(case: Case, step: Step) -> Finding:
    train, workers = case.config.train, case.config.data.workers
    per_record = step.seconds / step.records
    step_s = per_record * train.micro_batch_size * case.accumulation
    read_s = case.read_s * train.micro_batch_size * case.accumulation / max(1, workers)
    steps = train.max_steps - case.first_step
    validations = 0
    if case.config.data.validation:
        every, last = train.validate_every_steps, train.max_steps
        validations = last // every - case.first_step // every + (last % every > 0)
    validation_s = step.forward_s / step.records * train.validation_records / case.processes
    slower = max(step_s, read_s) if workers else step_s + read_s
    total = slower * steps + validation_s * validations
    text = (
        f"{timedelta(seconds=round(total))} for {steps} steps of {slower:.3g} s "
        f"({train.global_batch_size / slower:.3g} records/s, {case.processes} process{'es' * (case.processes > 1)}"
        f"{', their communication not counted' if case.processes > 1 else ''})"
    )
    if validations:
        text += f", {timedelta(seconds=round(validation_s * validations))} of it for {validations} validations"
    if read_s > step_s or (not workers and read_s > 0.2 * step_s):
        # by its parent's count; a container may be given fewer
        need = min(math.ceil(max(1, workers) * read_s / step_s), os.cpu_count() or 1)
        more = f"set data.workers={need}" if need > workers else "read smaller images or a feature cache"
        return Finding(
            "time", WARNING, f"{text}; reading takes {read_s:.3g} s a step, computing {step_s:.3g} s: {more}"
        )
    return Finding("time", OK, text)


@contextmanager
def _saved_bytes(adapter: nn.Module) -> Iterator[dict[int, int]]:
    """Sizes of all memory that the forward pass keeps for the backward pass, by address; parameters are not counted."""
    parameters = {p.untyped_storage().data_ptr() for p in adapter.parameters()}
    saved: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters and not isinstance(tensor, nn.Parameter):
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield saved


def _begin_peak(device: torch.device) -> int:
    """Bytes of the GPU that are allocated now, 0 on a CPU; the peak is counted from here."""
    if device.type != "cuda":
        return 0
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
