"""The inner end of a side: builds the library's model, then works line by line (python -m serving MODULE FOLDER).

A module of `sides/` has `build(folder, task)`; what it returns has `check()`, results by name to compare with the other
sides', and `step(round)`, the piece of work that is timed.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TextIO

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Count(TorchDispatchMode):
    """Floating-point operations of the products and convolutions done inside.

    torch's own FlopCounterMode follows modules as well, and cannot where a view is made without gradient.
    """

    flop = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        if formula := flop_registry.get(function.overloadpacket):
            self.flop += formula(*args, **(kwargs or {}), out_val=out)
        return out


def serve(module: str, folder: Path, requests: Iterable[str], replies: TextIO) -> None:
    """Answer "check", "count" and "step ROUND" with a line of JSON each; the first line says that the model is there."""
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(task["threads"])
    if module == "sides.ours":
        from qformer.environment import prepare_environment  # which peers in environments of their own lack

        prepare_environment()  # as every stage does
    side = importlib.import_module(module).build(folder, task)
    cuda = task["device"] == "cuda"
    fresh = True

    def reply(content: dict[str, Any]) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    reply({"torch": torch.__version__, "python": sys.version.split()[0]})
    for request in requests:
        what, round = request.split()
        if what == "check":
            reply({name: value if isinstance(value, list) else [value] for name, value in side.check().items()})
        elif what == "count":
            # Fused attention kernels are not counted: plain ones do the same products.
            with Count() as count, sdpa_kernel(SDPBackend.MATH):
                side.step(0)
            reply({"flop": count.flop})
        else:
            if fresh:
                forget_peak(cuda)
                fresh = False
            began = time.perf_counter()
            found = side.step(int(round))
            if cuda:
                torch.cuda.synchronize()
            seconds = time.perf_counter() - began
            reply({"seconds": seconds, "peak_bytes": peak_bytes(cuda), **(found or {})})


def peak_bytes(cuda: bool) -> int:
    """Most memory of the process since `forget_peak`: resident, or on the GPU what torch had in use."""
    if cuda:
        return torch.cuda.max_memory_allocated()
    if STATUS.is_file():  # ru_maxrss would begin with what the parent had before exec
        (line,) = (line for line in STATUS.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def forget_peak(cuda: bool) -> None:
    """Leave building and checking out of the peak, where the system can."""
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    elif os.access(CLEAR, os.W_OK):
        CLEAR.write_text("5")


if __name__ == "__main__":
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log
    serve(sys.argv[1], Path(sys.argv[2]), sys.stdin, replies)
