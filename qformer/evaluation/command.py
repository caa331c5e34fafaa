"""An evaluation from start to end: mistakes first, then outputs, then what is printed and written."""

import hashlib
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from qformer.config import Protocol
from qformer.config.protocol import PMI
from qformer.data import Record, read_records
from qformer.evaluation import TASKS, Scores, Task
from qformer.evaluation.choosing import CHOICES, Chosen, choose, lack_of_use, read_candidates
from qformer.evaluation.comparing import NAME as SIMILARITY
from qformer.evaluation.comparing import Similarity, compare_outputs
from qformer.evaluation.outputs import OutputFile, read_predictions, write_submission
from qformer.evaluation.task import OPTIONS
from qformer.evaluation.vqa import TEXT_ONLY
from qformer.files import atomic_file


def evaluate(
    paths: Sequence[str], protocol: Protocol, *, predictions: Path | None = None, root: str | None = None,
    limit: int | None = None, answers: Path | None = None, json_file: Path | None = None, submit: Path | None = None,
    batch_size: int = 64, workers: int = 2, device: str | None = None, similarity: str | None = None,
) -> None:  # fmt: skip
    """Ask an adapter, or take `predictions`, score the outputs, print the scores and write what is asked for.

    Args:
        paths: an adapter folder and sources of records; with `predictions` an adapter folder may be left out.
        limit: only the first records; of a task that counts images, the first images.
        answers: a file that grows while outputs are computed; begun again with it, a run goes on where it stopped.
        json_file: scores and every output.
        submit: outputs alone, as official servers take them.
        workers: processes of each rank that read images.
        similarity: a stage-1 adapter, by which images and captions are compared as well.

    Raises: ValueError when a record lacks what the task needs, an option or a file does not fit.
    """
    kind = TASKS[protocol.task].with_names(protocol.id_name, protocol.output_name)
    mode = _one_of("--mode", protocol.mode, kind.modes)
    rule = _one_of("--rule", protocol.rule, kind.rules)
    if min(batch_size, 1 if limit is None else limit) < 1 or workers < 0:
        raise ValueError("--batch-size and --limit must be at least 1, and --workers at least 0")
    generation = _generation(kind, protocol, mode)
    adapter, sources = _split(paths, predictions)
    _require_writable(None if kind.search else answers, json_file, submit)  # a search keeps a folder
    records = read_records(sources, root=root, key="RECORDS")
    chosen = choose(kind, records, mode=mode, split=protocol.split, limit=limit)
    texts = chosen.texts
    if lack := lack_of_use(kind, texts, submitted=submit is not None, written=bool(answers or json_file)):
        raise ValueError(lack)
    if "choose_from" in generation and not predictions:
        generation["choose_from"] = read_candidates(generation["choose_from"], texts) or CHOICES
    if any(map(kind.has_reference, texts)):
        kind.require(rule)
    if similarity and kind.compare is None:
        raise ValueError(f"--similarity compares images with captions; the outputs of task {protocol.task} are none")
    broken: list[str] = []
    clips = {name: getattr(protocol, name) for name in ("frames", "frame_policy")}
    run: dict[str, Any] = {"batch_size": batch_size, "workers": workers, "device": device, "clips": clips}
    if predictions:
        outputs = read_predictions(predictions, kind, texts, partly=limit is not None)
    else:
        made_of: dict[str, Any] = {"task": protocol.task, "mode": mode, "adapter": fingerprint(adapter)}
        made_of |= {"split": protocol.split, **clips, **{key: generation.get(key) for key in kind.options}}
        made_of["records"] = [os.path.abspath(s) if os.path.exists(s) else s for s in sources]
        results = _compute(adapter, kind, chosen, mode=mode, rule=rule, answers=answers, made_of=made_of,
                           generation=generation, run=run)  # fmt: skip
        if results is None:
            return  # not the first rank
        outputs, broken = results
        if len(broken) == len(texts):
            raise ValueError(f"no image could be read, the first: {broken[0]}")
    alike = compare_outputs(similarity, kind, chosen, outputs, **run) if similarity else None
    if (alike or not predictions) and not _is_first_rank():
        return
    if submit:
        write_submission(submit, kind, texts, outputs)
    scores = _score(kind, texts, outputs, rule)
    _report(kind, chosen, scores, outputs=outputs, broken=broken, source=str(predictions) if predictions else mode)
    if alike:
        print(alike)
    if protocol.reported:
        print(f"reported: {' '.join(protocol.reported.split())}")
    if json_file:
        head: dict[str, Any] = {
            "task": protocol.task,
            "mode": None if predictions else mode,
            "predictions": predictions and str(predictions),
        }
        head |= {"protocol": {key: value for key, value in asdict(protocol).items() if value is not None}}
        _write_json(json_file, head, kind, texts, outputs=outputs, scores=scores, alike=alike, dropped=len(broken))


