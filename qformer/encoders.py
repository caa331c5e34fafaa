"""Frozen encoders: pictures, or features computed beforehand, become tokens for the Q-Former."""

import difflib
import inspect
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_PIL_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Features(NamedTuple):
    """What an encoder returns: `tokens` float[B, N, Dv] and `mask` bool[B, N], True at real tokens, None if all are."""

    tokens: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class InputTransform:
    """How pictures were prepared for the weights: side in pixels, mean and std of RGB in [0, 1], interpolation."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


class FrozenEncoder(nn.Module, ABC):
    """A model that turns inputs into tokens, always in eval mode and never with a gradient.

    It computes in the dtype of its weights whatever autocast says, so that cached features equal live ones.
    `width` is Dv, `num_tokens` N (None if it varies), `input_transform` what `inputs` went through (None for
    precomputed features), `output_dtype` that of the tokens (None: as computed, for a cache).
    """

    output_dtype: torch.dtype | None = torch.float32

    def __init__(
        self, tower: nn.Module | None, width: int, num_tokens: int | None, input_transform: InputTransform | None
    ) -> None:
        super().__init__()
        self.tower = tower
        self.width = width
        self.num_tokens = num_tokens
        self.input_transform = input_transform
        self.requires_grad_(False)
        self.eval()

    @abstractmethod
    def encode(self, inputs: Tensor, mask: Tensor | None) -> Features:
        """What `forward` runs without gradient, with `inputs` in the dtype of the weights."""

    @torch.no_grad()
    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Features:
        """Encode a batch.

        Args:
            inputs: `pixel_values` float[B, 3, S, S] after `input_transform`, or features float[B, N, Dv].
            mask: bool[B, N], True = real token; only for precomputed features.

        Raises:
            ValueError: the pictures or features do not have the shape this encoder takes.
        """
        if self.input_transform is not None:
            assert mask is None, "pictures have no token mask"
            picture = [3, self.input_transform.size, self.input_transform.size]
            if list(inputs.shape[1:]) != picture:
                given = f"pixel_values has shape {list(inputs.shape)}, expected [B, {str(picture)[1:]}"
                raise ValueError(f"{given}; use the encoder's input_transform, or set encoder.image_size")
        if self.tower is not None:
            inputs = inputs.to(next(self.tower.parameters()).dtype)
        with torch.autocast(inputs.device.type, enabled=False):
            tokens, mask = self.encode(inputs, mask)
        return Features(tokens.detach().to(self.output_dtype or tokens.dtype), mask)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in eval mode: a frozen encoder has no dropout, whatever the model around it does."""
        return super().train(False)


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
        tap = _block_index(block, len(blocks))
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


# Tokens in front of the patches (CLS, registers), by model_type: what the configs of transformers do not say.
_PREFIX_TOKENS: dict[str, Callable[[Any], int]] = {
    "clip_vision_model": lambda config: 1,
    "siglip_vision_model": lambda config: 0,  # fixed-size SigLIP 2 as well
    "vit": lambda config: 1,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
    "dinov3_vit": lambda config: 1 + config.num_register_tokens,
}


@final
class TransformersEncoder(FrozenEncoder):
    """A vision transformer of transformers, cut after the tapped block."""

    def __init__(self, tower: Any, input_transform: InputTransform, *, block: int = -2) -> None:
        """Cut `tower`, a vision model such as `CLIPVisionModel` or `Dinov2Model`, in place.

        Raises:
            ValueError: the family is not supported, cannot take pictures of that size, or has no such block.
        """
        config, side = tower.config, input_transform.size
        _check_family(config.model_type)
        # DINO fits its positions to any picture; the others have to be told.
        told = side != config.image_size and "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        # The one list as long as the model is deep, wherever the version of transformers at hand keeps it.
        stacks = [name for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)]
        stacks = [name for name in stacks if len(tower.get_submodule(name)) == config.num_hidden_layers]
        assert len(stacks) == 1, f"{config.model_type} has {len(stacks)} lists of {config.num_hidden_layers} blocks"
        blocks = tower.get_submodule(stacks[0])
        tap = _block_index(block, len(blocks))
        del blocks[tap + 1 :]
        num_tokens = (side // config.patch_size) ** 2 + _PREFIX_TOKENS[config.model_type](config)
        super().__init__(tower, config.hidden_size, num_tokens, input_transform)
        self._tapped_block = f"{stacks[0]}.{tap}"
        self._arguments = {"interpolate_pos_encoding": True} if told else {}

    def encode(self, inputs: Tensor, mask: Tensor | None) -> Features:
        # A hook, because last_hidden_state is normed in some families and hidden_states keeps every block's output.
        outputs: list[Any] = []
        tower: Any = self.tower
        with tower.get_submodule(self._tapped_block).register_forward_hook(
            lambda module, args, output: outputs.append(output)
        ):
            tower(pixel_values=inputs, **self._arguments)
        (output,) = outputs
        return Features(output if isinstance(output, Tensor) else output[0], None)


@final
class PrecomputedFeatures(FrozenEncoder):
    """Features computed elsewhere, passed through with their mask: cached pictures, audio, proteins, point clouds."""

    def __init__(self, width: int, num_tokens: int | None = None) -> None:
        super().__init__(None, width, num_tokens, None)

    def encode(self, inputs: Tensor, mask: Tensor | None) -> Features:
        if inputs.ndim != 3 or inputs.shape[2] != self.width or self.num_tokens not in (None, inputs.shape[1]):
            expected = f"expected [B, {self.num_tokens or 'N'}, {self.width}]"
            raise ValueError(f"features have shape {list(inputs.shape)}, {expected}; set encoder.width and num_tokens")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != inputs.shape[:2]):
            expected = f"expected torch.bool {list(inputs.shape[:2])}, True at real tokens"
            raise ValueError(f"the mask of the features is {mask.dtype} {list(mask.shape)}, {expected}")
        return Features(inputs, mask)


