"""Where the candidates of assisted decoding come from: a smaller model, or the text so far."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from moekernels.generation.config import GenerationConfig
from moekernels.generation.encoder_decoder import encode_prompt
from moekernels.generation.guidance import UnbatchedClassifierFreeGuidanceLogitsProcessor
from moekernels.generation.loop import Search
from moekernels.generation.processors import LogitsProcessorList, token_list
from moekernels.generation.prompt import Prompt

_SCHEDULES = ("constant", "heuristic", "heuristic_transient")
_NUM_TOKENS = "num_assistant_tokens"
_THRESHOLD = "assistant_confidence_threshold"
_SCHEDULE = "num_assistant_tokens_schedule"


class Candidates(NamedTuple):
    """Tokens that may come next, in a sequence. k tokens, V vocabulary.

    Attributes:
        tokens: int64 `[k]`; k may be 0.
        probs: float32 `[k, V]`, what each was drawn from; None if they were not drawn.
    """

    tokens: Tensor
    probs: Tensor | None = None


class CandidateSource(Protocol):
    """Proposes candidates, and learns what became of them."""

    def propose(self, input_ids: Tensor, most: int) -> Candidates:
        """At most `most` tokens that may follow `input_ids` int64 `[1, n]`."""

    def learn(self, proposed: int, accepted: int) -> None:
        """Called after every round with the number of tokens proposed, and of those that were right."""


class PromptLookup:
    """Proposes what followed the last few tokens where they occurred first. It costs next to nothing.

    Args:
        num_tokens: the most candidates in a round.
        max_ngram_size: how many of the last tokens to look for; if they are not found, fewer.
        eos_token_id: the end tokens, which are never proposed.
    """

    def __init__(self, num_tokens: int, max_ngram_size: int | None, eos_token_id: int | list[int] | None) -> None:
        self._num_tokens = num_tokens
        self._max_ngram_size = max_ngram_size or 2
        ends = [] if eos_token_id is None else token_list("eos_token_id", eos_token_id)
        self._ends = torch.tensor(ends, dtype=torch.long)

    def propose(self, input_ids: Tensor, most: int) -> Candidates:
        ids = input_ids[0].cpu()
        for size in range(min(self._max_ngram_size, len(ids) - 1), 0, -1):
            # The last window is the n-gram itself, which nothing follows.
            found = (ids.unfold(0, size, 1)[:-1] == ids[-size:]).all(dim=1).nonzero()
            if len(found):
                start = int(found[0]) + size
                tokens = ids[start : start + min(self._num_tokens, most)]
                ends = torch.isin(tokens, self._ends).nonzero()
                return Candidates(tokens[: int(ends[0]) if len(ends) else None].to(input_ids.device))
        return Candidates(input_ids.new_empty(0))

    def learn(self, proposed: int, accepted: int) -> None:
        """Nothing."""


class AssistantModel:
    """Lets a smaller model with the same vocabulary go ahead.

    How far is said by `num_assistant_tokens`, `num_assistant_tokens_schedule` and `assistant_confidence_threshold`: by
    the call where it sets them, else by the assistant's own generation config. It stops early at an end token and
    after a token that it gave a lower probability than the threshold. The schedule "heuristic" proposes two tokens more
    after a round in which all were right, and one less after any other, and leaves the number in the assistant's
    generation config for the next call; "heuristic_transient" does not.

    Args:
        assistant: the model.
        search: its step, its own state, whose prompt is that of the main model, and what draws its tokens.

    Raises:
        ValueError: one of the three has an unusable value.
    """

    def __init__(self, assistant: Any, search: Search) -> None:
        self._search = search
        self._own: GenerationConfig = assistant.generation_config
        self._num_tokens = float(self._setting(_NUM_TOKENS))
        self._threshold = float(self._setting(_THRESHOLD) or 0)
        self._schedule = self._setting(_SCHEDULE)
        if self._schedule not in _SCHEDULES:
            raise ValueError(f"generate: {_SCHEDULE} must be one of {', '.join(_SCHEDULES)}, got {self._schedule!r}")
        ends = search.config.eos_token_id
        self._ends = [] if ends is None else token_list("eos_token_id", ends)

    def _setting(self, name: str) -> Any:
        config = self._search.config
        default = getattr(GenerationConfig, name)
        value = getattr(config if getattr(config, name) != default else self._own, name)
        if name == _NUM_TOKENS and not (isinstance(value, (int, float)) and value >= 1):
            raise ValueError(f"generate: {name} must be a positive number, got {value!r}")
        return value

    def propose(self, input_ids: Tensor, most: int) -> Candidates:
        search, most = self._search, min(int(self._num_tokens), most)
        tokens: list[Tensor] = []
        probs: list[Tensor] = []
        if most > 0:
            search.state.follow(input_ids)
        while len(tokens) < most:
            scores = search.next_scores()
            token = search.choose(scores)
            probs.append(scores.softmax(dim=-1))
            tokens.append(token)
            search.state.append(token)
            if self._stops_after(token, probs[-1]):
                break
        if not tokens:
            return Candidates(input_ids.new_empty(0))
        return Candidates(torch.cat(tokens), torch.cat(probs) if search.config.do_sample else None)

    def _stops_after(self, token: Tensor, probs: Tensor) -> bool:
        return int(token) in self._ends or (self._threshold > 0 and float(probs[0, token]) < self._threshold)

    def learn(self, proposed: int, accepted: int) -> None:
        if self._schedule == "constant":
            return
        self._num_tokens = self._num_tokens + 2 if accepted == proposed else max(1.0, self._num_tokens - 1)
        if self._schedule == "heuristic":
            self._own.num_assistant_tokens = int(self._num_tokens)


def check_assistance(model: Any, config: GenerationConfig, assistant: Any, assistant_tokenizer: Any) -> None:
    """Raises ValueError if assisted decoding is asked for together with what it cannot do."""
    if assistant_tokenizer is not None:
        raise NotImplementedError("generate: an assistant with a tokenizer of its own is not supported yet")
    lookup = config.prompt_lookup_num_tokens
    if assistant is None and lookup is None:
        return
    name = "prompt_lookup_num_tokens" if assistant is None else "assistant_model"
    if lookup is not None and assistant is not None:
        raise ValueError("generate: pass assistant_model or prompt_lookup_num_tokens, not both")
    if config.num_beams > 1 or config.num_return_sequences > 1:
        raise ValueError(
            f"generate: {name} goes with one sequence, got num_beams={config.num_beams} and "
            f"num_return_sequences={config.num_return_sequences}"
        )
    if config.cache_implementation == "static":
        raise ValueError(f"generate: {name} needs a cache that can shrink, got cache_implementation='static'")
    if assistant is None:
        return
    if not hasattr(assistant, "_side_state"):
        raise ValueError(f"generate: assistant_model must be a model with generate(), got {type(assistant).__name__}")
    for field, default in (("is_encoder_decoder", False), ("vocab_size", None)):
        mine, its = (getattr(one.config, field, default) for one in (model, assistant))
        if mine != its:
            raise ValueError(f"generate: assistant_model must have {field}={mine!r} as the model has, got {its!r}")
    if torch.device(assistant.device) != torch.device(model.device):
        raise ValueError(f"generate: assistant_model is on {assistant.device}, but the model on {model.device}")


def candidate_source(assistant: Any, prompt: Prompt, search: Search) -> CandidateSource | None:
    """Where the candidates come from that were asked for; None if none were.

    Raises:
        ValueError: there are several prompts, or the assistant cannot read them.
    """
    config, state = search.config, search.state
    if assistant is None and config.prompt_lookup_num_tokens is None:
        return None
    if len(state.input_ids) != 1:
        raise ValueError(f"generate: assisted decoding takes one prompt at a time, got {len(state.input_ids)}")
    if getattr(state.cache, "fixed_size", False):
        raise ValueError("generate: assisted decoding needs a cache that can shrink, got one of fixed size")
    if assistant is None:
        assert config.prompt_lookup_num_tokens is not None
        return PromptLookup(config.prompt_lookup_num_tokens, config.max_matching_ngram_size, config.eos_token_id)
    rules = [rule for rule in search.processors if not isinstance(rule, UnbatchedClassifierFreeGuidanceLogitsProcessor)]
    its_search = Search(
        assistant._step,
        assistant._side_state(_prompt_of_assistant(assistant, prompt, config), use_cache=True),
        config,
        LogitsProcessorList(rules),
        search.criteria,
        generator=search.generator,
    )
    return AssistantModel(assistant, its_search)


def _prompt_of_assistant(assistant: Any, prompt: Prompt, config: GenerationConfig) -> Prompt:
    if "encoder_outputs" in prompt.shared_kwargs:
        if prompt.encoder_input_ids is None:
            raise ValueError("generate: assistant_model encodes the source itself: pass it as input_ids")
        given = {
            "attention_mask": prompt.shared_kwargs["attention_mask"],
            "decoder_input_ids": prompt.input_ids,
            "decoder_attention_mask": prompt.attention_mask,
        }
        return encode_prompt(assistant, prompt.encoder_input_ids, config, given)
    if prompt.inputs_embeds is not None:
        raise ValueError("generate: assistant_model has embeddings of its own: pass the prompt as input_ids")
    return Prompt(prompt.input_ids, attention_mask=prompt.attention_mask, position_ids=prompt.position_ids)
