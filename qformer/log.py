"""What a run reports while it trains: `metrics.jsonl`, a progress line, and a warning when a loss does not learn.

docs/observability.md says of every number in `metrics.jsonl` what it is and when to worry.
"""

import contextlib
import json
import logging
import math
import os
import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from datetime import timedelta
from itertools import count
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from qformer.files import METRICS_FILE, WARNINGS_FILE
from qformer.messages import one_line

logger = logging.getLogger(__name__)

# The fields that differ between two otherwise equal runs: everything else in a line is reproducible.
TIMING_FIELDS = ("samples_per_s", "tokens_per_s", "seconds", "eta", "data_wait", "memory_bytes")
# Relative to chance: a mean this close to it is "at chance"; one that fell by more than this over WINDOWS is falling.
CHANCE_BAND, CHANCE_FALL, WINDOWS = 0.02, 0.005, 4
ALIKE = 0.95  # mean cosine of the queries of an image from which on they are copies
FEW = 0.25  # their effective rank, as a share of their number, below which they are copies of a few
# The parts of an adapter whose gradients are told apart, each with what the names of its parameters match; the first fits.
PARTS = {
    "llm_lora": r"^llm_lora\.",
    "encoder": r"^encoder(_lora)?\.",
    "query_tokens": r"query_tokens",
    "self_attention": r"\.attention\.",
    "cross_attention": r"\.cross_attention\.",
    "query_ffn": r"\.query_ffn\.",
    "text_ffn": r"\.text_ffn\.",
    "embeddings": r"embedding",
    "feature_norm": r"^feature_norm\.",
    "language_projection": r"^language_projection\.",
    "heads": "",
}


