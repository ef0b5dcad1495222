"""The decode loop: run the model, process the scores, choose a token, test for the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from moekernels.generation.processors import LogitsProcessorList
from moekernels.generation.state import DecodeState
from moekernels.generation.stopping import MaxLengthCriteria, StoppingCriteriaList
from moekernels.generation.streamers import BaseStreamer


class Chooser(Protocol):
    """Picks the next token of every row from its scores `[B, V]`; it may also rearrange the rows of the state."""

    def __call__(self, scores: Tensor, state: DecodeState) -> Tensor: ...


def choose_greedily(scores: Tensor, state: DecodeState) -> Tensor:
    """The token with the highest score, the lowest id on ties."""
    return scores.argmax(dim=-1)


class Sampler:
    """Draws from the softmax of the scores; from PyTorch's global generator unless given another."""

    def __init__(self, generator: torch.Generator | None = None) -> None:
        self.generator = generator

    def __call__(self, scores: Tensor, state: DecodeState) -> Tensor:
        return torch.multinomial(scores.softmax(dim=-1), 1, generator=self.generator).squeeze(1)


@dataclass
class Record:
    """What the caller wants to see of every step; a list is None where it does not."""

    scores: list[Tensor] | None = None
    logits: list[Tensor] | None = None
    attentions: list[Any] | None = None
    hidden_states: list[Any] | None = None
    model_kwargs: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, *, scores: bool, logits: bool, attentions: bool, hidden_states: bool) -> Record:
        wanted = {"output_attentions": attentions, "output_hidden_states": hidden_states}
        return cls(
            scores=[] if scores else None,
            logits=[] if logits else None,
            attentions=[] if attentions else None,
            hidden_states=[] if hidden_states else None,
            model_kwargs={name: True for name, value in wanted.items() if value},
        )

    def add(self, outputs: Any, logits: Tensor, scores: Tensor) -> None:
        if self.scores is not None:
            self.scores.append(scores)
        if self.logits is not None:
            self.logits.append(logits)
        if self.attentions is not None:
            self.attentions.append(outputs.attentions)
        if self.hidden_states is not None:
            self.hidden_states.append(outputs.hidden_states)


def decode(
    step: Callable[[DecodeState, dict[str, bool]], Any],
    state: DecodeState,
    choose: Chooser,
    *,
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    record: Record,
    pad_token_id: int | None = None,
    prefill_chunk_size: int | None = None,
    streamer: BaseStreamer | None = None,
) -> None:
    """Extends `state` by tokens until every row is finished, by at least one.

    The host waits for the device once per step, to learn whether all rows are finished, and not at all where only the
    length can end them.

    Args:
        step: runs the model on what the state says is next, with the extra keywords given.
        pad_token_id: what a row gets after its end token while others go on.
        prefill_chunk_size: the most prompt tokens to run at once.
    """
    limit = criteria.max_length
    tests = StoppingCriteriaList(test for test in criteria if not isinstance(test, MaxLengthCriteria))
    if not any(hasattr(test, "eos_token_id") for test in tests):
        pad_token_id = None
    num_rows = state.input_ids.shape[0]
    finished: Tensor | None = None

    if prefill_chunk_size is not None and state.use_cache:
        end = state.target
        for target in range(state.cached + prefill_chunk_size, end, prefill_chunk_size):
            state.target = target
            state.seen(step(state, {}).past_key_values)
        state.target = end

    while True:
        outputs = step(state, record.model_kwargs)
        state.seen(outputs.past_key_values if state.use_cache else None)
        # A copy, because a view would keep the logits of a whole prompt alive.
        logits = outputs.logits[:, -1].to(torch.float32, copy=record.logits is not None or record.scores is not None)
        scores = processors(state.input_ids, logits)
        record.add(outputs, logits, scores)
        del outputs

        tokens = choose(scores, state)
        if finished is not None and pad_token_id is not None and num_rows > 1:
            tokens = tokens.masked_fill(finished, pad_token_id)
        state.append(tokens)
        if streamer is not None:
            streamer.put(tokens.cpu())

        if tests:
            scores_so_far = None if record.scores is None else tuple(record.scores)
            done = tests(state.input_ids, scores_so_far)
            finished = done if finished is None else finished | done
            if bool(finished.all()):
                break
        if limit is not None and state.length >= limit:
            break
    if streamer is not None:
        streamer.end()
