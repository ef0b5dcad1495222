"""Encoder and decoder together, and with a language-modelling head.

Letters: B batch, S source tokens, T new target tokens, H hidden size.
"""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from moekernels.generation import GenerationMixin
from moekernels.models.arguments import with_arguments_of
from moekernels.models.encoder_decoder.stacks import DecoderStack, EncoderDecoderPreTrainedModel, EncoderStack
from moekernels.models.losses import check_classes, seq2seq_lm_loss, share_of_batch
from moekernels.models.options import kept_for_logits, refuse_unknown
from moekernels.models.outputs import ModelOutput, MoEModelOutput, Seq2SeqMoEOutput
from moekernels.nn import EncoderDecoderCache
from moekernels.nn.linear import project


class EncoderDecoderModel(EncoderDecoderPreTrainedModel):
    """Encoder and decoder without a head: tokens to hidden states."""

    encoder: EncoderStack
    decoder: DecoderStack

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        head_mask: Tensor | None = None,
        decoder_head_mask: Tensor | None = None,
        cross_attn_head_mask: Tensor | None = None,
        encoder_outputs: ModelOutput | tuple[Any, ...] | None = None,
        past_key_values: EncoderDecoderCache | None = None,
        inputs_embeds: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Run encoder and decoder. Options that are None are taken from the configuration.

        Args:
            input_ids: int64 ``[B, S]``, the source.
            attention_mask: ``[B, S]``, 0 at padding of the source; or ``[B, 1, S, S]``, additive or boolean.
            decoder_input_ids: int64 ``[B, T]``, the new target tokens; those in the cache are not given again.
            decoder_attention_mask: ``[B, past + T]``, 0 at padding; or ``[B, 1, T, keys]``. It is not inferred.
            head_mask: ``[layers, heads]`` or ``[heads]``, a factor for every head of the encoder, 0 to silence it.
            decoder_head_mask, cross_attn_head_mask: the same for the two attentions of the decoder.
            encoder_outputs: what the encoder has returned, instead of running it. Its batch may divide B: every source
                then serves as many consecutive target rows.
            past_key_values: a cache with the target tokens before; it is filled further.
            inputs_embeds: ``[B, S, H]`` instead of `input_ids`, already scaled.
            decoder_inputs_embeds: ``[B, T, H]`` instead of `decoder_input_ids`.
            use_cache: make a cache if none is given, and return it; none is made while layers may be left out in
                training, nor with gradient checkpointing.
            output_attentions: return attention probabilities (by the eager implementation, in this call).
            output_hidden_states: return the hidden states between layers.
            output_router_logits: return the logits of the routers, if there are any.
            return_dict: False returns a tuple of the fields that are there.
            cache_position: ``[T]``, the places of the new tokens in the cache.

        Raises:
            ValueError: tokens are missing or given twice, or masks, cache and encoder outputs do not fit together.
            TypeError: there is no such keyword.
        """
        refuse_unknown(self, kwargs)
        options: dict[str, Any] = {
            "output_attentions": output_attentions,
            "output_hidden_states": output_hidden_states,
            "output_router_logits": output_router_logits,
            "return_dict": True,
        }
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, head_mask, inputs_embeds, **options)
        source = as_encoder_output(encoder_outputs)
        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            source.last_hidden_state,
            attention_mask,
            decoder_head_mask,
            cross_attn_head_mask,
            past_key_values,
            decoder_inputs_embeds,
            use_cache,
            cache_position=cache_position,
            **options,
        )
        routers = {}
        if decoded.router_logits or source.router_logits:
            routers = {
                "decoder_router_logits": decoded.router_logits,
                "encoder_router_logits": source.router_logits,
            }
        output = self.headless_output_class(
            last_hidden_state=decoded.last_hidden_state,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            decoder_attentions=decoded.attentions,
            cross_attentions=decoded.cross_attentions,
            encoder_last_hidden_state=source.last_hidden_state,
            encoder_hidden_states=source.hidden_states,
            encoder_attentions=source.attentions,
            **routers,
        )
        return self._returned(output, return_dict)


class EncoderDecoderForConditionalGeneration(EncoderDecoderPreTrainedModel, GenerationMixin):  # type: ignore[override]
    """Encoder and decoder with a language-modelling head."""

    output_class: ClassVar[Any] = Seq2SeqMoEOutput

    lm_head: nn.Linear

    @with_arguments_of(EncoderDecoderModel.forward, labels="use_cache")
    def forward(
        self,
        *,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        decoder_inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_router_logits: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: int | Tensor | None = None,
        **inputs: Any,
    ) -> Any:
        """Run the model. What is not listed here is as in :meth:`EncoderDecoderModel.forward`.

        Args:
            labels: ``[B, T]``, the target, -100 where nothing is to be learnt (padding counts otherwise). Shifted by
                one, they are also the decoder's input if none is given.
            output_router_logits: also return the routers' losses, and add them to the loss.
            logits_to_keep: compute logits for that many last positions, or for the positions in a tensor; 0 is all.
            num_items_in_batch: labels in all parts of a batch whose gradients are accumulated: the loss is divided by
                it, and the routers' losses count for the share of the labels that are here.
        """
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if labels is not None and decoder_input_ids is None and decoder_inputs_embeds is None:
            check_classes(labels, self.config.vocab_size)
            decoder_input_ids = self._shift_right(labels)
        outputs = self._hidden_states(
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            output_router_logits=output_router_logits,
            return_dict=True,
            **inputs,
        )
        logits = self._logits(kept_for_logits(outputs.last_hidden_state, logits_to_keep))
        fields = {name: outputs[name] for name in outputs if name != "last_hidden_state"}
        added = None
        if output_router_logits:
            added, router_losses = self._router_losses(outputs, attention_mask, decoder_attention_mask)
            fields |= router_losses
        loss = None
        if labels is not None:
            loss = seq2seq_lm_loss(logits, labels, num_items_in_batch=num_items_in_batch)
            if added is not None:
                loss = loss + share_of_batch(labels, num_items_in_batch) * added.to(loss.device)
        return self._returned(self.output_class(loss=loss, logits=logits, **fields), return_dict)

    def _hidden_states(self, **inputs: Any) -> Any:
        """What the model without the head returns."""
        return self.base_model(**inputs)

    def _logits(self, hidden: Tensor) -> Tensor:
        return project(self.lm_head, hidden)

    def _router_losses(
        self, outputs: Any, attention_mask: Tensor | None, decoder_attention_mask: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor | None]]:
        """What the routers add to the loss, and the fields of the output it is made of; a dense model has none."""
        return None, {}


def as_encoder_output(encoder_outputs: ModelOutput | tuple[Any, ...]) -> MoEModelOutput:
    """What the encoder has returned, as an object; a tuple holds the fields in their order."""
    names = ("last_hidden_state", "hidden_states", "attentions", "router_logits")
    if isinstance(encoder_outputs, MoEModelOutput):
        return encoder_outputs
    if hasattr(encoder_outputs, "last_hidden_state"):
        return MoEModelOutput(**{name: getattr(encoder_outputs, name, None) for name in names})
    if isinstance(encoder_outputs, tuple | list) and 1 <= len(encoder_outputs) <= len(names):
        return MoEModelOutput(**dict(zip(names, encoder_outputs, strict=False)))
    raise ValueError(f"encoder_outputs must be what the encoder returns, got {type(encoder_outputs).__name__}")
