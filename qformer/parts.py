"""Frozen models of transformers, also as a part of a whole checkpoint: BLIP-2 carries its encoder and language model."""

import logging
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

WHOLE = ("blip-2", "instructblip")  # model_type of checkpoints with both frozen models inside


def load_frozen(
    model_class: Any, id: str, config: Any, part: str | None, *, may_lack: str = "", **options: Any
) -> Any:  # fmt: skip
    """Load a model of transformers, every tensor of it; the rest of a whole checkpoint is neither read nor kept.

    Args:
        model_class: an Auto class, or the model's own.
        config: the model's own config; of a whole checkpoint its vision_config or text_config.
        part: name of the model within a whole checkpoint, such as "language_model"; None = the checkpoint is the model.
        may_lack: pattern of tensors that need not be there.
        options: passed on to `from_pretrained`.

    Raises: ValueError when tensors are missing; what `from_pretrained` raises.
    """
    options |= {"config": config, "output_loading_info": True}
    if part:
        options["key_mapping"] = {rf"^{part}\.": ""}
    with _quiet() if part else nullcontext():
        model, info = model_class.from_pretrained(id, **options)
    if missing := sorted(key for key in info["missing_keys"] if not re.fullmatch(may_lack, key)):
        raise ValueError(f"its weights lack {len(missing)} tensors of {type(model).__name__}: {missing[0]} ...")
    return model


@contextmanager
def _quiet() -> Iterator[None]:
    # The loading report would list every tensor of the other parts as unexpected. Missing ones are raised all the same.
    reports = logging.getLogger("transformers.modeling_utils")
    reports.addFilter(_is_no_report)
    try:
        yield
    finally:
        reports.removeFilter(_is_no_report)


def _is_no_report(record: logging.LogRecord) -> bool:
    return "LOAD REPORT" not in str(record.msg)