def _compute(
    adapter: str, task: Task, chosen: Chosen, *,
    mode: str, rule: str, answers: Path | None, made_of: dict[str, Any], generation: dict[str, Any], run: dict[str, Any],
) -> tuple[list[Any], list[str]] | None:  # fmt: skip
    if task.search is not None:
        return task.search(adapter, chosen, rule=rule, folder=answers, made_of=made_of, **run, **generation)
    from qformer.evaluation.running import compute_outputs  # only now what imports torch

    file = OutputFile(answers, task, chosen.texts, made_of) if answers else None
    return compute_outputs(adapter, task, chosen, mode=mode, file=file, generation=generation, **run)


def _is_first_rank() -> bool:
    from qformer.evaluation.running import is_first_rank

    return is_first_rank()


def _generation(task: Task, protocol: Protocol, mode: str) -> dict[str, Any]:
    """What the protocol says of how the model is asked, of what it says anything; the task must read it."""
    values = {key: value for key in OPTIONS if (value := getattr(protocol, key)) is not None}
    for key in values:
        if key not in task.options:
            raise ValueError(f"{key}: task {protocol.task} does not read it; leave it out")
    if (by := values.get("choose_by")) and "choose_from" not in values:
        raise ValueError(f"choose_by={by}: an answer is written; name those to choose from, choose_from")
    if by == PMI and mode == TEXT_ONLY:
        raise ValueError(
            f"choose_by={by}: the question alone makes no answer likelier than the question alone; leave it out"
        )
    return values


def _one_of(option: str, value: str | None, choices: Sequence[str]) -> str:
    if value is not None and value not in choices:
        raise ValueError(f"{option} {value}: this task has {', '.join(choices)}")
    return value or choices[0]


def _split(paths: Sequence[str], predictions: Path | None) -> tuple[str, list[str]]:
    """The adapter folder ("" where there is none) and the sources of records."""
    if predictions and not (len(paths) > 1 and (Path(paths[0]) / "config.yaml").is_file()):
        return "", list(paths)
    if len(paths) < 2:
        raise ValueError(f"expected an adapter folder and records, got only {paths[0]}; or give --predictions FILE")
    return paths[0], list(paths[1:])


def _require_writable(*files: Path | None) -> None:
    """Mistakes now, not when everything is answered."""
    for file in files:
        if file is None:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.is_dir():
            raise ValueError(f"{file} is a folder; expected the name of a file to write")
        if not os.access(file if file.exists() else file.parent, os.W_OK):
            raise ValueError(f"{file} cannot be written here")


