"""Frames of videos as images, by PyAV (`pip install 'qformer[video]'`), which is imported when the first clip is read."""

from __future__ import annotations

import io
from typing import Any

from PIL import Image

from qformer.data.bounds import pixel_bound
from qformer.data.records import BrokenRecord, Record

# Which frames of `count` stand for a clip, at most n of them: the first of n equal parts, as BLIP has it, or their middles.
POLICIES = {
    "uniform": lambda count, n: [i * count // n for i in range(n)],
    "middle": lambda count, n: [(2 * i + 1) * count // (2 * n) for i in range(n)],
}
# Files that hold their frames themselves: a playlist, whatever its name ends in, would have others read.
FORMATS = "mov,matroska,avi,mpeg,mpegts,mpegvideo,m4v,asf,flv,ogg,gif"


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
    try:
        images: list[Image.Image] = []
        with pixel_bound(max_pixels) as bound:
            count = _count_frames(av, record, bound)
        while not images:
            images, decoded = _decode(av, record, set(POLICIES[policy](count, frames)), count)
            count = decoded  # the headers promised more than there are
        return images
    except MemoryError:
        raise
    except Exception as error:  # the decoders raise every kind of exception on damaged bytes
        raise BrokenRecord(record.image, f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def measure_clip(path: str) -> tuple[float, int]:
    """How long a clip is, in seconds, and how many frames it holds, by its packets: nothing is decoded.

    Raises: BrokenRecord when the file is missing or no video; ValueError when PyAV is not installed.
    """
    av = _import_av()
    try:
        with _open(av, Record(path, path)) as clip:
            stream = clip.streams.video[0]
            packets = [packet for packet in clip.demux(stream) if packet.size > 0]
            times = [packet.pts for packet in packets if packet.pts is not None] or [0]
            ends = [packet.pts + (packet.duration or 0) for packet in packets if packet.pts is not None] or [0]
            return float((max(ends) - min(times)) * stream.time_base), len(packets)
    except Exception as error:  # as in `load_frames`
        raise BrokenRecord(path, f"{type(error).__name__}: {' '.join(str(error).split())}") from error


def _import_av() -> Any:
    try:
        import av
    except ImportError:
        raise ValueError("clips are read by PyAV, which is not installed: pip install 'qformer[video]'") from None
    return av


def _open(av: Any, record: Record) -> Any:
    file = record.image if record.image_bytes is None else io.BytesIO(record.image_bytes)
    return av.open(file, options={"format_whitelist": FORMATS})


def _count_frames(av: Any, record: Record, bound: int | None) -> int:
    """How many frames the file holds, by its packets: nothing is decoded."""
    with _open(av, record) as clip:
        if not clip.streams.video:
            raise ValueError("the file has no video in it")
        stream = clip.streams.video[0]
        width, height = stream.codec_context.width, stream.codec_context.height
        if bound is not None and width * height > bound:
            raise ValueError(f"frames of {width} x {height} pixels are more than {bound}; set data.max_pixels higher")
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
