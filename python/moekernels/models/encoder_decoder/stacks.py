"""Encoder and decoder: masks, caches and the run through the layers.

Letters: B batch, S source tokens, T new target tokens, H hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Collection
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from moekernels.models.base import PreTrainedModel
from moekernels.models.context import LayerContext, LayerOutput, Recorder
from moekernels.models.options import (
    attention_implementation,
    exactly_one,
    new_positions,
    optional_outputs,
    refuse_unknown,
    resolve_cache,
)
from moekernels.models.outputs import MoEModelOutput, MoEModelOutputWithPastAndCrossAttentions, Seq2SeqMoEModelOutput
from moekernels.nn import AttentionMask, EncoderDecoderCache, causal_mask, padding_mask
from moekernels.nn.attention import FLASH_ATTENTION

_STACKS = ("encoder", "decoder")


class EncoderDecoderPreTrainedModel(PreTrainedModel):
    """The stacks, and the embedding that they share."""

    #: What encoder and decoder without a head return.
    headless_output_class: ClassVar[Any] = Seq2SeqMoEModelOutput

    def get_input_embeddings(self) -> nn.Embedding:
        embeddings: nn.Embedding = self.base_model.shared
        return embeddings

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        # Encoder and decoder hold the same module, unless a checkpoint has one for each.
        for embeddings in self._embeddings():
            embeddings.weight = value.weight
            embeddings.num_embeddings, embeddings.padding_idx = value.num_embeddings, value.padding_idx

    def _embeddings(self) -> list[nn.Embedding]:
        model = self.base_model
        stacks = [stack for name in _STACKS if (stack := getattr(model, name, None)) is not None]
        return list(dict.fromkeys([self.get_input_embeddings(), *(stack.embed_tokens for stack in stacks)]))

    def _fit(self, names: Collection[str]) -> bool:
        # Those that transformers 5 saves where weights are not tied; version 4 shares one all the same.
        untied = [
            stack for stack in _STACKS if f"{stack}.embed_tokens.weight" in names and hasattr(self.base_model, stack)
        ]
        if self.config.tie_word_embeddings or "shared.weight" not in names or not untied:
            return False
        for stack in untied:
            getattr(self.base_model, stack).embed_tokens = copy.deepcopy(self.get_input_embeddings())
        return True

    def get_encoder(self) -> EncoderStack:
        encoder: EncoderStack = self.base_model.encoder
        return encoder

    def get_decoder(self) -> DecoderStack:
        decoder: DecoderStack = self.base_model.decoder
        return decoder

    def _shift_right(self, input_ids: Tensor) -> Tensor:
        """:func:`shift_tokens_right` with the configuration's tokens."""
        return shift_tokens_right(input_ids, self.config.pad_token_id, self.config.decoder_start_token_id)


class EncoderDecoderStack(EncoderDecoderPreTrainedModel):
    """What encoder and decoder have in common. A subclass has the layers, the embedding and the last norm."""

    #: Whether the first layer returns a bias that all layers add to their scores.
    has_position_bias: ClassVar[bool] = False

    embed_tokens: nn.Embedding
    num_heads: int
    #: Probability of leaving a layer out in training.
    layerdrop: float = 0.0

    @property
    def _layers(self) -> nn.ModuleList:
        raise NotImplementedError

    def _embed(
        self, input_ids: Tensor | None, inputs_embeds: Tensor | None, past: Tensor | int, num_positions: int
    ) -> Tensor:
        """Tokens, or their embeddings, as they enter the first layer: ``[B, T, H]``.

        Args:
            past: tokens before these, a number or ``[B, 1]``.
            num_positions: of positions, with what came before, there are at most so many.
        """
        raise NotImplementedError

    def _finish(self, hidden: Tensor) -> Tensor:
        """The output of the last layer ``[B, T, H]``, normalised."""
        raise NotImplementedError

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embed_tokens

    @property
    def _drops_layers(self) -> bool:
        return self.training and self.layerdrop > 0

    def _is_dropped(self, hidden: Tensor) -> bool | Tensor:
        """Whether to leave out the next layer in training (arXiv 1909.11556).

        A graph that is traced has one shape: it runs every layer, and a bool tensor decides on the device of `hidden`
        whether the result is used.
        """
        if torch.compiler.is_compiling():
            return torch.rand([], device=hidden.device) < self.layerdrop
        return bool(torch.rand([], device="cpu") < self.layerdrop)

    def _head_mask(self, name: str, head_mask: Tensor | None) -> Tensor | None:
        """``[layers, heads]`` of itself, or of ``[heads]`` for all layers."""
        num_layers, num_heads = len(self._layers), self.num_heads
        if head_mask is None:
            return None
        if head_mask.shape not in ((num_heads,), (num_layers, num_heads)):
            raise ValueError(
                f"{name} must be [{num_layers}, {num_heads}] (layers, heads) or [{num_heads}], got "
                f"{list(head_mask.shape)}"
            )
        return head_mask.expand(num_layers, num_heads)

    def _run(self, hidden: Tensor, context: LayerContext, record: Recorder) -> Tensor:
        """Embedded tokens ``[B, T, H]`` through all layers and the last norm."""
        # Layers that are left out would leave gaps in a cache.
        drops_layers = context.cache is None and self._drops_layers
        for layer in self._checkpointed(self._layers):
            is_dropped = self._is_dropped(hidden) if drops_layers else False
            if is_dropped is True:
                record.passed(hidden)
                continue
            output = layer(hidden, context)
            if self.has_position_bias and (bias := LayerOutput(*output).position_bias) is not None:
                context = context._replace(mask=AttentionMask(bias))
            hidden = _unless(is_dropped, record(hidden, output), hidden)
        return self._finish(hidden)


