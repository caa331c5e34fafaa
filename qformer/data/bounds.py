"""The most pixels that an image may have; PIL's own bound is a global of PIL's, which threads share."""

import contextlib
import threading
from collections.abc import Iterator

from PIL import Image

_LOCK = threading.Lock()
_LIFTED: list[int | None] = []  # PIL's own bound, once for each block that has lifted it


@contextlib.contextmanager
def pixel_bound(max_pixels: int | None) -> Iterator[int | None]:
    """Lifts PIL's own bound while a block runs in any thread; yields the one that holds in its place.

    Args:
        max_pixels: `data.max_pixels`; None = PIL's own, `Image.MAX_IMAGE_PIXELS`.
    """
    with _LOCK:
        _LIFTED.append(_LIFTED[0] if _LIFTED else Image.MAX_IMAGE_PIXELS)
        pil_bound, Image.MAX_IMAGE_PIXELS = _LIFTED[0], None
    try:
        yield pil_bound if max_pixels is None else max_pixels
    finally:
        with _LOCK:
            _LIFTED.pop()
            if not _LIFTED:
                Image.MAX_IMAGE_PIXELS = pil_bound
