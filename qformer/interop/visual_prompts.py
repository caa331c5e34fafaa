"""What a language model is shown of images, as tensors for a server of that model."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from qformer.config import Stage2Part
from qformer.encoders import Features
from qformer.files import atomic_folder
from qformer.interop.cards import CARD, PROMPT_EMBEDS, VISUAL_PROMPTS, of_visual_prompts
from qformer.lora import Lora
from qformer.models import Stage2
from qformer.tuning import LLM_LORA

logger = logging.getLogger(__name__)


def write_visual_prompts(
    model: Stage2, config: Stage2Part, features: Iterable[tuple[str, Features]], *, prompt: str, out: Path
) -> int:
    """Write visual prompts float32[Q, Dl] by image name, and rows float32[L, Dl] of them and the prompt, for a server of
    the unmodified language model; returns how many.

    Args:
        features: name and frozen features (a batch of one) of each image.
        prompt: what an instructed Q-Former reads; the text to be sent after the visual prompt.

    Raises: ValueError when `out` exists, or two images have one name.
    """
    if out.exists():
        raise ValueError(f"{out} exists already; name a folder that does not, or remove it")
    prompts: dict[str, Tensor] = {}
    rows: dict[str, Tensor] = {}
    with torch.no_grad():
        for name, of_image in features:
            if name in prompts:
                raise ValueError(f"{name} is named twice; expected every image once")
            prompts[name] = model.visual_prompt(of_image, [prompt])[0].float().cpu().contiguous()
            rows[name] = model.prompt_embeds(of_image, [prompt])[0].float().cpu().contiguous()
    lora = dict(model.adapter.named_children()).get(LLM_LORA)
    with atomic_folder(out) as folder:
        if isinstance(lora, Lora):
            lora.save_pretrained(folder / LLM_LORA)
            logger.warning("the language model learnt too: serve %s with the LoRA in %s", config.llm.id, out / LLM_LORA)
        for file, tensors in ((VISUAL_PROMPTS, prompts), (PROMPT_EMBEDS, rows)):
            save_file(tensors, folder / file, metadata={"llm": config.llm.id, "prompt": prompt})
        (folder / CARD).write_text(
            of_visual_prompts(config, model.llm.is_encoder_decoder, prompt, next(iter(prompts)), lora=lora is not None)
        )
    return len(prompts)
