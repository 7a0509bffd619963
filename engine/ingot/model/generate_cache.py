"""Keys and values of a running batch, with room for the tokens and the rows to come.

transformers' own cache copies all keys and values of a layer for each new token, and for each row that leaves. Here a
token is written into a buffer that has room for it, a row that leaves is overwritten by the last one, and a row that
comes is written behind it. While rows of a model of 42 million parameters joined and left at 64 rows, copies took 26 %
of the time that way, and 9 % here. Buffers that are large enough stay: new ones every few tokens come to lie elsewhere,
and memory grew by the holes between them. Self-contained: torch, transformers.
"""

# B rows, H heads, T tokens held, D width of a head

from typing import Any

from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

ROOM = 32  # tokens: then a layer is copied once in as many steps
SPARE_ROWS = 4  # a share of 1 / 4: likewise when rows join


class GrowingLayer(DynamicLayer):
    """A layer whose `keys` and `values` [B, H, T, D] are windows of buffers: their first rows, some columns."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self._buffers = (keys, values)
        self._rows, self._start, self._end = keys.shape[0], 0, keys.shape[2]
        self._look()

    def _look(self) -> None:
        self.keys, self.values = (buffer[: self._rows, :, self._start : self._end] for buffer in self._buffers)

    def _renew(self, rows: int, tokens: int, room: int = ROOM) -> None:
        """Place for so many rows, and so many tokens up to the last one; room behind it. Buffers that have it stay."""
        held, wanted = self._end - self._start, tokens + room
        capacity, _, length, _ = self._buffers[0].shape
        if not rows <= capacity <= 2 * rows:
            capacity = rows + rows // SPARE_ROWS
        if not wanted <= length <= 2 * wanted:
            length = wanted
        renewed = []
        for buffer in self._buffers:
            states = buffer[: self._rows, :, self._start : self._end]
            if buffer.shape[0] == capacity and buffer.shape[2] == length:
                new, states = buffer, states.clone()  # its place may overlap it
            else:
                new = buffer.new_empty(capacity, buffer.shape[1], length, buffer.shape[3])
            new[: self._rows, :, tokens - held : tokens] = states
            renewed.append(new)
        self._buffers = (renewed[0], renewed[1])
        self._start, self._end = tokens - held, tokens

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append new tokens; all keys and values."""
        more = key_states.shape[2]
        if self._end + more > self._buffers[0].shape[2]:
            self._renew(self._rows, self._end - self._start, more + ROOM)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[: self._rows, :, self._end : self._end + more] = states
        self._end += more
        self._look()
        assert self.keys is not None and self.values is not None
        return self.keys, self.values

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Keep the rows `beam_idx`, in this order."""
        assert self.keys is not None and self.values is not None
        self._buffers = (self.keys[beam_idx.to(self.keys.device)], self.values[beam_idx.to(self.values.device)])
        self._rows, self._start, self._end = self._buffers[0].shape[0], 0, self._buffers[0].shape[2]
        self._look()

    def shrink(self, moves: list[tuple[int, int]], rows: int) -> None:
        """Write row `source` over row `place` for each (source, place), and keep the first `rows`."""
        for source, place in moves:
            for buffer in self._buffers:
                buffer[place, :, self._start : self._end] = buffer[source, :, self._start : self._end]
        self._rows = rows
        self._look()

    def cut(self, tokens: int) -> None:
        """Forget the first tokens of all rows: those that are padding in every one."""
        self._start += tokens
        self._look()

    def join(self, other: "GrowingLayer") -> None:
        """Append the rows of `other`; the shorter ones of both are padded with zeros on the left."""
        assert other.keys is not None and other.values is not None
        rows, held, theirs = self._rows, self._end - self._start, other.keys.shape[2]
        longest, more = max(held, theirs), other.keys.shape[0]
        if rows + more > self._buffers[0].shape[0] or self._end < longest:
            self._renew(rows + more, longest)
        start, end = self._end - longest, self._end
        for buffer, states in zip(self._buffers, (other.keys, other.values), strict=True):
            # Zeros, not whatever is in memory: what is masked is still multiplied, by 0.
            buffer[:rows, :, start : end - held] = 0
            buffer[rows : rows + more, :, start : end - theirs] = 0
            buffer[rows : rows + more, :, end - theirs : end] = states
        self._rows, self._start = rows + more, start
        self._look()


def plain(config: Any) -> bool:
    """Whether a model of this configuration makes a cache of plain layers only, so that rows can leave and join."""
    layers = DynamicCache(config=config).layers
    return bool(layers) and all(type(layer) is DynamicLayer for layer in layers)


def growing(cache: Any) -> bool:
    """Give each plain layer of `cache`, as the model has made it, room for further tokens; whether all were plain."""
    layers = cache.layers if isinstance(cache, DynamicCache) else []
    for place, layer in enumerate(layers):
        # Exactly: a layer that holds a window or a state has rules of its own.
        if type(layer) is DynamicLayer and layer.is_initialized and layer.keys is not None and layer.values is not None:
            layers[place] = GrowingLayer(layer.keys, layer.values)
    return bool(layers) and all(isinstance(layer, GrowingLayer) for layer in layers)


def join(cache: Any, other: Any) -> None:
    """Append the rows of `other`, which is used up, to those of `cache`. Both as `growing` makes them."""
    for place, layer in enumerate(cache.layers):
        layer.join(other.layers[place])
        other.layers[place] = None  # one layer at a time is there twice


def shrink(cache: Any, moves: list[tuple[int, int]], rows: int) -> None:
    """Write rows over others, and keep the first `rows`: see `GrowingLayer.shrink`."""
    for layer in cache.layers:
        layer.shrink(moves, rows)


def cut(cache: Any, tokens: int) -> None:
    """Forget the first `tokens` of all rows."""
    for layer in cache.layers:
        layer.cut(tokens)


def token_bytes(model: Any) -> int:
    """Bytes of the keys and values of one token, as far as the configuration tells."""
    config = model.config.get_text_config()
    heads: int = getattr(config, "num_attention_heads", None) or 1
    width: int = getattr(config, "head_dim", None) or config.hidden_size // heads
    heads = getattr(config, "num_key_value_heads", None) or heads
    layers = getattr(config, "num_hidden_layers", 1)
    return int(2 * layers * heads * width * next(model.parameters()).element_size())
