"""What the page does when something is pressed, without a browser: a picture and words in, words out."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from qformer.attention.picture import images_of, overlay
from qformer.config import prompt_problem
from qformer.conversation import answer_next
from qformer.inference import VisionLanguageModel
from qformer.messages import EMPTY_ANSWER
from qformer.objectives import similarity
from qformer.web.adapters import LOOK, MATCH, SEARCH, WRITE, Adapters, llm_config
from qformer.web.folder import Hit, PictureFolder
from qformer.web.uploads import Limits, read_upload, shown

TEXT_CHARACTERS, CANDIDATES = 1000, 100


@dataclass(frozen=True)
class Writing:
    """How texts are written: what the page's controls say.

    Args:
        sample: draw words instead of searching with `beams`.
        temperature, top_p: of the draw.
        caption_prompt: text that a caption continues; question_prompt: has {} where the question goes.
    """

    sample: bool
    beams: int
    temperature: float
    top_p: float
    caption_prompt: str
    question_prompt: str

    @classmethod
    def of(cls, model: VisionLanguageModel) -> "Writing":
        """What an adapter's config says; a draw is as `stages/ask.py --sample` makes it."""
        llm = llm_config(model)
        return cls(False, llm.num_beams, 1.0, 0.9, llm.prompt, model.vqa_prompt)

    def generation(self) -> dict[str, Any]:
        """As `FrozenLanguageModel.generate` takes it.

        Raises: ValueError when the prompt of questions does not hold {} once.
        """
        if problem := prompt_problem(self.question_prompt or " "):
            raise ValueError(f"Prompt of a question: {problem}")
        if self.sample:
            return {"do_sample": True, "num_beams": 1, "temperature": self.temperature, "top_p": self.top_p}
        return {"num_beams": int(self.beams)}


@dataclass(frozen=True)
class Candidate:
    """A text and how well it fits the picture.

    Args:
        value: in [0, 1]: the probability of a match (stage 1), or among all candidates (stage 2).
        detail: what else was computed, in words.
    """

    text: str
    value: float
    detail: str


@dataclass(frozen=True)
class Look:
    """Where a model looks: pictures lit up there, each with what it is of.

    Args:
        line: whose words they are, and how much the queries overlap.
    """

    line: str
    words: list[tuple[Image.Image, str]]
    queries: list[tuple[Image.Image, str]]


