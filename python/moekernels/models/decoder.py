"""What decoders of sparse layers share: the run through the layers, cache and mask, the head, the losses.

A model brings its layers and its rotary embedding. Letters: B batch, S new tokens, H hidden size, E experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moekernels.generation import GenerationMixin
from moekernels.models.base import PreTrainedModel
from moekernels.models.losses import causal_lm_loss, load_balancing_loss
from moekernels.models.options import (
    attention_implementation,
    exactly_one,
    kept_for_logits,
    new_positions,
    optional_outputs,
    resolve_cache,
)
from moekernels.models.outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from moekernels.nn import Cache, DynamicCache, RotaryEmbedding, causal_mask
from moekernels.nn.attention import FLASH_ATTENTION


class SparseDecoder(PreTrainedModel):
    """A decoder without a head: tokens to hidden states.

    A subclass makes the four modules. A layer is called with the hidden states ``[B, S, H]``, cosines and sines, mask,
    name of the attention function, cache and cache positions, and returns hidden states, attention probabilities or
    None, and router logits ``[B * S, E]``.
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
        """
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
        rotary = self._rotary(position_ids, cache_position, hidden.dtype)

        hidden_states: tuple[Tensor, ...] = ()
        attentions: tuple[Tensor, ...] = ()
        router_logits: tuple[Tensor, ...] = ()
        for layer in self.layers:
            if wanted.hidden_states:
                hidden_states += (hidden,)
            hidden, probs, logits = self._call_layer(layer, hidden, rotary, mask, implementation, cache, cache_position)
            if wanted.attentions:
                attentions += (probs,)
            if wanted.router_logits:
                router_logits += (logits,)
        hidden = self.norm(hidden)
        if wanted.hidden_states:
            hidden_states += (hidden,)

        output = MoeModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=cache,
            hidden_states=hidden_states if wanted.hidden_states else None,
            attentions=attentions if wanted.attentions else None,
            router_logits=router_logits if wanted.router_logits else None,
        )
        return self._returned(output, return_dict)


class SparseDecoderForCausalLM(PreTrainedModel, GenerationMixin):  # type: ignore[override]
    """A decoder with a language-modelling head.

    A subclass makes `model` and `lm_head`.
    """

    model: SparseDecoder
    lm_head: nn.Linear

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoeCausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model. What is not listed here is as in :meth:`SparseDecoder.forward`.

        Args:
            labels: ``[B, S]``, the tokens themselves (they are shifted here), -100 where nothing is to be learnt.
            output_router_logits: also return the load-balancing loss, and add it to the loss.
            logits_to_keep: compute logits for that many last positions, or for the positions in a tensor; 0 is all.
            **kwargs: `num_items_in_batch` and `shift_labels` of :func:`causal_lm_loss`; others have no effect.
        """
        config = self.config
        if output_router_logits is None:
            output_router_logits = config.output_router_logits
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            output_router_logits=output_router_logits,
            return_dict=True,
            cache_position=cache_position,
        )
        logits = self.lm_head(kept_for_logits(outputs.last_hidden_state, logits_to_keep))

        loss = aux_loss = None
        shift_labels = kwargs.get("shift_labels")
        if labels is not None or shift_labels is not None:
            loss = causal_lm_loss(
                logits, labels, num_items_in_batch=kwargs.get("num_items_in_batch"), shift_labels=shift_labels
            )
        if output_router_logits:
            aux_loss = load_balancing_loss(outputs.router_logits, config.num_experts_per_tok, attention_mask)
            if loss is not None:
                loss = loss + config.router_aux_loss_coef * aux_loss.to(loss.device)

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
