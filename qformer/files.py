"""What is kept on disk: written whole or not at all, with checksums as `sha256sum` writes them."""

import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import shutil
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

SUMS = "SHA256SUMS"
MADE_OF = "made_of.json"
METRICS_FILE, WARNINGS_FILE = "metrics.jsonl", "warnings.jsonl"  # of a run: what it measured, and what it warned of
PARTIAL = ".partial"  # how the names of scratch files and folders end
_CHUNK_BYTES = 1 << 20


@contextlib.contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder that becomes `folder` in one rename when the block ends, and vanishes if it fails."""
    scratch = folder.with_name(f".{folder.name}{PARTIAL}")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
        for path in (scratch, *scratch.rglob("*")):
            _to_disk(path)
        if folder.exists():  # a step saved again after a resume
            shutil.rmtree(folder)
        scratch.rename(folder)
        _to_disk(folder.parent)
    except BaseException:
        shutil.rmtree(scratch, ignore_errors=True)
        raise


@contextlib.contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yield a scratch path, one for each process, that becomes `path` in one rename, and vanishes if the block fails."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}{PARTIAL}")
    try:
        yield scratch
        _to_disk(scratch)
        scratch.replace(path)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def remove_partial(folder: Path) -> None:
    """Remove the scratch folders that a killed process left in `folder`; nobody else may be writing there."""
    for scratch in folder.glob(f".*{PARTIAL}"):
        shutil.rmtree(scratch, ignore_errors=True)


def require_made_of(folder: Path, made_of: dict[str, Any], *, name: str, fix: str, others_begin: bool = False) -> None:
    """Refuse a folder that does not belong to what is about to be done, by the `MADE_OF` that `begin_folder` left in it.

    Args:
        made_of: what everything in the folder depends on, as JSON holds it.
        name: what the folder is called in the message; fix: what to do instead.
        others_begin: another process may just be making `MADE_OF`, whose scratch file then does not count.

    Raises: ValueError when it was begun with something else, or holds files and no `MADE_OF`.
    """
    path = folder / MADE_OF
    if path.is_file():
        require_same(json.loads(path.read_text()), made_of, name=name, fix=fix)
    elif folder.is_dir() and any(not (others_begin and entry.suffix == PARTIAL) for entry in folder.iterdir()):
        raise ValueError(f"{name} holds other files; expected a new folder, or one that this command began")


def require_same(there: dict[str, Any], made_of: dict[str, Any], *, name: str, fix: str) -> None:
    """Raise ValueError with the first value of `made_of` that is another in what is there; see `require_made_of`."""
    for key, value in made_of.items():
        if there.get(key) != value:
            raise ValueError(f"{name} was begun with {key} {there.get(key)!r}, not {value!r}; {fix}")


def begin_folder(folder: Path, made_of: dict[str, Any]) -> None:
    """Make a folder and say in its `MADE_OF` what it is made of; any number of processes may do it at once."""
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / MADE_OF).is_file():
        with atomic_file(folder / MADE_OF) as scratch:
            scratch.write_text(json.dumps(made_of, indent=1) + "\n")


def lock(file: IO[str], what: str) -> str | None:
    """Lock an open file until it is closed or this process ends, however it ends; returns None, or who holds it already.

    A lock by `fcntl` and not by `flock`: the workers of a killed run live on for seconds and would still hold the latter.

    Args:
        file: opened with "a+"; it will say who holds it.
        what: that is locked by it, for a warning where the disk knows no locks.
    """
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            file.seek(0)
            return file.read(200).strip() or "another run"
        logger.warning("%s cannot be locked (%s): see that no second run uses it", what, error.strerror)
    file.seek(0)
    file.truncate()
    file.write(f"process {os.getpid()} on {socket.gethostname()} since {time.strftime('%Y-%m-%d %H:%M:%S')}")
    file.flush()
    return None


def _to_disk(path: Path) -> None:
    """Wait until a file, or the names in a folder, would outlive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError) if path.is_dir() else contextlib.nullcontext():  # network disks may refuse
            os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_checksums(folder: Path, names: tuple[str, ...]) -> None:
    """Write `SHA256SUMS` for the files of a folder; `sha256sum -c SHA256SUMS` reads it too."""
    (folder / SUMS).write_text("".join(f"{_digest(folder / name)}  {name}\n" for name in names))


def changed_files(folder: Path, names: tuple[str, ...]) -> list[str]:
    """Those of `names` that are missing, or not as they were written; a folder without checksums passes with a warning."""
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
