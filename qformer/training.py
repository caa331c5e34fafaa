"""The loop: accumulate, guard, step, log, validate, save. One visible function, the same for both stages.

Accelerate gives device, precision, process group and trackers; everything that must be exact is done here by hand: the
learning rate is a function of the step, accumulation is an explicit inner loop, and every random draw is a function of
(seed, step, rank), so that a resumed run and an uninterrupted one are the same run.
"""

import atexit
import contextlib
import datetime
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
from accelerate import Accelerator, InitProcessGroupKwargs

from qformer.checkpoint import changed_keys, load_checkpoint, require_same_parts, save_adapter, save_checkpoint
from qformer.config import Stage1Config, Stage2Config, to_yaml
from qformer.data import GlobalBatches, RecordDataset, build_order, derive_seed, training_loader
from qformer.distributed import leave_group, lost_rank, shard_blocks, shards_frozen, sum_over_ranks, take_over_sharding
from qformer.log import ChanceWatch, MetricWindow, RunLog, describe_losses, gradient_norms, memory_bytes
from qformer.models import Output, Prepared, Stage1Model, Stage2Model
from qformer.objectives import ITM_CHANCE
from qformer.optim import build_optimizer, lr_at
from qformer.run_folder import open_run, save_or_go_on
from qformer.validation import describe_validation, validate

logger = logging.getLogger(__name__)
Model = Stage1Model | Stage2Model
Config = Stage1Config | Stage2Config


