"""What `--help` prints: a stage's arguments, and every key of its config by section, no line over 100 columns."""

import argparse
import dataclasses
import shutil
import textwrap
from typing import Any, get_args

from omegaconf import MISSING

WIDTH = 100
# Values of keys whose default does not show what is wanted.
EXAMPLES = {
    "run.dir": "runs/s1", "run.trackers": "[tensorboard,wandb]",
    "train.max_steps": "250000", "train.resume": "auto", "train.global_batch_size": "1680",
    "train.micro_batch_size": "105", "train.gradient_checkpointing": "[qformer,encoder]",
    "data.train": "[coco.jsonl]", "data.weights": "[3,1]", "data.validation": "[coco_val.jsonl]", "data.root": "/data/coco",
    "data.features": "cache/coco_eva_g", "data.size_exponent": "0.5",
    "encoder.loader": "open_clip", "encoder.id": "EVA01-g-14", "encoder.pretrained": "laion400m_s11b_b41k",
    "encoder.image_size": "364", "encoder.width": "1408", "encoder.num_tokens": "257",
    "qformer.init_from": "bert-base-uncased",
    "stage1.init_from": "runs/s1/adapter", "stage1.itc_batch_size": "1680",
    "stage2.init_from": "runs/s1/adapter",
    "llm.id": "facebook/opt-2.7b", "llm.activation": "gelu", "llm.prompt": "'a photo of'",
    "llm.vqa_prompt": "'Question: {} Answer:'", "llm.vqa_length_penalty": "-1",
    "tune.lora_targets": "[q_proj,v_proj]",
}  # fmt: skip


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a stage's docstring, and fits options into the terminal and `WIDTH` columns."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, width=min(WIDTH, shutil.get_terminal_size().columns))


def describe_schema(*roots: type, sections: tuple[str, ...] = ()) -> str:
    """Every key with its meaning, default and choices, by section; a section of several roots stands once.

    Args:
        sections: names of those that are wanted; empty = all.
    """
    kinds: dict[str, Any] = {
        f.name: f.type for r in roots for f in dataclasses.fields(r) if dataclasses.is_dataclass(f.type)
    }
    return "\n\n".join(_section(name, kind) for name, kind in kinds.items() if not sections or name in sections)


def _section(name: str, kind: Any) -> str:
    lines = textwrap.wrap(f"{name}: {kind.__doc__[0].lower()}{kind.__doc__[1:]}", WIDTH)
    for key, full in _keys(name, kind):
        lines += textwrap.wrap(
            f"{_values(full, key)}: {key.metadata['help']}", WIDTH, initial_indent=f"  {full:<36} ",
            subsequent_indent=" " * 41, break_long_words=False, break_on_hyphens=False,
        )  # fmt: skip
    return "\n".join(lines)


def _keys(name: str, kind: Any) -> list[tuple[dataclasses.Field, str]]:
    """Every key with its full name; those of a list's entries after the list, as `data.sources[].records`."""
    keys = []
    for key in dataclasses.fields(kind):
        keys.append((key, f"{name}.{key.name}"))
        if entry := entry_kind(key):
            keys += _keys(f"{name}.{key.name}[]", entry)
    return keys


def entry_kind(key: dataclasses.Field) -> Any:
    """The dataclass of a key's entries; None where it is no list of sections."""
    entries = [kind for kind in get_args(key.type) if dataclasses.is_dataclass(kind)]
    return entries[0] if entries else None


def _values(name: str, key: dataclasses.Field) -> str:
    """The default, what else may stand there, an example."""
    default = key.default_factory() if callable(key.default_factory) else key.default
    text = "required" if default == MISSING else "null" if default is None else str(default) or "empty"
    choices = f" [{', '.join(key.metadata['choices'])}]" if key.metadata["choices"] else ""
    return f"{text}{choices}" + (f", as {EXAMPLES[name]}" if name in EXAMPLES else "")
