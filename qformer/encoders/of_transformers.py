"""Vision transformers of transformers, alone or inside a whole checkpoint (CLIP, SigLIP, BLIP-2)."""

import inspect
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from torch import Tensor, nn

from qformer.config import DTYPES, EncoderConfig
from qformer.encoders.checks import check_unset, errors_named, seeded
from qformer.encoders.frozen import Features, FrozenEncoder, InputTransform, block_index
from qformer.messages import nearest
from qformer.parts import WHOLE, WeightSource, load_frozen, torch_dtype

logger = logging.getLogger(__name__)

CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

_PIL_RESAMPLING = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic", 4: "box", 5: "hamming"}

# Tokens in front of the patches (CLS, registers), by model_type: what the configs of transformers do not say.
_PREFIX_TOKENS: dict[str, Callable[[Any], int]] = {
    "clip_vision_model": lambda config: 1,
    "siglip_vision_model": lambda config: 0,  # fixed-size SigLIP 2 as well
    "vit": lambda config: 1,
    "dinov2": lambda config: 1,
    "dinov2_with_registers": lambda config: 1 + config.num_register_tokens,
    "dinov3_vit": lambda config: 1 + config.num_register_tokens,
    "blip_2_vision_model": lambda config: 1,
    "instructblip_vision_model": lambda config: 1,
}


@final
class TransformersEncoder(FrozenEncoder):
    """A vision transformer of transformers, cut after the tapped block."""

    def __init__(self, tower: Any, input_transform: InputTransform, *, block: int = -2) -> None:
        """Cut `tower`, a vision model such as `CLIPVisionModel` or `Dinov2Model`, in place.

        Raises:
            ValueError: the family is not supported, cannot take images of that size, or has no such block.
        """
        config, side = tower.config, input_transform.size
        _check_family(config.model_type)
        # DINO fits its positions to any image; the others have to be asked.
        interpolated = (
            side != config.image_size and "interpolate_pos_encoding" in inspect.signature(tower.forward).parameters
        )
        # The one list as long as the model is deep, wherever the version of transformers at hand keeps it.
        stacks = [name for name, module in tower.named_modules() if isinstance(module, nn.ModuleList)]
        stacks = [name for name in stacks if len(tower.get_submodule(name)) == config.num_hidden_layers]
        assert len(stacks) == 1, f"{config.model_type} has {len(stacks)} lists of {config.num_hidden_layers} blocks"
        blocks = tower.get_submodule(stacks[0])
        tap = block_index(block, len(blocks))
        del blocks[tap + 1 :]
        rows = side // config.patch_size
        num_tokens = rows**2 + _PREFIX_TOKENS[config.model_type](config)
        super().__init__(tower, config.hidden_size, num_tokens, input_transform, grid=(rows, rows))
        self._tapped_block = f"{stacks[0]}.{tap}"
        self._arguments = {"interpolate_pos_encoding": True} if interpolated else {}

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


def load(config: EncoderConfig, seed: int = 0) -> TransformersEncoder:
    """The vision model that `encoder.*` names; of a whole checkpoint nothing else is read.

    Raises: ValueError when it cannot be reached, is of a foreign family, has no such block, or lacks weights.
    """
    from transformers import AutoModel, Blip2VisionModel, InstructBlipVisionModel

    check_unset(config, "pretrained", "width", "num_tokens", "grid")
    dtype = torch_dtype("encoder.dtype", config.dtype, DTYPES)
    vision, part = _vision_config(config)
    assert config.block is not None
    block_index(config.block, vision.num_hidden_layers)
    # AutoModel does not know these two.
    towers = {"blip_2_vision_model": Blip2VisionModel, "instructblip_vision_model": InstructBlipVisionModel}
    kind: Any = towers.get(vision.model_type, AutoModel)
    with errors_named(config), seeded(seed):
        if config.random_weights:
            tower = AutoModel.from_config(vision, dtype=dtype) if kind is AutoModel else kind(vision).to(dtype)
        else:
            # A classifier's checkpoint has no pooler, and nothing here reads it.
            options: dict[str, Any] = {"may_lack": r"pooler\..*", "revision": config.revision, "dtype": dtype}
            tower = load_frozen(kind, config.id, vision, part, **options)
    return TransformersEncoder(tower, _processor_transform(config, vision.image_size), block=config.block)


def width(config: EncoderConfig) -> int:
    """Dv, from the model's own config."""
    return _vision_config(config)[0].hidden_size


def weights(config: EncoderConfig) -> WeightSource:
    """The folder or repository that `encoder.id` names."""
    return WeightSource("encoder.id", config.id, config.revision)


def _vision_config(config: EncoderConfig) -> tuple[Any, str | None]:
    """The vision model's own config, and its name within a whole checkpoint of BLIP-2."""
    from transformers import AutoConfig

    if config.id.startswith(("/", ".", "~")) and not Path(config.id).is_dir():
        raise ValueError(f"encoder.id '{config.id}': no such folder; expected one with a config.json")
    with errors_named(config):
        theirs = AutoConfig.from_pretrained(config.id, revision=config.revision)
    part = "vision_model" if theirs.model_type in WHOLE else None
    vision = theirs.vision_config if part or theirs.model_type in ("clip", "siglip") else theirs
    _check_family(vision.model_type)
    return vision, part


def _check_family(model_type: str) -> None:
    if model_type.startswith("siglip2"):
        raise ValueError("encoder.id names a NaFlex SigLIP 2; use a fixed-size one: google/siglip2-so400m-patch14-224")
    if model_type not in _PREFIX_TOKENS:
        known = ["clip", "siglip", *WHOLE, *_PREFIX_TOKENS]
        raise ValueError(
            f"encoder.id names a '{model_type}', expected one of {known}; {nearest(model_type, known, count=3)}"
        )


def _processor_transform(config: EncoderConfig, weights_size: int) -> InputTransform:
    # The plain dictionary: an image processor object may need torchvision.
    from transformers.image_processing_base import ImageProcessingMixin

    values: dict[str, Any] = {"image_mean": CLIP_MEAN, "image_std": CLIP_STD, "resample": 3}
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(config.id, revision=config.revision)
    except OSError:
        settings = {}
    if absent := sorted(values.keys() - settings.keys()):
        logger.warning("encoder.id '%s' has no %s for its images; those of CLIP are used", config.id, absent)
    values |= settings
    size = (values.get("do_center_crop", True) and values.get("crop_size")) or values.get("size") or weights_size
    if isinstance(size, dict):
        size = size["height"] if "height" in size else size["shortest_edge"]
    mean, std = tuple(values["image_mean"]), tuple(values["image_std"])
    return InputTransform(config.image_size or size, mean, std, _PIL_RESAMPLING[values["resample"]])
