"""Which records a task asks: those of a split, the first so many, one an image where the task counts images."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qformer.data import Record, Records
from qformer.evaluation.task import Task

CHOICES = "choices"  # in the place of answers to choose from: each record's


@dataclass(frozen=True)
class Chosen:
    """Some of `records`.

    Args:
        numbers: of each, among the records.
        texts: of each, without the bytes of its image; with `by_image` it has the captions of all of the image's records.
        without_split: how many of the records that were looked at name no split, though one was asked for.
    """

    records: Records
    numbers: list[int]
    texts: list[Record]
    without_split: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, index: int) -> Record:
        return self.records[self.numbers[index]]


def choose(task: Task, records: Records, *, mode: str, split: str | None, limit: int | None) -> Chosen:
    """The records to be asked.

    Raises: ValueError when one lacks what the task needs, or none is of the split.
    """
    numbers: list[int] = []
    texts: list[Record] = []
    splits: dict[str | None, int] = {}
    for number in range(len(records)):
        if len(texts) == limit and not task.by_image:
            break
        record = records.text(number)
        splits[record.split] = splits.get(record.split, 0) + 1
        if record.problem is None and None not in (split, record.split) and record.split != split:
            continue
        lack = None if record.problem is not None else task.lacks(record, mode)
        if lack is not None:
            raise ValueError(f"record {number} (from 0), {record.image}: {lack}")
        numbers.append(number)
        texts.append(record)
    if not texts:
        raise ValueError(
            f"no record is of split {split!r}; they are of {', '.join(map(str, splits))}; give --split NAME"
        )
    if task.by_image:
        numbers, texts = _one_an_image(numbers, texts, limit)
    return Chosen(records, numbers, texts, splits.get(None, 0) if split else 0)


def _one_an_image(numbers: list[int], texts: list[Record], limit: int | None) -> tuple[list[int], list[Record]]:
    of_image: dict[str, list[int]] = {}
    for place, record in enumerate(texts):
        of_image.setdefault(record.image_id, []).append(place)
    firsts, merged = [], []
    for places in list(of_image.values())[:limit]:
        sound = [i for i in places if texts[i].problem is None] or places[:1]
        captions = tuple(caption for i in sound for caption in texts[i].captions)
        firsts.append(numbers[sound[0]])
        merged.append(replace(texts[sound[0]], captions=captions))
    return firsts, merged


def lack_of_use(task: Task, texts: Sequence[Record], *, submitted: bool, written: bool) -> str | None:
    """What the records lack for what is made of the outputs: a submission needs ids, a score needs references."""
    if submitted:
        unnamed = next((record for record in texts if task.identify(record) is None), None)
        return None if unnamed is None else f"{unnamed.image}: its record has no {task.id_field}, which --submit needs"
    if not written and not any(map(task.has_reference, texts)):
        elsewhere = " (VQA's lie in a file of annotations: name it beside its questions)"
        return (
            f"no record has {task.reference_noun} to score by{elsewhere if task.id_field == 'question_id' else ''}; "
            "write the model's with --submit FILE or --json FILE"
        )
    return None


def read_candidates(named: Sequence[str], texts: Sequence[Record]) -> list[str] | None:
    """The answers that a protocol's `choose_from` names; None = the choices of each record.

    Raises: ValueError when there is no such file, it is empty, or a record has no choices.
    """
    if list(named) == [CHOICES]:
        without = next((record for record in texts if not record.choices and record.problem is None), None)
        if without is not None:
            raise ValueError(f"choose_from={CHOICES}: {without.image}: its record has no field 'choices'")
        return None
    if len(named) != 1:
        answers = list(named)
    elif not Path(named[0]).is_file():
        raise ValueError(
            f"choose_from: {named[0]!r} is no file of answers, one a line; expected one, {CHOICES}, or a list [a, b]"
        )
    else:
        lines = Path(named[0]).read_text(encoding="utf-8").splitlines()
        answers = list(dict.fromkeys(line.strip() for line in lines if line.strip()))
    if not answers:
        raise ValueError(f"choose_from: {', '.join(named) or 'an empty list'} holds no answers")
    return answers