@dataclass(frozen=True)
class _Request:
    """The arguments of `load_encoder`."""

    loader: str
    id: str
    pretrained: str | None
    revision: str | None
    block: int
    image_size: int | None
    dtype: torch.dtype
    width: int | None
    num_tokens: int | None
    random_weights: bool
    seed: int

    def check_unset(self, *names: str) -> None:
        for name in names:
            if (value := vars(self)[name]) is not None:
                raise ValueError(f"encoder.{name} is {value!r}, but loader '{self.loader}' does not read it; remove it")

    @contextmanager
    def errors_named(self) -> Iterator[None]:
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            todo = "check its spelling, download it once where there is a network, or name a local folder"
            raise ValueError(f"encoder.id '{self.id}' cannot be loaded by {self.loader} ({reason}); {todo}") from error


def _load_open_clip(request: _Request) -> OpenClipEncoder:
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
            raise ValueError(f"encoder.id '{name}' is no model of open_clip; {_nearest(name, open_clip.list_models())}")
        tags = open_clip.list_pretrained_tags_by_model(name)
        if pretrained is None and not random_weights:
            raise ValueError(f"encoder.pretrained is missing for '{name}'; expected one of {tags} or a file")
        if pretrained is not None:
            if not open_clip.is_pretrained_cfg(name, pretrained) and not Path(pretrained).is_file():
                known = _nearest(pretrained, tags)
                raise ValueError(f"encoder.pretrained '{pretrained}' is no tag of '{name}' and no file; {known}")
            # open_clip only warns where weights trained with QuickGELU meet a model without it: ViT-L-14, openai.
            quick_gelu = bool(open_clip.get_pretrained_cfg(name, pretrained).get("quick_gelu"))
    with request.errors_named(), _seeded(request.seed):
        model = open_clip.create_model(
            name,
            pretrained=None if random_weights else pretrained,
            load_weights=not random_weights,
            require_pretrained=not random_weights,
            pretrained_text=False,
            force_quick_gelu=quick_gelu,
            force_image_size=request.image_size,
        )
    return OpenClipEncoder(model.visual.to(request.dtype), block=request.block)


def _load_transformers(request: _Request) -> TransformersEncoder:
    from transformers import AutoConfig, AutoModel

    request.check_unset("pretrained", "width", "num_tokens")
    if request.id.startswith(("/", ".", "~")) and not Path(request.id).is_dir():
        raise ValueError(f"encoder.id '{request.id}': no such folder; expected one with a config.json")
    source: dict[str, Any] = {"pretrained_model_name_or_path": request.id, "revision": request.revision}
    with request.errors_named():
        config = AutoConfig.from_pretrained(**source)
    if config.model_type in ("clip", "siglip"):
        config = config.vision_config
    _check_family(config.model_type)
    _block_index(request.block, config.num_hidden_layers)
    with request.errors_named(), _seeded(request.seed):
        if request.random_weights:
            tower = AutoModel.from_config(config, dtype=request.dtype)
        else:
            options: dict[str, Any] = {"config": config, "dtype": request.dtype, "output_loading_info": True}
            tower, info = AutoModel.from_pretrained(**source, **options)
            # A classifier's checkpoint has no pooler, and nothing here reads it.
            if missing := sorted(key for key in info["missing_keys"] if not key.startswith("pooler.")):
                raise ValueError(f"its weights lack {len(missing)} tensors of {type(tower).__name__}: {missing[0]} ...")
    return TransformersEncoder(tower, _processor_transform(request, config.image_size), block=request.block)


