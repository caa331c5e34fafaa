"""The loop: accumulate, guard, step, log, validate, save. One visible function, the same for both stages.

Accelerate gives device, precision, process group and trackers; everything that must be exact is done here by hand: the
learning rate is a function of the step, accumulation is an explicit inner loop, and every random draw is a function of
(seed, step, rank), so that a resumed run and an uninterrupted one are the same run.
"""

import contextlib
import dataclasses
import logging
import math
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from qformer.card import model_card
from qformer.checkpoint import changed_keys, load_checkpoint, require_same_parts, save_adapter, save_checkpoint
from qformer.config import Stage1Config, Stage2Config, only_model, to_yaml
from qformer.data import GlobalBatches, RecordDataset, build_order, derive_seed, shares, training_loader
from qformer.data.records import distinct_captions
from qformer.distributed import sum_over_ranks
from qformer.launch import stop_signals
from qformer.log import (
    ChanceWatch,
    CollapseWatch,
    MetricWindow,
    RunLog,
    WarningFile,
    describe_losses,
    gradient_norms,
    memory_bytes,
)  # fmt: skip
from qformer.models import Output, Prepared, Stage
from qformer.optim import build_optimizer, lr_at
from qformer.run_folder import on_first_rank, open_run, save_or_go_on, warn_of_deadline
from qformer.sharding import shard_blocks, shards_frozen
from qformer.tuning import encoder_lr_scales
from qformer.validation import describe_validation, validate

logger = logging.getLogger(__name__)
Config = Stage1Config | Stage2Config  # of a run: any stage's


class NonFiniteLoss(FloatingPointError):
    """A loss or gradient that is not a number; the update was not made."""


@dataclasses.dataclass
class Progress:
    """How far a run has come: what a checkpoint keeps beside tensors."""

    step: int = 0
    samples: int = 0  # of the endless stream of records, over all ranks
    dropped: int = 0  # broken records met, over all ranks
    unvalidated: bool = False  # whether the validation due at `step` is still to be made
    window: dict[str, float] = dataclasses.field(default_factory=dict)  # sums of the metrics since the last line


class Agreed(NamedTuple):
    """What all ranks know of a step after one small message."""

    bad: bool  # a loss or gradient of some rank is not finite
    stopping: bool  # some rank was told to stop
    dropped: int  # broken records met
    tokens: float  # target tokens
    metrics: dict[str, float]  # means over ranks


def fit(
    model: Stage, train: RecordDataset, validation: RecordDataset | None, *, config: Config, accelerator: Accelerator
) -> bool:  # fmt: skip
    """Train `model.adapter` to `train.max_steps` and leave config, metrics, checkpoints and adapter in `run.dir`.

    Returns: True when finished, False when Ctrl-C or SIGTERM stopped it after saving a checkpoint.
    Raises: NonFiniteLoss before the update that a non-finite loss or gradient would spoil; ValueError for a run folder
        or batch size that does not fit, or when more than `data.max_dropped_fraction` of the records were broken; OSError
        when the last checkpoint or the adapter could not be written.
    """
    options, run_dir, is_main = config.train, Path(config.run.dir), accelerator.is_main_process
    with (
        open_run(run_dir, options.resume, model.adapter, options.keep_checkpoints) as resume_from,
        WarningFile(run_dir, is_main=is_main, resumes=resume_from is not None) as warnings,
    ):
        run = _Run(model, train, validation, config=config, accelerator=accelerator, resume_from=resume_from)
        warnings.step = lambda: run.progress.step
        return run.loop()


