"""What a Shapes experiment shows: the rows of its table, and its report, one HTML file that needs nothing outside itself."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from resumable import duration

from qformer.report.answers import answer_cards
from qformer.report.page import Html, Page, definitions, gallery, joined, soft, strong, table
from qformer.report.run import Run
from qformer.report.sections import add_runs

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


def write_report(
    path: Path, *, title: str, results: dict[str, Any], runs: Sequence[Run], examples: Sequence[dict[str, Any]]
) -> None:
    """Write the report of an experiment: questions, tables, then all that the report of a run has.

    Args:
        results: what `results.json` holds: `seconds`, `cpu`, `cores`, `device`, `table`.
        runs: that are shown, by their titles.
        examples: entries of `results` of an evaluation, see `choose_examples`.
    """
    page = Page(title, _lead(results))
    page.add(
        "Questions about held-out images",
        gallery(answer_cards(examples)),
        note="Chosen to show every kind of question and some failures; how often the answers are right is in the table.",
    )
    page.add("Accuracy on held-out questions, in percent", _tables(results["table"]))
    add_runs(page, [run for run in runs if run.lines])
    page.write(path)


def overall(score: dict[str, Any]) -> str:
    """The overall accuracy of a row; over several seeds their mean and, in brackets, the smallest and the largest."""
    if len(score.get("seeds", [])) < 2:
        return f"{score['overall']:.1f}"
    low, high = score["spread"]
    return f"{score['overall']:.1f} ({low:.1f}-{high:.1f})"


def _lead(results: dict[str, Any]) -> str:
    cores = f"{results['cores']} core{'s' * (results['cores'] != 1)}"
    device = "" if results.get("device", "cpu") == "cpu" else f" and {results['device']}"
    return (
        f"Trained and evaluated in {duration(results['seconds'])} on {results['cpu']} ({cores}){device}. A small frozen "
        "image encoder and a small frozen language model; only the Q-Former between them learnt, from pictures with "
        "captions, never from a question."
    )


def _tables(of_llms: dict[str, dict[str, dict[str, Any]]]) -> Html:
    parts = []
    for llm, scores in of_llms.items():
        types = list(dict.fromkeys(t for score in scores.values() for t in score["by_type"]))
        rows: list[list[object]] = []
        for key in (k for k in ROWS if k in scores):
            by_type = scores[key]["by_type"]
            cells = [f"{by_type[t]:.1f}" if t in by_type else None for t in types]
            rows.append([ROWS[key][0], strong(overall(scores[key])), *cells, scores[key]["n"]])
        parts.append(table(["", "overall", *types, "questions"], rows, caption=LLM_TITLES.get(llm, llm)))
    if any(len(score.get("seeds", [])) > 1 for scores in of_llms.values() for score in scores.values()):
        parts.append(soft("Means over seeds; in brackets the lowest and highest overall accuracy."))
    return joined([*parts, definitions(ROWS[k] for k in ROWS if any(k in scores for scores in of_llms.values()))])
