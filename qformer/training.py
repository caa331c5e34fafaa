"""The loop: accumulate, guard, step, log, validate, save. One visible function, the same for both stages.

Accelerate gives device, precision, process group and trackers; everything that must be exact is done here by hand: the
learning rate is a function of the step, accumulation is an explicit inner loop, and every random draw is a function of
(seed, step, rank), so that a resumed run and an uninterrupted one are the same run.
"""

import contextlib
import logging
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from qformer.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    require_disk_space,
    require_same_parts,
    save_adapter,
    save_checkpoint,
)
from qformer.config import Stage1Config, Stage2Config, to_yaml
from qformer.data import GlobalBatches, RecordDataset, derive_seed, training_loader
from qformer.distributed import sum_over_ranks
from qformer.log import ChanceWatch, RunLog, describe_losses
from qformer.models import Output, Prepared, Stage1Model, Stage2Model
from qformer.objectives import ITM_CHANCE
from qformer.optim import build_optimizer, lr_at
from qformer.validation import describe_validation, validate

logger = logging.getLogger(__name__)
Model = Stage1Model | Stage2Model
Config = Stage1Config | Stage2Config


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient that is not a number; the update was not made."""


def configure_logging(is_main_process: bool) -> None:
    """What a stage prints: our own messages on the main process, only warnings of the others and of libraries."""
    from rich.logging import RichHandler

    handler = RichHandler(show_path=False, log_time_format="%H:%M:%S", markup=False)
    logging.basicConfig(format="%(message)s", handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("qformer").setLevel(logging.INFO if is_main_process else logging.WARNING)


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """A mistake that a user can mend ends a stage with one line on standard error and exit code 2.

    With QFORMER_TRACEBACK=1 in the environment it ends with the whole traceback.
    """
    try:
        yield
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("QFORMER_TRACEBACK"):
            raise
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None


def start_accelerator(config: Config) -> Accelerator:
    """The Accelerator of this run: device, precision, trackers; the CPU where there is no accelerator.

    Raises: ValueError when several processes were launched but each would train alone, or the precision does not fit.
    """
    cpu = config.train.cpu or not torch.accelerator.is_available()
    if cpu and config.train.mixed_precision == "fp16":
        raise ValueError("train.mixed_precision=fp16 needs a GPU; use bf16 or no on a CPU")
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.train.mixed_precision,
        log_with=config.run.trackers or None,
        project_dir=config.run.dir,
    )
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != accelerator.num_processes:
        raise ValueError(
            f"{launched} processes were launched but this one sees {accelerator.num_processes}: each would "
            "train a lone copy. On CPUs launch with: accelerate launch --multi_gpu --num_processes 2 ... train.cpu=true"
        )
    return accelerator


def fit(
    model: Model, train: RecordDataset, validation: RecordDataset | None, config: Config, accelerator: Accelerator
) -> bool:
    """Train `model.adapter` to `train.max_steps` and leave the run folder of design section 7.

    Returns: True when finished, False when Ctrl-C or SIGTERM stopped it after saving a checkpoint.
    Raises: NonFiniteLoss before the update that a non-finite loss or gradient would spoil; ValueError for a run folder
        or batch size that does not fit.
    """
    options, run_dir = config.train, Path(config.run.dir)
    micro, world = options.micro_batch_size, accelerator.num_processes
    accumulation = _accumulation(options.global_batch_size, micro, world)
    resume_from = _resume_from(run_dir, options.resume)
    run_dir.mkdir(parents=True, exist_ok=True)
    adapter = model.adapter
    require_disk_space(run_dir, adapter, options.keep_checkpoints)
    model.to(accelerator.device)
    if isinstance(model, Stage2Model) and accelerator.device.type == "cpu" and options.mixed_precision == "bf16":
        model.llm.use_plain_attention()
    o = config.optim
    optimizer = build_optimizer(adapter, lr=o.lr, betas=(o.betas[0], o.betas[1]), weight_decay=o.weight_decay, eps=1e-8)
    state: dict[str, Any] = {"step": 0, "dropped": 0, "window": {}}
    if resume_from:
        require_same_parts(
            config, resume_from, ("encoder", "llm") if isinstance(config, Stage2Config) else ("encoder",)
        )
        state = load_checkpoint(resume_from, adapter, optimizer)
        if state["step"] > options.max_steps:
            raise ValueError(
                f"{resume_from} is past train.max_steps={options.max_steps}; raise it, or take another run.dir"
            )
        logger.info("resumed from %s at step %d of %d", resume_from, state["step"], options.max_steps)
    model.adapter, stepper = accelerator.prepare(adapter, optimizer)
    if accelerator.scaler and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    step = first_step = last_saved = state["step"]
    batches = GlobalBatches(
        len(train), options.seed, world, accelerator.process_index, micro, accumulation, first_step=first_step
    )
    loader = iter(training_loader(train, batches, config.data.workers))
    chance = chance_levels(model, micro * world)
    watch = ChanceWatch(chance, patience_steps=max(20, options.log_every_steps), after_step=o.warmup_steps)
    config_yaml = to_yaml(config)
    if accelerator.is_main_process:
        (run_dir / "config.yaml").write_text(config_yaml)
    if config.run.trackers:
        accelerator.init_trackers(run_dir.name)
    log = RunLog(run_dir, is_main=accelerator.is_main_process, resume_step=first_step if resume_from else None)

    def save() -> None:
        if accelerator.is_main_process:
            scaler = {"scaler": accelerator.scaler.state_dict()} if accelerator.scaler else {}
            kept = {"dropped": state["dropped"], "window": window.sums, **scaler}
            save_checkpoint(run_dir, step, adapter, optimizer, kept, config_yaml, options.keep_checkpoints)
        accelerator.wait_for_everyone()

    window, stopping = _Window(state["window"]), 0.0
    model.train()
    with log, _stop_signals() as stop, log.progress(options.max_steps, first_step, options.log_every_steps) as progress:
        while step < options.max_steps and not stopping:
            torch.manual_seed(derive_seed(options.seed, step, accelerator.process_index))
            lr = lr_at(
                step, peak_lr=o.lr, min_lr=o.min_lr, warmup_steps=o.warmup_steps, warmup_lr=o.warmup_lr,
                max_steps=options.max_steps,
            )  # fmt: skip
            for group in optimizer.param_groups:
                group["lr"] = lr
            start = time.perf_counter()
            prepared = [
                model.prepare(
                    next(loader).to(accelerator.device, non_blocking=True), derive_seed(options.seed, step, "noise", i)
                )
                for i in range(accumulation)
            ]
            window.waited_s += time.perf_counter() - start
            metrics, norm = _forward_backward(model, prepared, accelerator, o.clip_norm)
            dropped = float(sum(len(p.batch.dropped) for p in prepared))
            sound = all(map(math.isfinite, metrics.values())) and (
                math.isfinite(norm) or accelerator.scaler is not None
            )
            # one small message a step, so that all ranks agree: is it sound, what was dropped, was one told to stop
            bad, dropped, stopping, *sums = _sum(
                [not sound, dropped, bool(stop), *metrics.values()], accelerator.device
            )
            if bad:
                raise NonFiniteLoss(_describe_non_finite(step, metrics, norm, prepared))
            stepper.step()
            stepper.zero_grad()
            step += 1
            state["dropped"] += int(dropped)
            means = {name: value / world for name, value in zip(metrics, sums, strict=True)}
            window.add(means | {"gradient_norm": norm}, options.global_batch_size)
            if step % options.log_every_steps == 0 or step == options.max_steps:
                means, timing = window.close()
                line = means | {f"{name}_chance": value for name, value in chance.items()} | timing
                line |= {"lr": lr, "dropped": state["dropped"]} | (
                    {"itc_negatives": micro * world - 1} if chance else {}
                )
                log.log(step, line)
                accelerator.log(line, step=step)
                for warning in watch.update(step, means):
                    logger.warning(warning)
                losses = describe_losses({k: v for k, v in means.items() if k != "gradient_norm"}, chance)
                progress.update(step, f"{losses}, {timing['samples_per_s']:.3g} samples/s")
            else:
                progress.update(step)
            if validation and (step % options.validate_every_steps == 0 or step == options.max_steps):
                found = validate(model, validation, config, accelerator)
                log.log(step, found)
                accelerator.log({k: v for k, v in found.items() if isinstance(v, float)}, step=step)
                if accelerator.is_main_process:
                    logger.info("validation at step %d: %s", step, describe_validation(found))
            if step % options.checkpoint_every_steps == 0 or step == options.max_steps:
                save()
                last_saved = step
        if last_saved != step:
            save()
    model.adapter = adapter
    if config.run.trackers:
        accelerator.end_training()
    if step < options.max_steps:
        logger.warning("stopped at step %d of %d and saved; go on with train.resume=auto", step, options.max_steps)
        return False
    if accelerator.is_main_process:
        save_adapter(run_dir / "adapter", adapter, config_yaml, model_card(config, step, state["dropped"]))
    accelerator.wait_for_everyone()
    if state["dropped"]:
        logger.warning("%d broken records were met and replaced by others", state["dropped"])
    return True


def _forward_backward(
    model: Model, prepared: list[Prepared], accelerator: Accelerator, clip_norm: float
) -> tuple[dict[str, float], float]:
    """Gradient of the whole step: every micro-batch, synchronised once. Returns this rank's metrics and the norm."""
    tokens = torch.tensor(float(sum(p.target_tokens for p in prepared)), device=accelerator.device)
    targets_per_rank = sum_over_ranks(tokens) / (accelerator.num_processes * len(prepared))
    outputs: list[Output] = []
    for i, micro_batch in enumerate(prepared):
        last = i == len(prepared) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model.adapter), accelerator.autocast():
            outputs.append(model(micro_batch, targets_per_rank))
        with contextlib.nullcontext() if last else accelerator.no_sync(model.adapter):
            accelerator.backward(outputs[-1].loss / len(prepared))
    norm = accelerator.clip_grad_norm_(model.adapter.parameters(), clip_norm)
    metrics = {
        name: float(torch.stack([o.metrics[name].float() for o in outputs]).mean()) for name in outputs[0].metrics
    }
    return metrics, float(norm) if norm is not None else math.nan


