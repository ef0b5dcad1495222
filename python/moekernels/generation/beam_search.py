"""Beam search, and sampling with beams. Results are those of transformers 4.56.2.

Letters: B prompts, N beams each, C candidates per prompt and step, V vocabulary, n tokens so far, prompt included.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moekernels.generation.loop import Search
from moekernels.generation.processors import token_list

# Added to the score of what must not be chosen. Finite, so that sums and quotients never become NaN.
_EXCLUDED = -1.0e9
# Scores whose maximum is looked at before they are.
_CHUNK = 128


class BeamResult(NamedTuple):
    """The best R finished sequences of every prompt, the best first.

    Attributes:
        sequences: int64 `[B * R, length]`.
        scores: float32 `[B * R]`, sums of log-probabilities over length ** length_penalty.
        beam_indices: int32 `[B * R, generated]`, the row (of B * N) that every token was chosen from; -1 after the end.
    """

    sequences: Tensor
    scores: Tensor
    beam_indices: Tensor


def beam_search(search: Search) -> BeamResult:
    """Extends the state, which has N rows for every prompt, until no better sequence is to be expected."""
    beams = _Beams(search)
    search.read_prompt()
    while not beams.advance(search.next_scores(log_probs=True)):
        pass
    return beams.result(search.config.num_return_sequences)


class _Beams:
    """The running and the finished sequences of every prompt."""

    def __init__(self, search: Search) -> None:
        self.search, self.state, self.config = search, search.state, search.config
        state, config = self.state, self.config
        tokens, self.num_beams = state.input_ids, config.num_beams
        num_prompts, device = tokens.shape[0] // self.num_beams, tokens.device
        ends = [] if config.eos_token_id is None else token_list("eos_token_id", config.eos_token_id)
        # Every beam may end in every way there is, and N must be left to go on with.
        self.num_candidates = max(2, 1 + len(ends)) * self.num_beams
        # Like the reference: the pad token if it is set and not 0, else the first end token.
        self.fill = config.pad_token_id or (ends[0] if ends else 0)
        self.first_row = torch.arange(num_prompts, device=device)[:, None] * self.num_beams

        shape = (num_prompts, self.num_beams)
        # At first all beams of a prompt are the same, and only the first one may be continued.
        self.running_scores = torch.full(shape, _EXCLUDED, device=device)
        self.running_scores[:, 0] = 0
        self.running_beams = torch.empty(*shape, 0, dtype=torch.int32, device=device)
        self.scores = torch.full(shape, _EXCLUDED, device=device)
        self.sequences = tokens.view(*shape, -1)
        self.beam_indices = self.running_beams
        self.is_finished = torch.zeros(shape, dtype=torch.bool, device=device)
        # [B, 1]: a running sequence may still get better than the finished ones.
        self.may_improve = torch.ones(num_prompts, 1, dtype=torch.bool, device=device)
        # [B, N, N]: tokens that two running sequences have in common.
        self.common = torch.full((num_prompts, self.num_beams, self.num_beams), state.length)

    def advance(self, log_probs: Tensor) -> bool:
        """Chooses the next tokens by their log-probabilities `[B * N, V]`; returns whether that was the last step."""
        values, parents, tokens = self._candidates(log_probs)
        rows = parents + self.first_row
        sequences = torch.cat([self.state.input_ids[rows], tokens[..., None]], dim=2)
        beams = torch.cat([_taken(self.running_beams, parents), rows.int()[..., None]], dim=2)
        ended = self.search.criteria(sequences.flatten(0, 1), self.search.record.scores).view(rows.shape)

        running_values = values + ended * _EXCLUDED
        best = running_values.topk(self.num_beams).indices
        self._finish(values, sequences, beams, ended)
        self.running_scores = running_values.gather(1, best)
        self.running_beams = _taken(beams, best)
        self._continue(parents.gather(1, best), tokens.gather(1, best))

        self.may_improve = self.may_improve & self._beats_finished()
        stop = ended.all() | ~self.may_improve.any()
        if self.config.early_stopping is True:
            stop = stop | self.is_finished.all()
        return bool(stop)

    def result(self, num_return_sequences: int) -> BeamResult:
        kept = slice(0, num_return_sequences)
        beam_indices = self.beam_indices[:, kept].flatten(0, 1)
        generated = int((beam_indices >= 0).sum(dim=1).max())
        sequences = self.sequences[:, kept].flatten(0, 1)[:, : self.state.prompt_length + generated]
        return BeamResult(
            sequences.contiguous(), self.scores[:, kept].flatten(), beam_indices[:, :generated].contiguous()
        )

    def _candidates(self, log_probs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Scores, beams and tokens `[B, C]` of the best continuations, or of a draw from all."""
        vocab_size = log_probs.shape[1]
        if self.config.do_sample:
            totals = log_probs.view(*self.running_scores.shape, -1) + self.running_scores[..., None]
            totals = totals.flatten(1)
            places = torch.multinomial(totals.softmax(dim=-1), self.num_candidates, generator=self.search.generator)
            values = totals.gather(1, places)
        else:
            values, places = best_continuations(log_probs, self.running_scores, self.num_candidates)
        return values, places // vocab_size, places % vocab_size

    def _continue(self, parents: Tensor, tokens: Tensor) -> None:
        """Makes the chosen candidates `[B, N]` the rows of the state."""
        parents_on_host = parents.cpu()
        prompts = torch.arange(len(parents_on_host))[:, None]
        # What a row is to hold and what it holds begin alike, and only the rest is copied.
        own = torch.arange(self.num_beams).expand_as(parents_on_host)
        alike = self.common[prompts, own, parents_on_host]
        moving = own != parents_on_host
        if bool(moving.any()):
            self.state.reorder((parents_on_host + prompts * self.num_beams).view(-1), int(alike[moving].min()))
        same = parents_on_host[:, :, None] == parents_on_host[:, None, :]
        common = self.common[prompts[..., None], parents_on_host[:, :, None], parents_on_host[:, None, :]]
        self.common = torch.where(same, self.state.length, common)
        self.state.append(tokens.view(-1))

    def _finish(self, values: Tensor, sequences: Tensor, beams: Tensor, ended: Tensor) -> None:
        """Keeps the N best of the finished sequences and of the best N candidates, where those have ended."""
        top = slice(0, self.num_beams)
        generated = sequences.shape[2] - self.state.prompt_length
        scores = values[:, top] / generated**self.config.length_penalty
        open_to_more = self.may_improve
        if self.config.early_stopping is True:
            open_to_more = open_to_more & ~self.is_finished.all(dim=1, keepdim=True)
        scores = scores + ~open_to_more * _EXCLUDED
        scores = scores + ~ended[:, top] * _EXCLUDED

        all_scores = torch.cat([self.scores, scores], dim=1)
        best = all_scores.topk(self.num_beams).indices
        self.scores = all_scores.gather(1, best)
        self.sequences = _taken(torch.cat([_longer(self.sequences, self.fill), sequences[:, top]], dim=1), best)
        self.beam_indices = _taken(torch.cat([_longer(self.beam_indices, -1), beams[:, top]], dim=1), best)
        self.is_finished = torch.cat([self.is_finished, ended[:, top]], dim=1).gather(1, best)

    def _beats_finished(self) -> Tensor:
        """Whether `[B, 1]` the best running sequence may still end better than the worst finished one.

        Scores fall with every token, but a length penalty above 0 divides them by more: then the running sequence is
        compared as if it ended now, or, with `early_stopping="never"`, as if it got the longest there may be.
        """
        length = self.state.length
        if self.config.early_stopping == "never" and self.config.length_penalty > 0:
            length = self.config.max_length
        highest = self.running_scores[:, :1] / (length - self.state.prompt_length) ** self.config.length_penalty
        worst = torch.where(self.is_finished, self.scores.amin(dim=1, keepdim=True), _EXCLUDED)
        return (highest > worst).any(dim=1, keepdim=True)


