"""Frozen encoders: images, or features computed beforehand, become tokens for the Q-Former."""

from qformer.encoders.frozen import Features, FrozenEncoder, InputTransform
from qformer.encoders.loading import LOADERS, encoder_weights, encoder_width, load_encoder, outline_encoder
from qformer.encoders.of_transformers import CLIP_MEAN, CLIP_STD
from qformer.encoders.precomputed import PrecomputedFeatures

__all__ = [
    "CLIP_MEAN",
    "CLIP_STD",
    "LOADERS",
    "Features",
    "FrozenEncoder",
    "InputTransform",
    "PrecomputedFeatures",
    "encoder_weights",
    "encoder_width",
    "load_encoder",
    "outline_encoder",
]
