"""Checksums of what is kept, as `sha256sum` writes them: a flipped byte is told, never trained on or answered from."""

import hashlib
import logging
from pathlib import Path

logger = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
_CHUNK_BYTES = 1 << 20


def write_checksums(folder: Path, names: tuple[str, ...]) -> None:
    """Write `SHA256SUMS` for the files of a folder; `sha256sum -c SHA256SUMS` reads it too."""
    (folder / SUMS).write_text("".join(f"{_digest(folder / name)}  {name}\n" for name in names))


def changed_files(folder: Path, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that are missing, or not as they were written; a folder without checksums is told of and passes."""
    if not (folder / SUMS).is_file():
        logger.warning("%s has no %s, so a damaged byte in it would not be noticed", folder, SUMS)
        return []
    lines = (folder / SUMS).read_text(errors="replace").splitlines()
    written = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    return [n for n in names if not (folder / n).is_file() or _digest(folder / n) != written.get(n)]


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
