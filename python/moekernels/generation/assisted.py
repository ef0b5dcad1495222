"""Assisted decoding: one run of the model checks several candidate tokens. It changes the speed, not the text.

Greedy search keeps candidates for as long as they are what the model would have chosen. Sampling keeps a candidate that
was drawn with probability q where the model has probability p with probability min(1, p / q), and draws from what
exceeds q in p in its place otherwise, so that tokens are distributed as the model's own are (arXiv 2211.17192). Ties in
the last bit aside, that is: a model may round differently when it runs on several tokens.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from moekernels.generation.candidates import Candidates, CandidateSource
from moekernels.generation.loop import Progress, Search


def assisted_decode(search: Search, source: CandidateSource, model_config: Any) -> None:
    """Extends the one sequence until it is finished.

    Args:
        source: proposes candidates.
        model_config: says which runs would not give every token what it gets alone; there are none of those.
    """
    state, progress = search.state, Progress(search)
    max_length = search.config.max_length if search.criteria.max_length is None else search.criteria.max_length
    # Beyond this length a model with two sets of rotary factors reads every token in another way.
    turning_point = getattr(model_config, "original_max_position_embeddings", None)
    at_once = tokens_at_once(model_config)
    search.read_prompt()
    done = False
    while not done:
        most = max_length - 1 - state.length
        if turning_point is not None and state.target <= turning_point:
            most = min(most, turning_point - state.target)
        if at_once is not None:
            most = min(most, at_once - (state.target - state.cached))
        candidates = source.propose(state.input_ids, max(most, 0))
        accepted, done = _check(search, progress, candidates)
        source.learn(len(candidates.tokens), accepted)


def tokens_at_once(model_config: Any) -> int | None:
    """How many tokens a model may run on without its experts leaving any out; None if there is no such limit."""
    capacity: int | None = getattr(model_config, "expert_capacity", None)
    fraction = getattr(model_config, "moe_eval_capacity_token_fraction", None)
    if fraction is None:
        return capacity
    if fraction > 0:
        return None if fraction >= 1 else 1
    return capacity or 1


def _check(search: Search, progress: Progress, candidates: Candidates) -> tuple[int, bool]:
    """Runs the model on the candidates and adds those that are right, and the token after them.

    Returns:
        How many were right, and whether the sequence is finished.
    """
    state, record = search.state, search.record
    count, length = len(candidates.tokens), state.length
    state.extend(candidates.tokens[None])
    state.logits_to_keep = count + 1
    outputs = search.run_model()
    state.rewind(length)

    logits = outputs.logits[:, -(count + 1) :]
    kept = "logits" in record or "scores" in record
    # All at once, and not for as many as are looked at: what is drawn after them does not depend on that.
    draws = None if candidates.probs is None else torch.rand(count, generator=search.generator, device=logits.device)
    done = False
    for place in range(count + 1):
        given = logits[:, place].to(torch.float32, copy=kept)
        scores = search.processors(state.input_ids, given)
        token, is_right = _token_at(place, scores, candidates, draws, search)
        record.add(_output_at(outputs, record.model_fields, place, count), scores=scores, logits=given)
        done = progress.add(token)
        if done or not is_right:
            break
    state.crop()
    return place + is_right, done


def _token_at(
    place: int, scores: Tensor, candidates: Candidates, draws: Tensor | None, search: Search
) -> tuple[Tensor, bool]:
    """The token int64 `[1]` that comes at a place, by its scores `[1, V]`; whether it is the candidate."""
    candidate = candidates.tokens[place : place + 1]
    if candidates.probs is None or draws is None or not len(candidate):
        token = search.choose(scores)
        return token, bool(len(candidate)) and bool(token == candidate)
    ours, theirs = scores.softmax(dim=-1), candidates.probs[place : place + 1]
    if bool(draws[place] <= ours[0, candidate] / theirs[0, candidate]):
        return candidate, True
    excess = (ours - theirs).clamp(min=0)
    # Nothing exceeds it only where the two are the same but for rounding.
    return search.draw(excess if bool(excess.any()) else ours), False


def _output_at(outputs: Any, names: list[str], place: int, count: int) -> SimpleNamespace:
    """What the model would have returned for one token alone, out of a run with `count` candidates.

    The first token's has the queries of all that was read before, as that of any first step.
    """

    def taken(name: str, layer: Tensor) -> Tensor:
        # Hidden states [1, queries, H], attentions [1, heads, queries, keys].
        query_dim = 1 if layer.dim() == 3 else 2
        end = layer.shape[query_dim] - count + place
        layer = layer.narrow(query_dim, 0 if place == 0 else end - 1, end if place == 0 else 1)
        own = query_dim == 2 and name != "cross_attentions"
        return layer[..., : layer.shape[3] - count + place] if own else layer

    return SimpleNamespace(**{name: tuple(taken(name, layer) for layer in getattr(outputs, name)) for name in names})
