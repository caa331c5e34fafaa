"""Records, their order, their pictures and their batches."""

from .cache import FeatureCache, Manifest, differences
from .caching import CacheWriter
from .captions import clean_caption, clean_question
from .loading import Batch, RecordDataset, Sample, collate, evaluation_loader, training_loader
from .order import Draw, GlobalBatches, Mixture, Order, build_order, derive_seed
from .records import BrokenRecord, Record, Records
from .sources import read_records
from .transforms import ImageTransform, load_features, load_image, to_rgb

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
    "to_rgb",
    "training_loader",
]
