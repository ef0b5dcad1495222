"""What every way of decoding is made of, and the plainest: the best token, or a drawn one, step by step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor

from moekernels.generation.config import GenerationConfig
from moekernels.generation.processors import LogitsProcessorList, token_list
from moekernels.generation.state import DecodeState
from moekernels.generation.stopping import MaxLengthCriteria, StoppingCriteriaList
from moekernels.generation.streamers import BaseStreamer

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

    @property
    def model_fields(self) -> list[str]:
        """The fields of the model's output that are wanted."""
        return [name for name in self.lists if name not in ("scores", "logits")]

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


@dataclass
class Search:
    """What one call of `generate` decodes with, in whichever way. B rows, V vocabulary.

    Attributes:
        step: runs the model.
        state: the sequences, which decoding extends.
        config: the parameters; `max_length` is final.
        processors, criteria: what changes the scores, and what ends a sequence.
        record: what the caller wants to see of the steps.
        generator: what to draw from; PyTorch's global generator if None.
        streamer: receives the tokens as they are chosen.
    """

    step: Step
    state: DecodeState
    config: GenerationConfig
    processors: LogitsProcessorList
    criteria: StoppingCriteriaList
    record: Record = field(default_factory=Record)
    generator: torch.Generator | None = None
    streamer: BaseStreamer | None = None
    _wide: Tensor | None = field(default=None, init=False, repr=False)

    def read_prompt(self) -> None:
        """Runs the model on all but the last piece of the prompt, if it is to be read in pieces."""
        state, chunk_size = self.state, self.config.prefill_chunk_size
        if chunk_size is None or not state.use_cache:
            return
        end = state.target
        for target in range(state.cached + chunk_size, end, chunk_size):
            state.target = target
            state.seen(self.step(state, {}).past_key_values)
        state.target = end

    def run_model(self) -> Any:
        """The model's output for what the state says is next."""
        outputs = self.step(self.state, self.record.model_kwargs)
        self.state.seen(outputs.past_key_values if self.state.use_cache else None)
        return outputs

    def next_scores(self, *, log_probs: bool = False) -> Tensor:
        """Runs the model and returns the processed scores float32 `[B, V]` of the next token, until the next step.

        Args:
            log_probs: turn the logits into log-probabilities before they are processed.
        """
        outputs = self.run_model()
        logits = outputs.logits[:, -1]
        recorded = "logits" in self.record or "scores" in self.record
        unseen = self.processors.are_own and not recorded
        if unseen or (log_probs and "logits" not in self.record):
            logits = self._widened(logits)
        else:
            # A copy where it is kept, because a view would keep the logits of a whole prompt alive.
            logits = logits.to(torch.float32, copy=recorded)
        scores = logits
        if log_probs:
            # Also in place, as a CPU reads a row for the last time when it writes it.
            scores = torch.log_softmax(logits, dim=-1, out=logits if unseen and logits.is_cpu else None)
        process = self.processors.overwrite if unseen else self.processors
        scores = process(self.state.input_ids, scores)
        self.record.add(outputs, scores=scores, logits=logits)
        return scores

    def _widened(self, logits: Tensor) -> Tensor:
        """The logits `[B, V]` in float32, to be overwritten: new memory in every step takes longer than to fill it."""
        if self._wide is None or self._wide.shape != logits.shape:
            self._wide = torch.empty_like(logits, dtype=torch.float32)
        return self._wide.copy_(logits)

    def choose(self, scores: Tensor) -> Tensor:
        """Tokens int64 `[B]` for scores `[B, V]`: drawn, or the best ones, with the lowest id on ties."""
        return self.draw(scores.softmax(dim=-1)) if self.config.do_sample else scores.argmax(dim=-1)

    def draw(self, probs: Tensor) -> Tensor:
        """Tokens int64 `[B]`, drawn with probabilities `[B, V]`."""
        return torch.multinomial(probs, 1, generator=self.generator).squeeze(1)


class Progress:
    """Adds tokens to the rows of a search, and knows which rows are finished.

    The host waits for the device once per step, to learn whether all rows are finished, and not at all where only the
    length can end them.
    """

    def __init__(self, search: Search) -> None:
        criteria = search.criteria
        self._state, self._streamer, self._record = search.state, search.streamer, search.record
        self._max_length = criteria.max_length
        self._tests = StoppingCriteriaList(test for test in criteria if not isinstance(test, MaxLengthCriteria))
        # One row alone ends with the search.
        fill = len(search.state.input_ids) > 1 and any(hasattr(test, "eos_token_id") for test in self._tests)
        self._pad_token_id = pad_token(search.config) if fill else None
        self._finished: Tensor | None = None

    def add(self, tokens: Tensor) -> bool:
        """Appends tokens int64 `[B]`, padding to finished rows. Returns whether those were the last ones."""
        state = self._state
        if self._finished is not None and self._pad_token_id is not None:
            tokens = tokens.masked_fill(self._finished, self._pad_token_id)
        state.append(tokens)
        if self._streamer is not None:
            self._streamer.put(tokens.cpu())
        if self._tests:
            done = self._tests(state.input_ids, self._record.scores)
            self._finished = done if self._finished is None else self._finished | done
            if bool(self._finished.all()):
                return True
        return self._max_length is not None and state.length >= self._max_length


def pad_token(config: GenerationConfig) -> int | None:
    """What fills a row after its end: the pad token, or else the first end token."""
    if config.pad_token_id is not None or config.eos_token_id is None:
        return config.pad_token_id
    return token_list("eos_token_id", config.eos_token_id)[0]


def decode(search: Search) -> None:
    """Extends the sequences, a token per step, until every row is finished."""
    progress = Progress(search)
    search.read_prompt()
    while not progress.add(search.choose(search.next_scores())):
        pass
