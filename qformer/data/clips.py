"""Frames of videos as images, by PyAV (`pip install 'qformer[video]'`), which is imported when the first clip is read."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from qformer.data.records import BrokenRecord, Record

# Which frames of `count` stand for a clip, at most n of them: the first of n equal parts, as BLIP has it, or their middles.
POLICIES = {
    "uniform": lambda count, n: [i * count // n for i in range(n)],
    "middle": lambda count, n: [(2 * i + 1) * count // (2 * n) for i in range(n)],
}


def load_frames(
    record: Record, frames: int, policy: str = "uniform", *, max_pixels: int | None = None
) -> list[Image.Image]:  # fmt: skip
    """The frames that stand for a clip, in their order, as upright 8-bit RGB.

    A clip of fewer frames gives each of them once. Damage that the decoder conceals passes, as in any player; a file that
    was cut short does not.

    Args:
        frames: how many at most.
        policy: one of `POLICIES`.
        max_pixels: of a frame, as for images: `data.max_pixels`.

    Raises: BrokenRecord when a file is missing, no video, cut short, empty or too large; ValueError when PyAV is not
        installed.
    Source: BLIP (arXiv 2201.12086), section 5.6; data/video_dataset.py of its repository, whose channels are BGR where
        the decoder gives RGB.
    """
    av = _import_av()
    limit = Image.MAX_IMAGE_PIXELS if max_pixels is None else max_pixels
    try:
        images: list[Image.Image] = []
        count = _count_frames(av, record, limit)
        while not images:
            images, decoded = _decode(av, record, set(POLICIES[policy](count, frames)), count)
            count = decoded  # the headers promised more than there are
        return images
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise every kind of exception on damaged bytes
        raise BrokenRecord(record.image, f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise ValueError("clips are read by PyAV, which is not installed: pip install 'qformer[video]'") from None
    return av


def _open(av: Any, record: Record) -> Any:
    return av.open(record.image if record.image_bytes is None else io.BytesIO(record.image_bytes))


def _count_frames(av: Any, record: Record, limit: int | None) -> int:
    """How many frames the file holds, by its packets: nothing is decoded."""
    with _open(av, record) as clip:
        if not clip.streams.video:
            raise ValueError("the file has no video in it")
        stream = clip.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if limit is not None and width * height > limit:
            raise ValueError(f"frames of {width} x {height} pixels are more than {limit}; set data.max_pixels higher")
        count = sum(packet.size > 0 for packet in clip.demux(stream))
        if stream.frames > count:
            raise ValueError(f"the file ends after {count} of {stream.frames} frames")
    if count == 0:
        raise ValueError("the clip has no frames")
    return count


def _decode(av: Any, record: Record, wanted: set[int], count: int) -> tuple[list[Image.Image], int]:
    """The frames at the positions wanted and how many were decoded; no frames where there are fewer than `count`."""
    images, decoded = [], 0
    with _open(av, record) as clip:
        stream = clip.streams.video[0]
        stream.codec_context.thread_count = 1  # readers are processes of one thread
        for number, frame in enumerate(clip.decode(stream)):
            decoded = number + 1
            if number in wanted:
                image = Image.fromarray(frame.to_ndarray(format="rgb24"))
                images.append(image.rotate(frame.rotation, expand=True) if frame.rotation else image)
            if len(images) == len(wanted):
                return images, count
    if decoded == 0:
        raise ValueError("none of its frames can be decoded")
    return [], decoded
