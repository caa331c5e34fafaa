"""The README.md of an adapter or export folder: what it is, what it stands between, and code that runs it."""

from typing import Any

from qformer.config import ModelPart
from qformer.config.packaged import portable

LOAD = '\nimport qformer\nmodel = qformer.load("path/to/this/folder")\n'


def card(title: str, config: ModelPart, facts: list[str], code: str = LOAD, *, about: str = "") -> str:
    """A card of Markdown.

    Args:
        facts: a line each, beside the frozen models.
        code: Python that runs the folder, with a line break at both ends.
        about: a paragraph below the title.
    """
    encoder = f"encoder: `{config.encoder.id}` ({config.encoder.loader}), block {config.encoder.block}"
    llm = [f"language model: `{part.id}`" for name, part in config.frozen().items() if name == "llm"]
    lines = [f"# {title}", "", *([about, ""] if about else []), *(f"- {fact}" for fact in [encoder, *llm, *facts])]
    return portable("\n".join(lines)) + f"\n\n```python{code}```\n"


def model_card(config: Any, step: int, dropped: int) -> str:
    """Card of an adapter that a run has trained."""
    about = (
        f"Trainable tensors of a Q-Former between frozen models, after {step} steps of "
        f"{config.train.global_batch_size} records; {dropped} broken records were replaced."
    )
    written = [f" ({text})" if text != "caption" else "" for text, _ in config.data.wordings()]
    named = (f"`{source}`{text}" for source, text in zip(config.data.train, written, strict=True))
    return card(f"qformer adapter, {stage_name(config)}", config, [f"data: {', '.join(named)}"], about=about)


def converted_card(config: ModelPart, library: str, source: str, facts: list[str]) -> str:
    """Card of an adapter made from another library's checkpoint; `facts` say what became of its tensors."""
    title = f"qformer adapter, {stage_name(config)}, converted from {library}"
    about = "Trainable tensors of a Q-Former between frozen models."
    return card(title, config, [f"source: `{source}`", *facts], about=about)


def stage_name(config: ModelPart) -> str:
    """The stage of a config in words."""
    return config.stage.replace("stage", "stage ")