class EncoderStack(EncoderDecoderStack):
    """Source tokens to hidden states.

    A layer maps hidden states ``[B, S, H]`` and a :class:`LayerContext` to a :class:`LayerOutput`.
    """

    output_class: ClassVar[Any] = MoEModelOutput

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the encoder; the arguments are those of :meth:`EncoderDecoderModel.forward`."""
        refuse_unknown(self, kwargs)
        config = self.config
        wanted = optional_outputs(config, output_attentions, output_hidden_states, output_router_logits)
        batch_size, num_tokens = exactly_one(input_ids=input_ids, inputs_embeds=inputs_embeds).shape[:2]
        head_mask = self._head_mask("head_mask", head_mask)
        _check_source_mask(attention_mask, num_tokens, (1, batch_size))

        hidden = self._embed(input_ids, inputs_embeds, 0, num_tokens)
        implementation = attention_implementation(config, wanted.attentions)
        mask = padding_mask(attention_mask, hidden.dtype, deferred=implementation == FLASH_ATTENTION)
        record = Recorder(wanted)
        context = LayerContext(implementation, mask, _visible_keys(attention_mask), head_mask=head_mask)
        hidden = self._run(hidden, context, record)
        return self._returned(self.output_class(**record.fields(hidden)), return_dict)


class DecoderStack(EncoderDecoderStack):
    """Target tokens and the encoder's output to hidden states.

    A layer maps hidden states ``[B, T, H]`` and a :class:`LayerContext` to a :class:`LayerOutput`.
    """

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run the decoder; the arguments are those of :meth:`EncoderDecoderModel.forward`, without "decoder"."""
        refuse_unknown(self, kwargs)
        config = self.config
        wanted = optional_outputs(config, output_attentions, output_hidden_states, output_router_logits)
        given = exactly_one(
            neither="neither (and no labels)", decoder_input_ids=input_ids, decoder_inputs_embeds=inputs_embeds
        )
        batch_size, num_tokens = given.shape[:2]
        head_mask = self._head_mask("decoder_head_mask", head_mask)
        cross_attn_head_mask = self._head_mask("cross_attn_head_mask", cross_attn_head_mask)
        source = _checked_source(encoder_hidden_states, batch_size, config.d_model, past_key_values)
        _check_source_mask(encoder_attention_mask, source.shape[1], (1, source.shape[0], batch_size))
        cache = resolve_cache(
            past_key_values,
            # Layers that are left out would leave gaps in it.
            False if self._drops_layers else use_cache,
            config,
            kind=EncoderDecoderCache,
            make=EncoderDecoderCache,
            checkpointed=self._is_checkpointed,
        )
        if cache_position is None:
            cache_position = new_positions(cache, num_tokens, given.device)
        implementation = attention_implementation(config, wanted.attentions)
        deferred = implementation == FLASH_ATTENTION
        visible = _visible_keys(attention_mask)
        past: Tensor | int = 0
        if cache is not None:
            past = cache_position[0]
            if visible is not None and inputs_embeds is None:
                # Padding before these tokens has no position either.
                before = torch.arange(visible.shape[-1], device=visible.device) < past
                past = past - (before & ~visible).sum(dim=-1, keepdim=True)
        num_keys = num_tokens if cache is None else cache.key_length(num_tokens)
        hidden = self._embed(input_ids, inputs_embeds, past, num_keys)
        mask = causal_mask(
            attention_mask,
            None if cache is None else cache.self_attention_cache,
            cache_position,
            batch_size,
            hidden.dtype,
            explicit=implementation == "eager" or self.has_position_bias,
            deferred=deferred,
        )
        visible_source = _visible_keys(encoder_attention_mask)
        if visible_source is not None and visible_source.shape[0] > source.shape[0]:
            visible_source = visible_source[:: visible_source.shape[0] // source.shape[0]]
        context = LayerContext(
            implementation,
            mask,
            None if visible is None else visible[:, cache_position],
            cache=cache,
            cache_position=cache_position,
            source=source,
            cross_mask=padding_mask(visible_source, hidden.dtype, deferred=deferred),
            head_mask=head_mask,
            cross_head_mask=cross_attn_head_mask,
        )
        record = Recorder(wanted, has_cross_attention=True)
        hidden = self._run(hidden, context, record)
        output = MoEModelOutputWithPastAndCrossAttentions(past_key_values=cache, **record.fields(hidden))
        return self._returned(output, return_dict)


def _unless(is_dropped: bool | Tensor, result: Tensor, hidden: Tensor) -> Tensor:
    """The result of a layer that was run, or what went into it if a tensor says so."""
    return torch.where(is_dropped, hidden, result) if isinstance(is_dropped, Tensor) else result


def _check_source_mask(attention_mask: Tensor | None, num_tokens: int, batch_sizes: tuple[int, ...]) -> None:
    if attention_mask is None:
        return
    shape = attention_mask.shape
    if len(shape) not in (2, 4) or shape[-1] != num_tokens or shape[0] not in batch_sizes:
        raise ValueError(
            f"attention_mask must be [{batch_sizes[-1]}, {num_tokens}], 0 at padding of the source, got {list(shape)}"
        )


def _checked_source(
    source: Tensor | None, batch_size: int, hidden_size: int, cache: EncoderDecoderCache | None
) -> Tensor:
    if not isinstance(source, Tensor) or source.dim() != 3 or source.shape[-1] != hidden_size:
        got = f"{list(source.shape)}" if isinstance(source, Tensor) else type(source).__name__
        raise ValueError(f"encoder_outputs must begin with a tensor [batch, length, {hidden_size}], got {got}")
    # Without rows there is nothing to do, as on a rank that has none of a batch.
    if batch_size % source.shape[0] if source.shape[0] else batch_size:
        raise ValueError(
            f"encoder_outputs has {source.shape[0]} rows, which must be as many as the decoder's {batch_size}, or a "
            "divisor of that"
        )
    stored = cache.cross(0) if isinstance(cache, EncoderDecoderCache) else None
    if stored is not None and (stored[0].shape[0], stored[0].shape[2]) != source.shape[:2]:
        raise ValueError(
            f"past_key_values belongs to other encoder_outputs: it has {stored[0].shape[0]} rows of "
            f"{stored[0].shape[2]} source tokens, got {source.shape[0]} of {source.shape[1]}"
        )
    return source


def _visible_keys(attention_mask: Tensor | None) -> Tensor | None:
    """Which keys the last query sees, bool ``[B, keys]``: those that are not padding."""
    if attention_mask is None or attention_mask.dim() != 4:
        return None if attention_mask is None else attention_mask.bool()
    last = attention_mask[:, 0, -1]
    return last if last.dtype == torch.bool else last == 0


def shift_tokens_right(input_ids: Tensor, pad_token_id: int | None, decoder_start_token_id: int | None) -> Tensor:
    """The decoder's input for labels ``[B, T]``: the start token, then all labels but the last, -100 as padding."""
    if pad_token_id is None or decoder_start_token_id is None:
        raise ValueError(
            "labels can be shifted only if the configuration has pad_token_id and decoder_start_token_id, "
            f"got {pad_token_id} and {decoder_start_token_id}"
        )
    start = input_ids.new_full((input_ids.shape[0], 1), decoder_start_token_id)
    shifted = torch.cat((start, input_ids[:, :-1]), dim=1)
    return shifted.masked_fill(shifted == -100, pad_token_id)
