"""Parquet files at an address, read a row group at a time: nothing is kept on this machine.

A row is only to be had with its whole row group, so reading in random order fetches each group many times over. With
`data.shuffle_block_records` about as large as a group, a process fetches those it needs once.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from qformer.data.addresses import Files, find_files
from qformer.data.records import Identity, Record, build_record, identify
from qformer.data.rows import choose_fields, columns_of, picture_of
from qformer.messages import one_line

if TYPE_CHECKING:
    import pyarrow

logger = logging.getLogger(__name__)

KEPT_GROUPS = 2  # in memory, of a process


class RowGroups:
    """The rows of parquet files with pictures inside.

    Args:
        groups: file and number within the file of every row group, int64[G, 2].
        ends: rows up to the end of every row group, int64[G].
        columns: what each field of the schema is called in the files.
    """

    def __init__(self, source: str, files: Files, groups: np.ndarray, ends: np.ndarray, columns: dict[str, str]):
        self.source = source
        self._files = files
        self._groups = groups
        self._ends = ends
        self._columns = columns

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, row: int) -> Record:
        """The record of a row; its `problem` says what could not be read."""
        number = int(np.searchsorted(self._ends, row, side="right"))
        name = f"{self.source}#{row}"
        try:
            group = self._read_group(number)
        except Exception as error:  # file systems and damaged bytes raise every kind
            return Record(name, name, problem=f"{type(error).__name__}: {one_line(error)}")
        (found,) = group.slice(row - self._ends[number] + group.num_rows, 1).to_pylist()
        fields = {field: found[column] for field, column in self._columns.items()}
        content = picture_of(fields["image"])[1]
        if content is None:
            return Record(name, name, problem="the row holds no picture")
        return build_record(identify(name, content, fields.get("image_id")), fields)

    text = read

    def identities(self) -> Iterator[Identity]:
        """The picture of every row; all of the files are read."""
        for row in range(len(self)):
            record = self.read(row)
            yield Identity(record.image, record.image_id, record.image_bytes or b"")

    def _read_group(self, number: int) -> pyarrow.Table:
        file, group = self._groups[number].tolist()
        return _read_group(
            self._files.address, self._files.paths[file], group, tuple(self._columns.values()), os.getpid()
        )


@functools.lru_cache(maxsize=KEPT_GROUPS)
def _read_group(address: str, path: str, group: int, columns: tuple[str, ...], process: int) -> pyarrow.Table:
    import pyarrow.parquet as pq

    with Files(address, [path]).system.open(path, "rb") as file:
        return pq.ParquetFile(file).read_row_group(group, columns=list(columns))


def open_row_groups(source: str, key: str) -> RowGroups:
    """Open parquet files at an address, of which only the ends are read for now.

    Raises:
        ValueError: there is no such file, it is no parquet file, files differ in their columns, a field is missing or
            of the wrong type, the pictures are not inside, or there are no rows.
    """
    import datasets
    import pyarrow
    import pyarrow.parquet as pq

    files = find_files(source, key)

    def footer(path: str) -> tuple[pyarrow.Schema, list[int]]:
        with files.system.open(path, "rb") as file:
            try:
                found = pq.ParquetFile(file)
            except pyarrow.ArrowInvalid as error:
                raise ValueError(f"{key}: {path} cannot be read as parquet: {one_line(error)}") from None
            counts = [found.metadata.row_group(n).num_rows for n in range(found.num_row_groups)]
            return found.schema_arrow, counts

    footers = list(files.ask(footer, files.paths, key))
    schema = footers[0][0]
    for path, (other, _) in zip(files.paths, footers, strict=True):
        if not other.equals(schema):
            raise ValueError(f"{key}: {path} has other columns than {files.paths[0]}; name only files of one data set")
    kept = choose_fields(datasets.Dataset(datasets.table.InMemoryTable(schema.empty_table())), source).column_names
    columns = {field: column for field, column in columns_of(schema.names).items() if field in kept}
    image = schema.field(columns["image"]).type
    if not (pyarrow.types.is_struct(image) and image.get_field_index("bytes") >= 0) and "binary" not in str(image):
        raise ValueError(f"{key}: {source} names its pictures by path; expected their bytes in the rows")
    counts = [count for _, found in footers for count in found]
    if not sum(counts):
        raise ValueError(f"{key}: {source} holds no records")
    groups = [(file, group) for file, (_, found) in enumerate(footers) for group in range(len(found))]
    logger.info("%s: %d rows in groups of %d", source, sum(counts), max(counts))
    return RowGroups(source, files, np.array(groups), np.cumsum(counts), columns)
