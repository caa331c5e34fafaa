"""What a name in `data.train` stands for, and the records it opens."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence

from qformer.data.addresses import is_address
from qformer.data.folders import open_folder
from qformer.data.known.table import find_answers, published_format, published_rows
from qformer.data.records import Records, Table
from qformer.data.rows import READERS, open_file, open_hub, open_saved, open_table
from qformer.data.tars import open_tars

SAVED = ("dataset_dict.json", "state.json")  # what `save_to_disk` of `datasets` leaves
COMPRESSED = re.compile(r"\.(tgz|tar\.\w+)$")


def read_records(
    sources: list[str], root: str | None = None, *, key: str = "data", beside: Sequence[str] = ()
) -> Records:
    """Open sources of records as one sequence, checked for form but with no image opened.

    The first reading of a record file leaves an Arrow copy in the cache of `datasets`, that of tars an index; later
    ones map it into memory.

    Args:
        sources: .jsonl, .json or .parquet files; files as COCO, Karpathy, VQA and others publish them (docs/data.md),
            VQA's questions and annotations both; folders of images, or saved by `datasets`; WebDataset tars, here or at an address
            of fsspec (with {000..099}, {a,b}, * and ? in the name); ids of hub data sets. "SOURCE:NAME" keeps only
            the records whose `split` is NAME (a file) or reads that split (a hub data set, otherwise its "train").
        root: the folder that relative images of record files start from; by default the folder of the record file.
        key: the config key that named the sources, for messages.
        beside: other sources whose image_ids must not meet these ones: they are relative to the folder that all lie in.

    Raises:
        ValueError: no source; a file that is missing, empty, unreadable or of an unknown kind; an unknown split; a
            field that is missing or of the wrong type; a record without an image or without text; an image that leaves
            its root, is absolute although a root is given, or is a web address.
    """
    if not sources:
        raise ValueError(f"{key}: expected at least one record file or hub data set, got none")
    base = common_folder([*sources, *beside], root)
    places = [_split_source(os.path.expanduser(source)) for source in sources]
    formats = [published_format(path) for path, _ in places]
    answers = find_answers([path for path, _ in places], formats, key)
    return Records([
        open_table(path, published_rows(path, name, answers), split, root, base=base, key=key)
        if name else _open(source, root, base, key)
        for source, (path, split), name in zip(sources, places, formats, strict=True) if path not in answers
    ])  # fmt: skip


def common_folder(sources: Sequence[str], root: str | None = None) -> str:
    """The folder that image_ids are relative to: the root, else the lowest that holds all local sources."""
    if root is not None:
        return os.path.abspath(os.path.expanduser(root))
    folders = []
    for source in sources:
        path = os.path.abspath(_split_source(os.path.expanduser(source))[0])
        if os.path.isdir(path):
            folders.append(path)
        elif os.path.isfile(path) and not path.endswith(".tar"):
            folders.append(os.path.dirname(path))
    return os.path.commonpath(folders) if folders else ""


def _open(source: str, root: str | None, base: str, key: str) -> Table:
    if COMPRESSED.search(source):
        raise ValueError(f"{key}: {source} is compressed, so that no record in it can be found; decompress it")
    if source.endswith(".tar"):
        return open_tars(source if is_address(source) else os.path.expanduser(source), key)
    if is_address(source):
        raise ValueError(f"{key}: {source!r} is an address; only .tar files are read at one; download it, or pack tars")
    path, split = _split_source(os.path.expanduser(source))
    if any(os.path.isfile(os.path.join(path, name)) for name in SAVED):
        return open_saved(path, split, root, base=base, key=key)
    if os.path.isdir(path):
        return open_folder(path, base, key)
    if os.path.splitext(path)[1] in READERS:
        return open_file(path, split, root, base=base, key=key)
    return open_hub(path, split, root, base=base, key=key)


def _split_source(source: str) -> tuple[str, str | None]:
    match = None if os.path.exists(source) else re.fullmatch(r"(.+?):(\w+(?:\[.*\])?)", source)
    return (match[1], match[2]) if match else (source, None)
