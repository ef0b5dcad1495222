"""What the layers of a model are told, what they return, and what is kept of that.

Letters: B batch, S source tokens, T new tokens, H hidden size, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor

from moekernels.models.options import OptionalOutputs
from moekernels.nn import AttentionMask, Cache


class LayerContext(NamedTuple):
    """What is the same for all layers of a stack in one pass.

    A tuple, since what looks for tensors among a layer's arguments (FSDP2, accelerate, checkpointing) looks into those.

    Attributes:
        implementation: name of the attention function.
        mask: of self attention, with the position bias if there is one.
        kept: ``[B, T]`` bool, which tokens are not padding, or None if all are; for sparse layers with a capacity.
        rotary: cosines and sines of the positions, where they are rotary.
        cache, cache_position: keys and values of earlier tokens, and the places ``[T]`` of the new ones.
        source: the encoder's output ``[B, S, H]``; or fewer rows, each for as many consecutive rows of the target.
        cross_mask: of attention to the source.
        head_mask, cross_head_mask: ``[layers, heads]``, factors of the heads' outputs.
    """

    implementation: str
    mask: AttentionMask
    kept: Tensor | None = None
    rotary: tuple[Tensor, ...] = ()
    cache: Cache | None = None
    cache_position: Tensor | None = None
    source: Tensor | None = None
    cross_mask: AttentionMask = AttentionMask()
    head_mask: Tensor | None = None
    cross_head_mask: Tensor | None = None


class LayerOutput(NamedTuple):
    """What a layer returns. All that is computed in it, so that hooks, FSDP2 and checkpointing see where it comes from.

    Attributes:
        hidden: ``[B, T, H]``.
        attentions: probabilities ``[B, heads, T, keys]``, if the attention function has them.
        router_logits: ``[B * T, E]``, or ``[B, T, E]`` in Switch Transformers; None of a dense layer.
        cross_attentions: probabilities ``[B, heads, T, S]`` of attention to the source.
        position_bias: what the layers after it add to their scores, if this is the layer that holds it.
    """

    hidden: Tensor
    attentions: Tensor | None = None
    router_logits: Tensor | None = None
    cross_attentions: Tensor | None = None
    position_bias: Tensor | None = None


class Recorder:
    """Keeps what a pass returns of its layers: ``hidden = record(hidden, layer(hidden, context))``.

    Args:
        wanted: what that is.
        has_cross_attention: whether the layers attend to a source.
    """

    def __init__(self, wanted: OptionalOutputs, *, has_cross_attention: bool = False) -> None:
        self._wanted = wanted
        self._is_idle = not any(wanted)
        self._has_cross_attention = has_cross_attention
        self._hidden_states: list[Tensor] = []
        self._attentions: list[Tensor | None] = []
        self._cross_attentions: list[Tensor | None] = []
        self._router_logits: list[Tensor] = []

    def __call__(self, hidden: Tensor, output: LayerOutput) -> Tensor:
        """The hidden states that a layer has made of `hidden`."""
        if not self._is_idle:
            self.passed(hidden)
            # Hooks and reentrant checkpointing may have put a plain tuple in its place.
            found = LayerOutput(*output)
            if self._wanted.attentions:
                self._attentions.append(found.attentions)
                self._cross_attentions.append(found.cross_attentions)
            if self._wanted.router_logits and found.router_logits is not None:
                self._router_logits.append(found.router_logits)
        return output[0]

    def passed(self, hidden: Tensor) -> None:
        """Notes the hidden states that a layer would have got which is left out."""
        if self._wanted.hidden_states:
            self._hidden_states.append(hidden)

    def fields(self, hidden: Tensor) -> dict[str, Any]:
        """The fields of a model's output, with `hidden` as the last hidden states."""
        found: dict[str, Any] = {"last_hidden_state": hidden}
        if self._wanted.hidden_states:
            found["hidden_states"] = (*self._hidden_states, hidden)
        if self._wanted.attentions:
            found["attentions"] = tuple(self._attentions)
            if self._has_cross_attention:
                found["cross_attentions"] = tuple(self._cross_attentions)
        if self._router_logits:
            found["router_logits"] = tuple(self._router_logits)
        return found