def chance_levels(model: Model, itc_candidates: int) -> dict[str, float]:
    """What each of stage 1's losses is for a model that has learnt nothing, in nats; stage 2 has no such level."""
    if isinstance(model, Stage2Model):
        return {}
    vocabulary = model.adapter.qformer.vocab_size if hasattr(model.adapter, "qformer") else len(model.tokenizer)
    return {"itc": math.log(itc_candidates), "itm": ITM_CHANCE, "itg": math.log(vocabulary or len(model.tokenizer))}


def model_card(config: Config, step: int, dropped: int) -> str:
    """README.md of an adapter folder."""
    stage, llm = (2, f"- language model: `{config.llm.id}`\n") if isinstance(config, Stage2Config) else (1, "")
    return (
        f"# qformer adapter, stage {stage}\n\n"
        f"Trainable tensors of a Q-Former between frozen models, after {step} steps of "
        f"{config.train.global_batch_size} records; {dropped} broken records were replaced.\n\n"
        f"- encoder: `{config.encoder.id}` ({config.encoder.loader}), block {config.encoder.block}\n{llm}"
        f"- data: {', '.join(f'`{s}`' for s in config.data.train)}\n\n"
        '```python\nimport qformer\nmodel = qformer.load("path/to/this/folder")\n```\n'
    )