class RunLog:
    """Appends one JSON object per log event to `folder/metrics.jsonl`; silent on all ranks but the main one.

    A run that was interrupted and resumed leaves the lines of an uninterrupted one, `TIMING_FIELDS` aside: on resume,
    lines past the checkpoint are cut away first, and so is a last line that a kill left half written. A fresh start in
    a folder with metrics of an earlier run moves those to `metrics.1.jsonl` (or the next free number).

    Args:
        folder: the run's folder, made if missing.
        is_main: whether this is the rank that writes.
        resume_step: the checkpoint's step, its own lines are kept; None for a fresh start.

    Raises:
        ValueError: on resume, a line of the existing file other than the last is not JSON with a step.
    """

    def __init__(self, folder: Path, *, is_main: bool, resume_step: int | None):
        self.is_main = is_main
        self._file = None
        if not is_main:
            return
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / METRICS_FILE
        if resume_step is not None:
            _cut_after(path, resume_step)
        elif aside := _move_aside(path):
            logger.warning("%s held the metrics of an earlier run; moved to %s", path, aside)
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Write one line: the step and `values`, floats at 6 significant digits, NaN and infinities as strings."""
        assert "step" not in values, "the step is given once, as the first argument"
        if self._file is None:
            return
        line = json.dumps({"step": step} | {name: _plain(value) for name, value in values.items()}, allow_nan=False)
        try:  # what a full disk does not take stays in the file's buffer, for the next line to push out
            self._file.write(line + "\n")
            self._file.flush()
        except OSError as error:
            logger.warning("%s: step %d is not on the disk yet (%s)", self._file.name, step, error.strerror)

    def has_validation(self, step: int) -> bool:
        """Whether a validation at this step is in the file; only the main rank knows."""
        assert self._file is not None
        lines = map(json.loads, Path(self._file.name).read_text(encoding="utf-8").splitlines())
        return any(line["step"] == step and any(k.startswith("validation_") for k in line) for line in lines)

    def progress(self, total_steps: int, first_step: int, every_steps: int = 50) -> "StepProgress":
        """A progress display from `first_step` to `total_steps`, for use in a `with`; silent off the main rank."""
        return StepProgress(total_steps, first_step, every_steps=every_steps, enabled=self.is_main)

    def close(self) -> None:
        if self._file is not None:
            try:
                self._file.close()
            except OSError as error:
                logger.warning("%s: its last lines are lost (%s)", self._file.name, error.strerror)
            self._file = None

    def __enter__(self) -> "RunLog":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class WarningFile(logging.Handler):
    """Keeps what this package warns of while a run trains in `folder/warnings.jsonl`, and the error that ends it.

    One JSON object a line: `time` (local, to the second), `step` (None before the first, or in a data worker), `level`,
    `message`. Each start and each resumption is a line of level INFO. A resumed run goes on with its file. A disk that
    takes no more loses lines and stops no run.

    Args:
        folder: the run's folder.
        is_main: whether this is the rank that writes; its data workers write too where they are forked.
        resumes: whether the run goes on from a checkpoint; a fresh start moves the file of an earlier run aside.
    """

    def __init__(self, folder: Path, *, is_main: bool, resumes: bool) -> None:
        super().__init__(logging.WARNING)
        self.step: Callable[[], int] | None = None
        self._path, self._is_main, self._resumes, self._process = folder / WARNINGS_FILE, is_main, resumes, os.getpid()

    def emit(self, record: logging.LogRecord) -> None:
        self._write(record.levelname, record.getMessage())

    def _write(self, level: str, message: str) -> None:
        step = self.step() if self.step is not None and os.getpid() == self._process else None
        line = {"time": time.strftime("%Y-%m-%d %H:%M:%S"), "step": step, "level": level, "message": message}
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def __enter__(self) -> "WarningFile":
        if self._is_main:
            if not self._resumes:
                _move_aside(self._path)
            self._write("INFO", "resumed" if self._resumes else "started")
            logging.getLogger("qformer").addHandler(self)
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if self._is_main:
            logging.getLogger("qformer").removeHandler(self)
            if error is not None:
                self._write("ERROR", f"the run ended: {one_line(error, limit=500)}")


class StepProgress:
    """Time left and losses on stderr: a bar on a terminal, else one plain line every `every_steps` steps."""

    def __init__(
        self, total_steps: int, first_step: int, *, every_steps: int = 50, enabled: bool = True,
        console: Console | None = None,
    ):  # fmt: skip
        console = console or Console(stderr=True)
        columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(
            TextColumn("step"), *columns, TextColumn("{task.fields[losses]}", markup=False), console=console,
            disable=not (enabled and console.is_terminal),
            speed_estimate_period=600,  # steps of a large model take longer than rich's 30 s window
        )  # fmt: skip
        self.bar.add_task("", total=total_steps, completed=first_step, losses="")
        self.every_steps = every_steps if enabled and not console.is_terminal else 0

    def update(self, step: int, text: str | None = None) -> None:
        """Show that `step` updates are done; `text` (see `describe_losses`) stays until replaced."""
        task = self.bar.tasks[0]
        self.bar.update(task.id, completed=step, losses=task.fields["losses"] if text is None else text)
        if self.every_steps and (step % self.every_steps == 0 or step == task.total):
            left = "?" if task.time_remaining is None else timedelta(seconds=round(task.time_remaining))
            line = f"step {step}/{task.total:.0f} ({int(task.percentage)} %), {left} left"
            print(": ".join(filter(None, (line, task.fields["losses"]))), file=self.bar.console.file, flush=True)

    def __enter__(self) -> "StepProgress":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()


class MetricWindow:
    """Means of the metrics since the last line of the log, and speeds.

    Args:
        sums: those of a checkpoint, kept with it so that a resumed run logs the same means; the clock is not kept.
    """

    def __init__(self, sums: dict[str, float]):
        self._open(sums)

    def _open(self, sums: dict[str, float]) -> None:
        self.sums, self.samples, self.tokens, self.waited_s = sums, 0, 0.0, 0.0
        self.start = time.perf_counter()

    def add(self, metrics: Mapping[str, float], samples: int, tokens: float) -> None:
        """Take what one step found, read and had as target tokens, over all ranks."""
        for name, value in {**metrics, "count": 1.0}.items():
            self.sums[name] = self.sums.get(name, 0.0) + value
        self.samples += samples
        self.tokens += tokens

    def close(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means, and speeds with the share of time spent waiting for data; begins a new window."""
        seconds = time.perf_counter() - self.start
        means = {name: value / self.sums["count"] for name, value in self.sums.items() if name != "count"}
        timing = {
            "samples_per_s": self.samples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "data_wait": self.waited_s / seconds,
        }
        self._open({})
        return means, timing


def gradient_norms(adapter: nn.Module, total: float, clip_norm: float) -> dict[str, float]:
    """The gradient's norm in every part of `PARTS` as it was before clipping; the root of their squares' sum is `total`.

    Waits for the device once, so it is asked for on the steps that are logged only.

    Args:
        total: the norm of the whole gradient before it was clipped to `clip_norm`.
    """
    squares: dict[str, list[torch.Tensor]] = {}
    for name, parameter in adapter.named_parameters():
        if parameter.grad is not None:
            part = next(part for part, pattern in PARTS.items() if re.search(pattern, name))
            squares.setdefault(part, []).append(parameter.grad.float().square().sum())
    if not squares:  # before a backward pass
        return {}
    norms = torch.stack([torch.stack(of_part).sum() for of_part in squares.values()]).sqrt().tolist()
    clipped_by = max(1.0, (total + 1e-6) / clip_norm)  # as torch clips
    return {f"gradient_norm_{part}": norm * clipped_by for part, norm in zip(squares, norms, strict=True)}


