"""What models return: dataclasses that can also be read as mappings and as tuples.

Fields that are None are left out of both. The order of the fields is that of the tuples transformers returns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moekernels.generation.outputs import Output as ModelOutput
from moekernels.nn.cache import Cache

__all__ = [
    "BaseModelOutput",
    "MoEModelOutput",
    "MoEModelOutputWithPastAndCrossAttentions",
    "ModelOutput",
    "MoeCausalLMOutputWithPast",
    "MoeModelOutputWithPast",
    "Seq2SeqLMOutput",
    "Seq2SeqMoEModelOutput",
    "Seq2SeqMoEOutput",
    "Seq2SeqModelOutput",
    "SequenceClassifierOutputWithPast",
]


@dataclass
class MoeModelOutputWithPast(ModelOutput):
    """Of a decoder. B batch, S tokens, L layers.

    Attributes:
        last_hidden_state: ``[B, S, hidden_size]``, after the last norm.
        past_key_values: the cache, now with these tokens.
        hidden_states: L + 1 tensors ``[B, S, hidden_size]``: the embeddings, then the output of every layer, the last
            one after the last norm.
        attentions: L tensors ``[B, heads, S, keys]``, probabilities.
        router_logits: L tensors ``[B * S, num_experts]``, before the softmax.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class MoeCausalLMOutputWithPast(ModelOutput):
    """Of a decoder with a language-modelling head.

    Attributes:
        loss: scalar, of the next-token prediction, and of the load balance where router logits are asked for.
        aux_loss: scalar, the load-balancing loss before its coefficient.
        logits: ``[B, S, vocab_size]``, or of the positions asked for by `logits_to_keep`.
        past_key_values, hidden_states, attentions, router_logits: as in :class:`MoeModelOutputWithPast`.
    """

    loss: Tensor | None = None
    aux_loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class SequenceClassifierOutputWithPast(ModelOutput):
    """Of a decoder with a head that classifies sequences.

    Attributes:
        loss: scalar.
        logits: ``[B, num_labels]``.
        past_key_values, hidden_states, attentions: as in :class:`MoeModelOutputWithPast`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class BaseModelOutput(ModelOutput):
    """Of a dense encoder. B batch, S tokens, L layers.

    Attributes:
        last_hidden_state: ``[B, S, hidden_size]``, after the last norm.
        hidden_states: L + 1 tensors ``[B, S, hidden_size]``: the embeddings, then the output of every layer, the last
            one after the last norm.
        attentions: L tensors ``[B, heads, S, S]``, probabilities.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None


@dataclass
class MoEModelOutput(ModelOutput):
    """Of an encoder with sparse layers.

    Attributes:
        last_hidden_state, hidden_states, attentions: as in :class:`BaseModelOutput`.
        router_probs: one tensor per sparse layer, where a model returns its routers' probabilities.
        router_logits: one tensor per sparse layer, before the softmax.
    """

    last_hidden_state: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    router_probs: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class MoEModelOutputWithPastAndCrossAttentions(ModelOutput):
    """Of a decoder with cross attention.

    Attributes:
        past_key_values: the cache, now with these tokens.
        cross_attentions: one ``[B, heads, T, S]`` per layer, probabilities.
        others: as in :class:`MoEModelOutput`.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    router_probs: tuple[Tensor, ...] | None = None
    router_logits: tuple[Tensor, ...] | None = None


@dataclass
class Seq2SeqModelOutput(ModelOutput):
    """Of a dense encoder and decoder. B batch, S source and T target tokens.

    Attributes:
        last_hidden_state: ``[B, T, hidden_size]``, of the decoder, after its last norm.
        past_key_values: the cache, now with these target tokens.
        decoder_hidden_states: tensors ``[B, T, hidden_size]``: the embeddings, then the output of every layer, the last
            one after the last norm.
        decoder_attentions: one ``[B, heads, T, keys]`` per layer, probabilities.
        cross_attentions: one ``[B, heads, T, S]`` per layer, probabilities.
        encoder_last_hidden_state: ``[B, S, hidden_size]``.
        encoder_hidden_states: as `decoder_hidden_states`, ``[B, S, hidden_size]``.
        encoder_attentions: one ``[B, heads, S, S]`` per layer.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class Seq2SeqLMOutput(ModelOutput):
    """Of a dense encoder and decoder with a language-modelling head.

    Attributes:
        loss: scalar, of the labels.
        logits: ``[B, T, vocab_size]``, or of the positions asked for by `logits_to_keep`.
        others: as in :class:`Seq2SeqModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    past_key_values: Cache | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None


@dataclass
class Seq2SeqMoEModelOutput(ModelOutput):
    """Of an encoder and decoder with sparse layers.

    Attributes:
        decoder_router_logits, encoder_router_logits: one tensor per sparse layer, before the softmax; its shape is up
            to the model.
        others: as in :class:`Seq2SeqModelOutput`.
    """

    last_hidden_state: Tensor | None = None
    past_key_values: Cache | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    decoder_router_logits: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_router_logits: tuple[Tensor, ...] | None = None


@dataclass
class Seq2SeqMoEOutput(ModelOutput):
    """Of an encoder and decoder with sparse layers and a language-modelling head.

    Attributes:
        loss: scalar, of the labels, and of the routers where the model adds those.
        logits: ``[B, T, vocab_size]``, or of the positions asked for by `logits_to_keep`.
        encoder_z_loss, decoder_z_loss: scalars, the routers' z-losses before their coefficient.
        encoder_aux_loss, decoder_aux_loss: scalars, the load-balancing losses before their coefficient.
        others: as in :class:`Seq2SeqMoEModelOutput`.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    encoder_z_loss: Tensor | None = None
    decoder_z_loss: Tensor | None = None
    encoder_aux_loss: Tensor | None = None
    decoder_aux_loss: Tensor | None = None
    past_key_values: Cache | None = None
    decoder_hidden_states: tuple[Tensor, ...] | None = None
    decoder_attentions: tuple[Tensor, ...] | None = None
    decoder_router_logits: tuple[Tensor, ...] | None = None
    cross_attentions: tuple[Tensor, ...] | None = None
    encoder_last_hidden_state: Tensor | None = None
    encoder_hidden_states: tuple[Tensor, ...] | None = None
    encoder_attentions: tuple[Tensor, ...] | None = None
    encoder_router_logits: tuple[Tensor, ...] | None = None
