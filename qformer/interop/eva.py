"""The encoder inside a fine-tuned LAVIS checkpoint, EVA's vision transformer, kept as a Blip2VisionModel folder.

Source: LAVIS eva_vit.py, whose names are timm's: `vision.EVA` is the table. Its keys have no bias: the packed bias of
queries, keys and values is [q_bias, 0, v_bias].
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import Blip2VisionConfig, Blip2VisionModel

from qformer.encoders import CLIP_MEAN, CLIP_STD
from qformer.interop.vision import EVA, PATCHES, POSITIONS, DoesNotFit


def save_as_blip2(
    eva: Mapping[str, Tensor], norm: Mapping[str, Tensor], folder: Path, *, source: str, heads: int | None = None
) -> None:
    """Write EVA's weights as a Blip2VisionModel folder in float32, with LAVIS's preparation of images.

    Args:
        norm: weight and bias of the LayerNorm that follows (`ln_vision`); EVA itself ends without one.
        heads: attention heads, which no tensor tells; None = one for 88 columns as in ViT-g, or else for 64.

    Raises: ValueError when it is no EVA, or `heads` do not divide its width.
    """
    try:
        tensors = EVA.convert(eva)
    except DoesNotFit as reason:
        raise ValueError(
            f"{source} holds an encoder (visual_encoder.*) that is not EVA's ViT: it {reason}; only EVA's is converted"
        ) from None
    tensors |= {f"post_layernorm.{kind}": tensor for kind, tensor in norm.items()}
    patches, positions = tensors[f"{PATCHES}.weight"], tensors[POSITIONS]
    width, patch = patches.shape[0], patches.shape[-1]
    heads = heads or width // (88 if width % 88 == 0 else 64) or 1
    if width % heads:
        raise ValueError(f"--encoder-heads={heads} does not divide {width}, the width of the encoder inside {source}")
    side = math.isqrt(positions.shape[1] - 1) * patch
    config = Blip2VisionConfig(
        hidden_size=width,
        intermediate_size=len(tensors["encoder.layers.0.mlp.fc1.bias"]),
        num_hidden_layers=sum(name.endswith("layer_norm1.weight") for name in tensors),
        num_attention_heads=heads,
        image_size=side,
        patch_size=patch,
        hidden_act="gelu",
        layer_norm_eps=1e-6,
        qkv_bias=True,
    )
    with torch.device("meta"):
        model = Blip2VisionModel(config)
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, assign=True)
    model.save_pretrained(folder)
    preparation = {
        "image_processor_type": "BlipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": {"height": side, "width": side},
        "resample": 3,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(CLIP_MEAN),
        "image_std": list(CLIP_STD),
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(preparation, indent=1))
