"""What a name in `data.train` stands for, and the records it opens."""

from __future__ import annotations

import os
import re

from qformer.data.addresses import is_address
from qformer.data.folders import open_folder
from qformer.data.records import Records, Table
from qformer.data.row_groups import open_row_groups
from qformer.data.rows import READERS, open_file, open_hub
from qformer.data.tars import open_tars

COMPRESSED = re.compile(r"\.(tgz|tar\.\w+)$")


def read_records(sources: list[str], root: str | None = None, *, key: str = "data") -> Records:
    """Open sources of records as one sequence, checked for form but with no picture opened.

    The first reading of a record file leaves an Arrow copy in the cache of `datasets`, that of tars an index; later
    ones map it into memory.

    Args:
        sources: .jsonl, .json or .parquet files; folders of pictures; WebDataset tars, and parquet files at an address
            of fsspec (both with {000..099}, {a,b}, * and ? in the name); ids of hub data sets. "SOURCE:NAME" keeps only
            the records whose `split` is NAME (a file) or reads that split (a hub data set, otherwise its "train").
        root: the folder that relative pictures of record files start from; by default the folder of the record file.
        key: the config key that named the sources, for messages.

    Raises:
        ValueError: no source; a file that is missing, empty, unreadable or of an unknown kind; an unknown split; a
            field that is missing or of the wrong type; a record without an image or without text; an image that leaves
            its root, is absolute although a root is given, or is a web address.
    """
    if not sources:
        raise ValueError(f"{key}: expected at least one record file or hub data set, got none")
    return Records([_open(source, root, key) for source in sources])


def _open(source: str, root: str | None, key: str) -> Table:
    if COMPRESSED.search(source):
        raise ValueError(f"{key}: {source} is compressed, so that no record in it can be found; decompress it")
    if source.endswith(".tar"):
        return open_tars(source if is_address(source) else os.path.expanduser(source), key)
    if is_address(source):
        if source.endswith(".parquet"):
            return open_row_groups(source, key)
        raise ValueError(
            f"{key}: {source!r} is an address; only .tar and .parquet files are read at one, fetch others first"
        )
    path, split = _split_source(os.path.expanduser(source))
    if os.path.isdir(path):
        return open_folder(path, key)
    if os.path.splitext(path)[1] in READERS:
        return open_file(path, split, root, key)
    return open_hub(path, split, root, key)


def _split_source(source: str) -> tuple[str, str | None]:
    match = None if os.path.exists(source) else re.fullmatch(r"(.+?):(\w+(?:\[.*\])?)", source)
    return (match[1], match[2]) if match else (source, None)
