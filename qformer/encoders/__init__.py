"""Frozen encoders: pictures, or features computed beforehand, become tokens for the Q-Former."""

from qformer.encoders.frozen import Features, FrozenEncoder, InputTransform
from qformer.encoders.loading import LOADERS, load_encoder
from qformer.encoders.of_open_clip import OpenClipEncoder
from qformer.encoders.of_transformers import CLIP_MEAN, CLIP_STD, TransformersEncoder
from qformer.encoders.precomputed import PrecomputedFeatures

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
