"""The same image through ours and through what transformers loads from an export: outputs by name, to be compared."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchEncoding,
    Blip2ForImageTextRetrieval,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from qformer.bert import IMAGE, NoTokenizer
from qformer.data import ImageTransform
from qformer.interop.cards import REST
from qformer.language import FrozenLanguageModel
from qformer.models import Stage1, Stage2
from qformer.text import PROMPTS, encode

TOLERANCE = 1e-4  # largest absolute difference of any output, float32
TEXT = PROMPTS["caption"]  # what is read beside the image

Model = Stage1 | Stage2


@contextlib.contextmanager
def in_float32(model: nn.Module) -> Iterator[None]:
    """Widen the model for a while; weights of half precision come back as they were, bit for bit."""
    narrow = [t for t in (*model.parameters(), *model.buffers()) if t.is_floating_point() and t.dtype != torch.float32]
    dtypes = [tensor.dtype for tensor in narrow]
    for tensor in narrow:
        tensor.data = tensor.data.float()
    try:
        yield
    finally:
        for tensor, dtype in zip(narrow, dtypes, strict=True):
            tensor.data = tensor.data.to(dtype)


class _Ids:
    """Stands where no tokenizer is: every text becomes the same few token ids."""

    def __init__(self, vocab_size: int) -> None:
        self.ids = list(range(min(5, vocab_size)))

    def __call__(self, texts: str | list[str], **_: object) -> BatchEncoding:
        ids = torch.tensor([self.ids] * (1 if isinstance(texts, str) else len(texts)))
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})


@contextlib.contextmanager
def ids_for_no_tokenizer(model: Model) -> Iterator[bool]:
    """For a while, let a model that has no tokenizer read some token ids in the place of any text; yields whether it has none."""
    without: Any = getattr(model, "tokenizer", None)
    if not isinstance(without, NoTokenizer):
        yield False
        return
    model.tokenizer = _Ids(len(without))
    try:
        yield True
    finally:
        model.tokenizer = without


@torch.no_grad()
def run_ours(model: Model, image: Image.Image) -> tuple[Tensor, dict[str, Tensor]]:
    """Features float[1, N, Dv] and what is compared; random features where the encoder takes no images."""
    device = next(model.adapter.parameters()).device
    with in_float32(model):
        kind = model.encoder.input_transform
        if kind is None:
            shape = (1, model.encoder.num_tokens or 9, model.encoder.width)
            features = model.encoder(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device))
        else:
            transform = ImageTransform(kind.size, kind.mean, kind.std, kind.interpolation)
            features = model.encoder(transform.apply(image)[None].to(device))
        if model.name == "stage2":
            visual_prompt = model.visual_prompt(features, [TEXT])
            outputs = {"visual prompt": visual_prompt, "logits": _logits(model.llm, visual_prompt)}
        else:
            adapter, text = model.adapter, model.tokenize([TEXT])
            images = adapter.project_images(*features)
            queries = adapter.embed_queries(adapter.qformer.query_pass(images).output)
            similarity = (queries @ adapter.embed_text(text).T).amax(1)
            outputs = {"similarity": similarity, "matching logits": adapter.match([images], *text)}
    return features.tokens.cpu(), {name: tensor.cpu() for name, tensor in outputs.items()}


def _logits(llm: FrozenLanguageModel, visual_prompt: Tensor) -> Tensor:
    end = [llm.facts.eos_id] if llm.is_encoder_decoder and llm.facts.eos_id is not None else []
    ids = torch.tensor([llm.facts.bos_ids + encode(llm.tokenizer, TEXT) + end], device=visual_prompt.device)
    arguments: dict[str, Any] = {"inputs_embeds": torch.cat([visual_prompt, llm.embed(ids)], 1)}
    if llm.is_encoder_decoder:
        arguments["decoder_input_ids"] = ids.new_tensor([[llm.model.generation_config.decoder_start_token_id]])
    return llm.model(**arguments).logits


@torch.no_grad()
def run_whole(model: Model, folder: Path, image: Image.Image) -> dict[str, Tensor]:
    """What transformers makes of the image with the model and the processor of the folder.

    Raises: ValueError when its class has no place for a tensor of the folder, or lacks one.
    """
    inputs = _inputs(model, folder, image)
    auto: Any = Blip2ForImageTextRetrieval if model.name == "stage1" else AutoModelForImageTextToText
    theirs, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    if bad := [str(n) for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for n in info[kind]]:
        raise ValueError(f"{type(theirs).__name__} cannot hold this model: {len(bad)} tensors do not fit, as {bad[0]}")
    theirs.eval()
    if model.name == "stage1":
        matching = theirs(**inputs, use_image_text_matching_head=True).logits_per_image
        return {"similarity": theirs(**inputs).logits_per_image, "matching logits": matching}
    of_qformer = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    if model.llm.is_encoder_decoder:
        inputs["decoder_input_ids"] = torch.tensor([[theirs.generation_config.decoder_start_token_id]])
    logits = theirs(**inputs).logits[..., : model.llm.vocab_size]  # `<image>` may have got a row of its own
    return {"visual prompt": theirs.get_image_features(**of_qformer).pooler_output, "logits": logits}


def _without_tokenizer(model: Model) -> bool:
    return isinstance(getattr(model, "tokenizer", None), _Ids)


def _inputs(model: Model, folder: Path, image: Image.Image) -> dict[str, Any]:
    """What the processor of the folder makes of the image and TEXT, or the same by hand where there is none."""
    if not _without_tokenizer(model):
        return dict(AutoProcessor.from_pretrained(folder, backend="pil")(images=image, text=TEXT, return_tensors="pt"))
    pixels = BlipImageProcessorPil.from_pretrained(folder)(images=image, return_tensors="pt").pixel_values
    read: Any = model.tokenizer
    text = read(TEXT)
    if model.name == "stage1":
        return {"pixel_values": pixels, **text}
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    after = [tokenizer.convert_tokens_to_ids(IMAGE)] * model.adapter.qformer.query_tokens.shape[1]
    ids = torch.tensor([after + tokenizer(TEXT).input_ids])
    return {
        "pixel_values": pixels,
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        **{f"qformer_{name}": value for name, value in text.items()},
    }


@torch.no_grad()
def run_qformer(model: Model, folder: Path, features: Tensor) -> dict[str, Tensor]:
    """What transformers makes of the features with Q-Former and REST of the folder, as the card says."""
    qformer: Any = AutoModel.from_pretrained(folder).eval()
    rest = load_file(folder / REST)
    norm = (rest["post_layernorm.weight"], rest["post_layernorm.bias"], model.adapter.feature_norm.eps)
    normed, queries = F.layer_norm(features, features.shape[-1:], *norm), rest["query_tokens"]
    n_queries = queries.shape[1]

    def run(embeds: Tensor, n_queries: int) -> Tensor:
        return qformer(query_embeds=embeds, query_length=n_queries, encoder_hidden_states=normed).last_hidden_state

    def linear(name: str, hidden: Tensor) -> Tensor:
        return F.linear(hidden, rest[f"{name}.weight"], rest[f"{name}.bias"])

    words = queries[:, :0]
    if model.adapter.qformer.vocab_size is not None:
        tokenizer: Any = AutoTokenizer.from_pretrained(folder) if not _without_tokenizer(model) else model.tokenizer
        ids = tokenizer(TEXT, return_tensors="pt").input_ids
        positions = rest["embeddings.position_embeddings.weight"][: ids.shape[1]]
        words = rest["embeddings.word_embeddings.weight"][ids] + positions
    both = run(torch.cat([queries, words], 1), n_queries)[:, :n_queries]
    if model.name == "stage2":
        return {"visual prompt": linear("language_projection", both)}
    images = F.normalize(linear("vision_projection", run(queries, n_queries)), dim=-1)
    text = F.normalize(linear("text_projection", run(words, 0)[:, 0]), dim=-1)
    return {"similarity": (images @ text.T).amax(1), "matching logits": linear("itm_head", both).mean(1)}


def difference(ours: Tensor, theirs: Tensor) -> float:
    """Largest absolute difference; infinite for outputs of different shapes."""
    return float((ours - theirs).abs().max()) if ours.shape == theirs.shape else math.inf
