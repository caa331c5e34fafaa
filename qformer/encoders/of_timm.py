"""Any model of timm: a vision transformer at a block, a convnet or a hierarchical model at a feature map."""

import copy
import inspect
from itertools import chain
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor

from qformer.config import DTYPES, EncoderConfig
from qformer.encoders.checks import check_unset, errors_named, names_place, outline, seeded
from qformer.encoders.frozen import Features, FrozenEncoder, InputTransform, block_index, square_transform
from qformer.messages import nearest
from qformer.parts import WEIGHT_FILES, WeightSource, torch_dtype


@final
class TimmEncoder(FrozenEncoder):
    """A model of timm, cut after the tapped block or feature map.

    The tokens of a vision transformer are its prefix (class token, registers) and its patches. A feature map
    float[B, C, h, w] becomes h * w tokens of C, row by row. Where a convnet widens its last map before it pools it
    (EfficientNet, by a 1 x 1 convolution), that wider map is what is read unless a block is named.
    """

    def __init__(self, tower: Any, input_transform: InputTransform, *, block: int | None = None) -> None:
        """Cut `tower` in place.

        Args:
            block: None = the second last block of a vision transformer, the last and widest feature map of another model.

        Raises: ValueError when the model hands out no feature maps, or has no such block.
        """
        kind = type(tower).__name__
        if not hasattr(tower, "forward_intermediates"):
            raise ValueError(f"encoder.id names a {kind}, which timm reads no feature maps of; take a ViT or a convnet")
        is_vit = "return_prefix_tokens" in inspect.signature(tower.forward_intermediates).parameters
        tap = block_index((-2 if is_vit else -1) if block is None else block, len(tower.feature_info))
        self._whole = block is None and tower.num_features > tower.feature_info[-1]["num_chs"]
        if self._whole:
            tower.reset_classifier(0, "")
        else:
            tower.prune_intermediate_layers([tap], prune_norm=True, prune_head=True)
        super().__init__(tower, 0, None, input_transform)
        self._arguments = {"indices": [tap], "stop_early": True, "intermediates_only": True, "norm": False}
        self._arguments["output_fmt"] = "NLC" if is_vit else "NCHW"  # Swin's NHWC as well
        self._has_prefix = is_vit and tower.num_prefix_tokens > 0
        if self._has_prefix:
            self._arguments["return_prefix_tokens"] = True
        self._outline(input_transform.size)

    def encode(self, inputs: Tensor, mask: Tensor | None) -> Features:
        output, prefix = self._read(inputs)
        if self._has_prefix:
            return Features(torch.cat([prefix, output], dim=1), None)
        return Features(output if output.dim() == 3 else output.flatten(2).transpose(1, 2).contiguous(), None)

    def _read(self, inputs: Tensor, **layout: str) -> tuple[Tensor, Tensor]:
        """What the tap hands out, and the prefix tokens, none where there are none."""
        tower: Any = self.tower
        if self._whole:
            output = tower.forward_features(inputs)
        else:
            (output,) = tower.forward_intermediates(inputs, **(self._arguments | layout))
        return output if self._has_prefix else (output, inputs.new_zeros(0))

    def _outline(self, side: int) -> None:
        """Sizes of the tokens of one image, from a copy of the model on the meta device: no memory, no arithmetic."""
        tensors = list(chain(self.parameters(), self.buffers()))
        outlined = copy.deepcopy(self, {id(tensor): tensor.to("meta") for tensor in tensors})
        with torch.no_grad():
            image = torch.empty(1, 3, side, side, dtype=tensors[0].dtype, device="meta")
            _, self.num_tokens, self.width = outlined.encode(image, None).tokens.shape
            rows, columns = outlined._read(image, output_fmt="NCHW")[0].shape[2:]
            self.grid = (rows, columns)


def load(config: EncoderConfig, seed: int = 0) -> TimmEncoder:
    """The model that `encoder.*` names.

    Raises: ValueError when the name or tag is unknown, or weights cannot be reached or do not fit.
    """
    import timm

    check_unset(config, "revision", "width", "num_tokens", "grid")
    dtype = torch_dtype("encoder.dtype", config.dtype, DTYPES)
    name = _name(config)
    arguments: dict[str, Any] = {"pretrained": not config.random_weights}
    if (file := _file(config)) is not None:
        arguments["pretrained_cfg_overlay"] = {"file": str(file), "custom_load": file.suffix == ".npz"}
    with errors_named(config):
        if config.image_size is not None and _has_fixed_size(name):
            arguments["img_size"] = config.image_size
        with seeded(seed):
            tower = timm.create_model(name, **arguments).to(dtype).eval()
        transform = square_transform(timm.data.resolve_data_config({}, model=tower), config.image_size)
        return TimmEncoder(tower, transform, block=config.block)


def width(config: EncoderConfig) -> int:
    """Dv, from the model without its weights."""
    return outline(load, config).width


def weights(config: EncoderConfig) -> WeightSource:
    """The folder, repository, file or address of the weights."""
    import timm

    name = _name(config)
    if place := name.partition(":")[2]:
        return WeightSource("encoder.id", place)
    if (file := _file(config)) is not None:
        return WeightSource("encoder.pretrained", str(file))
    source: Any = timm.get_pretrained_cfg(name)
    if source.hf_hub_id:
        files = (source.hf_hub_filename,) if source.hf_hub_filename else WEIGHT_FILES
        return WeightSource("encoder.id", source.hf_hub_id, files=files)
    return WeightSource("encoder.id", source.url)


def _file(config: EncoderConfig) -> Path | None:
    """The local file that `encoder.pretrained` names, if it is one."""
    path = Path(config.pretrained).expanduser() if config.pretrained else None
    return path if path is not None and path.is_file() else None


def _name(config: EncoderConfig) -> str:
    """The name with its tag, as timm takes it; `local-dir:` and `hf-hub:` stay.

    Raises: ValueError when there is no such folder, name, tag or file.
    """
    import timm

    if names_place(config, "timm's config.json"):
        return config.id
    architecture, _, tag = config.id.partition(".")
    if not timm.is_model(architecture):
        near = nearest(architecture, timm.list_models(), count=3)
        raise ValueError(f"encoder.id '{config.id}' is no model of timm; {near}")
    tags = [name.partition(".")[2] for name in timm.list_pretrained(f"{architecture}.*")]
    if tag and tag not in tags:
        raise ValueError(f"encoder.id '{config.id}': timm has no such weights; {nearest(tag, tags, count=3)}")
    if config.pretrained is None:
        if not tag and not config.random_weights:
            raise ValueError(f"encoder.pretrained is missing for '{config.id}'; expected one of {tags} or a file")
        return config.id
    if _file(config) is not None:
        return config.id
    if config.pretrained not in tags:
        near = nearest(config.pretrained, tags, count=3)
        raise ValueError(f"encoder.pretrained '{config.pretrained}' is no tag of '{architecture}' and no file; {near}")
    if tag and tag != config.pretrained:
        raise ValueError(
            f"encoder.pretrained '{config.pretrained}' and encoder.id '{config.id}' differ; keep one of them"
        )
    return f"{architecture}.{config.pretrained}"


def _has_fixed_size(name: str) -> bool:
    """Whether the model is built for one image size, which then has to be named when it is built."""
    import timm

    with torch.device("meta"):
        model: Any = timm.create_model(name)
    return bool(model.pretrained_cfg.get("fixed_input_size"))
