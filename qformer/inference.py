"""A trained adapter put to use: captions, answers, embeddings and matching scores, in batches."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from qformer.attention import AttentionMaps, attention_of_match, attention_of_text
from qformer.build import STAGES, build_stage, build_transform
from qformer.checkpoint import adapter_folder, load_strictly, read_adapter
from qformer.config import LlmConfig, ModelPart, Stage2Part, model_part, prompt_problem, read_config, read_values
from qformer.data import Record, clean_question, load_image
from qformer.data.loading import frames_of, index_images, load_input
from qformer.data.records import is_clip
from qformer.encoders import Features
from qformer.messages import one_line
from qformer.models import Stage, Stage1, Stage2
from qformer.text import continue_prompt

Picture = Image.Image | str | Path | Tensor
Images = Picture | Sequence[Picture | Sequence[Picture]] | Features
Rows = list[list[Picture]] | Features


def load(path: str | Path, device: str | None = None, revision: str | None = None) -> "VisionLanguageModel":
    """Rebuild a trained model from an adapter folder: frozen parts by id, trainable tensors strictly from the file.

    Args:
        path: what a run leaves in `run.dir/adapter`, that run's folder, or the hub id of a repository that holds either.
        device: where to run, e.g. "cuda"; None = the accelerator if there is one.
        revision: of a hub id.

    Raises: ValueError when the folder is no adapter, its tensors do not fit its config, or there is no such device.
    """
    place = _require_device(device)
    folder = adapter_folder(path, revision)
    tensors, config = read_adapter(folder), read_model_part(folder)
    if place.type == "cpu" and device and isinstance(config, Stage2Part) and config.llm.quantise != "no":
        raise ValueError(
            f"{folder} has llm.quantise={config.llm.quantise}, which runs on CUDA only; to have it on the CPU, or to export "
            "it, set llm.quantise=no in its config.yaml: what was trained fits the whole weights as well"
        )
    model = build_stage(config)
    load_strictly(model.adapter, tensors, str(folder))
    return VisionLanguageModel(model.eval().to(place), config)


def read_model_part(folder: Path) -> ModelPart:
    """What an adapter or run folder's `config.yaml` says of the model.

    Raises: ValueError when its stage is unknown, or as `read_config` does.
    """
    stage = read_values(folder)["stage"]
    if stage not in STAGES:
        raise ValueError(f"{folder / 'config.yaml'}: stage: {stage!r} is not one of {', '.join(STAGES)}")
    return read_config(folder, model_part(STAGES[stage][0]))


def _require_device(device: str | None) -> torch.device:
    if device is None:
        device = str(torch.accelerator.current_accelerator()) if torch.accelerator.is_available() else "cpu"
    try:
        torch.zeros(1, device=device).tolist()
    except (RuntimeError, AssertionError, NotImplementedError, TypeError, ValueError, ImportError) as error:
        count = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
        here = [f"{torch.accelerator.current_accelerator()}:{i}" for i in range(count)]
        raise ValueError(
            f"device={device!r} cannot be used ({one_line(error)}); here there is {', '.join(['cpu', *here])}"
        ) from None
    return torch.device(device)


class VisionLanguageModel:
    """A loaded adapter between its frozen models. Stage 2 captions and answers; stage 1 embeds and matches.

    Images are PIL images, paths, what `read` returned, or all of them as what `encode` returned; a single one needs no
    list, and a list among them is a row of several. Paths of videos are clips, see `sample_clips`. With precomputed features they are paths of .npy or .safetensors files.
    """

    def __init__(self, model: Stage, config: ModelPart) -> None:
        self.model, self.config = model, config
        self.transform = build_transform(model.encoder)
        self.device = next(model.adapter.parameters()).device

    def sample_clips(self, frames: int | None = None, frame_policy: str | None = None) -> None:
        """From now on, read so many frames of a clip, 8 at first, by "uniform" or "middle" (`data.clips.POLICIES`)."""
        if self.transform is not None:
            before = self.transform
            self.transform = replace(
                before,
                frames=before.frames if frames is None else frames,
                frame_policy=before.frame_policy if frame_policy is None else frame_policy,
            )

    def caption(self, images: Images, prompt: str | Sequence[str] | None = None, **generation: Any) -> list[str]:
        """One caption an image, or for several together ([[a, b]]); with `num_return` several, those of an image next to each other.

        Args:
            prompt: text the caption continues, one for all or one an image; None = the one of training.
            generation: `num_beams`, `max_new_tokens`, `min_new_tokens`, `length_penalty`, `do_sample`, `top_p`,
                `temperature`, `num_return`, `repetition_penalty`, `no_repeat_ngram_size` of
                `FrozenLanguageModel.generate`.

        Raises: ValueError when the numbers of images and prompts differ, or an image cannot be read.
        """
        _, llm = self._stage2("caption")
        rows = self._rows(images)
        count = len(rows.tokens) if isinstance(rows, Features) else len(rows)
        prompt = llm.prompt if prompt is None else prompt
        prompts = [prompt] * count if isinstance(prompt, str) else list(prompt)
        if len(prompts) != count:
            raise ValueError(f"{len(prompts)} prompts for {count} images; give one each, or one text for all")
        if not count:
            return []
        settings = {
            "num_beams": llm.num_beams,
            "max_new_tokens": llm.caption_max_new_tokens,
            "min_new_tokens": llm.caption_min_new_tokens,
        } | generation
        return self._write(rows, prompts, **settings)

    def answer(
        self, images: Images | None, questions: str | Sequence[str], context: str | Sequence[str] | None = None, *,
        history: Sequence[tuple[str, str]] = (), prompt: str | None = None, **generation: Any,
    ) -> list[str]:  # fmt: skip
        """One answer a question; an image that stands beside several questions is encoded once.

        Args:
            images: one image a question, or a list of several ([[a, b]]), whose visual prompts stand one after the other;
                a single entry is for all questions. None asks the language model alone, without an image.
            context: text before each question.
            history: questions and answers of the conversation so far; in a chat turns of their own.
            prompt: the prompt of a question, {} in its place; None = `vqa_prompt`.
            generation: as for `caption`.

        Raises: ValueError when the numbers of images, contexts and questions do not fit, or as `caption` does.
        """
        model, llm = self._stage2("answer")
        penalty = llm.vqa_length_penalty
        settings = {
            "num_beams": llm.num_beams,
            "max_new_tokens": llm.vqa_max_new_tokens,
            "length_penalty": penalty if penalty is not None else -1.0 if model.llm.is_encoder_decoder else 0.0,
        } | generation
        prompts = self._prompts(questions, context, history=history, prompt=prompt)
        if images is None or not prompts:
            return model.llm.generate(None, prompts, **settings)
        return self._write(self._rows(images), prompts, **settings)

    def rank(
        self, images: Images | None, questions: str | Sequence[str], candidates: Sequence[str] | Sequence[Sequence[str]],
        context: str | Sequence[str] | None = None, *, prompt: str | None = None, per_token: bool = False,
        pmi: bool = False, batch_size: int = 64,
    ) -> list[Tensor]:  # fmt: skip
        """The language model's loss of every candidate answer to each question, in nats: the smallest is the best.

        A loss is summed over the candidate's tokens and what ends it: -log of the probability that just this is answered.
        Source: InstructBLIP (arXiv 2305.06500), section 2.5; `rank_answers` of BLIP.

        Args:
            images, questions, context, prompt: as for `answer`.
            candidates: answers to choose from, K of them, for all questions or a list for each.
            per_token: divide by the number of tokens, which favours long candidates.
            pmi: minus the loss without image and context, for small language models that have a favourite answer: what
                is left is by how much image and context make the answer likelier (pointwise mutual information, its
                sign turned; Holtzman and others, arXiv 2104.08315).
            batch_size: candidates that are read at once; a question's prompt is read once for all of them.

        Returns: float32[K] for each question.
        Raises: ValueError when a question has no candidates, or their lists are not one for each, when there is neither
            image nor context for `pmi` to take away, or as `answer` does.
        """
        llm = self._stage2("rank")[0].llm
        questions = [questions] if isinstance(questions, str) else list(questions)
        lists: list[Any] = list(candidates)
        if all(isinstance(entry, str) for entry in lists):
            lists = [lists] * len(questions)
        if len(lists) != len(questions) or not all(lists) or any(isinstance(entry, str) for entry in lists):
            raise ValueError(
                f"candidates: {[len(entry) for entry in lists]} for {len(questions)} questions; give one list of texts for "
                "all, or one for each question, none of them empty"
            )
        if pmi and images is None and not context:
            raise ValueError("pmi: neither images nor a context, without which there is nothing to compare")
        prompts = self._prompts(questions, context, history=(), prompt=prompt)
        losses = []
        visual_prompt, mask = (None, None) if images is None or not prompts else self._look(self._rows(images), prompts)
        for i, several in enumerate(lists):
            row = None if visual_prompt is None else visual_prompt[i : i + 1]
            row = row if row is None or mask is None else row[:, mask[i]]
            loss = llm.candidate_losses(row, prompts[i], several, batch_size=batch_size)
            losses.append(loss.total / loss.tokens if per_token else loss.total)
        if not pmi:
            return losses
        asked = [(question, *several) for question, several in zip(questions, lists, strict=True)]
        once = list(dict.fromkeys(asked))
        how: dict[str, Any] = {"prompt": prompt, "per_token": per_token, "batch_size": batch_size}
        alone = dict(zip(once, self.rank(None, [q for q, *_ in once], [c for _, *c in once], **how), strict=True))
        return [loss - alone[key] for loss, key in zip(losses, asked, strict=True)]

    def _prompts(
        self, questions: str | Sequence[str], context: str | Sequence[str] | None, *,
        history: Sequence[tuple[str, str]], prompt: str | None,
    ) -> list[Any]:  # fmt: skip
        """What the language model is given of each question."""
        questions = [questions] if isinstance(questions, str) else list(questions)
        before = [context] * len(questions) if isinstance(context, str) else context or [""] * len(questions)
        if len(before) != len(questions):
            raise ValueError(f"{len(before)} contexts for {len(questions)} questions; give one each")
        asked = [continue_prompt(b, self.ask(q, prompt)) for b, q in zip(before, questions, strict=True)]
        turns = [(self.ask(question, prompt), answer) for question, answer in history]
        if self._stage2("answer")[0].llm.chat is None:
            before = " ".join(f"{question} {answer}\n" for question, answer in turns)
            return [f"{before} {text}" if before else text for text in asked]
        return [[*(turn for pair in turns for turn in pair), text] for text in asked]

    @torch.no_grad()
    def _look(self, images: Rows, prompts: Sequence[Any]) -> tuple[Tensor, Tensor | None]:
        """The visual prompts of each row, and which positions are real where rows have different numbers of images."""
        model, _ = self._stage2("generate")
        features, rows = self._encode_once(images, len(prompts))
        texts = [text if isinstance(text, str) else text[-1] for text in prompts]
        return model.visual_prompt(features, texts, rows), model.visual_mask(rows)

    def _write(self, images: Rows, prompts: Sequence[Any], **generation: Any) -> list[str]:
        """What the language model writes behind each row's visual prompts and its prompt."""
        visual_prompt, mask = self._look(images, prompts)
        return self._stage2("generate")[0].llm.generate(visual_prompt, prompts, visual_mask=mask, **generation)

    def ask(self, question: str, prompt: str | None = None) -> str:
        """A question, cleaned as in training, in its prompt.

        Raises: ValueError when the prompt does not hold {} once.
        """
        prompt = self.vqa_prompt if prompt is None else prompt
        if problem := prompt_problem(prompt) if prompt else "'' has no {}, where the question goes":
            raise ValueError(f"prompt: {problem}")
        return prompt.replace("{}", clean_question(question))

    @torch.no_grad()
    def embed_image(self, images: Images) -> Tensor:
        """Contrastive embeddings float[B, Q, E] of unit length, one a query; the tokens of a clip's frames, or of several
        images ([[a, b]]), are read side by side.
        """
        adapter = self._stage1("embed_image").adapter
        rows = self._rows(images)
        if not isinstance(rows, Features) and not rows:
            return torch.zeros(
                0, self.config.qformer.queries, adapter.image_projection.out_features, device=self.device
            )
        features = self._encode_side_by_side(rows)
        return adapter.embed_queries(adapter.qformer.query_pass(adapter.project_images(*features)).output)

    @torch.no_grad()
    def embed_text(self, texts: str | Sequence[str]) -> Tensor:
        """Contrastive embeddings float[B, E] of unit length. Cosine with an image: the largest over its queries."""
        model = self._stage1("embed_text")
        texts = [texts] if isinstance(texts, str) else list(texts)
        if not texts:
            return torch.zeros(0, model.adapter.text_projection.out_features, device=self.device)
        return model.adapter.embed_text(model.tokenize(texts))

    @torch.no_grad()
    def match(self, images: Images, texts: str | Sequence[str]) -> Tensor:
        """Probability float[B] that image and text belong together, pair by pair, by the matching head."""
        model = self._stage1("match")
        rows, texts = self._rows(images), [texts] if isinstance(texts, str) else list(texts)
        count = len(rows.tokens) if isinstance(rows, Features) else len(rows)
        if count != len(texts):
            raise ValueError(f"{count} images for {len(texts)} texts; match compares pair by pair")
        if not texts:
            return torch.zeros(0, device=self.device)
        memory = model.adapter.project_images(*self._encode_side_by_side(rows))
        return model.adapter.match([memory], *model.tokenize(texts)).softmax(1)[:, 1]

    def attention(self, image: Images, text: str | None = None, *, question: str | None = None) -> AttentionMaps:
        """Where the queries look in an image, or in several together ([a, b], a clip), and what speaks for each word.

        Args:
            text: what stage 1 matches with it, or a caption or answer that stage 2 writes; None = the queries alone.
            question: of stage 2, what the text answers; None = it is a caption.

        Raises: ValueError when the encoder has no grid (`encoder.grid` of features), or an image cannot be read.
        """
        rows = self._rows(image)
        row = rows if isinstance(rows, Features) else [[picture for row in rows for picture in row]]
        features, of = self._encode_once(row, 1)
        if question is None and isinstance(self.model, Stage1):
            return attention_of_match(self.model, features, of.flatten(), text)
        model, llm = self._stage2("question")
        prompt = llm.prompt if question is None else self._prompts(question, None, history=(), prompt=None)[0]
        return attention_of_text(model, features, of.flatten(), prompt=prompt, text=text)

    @property
    def vqa_prompt(self) -> str:
        """The prompt of a question, with {} in its place: `llm.vqa_prompt`, BLIP-2's for this kind of model, or in a chat {}."""
        return self._stage2("vqa_prompt")[0].vqa_prompt

    def read(self, picture: Picture | Record) -> Tensor:
        """An image as the encoder wants it, float[3, S, S], a clip float[n, 3, S, S]; precomputed features float[N, Dv].

        Raises: BrokenRecord (a ValueError) when it cannot be read.
        """
        if isinstance(picture, Tensor):
            return picture
        if isinstance(picture, str | Path):
            picture = Record(str(picture), str(picture), clip=is_clip(str(picture)))
        if isinstance(picture, Record):
            return load_input(picture, self.transform, [None], self.model.encoder.width)[0]
        if self.transform is None:
            raise ValueError("this model takes precomputed features: give paths of .npy or .safetensors files")
        return self.transform.apply(load_image(picture, self.transform.max_pixels))

    @torch.no_grad()
    def encode(self, images: Images) -> Features:
        """Frozen features of images, clips or feature files; those of several images ([[a, b]]) and of a clip's frames stand
        side by side. What it returned is taken as it is.

        Raises: ValueError (`BrokenRecord`) when one cannot be read.
        """
        return self._encode_side_by_side(self._rows(images))

    def _encode(self, parts: list[Tensor]) -> Features:
        if self.transform is not None:
            return self.model.encoder(torch.stack(parts).to(self.device))
        mask = pad_sequence([torch.ones(len(part), dtype=torch.bool) for part in parts], batch_first=True)
        return self.model.encoder(pad_sequence(parts, batch_first=True).to(self.device), mask.to(self.device))

    def _rows(self, images: Images) -> Rows:
        """The images of each row in a list, of a single one too; features as they are."""
        if isinstance(images, Features):
            return images
        single = images.ndim == (2 if self.transform is None else 3) if isinstance(images, Tensor) else False
        if single or isinstance(images, str | Path | Image.Image):
            return [[images]]  # type: ignore[list-item]
        return [list(row) if isinstance(row, list | tuple) else [row] for row in images]  # type: ignore[list-item]

    def _encode_side_by_side(self, images: Rows) -> Features:
        features, rows = self._encode_once(images)
        if rows.ndim == 2:
            return features.side_by_side(rows)
        return Features(features.tokens[rows], None if features.mask is None else features.mask[rows])

    @torch.no_grad()
    def _encode_once(self, images: Rows, count: int | None = None) -> tuple[Features, Tensor]:
        """Features of the images that differ, and which of them stand in each of `count` rows: int64[R] or int64[R, K]."""
        there = len(images.tokens) if isinstance(images, Features) else len(images)
        count = there if count is None else count
        if there not in (1, count):
            raise ValueError(f"{there} images for {count} questions; give one each, or one for all")
        if isinstance(images, Features):
            tokens, mask = images
            features = Features(tokens.to(self.device), None if mask is None else mask.to(self.device))
            return features, torch.arange(there, device=self.device).expand(count)
        if not all(images):
            raise ValueError(f"row {[bool(row) for row in images].index(False)} (from 0) has no image")
        first = {_key(image): image for row in images for image in row}
        frames = {key: frames_of(self.read(image)) for key, image in first.items()}
        rows = []
        for row in images:
            pairs = [((_key(image), n), frame) for image in row for n, frame in enumerate(frames[_key(image)])]
            rows.append(([frame for _, frame in pairs], [key for key, _ in pairs]))
        different, image_of = index_images(rows)
        if image_of.shape[1] == 1:
            image_of = image_of[:, 0]
        return self._encode(different), image_of.to(self.device).expand(count, *image_of.shape[1:])

    def _stage1(self, what: str) -> Stage1:
        if not isinstance(self.model, Stage1):
            raise ValueError(f"{what} needs a stage-1 adapter (contrastive and matching heads); this one is of stage 2")
        return self.model

    def _stage2(self, what: str) -> tuple[Stage2, LlmConfig]:
        if not isinstance(self.model, Stage2) or not isinstance(self.config, Stage2Part):
            raise ValueError(f"{what} needs a stage-2 adapter (with a language model); this one is of stage 1")
        return self.model, self.config.llm


def _key(image: Picture) -> str | int:
    """Equal for images that are the same file or object."""
    return str(image) if isinstance(image, str | Path) else id(image)
