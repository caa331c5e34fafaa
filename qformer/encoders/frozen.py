"""What every frozen encoder has in common."""

from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Features(NamedTuple):
    """What an encoder returns: `tokens` float[B, N, Dv] and `mask` bool[B, N], True at real tokens, None if all are."""

    tokens: Tensor
    mask: Tensor | None

    def side_by_side(self, image_of: Tensor | None) -> "Features":
        """The tokens of every row's images as those of one, float[R, K * N, Dv].

        Args:
            image_of: int64[R, K], the images of each row, -1 where it has fewer than K; None = one image a row, as it is.
        """
        if image_of is None:
            return self
        there, rows = image_of >= 0, image_of.clamp(min=0)
        mask = there[..., None].expand(*there.shape, self.tokens.shape[1])
        if self.mask is not None:
            mask = mask & self.mask[rows]
        return Features(self.tokens[rows].flatten(1, 2), None if bool(mask.all()) else mask.flatten(1))


@dataclass(frozen=True)
class InputTransform:
    """How images were prepared for the weights: side in pixels, mean and std of RGB in [0, 1], interpolation."""

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str


def square_transform(values: dict[str, Any], image_size: int | None) -> InputTransform:
    """The input transform that open_clip and timm keep beside their weights, at `image_size` if that is given.

    Args:
        values: "size" (height, width) or "input_size" (channels, height, width), "mean", "std" and "interpolation".

    Raises: ValueError when the images are oblong.
    """
    height, width = values["size"] if "size" in values else values["input_size"][1:]
    if image_size is None and height != width:
        raise ValueError(f"encoder.image_size is {height}x{width} for these weights, expected a square; set one side")
    # "random" is one of the two by chance, in training.
    interpolation = {"random": "bicubic"}.get(values["interpolation"], values["interpolation"])
    return InputTransform(image_size or height, tuple(values["mean"]), tuple(values["std"]), interpolation)


class FrozenEncoder(nn.Module, ABC):
    """A model that turns inputs into tokens, always in eval mode and, but where it `learns`, never with a gradient.

    It computes in the dtype of its weights whatever autocast says, so that cached features equal live ones.
    `learns` is "no", "lora" or "full" (then its weights are float32 and autocast decides).
    `width` is Dv, `num_tokens` N (None if it varies), `input_transform` what `inputs` went through (None for
    precomputed features), `output_dtype` that of the tokens (None: as computed, for a cache). `grid` (h, w): the last h * w
    tokens lie over the image row by row, those before them (class token, registers) nowhere; None = it is not known.
    """

    output_dtype: torch.dtype | None = torch.float32
    learns: str = "no"

    def __init__(
        self, tower: nn.Module | None, width: int, num_tokens: int | None, input_transform: InputTransform | None,
        *, grid: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.tower = tower
        self.width = width
        self.grid = grid
        self.num_tokens = num_tokens
        self.input_transform = input_transform
        self.requires_grad_(False)
        self.eval()

    @abstractmethod
    def encode(self, inputs: Tensor, mask: Tensor | None) -> Features:
        """What `forward` runs, with `inputs` in the dtype of the weights."""

    def forward(self, inputs: Tensor, mask: Tensor | None = None) -> Features:
        """Encode a batch; without gradient unless the encoder `learns`.

        Args:
            inputs: `pixel_values` float[B, 3, S, S] after `input_transform`, or features float[B, N, Dv].
            mask: bool[B, N], True = real token; only for precomputed features.

        Raises: ValueError when the images or features do not have the shape this encoder takes.
        """
        if self.input_transform is not None:
            assert mask is None, "images have no token mask"
            shape = [3, self.input_transform.size, self.input_transform.size]
            if list(inputs.shape[1:]) != shape:
                message = f"pixel_values has shape {list(inputs.shape)}, expected [B, {str(shape)[1:]}"
                raise ValueError(f"{message}; use the encoder's input_transform, or set encoder.image_size")
        if self.tower is not None:
            inputs = inputs.to(next(self.tower.parameters()).dtype)
        by_weights = nullcontext() if self.learns == "full" else torch.autocast(inputs.device.type, enabled=False)
        with torch.set_grad_enabled(self.learns != "no" and torch.is_grad_enabled()), by_weights:
            tokens, mask = self.encode(inputs, mask)
            tokens = tokens if self.learns != "no" else tokens.detach()
            return Features(tokens.to(self.output_dtype or tokens.dtype), mask)

    def train(self, mode: bool = True) -> "FrozenEncoder":
        """Stay in eval mode: a frozen encoder has no dropout, whatever the model around it does."""
        return super().train(False)


def block_index(block: int, count: int) -> int:
    if not -count <= block < count:
        raise ValueError(f"encoder.block is {block}, expected {-count} to {count - 1}: the encoder has {count} blocks")
    return block % count
