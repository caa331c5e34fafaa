"""What a language model keeps while it writes: keys and values of the beams, and of what several rows begin with."""

from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer

KeysValues = tuple[Tensor, Tensor]  # of a layer, two of float[R, H, L, E]


class RoomyLayer(DynamicLayer):
    """Keys and values with room for all tokens to come: nothing is copied to append one.

    transformers' own layer makes them anew for every token, and again when beams change places. Beams change places only
    within their row, so what they begin with, all that comes by the first `update`, stays where it is.

    Args:
        room: tokens expected after the first `update`; more are copied into more room.
    """

    def __init__(self, room: int) -> None:
        super().__init__()
        self.room, self.begun = room, 0
        self.buffers: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        length = self.get_seq_length()
        end = length + key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device, self.begun = key_states.dtype, key_states.device, end
            self.buffers = tuple(_with_room(states, self.room) for states in (key_states, value_states))
            self.is_initialized = True
        else:
            if end > self.buffers[0].shape[2]:  # a rank that is done steps on while another writes longer
                self.buffers = tuple(_with_room(buffer[:, :, :length], end) for buffer in self.buffers)
            for buffer, states in zip(self.buffers, (key_states, value_states), strict=True):
                buffer[:, :, length:end] = states
        self.keys, self.values = (buffer[:, :, :end] for buffer in self.buffers)
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for buffer in self.buffers:
            written = buffer[:, :, self.begun : self.get_seq_length()]
            written.copy_(written.index_select(0, beam_idx.to(written.device)))


class SameForBeams(DynamicLayer):
    """Keys and values that all beams of a row share, as those of an encoder's output: their places do not matter."""

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing to move."""


def keys_values(cache: Any) -> list[KeysValues] | None:
    """Of each layer, where those of all positions are all that a model keeps; None for a state, or a window, which are not
    for us to repeat.
    """
    if not isinstance(cache, DynamicCache) or not all(type(layer) is DynamicLayer for layer in cache.layers):
        return None
    layers = cast(list[DynamicLayer], cache.layers)
    pairs = [(layer.keys, layer.values) for layer in layers if layer.keys is not None and layer.values is not None]
    return pairs if len(pairs) == len(layers) else None


def for_beams(kept: list[KeysValues], copies: int, room: int) -> DynamicCache:
    """Each row so many times, with room for more tokens."""
    cache = DynamicCache()
    cache.layers.extend(RoomyLayer(room) for _ in kept)
    for i, (keys, values) in enumerate(kept):
        cache.update(keys.repeat_interleave(copies, 0), values.repeat_interleave(copies, 0), i)
    return cache


def for_decoder_beams(room: int) -> EncoderDecoderCache:
    """An empty cache of an encoder-decoder whose beams begin with the same token."""
    written, encoded = DynamicCache(), DynamicCache()
    written.layer_class_to_replicate = cast(Any, partial(RoomyLayer, room))
    encoded.layer_class_to_replicate = SameForBeams
    return EncoderDecoderCache(written, encoded)


class SharedStart(NamedTuple):
    """What rows have in common before their texts differ, each different one once; rows have their padding in front.

        [v v a b c]    start  [v v]    rows read on from  [c]    with a cache of  [v v a b]
        [. v v a d]                                       [d]                     [. v v a]

    where "v v a" is the `start` of both: a row's cached positions are its padding and as much of it as fits.
    """

    embeds: Tensor  # float[U, K, D]
    row: Tensor  # int64[R], which of them each row begins with
    places: Tensor  # int64[R, S], the position in it of each of the first S positions; at padding any

    @classmethod
    def of(cls, embeds: Tensor, mask: Tensor, length: int) -> "SharedStart | None":
        """The starts of rows float[R, L, D] with bool[R, L]; None where no two are the same.

        Args:
            length: positions at the beginning of a row that another may have too, padding left out. Those of the text that
                are the same in all rows are added to them.
        """
        pads = (~mask).sum(1)
        shortest = embeds.shape[1] - int(pads.max())
        heads = embeds.take_along_dim((pads[:, None] + torch.arange(shortest - 1, device=pads.device))[..., None], 1)
        if not 0 < length < shortest:
            return None
        equal = (heads[:, length:] == heads[:1, length:]).all(2).all(0)
        length += int(equal.cumprod(0).sum())
        different, row = heads[:, :length].flatten(1).unique(dim=0, return_inverse=True)
        if len(different) == len(embeds):
            return None
        places = torch.arange(int(pads.min()) + length, device=pads.device) - pads[:, None]
        return cls(different.unflatten(1, (length, -1)), row, places.clamp(min=0))

    def spread(self, kept: list[KeysValues]) -> DynamicCache:
        """From keys and values of the starts to a cache of the first S positions of all rows."""
        cache, places = DynamicCache(), self.places[:, None, :, None]
        for i, pair in enumerate(kept):
            keys, values = (states[self.row].take_along_dim(places, 2) for states in pair)
            cache.update(keys, values, i)
        return cache


def _with_room(states: Tensor, room: int) -> Tensor:
    buffer = states.new_empty(*states.shape[:2], states.shape[2] + room, states.shape[3])
    buffer[:, :, : states.shape[2]] = states
    return buffer
