"""Where a stage meets its launcher: mistakes in one line, accelerate's start, what is printed, signals to stop."""

import atexit
import contextlib
import datetime
import logging
import os
import signal
import sys
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qformer.config import RunPart

logger = logging.getLogger(__name__)
SAME_SIGNAL_S = 3.0


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
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_initialized():
            from qformer.distributed import leave_group

            atexit.register(leave_group)  # its threads must not outlive the interpreter
    except (ValueError, FloatingPointError, OSError) as error:
        if os.environ.get("QFORMER_TRACEBACK"):
            raise
        said = str(error)
        if "Original Traceback" in said:  # raised in a worker: its traceback is the message, the cause its last line
            said = said.rstrip().splitlines()[-1].partition(": ")[2]
        print(f"error: {said}", file=sys.stderr)
        raise SystemExit(2) from None
    except RuntimeError as error:
        from qformer.distributed import lost_rank

        reason = lost_rank(error)
        if reason is None or os.environ.get("QFORMER_TRACEBACK"):
            raise
        print(f"error: {reason}", file=sys.stderr)
        raise SystemExit(2) from None


def start_accelerator(config: "RunPart") -> "Accelerator":
    """The Accelerator of this run: device, precision, trackers; the CPU where there is no accelerator.

    Raises: ValueError when several processes were launched but each would train alone, the precision does not fit, or a
        tracker is not installed.
    """
    import torch  # here and not above: scoring a file of answers needs neither
    from accelerate import Accelerator, InitProcessGroupKwargs
    from accelerate.tracking import get_available_trackers

    from qformer.sharding import take_over_sharding

    cpu = config.train.cpu or not torch.accelerator.is_available()
    if cpu and config.train.mixed_precision == "fp16":
        raise ValueError("train.mixed_precision=fp16 needs a GPU; use bf16 or no on a CPU")
    found = {str(tracker.value) for tracker in get_available_trackers()}
    if missing := set(config.run.trackers) - found:
        raise ValueError(
            f"run.trackers: {', '.join(sorted(missing))} cannot be imported here; install it, or choose among "
            f"{', '.join(sorted(found)) or 'none'}"
        )
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


@contextlib.contextmanager
def stop_signals() -> Iterator[list[float]]:
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
