"""Runs the parts of an experiment, one by one or side by side; it can be stopped and taken up. For all examples."""

import contextlib
import dataclasses
import json
import os
import platform
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import psutil
import torch
from rich.console import Console

from qformer.files import atomic_file

LAUNCHER = "qformer.launcher"
STATE_FILE, STAGES = "experiment.json", "stages"


@dataclasses.dataclass(frozen=True)
class Part:
    """A process of the experiment, and how to see that its work is done already."""

    name: str
    command: list[str]
    finished: Callable[[], bool]


class PartFailed(Exception):
    """A part of the experiment ended before its end; it has printed why itself."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.code = code


class Experiment:
    """A folder in which parts of an experiment are finished one after the other; it can be left and taken up again.

    As a context it ends the program with a line instead of a traceback: with the part's exit code when a part fails,
    with 130 on Ctrl-C (or SIGTERM), after the running parts have saved.

    Args:
        recipe: a dataclass of what changes the numbers.
        owned: names in `out` that the experiment makes, and that a fresh start removes.
        resume: keep what is finished; otherwise start afresh.
        jobs: parts of `run_side_by_side` that run at the same time; they share the cores.
        offline: everything is on disk, no hub is asked.
        go_on: script and arguments that go on after an interruption.

    Raises:
        ValueError: not started in the repository root; `out` was begun with another recipe, or holds things of others.
    """

    def __init__(
        self, out: Path, recipe: Any, *, owned: Sequence[str], resume: bool, go_on: Sequence[str], jobs: int = 1,
        offline: bool = True,
    ) -> None:  # fmt: skip
        if not Path(STAGES).is_dir():
            raise ValueError(f"there is no folder {STAGES} here: start it in the root of the repository")
        self.out, self.jobs, self.offline = out, jobs, offline
        self.go_on = shlex.join([_shown(sys.executable), *go_on])
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self._recipe = {key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(recipe).items()}
        self._running: list[subprocess.Popen[bytes]] = []
        self._lock, self._starting, self._stopping = threading.Lock(), False, False
        self._seconds_before, self.part_seconds = 0.0, dict[str, float]()
        if resume:
            self._take_up()
        else:
            self._start_afresh(owned)
        out.mkdir(parents=True, exist_ok=True)
        self._start = time.perf_counter()
        self._remember()

    def __enter__(self) -> "Experiment":
        # A closed terminal and a polite kill end it as Ctrl-C does: no part goes on training alone.
        signals = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if name in dir(signal)]
        heard = [s for s in signals if s == signal.SIGTERM or signal.getsignal(s) != signal.SIG_IGN]
        self._handlers = {s: signal.signal(s, self._interrupt) for s in heard}
        return self

    def _interrupt(self, *_: Any) -> None:
        """Ctrl-C; while a process is being started it waits until we know that process, and can stop it."""
        self._stopping = True
        if not self._starting:
            raise KeyboardInterrupt

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error:
            self.stop()
        self._remember()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)
        if isinstance(error, KeyboardInterrupt):
            self.console.print(f"\nstopped; go on with: {self.go_on}")
            raise SystemExit(130) from None
        if isinstance(error, PartFailed):
            self.console.print(f"\n{error}; once that is fixed, go on with: {self.go_on}")
            raise SystemExit(error.code) from None

    @property
    def seconds(self) -> float:
        """Time spent on this experiment, over all interruptions."""
        return self._seconds_before + time.perf_counter() - self._start

    def run(self, part: Part, log: Path | None = None) -> None:
        """Run a part that is not finished yet; its output goes to the terminal, or to the end of the file `log`.

        Raises: PartFailed when it fails or stops early; KeyboardInterrupt when the experiment is being stopped.
        """
        if part.finished():
            self.console.print(f"{part.name}: done before, kept")
            return
        self.console.print(f"\n== {part.name}" + (f" (output in {log})" if log else ""), style="bold")
        self.console.print(f"$ {shlex.join([_shown(part.command[0]), *part.command[1:]])}", style="dim")
        start = time.perf_counter()
        code = self._spawn(part.command, log)
        taken = time.perf_counter() - start
        with self._lock:  # parts that run side by side end side by side
            self.part_seconds[part.name] = self.part_seconds.get(part.name, 0) + taken
            self._remember()
        if self._stopping:
            raise KeyboardInterrupt
        if code:
            self.console.print(_tail(log)) if log else None
            raise PartFailed(f"{part.name} failed (exit code {code})", 128 - code if code < 0 else code)
        if not part.finished():
            raise PartFailed(f"{part.name} was stopped before its end", 130)
        self.console.print(f"== {part.name} took {duration(taken)}", style="bold")

    def run_side_by_side(self, chains: Sequence[Sequence[Part]]) -> None:
        """Run chains of parts, `jobs` chains at a time; the first failure stops them all.

        Raises: as `run`.
        """

        def run_chain(chain: Sequence[Part]) -> None:
            for part in chain:
                log = self.out / "logs" / f"{'_'.join(part.name.replace(',', '').split())}.log"
                self.run(part, log if self.jobs > 1 else None)

        with ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(run_chain, chain) for chain in chains]
            try:
                for future in as_completed(futures):
                    future.result()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                self.stop()
                raise

    def stop(self) -> None:
        """Let every running part save and end, and wait for it; Ctrl-C meanwhile ends it at once."""
        self._stopping = True
        with self._lock:
            running = list(self._running)
        for _ in range(3):
            for process in running:
                _terminate(process)
            try:
                for process in running:
                    process.wait()
                return
            except KeyboardInterrupt:
                continue

    def _spawn(self, command: list[str], log: Path | None) -> int:
        environment = os.environ | ({"HF_HUB_OFFLINE": "1"} if self.offline else {})
        environment |= {
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",  # of files and weights that load in a blink
            "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
            "TOKENIZERS_PARALLELISM": "false",
            "OMP_NUM_THREADS": str(max(1, count_threads() // self.jobs)),
        }
        with contextlib.ExitStack() as stack:
            output = None
            if log:
                log.parent.mkdir(parents=True, exist_ok=True)
                output = stack.enter_context(log.open("ab"))
            with self._lock:
                if self._stopping:
                    raise KeyboardInterrupt
                # In a session of its own, so that Ctrl-C reaches only us: accelerate's launcher would die of it at once
                # and leave the stage behind, still saving.
                self._starting = True
                try:
                    process = subprocess.Popen(
                        command, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                        stderr=subprocess.STDOUT if output else None, start_new_session=True,
                    )  # fmt: skip
                    self._running.append(process)
                finally:
                    self._starting = False
            if self._stopping:
                raise KeyboardInterrupt
            code = process.wait()
            with self._lock:
                self._running.remove(process)
            return code

    def _start_afresh(self, owned: Sequence[str]) -> None:
        old = [self.out / name for name in owned if (self.out / name).exists()]
        if old and not (self.out / STATE_FILE).is_file():
            raise ValueError(f"{old[0]} is there but nothing tells that a demo made it; choose another --out")
        if old:
            self.console.print(f"starting afresh: removing {', '.join(map(str, old))} (keep them with --resume)")
        for path in old:
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _take_up(self) -> None:
        file = self.out / STATE_FILE
        if not file.is_file():
            return
        state = json.loads(file.read_text())
        for key, value in self._recipe.items():
            if state["recipe"].get(key) != value:
                raise ValueError(
                    f"{self.out} was begun with {key}={state['recipe'].get(key)}, not {value}; "
                    "choose another --out, or give the same options"
                )
        self._seconds_before, self.part_seconds = state["seconds"], state.get("part_seconds", {})

    def _remember(self) -> None:
        state = {"recipe": self._recipe, "seconds": round(self.seconds, 1), "part_seconds": self.part_seconds}
        with atomic_file(self.out / STATE_FILE) as scratch:
            scratch.write_text(json.dumps(state) + "\n")


def duration(seconds: float) -> str:
    """Seconds as "12 s", "3 min 12 s" or "1 h 03 min"."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"


def describe_machine() -> dict[str, Any]:
    """What the experiment runs on: `cpu` by name, `cores` that it may use, `device` of the training."""
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    name = "cpu" if device is None else torch.cuda.get_device_name() if device.type == "cuda" else device.type
    return {"cpu": _cpu_name(), "cores": count_cores(), "device": name}


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def count_threads() -> int:
    """Threads that pay: OMP_NUM_THREADS if it is set, else one a physical core."""
    threads = os.environ.get("OMP_NUM_THREADS", "")
    return (
        int(threads)
        if threads.isdigit() and int(threads)
        else min(count_cores(), psutil.cpu_count(False) or count_cores())
    )


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _terminate(process: "subprocess.Popen[bytes]") -> None:
    """Ask a part to end. Accelerate's launcher would not pass that on, so the stage under it is asked itself."""
    if process.poll() is not None:
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        launched = psutil.Process(process.pid)
        stages = launched.children() if LAUNCHER in process.args else []  # type: ignore[operator]
        for target in stages or [launched]:
            target.terminate()


def _shown(executable: str) -> str:
    here = f"{Path.cwd()}{os.sep}"
    return executable.removeprefix(here)


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").splitlines()[-lines:])