@contextlib.contextmanager
def _stop_signals() -> Iterator[list[int]]:
    """Collect SIGINT and SIGTERM instead of dying; a second one dies as usual."""
    received: list[int] = []

    def note(number: int, frame: Any) -> None:
        received.append(number)
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        logger.warning("%s: finishing this step, then saving; once more to quit at once", signal.Signals(number).name)

    try:
        before = {s: signal.signal(s, note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller's own business
        before = {}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _accumulation(global_batch: int, micro: int, world: int) -> int:
    if global_batch % (micro * world):
        raise ValueError(
            f"train.global_batch_size={global_batch} must be a multiple of train.micro_batch_size={micro} "
            f"times {world} processes"
        )
    logger.info("%d records a step = %d a forward x %d processes x %d accumulated", global_batch, micro, world,
                global_batch // (micro * world))  # fmt: skip
    return global_batch // (micro * world)


def _resume_from(run_dir: Path, resume: str | None) -> Path | None:
    found = list_checkpoints(run_dir)
    if resume == "auto":
        return found[-1] if found else None
    if resume is None and found:
        raise ValueError(
            f"run.dir={run_dir} already holds a run ({found[-1].name}); go on with train.resume=auto, "
            "or choose another run.dir"
        )
    return Path(resume) if resume else None


def _sum(values: Sequence[float], device: torch.device) -> list[float]:
    return sum_over_ranks(torch.tensor(values, device=device)).tolist()


class _Window:
    """Sums of the metrics since the last line of the log; the sums are kept with a checkpoint, the clock is not."""

    def __init__(self, sums: dict[str, float]) -> None:
        self._open(sums)

    def _open(self, sums: dict[str, float]) -> None:
        self.sums, self.samples, self.waited_s, self.start = sums, 0, 0.0, time.perf_counter()

    def add(self, metrics: dict[str, float], samples: int) -> None:
        _add(self.sums, metrics)
        self.samples += samples

    def close(self) -> tuple[dict[str, float], dict[str, float]]:
        """Means, and samples per second with the share of time spent waiting for data; begins a new window."""
        seconds = time.perf_counter() - self.start
        timing = {"samples_per_s": self.samples / seconds, "data_wait": self.waited_s / seconds}
        means = _means(self.sums)
        self._open({})
        return means, timing


def _add(window: dict[str, float], metrics: dict[str, float]) -> None:
    for name, value in {**metrics, "count": 1.0}.items():
        window[name] = window.get(name, 0.0) + value


def _means(window: dict[str, float]) -> dict[str, float]:
    return {name: value / window["count"] for name, value in window.items() if name != "count"}


def _describe_non_finite(step: int, metrics: dict[str, float], norm: float, prepared: list[Prepared]) -> str:
    pictures = [i for p in prepared for i in p.batch.image_ids]
    return (
        f"step {step + 1}: not finite: {describe_losses({**metrics, 'gradient_norm': norm}, {})}; no update was made. "
        f"Records of this rank: {', '.join(pictures[:8])}{' ...' if len(pictures) > 8 else ''}. "
        "Look at these records; with fp16 try bf16, or lower optim.lr"
    )
