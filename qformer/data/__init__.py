"""Records, their order, their images and their batches."""

import importlib
from typing import TYPE_CHECKING, Any

from qformer.data.captions import Wording, clean_caption, clean_question
from qformer.data.records import BrokenRecord, Record, Records
from qformer.data.sources import read_records

if TYPE_CHECKING:
    from qformer.data.cache import FeatureCache, Manifest, differences
    from qformer.data.caching import CacheWriter
    from qformer.data.loading import Batch, RecordDataset, Sample, collate, evaluation_loader, training_loader
    from qformer.data.order import Draw, GlobalBatches, Mixture, Order, build_order, derive_seed, shares
    from qformer.data.transforms import ImageTransform, load_features, load_image, to_rgb

__all__ = [
    "Batch",
    "BrokenRecord",
    "CacheWriter",
    "Draw",
    "FeatureCache",
    "GlobalBatches",
    "ImageTransform",
    "Manifest",
    "Mixture",
    "Order",
    "Record",
    "RecordDataset",
    "Records",
    "Sample",
    "Wording",
    "build_order",
    "clean_caption",
    "clean_question",
    "collate",
    "derive_seed",
    "differences",
    "evaluation_loader",
    "load_features",
    "load_image",
    "read_records",
    "shares",
    "to_rgb",
    "training_loader",
]


def __getattr__(name: str) -> Any:
    """Import on first use what needs torch: records are read without it."""
    if name in __all__:
        for module in ("cache", "caching", "loading", "order", "transforms"):
            place = importlib.import_module(f"qformer.data.{module}")
            if name in vars(place):
                return vars(place)[name]
    raise AttributeError(f"module 'qformer.data' has no attribute {name!r}")
