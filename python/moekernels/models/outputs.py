"""What models return: dataclasses that can also be read as mappings and as tuples.

Fields that are None are left out of both. The order of the fields is that of the tuples transformers returns.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moekernels.generation.outputs import Output as ModelOutput
from moekernels.nn.cache import Cache

__all__ = ["ModelOutput", "MoeCausalLMOutputWithPast", "MoeModelOutputWithPast"]


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
