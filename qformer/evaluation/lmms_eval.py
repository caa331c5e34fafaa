"""A trained adapter as a model of lmms-eval, which finds it by the entry point `lmms_eval.models`.

    lmms-eval --model qformer --model_args adapter=runs/s2/adapter --tasks vqav2_val --batch_size 16

Only lmms-eval imports this file; its interface is that of 0.7. Of a task it gives a text, images and how to generate; the data and
the metrics are its own.
"""

import itertools
import logging
from collections.abc import Sequence
from typing import Any

from lmms_eval.api.instance import GenerationResult
from lmms_eval.api.model import lmms

from qformer.distributed import device_of_rank
from qformer.inference import VisionLanguageModel, load

logger = logging.getLogger(__name__)

IMAGE_MARKS = ("<image>", "<video>")  # where other models want their images in a text; ours stand before it
UNCUT = 10**6
SETTINGS = ("max_new_tokens", "num_beams", "length_penalty", "repetition_penalty", "no_repeat_ngram_size")


def manifest() -> Any:
    """What the entry point registers: a `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest  # its package looks for entry points while it is imported

    return ModelManifest(model_id="qformer", simple_class_path=f"{__name__}.QFormer")


class QFormer(lmms):
    """Stage 2's adapter as lmms-eval asks a model.

    Args:
        adapter: folder or hub id, as of `qformer.load`.
        prompt: the prompt of a task's text, {} in its place, as 'Question: {} Short answer:'; the text is then cleaned like a
            question in training. None = the language model reads the text as the task wrote it.
        max_batch_size: not used; lmms-eval gives it to every model.

    Raises: ValueError as `qformer.load` does.
    """

    is_simple = True

    def __init__(
        self, adapter: str, *, prompt: str | None = None, batch_size: int | str = 1, device: str | None = None,
        max_batch_size: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        if not str(batch_size).isdigit() or int(batch_size) < 1:
            raise ValueError(f"batch_size={batch_size}: expected a number, 1 or more")
        self.batch_size, self.prompt = int(batch_size), prompt
        self.model: VisionLanguageModel = load(adapter, device_of_rank() or device)
        stage: Any = self.model.model
        if stage.name != "stage2":
            raise ValueError(
                f"adapter={adapter}: lmms-eval asks for texts, which takes stage 2; this one is of {stage.name}"
            )
        self.device, self.llm = self.model.device, stage.llm
        self._ignored: set[str] = set()

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """What the language model writes behind the images and text of each request, cut at the task's stop words."""
        outputs: dict[int, str] = {}
        groups: dict[str, list[int]] = {}
        for i, request in enumerate(requests):
            settings = request.args[1]
            groups.setdefault(repr((sorted(settings.items(), key=str), bool(self._images(request)))), []).append(i)
        for group in groups.values():
            asked = requests[group[0]].args[1]
            settings, until = self._settings(asked), asked.get("until") or []
            for first in range(0, len(group), self.batch_size):
                rows = group[first : first + self.batch_size]
                texts = self._answer([requests[i] for i in rows], **settings)
                outputs |= {i: _cut(text, until) for i, text in zip(rows, texts, strict=True)}
        return [outputs[i] for i in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Any]) -> list[GenerationResult]:
        """The loss of each continuation with its end in nats, and whether a greedy search writes just it.

        The loss and not, as the interface has it, the log-probability: lmms-eval takes the smallest, and its other models give
        losses. It would make a text of a plain pair. Neighbours that ask the same are the choices of one question, which is
        read once.
        """
        outputs: list[GenerationResult] = []
        for _, group in itertools.groupby(requests, key=lambda request: (request.args[0], *request.args[3:])):
            asked = list(group)
            targets = [self._target(request).strip() for request in asked]
            images = self._images(asked[0])
            texts = self._texts(asked[:1])
            (losses,) = self.model.rank([images] if images else None, candidates=[targets], **texts)
            longest = max(self.llm.count_target_tokens([""], [target], max_target_tokens=UNCUT) for target in targets)
            (greedy,) = self._answer(asked[:1], num_beams=1, max_new_tokens=longest)
            pairs = [(loss, target == greedy) for loss, target in zip(losses.tolist(), targets, strict=True)]
            outputs += [GenerationResult(pair) for pair in pairs]
        return outputs

    def generate_until_multi_round(self, requests: Sequence[Any]) -> list[str]:
        """Refuse: a task of several rounds makes each text of the answer before it."""
        raise NotImplementedError(
            "qformer answers tasks of one round: generate_until, loglikelihood and multiple_choice"
        )

    def _answer(self, requests: Sequence[Any], **settings: Any) -> list[str]:
        """The answers to requests that all have images, or all have none."""
        images = [self._images(request) for request in requests]
        return self.model.answer(images if images[0] else None, **self._texts(requests), **settings)

    def _texts(self, requests: Sequence[Any]) -> dict[str, Any]:
        """The arguments of `answer` and `rank` that hold a request's text: as it is, or as a question in the prompt."""
        texts = [request.args[0] for request in requests]
        for mark in IMAGE_MARKS:
            texts = [text.replace(mark, "").strip() for text in texts]
        if self.prompt is None:
            return {"questions": [""] * len(texts), "context": texts, "prompt": "{}"}
        return {"questions": texts, "prompt": self.prompt}

    def _document(self, request: Any) -> Any:
        number, task, split = request.args[3:6]
        return self.task_dict[task][split][number]

    def _images(self, request: Any) -> list[Any]:
        """Images and paths of videos of a request; none where the task asks by text alone."""
        if len(request.args) < 6 or request.args[2] is None:
            return []
        images = request.args[2](self._document(request)) or []
        return list(images) if isinstance(images, list | tuple) else [images]

    def _target(self, request: Any) -> str:
        target = request.args[1]
        return target if isinstance(target, str) else str(target(self._document(request)))

    def _settings(self, asked: dict[str, Any]) -> dict[str, Any]:
        """A task's generation settings as `answer` takes them; greedy unless it says otherwise, as lmms-eval's models are."""
        settings = {"num_beams": 1} | {name: asked[name] for name in SETTINGS if asked.get(name) is not None}
        if asked.get("do_sample") and asked.get("temperature", 1.0):
            settings |= {
                "do_sample": True,
                "temperature": asked.get("temperature") or 1.0,
                "top_p": asked.get("top_p") or 1.0,
            }
        for name in asked.keys() - {*SETTINGS, "until", "do_sample", "temperature", "top_p"} - self._ignored:
            self._ignored.add(name)
            logger.warning("generation_kwargs.%s of a task is not heeded", name)
        return settings


def _cut(text: str, stops: str | Sequence[str]) -> str:
    """The text up to the first of the stop words."""
    for stop in [stops] if isinstance(stops, str) else stops:
        text = text.split(stop)[0] if stop else text
    return text.strip()
