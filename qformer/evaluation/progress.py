"""How far a long pass is and how long it will still take: a bar on a terminal, else a line every half minute."""

import sys
import time
from datetime import timedelta

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

LINE_EVERY_S = 30


class Passing:
    """Progress of one pass over `total` things, on standard error of the first rank.

    Args:
        what: the pass in words, as "encoding images".
    """

    def __init__(self, what: str, total: int, *, shown: bool):
        self.what, self.total, self.done = what, total, 0
        self.began_at = self.line_at = time.monotonic()
        self.lines = shown and not sys.stderr.isatty()
        columns = (MofNCompleteColumn(), BarColumn(), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        self.bar = Progress(
            TextColumn(what), *columns, console=Console(stderr=True), disable=not shown or self.lines,
            speed_estimate_period=600,
        )  # fmt: skip
        self.task = self.bar.add_task("", total=total)

    def advance(self, count: int) -> None:
        """`count` more are done."""
        self.done += count
        self.bar.advance(self.task, count)
        now = time.monotonic()
        if self.lines and now - self.line_at > LINE_EVERY_S:
            self.line_at, rate = now, self.done / (now - self.began_at)
            left = timedelta(seconds=round((self.total - self.done) / rate))
            line = f"{self.what}: {self.done} of {self.total} of this process, {rate:.3g} a second, {left} left"
            print(line, file=sys.stderr, flush=True)

    def __enter__(self) -> "Passing":
        self.bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.bar.stop()
