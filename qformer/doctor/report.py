"""What the doctor says: one finding a line, as a table or as JSON. Knows no torch, so that it can begin at once."""

import json
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

OK, WARNING, FAILED = "ok", "warning", "FAILED"
COLOURS = {OK: "green", WARNING: "yellow", FAILED: "bold red"}


class Finding(NamedTuple):
    """The outcome of one check: OK, WARNING or FAILED, and what was found, with the fix where one is needed."""

    check: str
    status: str
    text: str


def shown(findings: Iterable[Finding], console: Console) -> Iterator[Finding]:
    """The same findings, in a table: on a terminal each as soon as it is there, else all at the end."""
    table = Table(box=None, padding=(0, 1), show_header=False)
    table.add_column()
    table.add_column()
    table.add_column(overflow="fold")
    live = Live(table, console=console, auto_refresh=False) if console.is_terminal else nullcontext()
    with live:
        for finding in findings:
            table.add_row(finding.check, Text(finding.status, style=COLOURS[finding.status]), Text(finding.text))
            if isinstance(live, Live):
                live.refresh()
            yield finding
    if not console.is_terminal:
        console.print(table)


def write_json(path: Path, findings: list[Finding]) -> None:
    """Write `ok` (no check failed) and every finding."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ok = all(finding.status != FAILED for finding in findings)
    path.write_text(json.dumps({"ok": ok, "findings": [finding._asdict() for finding in findings]}, indent=1) + "\n")
