"""From a file to a tensor: images of every kind to RGB, RGB to normalised pixels, feature files to float32."""

from __future__ import annotations

import io
import math
import os
import struct
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageCms
from torch import Tensor

from qformer.data.bounds import pixel_bound
from qformer.data.clips import POLICIES
from qformer.data.records import BrokenRecord, Record

RESAMPLING = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}
EXIF_ORIENTATION = 0x0112
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
PNG = b"\x89PNG\r\n\x1a\n"
PNG_TEXTS = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")  # chunks beside the pixels that PIL refuses where they are long


def load_image(image: Record | Image.Image, max_pixels: int | None = None) -> Image.Image:
    """Decode the image of a record, or one that PIL has opened, to upright 8-bit RGB: both give the same pixels.

    Of an animated image the first frame, or the one that PIL stands at.

    Args:
        max_pixels: `data.max_pixels`; larger images are broken records, because few bytes can unpack to gigabytes. None
            is PIL's own bound, `Image.MAX_IMAGE_PIXELS`.

    Raises: BrokenRecord when a file is missing, empty, truncated or no image, or has more than `max_pixels`.
    """
    name = image.image if isinstance(image, Record) else getattr(image, "filename", "") or "the image"
    try:
        with pixel_bound(max_pixels) as bound:
            if isinstance(image, Image.Image):
                return _decode(image, bound)
            try:
                with Image.open(image.image if image.image_bytes is None else io.BytesIO(image.image_bytes)) as file:
                    return _decode(file, bound)
            except ValueError:  # of a long text in a PNG too, which is no reason to lose the image
                content = _without_texts(image)
                if content is None:
                    raise
                with Image.open(io.BytesIO(content)) as file:
                    return _decode(file, bound)
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise every kind of exception on damaged bytes
        raise BrokenRecord(str(name), f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _decode(image: Image.Image, bound: int | None) -> Image.Image:
    pixels = image.width * image.height
    if bound is not None and pixels > bound:
        raise Image.DecompressionBombError(
            f"{image.width} x {image.height} = {pixels} pixels are more than {bound}; "
            "set data.max_pixels higher if the images can be trusted"
        )
    return to_rgb(image)


def _without_texts(record: Record) -> bytes | None:
    """The bytes of a PNG without its texts and colour profile; None if it is none or has none."""
    content = record.image_bytes
    if content is None:
        with open(record.image, "rb") as file:
            content = file.read()
    if not content.startswith(PNG):
        return None
    parts, at = [PNG], len(PNG)
    while at + 12 <= len(content):  # length, kind, data, checksum
        end = at + 12 + int.from_bytes(content[at : at + 4], "big")
        if content[at + 4 : at + 8] not in PNG_TEXTS:
            parts.append(content[at:end])
        at = end
    shorter = b"".join(parts)
    return shorter if len(shorter) < len(content) else None


def to_rgb(image: Image.Image) -> Image.Image:
    """Turn an image upright by its EXIF tag and convert it to RGB: integers scaled to 8 bits, transparency over white.

    Integers of 16 or 32 bits are scaled by the fewest bits that hold the largest of them: cameras and scanners write 10,
    12 or 14 bits into 16.

    Raises: ValueError when pixels are floating-point, whose range is not known.
    """
    image.load()  # some formats turn the image themselves, or know its tags only now
    method = UPRIGHT.get(_orientation(image))
    if image.mode == "F":
        raise ValueError("floating-point pixels of unknown range; expected 8 or 16 bits")
    if image.mode.startswith("I"):  # convert() would clip at 255 instead of scaling
        rgb = _scale_integers(image)
    elif image.has_transparency_data:
        straight = image.convert("RGBA" if image.mode == "RGBa" else "LA") if image.mode in ("RGBa", "La") else image
        layered = straight.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", layered.size, "white"), layered).convert("RGB")
    elif image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        rgb = ImageCms.buildTransform(lab, srgb, "LAB", "RGB").apply(image)
    else:
        rgb = image if image.mode == "RGB" else image.convert("RGB")
    if method is not None:
        rgb = rgb.transpose(method)
    if rgb is not image:
        rgb.info = {}  # else it would be turned once more
    return rgb


def _orientation(image: Image.Image) -> int:
    """How an image lies by EXIF, 1 to 8; 1 (upright) where its tags cannot be read. Other tags do not matter."""
    try:
        value = image.getexif().get(EXIF_ORIENTATION) or _first_orientation(image.info.get("exif", b""))
        return int(value[0] if isinstance(value, bytes | tuple | list) else value)
    except Exception:  # tags of wrong types raise every kind of exception
        return 1


def _first_orientation(exif: bytes) -> int:
    """The orientation in the first directory of EXIF bytes, or 1: PIL before 13 reads no tag behind a damaged one."""
    tiff = exif.removeprefix(b"Exif\0\0")
    if len(tiff) < 10:
        return 1
    order = "<" if tiff.startswith(b"II") else ">"
    (first,) = struct.unpack_from(f"{order}I", tiff, 4)
    (count,) = struct.unpack_from(f"{order}H", tiff, first)
    tags = (struct.unpack_from(f"{order}HHIH", tiff, first + 2 + 12 * n) for n in range(count))
    return next((value for tag, _, _, value in tags if tag == EXIF_ORIENTATION), 1)


def _scale_integers(image: Image.Image) -> Image.Image:
    levels = np.asarray(image).astype(np.int64).clip(0)
    full = (1 << int(levels.max()).bit_length()) - 1 or 1
    gray = (levels * 255 + full // 2) // full
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        gray[levels == transparent] = 255
    return Image.fromarray(gray.astype(np.uint8)).convert("RGB")


@dataclass(frozen=True)
class ImageTransform:
    """The image an encoder expects: resized to a square (no centre crop, as BLIP-2 does) and normalised.

    Args:
        size: side in pixels.
        mean: per channel, of values in [0, 1].
        std: per channel.
        interpolation: "bicubic" or "bilinear", always by PIL.
        crop_scale: share of the area that a random crop keeps, smallest and largest.
        flip: mirror every second image at random, in training only.
        max_pixels: larger images are broken records, see `load_image`.
        frames, frame_policy: how many frames stand for a clip, and which, see `load_frames`.

    Raises:
        ValueError: a size or frames below 1, an unknown interpolation or frame_policy, a crop_scale outside
            0 < smallest <= largest <= 1.

    Source: BlipImageTrainProcessor and BlipImageEvalProcessor in lavis/processors/blip_processors.py.
    """

    size: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    interpolation: str = "bicubic"
    crop_scale: tuple[float, float] = (0.5, 1.0)
    flip: bool = True
    max_pixels: int | None = None
    frames: int = 8
    frame_policy: str = "uniform"

    def __post_init__(self) -> None:
        if self.size < 1:
            raise ValueError(f"size={self.size}: expected a side of 1 pixel or more")
        if self.interpolation not in RESAMPLING:
            raise ValueError(f"interpolation={self.interpolation!r}: expected one of {', '.join(RESAMPLING)}")
        if self.frames < 1:
            raise ValueError(f"frames={self.frames}: expected 1 or more")
        if self.frame_policy not in POLICIES:
            raise ValueError(f"frame_policy={self.frame_policy!r}: expected one of {', '.join(POLICIES)}")
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={self.crop_scale}: expected 0 < smallest <= largest <= 1")

    def apply_to_clip(self, frames: Sequence[Image.Image], rng: np.random.Generator | None = None) -> Tensor:
        """The pixels of a clip's frames, float[n, 3, S, S], all cropped and mirrored alike."""
        seed = None if rng is None else int(rng.integers(2**63))
        return torch.stack(
            [self.apply(frame, None if seed is None else np.random.default_rng(seed)) for frame in frames]
        )

    def apply(self, image: Image.Image, rng: np.random.Generator | None = None) -> Tensor:
        """Return the pixels, float[3, S, S]: the whole image without `rng`, a random crop and flip with it."""
        image = to_rgb(image)
        if rng is not None:
            with pixel_bound(None):  # it has been decoded
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


def load_features(path: str, width: int | None = None) -> Tensor:
    """Read precomputed features, float[N, Dv], from a .npy file or a .safetensors file with one tensor.

    Args:
        width: the Dv that is expected; None = any.

    Raises: BrokenRecord when a file is missing, unreadable or of another kind; holds not exactly one tensor, or one that
        is not floating-point, not two-dimensional, empty or of another width; when a value is not finite.
    """
    try:
        features = _read_tensor(path)
    except (OSError, EOFError, ValueError) as error:
        raise BrokenRecord(path, f"{type(error).__name__}: {' '.join(str(error).split())}") from error
    if features.ndim != 2 or features.numel() == 0 or not features.is_floating_point():
        kind = f"{str(features.dtype).removeprefix('torch.')}{list(features.shape)}"
        raise BrokenRecord(path, f"the tensor is {kind}; expected float[N, Dv], neither 0")
    if width is not None and features.shape[1] != width:
        raise BrokenRecord(path, f"its features have width {features.shape[1]}; expected encoder.width={width}")
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
