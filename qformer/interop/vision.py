"""Frozen vision transformers as transformers' Blip2VisionModel: one table a family, layer-scale folded into the weights.

What fits has a class token, learned positions, pre-norm blocks with plain MLPs and one LayerNorm eps. What does not: a
norm before the blocks (CLIP), no class token (SigLIP), registers, rotary positions (DINOv3, EVA02), gated MLPs.

Source: modeling_blip_2.py, modeling_vit.py and modeling_dinov2.py of transformers; eva.py and vision_transformer.py of timm.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from qformer.encoders import FrozenEncoder

Table = Mapping[str, tuple[str, ...]]
CLASS, POSITIONS, PATCHES = (f"embeddings.{n}" for n in ("class_embedding", "position_embedding", "patch_embedding"))
BLOCK, QKV_BIAS, ZEROS = "encoder.layers.{}.", "self_attn.qkv.bias", ""


class DoesNotFit(ValueError):
    """Why something has no place in transformers' Blip2 classes, as the end of a sentence."""


class Converted(NamedTuple):
    """An encoder as a Blip2VisionModel without its final norm: arguments of Blip2VisionConfig, tensors by its names."""

    config: dict[str, Any]
    tensors: dict[str, Tensor]


@dataclass(frozen=True)
class Family:
    """Where a library keeps the tensors of a vision transformer.

    Args:
        names: Blip2VisionModel's tensor outside the blocks -> theirs.
        block: their prefix of block {}.
        block_names: Blip2VisionModel's tensor in a block -> theirs, stacked if there are several; ZEROS is a bias of zeros.
        scales: Blip2VisionModel's module -> their layer-scale of its output, where there is one.
        unread: pattern of their tensors that come after the last block, or serve pretraining only.
    """

    names: Table
    block: str
    block_names: Table
    scales: Mapping[str, str] = field(default_factory=dict)
    unread: str = r"$."

    def convert(self, theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Their tensors under the names of Blip2VisionModel.

        Raises: DoesNotFit naming what is missing, or there and not in the tables.
        """
        numbers = {m[1] for name in theirs if (m := re.match(self.block.replace(".", r"\.").format(r"(\d+)"), name))}
        converted, read = dict[str, Tensor](), set[str]()
        for target, sources in self.names.items():
            converted[target] = _stack(theirs, "", sources, read)
        for number in sorted(numbers, key=int):
            prefix = self.block.format(number)
            for target, sources in self.block_names.items():
                if target == QKV_BIAS and not any(prefix + s in theirs for s in sources):
                    continue  # a model without that bias
                tensor = _stack(theirs, prefix, sources, read)
                scale = prefix + self.scales.get(target.rpartition(".")[0], "-")
                if scale in theirs:
                    tensor = theirs[scale].reshape(-1, *[1] * (tensor.dim() - 1)) * tensor
                    read.add(scale)
                converted[BLOCK.format(number) + target] = tensor
        unknown = [name for name in theirs if name not in read and not re.fullmatch(self.unread, name)]
        if unknown:
            raise DoesNotFit(f"has {unknown[0]}, for which Blip2VisionModel has no place")
        return converted


def _stack(theirs: Mapping[str, Tensor], prefix: str, sources: tuple[str, ...], read: set[str]) -> Tensor:
    names = [prefix + source for source in sources if source != ZEROS]
    if missing := [name for name in names if name not in theirs]:
        raise DoesNotFit(f"has no {missing[0]}, which Blip2VisionModel needs")
    read.update(names)
    parts = [torch.zeros_like(theirs[names[0]]) if s == ZEROS else theirs[prefix + s] for s in sources]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def _modules(**pairs: str | tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Weight and bias of modules; __ stands for the dot in our names."""
    modules = {ours.replace("__", "."): (t,) if isinstance(t, str) else t for ours, t in pairs.items()}
    return {
        f"{o}.{kind}": tuple(f"{t}.{kind}" for t in names)
        for o, names in modules.items()
        for kind in ("weight", "bias")
    }


_QKV = tuple(f"attention.{letter}_proj" for letter in "qkv")
_HUGGING_FACE: dict[str, tuple[str, ...]] = {
    CLASS: ("embeddings.cls_token",),
    POSITIONS: ("embeddings.position_embeddings",),
    **_modules(embeddings__patch_embedding="embeddings.patch_embeddings.projection"),
}
_HUGGING_FACE_BLOCK = _modules(
    self_attn__qkv=_QKV, self_attn__projection="attention.o_proj", mlp__fc1="mlp.fc1", mlp__fc2="mlp.fc2"
)
_AFTER = r"layernorm\..*|pooler\..*|embeddings\.mask_token"

VIT = Family(
    _HUGGING_FACE,
    "layers.{}.",
    {**_HUGGING_FACE_BLOCK, **_modules(layer_norm1="layernorm_before", layer_norm2="layernorm_after")},
    unread=_AFTER,
)
DINOV2 = Family(
    _HUGGING_FACE,
    "encoder.layer.{}.",
    {**_HUGGING_FACE_BLOCK, **_modules(layer_norm1="norm1", layer_norm2="norm2")},
    {"self_attn.projection": "layer_scale1.lambda1", "mlp.fc2": "layer_scale2.lambda1"},
    unread=_AFTER,
)
_TIMM: dict[str, tuple[str, ...]] = {
    CLASS: ("cls_token",),
    POSITIONS: ("pos_embed",),
    **_modules(embeddings__patch_embedding="patch_embed.proj"),
}
_TIMM_BLOCK = _modules(
    layer_norm1="norm1", self_attn__projection="attn.proj", layer_norm2="norm2", mlp__fc1="mlp.fc1", mlp__fc2="mlp.fc2"
)
EVA = Family(
    _TIMM,
    "blocks.{}.",
    {**_TIMM_BLOCK, "self_attn.qkv.weight": ("attn.qkv.weight",), QKV_BIAS: ("attn.q_bias", ZEROS, "attn.v_bias")},
    {"self_attn.projection": "gamma_1", "mlp.fc2": "gamma_2"},
)
TIMM_VIT = Family(
    _TIMM,
    "blocks.{}.",
    {**_TIMM_BLOCK, **_modules(self_attn__qkv="attn.qkv")},
    {"self_attn.projection": "ls1.gamma", "mlp.fc2": "ls2.gamma"},
)
_OWN_MODULES = ("layer_norm1", "self_attn.qkv", "self_attn.projection", "layer_norm2", "mlp.fc1", "mlp.fc2")
BLIP2 = Family(
    {CLASS: (CLASS,), POSITIONS: (POSITIONS,), **_modules(**{PATCHES: PATCHES})},
    BLOCK,
    _modules(**{name: name for name in _OWN_MODULES}),
    unread=r"post_layernorm\..*",
)

FAMILIES = {"vit": VIT, "dinov2": DINOV2, "blip_2_vision_model": BLIP2, "instructblip_vision_model": BLIP2}
WHY_NOT = {
    "clip_vision_model": "has a norm before its blocks, and Blip2VisionModel has none",
    "siglip_vision_model": "has no class token, and Blip2VisionModel needs one",
    "dinov2_with_registers": "has register tokens, and Blip2VisionModel has no place for them",
    "dinov3_vit": "has rotary positions, and Blip2VisionModel adds learned ones",
}


def to_blip2_vision(encoder: FrozenEncoder) -> Converted:
    """The encoder up to its tapped block as a Blip2VisionModel, its positions those of its own image size.

    Raises: DoesNotFit with the reason.
    """
    heads, activation, eps, tensors = _converted(encoder)
    assert encoder.input_transform is not None
    side = encoder.input_transform.size
    width, _, patch_height, patch_width = tensors[f"{PATCHES}.weight"].shape
    if patch_height != patch_width or tensors[POSITIONS].shape[1] != (side // patch_width) ** 2 + 1:
        raise DoesNotFit("has positions that are not one for the class token and one for each square patch")
    blocks = {name.split(".")[2] for name in tensors if name.startswith("encoder.")}
    config = {
        "hidden_size": width,
        "intermediate_size": len(tensors["encoder.layers.0.mlp.fc1.weight"]),
        "num_hidden_layers": len(blocks),
        "num_attention_heads": heads,
        "image_size": side,
        "patch_size": patch_width,
        "hidden_act": activation,
        "layer_norm_eps": eps,
        "qkv_bias": BLOCK.format(0) + QKV_BIAS in tensors,
    }
    return Converted(config, {name: t.detach().cpu().contiguous() for name, t in tensors.items()})


def _converted(encoder: FrozenEncoder) -> tuple[int, str, float, dict[str, Tensor]]:
    """Heads, activation, eps of the norms and tensors; which table is read follows from what the tower is."""
    from open_clip.timm_model import TimmModel
    from open_clip.transformer import VisionTransformer as OpenClipVisionTransformer
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer
    from transformers import PreTrainedModel

    tower: Any = encoder.tower
    if tower is None:
        raise DoesNotFit("is not there: the features are precomputed")
    if isinstance(tower, PreTrainedModel):
        return _of_transformers(encoder)
    if isinstance(tower, OpenClipVisionTransformer):
        raise DoesNotFit(WHY_NOT["clip_vision_model"])
    trunk: Any = tower.trunk if isinstance(tower, TimmModel) else tower
    if isinstance(trunk, (Eva, TimmVisionTransformer)):
        return _of_timm(trunk)
    raise DoesNotFit(f"is a {type(trunk).__name__}, which no table covers")


def _of_transformers(encoder: FrozenEncoder) -> tuple[int, str, float, dict[str, Tensor]]:
    tower: Any = encoder.tower
    config = tower.config
    if config.model_type not in FAMILIES:
        raise DoesNotFit(WHY_NOT.get(config.model_type, f"is a {config.model_type}, which no table covers"))
    family = FAMILIES[config.model_type]
    assert encoder.input_transform is not None
    assert encoder.num_tokens is not None
    side = encoder.input_transform.size
    (positions,) = family.names[POSITIONS]
    # Whatever the tower does for images of this side at every call is done once; it reads only the shape of these.
    tokens = torch.empty(1, encoder.num_tokens, encoder.width, device="meta")
    with torch.no_grad():
        fitted = tower.embeddings.interpolate_pos_encoding(tokens, side, side)
    tensors = family.convert({**tower.state_dict(), positions: fitted})
    return config.num_attention_heads, config.hidden_act, config.layer_norm_eps, tensors


def _of_timm(trunk: Any) -> tuple[int, str, float, dict[str, Tensor]]:
    from timm.models.eva import Eva, EvaBlock
    from timm.models.vision_transformer import Block

    is_eva = isinstance(trunk, Eva)
    if is_eva and trunk.rope is not None:
        raise DoesNotFit(WHY_NOT["dinov3_vit"])
    family, kind = (EVA, EvaBlock) if is_eva else (TIMM_VIT, Block)
    blocks = list(trunk.blocks)
    if any(type(block) is not kind for block in blocks):
        raise DoesNotFit(f"is made of {type(blocks[0]).__name__}, and Blip2VisionModel of plain pre-norm blocks")
    tensors = family.convert(trunk.state_dict())
    return blocks[0].attn.num_heads, _activation(blocks[0].mlp.act), blocks[0].norm1.eps, tensors


def _activation(module: nn.Module) -> str:
    """Its name in transformers."""
    from timm.layers import activations

    if isinstance(module, nn.GELU):
        return "gelu" if module.approximate == "none" else "gelu_pytorch_tanh"
    known = {activations.GELU: "gelu", activations.GELUTanh: "gelu_pytorch_tanh", activations.QuickGELU: "quick_gelu"}
    if type(module) not in known:
        raise DoesNotFit(f"has {type(module).__name__} in its MLPs, which no table covers")
    return known[type(module)]
