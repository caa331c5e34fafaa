"""One piece of work done by several libraries, in turns: the same result, how long, how much memory.

Each side is a process of its own (`serving.py` is its other end), so that a peak of memory belongs to one library. Only
one of them works at a time, and who begins changes every round: a machine that slows down slows both.
"""

import argparse
import datetime
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
LIBRARIES = ("lavis", "transformers")


class Side:
    """A process that has one library's model and does its work on request.

    Args:
        module: of `sides/`.
        folder: holds task.json and what `sides/prepare.py` wrote.
    """

    def __init__(self, module: str, folder: Path, python: str = sys.executable) -> None:
        self.module, self.log = module, folder / f"{module}.log"
        task = json.loads((folder / "task.json").read_text())
        environment = os.environ | {
            "OMP_NUM_THREADS": str(task["threads"]), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false",
        }  # fmt: skip
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [python, "-m", "serving", module, str(folder)],
                cwd=HERE, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
            )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        """The next line the process writes; the first one says that it is ready."""
        assert self.process.stdout is not None
        if line := self.process.stdout.readline():
            return json.loads(line)
        raise SystemExit(f"{self.module} ended with code {self.process.wait()}:\n{self.log.read_text()[-3000:]}")

    def ask(self, what: str, round: int = 0) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{what} {round}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def parser(doc: str | None, peers: Sequence[str], rounds: int = 5) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    found = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("--json", type=Path, help="write the result to this file")
    found.add_argument("--tiny", action="store_true", help="toy sizes, to see that it runs")
    found.add_argument("--rounds", type=int, default=rounds, help="timed turns of every side")
    found.add_argument("--batch", type=int, help="another batch size than the row's own, for less memory")
    found.add_argument("--threads", type=int, default=os.cpu_count(), help="of every side")
    found.add_argument("--device", default="cpu", help="cpu or cuda")
    found.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32",
                       help="bfloat16: frozen weights, and autocast of the rest")  # fmt: skip
    found.add_argument(
        "--peer", choices=peers, action="append", help=f"may be repeated; default: {' and '.join(peers)}"
    )
    found.set_defaults(peers=peers)
    return found


def run(args: argparse.Namespace, name: str, work: str, shapes: dict[str, Any], tolerance: float = 1e-4) -> None:
    """Prepare, check that all sides compute the same, let them work in turns, report.

    Raises: SystemExit when a side fails or computes something else.
    """
    shapes = shapes if args.batch is None else {**shapes, "batch": args.batch}
    libraries = args.peer or list(args.peers)
    pythons = {library: _python(library) for library in libraries}
    with tempfile.TemporaryDirectory(prefix="qformer-bench-") as scratch:
        folder = Path(scratch)
        task = {"work": work, "threads": args.threads, "device": args.device, "dtype": args.dtype,
                "libraries": libraries, **shapes}  # fmt: skip
        (folder / "task.json").write_text(json.dumps(task))
        for preparation in ("prepare", "matmul"):
            side = Side(f"sides.{preparation}", folder)
            side.answer()
            if preparation == "matmul":
                products = [side.ask("step") for _ in range(8)]
                peak = max(product["flop"] / product["seconds"] for product in products)
            side.close()
        sides = {"ours": Side("sides.ours", folder)}
        sides |= {library: Side(f"sides.{library}", folder, pythons[library]) for library in libraries}
        versions = {name: side.answer() for name, side in sides.items()}
        if args.dtype == "bfloat16":
            tolerance = max(tolerance, 0.1)
        checks = {name: side.ask("check") for name, side in sides.items()}
        differences = {library: difference(checks["ours"], checks[library], library) for library in libraries}
        if worst := [f"{n} by {d:.2g}" for n, d in differences.items() if d > tolerance]:
            raise SystemExit(
                f"{name}: not the same result as {', '.join(worst)} (at most {tolerance:g}); nothing timed"
            )
        flop = {name: side.ask("count")["flop"] for name, side in sides.items()}  # a warm-up as well
        turns: dict[str, list[dict[str, Any]]] = {name: [] for name in sides}
        for round in range(args.rounds):
            for side_name in list(sides) if round % 2 == 0 else reversed(sides):
                turns[side_name].append(sides[side_name].ask("step", round))
        for side in sides.values():
            side.close()
    report(args, name, shapes, turns, flop, peak, {"difference": differences, "versions": versions})


