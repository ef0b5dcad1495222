"""What one call of `generate` carries from step to step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_ROOM = 1024


class DecodeState:
    """Sequences being generated, and how far the model has seen them.

    Tokens, mask and positions live in buffers that are filled in place and double when they are full, so a step copies
    nothing and what the model gets are views. Letters: B rows, n tokens, m positions (more than n where the prompt was
    given as embeddings).

    Args:
        input_ids: int64 `[B, n]`, the prompt.
        attention_mask: `[B, m]`, 0 where the model must not look; None if it may look everywhere.
        position_ids: int64 `[B, m]`, those of the prompt, from the last of which others count on; by default they
            count what is not masked.
        inputs_embeds: `[B, m, H]`, given instead of the prompt's ids or besides them; used in the first step.
        make_cache: makes an empty key-value cache; None to run without one.
        cache: a cache to go on from.
        max_length: tokens per sequence after which generation ends; a hint for the size of the buffers.
        model_kwargs: passed to the model in every step.

    Attributes:
        length: tokens per row so far, prompt included.
        cached: positions per row that the cache holds.
        target: positions per row that the next call of the model brings the cache to.
        given_position_ids: positions of the prompt, where the caller said them.
        logits_to_keep: how many of the last positions the next call is asked the logits of.
        cache: the key-value cache, or None.
    """

    def __init__(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        *,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        make_cache: Callable[[], Any] | None = None,
        cache: Any = None,
        max_length: int = 0,
        model_kwargs: dict[str, Any] | None = None,
    ) -> None:
        self.length = input_ids.shape[1]
        self.prompt_length = self.length
        self.inputs_embeds = inputs_embeds
        self.model_kwargs = model_kwargs or {}
        # Positions the model sees before the first token of `input_ids`.
        self.offset = 0 if inputs_embeds is None else inputs_embeds.shape[1] - self.length
        self.target = self.offset + self.length
        self.logits_to_keep = 1

        self.use_cache = make_cache is not None or cache is not None
        self._make_cache = make_cache
        self.cache = cache if cache is not None or make_cache is None else make_cache()
        self.cached = 0 if cache is None else int(cache.get_seq_length())

        capacity = max(self.length + 1, min(max_length, self.length + _ROOM))
        self._tokens = input_ids.new_zeros(input_ids.shape[0], capacity, dtype=torch.long)
        self._tokens[:, : self.length] = input_ids
        positions = self.offset + capacity
        self._cache_position = torch.arange(positions, device=input_ids.device)
        self._mask: Tensor | None = None
        if attention_mask is not None:
            self._mask = attention_mask.new_ones(input_ids.shape[0], positions)
            self._mask[:, : self.target] = attention_mask
        self.given_position_ids = position_ids
        self._position_ids = self._positions()

    @property
    def input_ids(self) -> Tensor:
        """int64 `[B, n]`, all tokens so far; a view."""
        return self._tokens[:, : self.length]

    @property
    def next_input_ids(self) -> Tensor:
        """int64 `[B, target - cached]`, the tokens the model has not seen."""
        return self._tokens[:, max(self.cached - self.offset, 0) : self.target - self.offset]

    @property
    def next_inputs_embeds(self) -> Tensor | None:
        """`[B, target - cached, H]` while the model is still reading embeddings, else None."""
        if self.inputs_embeds is None or self.cached >= self.inputs_embeds.shape[1]:
            return None
        return self.inputs_embeds[:, self.cached : self.target]

    @property
    def attention_mask(self) -> Tensor | None:
        """`[B, target]`, or None where nothing is masked."""
        return None if self._mask is None else self._mask[:, : self.target]

    @property
    def position_ids(self) -> Tensor:
        """int64 `[B, target - cached]`, positions not counting what is masked."""
        return self._position_ids[:, self.cached : self.target]

    @property
    def cache_position(self) -> Tensor:
        """int64 `[target - cached]`, positions in the cache."""
        return self._cache_position[self.cached : self.target]

    def seen(self, cache: Any) -> None:
        """Notes that the model has run up to `target` and returned `cache`."""
        if self.use_cache:
            self.cached = self.target
            self.cache = cache if cache is not None else self.cache

    def append(self, tokens: Tensor) -> None:
        """Adds one token `[B]` to every row, for the model to see next."""
        if self.length == self._tokens.shape[1]:
            self._grow()
        self._tokens[:, self.length] = tokens
        self.length += 1
        self.target = self.offset + self.length

    def extend(self, tokens: Tensor) -> None:
        """Adds the tokens `[B, k]` to the rows, for the model to see next."""
        end = self.length + tokens.shape[1]
        while end > self._tokens.shape[1]:
            self._grow()
        self._tokens[:, self.length : end] = tokens
        self.length = end
        self.target = self.offset + end

    def rewind(self, length: int) -> None:
        """Takes back all but the first `length` tokens of every row, but nothing from the cache."""
        self.length = length
        self.target = self.offset + length
        if self.inputs_embeds is not None:
            # Those of generated tokens, which `forget` adds.
            self.inputs_embeds = self.inputs_embeds[:, : self.target]

    def crop(self) -> None:
        """Takes from the cache what it holds of the last token of every row, and of tokens that were taken back."""
        if self.cached >= self.target:
            self.cached = self.target - 1
            self.cache.crop(self.cached)

    def follow(self, tokens: Tensor) -> None:
        """Makes the tokens `[B, n]` those of the rows, and keeps what the cache holds of the beginning they share.

        The last one is left for the model to see. The host waits for the device.
        """
        shared = min(self.length, tokens.shape[1])
        same = (self._tokens[:, :shared] == tokens[:, :shared]).all(dim=0)
        start = int(same.long().cumprod(dim=0).sum())
        self.rewind(start)
        if self.cached > self.target:
            self.cached = self.target
            self.cache.crop(self.target)
        self.extend(tokens[:, start:])
        self.crop()

    def reorder(self, rows: Tensor, start: int = 0) -> None:
        """Row `b` becomes what row `rows[b]` was; both must belong to the same prompt, whose mask they share.

        Args:
            rows: int64 `[B]`, best on the CPU: then nothing waits for the device.
            start: tokens that the two rows of every such pair have in common.
        """
        self._tokens[:, start : self.length] = self._tokens[rows, start : self.length]
        if self.cache is not None:
            self.cache.reorder(rows, self.offset + start)

    def forget(self, embed: Callable[[Tensor], Tensor] | None = None) -> None:
        """Empties the cache, so that the next call of the model reads every token again.

        Args:
            embed: gives tokens their embeddings, for a prompt that was given as such.

        Raises:
            ValueError: it was, and `embed` is None.
        """
        if not self.use_cache:
            return
        if self.inputs_embeds is not None:
            if embed is None:
                raise ValueError("the cache cannot be rebuilt: the prompt was given as embeddings")
            new = self.input_ids[:, self.inputs_embeds.shape[1] - self.offset :]
            self.inputs_embeds = torch.cat((self.inputs_embeds, embed(new)), dim=1)
        if self._make_cache is None:
            self.cache.crop(0)  # the caller's, who goes on with it
        else:
            self.cache = self._make_cache()
        self.cached = 0

    def _grow(self) -> None:
        rows, capacity = self._tokens.shape
        self._tokens = torch.cat([self._tokens, torch.zeros_like(self._tokens)], dim=1)
        self._cache_position = torch.arange(self.offset + 2 * capacity, device=self._tokens.device)
        if self._mask is not None:
            self._mask = torch.cat([self._mask, self._mask.new_ones(rows, capacity)], dim=1)
        self._position_ids = self._positions()

    def _positions(self) -> Tensor:
        """The positions `[B, capacity]` of all tokens there is room for."""
        given = self.given_position_ids
        if given is not None:
            further = torch.arange(1, len(self._cache_position) - given.shape[1] + 1, device=given.device)
            return torch.cat([given, given[:, -1:] + further], dim=1)
        if self._mask is not None:
            return position_ids_from_mask(self._mask)
        return self._cache_position.expand(self._tokens.shape[0], -1)


def position_ids_from_mask(attention_mask: Tensor) -> Tensor:
    """Positions int64 `[B, m]` that count only what the mask `[B, m]` lets through; 1 for what it does not."""
    return (attention_mask.long().cumsum(-1) - 1).masked_fill_(attention_mask == 0, 1)
