"""Key/value caches. Keys and values are ``[B, kv_heads, S, head_dim]``, stored after the rotary embedding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain
from typing import Any

import torch
from torch import Tensor


class Cache(ABC):
    """What a model needs of a cache: append, and know where the next token goes.

    Attributes:
        fixed_size: `update` returns all the room there is, filled or not.
    """

    fixed_size: bool = False

    @abstractmethod
    def update(
        self, key: Tensor, value: Tensor, layer: int, cache_position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens ``[B, kv_heads, S, head_dim]`` to `layer` and return all there are.

        `cache_position` ``[S]`` says where they belong; only caches of fixed size look at it.
        """

    @abstractmethod
    def get_seq_length(self) -> int:
        """Tokens stored so far."""

    @abstractmethod
    def key_length(self, num_new_tokens: int) -> int:
        """Length of the keys that `update` will return for that many new tokens."""

    @abstractmethod
    def next_positions(self, num_new_tokens: int, device: torch.device) -> Tensor:
        """The positions ``[num_new_tokens]`` of the next tokens, without a host synchronisation."""

    @abstractmethod
    def reorder(self, beam_idx: Tensor, start: int = 0) -> None:
        """Row ``b`` of the batch becomes what row ``beam_idx[b]`` was.

        Args:
            start: before this position every row already holds what it is to hold, and nothing is copied.
        """

    @abstractmethod
    def crop(self, length: int) -> None:
        """Keep the first `length` tokens; a negative `length` removes that many from the end."""


