"""From a config's values to a frozen encoder."""

from collections.abc import Callable

import torch

from qformer.encoders.frozen import FrozenEncoder
from qformer.encoders.of_open_clip import load_open_clip
from qformer.encoders.of_transformers import load_transformers
from qformer.encoders.precomputed import load_features
from qformer.encoders.request import Request, nearest

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
LOADERS: dict[str, Callable[[Request], FrozenEncoder]] = {
    "open_clip": load_open_clip,
    "transformers": load_transformers,
    "features": load_features,
}


def load_encoder(
    loader: str,
    id: str,
    *,
    pretrained: str | None = None,
    revision: str | None = None,
    block: int = -2,
    image_size: int | None = None,
    dtype: str = "float32",
    width: int | None = None,
    num_tokens: int | None = None,
    random_weights: bool = False,
    seed: int = 0,
) -> FrozenEncoder:
    """Load a frozen encoder; of a two-tower model only the vision tower is kept.

    Args:
        loader: a key of `LOADERS`.
        id: open_clip name, `local-dir:FOLDER` or `hf-hub:ID`; hub id or folder of transformers, a whole BLIP-2 too; not
            read for features.
        pretrained: open_clip's tag of the weights, or a file.
        revision: of a hub id of transformers.
        block: Python index of the block whose output is taken, before the final norm; later blocks are cut off.
        image_size: side in pixels, None = the weights' own; another one interpolates the position embeddings.
        dtype: of the frozen weights.
        width, num_tokens: Dv and N of precomputed features, N None if it varies.
        random_weights, seed: the architecture without its weights, for trials; the global generator stays as it was.

    Raises:
        ValueError: an unknown loader, dtype, id, tag, block or size, or weights that cannot be reached.

    Source: BLIP-2, section 3.3 (second-last block).
    """
    if loader not in LOADERS:
        raise ValueError(f"encoder.loader '{loader}' is unknown; {nearest(loader, LOADERS)}")
    if dtype not in DTYPES:
        raise ValueError(f"encoder.dtype '{dtype}' is unknown; expected one of {sorted(DTYPES)}")
    arguments = (pretrained, revision, block, image_size, DTYPES[dtype], width, num_tokens, random_weights, seed)
    return LOADERS[loader](Request(loader, id, *arguments))