class _Run:
    """One call of `fit`: what its loop goes on with from step to step."""

    def __init__(
        self, model: Stage, train: RecordDataset, validation: RecordDataset | None, *, config: Config,
        accelerator: Accelerator, resume_from: Path | None,
    ) -> None:  # fmt: skip
        self.model, self.train, self.validation = model, train, validation
        self.config, self.accelerator = config, accelerator
        self.run_dir, self.config_yaml = Path(config.run.dir), to_yaml(config)
        options, o = config.train, config.optim
        for dataset in (train, validation) if validation else (train,):
            model.require_data(dataset)
        self.accumulation = _accumulation(
            options.global_batch_size, options.micro_batch_size, accelerator.num_processes
        )
        model.use_training_kernels(accelerator.device, accelerator.mixed_precision)
        if shards_frozen():  # before they move: no device has to hold a whole one
            for frozen in model.frozen().values():
                shard_blocks(frozen, accelerator.device)
        model.to(accelerator.device)
        self.adapter = model.adapter
        self.optimizer = build_optimizer(
            self.adapter, lr=o.lr, betas=(o.betas[0], o.betas[1]), weight_decay=o.weight_decay, eps=1e-8,
            lr_scales=encoder_lr_scales(model, o.encoder_layer_decay),
        )  # fmt: skip
        if accelerator.is_main_process and resume_from is None:
            _describe_data(train, options.global_batch_size, self.shares())
        self.progress, scaler_state = _restore(resume_from, self.adapter, self.optimizer, train=train, config=config)
        self.first, self.saved_step = dataclasses.replace(self.progress), self.progress.step
        self.wrapped, self.stepper = accelerator.prepare(self.adapter, self.optimizer)
        if accelerator.scaler and scaler_state:
            accelerator.scaler.load_state_dict(scaler_state)
        self.window, self.step_s = MetricWindow(self.progress.window), 0.0
        self.chance = model.chance_levels(options.micro_batch_size)
        self.watch = ChanceWatch(
            self.chance, patience_steps=max(20, options.log_every_steps), after_step=o.warmup_steps
        )
        self.collapse = CollapseWatch(config.qformer.queries, after_step=o.warmup_steps)
        if accelerator.is_main_process:
            (self.run_dir / "config.yaml").write_text(self.config_yaml)
        if config.run.trackers:
            accelerator.init_trackers(self.run_dir.name)
        self.log = RunLog(
            self.run_dir, is_main=accelerator.is_main_process, resume_step=self.first.step if resume_from else None
        )
        if self.progress.unvalidated:  # saved, then validated, then lost
            self.progress.unvalidated = not on_first_rank(lambda: self.log.has_validation(self.first.step))

    def loop(self) -> bool:
        """Steps until the last one, or until told to stop; see `fit`."""
        options, progress = self.config.train, self.progress
        order = build_order(self.train.sizes, options.seed, self.shares(), self.config.data.shuffle_block_records)
        world, rank = self.accelerator.num_processes, self.accelerator.process_index
        batches = GlobalBatches(order, world, rank, options.micro_batch_size, first=progress.samples)
        loader = iter(training_loader(self.train, batches, self.config.data.workers))
        self.model.train()
        too_many = ""
        with (
            self.log,
            stop_signals(self.run_dir) as stop,
            self.log.progress(options.max_steps, progress.step, options.log_every_steps) as bar,
        ):
            stopping = progress.unvalidated and not self.validate_now(stop)
            while progress.step < options.max_steps and not stopping:
                torch.manual_seed(derive_seed(options.seed, progress.step, rank))
                lr = _set_learning_rate(self.optimizer, progress.step, self.config)
                start = time.perf_counter()
                prepared = self.read(loader)
                self.window.waited_s += time.perf_counter() - start
                metrics, norm = _forward_backward(
                    self.model,
                    self.wrapped,
                    prepared,
                    accelerator=self.accelerator,
                    clip_norm=self.config.optim.clip_norm,
                )
                agreed = _agree(metrics, norm, prepared, stopping=bool(stop), accelerator=self.accelerator)
                if agreed.bad:
                    raise NonFiniteLoss(_describe_non_finite(progress.step, metrics, norm, prepared))
                progress.step += 1
                last = progress.step == options.max_steps
                logs = last or progress.step % options.log_every_steps == 0
                norms = gradient_norms(self.adapter, norm, self.config.optim.clip_norm) if logs else {}
                self.stepper.step()
                self.stepper.zero_grad()
                self.step_s = time.perf_counter() - start
                progress.samples += options.global_batch_size
                progress.dropped += agreed.dropped
                too_many = self.too_many_dropped()
                self.window.add(agreed.metrics | {"gradient_norm": norm}, options.global_batch_size, agreed.tokens)
                bar.update(progress.step, self.report(norms, lr) if logs else None)
                validates = self.validation is not None and (last or progress.step % options.validate_every_steps == 0)
                progress.unvalidated = validates
                if last or progress.step % options.checkpoint_every_steps == 0:
                    self.save()  # first, so that a validation that fails loses nothing
                stopping = agreed.stopping or bool(too_many)
                if validates and not agreed.stopping:
                    stopping = not self.validate_now(stop) or stopping
            if self.saved_step != progress.step:
                self.save(must=True)
        if self.config.run.trackers:
            self.accelerator.end_training()
        if too_many:
            raise ValueError(too_many)
        if progress.step < options.max_steps or progress.unvalidated:
            logger.warning(
                "stopped at step %d of %d and saved; go on with train.resume=auto", progress.step, options.max_steps
            )
            return False
        self.leave_adapter()
        return True

    def shares(self) -> list[float]:
        """How often each source is drawn; empty = every record once an epoch."""
        data = self.config.data
        return shares(self.train.sizes, [source.weight for source in data.sources] or data.weights, data.size_exponent)

    def read(self, loader: Any) -> list[Prepared]:
        """This rank's micro-batches of one step."""
        seed, step, device = self.config.train.seed, self.progress.step, self.accelerator.device
        batches = (next(loader).to(device, non_blocking=True) for _ in range(self.accumulation))
        return [self.model.prepare(batch, derive_seed(seed, step, "noise", i)) for i, batch in enumerate(batches)]

    def report(self, norms: dict[str, float], lr: float) -> str:
        """Write a line of the log, warn of losses that sit at chance, and return the line's losses in short."""
        step = self.progress.step
        means, timing = self.window.close()
        line = means | norms | {f"{name}_chance": value for name, value in self.chance.items()} | timing
        line |= {"memory_bytes": memory_bytes(self.accelerator.device), "lr": lr, "dropped": self.progress.dropped}
        line |= self.model.logged_constants(self.config.train.micro_batch_size)
        self.log.log(step, line)
        self.accelerator.log(line, step=step)
        for warning in (*self.watch.update(step, means), *self.collapse.update(step, means)):
            logger.warning(warning)
        losses = describe_losses({k: v for k, v in means.items() if k != "gradient_norm"}, self.chance)
        return f"{losses}, {timing['samples_per_s']:.3g} samples/s"

    def validate_now(self, stop: Any) -> bool:
        """Validate; False when told to stop on the way, to be done again after resuming."""
        assert self.validation is not None
        options, step = self.config.train, self.progress.step
        results = validate(
            self.model, self.validation, self.accelerator, micro_batch_size=options.micro_batch_size,
            max_records=options.validation_records, stop=stop,
        )  # fmt: skip
        self.progress.unvalidated = results is None
        if results is None:
            return False
        self.log.log(step, results)
        for warning in self.collapse.update(step, results):
            logger.warning(warning)
        self.accelerator.log({k: v for k, v in results.items() if isinstance(v, float)}, step=step)
        if self.accelerator.is_main_process:
            logger.info("validation at step %d: %s", step, describe_validation(results))
        return True

    def save(self, must: bool = False) -> None:
        """Write a checkpoint; one that fails is a warning, but where it `must` be."""
        options, scaler = self.config.train, self.accelerator.scaler
        state = dataclasses.asdict(dataclasses.replace(self.progress, window=self.window.sums))
        state |= {"records": self.train.sizes, **({"scaler": scaler.state_dict()} if scaler else {})}
        step, start = state.pop("step"), time.perf_counter()

        def write() -> object:
            return save_checkpoint(
                self.run_dir, step, self.adapter, self.optimizer,
                state=state, config=self.config_yaml, keep=options.keep_checkpoints,
            )  # fmt: skip

        if save_or_go_on(write, self.run_dir, step, must):
            if self.saved_step == self.first.step:
                warn_of_deadline(self.step_s, time.perf_counter() - start, options.stop_within_s)
            self.saved_step = step

    def leave_adapter(self) -> None:
        """Write what `qformer.load` reads."""
        step, dropped = self.progress.step, self.progress.dropped
        card = model_card(self.config, step, dropped)

        def write() -> None:
            save_adapter(self.run_dir / "adapter", self.adapter, to_yaml(only_model(self.config)), card)

        save_or_go_on(write, self.run_dir, step, must=True)
        if dropped and self.accelerator.is_main_process:
            share = dropped / (dropped + step * self.config.train.global_batch_size)
            logger.warning("%d broken records were met and replaced by others, %.2g %%", dropped, 100 * share)

    def too_many_dropped(self) -> str:
        """Why to stop, or nothing; the first records are too few to judge by."""
        read, limit = self.progress.samples - self.first.samples, self.config.data.max_dropped_fraction
        dropped = self.progress.dropped - self.first.dropped
        share = dropped / max(1, dropped + read)
        if read < min(len(self.train), 1000) or share <= limit:
            return ""
        return (
            f"{dropped} of {dropped + read} records met were broken ({share:.1%}), more than data.max_dropped_fraction="
            f"{limit}; 'broken record' above says which and why. Fix the data or raise it, then go on with "
            "train.resume=auto"
        )


