"""Sections of a page about runs: what each is, their curves over each other, texts, warnings, configs.

page = Page("Two learning rates")
add_runs(page, read_runs([Path("runs/a"), Path("runs/b")]))
page.write(Path("report.html"))
"""

import math
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

from qformer.files import METRICS_FILE
from qformer.report.curves import Series, chart, curves, number
from qformer.report.page import Card, Html, Page, folded, gallery, joined, quiet, soft, strong, table
from qformer.report.run import Run, differences

MOST_WARNINGS = 40  # of a run that are shown; the last ones


class Plot(NamedTuple):
    """What one chart shows.

    Args:
        label: of the chart; of keys.
        keys: of metrics.jsonl, each with its name in the legend where there are several.
        chance: of one line, where no `..._chance` stands in it.
    """

    label: str
    unit: str
    keys: dict[str, str]
    log: bool = False
    scale: float = 1.0
    chance: Callable[[dict[str, Any]], float | None] = lambda line: None


def _one(key: str, label: str, unit: str = "", **more: Any) -> Plot:
    return Plot(f"{label} ({key})" if unit == "nats" else label, unit, {key: ""}, **more)


def _accuracy_of_a_guess(line: dict[str, Any]) -> float | None:
    return 1 / (line["itc_negatives"] + 1) if "itc_negatives" in line else None


LOSSES = [
    _one("itc", "image-text contrast", "nats"),
    _one("itm", "image-text matching", "nats"),
    _one("itg", "image-grounded text generation", "nats"),
    _one("lm", "language-model loss of captions", "nats"),
]
RECALLS = {"validation_image_to_text_recall_1": "image to text", "validation_text_to_image_recall_1": "text to image"}
MEASURES = [
    Plot("held-out recall@1", "percent", RECALLS),
    _one("itc_accuracy", "accuracy of contrast", chance=_accuracy_of_a_guess),
    _one("itm_accuracy", "accuracy of matching", chance=lambda line: 2 / 3),  # "never matching"
    _one("query_output_cosine", "cosine between the queries of an image"),
    _one("query_effective_rank", "directions that the queries fill"),
    _one("diversity", "mean squared cosine of the queries (diversity)"),
    _one("temperature", "temperature of contrast"),
]
OPTIMISER = [_one("lr", "learning rate"), _one("gradient_norm", "norm of the gradient before clipping", log=True)]
SPEED = [
    _one("samples_per_s", "speed", "records/s"),
    _one("tokens_per_s", "speed in text tokens", "tokens/s"),
    _one("data_wait", "share of the time that waits for data"),
    _one("memory_bytes", "memory of the main process", "GB", scale=1e-9),
]
DROPPED = _one("dropped", "broken records met")  # drawn where there are any

CONSTANTS = ("itc_negatives",)  # in every line, but no curves
TEXTS_NOTE = "What the model wrote of held-out images at each validation, below the image's own caption."


def add_runs(page: Page, runs: Sequence[Run]) -> None:
    """Add all sections about runs; with several they stand over each other in every chart."""
    page.add("Runs" if len(runs) > 1 else "The run", facts(runs))
    add_curves(page, runs)
    page.add("Texts over time", texts(runs), note=TEXTS_NOTE)
    page.add("Warnings", *(warnings(run) for run in runs))
    if len(runs) > 1:
        page.add("Where the configs differ", config_differences(runs))
    page.add("Configs" if len(runs) > 1 else "Config", *(folded(run.name, _config_text(run)) for run in runs))


def add_curves(page: Page, runs: Sequence[Run]) -> None:
    """Add the curves: losses against chance, other measures, learning rate and gradient, speed and memory."""
    keys = {key for run in runs for key in run.metrics()}
    held = " Dots are held-out records." if any(key.startswith("validation_") for key in keys) else ""
    chance = " The dashed line is chance: the loss of a model that has learnt nothing."
    note = f"Over optimizer steps.{held}{chance if any(key.endswith('_chance') for key in keys) else ''}"
    page.add("Losses", draw(LOSSES, runs), note=note)
    page.add("Measures", draw([*MEASURES, *_others(runs)], runs))
    page.add("Learning rate and gradient", draw(OPTIMISER, runs), _gradient_by_part(runs))
    dropped = [DROPPED] if any(value for run in runs for _, value in run.points("dropped")) else []
    page.add("Speed and memory", draw([*SPEED, *dropped], runs))