def fingerprint(adapter: str) -> str:
    """What tells the trained weights of an adapter from others.

    Raises: ValueError as `adapter_folder` does.
    """
    from qformer.checkpoint import adapter_folder  # not where predictions are scored, without torch

    digest = hashlib.sha256(b"")
    for path in sorted(adapter_folder(adapter).glob("*.safetensors")):
        with path.open("rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return f"{os.path.basename(os.path.abspath(adapter))} {digest.hexdigest()[:12]}"


def _score(task: Task, texts: Sequence[Record], outputs: Sequence[Any], rule: str) -> Scores | None:
    rows = [(r, o) for r, o in zip(texts, outputs, strict=True) if o is not None and task.has_reference(r)]
    return task.score([record for record, _ in rows], [output for _, output in rows], rule) if rows else None


def _flat(values: dict[str, Any]) -> dict[str, float]:
    """Values by name, those by list size as NAME@SIZE."""
    flat: dict[str, float] = {}
    for name, value in values.items():
        flat |= {f"{name}@{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value}
    return flat


def _broken_down(scores: Scores, noun: str) -> list[str]:
    """A line for each kind of records: "by_subset random: accuracy 88.1, ... (2910 questions)"."""
    return [
        f"{title} {name}: "
        + ", ".join(f"{key} {value:{scores.form.lstrip('5')}}" for key, value in values.items() if key != "n")
        + f" ({values['n']} {noun})"
        for title, kinds in scores.breakdown.items()
        for name, values in kinds.items()
    ]


def _report(
    task: Task, chosen: Chosen, scores: Scores | None, *, outputs: Sequence[Any], broken: list[str], source: str
) -> None:  # fmt: skip
    texts = chosen.texts
    if scores:
        values = _flat(scores.values)
        width = max(7, *map(len, [*scores.groups, *values, *scores.absent]))
        for name, (value, n) in scores.groups.items():
            print(f"{name:<{width}}  {value:{scores.form}}  ({n} {task.noun})")
        for line in _broken_down(scores, task.noun):
            print(line)
        counts = scores.n if isinstance(scores.n, dict) else {task.noun: scores.n}
        counted = ", ".join(f"{count} {noun}" for noun, count in counts.items())
        how = f"{counted}, {scores.unit}, {task.rule_field} {scores.rule}, {source}"
        for name, value in values.items():
            print(f"{name:<{width}}  {value:{scores.form}}  ({how})")
        for name, reason in scores.absent.items():
            print(f"{name:<{width}}  {'-':>{len(format(0, scores.form))}}  ({reason})")
    warnings = list(scores.warnings) if scores else []
    if broken:
        warnings.append(f"{len(broken)} broken images were left out, the first: {broken[0]}")
    if empty := sum(output == "" for output in outputs):
        way = "give --choose-from, --prompt or --num-beams 1" if "choose_from" in task.options else "give --prompt"
        warnings.append(f"{empty} of {len(texts)} {task.output_field}s are empty; if a model ended them at once, {way}")
    if unscored := sum(not task.has_reference(record) for record in texts):
        warnings.append(f"{unscored} of {len(texts)} records have no {task.reference_noun} to score by")
    if chosen.without_split:
        warnings.append(f"{chosen.without_split} records name no split: they were taken as the protocol's")
    ids = Counter(i for i in map(task.identify, texts) if i is not None)
    if twice := [i for i, count in ids.items() if count > 1]:
        warnings.append(
            f"{task.id_field} {twice[0]!r} stands {ids[twice[0]]} times among the records"
            + (f", and so do {len(twice) - 1} others" if len(twice) > 1 else "")
            + ": each counts; a server would take one"
        )
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)


def _write_json(
    path: Path, head: dict[str, Any], task: Task, texts: Sequence[Record], *, outputs: Sequence[Any],
    scores: Scores | None, alike: Similarity | None, dropped: int,
) -> None:  # fmt: skip
    more = [{SIMILARITY: value} for value in alike.values] if alike else [{} for _ in texts]
    each = iter(scores.each if scores else ())
    results = [
        {
            task.id_field: task.identify(record),
            task.output_field: output,
            "image": record.names,
            **task.describe(record),
            **(next(each, {}) if task.has_reference(record) else {}),
            **extra,
        }
        for record, output, extra in zip(texts, outputs, more, strict=True)
        if output is not None
    ]
    if scores:
        head |= {"scores": scores.values | dict.fromkeys(scores.absent), "n": scores.n, task.rule_field: scores.rule}
        head |= {"absent": scores.absent} if scores.absent else {}
        head |= {"other_rules": scores.others} if scores.others else {}
        head |= scores.breakdown
        if scores.groups:
            head |= {"by_type": {name: value for name, (value, _) in scores.groups.items()}}
            head |= {"n_by_type": {name: n for name, (_, n) in scores.groups.items()}}
    else:
        head |= {"scores": {}, "n": 0, task.rule_field: None}
    if alike:
        head["similarity"] = {"adapter": alike.adapter, "mean": alike.mean, "n": alike.n}
    with atomic_file(path) as scratch:
        scratch.write_text(json.dumps(head | {"dropped": dropped, "results": results}, indent=1))
