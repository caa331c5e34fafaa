"""Vision towers of open_clip, its own or timm's."""

from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from qformer.encoders.frozen import Features, FrozenEncoder, InputTransform, block_index
from qformer.encoders.request import Request, nearest, seeded


@final
class OpenClipEncoder(FrozenEncoder):
    """A vision tower of open_clip, its own or one of timm's (EVA, SigLIP), cut after the tapped block."""

    def __init__(self, visual: Any, *, block: int = -2) -> None:
        """Cut `visual`, the `.visual` of an open_clip model, in place.

        Raises:
            ValueError: the tower is not a ViT, takes oblong pictures, or has no such block.
        """
        from open_clip.timm_model import TimmModel
        from open_clip.transformer import VisionTransformer
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

        trunk = visual.trunk if isinstance(visual, TimmModel) else visual
        if isinstance(trunk, VisionTransformer):
            blocks, width, prefix_tokens = trunk.transformer.resblocks, trunk.transformer.width, 1
            patches = trunk.grid_size[0] * trunk.grid_size[1]
        elif isinstance(trunk, (TimmVisionTransformer, Eva)):
            blocks, width, prefix_tokens = trunk.blocks, trunk.embed_dim, trunk.num_prefix_tokens
            patches = trunk.patch_embed.num_patches
            visual.head = nn.Identity()
        else:
            raise ValueError(f"encoder.id names a {type(trunk).__name__}, expected a vision transformer: 'ViT-L-14'")
        tap = block_index(block, len(blocks))
        trunk.prune_intermediate_layers([tap], prune_norm=True, prune_head=True)
        super().__init__(visual, width, patches + prefix_tokens, _open_clip_transform(visual.preprocess_cfg))
        taken = {"indices": [tap], "stop_early": True, "intermediates_only": True, "output_fmt": "NLC"}
        self._arguments = {**taken, "output_extra_tokens": prefix_tokens > 0}

    def encode(self, inputs: Tensor, mask: Tensor | None) -> Features:
        tower: Any = self.tower
        output = tower.forward_intermediates(inputs, **self._arguments)
        (tokens,) = output["image_intermediates"]
        if "image_intermediates_prefix" in output:
            tokens = torch.cat([output["image_intermediates_prefix"][0], tokens], dim=1)
        return Features(tokens, None)


def load_open_clip(request: Request) -> OpenClipEncoder:
    """Load `request` with open_clip."""
    import open_clip

    request.check_unset("revision", "width", "num_tokens")
    name, pretrained, random_weights = request.id, request.pretrained, request.random_weights
    quick_gelu = False
    if name.startswith(("local-dir:", "hf-hub:")):
        request.check_unset("pretrained")
        if name.startswith("local-dir:") and not Path(name.removeprefix("local-dir:")).is_dir():
            raise ValueError(f"encoder.id '{name}': no such folder; expected one with an open_clip_config.json")
    else:
        name = name.replace("/", "-")
        if name not in open_clip.list_models():
            raise ValueError(f"encoder.id '{name}' is no model of open_clip; {nearest(name, open_clip.list_models())}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is None and not random_weights:
            raise ValueError(f"encoder.pretrained is missing for '{name}'; expected one of {tags} or a file")
        if pretrained is not None:
            if not open_clip.is_pretrained_cfg(name, pretrained) and not Path(pretrained).is_file():
                known = nearest(pretrained, tags)
                raise ValueError(f"encoder.pretrained '{pretrained}' is no tag of '{name}' and no file; {known}")
            # open_clip only warns where weights trained with QuickGELU meet a model without it: ViT-L-14, openai.
            quick_gelu = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
    with request.errors_named(), seeded(request.seed):
        model = open_clip.create_model(
            name,
            pretrained=None if random_weights else pretrained,
            load_weights=not random_weights,
            require_pretrained=not random_weights,
            pretrained_text=False,
            force_quick_gelu=quick_gelu,
            force_image_size=request.image_size,
            device=torch.get_default_device(),  # the meta device where only the sizes are wanted
        )
    return OpenClipEncoder(model.visual.to(request.dtype), block=request.block)


def _open_clip_transform(preprocess: dict[str, Any]) -> InputTransform:
    height, width = preprocess["size"]
    if height != width:
        raise ValueError(f"encoder.image_size is {height}x{width} for these weights, expected a square; set one side")
    # "random" is one of the two by chance, in training.
    interpolation = {"random": "bicubic"}.get(preprocess["interpolation"], preprocess["interpolation"])
    return InputTransform(height, tuple(preprocess["mean"]), tuple(preprocess["std"]), interpolation)
