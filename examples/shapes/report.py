"""One HTML file that shows a Shapes experiment: pictures with answers, tables, loss curves. It needs nothing outside itself."""

import base64
import mimetypes
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from resumable import duration

from qformer.metrics import vqa_accuracy

ROWS = {  # key of results.json: title, what it is
    "text_only": (
        "text only",
        "The language model alone, asked without the image: what a guess from the question is worth.",
    ),
    "oracle_caption": (
        "oracle caption",
        "The language model alone, given a true caption of the image as text: about as much as it could answer "
        "if the Q-Former handed on everything.",
    ),
    "stage2_only": ("stage 2 only", "Stage 2 from random weights, for as many steps: what stage 1 is worth."),
    "stage1_2": ("stage 1 + 2", "The Q-Former trained in stage 1, then in stage 2: the method of the paper."),
}
LLM_TITLES = {"opt": "OPT (decoder-only)", "t5": "T5 (encoder-decoder)"}
LOSSES = {
    "itc": "image-text contrast (itc)",
    "itm": "image-text matching (itm)",
    "itg": "image-grounded text generation (itg)",
    "lm": "language-model loss of captions (lm)",
}
RECALLS = {
    "validation_image_to_text_recall_1": "image to text",
    "validation_text_to_image_recall_1": "text to image",
}
Point = tuple[float, float]

STYLE = """
:root { color-scheme: light dark; --ground: #fff; --card: #f5f5f2; --text: #1c1c1a; --soft: #66665f; --line: #d8d8d2;
  --right: #18794e; --wrong: #b42318; --train: #2f5fd0; --held: #b4540a; }
@media (prefers-color-scheme: dark) { :root { --ground: #161615; --card: #21211f; --text: #ecece6; --soft: #a3a39a;
  --line: #3c3c38; --right: #4cc38a; --wrong: #ff8a7a; --train: #8fb0ff; --held: #ffb066; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 72rem; padding: 1.5rem 1rem 4rem; background: var(--ground); color: var(--text);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.6rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2.5rem 0 .5rem; } h3 { font-size: 1rem; }
p, dl { max-width: 44rem; } .soft { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; margin: .5rem 0 1rem; }
caption { text-align: left; font-weight: 600; padding: .3rem 0; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th:first-child { text-align: left; } thead th { color: var(--soft); font-weight: 500; } .overall { font-weight: 650; }
dt { font-weight: 600; } dd { margin: 0 0 .5rem; color: var(--soft); }
.grid { display: grid; gap: .8rem; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); }
.grid figure { margin: 0; padding: .6rem; background: var(--card); border-radius: .5rem; font-size: .9rem;
  border: 2px solid transparent; }
.grid figure.wrong { border: 2px dashed var(--wrong); }
.grid img { width: 100%; aspect-ratio: 1; border-radius: .3rem; display: block; margin-bottom: .4rem; }
.said { font-weight: 650; } .right .said { color: var(--right); } .wrong .said { color: var(--wrong); }
.curves { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(17rem, 1fr)); }
.curves figure { margin: 0; } figcaption { font-size: .9rem; }
svg { width: 100%; height: auto; display: block; } svg text { font: 11px system-ui, sans-serif; fill: var(--soft); }
.axis { stroke: var(--line); } .chance { stroke: var(--text); stroke-dasharray: 5 4; } .line { fill: none; stroke-width: 2; }
.train { stroke: var(--train); } .held { stroke: var(--held); } circle { fill: var(--held); }
"""


def write_report(
    path: Path,
    *,
    title: str,
    results: dict[str, Any],
    curves: dict[str, list[dict[str, Any]]],
    examples: Sequence[dict[str, Any]],
) -> None:
    """Write the report as one HTML file: no scripts, no links, pictures inside.

    Args:
        results: what `results.json` holds: `seconds`, `cpu`, `cores`, `device`, `table`.
        curves: lines of `metrics.jsonl` of each run that is shown, by its title.
        examples: entries of `results` of an evaluation, see `choose_examples`.
    """
    sections = (_header(title, results), _examples(examples), _tables(results["table"]), _curves(curves))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n{''.join(sections)}</body>\n</html>\n",
        encoding="utf-8",
    )


