"""From a config to a frozen encoder, or to what is known of it without its weights: the loader's own module is asked."""

from typing import Protocol

from qformer.config import EncoderConfig
from qformer.encoders import of_open_clip, of_timm, of_transformers, precomputed
from qformer.encoders.checks import outline
from qformer.encoders.frozen import FrozenEncoder
from qformer.messages import nearest
from qformer.parts import WeightSource


class Loader(Protocol):
    """What a module in `LOADERS` has."""

    def load(self, config: EncoderConfig, seed: int = 0) -> FrozenEncoder:
        """The frozen encoder, cut after `block`, in `dtype`; with `random_weights` drawn from `seed`."""

    def width(self, config: EncoderConfig) -> int:
        """Dv, without a weight being read."""

    def weights(self, config: EncoderConfig) -> WeightSource | None:
        """Where the weights come from; None where there are none."""


LOADERS: dict[str, Loader] = {
    "open_clip": of_open_clip,
    "timm": of_timm,
    "transformers": of_transformers,
    "features": precomputed,
}


def load_encoder(config: EncoderConfig, seed: int = 0) -> FrozenEncoder:
    """Load a frozen encoder; of a two-tower model only the vision tower is kept.

    Args:
        config: `encoder.*`; the later blocks than `block` are cut off, another `image_size` than the weights' own
            interpolates the position embeddings.
        seed: of `random_weights`; the global generator stays as it was.

    Raises: ValueError when a loader, dtype, id, tag, block or size is unknown, or weights cannot be reached.

    Source: BLIP-2, section 3.3 (second-last block).
    """
    return _loader(config).load(config, seed)


def outline_encoder(config: EncoderConfig) -> FrozenEncoder:
    """The encoder on the meta device: sizes without weights and without memory.

    Raises: ValueError as `load_encoder` does.
    """
    return outline(_loader(config).load, config)


def encoder_width(config: EncoderConfig) -> int:
    """Dv of the encoder that `encoder.*` names, without its weights.

    Raises: ValueError when its own config cannot be reached.
    """
    return _loader(config).width(config)


def encoder_weights(config: EncoderConfig) -> WeightSource | None:
    """Where the weights that `encoder.*` names come from; None where there are none to load."""
    return None if config.random_weights else _loader(config).weights(config)


def _loader(config: EncoderConfig) -> Loader:
    if config.loader not in LOADERS:
        raise ValueError(f"encoder.loader '{config.loader}' is unknown; {nearest(config.loader, LOADERS)}")
    return LOADERS[config.loader]
