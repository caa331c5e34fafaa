"""Vision towers of open_clip, its own or timm's."""

from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from qformer.config import DTYPES, EncoderConfig
from qformer.encoders.checks import check_unset, errors_named, names_place, outline, seeded
from qformer.encoders.frozen import Features, FrozenEncoder, block_index, square_transform
from qformer.messages import nearest
from qformer.parts import WEIGHT_FILES, WeightSource, torch_dtype


@final
class OpenClipEncoder(FrozenEncoder):
    """A vision tower of open_clip, its own or one of timm's (EVA, SigLIP), cut after the tapped block."""

    def __init__(self, visual: Any, *, block: int = -2) -> None:
        """Cut `visual`, the `.visual` of an open_clip model, in place.

        Raises:
            ValueError: the tower is not a ViT, takes oblong images, or has no such block.
        """
        from open_clip.timm_model import TimmModel
        from open_clip.transformer import VisionTransformer
        from timm.models.eva import Eva
        from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

        trunk = visual.trunk if isinstance(visual, TimmModel) else visual
        if isinstance(trunk, VisionTransformer):
            blocks, width, prefix_tokens = trunk.transformer.resblocks, trunk.transformer.width, 1
            rows, columns = trunk.grid_size
        elif isinstance(trunk, (TimmVisionTransformer, Eva)):
            blocks, width, prefix_tokens = trunk.blocks, trunk.embed_dim, trunk.num_prefix_tokens
            rows, columns = trunk.patch_embed.grid_size
            visual.head = nn.Identity()
        else:
            raise ValueError(f"encoder.id names a {type(trunk).__name__}, expected a vision transformer: 'ViT-L-14'")
        tap = block_index(block, len(blocks))
        trunk.prune_intermediate_layers([tap], prune_norm=True, prune_head=True)
        transform = square_transform(visual.preprocess_cfg, None)
        super().__init__(visual, width, rows * columns + prefix_tokens, transform, grid=(rows, columns))
        taken = {"indices": [tap], "stop_early": True, "intermediates_only": True, "output_fmt": "NLC"}
        self._arguments = {**taken, "output_extra_tokens": prefix_tokens > 0}

    def encode(self, inputs: Tensor, mask: Tensor | None) -> Features:
        tower: Any = self.tower
        output = tower.forward_intermediates(inputs, **self._arguments)
        (tokens,) = output["image_intermediates"]
        if "image_intermediates_prefix" in output:
            tokens = torch.cat([output["image_intermediates_prefix"][0], tokens], dim=1)
        return Features(tokens, None)


def load(config: EncoderConfig, seed: int = 0) -> OpenClipEncoder:
    """The vision tower that `encoder.*` names.

    Raises: ValueError when the name or tag is unknown, or weights cannot be reached or do not fit.
    """
    import open_clip

    check_unset(config, "revision", "width", "num_tokens", "grid")
    dtype = torch_dtype("encoder.dtype", config.dtype, DTYPES)
    name = _name(config)
    # open_clip only warns where weights trained with QuickGELU meet a model without it: ViT-L-14, openai.
    tagged = open_clip.get_pretrained_cfg(name, config.pretrained) if config.pretrained else {}
    with errors_named(config), seeded(seed):
        model = open_clip.create_model(
            name,
            pretrained=None if config.random_weights else config.pretrained,
            load_weights=not config.random_weights,
            require_pretrained=not config.random_weights,
            pretrained_text=False,
            force_quick_gelu=bool(tagged.get("quick_gelu")),
            force_image_size=config.image_size,
            device=torch.get_default_device(),  # the meta device where only the sizes are wanted
        )
    assert config.block is not None
    return OpenClipEncoder(model.visual.to(dtype), block=config.block)


def width(config: EncoderConfig) -> int:
    """Dv, from the tower without its weights."""
    return outline(load, config).width


def weights(config: EncoderConfig) -> WeightSource:
    """The folder, repository, file or address of the weights; a file that was downloaded before stands for its address."""
    import open_clip

    name = _name(config)
    place = name.partition(":")[2]
    if place:
        return WeightSource("encoder.id", place)
    assert config.pretrained is not None
    if Path(config.pretrained).is_file():
        return WeightSource("encoder.pretrained", config.pretrained)
    source: dict[str, Any] = open_clip.get_pretrained_cfg(name, config.pretrained)
    if source.get("hf_hub"):
        repository, _, file = source["hf_hub"].rpartition("/")
        return WeightSource("encoder.pretrained", repository, files=(file,) if file else WEIGHT_FILES)
    cached = Path("~/.cache/clip").expanduser() / Path(source["url"]).name
    return WeightSource("encoder.pretrained", str(cached) if cached.is_file() else source["url"])


def _name(config: EncoderConfig) -> str:
    """`encoder.id` as open_clip spells it; `local-dir:` and `hf-hub:` stay.

    Raises: ValueError when there is no such folder, name, tag or file.
    """
    import open_clip

    if names_place(config, "an open_clip_config.json"):
        return config.id
    name, pretrained = config.id.replace("/", "-"), config.pretrained
    if name not in open_clip.list_models():
        near = nearest(name, open_clip.list_models(), count=3)
        raise ValueError(f"encoder.id '{name}' is no model of open_clip; {near}")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained is None and not config.random_weights:
        raise ValueError(f"encoder.pretrained is missing for '{name}'; expected one of {tags} or a file")
    if pretrained is not None and not open_clip.is_pretrained_cfg(name, pretrained) and not Path(pretrained).is_file():
        near = nearest(pretrained, tags, count=3)
        raise ValueError(f"encoder.pretrained '{pretrained}' is no tag of '{name}' and no file; {near}")
    return name
