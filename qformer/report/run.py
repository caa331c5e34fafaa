"""What a run left in its folder, read as it is: one that goes on, was resumed, is of an older version, or was cut short."""

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qformer.config import ConfigError
from qformer.config.loading import read_values
from qformer.files import METRICS_FILE, WARNINGS_FILE
from qformer.messages import nearest

Point = tuple[float, float]


@dataclass(frozen=True)
class Run:
    """A run by the name that a report gives it.

    Args:
        lines: of metrics.jsonl, by rising steps.
        config: of config.yaml, as nested dictionaries; empty where there is none.
        warnings: lines of warnings.jsonl; None where the run kept none, being of an older version.
    """

    name: str
    lines: list[dict[str, Any]]
    folder: Path | None = None
    config: dict[str, Any] = field(default_factory=dict)
    warnings: list[dict[str, Any]] | None = None

    def points(self, key: str) -> list[Point]:
        """(step, value) of every line that has `key` with a number; "nan", "inf" and "-inf" are numbers too."""
        return [(line["step"], value) for line in self.lines if (value := _number(line.get(key))) is not None]

    def metrics(self) -> list[str]:
        """Every key that has a finite number in some line, in the order in which they first come."""
        numbers = ((key, _number(value)) for line in self.lines for key, value in line.items() if key != "step")
        return list(dict.fromkeys(key for key, value in numbers if value is not None and math.isfinite(value)))

    @property
    def step(self) -> int:
        """The last step that the log tells of."""
        return int(self.lines[-1]["step"]) if self.lines else 0

    def setting(self, section: str, key: str) -> Any:
        """A value of the config; None where it has none."""
        return (self.config.get(section) or {}).get(key)


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """The runs of these folders, each named by as much of its path as tells it from the others.

    Raises: ValueError naming the folder when one does not exist, is no run folder, has not logged yet, or stands twice.
    """
    paths = [Path(os.path.abspath(folder)) for folder in folders]
    if twice := {str(folder) for folder, path in zip(folders, paths, strict=True) if paths.count(path) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} stands twice; name each run once")
    return [read_run(folder, name) for folder, name in zip(folders, _names(paths), strict=True)]


def read_run(folder: Path, name: str = "") -> Run:
    """The run of one folder. Where it went on from a checkpoint of another run, that run's lines come before its own.

    Args:
        name: in the report; "" is the folder's own.

    Raises: ValueError as `read_runs` does, or when a file in the folder cannot be read.
    """
    _require_run(folder)
    lines = read_lines(folder / METRICS_FILE)
    if not lines:
        raise ValueError(
            f"{folder}: {METRICS_FILE} is empty: nothing is logged yet; its first line comes after train.log_every_steps steps"
        )
    config = _config(folder)
    warnings = folder / WARNINGS_FILE
    return Run(
        name or folder.name,
        _lines_before(folder, config, {folder.resolve()}) + lines,
        folder,
        config,
        read_lines(warnings, needs="message") if warnings.is_file() else None,
    )


def read_lines(path: Path, needs: str = "step") -> list[dict[str, Any]]:
    """The objects of a file of JSON lines; a last line that is not whole is left out: a run may be writing it just now.

    Where steps go back, a run was resumed: lines that stand before and are not of earlier steps are left out.

    Args:
        needs: a key that every object has.

    Raises: ValueError naming file and line when another line is no JSON object with that key.
    """
    texts = path.read_text(encoding="utf-8", errors="replace").splitlines()
    lines: list[dict[str, Any]] = []
    for number, text in enumerate(texts, start=1):
        try:
            line = json.loads(text)
            line[needs]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            if number == len(texts):
                break
            raise ValueError(
                f"{path}, line {number}: expected a JSON object with {needs!r}; delete the line"
            ) from error
        if needs == "step" and lines and lines[-1]["step"] > line["step"]:
            lines = [before for before in lines if before["step"] < line["step"]]
        lines.append(line)
    return lines


def differences(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Keys of the configs whose values differ between runs, each with the value of every run; "-" where it has none.

    Runs of different stages have different keys: only those that all of them have are compared. `run.dir` always differs
    and is left out.
    """
    flat = [_flat(run.config) for run in runs]
    stages = {values.get("stage") for values in flat}
    keys = dict.fromkeys(key for values in flat for key in values)
    if len(stages) > 1:
        keys = {key: None for key in keys if all(key in values for values in flat)}
    rows = {key: [values.get(key, "-") for values in flat] for key in keys if key != "run.dir"}
    return {key: values for key, values in rows.items() if len(set(values)) > 1}


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value)
    return flat


def _number(value: object) -> float | None:
    if isinstance(value, bool):
        return None
    if value in ("nan", "inf", "-inf"):
        return float(str(value))
    return float(value) if isinstance(value, int | float) else None


def _require_run(folder: Path) -> None:
    """Refuse what is no run folder, with the runs that are near."""
    if (folder / METRICS_FILE).is_file():
        return
    if not folder.is_dir():
        siblings = [str(path.parent) for path in folder.parent.glob(f"*/{METRICS_FILE}")]
        raise ValueError(
            f"{folder}: there is no such folder" + (f"; {nearest(str(folder), siblings)}" if siblings else "")
        )
    below = sorted(
        str(path.parent) for path in (*folder.glob(f"*/{METRICS_FILE}"), *folder.glob(f"*/*/{METRICS_FILE}"))
    )
    above = [str(path) for path in folder.resolve().parents[:2] if (path / METRICS_FILE).is_file()]
    hint = f"; runs are {', '.join(below[:8])}" if below else f"; the run is {above[0]}" if above else ""
    raise ValueError(f"{folder} is no run folder: it has no {METRICS_FILE}{hint}")


def _config(folder: Path) -> dict[str, Any]:
    try:
        return read_values(folder)
    except ConfigError:
        if (folder / "config.yaml").is_file():
            raise
        return {}


def _lines_before(folder: Path, config: dict[str, Any], known: set[Path]) -> list[dict[str, Any]]:
    """The lines of the run whose checkpoint `train.resume` names, up to its step; none where it is this run's."""
    resume = (config.get("train") or {}).get("resume")
    if not resume or resume == "auto":
        return []
    checkpoint = Path(resume)
    origin, step = checkpoint.parent.parent, checkpoint.name.removeprefix("step-")
    if origin.resolve() in known or not step.isdigit() or not (origin / METRICS_FILE).is_file():
        return []
    before = _lines_before(origin, _config(origin), known | {origin.resolve()})
    return before + [line for line in read_lines(origin / METRICS_FILE) if line["step"] <= int(step)]


def _names(paths: Sequence[Path]) -> Iterable[str]:
    """The last parts of each path, as many as tell all of them apart."""
    longest = max(len(path.parts) for path in paths)
    for count in range(1, longest + 1):
        names = ["/".join(path.parts[-count:]) for path in paths]
        if len(set(names)) == len(names):
            return names
    return map(str, paths)