def difference(ours: dict[str, Any], theirs: dict[str, Any], library: str) -> float:
    """Largest absolute difference of the numbers that both sides give; texts have to be equal.

    Raises: SystemExit when they have nothing in common, or texts or shapes differ.
    """
    if not (shared := ours.keys() & theirs.keys()):
        raise SystemExit(f"ours and {library} have no result in common to compare")
    largest = 0.0
    for key in shared:
        pairs = list(zip(ours[key], theirs[key], strict=False))
        if len(ours[key]) != len(theirs[key]):
            raise SystemExit(f"{key}: {len(ours[key])} of ours, {len(theirs[key])} of {library}; nothing timed")
        for own, other in pairs:
            if isinstance(own, str):
                if own != other:
                    raise SystemExit(f"{key}: ours {own!r}, {library} {other!r}; nothing timed")
            elif not abs(own - other) <= largest:  # a NaN too
                largest = abs(own - other) if own == own and other == other else float("inf")
    return largest


def report(
    args: argparse.Namespace, name: str, shapes: dict[str, Any], turns: dict[str, list[dict[str, Any]]],
    flop: dict[str, float], peak: float | None, more: dict[str, Any],
) -> None:  # fmt: skip
    """Print a line a side, and write what was measured; the peer is the fastest of them."""
    seconds = {side: statistics.median(t["seconds"] for t in taken) for side, taken in turns.items()}
    lowest = {side: min(t["seconds"] for t in taken) for side, taken in turns.items()}
    memory = {side: max(t["peak_bytes"] for t in taken) for side, taken in turns.items()}
    shares = {side: flop[side] / seconds[side] / peak if peak and side in flop else None for side in turns}
    peer = min((side for side in turns if side != "ours"), key=lambda side: seconds[side])
    ratios = {side: _spread(turns, side) for side in turns if side != "ours"}
    print(name)
    for side in turns:
        share = (
            "" if shares[side] is None else f"  {shares[side]:4.0%} of the {peak / 1e9:.0f} GFLOP/s of matrix products"
        )
        gain = ""
        if side != "ours":
            gain = "  {median:.2f} x ours ({min:.2f} to {max:.2f})".format(**ratios[side])
            gain += f", lowest against lowest {lowest[side] / lowest['ours']:.2f}"
        print(
            f"  {side:<13}{seconds[side]:8.3f} s, lowest {lowest[side]:.3f}  {memory[side] / 1e9:6.2f} GB{share}{gain}"
        )
    if args.json:
        result = {
            "name": name, "peer": peer, "shapes": shapes, "ratio": ratios[peer],
            "seconds": {"ours": seconds["ours"], "peer": seconds[peer]},
            "lowest": {"ours": lowest["ours"], "peer": lowest[peer]},
            "peak_bytes": {"ours": memory["ours"], "peer": memory[peer]},
            "share_of_peak": {"ours": shares["ours"], "peer": shares[peer]},
            "flop": {"ours": flop.get("ours"), "peer": flop.get(peer)}, "flop_per_s_of_the_machine": peak,
            "peers": {side: {"ratio": ratios[side], "seconds": seconds[side], "peak_bytes": memory[side]} for side in ratios},
            "rounds": args.rounds, "threads": args.threads, "device": args.device, "dtype": args.dtype,
            "tiny": args.tiny, "machine": machine(), "date": datetime.date.today().isoformat(), **more,
        }  # fmt: skip
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, indent=1))


def machine() -> str:
    """The processor and how many cores the process may use."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {os.cpu_count()} cores, {platform.system()}"


def _spread(turns: dict[str, list[dict[str, Any]]], side: str) -> dict[str, float]:
    ratios = [t["seconds"] / own["seconds"] for t, own in zip(turns[side], turns["ours"], strict=True)]
    return {"median": statistics.median(ratios), "min": min(ratios), "max": max(ratios)}


def _python(library: str) -> str:
    if library != "lavis":
        return sys.executable
    from lavis_environment import python

    return str(python())