def best_continuations(log_probs: Tensor, running_scores: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest sums of a running score and a log-probability.

    A vocabulary is long and `topk` slow, so the best chunks are found by their maxima first, and then the best sums in
    those alone.

    Args:
        log_probs: float32 `[B * N, V]`.
        running_scores: float32 `[B, N]`.
        count: how many; at most N * V.

    Returns:
        The sums float32 `[B, count]`, in descending order, and where they are in `[N * V]`.
    """
    num_prompts, num_beams = running_scores.shape
    vocab_size = log_probs.shape[1]
    num_chunks = vocab_size // _CHUNK
    if num_beams * num_chunks <= count:
        totals = (log_probs.view(num_prompts, num_beams, -1) + running_scores[..., None]).flatten(1)
        values, places = totals.topk(count)
        return values, places

    device, whole = log_probs.device, num_chunks * _CHUNK
    highest = log_probs[:, :whole].unflatten(1, (num_chunks, _CHUNK)).amax(dim=2)
    highest = highest.view(num_prompts, num_beams, num_chunks) + running_scores[..., None]
    chunks = highest.flatten(1).topk(count).indices
    starts = chunks // num_chunks * vocab_size + chunks % num_chunks * _CHUNK
    places = (starts[..., None] + torch.arange(_CHUNK, device=device)).flatten(1)
    # What is left over after the last whole chunk, in every row.
    rest = torch.arange(num_beams, device=device)[:, None] * vocab_size + torch.arange(whole, vocab_size, device=device)
    places = torch.cat([places, rest.flatten().expand(num_prompts, -1)], dim=1)
    totals = log_probs.view(num_prompts, -1).gather(1, places) + running_scores.gather(1, places // vocab_size)
    values, best = totals.topk(count)
    return values, places.gather(1, best)


def _taken(tensor: Tensor, index: Tensor) -> Tensor:
    """`[B, M, n]` at `[B, K]` of its second dimension."""
    return tensor.gather(1, index[..., None].expand(-1, -1, tensor.shape[2]))


def _longer(tensor: Tensor, fill: int) -> Tensor:
    """`[B, N, n]` with one more column."""
    return torch.nn.functional.pad(tensor, (0, 1), value=fill)
