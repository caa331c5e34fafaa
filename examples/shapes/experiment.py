"""Runs the parts of a Shapes experiment, one by one or side by side, and reports how it came out; for demo and reproduce."""

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
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import psutil
import torch
from recipe import LAUNCHER, STAGE1, Part, Recipe
from report import LLM_TITLES, ROWS, choose_examples, duration, overall, write_report
from rich.console import Console
from rich.table import Table

STATE_FILE = "experiment.json"


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
        owned: names in `out` that the experiment makes, and that a fresh start removes.
        resume: keep what is finished; otherwise start afresh.
        jobs: parts of `run_side_by_side` that run at the same time; they share the cores.
        go_on: script and arguments that go on after an interruption.

    Raises:
        ValueError: not started in the repository root; `out` was begun with another recipe, or holds things of others.
    """

    def __init__(
        self, out: Path, recipe: Recipe, *, owned: Sequence[str], resume: bool, go_on: Sequence[str], jobs: int = 1
    ) -> None:
        if not Path(STAGE1).is_file():
            raise ValueError(f"there is no {STAGE1} here: start it in the root of the repository")
        self.out, self.jobs = out, jobs
        self.go_on = shlex.join([_shown(sys.executable), *go_on])
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self._recipe = {key: str(v) if isinstance(v, Path) else v for key, v in dataclasses.asdict(recipe).items()}
        self._running: list[subprocess.Popen[bytes]] = []
        self._lock, self._starting, self._stopping = threading.Lock(), False, False
        self._seconds_before = 0.0
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
        if self._stopping:
            raise KeyboardInterrupt
        if code:
            self.console.print(_tail(log)) if log else None
            raise PartFailed(f"{part.name} failed (exit code {code})", 128 - code if code < 0 else code)
        if not part.finished():
            raise PartFailed(f"{part.name} was stopped before its end", 130)
        self.console.print(f"== {part.name} took {duration(time.perf_counter() - start)}", style="bold")

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

    def conclude(
        self, title: str, table: dict[str, dict[str, Any]], curves: Mapping[str, Path], answers: Path
    ) -> dict[str, Any]:
        """Write `results.json` and `report.html`, and print the table and where things are.

        Args:
            table: LLM, row of the table, score.
            curves: run folders whose losses the report shows, by title.
            answers: the evaluation whose pictures and answers the report shows.
        """
        results = {"seconds": round(self.seconds, 1), **describe_machine(), "table": table}
        (self.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        lines = {name: read_curve(run_dir) for name, run_dir in curves.items()}
        examples = choose_examples(read_answers(answers)["results"])
        write_report(self.out / "report.html", title=title, results=results, curves=lines, examples=examples)
        self.console.print()
        for llm, scores in table.items():
            self.console.print(terminal_table(LLM_TITLES.get(llm, llm), scores))
        device = "" if results["device"] == "cpu" else f" and {results['device']}"
        self.console.print(f"{duration(self.seconds)} in all on {results['cpu']}, {results['cores']} cores{device}")
        self.console.print(f"report: {self.out / 'report.html'}")
        return results

    def _spawn(self, command: list[str], log: Path | None) -> int:
        environment = os.environ | {
            "HF_HUB_OFFLINE": "1",  # everything is on disk: no hub is asked
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
        self._seconds_before = state["seconds"]

    def _remember(self) -> None:
        state = {"recipe": self._recipe, "seconds": round(self.seconds, 1)}
        (self.out / STATE_FILE).write_text(json.dumps(state) + "\n")


def read_answers(path: Path) -> dict[str, Any]:
    """What stages/evaluate.py wrote with --json."""
    return json.loads(path.read_text())


def score_of(answers: Path) -> dict[str, Any]:
    """A cell of the results: overall accuracy, accuracy by kind of question, number of questions."""
    evaluation = read_answers(answers)
    return {"overall": evaluation["scores"]["overall"], "by_type": evaluation["by_type"], "n": evaluation["n"]}


def average(scores: Mapping[int, dict[str, Any]]) -> dict[str, Any]:
    """The mean of one row over seeds, with the `spread` [lowest, highest] of the overall accuracy."""
    each = list(scores.values())
    values = [score["overall"] for score in each]
    by_type = {t: sum(score["by_type"][t] for score in each) / len(each) for t in each[0]["by_type"]}
    return {
        "overall": sum(values) / len(values), "by_type": by_type, "n": each[0]["n"],
        "spread": [min(values), max(values)], "seeds": list(scores),
    }  # fmt: skip


def terminal_table(title: str, scores: Mapping[str, dict[str, Any]]) -> Table:
    """One LLM's accuracies for the terminal: kinds of question down, rows of the results across."""
    table = Table(title=f"{title}: accuracy on held-out questions, percent", title_justify="left")
    rows = [key for key in ROWS if key in scores]
    table.add_column("")
    for key in rows:
        table.add_column(ROWS[key][0], justify="right")
    table.add_row("overall", *(overall(scores[key]) for key in rows), style="bold", end_section=True)
    for kind in scores[rows[0]]["by_type"]:
        table.add_row(kind, *(f"{scores[key]['by_type'][kind]:.1f}" for key in rows))
    return table


def markdown_table(table: Mapping[str, Mapping[str, dict[str, Any]]]) -> str:
    """The results in Markdown: first overall accuracies, rows by LLMs, then each LLM's by kind of question."""
    keys = [key for key in ROWS if any(key in scores for scores in table.values())]
    titles = [LLM_TITLES.get(llm, llm) for llm in table]
    rows = [[ROWS[k][0], *(overall(s[k]) if k in s else "" for s in table.values())] for k in keys]
    parts = [_markdown(["accuracy, percent", *titles], rows)]
    for title, scores in zip(titles, table.values(), strict=True):
        kinds = list(next(iter(scores.values()))["by_type"])
        rows = [[ROWS[k][0], *(f"{scores[k]['by_type'][t]:.1f}" for t in kinds)] for k in keys if k in scores]
        parts.append(_markdown([title, *kinds], rows))
    return "\n".join(parts)


def read_curve(run_dir: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


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


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