class _GrowingTensor:
    """``[B, heads, S, head_dim]`` that grows along S; writes in place only into memory of its own."""

    _SPARE = 64  # least room, in tokens, that growing makes

    def __init__(self, first: Tensor) -> None:
        self._data = first
        self._owned = False
        self.length = first.shape[2]

    @property
    def used(self) -> Tensor:
        return self._data if self.length == self._data.shape[2] else self._data.narrow(2, 0, self.length)

    def append(self, new: Tensor) -> None:
        past, length = self.length, self.length + new.shape[2]
        if torch.is_grad_enabled() and (new.requires_grad or self._data.requires_grad):
            # The backward pass needs the old values, so they must not be written over.
            self._data, self._owned = torch.cat((self.used, new), dim=2), False
        else:
            if not self._writable or length > self._data.shape[2]:
                self._grow(length)
            self._data.narrow(2, past, length - past).copy_(new)
        self.length = length

    @property
    def _writable(self) -> bool:
        return self._owned and (not self._data.is_inference() or torch.is_inference_mode_enabled())

    def _grow(self, length: int) -> None:
        """Moves to memory of its own with room for more than `length` tokens."""
        batch_size, num_heads, _, head_dim = self._data.shape
        room = max(length + self._SPARE, length * 3 // 2)
        grown = self._data.new_empty(batch_size, num_heads, room, head_dim)
        grown[:, :, : self.length] = self.used
        self._data, self._owned = grown, True

    def select(self, rows: Tensor) -> None:
        """The given rows take the place of all."""
        self._data, self._owned = self.used.index_select(0, rows.to(self._data.device)), False

    def move(self, source: Tensor, target: Tensor, start: int) -> None:
        """From `start` on, what the rows `source` hold is written into the rows `target`."""
        source, target = source.to(self._data.device), target.to(self._data.device)
        if torch.is_grad_enabled() and self._data.requires_grad:
            rows = torch.arange(self._data.shape[0], device=source.device)
            return self.select(rows.index_copy(0, target, source))
        if not self._writable:
            self._grow(self.length)
        moved = self._data[:, :, start : self.length]
        moved.index_copy_(0, target, moved.index_select(0, source))


class DynamicCache(Cache):
    """A cache that grows as tokens come.

    The first keys and values are kept as they are, without a copy. Later ones are written into buffers that grow by
    half when they are full, so n tokens cost O(n) copies.
    """

    def __init__(self) -> None:
        self._layers: list[tuple[_GrowingTensor, _GrowingTensor]] = []

    def update(
        self, key: Tensor, value: Tensor, layer: int, cache_position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if layer == len(self._layers):
            self._layers.append((_GrowingTensor(key), _GrowingTensor(value)))
        elif layer < len(self._layers):
            keys, values = self._layers[layer]
            keys.append(key)
            values.append(value)
        else:
            raise ValueError(f"DynamicCache: layers must come in order, got {layer}, expected {len(self._layers)}")
        return self[layer]

    def get_seq_length(self) -> int:
        return self._layers[0][0].length if self._layers else 0

    def key_length(self, num_new_tokens: int) -> int:
        return self.get_seq_length() + num_new_tokens

    def next_positions(self, num_new_tokens: int, device: torch.device) -> Tensor:
        past = self.get_seq_length()
        return torch.arange(past, past + num_new_tokens, device=device)

    def reorder(self, beam_idx: Tensor, start: int = 0) -> None:
        if not self._layers:
            return
        first = self._layers[0][0].used
        if beam_idx.shape[0] != first.shape[0]:
            for stored in self._stored():
                stored.select(beam_idx)
            return
        # Rows that stay are not touched. The host must know which: give it the indices, and it need not wait for them.
        target = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero().squeeze(1)
        if start < self.get_seq_length() and len(target):
            source, target = beam_idx[target].to(first.device), target.to(first.device)
            for stored in self._stored():
                stored.move(source, target, start)

    def _stored(self) -> Iterator[_GrowingTensor]:
        return chain.from_iterable(self._layers)

    def crop(self, length: int) -> None:
        keep = length if length >= 0 else max(self.get_seq_length() + length, 0)
        for keys, values in self._layers:
            keys.length = values.length = min(keep, keys.length)

    def __len__(self) -> int:
        """Number of layers stored."""
        return len(self._layers)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of one layer."""
        keys, values = self._layers[layer]
        return keys.used, values.used


class EncoderDecoderCache(Cache):
    """The cache of a decoder with cross attention: what it attends to of itself, and of the encoder.

    Everything that a :class:`Cache` does concerns the decoder's own tokens; keys and values of the encoder's output are
    stored once, at the first call, and stay. The cross cache may hold one row per source where the decoder has n rows
    of it next to one another (beams, or several samples): all of them attend to that row.

    Args:
        self_cache: of the decoder's tokens; a new :class:`DynamicCache` by default.
        cross_cache: of the encoder's output; empty by default.

    Attributes:
        self_attention_cache, cross_attention_cache: the two.
    """

    def __init__(self, self_cache: Cache | None = None, cross_cache: DynamicCache | None = None) -> None:
        for name, cache in (("self_cache", self_cache), ("cross_cache", cross_cache)):
            if cache is not None and (not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache)):
                raise ValueError(f"EncoderDecoderCache: {name} must be a cache or None, got {type(cache).__name__}")
        self.self_attention_cache: Cache = DynamicCache() if self_cache is None else self_cache
        self.cross_attention_cache = DynamicCache() if cross_cache is None else cross_cache
        self.fixed_size = self.self_attention_cache.fixed_size

    def update(
        self, key: Tensor, value: Tensor, layer: int, cache_position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.self_attention_cache.update(key, value, layer, cache_position)

    def cross(self, layer: int) -> tuple[Tensor, Tensor] | None:
        """Keys and values of the encoder's output in that layer; None if they are still to be stored."""
        return self.cross_attention_cache[layer] if layer < len(self.cross_attention_cache) else None

    def store_cross(self, key: Tensor, value: Tensor, layer: int) -> None:
        """Keep keys and values ``[B, kv_heads, source length, head_dim]`` of the encoder's output, without a copy."""
        self.cross_attention_cache.update(key, value, layer)

    def get_seq_length(self) -> int:
        return self.self_attention_cache.get_seq_length()

    def key_length(self, num_new_tokens: int) -> int:
        return self.self_attention_cache.key_length(num_new_tokens)

    def next_positions(self, num_new_tokens: int, device: torch.device) -> Tensor:
        return self.self_attention_cache.next_positions(num_new_tokens, device)

    def reorder(self, beam_idx: Tensor, start: int = 0) -> None:
        """Row ``b`` of the batch becomes what row ``beam_idx[b]`` was.

        Args:
            start: before this position of the decoder every row already holds what it is to hold.

        Raises:
            ValueError: the cross cache holds one row per source, and rows of different sources would meet in one.
        """
        if len(self.cross_attention_cache):
            num_sources = self.cross_attention_cache[0][0].shape[0]
            num_rows = self._num_rows() or num_sources
            sources = self._sources(beam_idx, num_rows // num_sources)
            self.cross_attention_cache.reorder(sources)
        self.self_attention_cache.reorder(beam_idx, start)

    def _num_rows(self) -> int | None:
        """Rows of the decoder's batch, once there is a token."""
        cache: Any = self.self_attention_cache
        return cache[0][0].shape[0] if len(cache) else None

    @staticmethod
    def _sources(beam_idx: Tensor, rows_per_source: int) -> Tensor:
        """The row of the cross cache that every group of rows attends to."""
        if rows_per_source == 1:
            return beam_idx
        if beam_idx.shape[0] % rows_per_source == 0:
            groups = (beam_idx // rows_per_source).view(-1, rows_per_source)
            if bool((groups == groups[:, :1]).all()):
                return groups[:, 0]
        raise ValueError(
            f"EncoderDecoderCache.reorder: every {rows_per_source} rows share one source, which {beam_idx.tolist()} "
            "would tear apart"
        )

    def crop(self, length: int) -> None:
        self.self_attention_cache.crop(length)

    def __len__(self) -> int:
        """Number of layers stored."""
        cache: Any = self.self_attention_cache
        return len(cache)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """Keys and values of the decoder's tokens in one layer."""
        cache: Any = self.self_attention_cache
        return cache[layer]


def _first(config: Any, *names: str) -> Any:
    """The first of these fields that is there and set."""
    return next((value for name in names if (value := getattr(config, name, None)) is not None), None)


class StaticCache(Cache):
    """A cache of fixed size, allocated at once, whose write position lives on the device.

    Shapes and addresses never change, so a decoding step can be captured in a CUDA graph. `update` returns the whole
    buffers; the attention mask hides what is not filled yet.

    Args:
        config: a model configuration (layers, key/value heads and head size are read from it).
        max_batch_size: rows of the batch; every batch must have exactly as many.
        max_cache_len: tokens there is room for.
        device, dtype: of the buffers; the dtype must be that of the model.
    """

    fixed_size = True

    def __init__(
        self,
        config: Any,
        max_batch_size: int,
        max_cache_len: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        # An encoder-decoder's cache is the decoder's; its configurations spell these in several ways.
        num_layers = _first(config, "decoder_layers", "num_decoder_layers", "num_hidden_layers")
        query_heads = _first(config, "decoder_attention_heads", "num_attention_heads")
        num_heads = _first(config, "num_key_value_heads") or query_heads
        head_dim = _first(config, "head_dim", "d_kv") or config.hidden_size // query_heads
        shape = (num_layers, max_batch_size, num_heads, max_cache_len, head_dim)
        # Zeros and not garbage: a hidden NaN times the weight 0 would still be NaN.
        self._keys = list(torch.zeros(shape, device=device, dtype=dtype).unbind(0))
        self._values = list(torch.zeros(shape, device=device, dtype=dtype).unbind(0))
        self.length = torch.zeros((), device=device, dtype=torch.int64)
        self.max_batch_size = max_batch_size
        self.max_cache_len = max_cache_len

    def update(
        self, key: Tensor, value: Tensor, layer: int, cache_position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        if self._keys[layer].device != key.device:
            # The model is split over devices: buffers go to where their layer is.
            self._keys[layer], self._values[layer] = (b[layer].to(key.device) for b in (self._keys, self._values))
        keys, values = self._keys[layer], self._values[layer]
        if key.shape[0] != self.max_batch_size or key.shape[2] > self.max_cache_len or key.dtype != keys.dtype:
            raise ValueError(
                f"StaticCache: holds {keys.dtype} keys of shape {list(keys.shape)}, got {key.dtype} {list(key.shape)}"
            )
        if layer == 0 and type(cache_position) is Tensor and cache_position.is_cpu:  # fake tensors have no values
            self._check_room(cache_position)
        if cache_position is None:
            # The layers of one step follow one another, and only the last one moves the position on.
            cache_position = self.next_positions(key.shape[2], key.device)
        keys.index_copy_(2, cache_position, key)
        values.index_copy_(2, cache_position, value)
        if layer == len(self._keys) - 1:
            self.length.copy_(cache_position[-1] + 1)
        return keys, values

    def _check_room(self, cache_position: Tensor) -> None:
        if not torch.compiler.is_compiling() and len(cache_position) and int(cache_position[-1]) >= self.max_cache_len:
            raise ValueError(
                f"StaticCache: has room for {self.max_cache_len} positions, got one for position "
                f"{int(cache_position[-1])}"
            )

    def get_seq_length(self) -> int:
        """Tokens stored so far. Waits for the device: a decoding loop keeps its own count or `next_positions`."""
        return int(self.length)

    def key_length(self, num_new_tokens: int) -> int:
        return self.max_cache_len

    def next_positions(self, num_new_tokens: int, device: torch.device) -> Tensor:
        return torch.arange(num_new_tokens, device=device) + self.length

    def reorder(self, beam_idx: Tensor, start: int = 0) -> None:
        for buffer in (*self._keys, *self._values):
            changed = buffer[:, :, start:]
            changed.copy_(changed.index_select(0, beam_idx.to(buffer.device)))

    def crop(self, length: int) -> None:
        if length >= 0:
            self.length.clamp_(max=length)
        else:
            self.length.add_(length).clamp_(min=0)

    def reset(self) -> None:
        """Forget all tokens and keep the buffers."""
        self.length.zero_()

    def __len__(self) -> int:
        """Number of layers."""
        return len(self._keys)

    def __getitem__(self, layer: int) -> tuple[Tensor, Tensor]:
        """The whole buffers of one layer."""
        return self._keys[layer], self._values[layer]
