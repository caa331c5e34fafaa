"""Names of sources that stand for many files, here or at any address that fsspec reads."""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, NamedTuple, TypeVar

from qformer.messages import one_line

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

MANY = re.compile(r"\{[^{}]*\}")
WILD = re.compile(r"[*?\[]")
CONNECTIONS = 8  # at a time, where files lie at an address
Result = TypeVar("Result")


class Files(NamedTuple):
    """Files of one file system, in an order that does not change; goes to other processes by pickle.

    Args:
        address: what the user wrote; it says which file system.
        paths: as that file system names them.
    """

    address: str
    paths: list[str]

    @property
    def system(self) -> AbstractFileSystem:
        """The file system, made anew in every process: connections do not survive a fork."""
        return _system(self.address, os.getpid())

    def ask(self, what: Callable[[str], Result], paths: Iterable[str], key: str) -> Iterator[Result]:
        """What a function says of each path, in order; several are asked at a time where they are not of this machine.

        Raises:
            ValueError: a path is not there or cannot be read.
        """

        def named(path: str) -> Result:
            try:
                return what(path)
            except FileNotFoundError:
                raise ValueError(f"{key}: there is no file {path!r}, one of {self.address!r}") from None
            except OSError as error:
                raise ValueError(f"{key}: {path} cannot be read: {one_line(error)}") from None

        with ThreadPoolExecutor(CONNECTIONS if is_address(self.address) else 1) as pool:
            yield from pool.map(named, paths)


def is_address(source: str) -> bool:
    """Whether a source is read through fsspec, rather than as a file of this machine."""
    return "://" in source


def find_files(source: str, key: str) -> Files:
    """The files that a path or address stands for, with {000..099}, {a,b}, * and ? in it; braces keep their order.

    Raises:
        ValueError: nothing matches, an address of an unknown kind or one whose package is not installed.
    """
    try:
        system = _system(source, os.getpid())
    except (ImportError, ValueError) as error:
        raise ValueError(f"{key}: {source!r} cannot be read: {one_line(error)}") from None
    paths: list[str] = []
    for one in _spread(source):
        path = str(system._strip_protocol(one))
        names = sorted(str(name) for name in system.glob(path)) if WILD.search(path) else [path]
        names = [name for name in names if not os.path.basename(name).startswith("._")]  # of macOS
        if not names:
            raise ValueError(f"{key}: there is no file {one!r}")
        paths += names
    return Files(source, paths)


@functools.lru_cache(maxsize=16)
def _system(address: str, process: int) -> AbstractFileSystem:
    from fsspec.core import url_to_fs

    return url_to_fs(address)[0]


def _spread(pattern: str) -> Iterator[str]:
    """The names that {000..099} and {a,b} stand for."""
    match = MANY.search(pattern)
    if match is None:
        yield pattern
        return
    inside = match[0][1:-1]
    choices = inside.split(",")
    if span := re.fullmatch(r"(\d+)\.\.(\d+)", inside):
        low, high = span.groups()
        choices = [f"{number:0{len(low)}d}" for number in range(int(low), int(high) + 1)]
    for choice in choices:
        yield from _spread(pattern[: match.start()] + choice + pattern[match.end() :])