def _restore(
    resume_from: Path | None, adapter: torch.nn.Module, optimizer: torch.optim.Optimizer, *, train: RecordDataset,
    config: Config,
) -> tuple[Progress, dict[str, Any] | None]:  # fmt: skip
    """What the loop goes on from, and the gradient scaler's state; a config that has changed since is reported."""
    if resume_from is None:
        return Progress(), None
    require_same_parts(config, resume_from, config.frozen())
    state = load_checkpoint(resume_from, adapter, optimizer)
    known = {f.name: state[f.name] for f in dataclasses.fields(Progress) if f.name in state}
    progress = Progress(**{"samples": state["step"] * config.train.global_batch_size, **known})
    max_steps = config.train.max_steps
    if progress.step > max_steps:
        raise ValueError(f"{resume_from} is past train.max_steps={max_steps}; raise it, or take another run.dir")
    logger.info("resumed from %s at step %d of %d", resume_from, progress.step, max_steps)
    changed = changed_keys(config, resume_from)
    if train.sizes != state.get("records", train.sizes):
        changed.append(f"records of data.train: {train.sizes}, were {state['records']}")
    if changed:
        logger.warning("this is another run from here on, its config has changed: %s", "; ".join(changed))
    return progress, state.get("scaler")


def _set_learning_rate(optimizer: torch.optim.Optimizer, step: int, config: Config) -> float:
    o = config.optim
    lr = lr_at(
        step, peak_lr=o.lr, min_lr=o.min_lr, warmup_steps=o.warmup_steps, warmup_lr=o.warmup_lr,
        max_steps=config.train.max_steps,
    )  # fmt: skip
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_scale", 1.0)
    return lr


