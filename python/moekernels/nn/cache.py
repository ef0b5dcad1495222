"""Key/value caches. Keys and values are ``[B, kv_heads, S, head_dim]``, stored after the rotary embedding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from itertools import chain
from typing import Any, ClassVar

import torch
from torch import Tensor


class Cache(ABC):
    """What a model needs of a cache: append, and know where the next token goes.

    Attributes:
        fixed_size: `update` returns all the room there is, filled or not.
    """

    fixed_size: ClassVar[bool] = False

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
        return self._data if self.length == self._data.shape[2] else self._data[:, :, : self.length]

    def append(self, new: Tensor) -> None:
        past, length = self.length, self.length + new.shape[2]
        if torch.is_grad_enabled() and (new.requires_grad or self._data.requires_grad):
            # The backward pass needs the old values, so they must not be written over.
            self._data, self._owned = torch.cat((self.used, new), dim=2), False
        else:
            if not self._writable or length > self._data.shape[2]:
                self._grow(length)
            self._data[:, :, past:length] = new
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
        self._data, self._owned = self.used.index_select(0, rows), False

    def move(self, source: Tensor, target: Tensor, start: int) -> None:
        """From `start` on, what the rows `source` hold is written into the rows `target`."""
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
        beam_idx = beam_idx.to(first.device)
        if beam_idx.shape[0] != first.shape[0]:
            for stored in self._stored():
                stored.select(beam_idx)
            return
        # Rows that stay are not touched. Counting those that move makes the host wait once for all layers.
        target = (beam_idx != torch.arange(len(beam_idx), device=beam_idx.device)).nonzero().squeeze(1)
        if start < self.get_seq_length() and len(target):
            source = beam_idx[target]
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
        num_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        shape = (config.num_hidden_layers, max_batch_size, num_heads, max_cache_len, head_dim)
        # Zeros and not garbage: a hidden NaN times the weight 0 would still be NaN.
        self._keys = torch.zeros(shape, device=device, dtype=dtype).unbind(0)
        self._values = torch.zeros(shape, device=device, dtype=dtype).unbind(0)
        self.length = torch.zeros((), device=device, dtype=torch.int64)
        self.max_batch_size = max_batch_size
        self.max_cache_len = max_cache_len

    def update(
        self, key: Tensor, value: Tensor, layer: int, cache_position: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        keys, values = self._keys[layer], self._values[layer]
        if key.shape[0] != self.max_batch_size or key.shape[2] > self.max_cache_len or key.dtype != keys.dtype:
            raise ValueError(
                f"StaticCache: holds {keys.dtype} keys of shape {list(keys.shape)}, got {key.dtype} {list(key.shape)}"
            )
        if cache_position is None:
            # The layers of one step follow one another, and only the last one moves the position on.
            cache_position = self.next_positions(key.shape[2], key.device)
        keys.index_copy_(2, cache_position, key)
        values.index_copy_(2, cache_position, value)
        if layer == len(self._keys) - 1:
            self.length.copy_(cache_position[-1] + 1)
        return keys, values

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
