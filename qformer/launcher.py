"""`accelerate launch`, made quiet: what a stage prints last is the last line, its exit code the launcher's.

    python -m qformer.launcher [options of accelerate launch] stages/stage1.py CONFIG.yaml ... key=value ...

Takes the same options and config files. A mistake is the stage's one line, without the launcher's traceback behind it; a
process that was killed is one line that names it; SIGTERM and Ctrl-C are passed on to the stage, which is given the time
that it needs to save.
"""

import logging
import signal
import subprocess
import sys
from typing import Any

import psutil
from accelerate.commands.launch import launch_command, launch_command_parser


def main(argv: list[str] | None = None) -> None:
    """Start a stage as `accelerate launch` would and end with its exit code; 128 + N where signal N killed it."""
    args = launch_command_parser().parse_args(argv)
    args.signals_to_handle = "SIGQUIT"  # else torchrun kills the processes 30 s after a SIGTERM and prints a traceback
    for name in (
        "accelerate",
        "torch.distributed.elastic",
    ):  # which defaults were taken; what failed, as seen from outside
        logging.getLogger(name).setLevel(logging.CRITICAL)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _pass_on)

    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    try:
        launch_command(args)
    except subprocess.CalledProcessError as error:  # one process
        _end("the stage", error.returncode)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _end(f"rank {rank}", failure.exitcode)


def _pass_on(number: int, frame: Any) -> None:
    for child in psutil.Process().children():
        child.send_signal(number)


def _end(who: str, code: int) -> None:
    """Exit with the code of the process that failed first; a killed one could say nothing itself."""
    if code < 0:
        print(
            f"error: {who} was killed by {signal.Signals(-code).name}; if nobody did that, the kernel did, for want of "
            "memory. Go on with train.resume=auto",
            file=sys.stderr,
        )
    raise SystemExit(code if code >= 0 else 128 - code)


if __name__ == "__main__":
    main()
