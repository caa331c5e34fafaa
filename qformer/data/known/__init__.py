"""Known data sets as functions of their published files: `python -m qformer.data.known --help`, docs/data.md."""

from qformer.data.known.formats import recognise
from qformer.data.known.sets import KNOWN, WEB, KnownSet, read_known
from qformer.data.known.writing import web_source, write_known

__all__ = ["KNOWN", "WEB", "KnownSet", "read_known", "recognise", "web_source", "write_known"]
