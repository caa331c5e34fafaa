"""Features computed elsewhere take the place of an encoder."""

import math
from typing import final

import torch
from torch import Tensor

from qformer.config import DTYPES, EncoderConfig
from qformer.encoders.checks import check_unset
from qformer.encoders.frozen import Features, FrozenEncoder
from qformer.parts import torch_dtype


@final
class PrecomputedFeatures(FrozenEncoder):
    """Features computed elsewhere, passed through with their mask: cached images, audio, proteins, point clouds."""

    def __init__(self, width: int, num_tokens: int | None = None, grid: tuple[int, int] | None = None) -> None:
        super().__init__(None, width, num_tokens, None, grid=grid)

    def encode(self, inputs: Tensor, mask: Tensor | None) -> Features:
        if inputs.ndim != 3 or inputs.shape[2] != self.width or self.num_tokens not in (None, inputs.shape[1]):
            expected = f"expected [B, {self.num_tokens or 'N'}, {self.width}]"
            raise ValueError(f"features have shape {list(inputs.shape)}, {expected}; set encoder.width and num_tokens")
        if mask is not None and (mask.dtype != torch.bool or mask.shape != inputs.shape[:2]):
            expected = f"expected torch.bool {list(inputs.shape[:2])}, True at real tokens"
            raise ValueError(f"the mask of the features is {mask.dtype} {list(mask.shape)}, {expected}")
        if self.num_tokens is not None and mask is not None:
            if not mask.all():
                raise ValueError(
                    f"some features have fewer than encoder.num_tokens={self.num_tokens} rows; set it to null"
                )
            mask = None  # as of an encoder of images
        return Features(inputs, mask)


def load(config: EncoderConfig, seed: int = 0) -> PrecomputedFeatures:
    """The sizes that `encoder.*` names.

    Raises: ValueError when the width is missing, the grid has more places than there are tokens, or a key is set that
        belongs to a model.
    """
    check_unset(config, "pretrained", "revision", "image_size")
    torch_dtype("encoder.dtype", config.dtype, DTYPES)
    if not config.grid:
        return PrecomputedFeatures(width(config), config.num_tokens)
    if len(config.grid) != 2 or min(config.grid) < 1 or math.prod(config.grid) > (config.num_tokens or math.inf):
        raise ValueError(
            f"encoder.grid is {config.grid}, expected [rows, columns], no more places than encoder.num_tokens={config.num_tokens}"
        )
    return PrecomputedFeatures(width(config), config.num_tokens, (config.grid[0], config.grid[1]))


def width(config: EncoderConfig) -> int:
    """Dv, as the config has it."""
    if config.width is None:
        raise ValueError("encoder.width is missing; loader 'features' needs the width of the precomputed features")
    return config.width


def weights(config: EncoderConfig) -> None:
    """There are none."""
