"""What a task is: what a record needs, what the model is asked, which metric, and how official files name it all."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from qformer.data import Record

WITH_IMAGE = "image"  # the mode in which images are read
GENERATION = ("prompt", "num_beams", "max_new_tokens", "min_new_tokens", "length_penalty")  # keys of a protocol
OPTIONS = (*GENERATION, "candidates", "choose_from", "choose_by")  # the keys that a task may read or not


@dataclass(frozen=True)
class Scores:
    """The numbers of a task over `n` records.

    Args:
        values: by the names that the metric's official tool gives them; by list size below them in retrieval.
        n: how many records were scored, or how many of each kind.
        rule: the rule or tokenizer by which they were computed: without it a number says little.
        unit: what the values are, for the printed line.
        groups: the first value over the records of one kind, and how many there are.
        breakdown: by the name of what tells kinds of records, as "by_answer_type": the values over each kind, and "n".
        others: the first value by the other rules.
        warnings: what a reader of the numbers has to know.
        each: the scores of every record, in their order; () where there are none.
        absent: why a value that belongs here could not be computed, by its name.
        form: how values are printed.
    """

    values: dict[str, Any]
    n: int | dict[str, int]
    rule: str
    unit: str
    groups: dict[str, tuple[float, int]] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    each: Sequence[dict[str, float]] = ()
    absent: dict[str, str] = field(default_factory=dict)
    form: str = "5.1f"
    breakdown: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """One kind of evaluation. Outputs are what JSON can hold: they go to the file of answers and into official results.

    Args:
        id_field: the field of `Record` that names a record in official results, where it is "question_id" or alike.
        output_field: what official results call an output, as "answer".
        modes: what the model may be given, `WITH_IMAGE` for images; the first is the default.
        rules: names of the metric's rules, the first is the default.
        lacks: what a record lacks to be asked in a mode, in words; None = nothing.
        has_reference: whether an output for the record can be scored.
        ask: the outputs of a `VisionLanguageModel` for records in a mode; images are as `VisionLanguageModel.read`
            returns them, a list of each record's, None in modes without; keywords go to `generate`. None where there is a `search`.
        search: the outputs of an adapter for all records at once, where each depends on all; it returns what
            `compute_outputs` does, and keeps in a folder what a stopped one goes on from.
        score: outputs of records that all have references, by a rule.
        describe: what a result shows beside its id and output.
        options: keys of a protocol that the task reads, beside those that all do; they go to `ask` or `search`.
        noun: what is counted, in the plural.
        rule_field: what a rule is: "rule" or "tokenizer".
        reference_noun: what records are scored by, in the plural.
        require: raises when what computes the metric by a rule is not installed.
        compare: similarities of outputs and images by a stage-1 `VisionLanguageModel`; None = outputs are no captions.
        by_image: records of one image are asked as one, which has the captions of all.
        some_suffice: official results of some of the records are scored for themselves, as coco-caption does.
        id_name, output_name: what official results call them where not as `id_field` and `output_field`.
    """

    id_field: str
    output_field: str
    modes: tuple[str, ...]
    rules: tuple[str, ...]
    lacks: "Callable[[Record, str], str | None]"
    has_reference: "Callable[[Record], bool]"
    score: "Callable[[Sequence[Record], Sequence[Any], str], Scores]"
    describe: "Callable[[Record], dict[str, Any]]"
    ask: Callable[..., list[Any]] | None = None  # (model, records, images, mode, **generation)
    search: Callable[..., tuple[list[Any], list[str]] | None] | None = None  # (adapter, chosen, rule=, folder=, ...)
    options: tuple[str, ...] = GENERATION
    noun: str = "questions"
    rule_field: str = "rule"
    reference_noun: str = "answers"
    require: Callable[[str], None] = lambda rule: None
    compare: Callable[..., list[float]] | None = None  # (model, outputs, images)
    by_image: bool = False
    some_suffice: bool = False
    id_name: str | None = None
    output_name: str | None = None

    def identify(self, record: "Record") -> Any:
        """The id of a record in official results, of the type that its source has; None = it has none."""
        value = getattr(record, self.id_field)
        return int(value) if self.id_field == "image_id" and record.number_id else value

    def with_names(self, id_name: str | None, output_name: str | None) -> "Task":
        """The task with other names in official results, where a server has its own; None = as it is."""
        return replace(self, id_name=id_name or self.id_name, output_name=output_name or self.output_name)

    @property
    def result_names(self) -> tuple[str, str]:
        """What official results call the id of a record, and its output."""
        return self.id_name or self.id_field, self.output_name or self.output_field
