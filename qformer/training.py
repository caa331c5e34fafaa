"""The loop: accumulate, guard, step, log, validate, save. One visible function, the same for both stages.

Accelerate gives device, precision, process group and trackers; everything that must be exact is done here by hand: the
learning rate is a function of the step, accumulation is an explicit inner loop, and every random draw is a function of
(seed, step, rank), so that a resumed run and an uninterrupted one are the same run.
"""

import contextlib
import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from qformer.checkpoint import changed_keys, load_checkpoint, require_same_parts, save_adapter, save_checkpoint
from qformer.config import Stage1Config, Stage2Config, to_yaml
from qformer.data import GlobalBatches, RecordDataset, build_order, derive_seed, training_loader
from qformer.distributed import shard_blocks, shards_frozen, sum_over_ranks
from qformer.launch import stop_signals
from qformer.log import ChanceWatch, MetricWindow, RunLog, describe_losses, gradient_norms, memory_bytes
from qformer.models import Output, Prepared, Stage1Model, Stage2Model
from qformer.objectives import ITM_CHANCE
from qformer.optim import build_optimizer, lr_at
from qformer.run_folder import open_run, save_or_go_on
from qformer.validation import describe_validation, validate

logger = logging.getLogger(__name__)
Model = Stage1Model | Stage2Model
Config = Stage1Config | Stage2Config


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient that is not a number; the update was not made."""


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
    options, o, run_dir = config.train, config.optim, Path(config.run.dir)
    micro, world = options.micro_batch_size, accelerator.num_processes
    accumulation = _accumulation(options.global_batch_size, micro, world)
    adapter = model.adapter
    _place(model, accelerator)
    optimizer = build_optimizer(adapter, lr=o.lr, betas=(o.betas[0], o.betas[1]), weight_decay=o.weight_decay, eps=1e-8)
    state = _restore(resume_from, adapter, optimizer, train, config)
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
    with log, stop_signals() as stop, log.progress(options.max_steps, first_step, options.log_every_steps) as progress:
        if unvalidated and not (unvalidated := not look()):
            save()
        stopping = float(unvalidated)
        while step < options.max_steps and not stopping:
            torch.manual_seed(derive_seed(options.seed, step, accelerator.process_index))
            lr = _set_learning_rate(optimizer, step, config)
            start = time.perf_counter()
            given = (next(loader).to(accelerator.device, non_blocking=True) for _ in range(accumulation))
            prepared = [
                model.prepare(batch, derive_seed(options.seed, step, "noise", i)) for i, batch in enumerate(given)
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
    _leave_adapter(run_dir, adapter, config, step, state["dropped"], accelerator.is_main_process)
    return True


def _restore(
    resume_from: Path | None, adapter: torch.nn.Module, optimizer: torch.optim.Optimizer, train: RecordDataset,
    config: Config,
) -> dict[str, Any]:  # fmt: skip
    """What the loop goes on from; a config that has changed since is told."""
    if resume_from is None:
        return {"step": 0, "samples": 0, "dropped": 0, "window": {}}
    parts = ("encoder", "llm") if isinstance(config, Stage2Config) else ("encoder",)
    require_same_parts(config, resume_from, parts)
    state = load_checkpoint(resume_from, adapter, optimizer)
    state = {"samples": state["step"] * config.train.global_batch_size, "records": train.sizes, **state}
    step, max_steps = state["step"], config.train.max_steps
    if step > max_steps:
        raise ValueError(f"{resume_from} is past train.max_steps={max_steps}; raise it, or take another run.dir")
    logger.info("resumed from %s at step %d of %d", resume_from, step, max_steps)
    changed = changed_keys(config, resume_from)
    if train.sizes != state["records"]:
        changed.append(f"records of data.train: {train.sizes}, were {state['records']}")
    if changed:
        logger.warning("this is another run from here on, its config has changed: %s", "; ".join(changed))
    return state


def _leave_adapter(
    run_dir: Path, adapter: torch.nn.Module, config: Config, step: int, dropped: int, is_main: bool
) -> None:
    card = model_card(config, step, dropped)
    save_or_go_on(lambda: save_adapter(run_dir / "adapter", adapter, to_yaml(config), card), run_dir, step, must=True)
    if dropped and is_main:
        share = dropped / (dropped + step * config.train.global_batch_size)
        logger.warning("%d broken records were met and replaced by others, %.2g %%", dropped, 100 * share)


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
    if llm:
        llm.use_training_kernels(accelerator.device, accelerator.mixed_precision)
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
