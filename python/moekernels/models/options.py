"""What the arguments of a forward pass amount to: its inputs, its outputs, its cache.

Letters: B batch, S new tokens, H hidden size.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from moekernels.nn import Cache

_Cache = TypeVar("_Cache", bound=Cache)


class OptionalOutputs(NamedTuple):
    """What a pass returns beside the last hidden state."""

    attentions: bool
    hidden_states: bool
    router_logits: bool


def optional_outputs(
    config: Any,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
    output_router_logits: bool | None,
) -> OptionalOutputs:
    """What the call asks for; where it says None, what the configuration does."""
    return OptionalOutputs(
        config.output_attentions if output_attentions is None else output_attentions,
        config.output_hidden_states if output_hidden_states is None else output_hidden_states,
        config.output_router_logits if output_router_logits is None else output_router_logits,
    )


#: What tokenizers return and no model here looks at; decoders of transformers take it likewise.
_WITHOUT_EFFECT = frozenset(("token_type_ids",))


def refuse_unknown(model: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Holds what is left of the keywords of a `forward` to what may be passed over: a mistyped mask is no mask.

    Raises:
        TypeError: a keyword is none of the model's.
    """
    for name in kwargs:
        if name not in _WITHOUT_EFFECT:
            known = [known for known in inspect.signature(type(model).forward).parameters if known != "self"]
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {close[0]!r}?" if close else ""
            raise TypeError(f"{type(model).__name__}.forward() got an unexpected keyword argument {name!r}{hint}")


def exactly_one(*, neither: str = "neither", **tensors: Tensor | None) -> Tensor:
    """The one of two tensors that is given.

    Args:
        neither: what the message says if there is none.
        **tensors: the two, by their names.

    Raises:
        ValueError: both are given, or neither.
    """
    given = [tensor for tensor in tensors.values() if tensor is not None]
    if len(given) != 1:
        got = "both" if given else neither
        raise ValueError(f"exactly one of {' and '.join(tensors)} must be given, got {got}")
    return given[0]


def attention_implementation(config: Any, output_attentions: bool) -> str:
    """The name of the attention function: the configured one, or the one that has probabilities if they are wanted."""
    return "eager" if output_attentions else config._attn_implementation


def resolve_cache(
    past_key_values: _Cache | None,
    use_cache: bool | None,
    config: Any,
    *,
    kind: type,
    make: Callable[[], _Cache],
    checkpointed: bool,
) -> _Cache | None:
    """The cache of a pass: the one that is given, or a new one, or None.

    Layers that are checkpointed run twice, and would fill a cache twice: none is made for them.

    Args:
        past_key_values: the one that is given.
        use_cache: whether to make one otherwise; None is what the configuration says.
        config: of the model.
        kind: what a cache must be.
        make: makes one.
        checkpointed: whether the pass runs with gradient checkpointing.

    Raises:
        ValueError: `past_key_values` is of another kind, or is given with gradient checkpointing.
    """
    if past_key_values is None:
        wanted = config.use_cache if use_cache is None else use_cache
        return make() if wanted and not checkpointed else None
    if not isinstance(past_key_values, kind):
        raise ValueError(
            f"past_key_values must be a moekernels {kind.__name__} or None, got {type(past_key_values).__name__}"
        )
    if checkpointed:
        raise ValueError("past_key_values cannot be combined with gradient checkpointing")
    return past_key_values


def new_positions(cache: Cache | None, num_tokens: int, device: torch.device) -> Tensor:
    """The places int64 ``[num_tokens]`` of new tokens: after those in the cache, or from 0 on without one."""
    return torch.arange(num_tokens, device=device) if cache is None else cache.next_positions(num_tokens, device)


def kept_for_logits(hidden: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """The hidden states ``[B, S, H]`` at that many last positions, or at the positions in a tensor; 0 is all."""
    return hidden[:, slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep]
