"""The adapters of a page by name, and what each can do."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import cast

from qformer.config import LlmConfig, Stage2Part
from qformer.inference import VisionLanguageModel, load
from qformer.messages import nearest

WRITE, LOOK, MATCH, SEARCH = "write", "look", "match", "search"
BOTH = ("stage1", "stage2")
STAGES = {WRITE: ("stage2",), LOOK: BOTH, MATCH: BOTH, SEARCH: ("stage1",)}  # whose adapters can do it
LACKS = {
    WRITE: "Captions and answers need an adapter of stage 2",
    SEARCH: "Search needs an adapter of stage 1",
}


class Adapters:
    """Loaded models by the names that the page shows.

    Raises: ValueError when there is none.
    """

    def __init__(self, models: dict[str, VisionLanguageModel]):
        if not models:
            raise ValueError("no adapter; expected the folders of one or more")
        self.models = models

    @classmethod
    def load(cls, paths: Sequence[str], *, device: str | None, max_pixels: int, frames: int | None) -> "Adapters":
        """Load adapters, each named by its run.

        Args:
            max_pixels: of an image that they read.
            frames: of a clip; None = 8.

        Raises: ValueError when two are the same, or one cannot be loaded, as `load` says.
        """
        models = {}
        for path, name in zip(paths, adapter_names(paths), strict=True):
            model = load(path, device)
            model.sample_clips(frames)
            if model.transform is not None:
                model.transform = replace(model.transform, max_pixels=max_pixels)
            models[name] = model
        return cls(models)

    def able(self, task: str) -> list[str]:
        """The names of those that can do `task`."""
        return [name for name, model in self.models.items() if model.config.stage in STAGES[task]]

    def lack(self, task: str) -> str:
        """Why nothing on the page can do `task`; "" where something can."""
        if self.able(task):
            return ""
        return f"{LACKS[task]}; this page was started with {self.line()} alone. Add its folder to the command."

    def choose(self, task: str, name: str) -> VisionLanguageModel:
        """The model of a name.

        Raises: ValueError when there is none of that name, or it cannot do `task`.
        """
        if reason := self.lack(task):
            raise ValueError(reason)
        if name not in self.able(task):
            raise ValueError(f"{name!r} is no adapter for this; {nearest(name, self.able(task))}")
        return self.models[name]

    def line(self) -> str:
        """The adapters in words: "stage1 (stage 1), opt (stage 2)"."""
        return ", ".join(f"{name} (stage {model.config.stage[-1]})" for name, model in self.models.items())


def llm_config(model: VisionLanguageModel) -> LlmConfig:
    """How a model of stage 2 is asked by default."""
    assert model.config.stage in STAGES[WRITE]
    return cast(Stage2Part, model.config).llm


def adapter_names(paths: Sequence[str]) -> list[str]:
    """A short name for each adapter: its run's folder, or the whole path where two would have the same.

    Raises: ValueError when two paths are the same.
    """
    if twice := {path for path in paths if list(paths).count(path) > 1}:
        raise ValueError(f"{', '.join(sorted(twice))} is there twice; expected each adapter once")
    parts = [[part for part in Path(path).parts if part != "adapter"] or [path] for path in paths]
    short = [names[-1] for names in parts]
    return [name if short.count(name) == 1 else path for name, path in zip(short, paths, strict=True)]