def _load_features(request: _Request) -> PrecomputedFeatures:
    request.check_unset("pretrained", "revision", "image_size")
    if request.width is None:
        raise ValueError("encoder.width is missing; loader 'features' needs the width of the precomputed features")
    return PrecomputedFeatures(request.width, request.num_tokens)


LOADERS: dict[str, Callable[[_Request], FrozenEncoder]] = {
    "open_clip": _load_open_clip,
    "transformers": _load_transformers,
    "features": _load_features,
}


def load_encoder(
    loader: str,
    id: str,
    *,
    pretrained: str | None = None,
    revision: str | None = None,
    block: int = -2,
    image_size: int | None = None,
    dtype: str = "float32",
    width: int | None = None,
    num_tokens: int | None = None,
    random_weights: bool = False,
    seed: int = 0,
) -> FrozenEncoder:
    """Load a frozen encoder; of a two-tower model only the vision tower is kept.

    Args:
        loader: a key of `LOADERS`.
        id: open_clip name, `local-dir:FOLDER` or `hf-hub:ID`; hub id or folder of transformers; not read for features.
        pretrained: open_clip's tag of the weights, or a file.
        revision: of a hub id of transformers.
        block: Python index of the block whose output is taken, before the final norm; later blocks are cut off.
        image_size: side in pixels, None = the weights' own; another one interpolates the position embeddings.
        dtype: of the frozen weights.
        width, num_tokens: Dv and N of precomputed features, N None if it varies.
        random_weights, seed: the architecture without its weights, for trials; the global generator stays as it was.

    Raises:
        ValueError: an unknown loader, dtype, id, tag, block or size, or weights that cannot be reached.

    Source: BLIP-2, section 3.3 (second-last block).
    """
    if loader not in LOADERS:
        raise ValueError(f"encoder.loader '{loader}' is unknown; {_nearest(loader, LOADERS)}")
    if dtype not in _DTYPES:
        raise ValueError(f"encoder.dtype '{dtype}' is unknown; expected one of {sorted(_DTYPES)}")
    arguments = (pretrained, revision, block, image_size, _DTYPES[dtype], width, num_tokens, random_weights, seed)
    return LOADERS[loader](_Request(loader, id, *arguments))


def _block_index(block: int, count: int) -> int:
    if not -count <= block < count:
        raise ValueError(f"encoder.block is {block}, expected {-count} to {count - 1}: the encoder has {count} blocks")
    return block % count


def _check_family(model_type: str) -> None:
    if model_type.startswith("siglip2"):
        raise ValueError("encoder.id names a NaFlex SigLIP 2; use a fixed-size one: google/siglip2-so400m-patch14-224")
    if model_type not in _PREFIX_TOKENS:
        known = ["clip", "siglip", *_PREFIX_TOKENS]
        raise ValueError(f"encoder.id names a '{model_type}', expected one of {known}; {_nearest(model_type, known)}")


def _nearest(name: str, known: Iterable[str]) -> str:
    names = [repr(match) for match in difflib.get_close_matches(name, list(known), n=3, cutoff=0.0)]
    return f"nearest: {', '.join(names)}" if names else "there are none"


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    # Modules are built on the CPU; torch.manual_seed would also reseed the accelerators, which are not forked here.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _open_clip_transform(preprocess: dict[str, Any]) -> InputTransform:
    height, width = preprocess["size"]
    if height != width:
        raise ValueError(f"encoder.image_size is {height}x{width} for these weights, expected a square; set one side")
    # "random" is one of the two by chance, in training.
    interpolation = {"random": "bicubic"}.get(preprocess["interpolation"], preprocess["interpolation"])
    return InputTransform(height, tuple(preprocess["mean"]), tuple(preprocess["std"]), interpolation)


def _processor_transform(request: _Request, weights_size: int) -> InputTransform:
    # The plain dictionary: an image processor object may need torchvision.
    from transformers.image_processing_base import ImageProcessingMixin

    values: dict[str, Any] = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}
    try:
        found, _ = ImageProcessingMixin.get_image_processor_dict(request.id, revision=request.revision)
    except OSError:
        found = {}
    if absent := sorted(values.keys() - found.keys()):
        logger.warning("encoder.id '%s' has no %s for its pictures; those of CLIP are used", request.id, absent)
    values |= found
    size = (values.get("do_center_crop", True) and values.get("crop_size")) or values.get("size") or weights_size
    if isinstance(size, dict):
        size = size["height"] if "height" in size else size["shortest_edge"]
    mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
    return InputTransform(request.image_size or size, mean, std, _PIL_RESAMPLING[values["resample"]])