SAME_SIGNAL_S = 3.0


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
        if torch.distributed.is_initialized():  # its threads must not outlive the interpreter
            atexit.register(leave_group)
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("QFORMER_TRACEBACK"):
            raise
        said = str(error)
        if "Original Traceback" in said:  # raised in a worker: its traceback is the message, the cause its last line
            said = said.rstrip().splitlines()[-1].partition(": ")[2]
        print(f"error: {said}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        reason = lost_rank(error)
        if reason is None or os.environ.get("QFORMER_TRACEBACK"):
            raise
        print(f"error: {reason}", file=sys.stderr)
        raise SystemExit(2) from None


def start_accelerator(config: Config) -> Accelerator:
    """The Accelerator of this run: device, precision, trackers; the CPU where there is no accelerator.

    Raises: ValueError when several processes were launched but each would train alone, or the precision does not fit.
    """
    cpu = config.train.cpu or not torch.accelerator.is_available()
    if cpu and config.train.mixed_precision == "fp16":
        raise ValueError("train.mixed_precision=fp16 needs a GPU; use bf16 or no on a CPU")
    take_over_sharding()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.train.mixed_precision,
        log_with=config.run.trackers or None,
        project_dir=config.run.dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=config.train.timeout_s))],
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
        or batch size that does not fit, or when more than `data.max_dropped_fraction` of the records were broken; OSError
        when the last checkpoint or the adapter could not be written.
    """
    options = config.train
    with open_run(Path(config.run.dir), options.resume, model.adapter, options.keep_checkpoints) as resume_from:
        return _train(model, train, validation, config, accelerator, resume_from)


def _train(
    model: Model, train: RecordDataset, validation: RecordDataset | None, config: Config, accelerator: Accelerator,
    resume_from: Path | None,
) -> bool:  # fmt: skip
    options, run_dir = config.train, Path(config.run.dir)
    micro, world = options.micro_batch_size, accelerator.num_processes
    accumulation = _accumulation(options.global_batch_size, micro, world)
    adapter = model.adapter
    _place(model, accelerator)
    o = config.optim
    optimizer = build_optimizer(adapter, lr=o.lr, betas=(o.betas[0], o.betas[1]), weight_decay=o.weight_decay, eps=1e-8)
    state: dict[str, Any] = {"step": 0, "samples": 0, "dropped": 0, "window": {}}
    if resume_from:
        require_same_parts(
            config, resume_from, ("encoder", "llm") if isinstance(config, Stage2Config) else ("encoder",)
        )
        state = load_checkpoint(resume_from, adapter, optimizer)
        state = {"samples": state["step"] * options.global_batch_size, "records": train.sizes, **state}
        if state["step"] > options.max_steps:
            raise ValueError(
                f"{resume_from} is past train.max_steps={options.max_steps}; raise it, or take another run.dir"
            )
        logger.info("resumed from %s at step %d of %d", resume_from, state["step"], options.max_steps)
        changed = changed_keys(config, resume_from)
        if train.sizes != state["records"]:
            changed.append(f"records of data.train: {train.sizes}, were {state['records']}")
        if changed:
            logger.warning("this is another run from here on, its config has changed: %s", "; ".join(changed))
    model.adapter, stepper = accelerator.prepare(adapter, optimizer)
    if accelerator.scaler and "scaler" in state:
        accelerator.scaler.load_state_dict(state["scaler"])
    step = first_step = last_saved = state["step"]
    order = build_order(train.sizes, options.seed, config.data.weights, config.data.shuffle_block_records)
    batches = GlobalBatches(order, world, accelerator.process_index, micro, first=state["samples"])
    loader = iter(training_loader(train, batches, config.data.workers))
    candidates = micro * world * (model.contrasted_together(micro) if isinstance(model, Stage1Model) else 1)
    chance = chance_levels(model, candidates)
    watch = ChanceWatch(chance, patience_steps=max(20, options.log_every_steps), after_step=o.warmup_steps)
    config_yaml = to_yaml(config)
    if accelerator.is_main_process:
        (run_dir / "config.yaml").write_text(config_yaml)
    if config.run.trackers:
        accelerator.init_trackers(run_dir.name)
    log = RunLog(run_dir, is_main=accelerator.is_main_process, resume_step=first_step if resume_from else None)

    def save(must: bool = False) -> None:
        nonlocal last_saved
        scaler = {"scaler": accelerator.scaler.state_dict()} if accelerator.scaler else {}
        kept = {"samples": state["samples"], "records": train.sizes, "dropped": state["dropped"]}
        kept |= {"window": window.sums, "unvalidated": unvalidated, **scaler}
        arguments = (run_dir, step, adapter, optimizer, kept, config_yaml, options.keep_checkpoints)
        start = time.perf_counter()
        if save_or_go_on(lambda: save_checkpoint(*arguments), run_dir, step, must):
            if last_saved == first_step:
                _warn_of_deadline(step_s, time.perf_counter() - start, options.stop_within_s)
            last_saved = step

    def look() -> bool:
        """Validate; False when told to stop on the way, to be done again after resuming."""
        found = validate(model, validation, config, accelerator, stop) if validation else {}
        if found:
            log.log(step, found)
            accelerator.log({k: v for k, v in found.items() if isinstance(v, float)}, step=step)
            if accelerator.is_main_process:
                logger.info("validation at step %d: %s", step, describe_validation(found))
        return found is not None

    window, stopping, too_many, step_s = MetricWindow(state["window"]), 0.0, "", 0.0
    unvalidated, dropped_before = bool(state.get("unvalidated")), state["dropped"]
    model.train()
    with log, _stop_signals() as stop, log.progress(options.max_steps, first_step, options.log_every_steps) as progress:
        if unvalidated and not (unvalidated := not look()):
            save()
        stopping = float(unvalidated)
        while step < options.max_steps and not stopping:
            torch.manual_seed(derive_seed(options.seed, step, accelerator.process_index))
            lr = _set_learning_rate(optimizer, step, config)
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
            tokens = float(sum(p.target_tokens for p in prepared))
            bad, dropped, stopping, tokens, *sums = _sum(
                [not sound, dropped, bool(stop), tokens, *metrics.values()], accelerator.device
            )
            if bad:
                raise NonFiniteLoss(_describe_non_finite(step, metrics, norm, prepared))
            step += 1
            logs = step % options.log_every_steps == 0 or step == options.max_steps
            norms = gradient_norms(adapter, norm, o.clip_norm) if logs else {}
            stepper.step()
            stepper.zero_grad()
            step_s = time.perf_counter() - start
            state["samples"] += options.global_batch_size
            state["dropped"] += int(dropped)
            read = (step - first_step) * options.global_batch_size
            too_many = _too_many_dropped(state["dropped"] - dropped_before, read, len(train), config)
            means = {name: value / world for name, value in zip(metrics, sums, strict=True)}
            window.add(means | {"gradient_norm": norm}, options.global_batch_size, tokens)
            if logs:
                means, timing = window.close()
                line = means | norms | {f"{name}_chance": value for name, value in chance.items()} | timing
                line |= {"memory_bytes": memory_bytes(accelerator.device), "lr": lr, "dropped": state["dropped"]}
                line |= {"itc_negatives": candidates - 1} if chance else {}
                log.log(step, line)
                accelerator.log(line, step=step)
                for warning in watch.update(step, means):
                    logger.warning(warning)
                losses = describe_losses({k: v for k, v in means.items() if k != "gradient_norm"}, chance)
                progress.update(step, f"{losses}, {timing['samples_per_s']:.3g} samples/s")
            else:
                progress.update(step)
            if validation and (step % options.validate_every_steps == 0 or step == options.max_steps):
                unvalidated = bool(stopping) or not look()
            stopping = stopping or unvalidated or bool(too_many)
            if step % options.checkpoint_every_steps == 0 or step == options.max_steps:
                save()
        if last_saved != step:
            save(must=True)
    model.adapter = adapter
    if config.run.trackers:
        accelerator.end_training()
    if too_many:
        raise ValueError(too_many)
    if step < options.max_steps or unvalidated:
        logger.warning("stopped at step %d of %d and saved; go on with train.resume=auto", step, options.max_steps)
        return False
    card = model_card(config, step, state["dropped"])
    save_or_go_on(lambda: save_adapter(run_dir / "adapter", adapter, config_yaml, card), run_dir, step, must=True)
    if state["dropped"] and accelerator.is_main_process:
        share = state["dropped"] / (state["dropped"] + step * options.global_batch_size)
        logger.warning("%d broken records were met and replaced by others, %.2g %%", state["dropped"], 100 * share)
    return True


def _too_many_dropped(dropped: int, read: int, records: int, config: Config) -> str:
    """Why to stop, or nothing; the first records are too few to judge by."""
    share, limit = dropped / max(1, dropped + read), config.data.max_dropped_fraction
    if read < min(records, 1000) or share <= limit:
        return ""
    return (
        f"{dropped} of {dropped + read} records met were broken ({share:.1%}), more than data.max_dropped_fraction="
        f"{limit}; 'broken record' above says which and why. Mend the data or raise it, then go on with train.resume=auto"
    )


def _warn_of_deadline(step_s: float, save_s: float, stop_within_s: float) -> None:
    if step_s + save_s > stop_within_s:
        logger.warning(
            "a step takes %.0f s and a checkpoint %.0f s: told to stop by SIGTERM, this run may need more than "
            "train.stop_within_s=%g; ask the scheduler for more time (SLURM: --signal=TERM@%d) and set it to that",
            step_s, save_s, stop_within_s, 2 * (step_s + save_s),
        )  # fmt: skip


def _place(model: Model, accelerator: Accelerator) -> None:
    """Everything to this rank's device; frozen models in shards where the launch says so, the adapter always whole."""
    llm = model.llm if isinstance(model, Stage2Model) else None
    if llm and accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16":
        llm.use_plain_attention()
    if shards_frozen():  # before they move: no device has to hold a whole one
        for frozen in [model.encoder, llm.model] if llm else [model.encoder]:
            shard_blocks(frozen, accelerator.device)
    model.to(accelerator.device)


