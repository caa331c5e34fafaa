"""What a journey through photographs came to: results.json, report.html, tables in the terminal."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resumable import Experiment, describe_machine, duration
from rich.table import Table

from qformer.attention.picture import draw_attention, images_of
from qformer.config import Stage2Config
from qformer.data import read_records
from qformer.files import atomic_file
from qformer.inference import load
from qformer.report.answers import answer_cards, choose_examples
from qformer.report.page import Card, Html, Page, gallery, image_uri, picture, quiet, strong, table
from qformer.report.run import read_run
from qformer.report.sections import add_runs

if TYPE_CHECKING:
    from journey import Journey, Row

CAPTIONS = {"CIDEr": "CIDEr-D", "Bleu_4": "BLEU-4", "Bleu_1": "BLEU-1"}  # by the key in an evaluation's scores
DIRECTIONS = {"image_to_text": "TR", "text_to_image": "IR"}
QUESTIONS = {"text_only": "text only", "oracle_caption": "oracle caption", "stage1_2": "stage 1 + 2, captions only"}
PUBLISHED = (
    "Published on Flickr8k's test photographs: retrieval TR@1 / IR@1 16.5 / 11.8 (DVSA) and 31.0 / 21.3 (FV); captions BLEU-4 "
    "21.3 (Show, Attend and Tell), BLEU-1 63 (NIC). These were trained to their end, and are of other held-out photographs than here."
)
SHOWN, LOOKED_AT = 18, 3  # photographs in a section of the report, and in that on attention


def conclude(experiment: Experiment, journey: "Journey", rows: "Mapping[str, Row]") -> dict[str, Any]:
    """Write `results.json` and `report.html`, and print the tables and where things are."""
    results = {"seconds": round(experiment.seconds, 1), **describe_machine(), "steps": [journey.steps1, journey.steps2]}
    results["rows"] = {name: _row(experiment, journey, name, row) for name, row in rows.items()}
    retrieval = _read(journey.json_of("retrieval", "stage1"))
    results["retrieval"] = {retrieval["rule"]: retrieval["scores"], **retrieval["other_rules"], "n": retrieval["n"]}
    files = {name: journey.json_of("answers", name) for name in QUESTIONS}
    answered = {name: _read(file) for name, file in files.items() if file.is_file()}
    results["questions"] = {
        name: {"overall": evaluation["scores"]["overall"], "by_type": evaluation["by_type"], "n": evaluation["n"]}
        for name, evaluation in answered.items()
    }
    with atomic_file(journey.out / "results.json") as scratch:
        scratch.write_text(json.dumps(results, indent=1) + "\n")
    tables = _tables(results, rows)
    _write_report(journey, results, tables, rows)
    for title, (head, lines) in tables.items():
        shown = Table(title=title, title_justify="left")
        for name in head:
            shown.add_column(name, justify="left" if name == head[0] else "right")
        for line in lines:
            shown.add_row(*line)
        experiment.console.print(shown)
    experiment.console.print(f"{duration(experiment.seconds)} in all on {results['cpu']}, {results['cores']} cores")
    experiment.console.print(f"report: {journey.out / 'report.html'}")
    return results


def _row(experiment: Experiment, journey: "Journey", name: str, row: "Row") -> dict[str, Any]:
    """A row of the table: scores of captions, validation losses by step, seconds, tokens that the language model reads."""
    captions = _read(journey.json_of("captions", name))
    run, spent = read_run(journey.out / name), experiment.part_seconds.get(f"captions {name}", 0.0)
    stage1 = training_seconds(journey.out / row.stage1) if row.stage1 else 0.0
    manifest = json.loads((journey.out / "features" / "manifest.json").read_text())
    tokens = journey.config(Stage2Config).qformer.queries
    if row.pooled:
        tokens = manifest["features"]["num_tokens"] if row.pooled == "null" else int(row.pooled)
    return {
        "title": row.title,
        "captions": captions["scores"],
        "photographs": captions["n"],
        "validation_loss": {str(int(step)): loss for step, loss in run.points("validation_lm")},
        "steps": run.step,
        "seconds": {"stage1": round(stage1, 1), "stage2": round(training_seconds(journey.out / name), 1)},
        "seconds_a_caption": round(spent / max(1, captions["n"]), 3),
        "tokens": tokens,
    }


def training_seconds(run_dir: Path) -> float:
    """Seconds that a run has trained and validated for, over all interruptions, by what it logged."""
    run, seconds, before = read_run(run_dir), 0.0, 0.0
    for step, speed in run.points("samples_per_s"):
        seconds += (step - before) * run.setting("train", "global_batch_size") / speed
        before = step
    return seconds


def _tables(results: dict[str, Any], rows: "Mapping[str, Row]") -> dict[str, tuple[list[str], list[list[str]]]]:
    """Head and lines of each table, by its title."""
    captions, training = [], []
    for name in rows:
        row = results["rows"][name]
        scores = [f"{100 * row['captions'][key]:.1f}" for key in CAPTIONS]
        captions.append([row["title"], *scores, str(row["tokens"]), f"{row['seconds_a_caption']:.2f}"])
        losses = ", ".join(f"{loss:.3f} ({step})" for step, loss in row["validation_loss"].items())
        spent = [duration(sum(row["seconds"].values())), duration(row["seconds"]["stage1"])]
        training.append([row["title"], *spent, losses])
    n = results["retrieval"]["n"]
    recalls = [
        [rule, *(f"{value:.1f}" for way in DIRECTIONS for value in results["retrieval"][rule][way].values())]
        for rule in results["retrieval"] if rule != "n"
    ]  # fmt: skip
    ranks = [f"{name}@{k}" for way, name in DIRECTIONS.items() for k in results["retrieval"]["itc"][way]]
    titles = {
        "Captions (hundredfold, as papers have them)": (["", *CAPTIONS.values(), "tokens", "s a caption"], captions),
        "Training": (["", "time", "of it stage 1", "validation loss (steps)"], training),
        f"Retrieval among {n['images']} photographs and {n['captions']} captions, percent": (["", *ranks], recalls),
    }
    if results["questions"]:
        kinds = list(next(iter(results["questions"].values()))["by_type"])
        answers = [
            [QUESTIONS[name], f"{score['overall']:.1f}", *(f"{score['by_type'][kind]:.1f}" for kind in kinds)]
            for name, score in results["questions"].items()
        ]
        titles["Questions derived from captions, percent (text only by likelihood, the others by pmi)"] = (
            ["", "overall", *kinds],
            answers,
        )
    return titles


def _write_report(
    journey: "Journey", results: dict[str, Any], tables: dict[str, tuple[list[str], list[list[str]]]],
    rows: "Mapping[str, Row]",
) -> None:  # fmt: skip
    steps = f"{journey.steps1} steps of stage 1, {journey.steps2} of stage 2, seed {journey.seed}"
    page = Page(
        "Photographs", f"{duration(results['seconds'])} on {results['cpu']}, {results['cores']} cores; {steps}."
    )
    page.add(
        "Captions", gallery(_caption_cards(journey, rows)), note="Held-out photographs; in grey what a person wrote."
    )
    if results["questions"]:
        answers = _read(journey.json_of("answers", "stage1_2"))["results"]
        note = "Trained on captions alone. The answer that the photograph makes likelier than the question alone (pmi)."
        page.add("Answers", gallery(answer_cards(choose_examples(answers))), note=note)
    page.add("Retrieval", gallery(_retrieval_cards(journey)), note="The three captions that stage 1 finds best.")
    note = "What speaks for each word of a caption, and where each query of stage 1 looks."
    page.add("Attention", *_attention(journey), note=note)
    page.add("Tables", *(table(head, lines, caption=title) for title, (head, lines) in tables.items()), note=PUBLISHED)
    names = dict.fromkeys([*(row.stage1 for row in rows.values() if row.stage1), *rows])
    add_runs(page, [read_run(journey.out / name, name) for name in names])
    page.write(journey.out / "report.html")


def _pictures(journey: "Journey") -> dict[str, Path]:
    """The photographs that questions are asked about, which lie in a folder, by image_id."""
    lines = journey.questions_file.read_text().splitlines()
    return {str(line["image_id"]): Path(line["image"]) for line in map(json.loads, lines)}


def _caption_cards(journey: "Journey", rows: "Mapping[str, Row]") -> list[Card]:
    """Photographs, each with what every row wrote of it."""
    written = {name: _by_image(journey.json_of("captions", name)) for name in rows}
    cards: list[Card] = []
    for image_id, path in _pictures(journey).items():
        if all(image_id in captions for captions in written.values()) and len(cards) < SHOWN:
            lines = [f"{rows[name].title}: {captions[image_id]['caption']}" for name, captions in written.items()]
            person = quiet(next(iter(written.values()))[image_id]["references"][0])
            cards.append(Card(image_uri(path, 320), [*lines, person], alt="a held-out photograph"))
    return cards


def _retrieval_cards(journey: "Journey") -> list[Card]:
    """Photographs, each with the three captions that fit it best; its own stand out."""
    lists = _by_image(journey.json_of("retrieval", "stage1"))
    records = read_records(journey.dev, key="--dev")
    captions: dict[str, list[str]] = {}
    for record in (records[i] for i in range(len(records))):
        captions.setdefault(str(record.image_id), []).extend(record.captions)
    cards: list[Card] = []
    for image_id, path in _pictures(journey).items():
        if image_id in lists and len(cards) < SHOWN:
            lines = []
            for label in lists[image_id]["retrieved"]["captions"][:3]:
                owner, _, number = label.rpartition("#")
                text = captions[owner][int(number)]
                lines.append(strong(f"{text} ✓") if owner == image_id else text)
            kind = "right" if lists[image_id]["retrieved"]["captions"][0].rpartition("#")[0] == image_id else "wrong"
            cards.append(Card(image_uri(path, 320), lines, kind, alt="a held-out photograph"))
    return cards


def _attention(journey: "Journey") -> list[Html]:
    """Sheets of what stage 1 looks at in a few photographs, beside a caption of each."""
    lines = map(json.loads, journey.questions_file.read_text().splitlines())
    captions = {line["image"]: line["caption"][0] for line in lines}
    model, sheets = load(journey.out / "stage1"), []
    for path, caption in list(captions.items())[:LOOKED_AT]:
        look = model.attention(path, caption)
        sheet = draw_attention(look, images_of(path, model.transform), caption)
        sheets.append(picture(image_uri(sheet), caption))
    return sheets


def _by_image(file: Path) -> dict[str, dict[str, Any]]:
    return {str(result["image_id"]): result for result in _read(file)["results"]}


def _read(file: Path) -> dict[str, Any]:
    """What stages/evaluate.py wrote with --json."""
    return json.loads(file.read_text())