def _forward_backward(
    model: Stage, wrapped: torch.nn.Module, prepared: list[Prepared], *, accelerator: Accelerator, clip_norm: float
) -> tuple[dict[str, float], float]:
    """Gradient of the whole step: every micro-batch, synchronised once. Returns this rank's metrics and the norm.

    Args:
        wrapped: the adapter as Accelerate prepared it, which synchronises its gradient.
    """
    tokens = torch.tensor(float(sum(p.target_tokens for p in prepared)), device=accelerator.device)
    targets_per_rank = sum_over_ranks(tokens) / (accelerator.num_processes * len(prepared))
    outputs: list[Output] = []
    with accelerator.autocast():
        prepared = model.prepare_step(prepared)
    for i, micro_batch in enumerate(prepared):
        last = i == len(prepared) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(wrapped):
            with accelerator.autocast():
                outputs.append(model(micro_batch, targets_per_rank, wrapped))
            accelerator.backward(outputs[-1].loss / len(prepared))
    norm = accelerator.clip_grad_norm_(wrapped.parameters(), clip_norm)
    means = torch.stack([torch.stack([v.float() for v in o.metrics.values()]) for o in outputs]).mean(0).tolist()
    metrics = dict(zip(outputs[0].metrics, means, strict=True))  # all of them in one wait for the device
    return metrics, float(norm) if norm is not None else math.nan


def _agree(
    metrics: dict[str, float], norm: float, prepared: list[Prepared], *, stopping: bool, accelerator: Accelerator
) -> Agreed:
    """One small message a step, so that all ranks agree: is it sound, what was dropped, was one told to stop."""
    sound = all(map(math.isfinite, metrics.values())) and (math.isfinite(norm) or accelerator.scaler is not None)
    dropped, tokens = sum(len(p.batch.dropped) for p in prepared), sum(p.target_tokens for p in prepared)
    mine = torch.tensor([not sound, stopping, dropped, tokens, *metrics.values()], device=accelerator.device)
    bad, stops, all_dropped, all_tokens, *sums = sum_over_ranks(mine).tolist()
    means = {name: value / accelerator.num_processes for name, value in zip(metrics, sums, strict=True)}
    return Agreed(bool(bad), bool(stops), int(all_dropped), all_tokens, means)


def _accumulation(global_batch: int, micro: int, world: int) -> int:
    if global_batch % (micro * world):
        raise ValueError(
            f"train.global_batch_size={global_batch} must be a multiple of train.micro_batch_size={micro} "
            f"times {world} processes"
        )
    logger.info("%d records a step = %d a forward x %d processes x %d accumulated", global_batch, micro, world,
                global_batch // (micro * world))  # fmt: skip
    return global_batch // (micro * world)


def _describe_data(train: RecordDataset, global_batch: int, weights: list[float]) -> None:
    """Log the shares of the sources and how many captions differ; warn of what contrast and matching learn little from."""
    records = train.records
    logger.info("%d records; %d of %d captions looked up are distinct", len(records), *distinct_captions(records))
    if weights:
        drawn = (f"{weight / sum(weights):.1%} of {n} records" for weight, n in zip(weights, train.sizes, strict=True))
        logger.info("drawn by weight, source by source: %s", ", ".join(drawn))
    if len(records) < global_batch:
        logger.warning(
            "data.train has %d records, fewer than train.global_batch_size=%d: a step meets some of them more than once, "
            "and rows of one image are no negatives of each other; lower it, or add records", len(records), global_batch,
        )  # fmt: skip


def _describe_non_finite(step: int, metrics: dict[str, float], norm: float, prepared: list[Prepared]) -> str:
    pictures = [i for p in prepared for i in p.batch.image_ids]
    return (
        f"step {step + 1}: not finite: {describe_losses({**metrics, 'gradient_norm': norm}, {})}; no update was made. "
        f"Records of this rank: {', '.join(pictures[:8])}{' ...' if len(pictures) > 8 else ''}. "
        "Look at these records; with fp16 try bf16, or lower optim.lr"
    )