def _set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: Config) -> float:
    o = config.optim
    lr = lr_at(
        step, peak_lr=o.lr, min_lr=o.min_lr, warmup_steps=o.warmup_steps, warmup_lr=o.warmup_lr,
        max_steps=config.train.max_steps,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr


def _forward_backward(
    model: Model, prepared: list[Prepared], accelerator: Accelerator, clip_norm: float
) -> tuple[dict[str, float], float]:
    """Gradient of the whole step: every micro-batch, synchronised once. Returns this rank's metrics and the norm."""
    tokens = torch.tensor(float(sum(p.target_tokens for p in prepared)), device=accelerator.device)
    targets_per_rank = sum_over_ranks(tokens) / (accelerator.num_processes * len(prepared))
    outputs: list[Output] = []
    if isinstance(model, Stage1Model):
        with accelerator.autocast():
            prepared = model.contrast(prepared)
    for i, micro_batch in enumerate(prepared):
        last = i == len(prepared) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model.adapter), accelerator.autocast():
            outputs.append(model(micro_batch, targets_per_rank))
        with contextlib.nullcontext() if last else accelerator.no_sync(model.adapter):
            accelerator.backward(outputs[-1].loss / len(prepared))
    norm = accelerator.clip_grad_norm_(model.adapter.parameters(), clip_norm)
    means = torch.stack([torch.stack([v.float() for v in o.metrics.values()]) for o in outputs]).mean(0).tolist()
    metrics = dict(zip(outputs[0].metrics, means, strict=True))  # all of them in one wait for the device
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
def _stop_signals() -> Iterator[list[float]]:
    """Collect when SIGINT and SIGTERM came instead of dying; Ctrl-C again, seconds later, dies as usual.

    Both come twice where a launcher passes on what its processes were sent themselves, as by SLURM or a terminal.
    """
    received: list[float] = []

    def note(number: int, frame: Any) -> None:
        received.append(time.monotonic())
        if len(received) == 1:
            logger.warning("%s: finishing this step, then saving; Ctrl-C quits at once", signal.Signals(number).name)
        elif number == signal.SIGINT and received[-1] - received[0] > SAME_SIGNAL_S:
            raise KeyboardInterrupt

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


def _sum(values: Sequence[float], device: torch.device) -> list[float]:
    return sum_over_ranks(torch.tensor(values, device=device)).tolist()


def _describe_non_finite(step: int, metrics: dict[str, float], norm: float, prepared: list[Prepared]) -> str:
    pictures = [i for p in prepared for i in p.batch.image_ids]
    return (
        f"step {step + 1}: not finite: {describe_losses({**metrics, 'gradient_norm': norm}, {})}; no update was made. "
        f"Records of this rank: {', '.join(pictures[:8])}{' ...' if len(pictures) > 8 else ''}. "
        "Look at these records; with fp16 try bf16, or lower optim.lr"
    )