def choose_examples(results: Sequence[dict[str, Any]], count: int = 24, failures: int = 6) -> list[dict[str, Any]]:
    """Up to `count` results on different pictures, kinds of question in turn; up to `failures` of them wrong."""
    wrong = _in_turn([r for r in results if not is_right(r)], failures, set())
    chosen = wrong + _in_turn([r for r in results if is_right(r)], count - len(wrong), {r["image"] for r in wrong})
    order = {id(r): i for i, r in enumerate(results)}
    return sorted(chosen, key=lambda r: order[id(r)])


def is_right(result: dict[str, Any]) -> bool:
    """Whether an answer counts in full by the VQA accuracy of the table."""
    return vqa_accuracy(result["answer"], list(result["answers"])) >= 1


def overall(score: dict[str, Any]) -> str:
    """The overall accuracy of a row; over several seeds their mean and, in brackets, the smallest and the largest."""
    if len(score.get("seeds", [])) < 2:
        return f"{score['overall']:.1f}"
    low, high = score["spread"]
    return f"{score['overall']:.1f} ({low:.1f}-{high:.1f})"


def _in_turn(results: list[dict[str, Any]], count: int, pictures: set[str]) -> list[dict[str, Any]]:
    """`count` results, one of each kind in turn, none on a picture in `pictures` or twice on the same."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for result in results:
        kinds.setdefault(result["question_type"] or "all", []).append(result)
    shown = set(pictures)
    chosen: list[dict[str, Any]] = []
    while len(chosen) < count and any(kinds.values()):
        for waiting in kinds.values():
            candidate = next((r for r in waiting if r["image"] not in shown), None)
            waiting[:] = [] if candidate is None else waiting[waiting.index(candidate) + 1 :]
            if candidate is not None and len(chosen) < count:
                chosen.append(candidate)
                shown.add(candidate["image"])
    return chosen


def _header(title: str, results: dict[str, Any]) -> str:
    cores = f"{results['cores']} core{'s' * (results['cores'] != 1)}"
    device = "" if results.get("device", "cpu") == "cpu" else f" and {escape(results['device'])}"
    return (
        f"<h1>{escape(title)}</h1>\n<p class=soft>Trained and evaluated in {duration(results['seconds'])} on "
        f"{escape(results['cpu'])} ({cores}){device}. A small frozen image encoder and a small frozen language model; only "
        "the Q-Former between them learnt, from pictures with captions, never from a question.</p>\n"
    )


def _examples(examples: Sequence[dict[str, Any]]) -> str:
    if not examples:
        return ""
    cards = []
    for example in examples:
        right, truth = is_right(example), " / ".join(dict.fromkeys(example["answers"]))
        cards.append(
            f'<figure class="{"right" if right else "wrong"}"><img alt="a held-out image" src="{_data_uri(example["image"])}">'
            f"<figcaption>{escape(example['question'])}<br>answer: <span class=said>{escape(example['answer']) or '(nothing)'}"
            f" {'✓' if right else '✗ wrong'}</span><br><span class=soft>truth: {escape(truth)}</span></figcaption></figure>\n"
        )
    return (
        "<h2>Questions about held-out images</h2>\n<p class=soft>Chosen to show every kind of question and some failures; "
        f"how often the answers are right is in the table.</p>\n<div class=grid>\n{''.join(cards)}</div>\n"
    )


def _data_uri(image: str) -> str:
    kind = mimetypes.guess_type(image)[0] or "image/png"
    return f"data:{kind};base64,{base64.b64encode(Path(image).read_bytes()).decode()}"


def _tables(table: dict[str, dict[str, dict[str, Any]]]) -> str:
    parts = ["<h2>Accuracy on held-out questions, in percent</h2>\n"]
    for llm, scores in table.items():
        types = list(dict.fromkeys(t for score in scores.values() for t in score["by_type"]))
        head = "".join(f"<th scope=col>{escape(name)}</th>" for name in ("", "overall", *types, "questions"))
        rows = []
        for key in (k for k in ROWS if k in scores):
            score = scores[key]
            cells = "".join(
                f"<td>{score['by_type'][t]:.1f}</td>" if t in score["by_type"] else "<td></td>" for t in types
            )
            rows.append(
                f"<tr><th scope=row>{ROWS[key][0]}</th><td class=overall>{overall(score)}</td>{cells}<td>{score['n']}</td></tr>\n"
            )
        parts.append(
            f"<div class=wide><table><caption>{escape(LLM_TITLES.get(llm, llm))}</caption>\n"
            f"<thead><tr>{head}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody></table></div>\n"
        )
    shown = [key for key in ROWS if any(key in scores for scores in table.values())]
    if any(len(score.get("seeds", [])) > 1 for scores in table.values() for score in scores.values()):
        parts.append("<p class=soft>Means over seeds; in brackets the lowest and highest overall accuracy.</p>\n")
    return "".join(parts) + f"<dl>{''.join(f'<dt>{ROWS[k][0]}</dt><dd>{ROWS[k][1]}</dd>' for k in shown)}</dl>\n"


def _curves(curves: dict[str, list[dict[str, Any]]]) -> str:
    parts = []
    for name, lines in curves.items():
        figures = []
        for loss, label in LOSSES.items():
            if train := _points(lines, loss):
                chance = next((p[1] for p in _points(lines, f"{loss}_chance")), None)
                shown = {"training": train, "held-out": _points(lines, f"validation_{loss}")}
                figures.append(_chart(label, "nats", shown, chance))
        recalls = {label: points for key, label in RECALLS.items() if (points := _points(lines, key))}
        if recalls:
            figures.append(_chart("held-out recall@1", "percent", recalls, None))
        if figures:
            parts.append(f"<h3>{escape(name)}</h3>\n<div class=curves>\n{''.join(figures)}</div>\n")
    if not parts:
        return ""
    return (
        "<h2>Training</h2>\n<p class=soft>Over optimizer steps. The dashed line is chance: the loss of a model that has "
        f"learnt nothing.</p>\n{''.join(parts)}"
    )


def _points(lines: list[dict[str, Any]], key: str) -> list[Point]:
    """(step, value) wherever a line has a number under `key`; a NaN is written as a string and left out."""
    return [(line["step"], line[key]) for line in lines if isinstance(line.get(key), int | float)]


def _chart(label: str, unit: str, series: dict[str, list[Point]], chance: float | None) -> str:
    """One SVG: the first series as a line in the training colour, the second dotted in the held-out one."""
    width, height, left, right, top, bottom = 320, 190, 36, 310, 12, 162
    points = [p for s in series.values() for p in s]
    last = max(x for x, _ in points) or 1
    highest = 1.08 * max([y for _, y in points] + ([chance] if chance is not None else [])) or 1.0

    def place(x: float, y: float) -> str:
        return f"{left + (right - left) * x / last:.1f},{bottom - (bottom - top) * max(0.0, y) / highest:.1f}"

    drawn = [f'<path class="axis" fill="none" d="M{left},{top}V{bottom}H{right}"/>']
    for value in (0, highest / 2, highest):
        y = place(0, value).split(",")[1]
        drawn.append(f'<text x="{left - 5}" y="{float(y) + 4:.1f}" text-anchor="end">{value:.3g}</text>')
    drawn.append(f'<text x="{left}" y="{height - 12}">0</text>')
    drawn.append(f'<text x="{right}" y="{height - 12}" text-anchor="end">{last:g} steps</text>')
    if chance is not None:
        (x, y), end = place(0, chance).split(","), place(last, chance).split(",")[0]
        drawn.append(f'<line class="chance" x1="{x}" x2="{end}" y1="{y}" y2="{y}"/>')
        drawn.append(f'<text x="{right}" y="{float(y) - 4:.1f}" text-anchor="end">chance {chance:.3g}</text>')
    legend = []
    for colour, mark, (name, s) in zip(("train", "held"), ("—", "•"), series.items(), strict=False):
        if s:
            drawn.append(f'<polyline class="line {colour}" points="{" ".join(place(x, y) for x, y in s)}"/>')
            legend.append(f'<span style="color:var(--{colour})">{mark} {escape(name)} {s[-1][1]:.3g}</span>')
        if colour == "held":
            drawn += ['<circle r="3.5" cx="{}" cy="{}"/>'.format(*place(x, y).split(",")) for x, y in s]
    description = f"{label} over training, {unit}"
    return (
        f'<figure><svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(description)}">{"".join(drawn)}</svg>'
        f"<figcaption>{escape(label)}, {unit}<br>{' &nbsp; '.join(legend)}</figcaption></figure>\n"
    )