def draw(plots: Iterable[Plot], runs: Sequence[Run]) -> Html:
    """Charts side by side: one for each plot, or for each key of it where several runs would make it a tangle."""
    charts = []
    for plot in plots:
        if len(runs) > 1 and len(plot.keys) > 1:
            each = [plot._replace(label=f"{plot.label}, {name}", keys={key: ""}) for key, name in plot.keys.items()]
        else:
            each = [plot]
        charts += [_chart(one, runs) for one in each]
    return curves(charts)


def facts(runs: Sequence[Run]) -> Html:
    """A table of how far each run is and how it fares: a column a run."""
    names = [name for plot in LOSSES for key in plot.keys for name in (key, f"validation_{key}")]
    rows: list[tuple[str, Callable[[Run], object]]] = [
        ("stage", lambda run: run.config.get("stage")),
        ("step", _progress),
        ("last line", _last_written),
        *((name.replace("validation_", "held-out "), partial(_last, key=name)) for name in names),
        ("records/s, median", lambda run: _of(run, "samples_per_s", median)),
        ("memory at most, GB", lambda run: _of(run, "memory_bytes", max, 1e-9)),
        ("broken records", lambda run: _of(run, "dropped", max)),
        ("warnings", lambda run: None if run.warnings is None else str(len(_warned(run)))),
    ]
    cells = [[title, *(value(run) for run in runs)] for title, value in rows]
    return table(["", *(run.name for run in runs)], [row for row in cells if any(row[1:])])


def texts(runs: Sequence[Run]) -> Html:
    """What the runs wrote at each validation, a card an image; empty where they wrote nothing."""
    cards: dict[tuple[str, str, str], list[str]] = {}
    pictures: dict[str, str] = {}
    problems = []
    for run in runs:
        samples = [{"step": line["step"], **sample} for line in run.lines for sample in line.get("captions") or ()]
        for sample in samples:
            key = (sample.get("image_id", ""), sample["caption"], sample.get("prompt") or "")
            when = f"{run.name}, step {sample['step']}: " if len(runs) > 1 else f"step {sample['step']}: "
            cards.setdefault(key, []).append(joined([quiet(when), sample["generated"] or "(nothing)"]))
        if samples:
            shown, problem = _pictures(run, {s["image_id"] for s in samples if "image_id" in s} - pictures.keys())
            pictures |= shown
            problems += [soft(f"{run.name}: {problem}")] if problem else []
    alt = "a held-out image"
    drawn = gallery(
        (
            Card(pictures.get(image_id), [strong(caption), *([quiet(prompt)] if prompt else []), *lines], alt=alt)
            for (image_id, caption, prompt), lines in cards.items()
        ),
        "17rem",
    )
    return joined([drawn, *problems])


def warnings(run: Run) -> Html:
    """What the run warned of, the last `MOST_WARNINGS`; one line where it did not, or kept none."""
    if run.warnings is None:
        return soft(f"{run.name}: of a version that kept no warnings.") if run.folder else Html("")
    warned = _warned(run)
    if not warned:
        return soft(f"{run.name}: none.")
    rows = [[w.get("time", ""), w.get("step"), w["message"]] for w in warned[-MOST_WARNINGS:]]
    left = f", the last {MOST_WARNINGS} of {len(warned)}" if len(warned) > MOST_WARNINGS else ""
    return table(["time", "step", "message"], rows, caption=f"{run.name}{left}", words=True)


def config_differences(runs: Sequence[Run]) -> Html:
    """A table of the keys whose values differ between runs."""
    rows = differences(runs)
    if not rows:
        return Html("<p>Nowhere but in run.dir.</p>\n")
    of_stages = len({run.config.get("stage") for run in runs}) > 1
    note = soft("Runs of different stages: only keys that all of them have are compared.") if of_stages else ""
    return joined([table(["key", *(run.name for run in runs)], [[k, *v] for k, v in rows.items()], words=True), note])


