"""Frozen encoders: pictures, or features computed beforehand, become tokens for the Q-Former."""

from .frozen import Features, FrozenEncoder, InputTransform
from .loading import LOADERS, load_encoder
from .of_open_clip import OpenClipEncoder
from .of_transformers import CLIP_MEAN, CLIP_STD, TransformersEncoder
from .precomputed import PrecomputedFeatures

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "LOADERS",
    "Features",
    "FrozenEncoder",
    "InputTransform",
    "OpenClipEncoder",
    "PrecomputedFeatures",
    "TransformersEncoder",
    "load_encoder",
]
