"""Numbers over optimizer steps as inline SVG: it takes the page's colours, light and dark, and its text stays text."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

from qformer.report.page import Html, markup
from qformer.report.style import COLOURS

Point = tuple[float, float]  # step, value; a value that is not finite is a gap
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 340, 200, 42, 332, 10, 172
MOST_POINTS = 400  # of a line; more are averaged, since a screen shows no more


class Series(NamedTuple):
    """One line of a chart.

    Args:
        colour: its number, 0 and up.
        sparse: measured now and then, as in validations: a dot for each value.
    """

    name: str
    points: Sequence[Point]
    colour: int = 0
    sparse: bool = False


class _Frame(NamedTuple):
    """Where values stand in the drawing."""

    first: float
    last: float
    low: float
    high: float
    log: bool

    def x(self, step: float) -> float:
        return LEFT + (RIGHT - LEFT) * (step - self.first) / ((self.last - self.first) or 1)

    def y(self, value: float) -> float:
        low, high = (math.log10(self.low), math.log10(self.high)) if self.log else (self.low, self.high)
        at = math.log10(max(value, self.low)) if self.log else value
        return BOTTOM - (BOTTOM - TOP) * (at - low) / ((high - low) or 1)


def chart(label: str, unit: str, series: Sequence[Series], *, chance: Sequence[float] = (), log: bool = False) -> Html:
    """One drawing of one or more series over the steps, with the last value of each in its legend.

    Args:
        unit: of the values, "" for none.
        chance: levels of a model that has learnt nothing, dashed.
        log: a logarithmic axis, where all values are above 0.

    Returns: empty where no series has a finite value.
    """
    shown = [s._replace(points=_thinned(s.points)) for s in series if any(math.isfinite(y) for _, y in s.points)]
    if not shown:
        return Html("")
    frame = _frame([p for s in shown for p in s.points if math.isfinite(p[1])], chance, log)
    titled = f"{label}, {unit}" if unit else label
    drawn = [*_axes(frame), *_levels(frame, chance)]
    for s in shown:
        drawn += _line(frame, s)
    return Html(
        f"<figure><figcaption>{markup(titled)}</figcaption>"
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(f"{titled}, over steps")}">'
        f'{"".join(drawn)}</svg><div class="key">{"".join(map(_legend, shown))}</div></figure>\n'
    )


def curves(charts: Sequence[Html]) -> Html:
    """Charts side by side, as many as fit; empty without any."""
    return Html(f'<div class="curves">\n{"".join(charts)}</div>\n' if any(charts) else "")


def number(value: float) -> str:
    """A number at three digits, with k, M or G for thousands and more."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if letter == 'k' else size):.3g}{letter}"
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _thinned(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points; each is the mean of as many neighbours, not finite when one of them is not."""
    size = -(-len(points) // MOST_POINTS)
    if size <= 1:
        return list(points)
    groups = [points[i : i + size] for i in range(0, len(points), size)]
    return [(group[-1][0], sum(y for _, y in group) / len(group)) for group in groups]


def _frame(points: Sequence[Point], chance: Sequence[float], log: bool) -> _Frame:
    steps, values = [x for x, _ in points], [*(y for _, y in points), *chance]
    low, high = min(values), max(values)
    if log and low > 0 and high > 10 * low:
        return _Frame(min(0.0, *steps), max(steps), 10 ** math.floor(math.log10(low)), high * 1.2, True)
    if 0 <= low <= 0.6 * high:  # near enough to show how far from nothing they are
        low = 0.0
    margin = 0.06 * ((high - low) or abs(high) or 1.0)
    return _Frame(min(0.0, *steps), max(steps), low if low == 0 else low - margin, high + margin, False)


def _ticks(low: float, high: float, most: int) -> list[tuple[float, str]]:
    """Up to `most` or one more round values from low to high, each as it is written."""
    rough = (high - low) / most
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 2.5, 5, 10) if size * m >= rough * 0.999)
    places = max(0, -math.floor(math.log10(step)) + (round(step / 10.0 ** math.floor(math.log10(step)), 3) == 2.5))
    values = [step * i for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]
    return [(v, f"{v:.{places}f}" if step >= 1e-4 and abs(v) < 1e4 else number(v)) for v in values]


def _powers(frame: _Frame) -> list[tuple[float, str]]:
    powers = range(round(math.log10(frame.low)), math.floor(math.log10(frame.high)) + 1)
    return [(10.0**power, number(10.0**power)) for power in powers[:: -(-len(powers) // 6)]]


def _axes(frame: _Frame) -> list[str]:
    drawn = []
    for value, text in _powers(frame) if frame.log else _ticks(frame.low, frame.high, 4):
        y = frame.y(value)
        drawn.append(f'<path class="ruled" d="M{LEFT},{y:.1f}H{RIGHT}"/>')
        drawn.append(f'<text x="{LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{text}</text>')
    drawn.append(f'<path class="axis" d="M{LEFT},{TOP}V{BOTTOM}H{RIGHT}"/>')
    for step, text in _ticks(frame.first, max(frame.last, frame.first + 1), 4):
        x = frame.x(step)
        anchor = "end" if x > RIGHT - 12 else "middle"
        drawn.append(f'<path class="axis" d="M{x:.1f},{BOTTOM}v3"/>')
        drawn.append(f'<text x="{x:.1f}" y="{BOTTOM + 16}" text-anchor="{anchor}">{text}</text>')
    return drawn


def _levels(frame: _Frame, chance: Sequence[float]) -> list[str]:
    drawn, labelled = [], -math.inf
    for value in sorted(set(chance), reverse=True):
        y = frame.y(value)
        drawn.append(f'<path class="chance" d="M{LEFT},{y:.1f}H{RIGHT}"/>')
        if y - labelled > 12:
            above = y - 4 if y > TOP + 14 else y + 13
            drawn.append(
                f'<text class="level" x="{RIGHT}" y="{above:.1f}" text-anchor="end">chance {number(value)}</text>'
            )
            labelled = y
    return drawn


def _line(frame: _Frame, series: Series) -> list[str]:
    """The pieces between gaps, and dots where values are sparse or alone."""
    colour = f"var(--c{series.colour % COLOURS})"
    pieces: list[list[Point]] = [[]]
    for step, value in series.points:
        if math.isfinite(value):
            pieces[-1].append((step, value))
        elif pieces[-1]:
            pieces.append([])
    drawn = []
    for piece in filter(None, pieces):
        if len(piece) > 1:
            path = " ".join(f"{frame.x(step):.1f},{frame.y(value):.1f}" for step, value in piece)
            kind = "line dotted" if series.sparse or series.colour >= COLOURS else "line"
            drawn.append(f'<polyline class="{kind}" style="stroke:{colour}" points="{path}"/>')
        for step, value in piece if series.sparse or len(piece) == 1 else ():
            note = escape(f"{series.name}, step {step:g}: {value:.4g}")
            drawn.append(
                f'<circle r="3" style="fill:{colour}" cx="{frame.x(step):.1f}" cy="{frame.y(value):.1f}">'
                f"<title>{note}</title></circle>"
            )
    return drawn


def _legend(series: Series) -> str:
    finite = [y for _, y in series.points if math.isfinite(y)]
    gaps = len(series.points) - len(finite)
    not_finite = f" ({gaps} not finite)" if gaps else ""
    mark = "•" if series.sparse else "—"
    return (
        f'<span style="color:var(--c{series.colour % COLOURS})">{mark} {markup(series.name)} {number(finite[-1])}'
        f"{not_finite}</span>"
    )