def _chart(plot: Plot, runs: Sequence[Run]) -> Html:
    """One chart: a colour for each run, or of one run for each key, or for training and held-out records."""
    series: list[Series] = []
    chance: list[float] = []
    for place, run in enumerate(runs):
        for key, name in plot.keys.items():
            held = key.startswith("validation_")
            points, validated = _scaled(run, key, plot.scale), _scaled(run, f"validation_{key}", plot.scale)
            if len(runs) > 1:
                names, colours = (run.name, f"{run.name}, held-out"), (place, place)
            elif len(plot.keys) > 1:
                colour = list(plot.keys).index(key)
                names, colours = (name, f"{name}, held-out"), (colour, colour)
            else:
                names, colours = ("held-out" if held else "training", "held-out"), (0, 1)
            series.append(Series(names[0], points, colours[0], sparse=held))
            series.append(Series(names[1], validated, colours[1], sparse=True))
            levels = (line.get(f"{key}_chance", plot.chance(line)) for line in run.lines) if points else ()
            chance += [level for level in levels if level is not None][:1]
    return chart(plot.label, plot.unit, [s for s in series if s.points], chance=chance, log=plot.log)


def _pictures(run: Run, image_ids: set[str]) -> tuple[dict[str, str], str]:
    if not image_ids:
        older = not any("image_id" in sample for line in run.lines for sample in line.get("captions") or ())
        return {}, "of a version that kept no image_id with its texts, so their images are not shown." if older else ""
    from qformer.report.pictures import held_out_pictures  # only now what imports torch

    return held_out_pictures(run.config, image_ids)


def _config_text(run: Run) -> str:
    path = run.folder / "config.yaml" if run.folder else None
    return path.read_text(encoding="utf-8") if path and path.is_file() else ""


def _last(run: Run, key: str) -> str | None:
    points = run.points(key)
    return number(points[-1][1]) if points else None


def _of(run: Run, key: str, summary: Callable[[list[float]], float], scale: float = 1.0) -> str | None:
    finite = [value for _, value in _scaled(run, key, scale) if math.isfinite(value)]
    return number(summary(finite)) if finite else None


def _scaled(run: Run, key: str, scale: float) -> list[tuple[float, float]]:
    return [(step, value * scale) for step, value in run.points(key)]


def _progress(run: Run) -> str:
    steps = run.setting("train", "max_steps")
    return f"{run.step} of {steps}" if steps else str(run.step)


def _last_written(run: Run) -> str | None:
    """When a run that is not at its last step wrote its last line."""
    if run.folder is None or run.step == run.setting("train", "max_steps"):
        return None
    return time.strftime("%b %d, %H:%M", time.localtime((run.folder / METRICS_FILE).stat().st_mtime))


def _warned(run: Run) -> list[dict[str, Any]]:
    return [line for line in run.warnings or () if line.get("level") != "INFO"]


def _others(runs: Sequence[Run]) -> list[Plot]:
    """What no other chart shows: keys of a stage or version that this report does not know."""
    known = {key for plot in (*LOSSES, *MEASURES, *OPTIMISER, *SPEED, DROPPED) for key in plot.keys} | set(CONSTANTS)
    keys = dict.fromkeys(key.removeprefix("validation_") for run in runs for key in run.metrics())
    odd = [key for key in keys if key not in known and f"validation_{key}" not in known]
    return [_one(key, key) for key in odd if not key.endswith("_chance") and not key.startswith("gradient_norm_")]


def _gradient_by_part(runs: Sequence[Run]) -> Html:
    prefix = "gradient_norm_"
    keys = dict.fromkeys(key for run in runs for key in run.metrics() if key.startswith(prefix))
    plot = Plot("norm of the gradient", "", {key: key.removeprefix(prefix).replace("_", " ") for key in keys}, log=True)
    drawn = draw([plot], runs)
    return folded("The gradient's norm in each part", drawn) if drawn and len(runs) > 1 else drawn