def memory_bytes(device: torch.device) -> int:
    """The most that was allocated on a GPU so far; on a CPU what this process holds now, without its data workers."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return psutil.Process().memory_info().rss


class ChanceWatch:
    """Reports in plain words, once per loss, that a loss still sits at its chance level after warm-up.

    Sits: over `WINDOWS` windows of `patience_steps` steps, counted from `after_step`, the mean of the newest is within
    2 % of chance and less than 0.5 % of chance below that of the oldest. A loss near chance that falls is learning.
    Starts afresh on resume, so a warning can come again.

    Args:
        chance: the value of each watched loss for a model that has learnt nothing, in nats.
        patience_steps: the length of a window; losses of at least one step in each are needed.
        after_step: values up to this step (the warm-up) are not looked at.
    """

    def __init__(self, chance: Mapping[str, float], patience_steps: int, after_step: int):
        assert patience_steps >= 1
        self.chance, self.patience_steps, self.after_step = dict(chance), patience_steps, after_step
        self._recent: dict[str, deque[tuple[int, float]]] = {name: deque() for name in chance}

    def update(self, step: int, losses: Mapping[str, float]) -> list[str]:
        """Take the losses of a step (steps may be left out) and return new warnings; unwatched losses are ignored."""
        if step <= self.after_step:
            return []
        watched = [name for name in self._recent if name in losses]
        return [warning for name in watched if (warning := self._judge(name, step, losses[name]))]

    def _judge(self, name: str, step: int, loss: float) -> str | None:
        recent, chance, watched_steps = self._recent[name], self.chance[name], WINDOWS * self.patience_steps
        recent.append((step, loss))
        full = False
        while recent[0][0] <= step - watched_steps:
            recent.popleft()
            full = True
        oldest = [v for s, v in recent if s <= step - watched_steps + self.patience_steps]
        newest = [v for s, v in recent if s > step - self.patience_steps]
        if not full or not oldest:
            return None
        mean, fall = fmean(newest), fmean(oldest) - fmean(newest)
        if abs(mean - chance) > CHANCE_BAND * abs(chance) or fall > CHANCE_FALL * abs(chance):
            return None
        del self._recent[name]
        return (
            f"{name} has sat at its chance level for {watched_steps} steps (mean {mean:.3g}, chance {chance:.3g}) and is "
            "not falling, so it is not learning: check that texts belong to their images, that there are not few distinct "
            "captions repeated over many images (equal texts cannot be told apart), that the learning rate is not far too "
            "high or low, and that features differ between images"
        )


class CollapseWatch:
    """Reports in plain words, once, that the queries of an image have become copies of one vector or of a few.

    Dropout keeps copies apart that are equal without it, so that validation sees what training does not.

    Args:
        queries: of an image.
        after_step: values up to this step (the warm-up) are not looked at.
    """

    def __init__(self, queries: int, after_step: int):
        self.queries, self.after_step, self._reported = queries, after_step, False

    def update(self, step: int, metrics: Mapping[str, Any]) -> list[str]:
        """Take the means of a logged step, or of a validation, and return the warning, if it is due."""
        prefix = "validation_" if "validation_query_effective_rank" in metrics else ""
        cosine = metrics.get(f"{prefix}query_output_cosine", 0.0)
        rank = metrics.get(f"{prefix}query_effective_rank", float(self.queries))
        if self._reported or step <= self.after_step or not (cosine >= ALIKE or rank < FEW * self.queries):
            return []
        self._reported = True
        return [
            f"the {self.queries} queries of an image have become copies: their outputs have an effective rank of {rank:.3g} and "
            f"a mean cosine of {cosine:.3g}, so that a language model would read few vectors many times; stage1.diversity=0.2 "
            "keeps them apart at no cost to the other objectives, qformer.dropout=0 where it does not"
        ]


def describe_losses(metrics: Mapping[str, float], chance: Mapping[str, float]) -> str:
    """Format losses at three digits, beside chance where it is known: "itc 2.31 (chance 4.16), itg 3.05"."""
    return ", ".join(
        f"{name} {value:.3g}" + (f" (chance {chance[name]:.3g})" if name in chance else "")
        for name, value in metrics.items()
    )


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    assert value is None or isinstance(value, float | int | str), f"{type(value).__name__} is not a plain value"
    if not isinstance(value, float):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else str(float(value))


def _move_aside(path: Path) -> str | None:
    """Give a file of an earlier run the next free name, as metrics.1.jsonl, and return that; None where there is none."""
    if not path.exists():
        return None
    aside = next(p for i in count(1) if not (p := path.with_suffix(f".{i}{path.suffix}")).exists())
    os.replace(path, aside)
    return aside.name


def _cut_after(path: Path, step: int) -> None:
    if not path.exists():
        logger.warning("%s is missing: the resumed run's metrics begin after step %d", path, step)
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = []
    for number, line in enumerate(lines, start=1):
        try:
            line_step = json.loads(line)["step"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(lines):
                logger.warning("%s: dropped the last line, cut short when the run was stopped", path)
                break
            raise ValueError(f"{path}, line {number}: expected a JSON object with a step; delete the line") from error
        if line_step <= step:
            kept.append(line + "\n")
    temporary = path.with_name(f"{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
