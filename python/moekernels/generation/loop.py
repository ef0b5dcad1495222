"""The decode loop: run the model, process the scores, choose a token, test for the end."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from moekernels.generation.config import GenerationConfig
from moekernels.generation.processors import LogitsProcessorList
from moekernels.generation.state import DecodeState
from moekernels.generation.stopping import MaxLengthCriteria, StoppingCriteriaList
from moekernels.generation.streamers import BaseStreamer


class Chooser(Protocol):
    """Picks the next token of every row from its scores `[B, V]`."""

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


# Runs the model on what the state says is next, with the extra keywords given.
Step: TypeAlias = "Callable[[DecodeState, dict[str, bool]], Any]"


@dataclass
class Record:
    """What the caller wants to see of every step: one list per wanted field of the result.

    Attributes:
        lists: the lists by name: "scores", "logits", and fields of the model's output.
        model_kwargs: what makes the model return those fields.
    """

    lists: dict[str, list[Any]] = field(default_factory=dict)
    model_kwargs: dict[str, bool] = field(default_factory=dict)

    @classmethod
    def of(cls, config: GenerationConfig, is_encoder_decoder: bool) -> Record:
        """The record that `config` asks for."""
        record = cls()
        if not config.return_dict_in_generate:
            return record
        prefix = "decoder_" if is_encoder_decoder else ""
        names = {
            "output_scores": ["scores"],
            "output_logits": ["logits"],
            "output_attentions": [f"{prefix}attentions", *(["cross_attentions"] if is_encoder_decoder else [])],
            "output_hidden_states": [f"{prefix}hidden_states"],
        }
        for option, wanted in names.items():
            if getattr(config, option):
                record.lists |= {name: [] for name in wanted}
                if option not in ("output_scores", "output_logits"):
                    record.model_kwargs[option] = True
        return record

    def __contains__(self, name: str) -> bool:
        return name in self.lists

    def add(self, outputs: Any, **values: Tensor) -> None:
        """Takes the wanted fields of a step from `values` and, those that are not there, from the model's output."""
        for name, entries in self.lists.items():
            entries.append(values[name] if name in values else getattr(outputs, name))

    def fields(self) -> dict[str, tuple[Any, ...]]:
        """Everything so far, by name."""
        return {name: tuple(entries) for name, entries in self.lists.items()}

    @property
    def scores(self) -> tuple[Tensor, ...] | None:
        """The scores so far, if they are wanted."""
        return tuple(self.lists["scores"]) if "scores" in self else None


def read_prompt(step: Step, state: DecodeState, chunk_size: int | None) -> None:
    """Runs the model on all but the last piece of the prompt, at most `chunk_size` tokens at once."""
    if chunk_size is None or not state.use_cache:
        return
    end = state.target
    for target in range(state.cached + chunk_size, end, chunk_size):
        state.target = target
        state.seen(step(state, {}).past_key_values)
    state.target = end


def next_scores(
    step: Step, state: DecodeState, processors: LogitsProcessorList, record: Record, *, log_probs: bool = False
) -> Tensor:
    """Runs the model and returns the processed scores float32 `[B, V]` of the next token.

    Args:
        log_probs: turn the logits into log-probabilities before they are processed.
    """
    outputs = step(state, record.model_kwargs)
    state.seen(outputs.past_key_values if state.use_cache else None)
    # A copy where it is kept, because a view would keep the logits of a whole prompt alive.
    kept = "logits" in record or ("scores" in record and not log_probs)
    logits = outputs.logits[:, -1].to(torch.float32, copy=kept)
    scores = processors(state.input_ids, logits.log_softmax(dim=-1) if log_probs else logits)
    record.add(outputs, scores=scores, logits=logits)
    return scores


def decode(
    step: Step,
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
        pad_token_id: what a row gets after its end token while others go on.
        prefill_chunk_size: the most prompt tokens to run at once.
    """
    limit = criteria.max_length
    tests = StoppingCriteriaList(test for test in criteria if not isinstance(test, MaxLengthCriteria))
    if not any(hasattr(test, "eos_token_id") for test in tests):
        pad_token_id = None
    num_rows = state.input_ids.shape[0]
    finished: Tensor | None = None

    read_prompt(step, state, prefill_chunk_size)
    while True:
        scores = next_scores(step, state, processors, record)
        tokens = choose(scores, state)
        if finished is not None and pad_token_id is not None and num_rows > 1:
            tokens = tokens.masked_fill(finished, pad_token_id)
        state.append(tokens)
        if streamer is not None:
            streamer.put(tokens.cpu())

        if tests:
            done = tests(state.input_ids, record.scores)
            finished = done if finished is None else finished | done
            if bool(finished.all()):
                break
        if limit is not None and state.length >= limit:
            break
    if streamer is not None:
        streamer.end()
