"""How far a reader walks through one training step: files, functions and moves from file to file, counted as it runs.

    python benchmarks/walk.py stage1
    python benchmarks/walk.py stage2

A tiny model on the CPU (two layers, data in this process) makes one step of `fit`'s loop. Calls are counted once for every
pair of caller and callee, since a loop is read once; a move is such a call from one file of the package into another.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(REPO), str(REPO / "tests")]
PACKAGE = str(REPO / "qformer") + "/"
Call = tuple[CodeType | None, CodeType]


class Walk:
    """Functions of the package that ran between `__enter__` and `__exit__`, and who called whom."""

    def __init__(self) -> None:
        self.calls: set[Call] = set()

    def __enter__(self) -> "Walk":
        sys.setprofile(self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        sys.setprofile(None)

    def _note(self, frame: FrameType, event: str, argument: Any) -> None:
        if event == "call" and frame.f_code.co_filename.startswith(PACKAGE):
            caller = frame.f_back
            while caller is not None and not caller.f_code.co_filename.startswith(PACKAGE):
                caller = caller.f_back
            self.calls.add((caller.f_code if caller else None, frame.f_code))

    def __str__(self) -> str:
        functions = {callee for _, callee in self.calls}
        files = sorted({f.co_filename.removeprefix(PACKAGE) for f in functions})
        moves = sum(a is not None and a.co_filename != b.co_filename for a, b in self.calls)
        return f"{len(files)} files, {len(functions)} functions, {moves} moves: {', '.join(files)}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=("stage1", "stage2"))
    stage = parser.parse_args().stage
    from tiny import build_tiny, run_stage

    from qformer import training

    walks = {"forward and backward": Walk(), "step": Walk()}

    def watch(walk: Walk, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with walk:
                return function(*args, **kwargs)

        return run

    with tempfile.TemporaryDirectory() as folder:
        tiny, original = build_tiny(Path(folder) / "tiny"), training._forward_backward
        arguments = [*getattr(tiny, stage)(Path(folder) / "run"), "train.max_steps=1", "data.validation=[]"]
        training._forward_backward = watch(walks["forward and backward"], original)
        run_stage(int(stage[-1]), arguments)
        training._forward_backward = original
        loop = "_train" if hasattr(training, "_train") else "_Run"
        if loop == "_train":
            training._train = watch(walks["step"], training._train)
        else:
            training._Run.loop = watch(walks["step"], training._Run.loop)
        run_stage(int(stage[-1]), [*arguments, f"run.dir={folder}/again"])
    for name, walk in walks.items():
        print(f"{stage}, {name}: {walk}")


if __name__ == "__main__":
    main()