class Desk:
    """What is behind a page, and nothing of a visitor.

    Args:
        uploads: the folder that every upload lies in.
        folder: pictures to search, if there are some.
    """

    def __init__(self, adapters: Adapters, limits: Limits, uploads: Path, folder: PictureFolder | None = None):
        self.adapters, self.limits, self.uploads, self.folder = adapters, limits, uploads.resolve(), folder

    def receive(self, path: str) -> list[Image.Image]:
        """The pictures of an upload, as it will be read.

        Raises: ValueError as `read_upload` does, and for a path that leads out of the folder of uploads.
        """
        if not Path(path).resolve().is_relative_to(self.uploads):
            raise ValueError(f"{Path(path).name} was not uploaded here")
        model = next(iter(self.adapters.models.values()))
        return read_upload(path, self.limits, model.transform)

    def caption(self, name: str, path: str | None, writing: Writing) -> str:
        """A caption of the upload by the adapter `name`; one that the language model left empty says so."""
        model = self.adapters.choose(WRITE, name)
        generation = writing.generation()
        return model.caption(_require(path), writing.caption_prompt, **generation)[0] or EMPTY_ANSWER

    def answer(
        self, name: str, path: str | None, question: str, *, turns: list[tuple[str, str]], writing: Writing
    ) -> str:
        """The answer after the conversation so far, which gains a turn."""
        model = self.adapters.choose(WRITE, name)
        settings = {"prompt": writing.question_prompt, **writing.generation()}
        return (
            answer_next(model, [_require(path)], _text(question, "question"), turns=turns, settings=settings)
            or EMPTY_ANSWER
        )

    def rank(self, name: str, path: str | None, lines: str, question: str = "") -> list[Candidate]:
        """Captions, one a line, the best first; of an adapter of stage 2 also answers to a question."""
        model = self.adapters.choose(MATCH, name)
        image, texts = _require(path), [line.strip() for line in lines.splitlines() if line.strip()]
        if not 1 <= len(texts) <= CANDIDATES:
            raise ValueError(f"{len(texts)} captions; expected 1 to {CANDIDATES}, one a line")
        texts = [_text(text, "caption") for text in texts]
        if name in self.adapters.able(WRITE):
            candidates = _rank_by_loss(model, image, texts, question.strip())
        else:
            candidates = _rank_by_match(model, image, texts)
        return sorted(candidates, key=lambda candidate: -candidate.value)

    def look(self, name: str, path: str | None, text: str, turn: tuple[str, str] | None) -> Look:
        """Where the queries look, and what speaks for each word of a text, or of an answer where there is no text.

        Args:
            turn: the last question of the conversation and its answer, for an adapter of stage 2.

        Raises: ValueError as `VisionLanguageModel.attention` does.
        """
        model, image = self.adapters.choose(LOOK, name), _require(path)
        question = None
        if turn is not None and turn[1] and not text.strip() and name in self.adapters.able(WRITE):
            question, text = turn
        maps = model.attention(image, text.strip() or None, question=question)
        pictures = images_of(image, model.transform)
        of = "the queries alone" if not maps.words else f'"{text.strip()}"'
        asked = "" if question is None else f', the answer to "{question}"'
        words = [(_lit(pictures, heat), word) for heat, word in zip(maps.of_words(), maps.words, strict=True)]
        queries = [(_lit(pictures, heat), f"query {number}") for number, heat in enumerate(maps.of_queries())]
        line = f"By {name}: {of}{asked}. Two queries overlap by {maps.overlap():.2f}: 1 = all look at the same."
        return Look(line, words, queries)

    def search(self, name: str, text: str, count: int) -> list[Hit]:
        """The pictures of the folder that are most similar to a text."""
        model = self.adapters.choose(SEARCH, name)
        if self.folder is None:
            raise ValueError("there is no folder to search; start the page with --folder PICTURES")
        return self.folder.search(name, model, _text(text, "text"), count=int(count))


def _lit(pictures: Sequence[Image.Image | None], heat: Tensor) -> Image.Image:
    """The picture lit up by `heat` float[h, w], or a clip's frames by float[K, h, w]."""
    maps = heat[None] if heat.ndim == 2 else heat
    top = float(maps.max())
    lit = shown([overlay(picture, one, top) for picture, one in zip(pictures, maps, strict=True)])
    assert lit is not None
    return lit


def _rank_by_match(model: VisionLanguageModel, image: str, texts: Sequence[str]) -> list[Candidate]:
    features = model.encode(image)
    match = model.match([image] * len(texts), texts).tolist()
    near = similarity(model.embed_image(features), model.embed_text(texts))[0].tolist()
    return [
        Candidate(text, value, f"similarity {cosine:.2f}")
        for text, value, cosine in zip(texts, match, near, strict=True)
    ]


def _rank_by_loss(model: VisionLanguageModel, image: str, texts: Sequence[str], question: str) -> list[Candidate]:
    prompt = None if question else f"{llm_config(model).prompt}{{}}"
    (losses,) = model.rank(image, [question], texts, prompt=prompt)
    return [
        Candidate(text, value, f"loss {loss:.1f} nats")
        for text, value, loss in zip(texts, (-losses).softmax(0).tolist(), losses.tolist(), strict=True)
    ]


def _require(path: str | None) -> str:
    if path is None:
        raise ValueError("there is no picture yet; drop one first")
    return path


def _text(text: str, what: str) -> str:
    if not text.strip():
        raise ValueError(f"the {what} is empty; expected words")
    if len(text) > TEXT_CHARACTERS:
        raise ValueError(f"the {what} has {len(text)} characters; expected {TEXT_CHARACTERS} at most")
    return text.strip()
