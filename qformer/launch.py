"""Where a stage meets its launcher: mistakes in one line, accelerate's start, what is printed, signals to stop."""

import atexit
import contextlib
import ctypes
import datetime
import logging
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

from qformer.messages import one_line, print_error

if TYPE_CHECKING:
    from accelerate import Accelerator

    from qformer.config import RunPart

logger = logging.getLogger(__name__)
SAME_SIGNAL_S = 3.0
PR_SET_PDEATHSIG = 1  # of linux/prctl.h
LAUNCHERS = {
    "accelerate", "accelerate-launch", "accelerate.commands.launch", "torchrun", "torch.distributed.run",
    "torch.distributed.launch", "qformer.launcher",
}  # fmt: skip


class _Lines(logging.Handler):
    """One line a message on standard output, as long as it is, for files and pipes."""

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):  # whoever read the pipe has gone: no reason to end the run
            print(self.format(record), flush=True)


def configure_logging(is_main_process: bool) -> None:
    """What a stage prints: our own messages on the main process, only warnings of the others and of libraries.

    A terminal gets colours and lines of its width; a file or a pipe gets one line for each message.
    """
    import rich
    from rich.logging import RichHandler

    if rich.get_console().is_terminal:
        handler: logging.Handler = RichHandler(show_path=False, markup=False)
        line = "%(message)s"
    else:
        handler, line = _Lines(), "%(asctime)s %(levelname)-8s %(message)s"
    logging.basicConfig(format=line, datefmt="%H:%M:%S", handlers=[handler], level=logging.WARNING, force=True)
    logging.getLogger("qformer").setLevel(logging.INFO if is_main_process else logging.WARNING)


@contextlib.contextmanager
def reported_errors() -> Iterator[None]:
    """A mistake that a user can fix ends a stage with one line on standard error and exit code 2.

    So does what is nobody's mistake: a lost rank, a killed data worker. With QFORMER_TRACEBACK=1 in the environment it
    ends with the whole traceback.
    """
    try:
        yield
        torch = sys.modules.get("torch")
        if torch is not None and torch.distributed.is_initialized():
            from qformer.distributed import leave_group

            atexit.register(leave_group)  # its threads must not outlive the interpreter
    except (ValueError, FloatingPointError, OSError, EOFError, RuntimeError) as error:
        reason = _reason(error)
        if reason is None or os.environ.get("QFORMER_TRACEBACK"):
            raise
        print_error(f"error: {reason}")
        raise SystemExit(2) from None


def _reason(error: Exception) -> str | None:
    """The line to end with; None for what is a mistake of ours."""
    message = str(error)
    # a killed worker is noticed by its signal, or halfway through a tensor that it was handing over
    handed_over = any("resource_sharer" in frame.filename for frame in traceback.extract_tb(error.__traceback__))
    if handed_over or re.match(r"DataLoader worker \(pid.*(killed by signal|exited unexpectedly)", message):
        return (
            f"{one_line(error).rstrip('. ')}: a process that reads data died, often killed where memory is short; lower "
            "data.workers or make room (docker: --shm-size), then run the command again, with train.resume=auto if it trains"
        )
    if isinstance(error, RuntimeError):
        from qformer.distributed import lost_rank

        return lost_rank(error)
    if isinstance(error, EOFError):
        return None
    if "Original Traceback" in message:  # raised in a worker: its traceback is the message, the cause its last line
        return message.rstrip().splitlines()[-1].partition(": ")[2]
    return message


def require_images(paths: Sequence[str]) -> None:
    """Say that an image is missing before a model is loaded to look at it.

    Raises: ValueError when one of the paths is no file.
    """
    if missing := [path for path in paths if not Path(path).is_file()]:
        raise ValueError(f"no image {missing[0]}")


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
    available = {str(tracker.value) for tracker in get_available_trackers()}
    if missing := set(config.run.trackers) - available:
        raise ValueError(
            f"run.trackers: {', '.join(sorted(missing))} cannot be imported here; pip install "
            f"'qformer[{','.join(sorted(missing))}]', or choose among {', '.join(sorted(available)) or 'none'}"
        )
    die_with_launcher()
    take_over_sharding()
    accelerator = Accelerator(
        cpu=cpu,
        mixed_precision=config.train.mixed_precision,
        log_with=config.run.trackers or None,
        project_dir=config.run.dir,
        kwargs_handlers=[InitProcessGroupKwargs(timeout=datetime.timedelta(seconds=config.train.timeout_s))],
    )
    require_all_ranks(accelerator.num_processes, "train a lone copy", "train.cpu=true")
    return accelerator


def require_all_ranks(visible: int, alone: str, on_cpus: str) -> None:
    """Refuse to run where several processes were launched but cannot see each other.

    Args:
        visible: processes that this one sees.
        alone: what each would do then.
        on_cpus: what the command needs where there is no GPU.

    Raises: ValueError when more were launched than are visible.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    if launched != visible:
        raise ValueError(
            f"{launched} processes were launched but this one sees {visible}: each would {alone}. On CPUs launch with: "
            f"python -m qformer.launcher --multi_gpu --num_processes 2 ... {on_cpus}"
        )


class StopRequest:
    """True once this run is to stop: it got SIGINT or SIGTERM, its launcher has gone, or its folder has vanished.

    Args:
        run_dir: the run's folder; None where there is none to watch.
    """

    def __init__(self, run_dir: Path | None = None):
        self.received: list[float] = []  # when signals came, by time.monotonic()
        self._parent, self._orphaned = os.getppid() if launched() else None, False
        self._run_dir = run_dir if run_dir and run_dir.is_dir() else None  # may be on the first rank's disk alone

    def note(self, number: int, frame: Any) -> None:
        """Handle a signal; Ctrl-C again, seconds after the first, raises KeyboardInterrupt."""
        self.received.append(time.monotonic())
        if len(self.received) == 1:
            logger.warning("%s: finishing this step, then saving; Ctrl-C quits at once", signal.Signals(number).name)
        elif number == signal.SIGINT and self.received[-1] - self.received[0] > SAME_SIGNAL_S:
            raise KeyboardInterrupt

    def __bool__(self) -> bool:
        if self._parent not in (None, os.getppid()) and not self._orphaned:
            self._orphaned = True
            logger.warning("the launcher, process %d, has gone: finishing this step, then saving", self._parent)
        vanished = self._run_dir is not None and not self._run_dir.is_dir()
        return bool(self.received) or self._orphaned or vanished


@contextlib.contextmanager
def stop_signals(run_dir: Path | None = None) -> Iterator[StopRequest]:
    """Collect what asks this run to stop instead of dying of it; Ctrl-C again, seconds later, dies as usual.

    Signals come twice where a launcher passes on what its processes were sent themselves, as by SLURM or a terminal.
    """
    stop = StopRequest(run_dir)
    try:
        before = {s: signal.signal(s, stop.note) for s in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread: the caller's own business
        before = {}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def launched() -> bool:
    """Whether this process's parent is a launcher (`qformer.launcher`, accelerate or torchrun), not a shell or notebook."""
    try:
        words = psutil.Process(os.getppid()).cmdline()[:4]
    except psutil.Error:
        return False
    return bool(LAUNCHERS & {word.removeprefix("-m") for word in words} | LAUNCHERS & {Path(w).name for w in words})


def die_with_launcher() -> None:
    """Have Linux send this process SIGTERM when its launcher ends: with one process accelerate passes no signal on."""
    if launched() and sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
