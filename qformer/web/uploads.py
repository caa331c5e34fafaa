"""What a visitor uploads, measured before a model reads it, and the pictures that show how it will be read."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from qformer.data.clips import load_frames, measure_clip
from qformer.data.records import BrokenRecord, Record, is_clip
from qformer.data.transforms import ImageTransform, load_features, load_image
from qformer.messages import one_line

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")  # PIL hands others to programs outside of it
FEATURES = (".npy", ".safetensors")
FRAMES_A_SECOND = 120
SMALL, LARGE = 256, 1024  # sides in pixels of a picture that is shown


@dataclass(frozen=True)
class Limits:
    """What an upload may weigh.

    Args:
        megabytes: of the file, in millions of bytes.
        megapixels: of an image or a frame, in millions, whatever the file weighs.
        video_s: seconds of a video.
    """

    megabytes: float = 32.0
    megapixels: float = 50.0
    video_s: float = 60.0

    @property
    def max_bytes(self) -> int:
        return round(self.megabytes * 1e6)

    @property
    def max_pixels(self) -> int:
        return round(self.megapixels * 1e6)


def read_upload(path: str, limits: Limits, transform: ImageTransform | None) -> list[Image.Image]:
    """The image of an upload, or the frames that stand for a video; none of a feature file.

    Args:
        transform: of the model that will read it; None = the model reads feature files.

    Raises: ValueError, which names the file and not its folder, when it is missing, no image, video or feature file, or
        over the limits.
    """
    name = os.path.basename(path)
    try:
        size = os.path.getsize(path)
        if size > limits.max_bytes:
            raise ValueError(f"{name} has {size / 1e6:.1f} MB; expected {limits.megabytes:g} MB at most")
        if transform is None:
            load_features(path)
            return []
        if path.endswith(FEATURES):
            raise ValueError(f"{name} holds features; these adapters read images and videos")
        if is_clip(path):
            return _read_clip(path, limits, transform)
        Image.init()
        with Image.open(path, formats=FORMATS) as header:
            if header.width * header.height > limits.max_pixels:
                raise ValueError(
                    f"{name} has {header.width} x {header.height} pixels; expected {limits.megapixels:g} million at most"
                )
        return [load_image(Record(path, path), limits.max_pixels)]
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has too many pixels; expected {limits.megapixels:g} million at most") from None
    except BrokenRecord as broken:
        raise ValueError(f"{name} cannot be read: {_without_folder(broken.reason, path)}") from None
    except FileNotFoundError:
        raise ValueError(f"{name} is no longer kept here; drop it again") from None
    except OSError:  # PIL's UnidentifiedImageError is one
        raise ValueError(
            f"{name} cannot be read: it is no image of {', '.join(FORMATS)}, and its name is not that of a video"
        ) from None


def _read_clip(path: str, limits: Limits, transform: ImageTransform) -> list[Image.Image]:
    seconds, count = measure_clip(path)
    if seconds > limits.video_s or count > limits.video_s * FRAMES_A_SECOND:
        raise ValueError(
            f"{os.path.basename(path)} is {seconds:.0f} s long, in {count} frames; expected {limits.video_s:g} s at most"
        )
    policy = transform.frame_policy
    return load_frames(Record(path, path), transform.frames, policy, max_pixels=limits.max_pixels)


def _without_folder(reason: str, path: str) -> str:
    """What a decoder said, in a line, without where the file lies and what kind of exception it was."""
    text = one_line(reason.replace(path, os.path.basename(path)).replace(str(Path(path).parent), ""))
    kind, _, rest = text.partition(": ")
    return rest if rest and kind.isidentifier() else text


def shown(images: Sequence[Image.Image], side: int = LARGE) -> Image.Image | None:
    """One picture of an upload: an image of at most `side` pixels, or a clip's frames beside each other; None for none."""
    if not images:
        return None
    if len(images) > 1:
        return _sheet(images, side)
    (image,) = images
    longest = max(image.size)
    if longest < SMALL:  # as it is: no pixels are made up
        times = -(-SMALL // longest)
        return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)
    small = image.copy()
    small.thumbnail((side, side))
    return small


def _sheet(images: Sequence[Image.Image], side: int) -> Image.Image:
    columns = min(4, len(images))
    cell = side // columns
    rows = -(-len(images) // columns)
    width, height = images[0].size
    sizes = (cell, max(1, cell * height // width))
    sheet = Image.new("RGB", (columns * cell, rows * sizes[1]), "white")
    for number, image in enumerate(images):
        sheet.paste(image.resize(sizes), (number % columns * cell, number // columns * sizes[1]))
    return sheet
