"""From a file to a tensor: pictures of every kind to RGB, RGB to normalised pixels, feature files to float32."""

from __future__ import annotations

import io
import math
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from qformer.data.records import BrokenRecord, Record

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
EXIF_ORIENTATION = 0x0112


def load_image(record: Record) -> Image.Image:
    """Decode the picture of a record, the first frame of an animated one, to upright 8-bit RGB.

    Raises:
        BrokenRecord: a file that is missing, empty, truncated or no picture; one of more than `Image.MAX_IMAGE_PIXELS`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(record.image if record.image_bytes is None else io.BytesIO(record.image_bytes)) as image:
                image.load()
                return to_rgb(image)
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise every kind of exception on damaged bytes
        raise BrokenRecord(record.image, f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn a picture upright by its EXIF tag and convert it to RGB: 16-bit scaled to 8, transparency over white.

    Raises:
        ValueError: floating-point pixels, whose range is not known.
    """
    if image.getexif().get(EXIF_ORIENTATION, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; expected 8 or 16 bits")
    if image.mode.startswith("I"):  # convert() would clip 16 bits at 255 instead of scaling them
        levels = np.asarray(image).astype(np.int64).clip(0, 65535)
        image = Image.fromarray(((levels + 128) // 257).astype(np.uint8))
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """The picture an encoder expects: resized to a square (no centre crop, as BLIP-2 does) and normalised.

    Args:
        size: side in pixels.
        mean: per channel, of values in [0, 1].
        std: per channel.
        interpolation: "bicubic" or "bilinear", always by PIL.
        crop_scale: share of the area that a random crop keeps, smallest and largest.
        flip: mirror every second picture at random, in training only.

    Raises:
        ValueError: a size below 1, an unknown interpolation, a crop_scale outside 0 < smallest <= largest <= 1.

    Source: BlipImageTrainProcessor and BlipImageEvalProcessor in lavis/processors/blip_processors.py.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: expected a side of 1 pixel or more")
        if self.interpolation not in RESAMPLING:
            raise ValueError(f"interpolation={self.interpolation!r}: expected one of {', '.join(RESAMPLING)}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={self.crop_scale}: expected 0 < smallest <= largest <= 1")

    def apply(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """Return the pixels, float[3, S, S]: the whole picture without `rng`, a random crop and flip with it."""
        if image.mode != "RGB":
            image = to_rgb(image)
        if rng is not None:
            image = image.crop(_random_box(*image.size, self.crop_scale, rng))
            if self.flip and rng.random() < 0.5:
                image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if image.size != (self.size, self.size):
            image = image.resize((self.size, self.size), RESAMPLING[self.interpolation])
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float() / 255
        return (pixels - torch.tensor(self.mean).view(3, 1, 1)) / torch.tensor(self.std).view(3, 1, 1)


def _random_box(
    width: int, height: int, scale: tuple[float, float], rng: np.random.Generator
) -> tuple[int, int, int, int]:
    """Draw a crop (left, top, right, bottom) with sides 3:4 to 4:3; the centre where ten draws do not fit.

    Source: RandomResizedCrop.get_params in torchvision/transforms/transforms.py.
    """
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
        w, h = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left, top = int(rng.integers(width - w + 1)), int(rng.integers(height - h + 1))
            return left, top, left + w, top + h
    w, h = min(width, round(height * 4 / 3)), min(height, round(width * 4 / 3))
    left, top = (width - w) // 2, (height - h) // 2
    return left, top, left + w, top + h


def load_features(path: str) -> Tensor:
    """Read precomputed features, float[N, Dv], from a .npy file or a .safetensors file with one tensor.

    Raises:
        BrokenRecord: a file that is missing, unreadable or of another kind; not exactly one tensor; a tensor that is
            not floating-point, not two-dimensional or empty; a value that is not finite.
    """
    try:
        features = _read_tensor(path)
    except (OSError, EOFError, ValueError) as error:
        raise BrokenRecord(path, f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    if features.ndim != 2 or features.numel() == 0 or not features.is_floating_point():
        found = f"{str(features.dtype).removeprefix('torch.')}{list(features.shape)}"
        raise BrokenRecord(path, f"the tensor is {found}; expected float[N, Dv], neither 0")
    features = features.float()
    if not features.isfinite().all():
        raise BrokenRecord(path, "the tensor has values that are NaN or infinite")
    return features


def _read_tensor(path: str) -> Tensor:
    suffix = os.path.splitext(path)[1]
    if suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        if not np.issubdtype(array.dtype, np.number) or np.issubdtype(array.dtype, np.complexfloating):
            raise ValueError(f"the array is {array.dtype}; expected floats")
        # torch wants the byte order of this machine
        return torch.from_numpy(np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("=")))
    if suffix == ".safetensors":
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                names = list(file.keys())
                if len(names) != 1:
                    raise ValueError(f"the file holds {len(names)} tensors; expected one")
                return file.get_tensor(names[0])
        except SafetensorError as error:
            raise ValueError(str(error)) from error
    raise ValueError("unknown kind of features; expected .npy or .safetensors")
