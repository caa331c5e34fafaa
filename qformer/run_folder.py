"""The folder of a run: who may write to it, what in it to resume from, and what becomes of a save that fails."""

import contextlib
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from torch import nn

from qformer.checkpoint import find_corruption, list_checkpoints, require_disk_space
from qformer.distributed import gather_objects, rank, world_size
from qformer.files import lock, remove_partial

logger = logging.getLogger(__name__)
T = TypeVar("T")

LOCK = ".lock"


def on_first_rank(act: Callable[[], T]) -> T:
    """What `act` returns on the first rank, where alone it runs; its ValueError or OSError is raised on every rank."""
    if world_size() == 1:
        return act()
    result, error = None, None
    if rank() == 0:
        try:
            result = act()
        except (ValueError, OSError) as caught:
            error = caught
    # without a word of it the others would wait for the first rank until the process group times out
    result, message, of_disk = gather_objects((result, error and str(error), isinstance(error, OSError)))[0]
    if error is not None:
        raise error
    if message is not None:
        raise OSError(message) if of_disk else ValueError(message)
    return result


@contextlib.contextmanager
def open_run(run_dir: Path, resume: str | None, adapter: nn.Module, keep: int) -> Iterator[Path | None]:
    """Make the folder of a run, hold it against a second run, and yield the checkpoint to resume from.

    Args:
        resume: `train.resume`; "auto" passes over damaged checkpoints.
        adapter: what `keep` checkpoints will hold.

    Raises: ValueError, on all ranks, when the folder cannot be written, is in use, too small, or holds another run; when
        the checkpoint named is damaged, or none is whole.
    """
    with contextlib.ExitStack() as locks:

        def begin() -> Path | None:
            locks.enter_context(exclusive_lock(run_dir))
            for folder in (run_dir, run_dir / "checkpoints"):  # what a killed run had begun; the lock is held
                remove_partial(folder)
            checkpoint = resume_from(run_dir, resume)
            require_disk_space(run_dir, adapter, keep)
            return checkpoint

        yield on_first_rank(begin)


def save_or_go_on(save: Callable[[], object], run_dir: Path, step: int, must: bool) -> bool:
    """Save on the first rank; a full or broken disk is a warning and training goes on. Returns: whether it was saved.

    Raises: OSError instead, on all ranks, when this save `must` be, the last of a run, or when the folder has vanished.
    """
    if not on_first_rank(run_dir.is_dir):
        raise OSError(
            f"run.dir={run_dir} has vanished, removed or moved while the run was going on; step {step} is not saved. "
            "Move it back and go on with train.resume=auto, or begin anew"
        )
    try:
        on_first_rank(save)
        return True
    except OSError as error:
        saved = list_checkpoints(run_dir)
        what = f"step {step} cannot be saved in run.dir={run_dir} ({error}); " + (
            f"the newest checkpoint is {saved[-1].name}" if saved else "there is no checkpoint yet"
        )
        if must:
            raise OSError(f"{what}. Make room or repair the disk, then go on with train.resume=auto") from error
        if rank() == 0:
            logger.warning("%s. Training goes on; the next checkpoint is tried as usual", what)
        return False


def warn_of_deadline(step_s: float, save_s: float, stop_within_s: float) -> None:
    """Say so when a step and a checkpoint, seconds each, take longer than the scheduler leaves after SIGTERM."""
    if step_s + save_s > stop_within_s:
        logger.warning(
            "a step takes %.0f s and a checkpoint %.0f s: told to stop by SIGTERM, this run may need more than "
            "train.stop_within_s=%g; ask the scheduler for more time (SLURM: --signal=TERM@%d) and set it to that",
            step_s, save_s, stop_within_s, 2 * (step_s + save_s),
        )  # fmt: skip


@contextlib.contextmanager
def exclusive_lock(run_dir: Path) -> Iterator[None]:
    """Lock the folder for as long as this process lives; a killed run leaves no lock."""
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        file = (run_dir / LOCK).open("a+")
    except OSError as error:
        raise ValueError(
            f"run.dir={run_dir} cannot be written ({error.strerror}); choose another, or make it writable for "
            f"user {os.getuid()}"
        ) from None
    with file:
        if owner := lock(file, f"run.dir={run_dir}"):
            raise ValueError(f"run.dir={run_dir} is in use by {owner}; wait for it, stop it, or choose another run.dir")
        yield


def resume_from(run_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint that `train.resume` means, None for a fresh start; "auto" passes over damaged ones with a warning.

    Raises: ValueError when the run folder holds a run that is not to be resumed, or no checkpoint is whole.
    """
    checkpoints = list_checkpoints(run_dir)
    if resume is None and checkpoints:
        raise ValueError(
            f"run.dir={run_dir} already holds a run ({checkpoints[-1].name}); go on with train.resume=auto, "
            "or choose another run.dir"
        )
    if resume is None:
        return None
    if resume != "auto":
        if corruption := find_corruption(Path(resume)):
            raise ValueError(f"{corruption}; resume from another checkpoint")
        return Path(resume)
    for folder in reversed(checkpoints):
        corruption = find_corruption(folder)
        if corruption is None:
            return folder
        logger.warning("%s; going back to the checkpoint before it", corruption)
    if checkpoints:
        raise ValueError(f"no checkpoint in run.dir={run_dir} is whole; begin anew in another run.dir")
    return None
