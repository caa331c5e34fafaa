"""How a Shapes experiment came out: its scores, tables and report; for demo and reproduce."""

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

sys.path.append(str(Path(__file__).resolve().parents[1]))  # what all examples share; all scripts here import this first
from results import LLM_TITLES, ROWS, overall, write_report
from resumable import Experiment, describe_machine, duration

from qformer.report.answers import choose_examples
from qformer.report.run import read_run


def conclude(
    experiment: Experiment, title: str, table: dict[str, dict[str, Any]], *, runs: Mapping[str, Path], answers: Path
) -> dict[str, Any]:
    """Write `results.json` and `report.html`, and print the table and where things are.

    Args:
        table: LLM, row of the table, score.
        runs: run folders that the report shows, by title.
        answers: the evaluation whose pictures and answers the report shows.
    """
    results = {"seconds": round(experiment.seconds, 1), **describe_machine(), "table": table}
    (experiment.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    shown = [read_run(run_dir, name) for name, run_dir in runs.items()]
    examples = choose_examples(read_answers(answers)["results"])
    write_report(experiment.out / "report.html", title=title, results=results, runs=shown, examples=examples)
    experiment.console.print()
    for llm, scores in table.items():
        experiment.console.print(terminal_table(LLM_TITLES.get(llm, llm), scores))
    device = "" if results["device"] == "cpu" else f" and {results['device']}"
    machine = f"{results['cpu']}, {results['cores']} cores{device}"
    experiment.console.print(f"{duration(experiment.seconds)} in all on {machine}")
    experiment.console.print(f"report: {experiment.out / 'report.html'}")
    return results


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


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
