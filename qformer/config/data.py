"""The schema of the data: records, what is written of them, and in which shares they are drawn."""

from dataclasses import dataclass

from omegaconf import MISSING

from qformer.config.fields import Problems
from qformer.config.fields import described as _doc

TEXTS = ("caption", "question", "vqa")  # as qformer.data.captions has them
FRAME_POLICIES = ("uniform", "middle")  # keys of qformer.data.clips.POLICIES
ANSWERS = ("votes", "most_frequent")


def prompt_problem(prompt: str) -> str | None:
    """What is wrong with a prompt of questions; "" is none."""
    if not prompt or (prompt.count("{}") == 1 and not set(prompt.replace("{}", "")) & {"{", "}"}):
        return None
    return f"{prompt!r} must hold {{}} once, where the question goes, and no other brace, as 'Question: {{}} Answer:'"


@dataclass
class SourceConfig:
    """One of several data sets that a run is trained on."""

    records: str = _doc(MISSING, "an entry of data.train")
    weight: float = _doc(1.0, "factor on its share in what is drawn", above=0)
    text: str | None = _doc(None, "what is written of its records; null = data.text", TEXTS)
    templates: list[str] = _doc([], "its prompts; empty = data.templates")


@dataclass
class DataConfig:
    """The records, and how they are read."""

    train: list[str] = _doc(MISSING, "record files, image folders, WebDataset tars or hub ids (docs/data.md)")
    weights: list[float] = _doc(
        [], "factor on the share of each of data.train in what is drawn; empty = every record once an epoch"
    )
    validation: list[str] = _doc([], "held-out records, same forms; empty = no validation")
    root: str | None = _doc(None, "folder that relative image paths start from; null = the record file's own")
    features: str | None = _doc(None, "feature cache (docs/feature_cache.md) in the encoder's place; null = none")
    shuffle_block_records: int = _doc(
        1, "neighbours that stay together and in order in training; 1 = shuffle all", at_least=1
    )
    text: str = _doc(
        "caption",
        "what is written: a caption; vqa = an answer to the question; question = the question of an answer",
        TEXTS,
    )
    templates: list[str] = _doc(
        [],
        "prompts, one drawn each time, {} for the question (vqa) or answer (question); empty = llm.prompt, llm.vqa_prompt",
    )
    answer: str = _doc("votes", "the answer that is written: one drawn by its votes, or the most frequent", ANSWERS)
    sources: list[SourceConfig] = _doc(
        [],
        "[{records: a.jsonl, text: vqa}, ...], data sets with words and weights of their own, in the place of data.train",
    )
    size_exponent: float = _doc(
        0.0, "a source's share is its weight times its records to this power; 0.5 = square root", at_least=0
    )
    workers: int = _doc(2, "processes that read and decode", at_least=0)
    augment: bool = _doc(True, "random resized crop and flip of training images")
    flip: bool = _doc(True, "data.augment mirrors every second image; false where captions say left and right")
    crop_scale: list[float] = _doc([0.5, 1.0], "share of the image's area that a random crop keeps")
    max_pixels: int | None = _doc(
        None, "pixels of the largest image that is read, larger ones are broken records; null = PIL's bound, 89478485",
        at_least=1,
    )  # fmt: skip
    frames: int = _doc(8, "frames that stand for a clip (docs/data.md); a shorter one gives each once", at_least=1)
    frame_policy: str = _doc(
        "uniform", "which frames: the first of so many equal parts, as BLIP has it, or their middles", FRAME_POLICIES
    )
    cleaning: str = _doc(
        "blip", "captions as BLIP-2 writes them: small letters, no points; or as they are", ("blip", "none")
    )
    max_words: int = _doc(50, "words of a caption that are kept", at_least=1)
    max_dropped_fraction: float = _doc(
        0.1, "share of broken records at which a run stops; they are replaced below it", at_least=0, at_most=1
    )

    def wordings(self) -> list[tuple[str, list[str]]]:
        """What is written of the records of each of data.train, and the templates before it."""
        if not self.sources:
            return [(self.text, self.templates)] * len(self.train)
        return [(source.text or self.text, source.templates or self.templates) for source in self.sources]

    def problems(self) -> Problems:
        """What no single key can know, each with its message."""
        crop, weights, named = self.crop_scale, self.weights, [source.records for source in self.sources]
        templates = [(text, template) for text, several in self.wordings() for template in several]
        odd = next((t for text, t in templates if (prompt_problem(t or " ") if text != "caption" else "{}" in t)), None)
        return [
            (not self.train, "data.train: [] names no record file"),
            (bool(weights) and (len(weights) != len(self.train) or min(weights) <= 0),
             f"data.weights: {weights} must hold a number above 0 for each of data.train, or nothing"),
            (bool(named) and named != self.train,
             f"data.train: {self.train} are not the records of data.sources; leave data.train out, or set data.sources=[]"),
            (bool(named) and bool(weights), f"data.weights: {weights} beside data.sources; write a weight in each of them"),
            (odd is not None,
             f"data.templates: {odd!r} must hold {{}} once, where the question or answer goes, and no other brace; with "
             "text=caption none"),
            (len(crop) != 2 or not 0 < crop[0] <= crop[-1] <= 1,
             f"data.crop_scale: {crop} must be [smallest, largest] with 0 < smallest <= largest <= 1"),
        ]  # fmt: skip
