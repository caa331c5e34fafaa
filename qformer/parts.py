"""What the frozen models of both sides share: dtypes, where weights lie, and parts of a whole checkpoint of BLIP-2."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, NamedTuple

import torch

logger = logging.getLogger(__name__)

# Names under which a repository holds its weights, the preferred ones first; an index names the files of its shards.
WEIGHT_FILES = (
    "model.safetensors", "model.safetensors.index.json", "open_clip_model.safetensors", "open_clip_pytorch_model.bin",
    "pytorch_model.bin", "pytorch_model.bin.index.json",
)  # fmt: skip
WHOLE = ("blip-2", "instructblip")  # model_type of checkpoints with both frozen models inside


class WeightSource(NamedTuple):
    """Where weights come from: the config's key that names them, and a file, folder, hub id or URL.

    `files` are the names that a folder or repository may have them under, the preferred ones first.
    """

    key: str
    place: str
    revision: str | None = None
    files: tuple[str, ...] = WEIGHT_FILES


def torch_dtype(key: str, name: str, known: tuple[str, ...]) -> torch.dtype:
    """The dtype that a config's `key` names.

    Raises: ValueError when it is not one of the `known` ones, which the schema has.
    """
    if name not in known:
        raise ValueError(f"{key}={name!r}: expected one of {', '.join(known)}")
    return getattr(torch, name)


def load_frozen(
    model_class: Any, id: str, config: Any, part: str | None, *, may_lack: str = "", **options: Any
) -> Any:  # fmt: skip
    """Load a model of transformers, every tensor of it; the rest of a whole checkpoint is neither read nor kept.

    Args:
        model_class: an Auto class, or the model's own.
        config: the model's own config; of a whole checkpoint its vision_config or text_config; None = the checkpoint's.
        part: name of the model within a whole checkpoint, such as "language_model"; None = the checkpoint is the model.
        may_lack: pattern of tensors that need not be there; those that are not start at random, and a line says so.
        options: passed on to `from_pretrained`.

    Raises: ValueError when tensors are missing; what `from_pretrained` raises.
    """
    options |= {"output_loading_info": True} | ({} if config is None else {"config": config})
    if part:
        options["key_mapping"] = {rf"^{part}\.": ""}
    with _quiet() if part or may_lack else nullcontext():
        model, info = model_class.from_pretrained(id, **options)
    lacking = sorted(info["missing_keys"])
    if missing := [key for key in lacking if not re.fullmatch(may_lack, key)]:
        raise ValueError(f"its weights lack {len(missing)} tensors of {type(model).__name__}: {missing[0]} ...")
    if lacking:
        logger.info("%s has no %s, which start at random", id, ", ".join(lacking))
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    # The loading report would list every tensor of the other parts as unexpected, and call a checkpoint without tensors that
    # it may lack corrupted. Missing ones are raised or said all the same.
    reports = logging.getLogger("transformers.modeling_utils")
    reports.addFilter(_is_no_report)
    try:
        yield
    finally:
        reports.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return not any(sign in str(record.msg) for sign in ("LOAD REPORT", "checkpoint seem corrupted"))
