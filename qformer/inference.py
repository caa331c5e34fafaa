"""A trained adapter put to use: captions, answers, embeddings and matching scores, in batches."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qformer.build import STAGES, build_stage, build_transform
from qformer.checkpoint import load_strictly, read_adapter
from qformer.config import LlmConfig, ModelPart, Stage2Part, model_part, read_config, read_values
from qformer.data import Record, clean_question, load_features, load_image
from qformer.encoders import Features
from qformer.models import Stage, Stage1, Stage2
from qformer.text import PROMPTS

Picture = Image.Image | str | Path | Tensor


def load(path: str | Path, device: str | None = None) -> "VisionLanguageModel":
    """Rebuild a trained model from an adapter folder: frozen parts by id, trainable tensors strictly from the file.

    Args:
        path: what a run leaves in `run.dir/adapter`.
        device: where to run, e.g. "cuda"; None = the accelerator if there is one.

    Raises: ValueError when the folder is no adapter, or its tensors do not fit its config.
    """
    folder = Path(path)
    if not (folder / "config.yaml").is_file():
        raise ValueError(
            f"{folder} is no adapter folder: it has no config.yaml; expected what a run leaves in run.dir/adapter"
        )
    tensors, config = read_adapter(folder), read_model_part(folder)
    if device == "cpu" and isinstance(config, Stage2Part) and config.llm.quantise != "no":
        raise ValueError(
            f"{folder} has llm.quantise={config.llm.quantise}, which runs on CUDA only; to have it on the CPU, or to export "
            "it, set llm.quantise=no in its config.yaml: what was trained fits the whole weights as well"
        )
    model = build_stage(config)
    load_strictly(model.adapter, tensors, str(folder))
    if device is None:
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    return VisionLanguageModel(model.eval().to(device), config)


def read_model_part(folder: Path) -> ModelPart:
    """What an adapter or run folder's `config.yaml` says of the model.

    Raises: ValueError when its stage is unknown, or as `read_config` does.
    """
    stage = read_values(folder)["stage"]
    if stage not in STAGES:
        raise ValueError(f"{folder / 'config.yaml'}: stage: {stage!r} is not one of {', '.join(STAGES)}")
    return read_config(folder, model_part(STAGES[stage][0]))


class VisionLanguageModel:
    """A loaded adapter between its frozen models. Stage 2 captions and answers; stage 1 embeds and matches.

    Pictures are PIL images, paths, or what `read` returned; with precomputed features, paths of .npy or .safetensors files.
    """

    def __init__(self, model: Stage, config: ModelPart) -> None:
        self.model, self.config = model, config
        self.transform = build_transform(model.encoder)
        self.device = next(model.adapter.parameters()).device

    def caption(self, images: Sequence[Picture], prompt: str | None = None, **generation: Any) -> list[str]:
        """One caption a picture.

        Args:
            prompt: text the caption continues; None = the one of training.
            generation: `num_beams`, `max_new_tokens`, `min_new_tokens`, `length_penalty`, `do_sample`, `top_p`,
                `temperature` of `FrozenLanguageModel.generate`.
        """
        model, llm = self._stage2("caption")
        prompts = [llm.prompt if prompt is None else prompt] * len(images)
        settings = {
            "num_beams": llm.num_beams,
            "max_new_tokens": llm.caption_max_new_tokens,
            "min_new_tokens": llm.caption_min_new_tokens,
        } | generation
        with torch.no_grad():
            visual_prompt = model.visual_prompt(self.encode(images), prompts)
        return model.llm.generate(visual_prompt, prompts, **settings)

    def answer(
        self, images: Sequence[Picture] | None, questions: Sequence[str], context: Sequence[str] | None = None,
        **generation: Any,
    ) -> list[str]:  # fmt: skip
        """One answer a question; a picture that stands beside several questions is encoded once.

        Args:
            images: one picture a question, or a single one for all; None asks the language model alone, without a picture.
            context: text before each question, such as the conversation so far.
            generation: as for `caption`.

        Raises: ValueError when the numbers of pictures and questions do not fit.
        """
        model, llm = self._stage2("answer")
        before = context or [""] * len(questions)
        prompts = [
            f"{b} {self.vqa_prompt.format(clean_question(q))}".strip() for b, q in zip(before, questions, strict=True)
        ]
        penalty = llm.vqa_length_penalty
        settings = {
            "num_beams": llm.num_beams,
            "max_new_tokens": llm.vqa_max_new_tokens,
            "length_penalty": penalty if penalty is not None else -1.0 if model.llm.is_encoder_decoder else 0.0,
        } | generation
        if images is None:
            return model.llm.generate(None, prompts, **settings)
        if len(images) not in (1, len(questions)):
            raise ValueError(f"{len(images)} pictures for {len(questions)} questions; give one each, or one for all")
        keys = [str(p) if isinstance(p, str | Path) else id(p) for p in images]
        first = dict(zip(keys, images, strict=True))
        row = {key: i for i, key in enumerate(first)}
        rows = torch.tensor([row[key] for key in keys], device=self.device).expand(len(questions))
        with torch.no_grad():
            visual_prompt = model.visual_prompt(self.encode(list(first.values())), prompts, rows)
        return model.llm.generate(visual_prompt, prompts, **settings)

    @torch.no_grad()
    def embed_image(self, images: Sequence[Picture]) -> Tensor:
        """Contrastive embeddings float[B, Q, E] of unit length, one a query."""
        adapter = self._stage1("embed_image").adapter
        features = self.encode(images)
        return adapter.embed_queries(adapter.qformer.query_pass(adapter.project_images(*features)).output)

    @torch.no_grad()
    def embed_text(self, texts: Sequence[str]) -> Tensor:
        """Contrastive embeddings float[B, E] of unit length. Cosine with a picture: the largest over its queries."""
        model = self._stage1("embed_text")
        return model.adapter.embed_text(model.tokenize(list(texts)))

    @torch.no_grad()
    def match(self, images: Sequence[Picture], texts: Sequence[str]) -> Tensor:
        """Probability float[B] that picture and text belong together, pair by pair, by the matching head."""
        model = self._stage1("match")
        if len(images) != len(texts):
            raise ValueError(f"{len(images)} pictures for {len(texts)} texts; match compares pair by pair")
        memory = model.adapter.project_images(*self.encode(images))
        return model.adapter.match([memory], *model.tokenize(list(texts))).softmax(1)[:, 1]

    @property
    def vqa_prompt(self) -> str:
        """The prompt of a question, with {} in its place: `llm.vqa_prompt`, or BLIP-2's for this kind of model."""
        model, llm = self._stage2("vqa_prompt")
        return llm.vqa_prompt or PROMPTS["vqa_encoder_decoder" if model.llm.is_encoder_decoder else "vqa_decoder_only"]

    def read(self, picture: Picture | Record) -> Tensor:
        """A picture as the encoder wants it, float[3, S, S]; with precomputed features float[N, Dv].

        Raises: BrokenRecord (a ValueError) when it cannot be read.
        """
        if isinstance(picture, Tensor):
            return picture
        if isinstance(picture, str | Path):
            picture = Record(str(picture), str(picture))
        if self.transform is not None:
            return self.transform.apply(load_image(picture, self.transform.max_pixels))
        if isinstance(picture, Image.Image):
            raise ValueError("this model takes precomputed features: give paths of .npy or .safetensors files")
        return load_features(picture.image, self.model.encoder.width)

    @torch.no_grad()
    def encode(self, images: Sequence[Picture]) -> Features:
        """Frozen features of pictures, or of feature files.

        Raises: ValueError (`BrokenRecord`) when one cannot be read.
        """
        parts = [self.read(image) for image in images]
        if self.transform is not None:
            return self.model.encoder(torch.stack(parts).to(self.device))
        mask = pad_sequence([torch.ones(len(part), dtype=torch.bool) for part in parts], batch_first=True)
        return self.model.encoder(pad_sequence(parts, batch_first=True).to(self.device), mask.to(self.device))

    def _stage1(self, what: str) -> Stage1:
        if not isinstance(self.model, Stage1):
            raise ValueError(f"{what} needs a stage-1 adapter (contrastive and matching heads); this one is of stage 2")
        return self.model

    def _stage2(self, what: str) -> tuple[Stage2, LlmConfig]:
        if not isinstance(self.model, Stage2) or not isinstance(self.config, Stage2Part):
            raise ValueError(f"{what} needs a stage-2 adapter (with a language model); this one is of stage 1")
        return self.model, self.config.llm
