"""The protocol of a task: what a published number depends on beside the model, one file of `configs/tasks/` each."""

import dataclasses
from pathlib import Path
from typing import Any, cast

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from qformer.config.data import FRAME_POLICIES
from qformer.config.fields import described
from qformer.config.loading import ConfigError, check_value, read_fragment
from qformer.config.packaged import config_names
from qformer.messages import nearest

FOLDER = "configs/tasks"
NOT_OPTIONS = ("task", "reported")  # no options of the command line
LIST = "list[str] | None"
PMI = "pmi"  # pointwise mutual information
CHOOSE_BY = ("likelihood", PMI)


@dataclasses.dataclass
class Protocol:
    """How a task is run and scored; null = the task's own, or as the adapter was trained with."""

    task: str = described(MISSING, "what is asked: a name of qformer.evaluation.TASKS")
    mode: str | None = described(None, "what the model is given; null = images")
    rule: str | None = described(None, "by which rule or tokenizer the metric counts; null = the task's first")
    split: str | None = described(None, "only records of this split, where records name one; null = all")
    prompt: str | None = described(None, "text before a caption; of questions with {} in the question's place")
    num_beams: int | None = described(None, "beams", at_least=1)
    max_new_tokens: int | None = described(None, "tokens of the longest output", at_least=1)
    min_new_tokens: int | None = described(None, "tokens of the shortest output", at_least=0)
    length_penalty: float | None = described(None, "beam scores are divided by length to this power")
    candidates: int | None = described(
        None, "retrieval: how many the similarity leaves to the matching head, each way; null = 128", at_least=1
    )
    choose_from: list[str] | None = described(
        None, "answers of which the likeliest is taken: several, a file with one a line, or choices = those of each record; "
        "null = an answer is written"
    )  # fmt: skip
    choose_by: str | None = described(
        None, "by what: the likeliest (likelihood), or the one that image or caption make likelier than the question alone "
        "(pmi), for language models with a favourite answer; null = likelihood", CHOOSE_BY,
    )  # fmt: skip
    frames: int | None = described(None, "frames that stand for a clip; null = 8", at_least=1)
    frame_policy: str | None = described(
        None, "which frames: the first of so many equal parts (uniform, as BLIP has it), or their middles (middle)",
        FRAME_POLICIES,
    )  # fmt: skip
    id_name: str | None = described(None, "what official results call the id of a record; null = as most servers")
    output_name: str | None = described(None, "what they call an output; null = as most servers")
    reported: str | None = described(None, "what was published under this protocol, and where")


def protocol_options() -> list[tuple[str, type, str]]:
    """Name, type and meaning of every key that a command line may set beside `--task`."""
    kinds = {"str | None": str, "int | None": int, "float | None": float, LIST: str}
    fields = [field for field in dataclasses.fields(Protocol) if field.name not in NOT_OPTIONS]
    return [(f.name, kinds[_kind(f)], f.metadata["help"]) for f in fields]


def task_names() -> list[str]:
    """The package's own protocols, as `--task` takes them: "coco_caption" of configs/tasks/coco_caption.yaml."""
    return [Path(name).stem for name in config_names() if Path(name).parent.as_posix() == FOLDER]


def read_protocol(source: str, tasks: tuple[str, ...], overrides: dict[str, Any] | None = None) -> Protocol:
    """The protocol that `source` names: a task, a file of `configs/tasks/` by its bare name, or a path.

    Args:
        tasks: names of the tasks there are.
        overrides: values by key that take the file's place; None = the file's stands.

    Raises: ConfigError when there is no such task or file, or a key or value of it does not fit.
    """
    if source in tasks:
        merged = OmegaConf.structured(Protocol(task=source))
    else:
        known = task_names()
        if not source.endswith((".yaml", ".yml")) and source not in known:
            raise ConfigError(f"--task {source}: no task and no file of {FOLDER}; {nearest(source, [*tasks, *known])}")
        merged = _merged(f"{FOLDER}/{source}.yaml" if source in known else source)
    for key, value in (overrides or {}).items():
        if value is not None:
            merged[key] = [value] if _kind_of(key) == LIST else value
    values = cast(dict[str, Any], OmegaConf.to_container(merged))
    for field in dataclasses.fields(Protocol):
        if problem := check_value(field.name, values[field.name], field)[1]:
            raise ConfigError(f"{problem} (--task {source})")
    if values["task"] not in tasks:
        raise ConfigError(f"task: {values['task']!r} in {source} is no task; {nearest(values['task'], tasks)}")
    return Protocol(**values)


def _merged(source: str) -> Any:
    fragment = read_fragment(source)
    known = [field.name for field in dataclasses.fields(Protocol)]
    for key in fragment:
        if key not in known:
            raise ConfigError(f"unknown key {key} in {source}; {nearest(str(key), known)}")
    for key in (key for key in fragment if _kind_of(key) == LIST):
        values = [fragment[key]] if isinstance(fragment[key], str) else fragment[key]
        if values is not None and not (OmegaConf.is_list(values) or isinstance(values, list)):
            raise ConfigError(f"{key}: {values!r} in {source} is no list, written [a, b]")
        if any(isinstance(value, bool) for value in values or []):
            raise ConfigError(f'{key}: YAML reads yes and no as true and false in {source}; write ["yes", "no"]')
        fragment[key] = values
    try:
        merged = OmegaConf.merge(OmegaConf.structured(Protocol), fragment)
    except OmegaConfBaseException as error:
        key = str(error.full_key)
        kind = next((_kind(field) for field in dataclasses.fields(Protocol) if field.name == key), "a value")
        raise ConfigError(f"{key}: {fragment.get(key)!r} in {source} is not {kind}") from None
    if OmegaConf.is_missing(merged, "task"):
        raise ConfigError(f"missing value: task in {source} (what is asked)")
    return merged


def _kind_of(key: str) -> str:
    return next(_kind(field) for field in dataclasses.fields(Protocol) if field.name == key)


def _kind(field: dataclasses.Field) -> str:
    return str(getattr(field.type, "__name__", field.type))
