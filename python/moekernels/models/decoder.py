"""What decoders of sparse layers share: the run through the layers, cache and mask, the head, the losses.

A model brings its layers and its rotary embedding. Letters: B batch, S new tokens, H hidden size, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moekernels.generation import GenerationMixin
from moekernels.models.arguments import with_arguments_of
from moekernels.models.base import PreTrainedModel
from moekernels.models.context import LayerContext, Recorder
from moekernels.models.losses import causal_lm_loss, load_balancing_loss, share_of_batch
from moekernels.models.options import (
    attention_implementation,
    exactly_one,
    kept_for_logits,
    new_positions,
    optional_outputs,
    refuse_unknown,
    resolve_cache,
)
from moekernels.models.outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from moekernels.nn import Cache, DynamicCache, RotaryEmbedding, causal_mask
from moekernels.nn.attention import FLASH_ATTENTION
from moekernels.nn.linear import project


class SparseDecoder(PreTrainedModel):
    """A decoder without a head: tokens to hidden states.

    A subclass makes the four modules. A layer maps hidden states ``[B, S, H]`` and a :class:`LayerContext` to a
    :class:`LayerOutput`.
    """

    embed_tokens: nn.Embedding
    layers: nn.ModuleList
    norm: nn.Module
    rotary_emb: RotaryEmbedding

    @property
    def _sliding_window(self) -> int | None:
        """How many keys a query sees at most; None for all before it."""
        return None

    def _rotary(self, position_ids: Tensor, cache_position: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Cosines and sines for all layers."""
        return self.rotary_emb(position_ids, dtype)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast | tuple[Any, ...]:
        """Run the decoder. Options that are None are taken from the configuration.

        Args:
            input_ids: int64 ``[B, S]``, the new tokens; those in the cache are not given again.
            attention_mask: ``[B, past + S]``, 0 at padding on either side; or ``[B, 1, S, keys]``, additive or boolean.
            position_ids: ``[B, S]``; by default `cache_position`, padding or not.
            past_key_values: a cache with the tokens before; it is filled further.
            inputs_embeds: ``[B, S, H]`` instead of `input_ids`.
            use_cache: make a cache if none is given (not with gradient checkpointing), and return it.
            output_attentions: return attention probabilities (by the eager implementation, in this call).
            output_hidden_states: return the hidden states between layers.
            output_router_logits: return the router's logits.
            return_dict: False returns a tuple of the fields that are there.
            cache_position: ``[S]``, the places of the new tokens in the cache.

        Raises:
            ValueError: not exactly one of `input_ids` and `inputs_embeds` is given, `past_key_values` is no cache, or
                `attention_mask` does not fit.
            TypeError: there is no such keyword (`token_type_ids` is passed over).
        """
        refuse_unknown(self, kwargs)
        config = self.config
        wanted = optional_outputs(config, output_attentions, output_hidden_states, output_router_logits)
        batch_size, num_tokens = exactly_one(input_ids=input_ids, inputs_embeds=inputs_embeds).shape[:2]
        cache = resolve_cache(
            past_key_values, use_cache, config, kind=Cache, make=DynamicCache, checkpointed=self._is_checkpointed
        )

        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if cache_position is None:
            cache_position = new_positions(cache, num_tokens, hidden.device)
        if position_ids is None:
            position_ids = cache_position[None]
        implementation = attention_implementation(config, wanted.attentions)
        mask = causal_mask(
            attention_mask,
            cache,
            cache_position,
            batch_size,
            hidden.dtype,
            sliding_window=self._sliding_window,
            explicit=implementation == "eager",
            deferred=implementation == FLASH_ATTENTION,
        )
        context = LayerContext(
            implementation,
            mask,
            rotary=self._rotary(position_ids, cache_position, hidden.dtype),
            cache=cache,
            cache_position=cache_position,
        )
        record = Recorder(wanted)
        for layer in self._checkpointed(self.layers):
            hidden = record(hidden, layer(hidden, context))
        output = MoeModelOutputWithPast(past_key_values=cache, **record.fields(self.norm(hidden)))
        return self._returned(output, return_dict)


class SparseDecoderForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[override]
    """A decoder with a language-modelling head.

    A subclass makes `model` and `lm_head`.
    """

    model: SparseDecoder
    lm_head: nn.Linear

    @with_arguments_of(SparseDecoder.forward, labels="use_cache")
    def forward(
        self,
        *,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        shift_labels: Tensor | None = None,
        **inputs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model. What is not listed here is as in :meth:`SparseDecoder.forward`.

        Args:
            labels: ``[B, S]``, the tokens themselves (they are shifted here), -100 where nothing is to be learnt.
            output_router_logits: also return the load-balancing loss, and add it to the loss.
            logits_to_keep: compute logits for that many last positions, or for the positions in a tensor; 0 is all.
            num_items_in_batch: labels in all parts of a batch whose gradients are accumulated: the loss is divided by
                it, and the load-balancing loss counts for the share of the labels that are here.
            shift_labels: ``[B, S]``, labels that are already one ahead, instead of `labels`.
        """
        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        outputs = self.model(
            attention_mask=attention_mask, output_router_logits=output_router_logits, return_dict=True, **inputs
        )
        logits = project(self.lm_head, kept_for_logits(outputs.last_hidden_state, logits_to_keep))

        loss = aux_loss = None
        if labels is not None or shift_labels is not None:
            loss = causal_lm_loss(logits, labels, num_items_in_batch=num_items_in_batch, shift_labels=shift_labels)
        if output_router_logits:
            aux_loss = load_balancing_loss(
                outputs.router_logits, config.num_experts_per_tok, attention_mask, self.batch
            )
            if loss is not None:
                share = share_of_batch(labels if shift_labels is None else shift_labels, num_items_in_batch)
                loss = loss + config.router_aux_loss_coef * share * aux_loss.to(loss.device)

        output = MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=aux_loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            router_logits=outputs.router_logits,
        )
        return self._returned(output, return_dict)
