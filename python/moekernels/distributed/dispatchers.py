"""Dispatchers that bring tokens to experts of other processes.

Letters: T tokens, K choices per token, H hidden size, R ranks, M tokens that arrive, A answers that go back.
"""

from __future__ import annotations

import zlib
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moekernels import ops
from moekernels.distributed.batch import SplitBatch
from moekernels.distributed.collectives import CommunicationError, Ranks
from moekernels.distributed.experts import held_experts
from moekernels.distributed.places import spread
from moekernels.nn.batch import LOCAL, Batch
from moekernels.nn.dispatcher import Experts
from moekernels.nn.router import RouterOutput

Sums = Literal["exact", "partial"]


class _ShardedDispatcher:
    """What both have in common: who holds which expert, and places that are counted before anything is sent.

    Args:
        num_experts: of the layer.
        ranks: the processes that hold them.
        capacity, group_size: as for :class:`moekernels.nn.LocalDispatcher`.
        name: of the layer, for errors.
    """

    #: Whether a step of one rank needs the others to take it too, with rows of their own.
    splits_batch = False

    def __init__(
        self,
        num_experts: int,
        ranks: Ranks,
        *,
        capacity: int | None = None,
        group_size: int | None = None,
        name: str = "",
    ) -> None:
        self.num_experts = num_experts
        self.ranks = ranks
        self.capacity = capacity
        self.group_size = group_size
        self.name = name
        self.share = -(-num_experts // ranks.size)
        self.held = held_experts(num_experts, ranks.size, ranks.rank)
        # torch.compile takes numbers of a module, but no range of them.
        self.first, self.num_held = self.held.start, len(self.held)

    def _claim_places(self, expert_ids: Tensor, batch: Batch) -> Tensor:
        """``expert_ids [T, K]``, -1 where the expert has no place left."""
        if self.capacity is None:
            return expert_ids
        begin, everyones = 0, expert_ids
        if self.group_size is None:
            (everyones,), begin = batch.gather(expert_ids)
        plan = ops.plan(everyones, self.num_experts, capacity=self.capacity, group_size=self.group_size)
        return expert_ids.masked_fill(plan.row_of_slot[begin : begin + expert_ids.shape[0]] < 0, -1)

    def _plan(self, local_ids: Tensor) -> ops.Plan:
        return ops.plan(local_ids, max(self.num_held, 1))

    def _what(self, step: str) -> str:
        return f"{step} of {self.name or 'a sparse layer'}"


class SummingDispatcher(_ShardedDispatcher):
    """Every rank has the same tokens, runs its own experts on them, and the outputs are summed: one all-reduce.

    For few tokens, or where the ranks compute everything else alike. Each rank rounds its sum to the dtype of the
    tokens, so that a token's output is that of one process up to ``R - 1`` roundings, and the same bits if all of its
    experts are on one rank. Its ranks must draw the same random numbers: seed them alike.
    """

    def run(self, hidden: Tensor, routing: RouterOutput, experts: Experts) -> Tensor:
        """See :meth:`moekernels.nn.Dispatcher.run`."""
        ids = self._claim_places(routing.expert_ids, LOCAL)
        ids = torch.where((ids >= self.first) & (ids < self.first + self.num_held), ids - self.first, -1)
        hidden, weights = self.ranks.enter((hidden, routing.routing_weights), self._what("tokens"))
        return self.ranks.leave(self._served(hidden, weights, ids, experts), self._what("outputs"))

    def _served(self, hidden: Tensor, weights: Tensor, ids: Tensor, experts: Experts) -> Tensor:
        plan = self._plan(ids)
        if not isinstance(experts, partial):
            return experts(hidden, weights, plan)
        # Ranks drop different activations, but must afterwards draw the same numbers again.
        seed = int(torch.randint(2**62, ())) + self.ranks.rank
        devices = [hidden.device] if hidden.is_cuda else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(seed)
            return experts(hidden, weights, plan)


class _Parcels(NamedTuple):
    """What a rank sends, and how it puts together what comes back.

    Attributes:
        sends: ranks as experts; a token has one row for every rank that holds some of its experts.
        answers: likewise, with a row for every answer.
        is_summed: ``[T]`` bool, whether a rank answers with the weighted sum of a token's experts, or one by one.
        owner: ``[T, K]``, the rank of every choice, -1 without one.
        asks: ``[T, K]``, the rank that answers for a choice, -1 for those that another choice's answer holds.
    """

    sends: ops.Plan
    answers: ops.Plan
    is_summed: Tensor
    owner: Tensor
    asks: Tensor

    def spread(self, places: int) -> _Parcels:
        """As many rows for every rank."""
        return self._replace(sends=spread(self.sends, places), answers=spread(self.answers, places))


class ExchangingDispatcher(_ShardedDispatcher):
    """Every rank has tokens of its own, which go to the ranks that hold their experts, and their outputs come back.

    A token goes once to a rank, however many of its experts are there. With ``sums="exact"`` the results are those of
    one process to the bit: experts' outputs come back one by one and are weighted and summed here, in order; where all
    experts of a token are on one rank, that rank does it. With ``sums="partial"`` a rank always sends one row back, its
    part of the weighted sum, which is fewer bytes where K is large beside R, and rounds once more for every rank.

    Before the rows, ranks tell each other how many they send, in one exchange of 32 bytes for each, which also finds
    out ranks that are in another call.

    With `rows_per_rank` every rank sends every rank that many rows, filled or not, and as many come back: no sizes are
    exchanged, nothing waits for the device, and shapes depend on nothing but that number. Choices for which a rank has
    no row left are dropped, as by a capacity: all first choices claim theirs before any second one, in token order.
    `dropped` counts them. As many rows as a rank has tokens, with "exact" as it has choices, drop none, and results are
    the same to the bit. Experts then compute on ``R * rows_per_rank`` tokens.

    Args:
        num_experts, ranks, capacity, group_size, name: as above. Without a `group_size` a capacity is counted over the
            tokens of all ranks, for which their numbers are exchanged in any case.
        sums: "exact" or "partial".
        rows_per_rank: the same on all ranks; None: as many as there are.

    Attributes:
        dropped: choices that no row was left for, since the last time that somebody set it to None; a tensor on the
            device, or None before the first.
    """

    splits_batch = True

    def __init__(
        self,
        num_experts: int,
        ranks: Ranks,
        *,
        capacity: int | None = None,
        group_size: int | None = None,
        name: str = "",
        sums: Sums = "exact",
        rows_per_rank: int | None = None,
    ) -> None:
        super().__init__(num_experts, ranks, capacity=capacity, group_size=group_size, name=name)
        self.sums = sums
        self.rows_per_rank = rows_per_rank
        self.dropped: Tensor | None = None
        self._batch = SplitBatch(ranks)

    def run(self, hidden: Tensor, routing: RouterOutput, experts: Experts) -> Tensor:
        """See :meth:`moekernels.nn.Dispatcher.run`."""
        ids, weights = self._claim_places(routing.expert_ids, self._batch), routing.routing_weights
        parcels = self._parcels(ids)
        if self.rows_per_rank is None:
            sizes = self._exchange_sizes(hidden, ids, parcels)
        else:
            ids = self._without_overflow(ids, parcels, self.rows_per_rank)
            parcels = self._parcels(ids).spread(self.rows_per_rank)
            sizes = self._fixed_sizes(self.rows_per_rank, ids.shape[1])
        is_summed = parcels.is_summed[:, None]

        rows = ops.permute(hidden, parcels.sends.token_of_row[: sizes.num_sent], parcels.sends.row_of_slot)
        labels = self._labels(ids, torch.where(is_summed, weights, 1.0), parcels, sizes.num_sent)
        rows, labels = self.ranks.exchange((rows, labels), sizes.sent, sizes.received, self._what("tokens"))
        served = self._serve(rows, labels, sizes, experts)
        (back,) = self.ranks.exchange((served,), sizes.answers, sizes.asked, self._what("outputs"))
        return ops.unpermute(back, parcels.answers.row_of_slot, torch.where(is_summed, 1.0, weights))

    def _parcels(self, ids: Tensor) -> _Parcels:
        owner = torch.where(ids < 0, -1, ids // self.share)
        same = owner[:, :, None] == owner[:, None, :]
        once = owner.masked_fill(same.tril(-1).any(-1), -1)
        sends = ops.plan(once, self.ranks.size)
        if self.sums == "partial" or ids.shape[1] == 1:
            return _Parcels(sends, sends, ids.new_ones(ids.shape[0], dtype=torch.bool), owner, once)
        is_summed = (once >= 0).sum(1) <= 1
        asks = torch.where(is_summed[:, None], once, owner)
        return _Parcels(sends, ops.plan(asks, self.ranks.size), is_summed, owner, asks)

    def _without_overflow(self, ids: Tensor, parcels: _Parcels, places: int) -> Tensor:
        """``ids [T, K]``, -1 where a rank has no place left for an answer."""
        asks, owner = parcels.asks, parcels.owner
        lost = (asks >= 0) & (ops.plan(asks, self.ranks.size, capacity=places).row_of_slot < 0)
        # An answer that is a sum stands for all of a token's choices on its rank.
        same = owner[:, :, None] == owner[:, None, :]
        lost = lost | ((same & lost[:, None, :]).any(-1) & parcels.is_summed[:, None] & (owner >= 0))
        self.dropped = lost.sum() + (0 if self.dropped is None else self.dropped)
        return ids.masked_fill(lost, -1)

    def _fixed_sizes(self, places: int, top_k: int) -> _Sizes:
        rows = [places] * self.ranks.size
        choices = [places * min(top_k, max(self.num_held, 1))] * self.ranks.size
        return _Sizes(rows, rows, choices, rows, rows, choices)

    def _labels(self, ids: Tensor, weights: Tensor, parcels: _Parcels, num_rows: int) -> Tensor:
        """For every row that is sent, float32: weights, this rank's expert ids (-1 for those of others), is summed."""
        sends, top_k = parcels.sends, ids.shape[1]
        # Of the token: weights, owners from 1 on (0 is none, also of rows without a token), ids there, is summed.
        token = (weights, parcels.owner + 1.0, (ids % self.share).float(), parcels.is_summed[:, None].float())
        sent = ops.permute(torch.cat(token, dim=1), sends.token_of_row[:num_rows], sends.row_of_slot)
        sent_weights, owner, local_ids, is_summed = sent.split((top_k, top_k, top_k, 1), dim=1)
        number = torch.arange(num_rows, device=ids.device)
        rank = torch.searchsorted(sends.expert_offsets[1:].long(), number, right=True)
        theirs = torch.where(owner == rank[:, None] + 1, local_ids, -1.0)
        return torch.cat((sent_weights, theirs, is_summed), dim=1)

    def _exchange_sizes(self, hidden: Tensor, ids: Tensor, parcels: _Parcels) -> _Sizes:
        call = (hidden.shape[1], hidden.dtype, ids.shape[1], torch.is_grad_enabled(), self.sums, self.name)
        signature = zlib.crc32(repr(call).encode())
        # Choices are counted by the rank of each, -1 last.
        owners = torch.where(parcels.owner < 0, self.ranks.size, parcels.owner).flatten().long()
        choices = torch.zeros(self.ranks.size + 1, dtype=torch.long, device=ids.device)
        choices.scatter_add_(0, owners, torch.ones_like(owners))
        counts = [parcels.sends.expert_offsets.diff(), parcels.answers.expert_offsets.diff(), choices[:-1]]
        own = torch.stack([*counts, torch.full_like(choices[:-1], signature)], dim=1).long()
        (theirs,) = self.ranks.exchange((own,), None, None, self._what("the numbers of tokens"))
        sent, received = torch.stack((own, theirs)).tolist()  # the one place where the host waits
        others = [rank for rank, row in enumerate(received) if row[3] != signature]
        if others:
            raise CommunicationError(
                f"rank {self.ranks.rank} of {self.ranks.size}, in {self._what('the numbers of tokens')}: "
                f"rank{'s' if len(others) > 1 else ''} {', '.join(map(str, others))} called it otherwise, or are in "
                f"another layer; here it is hidden size {call[0]}, {call[1]}, {call[2]} choices per token, gradients "
                f"{'on' if call[3] else 'off'}, sums {call[4]!r}"
            )
        return _Sizes(
            *(
                list(column)
                for row in (sent, received)
                for column in zip(*(numbers[:3] for numbers in row), strict=True)
            )
        )

    def _serve(self, rows: Tensor, labels: Tensor, sizes: _Sizes, experts: Experts) -> Tensor:
        """``rows [M, H]`` and their labels -> answers ``[A, H]``."""
        weights, ids, is_summed = labels.split((labels.shape[1] // 2, labels.shape[1] // 2, 1), dim=1)
        ids, is_summed = ids.detach().int(), is_summed.detach() > 0
        num_answers = sum(sizes.answers)
        if self.sums == "exact" and ids.shape[1] > 1:
            chosen = ids >= 0
            begins = chosen & (~is_summed | (chosen.cumsum(1) == 1))
            answers = self._answers(begins)
            token = answers.token_of_row[:num_answers]
            number = torch.arange(num_answers, device=ids.device)[:, None]
            at = token.clamp(min=0).long()  # fixed places may be empty
            of_answer = (token >= 0)[:, None] & (is_summed[at] | (answers.row_of_slot[at] == number))
            ids = torch.where(of_answer, ids[at], -1)
            rows = ops.permute(rows, token, answers.row_of_slot)
            weights = ops.permute(weights.contiguous(), token, answers.row_of_slot)
        plan = self._plan(ids)
        # Only so many rows are in use: the rest would be memory for nothing.
        plan = plan._replace(token_of_row=plan.token_of_row[: sum(sizes.choices)])
        return experts(rows, weights.contiguous(), plan)

    def _answers(self, begins: Tensor) -> ops.Plan:
        """Where answers go: ``begins [M, K]`` bool, for the rows that arrived, which choices have one."""
        if self.rows_per_rank is None:
            return ops.plan(begins.int() - 1, 1)
        source = torch.arange(begins.shape[0], device=begins.device)[:, None] // self.rows_per_rank
        return spread(ops.plan(torch.where(begins, source, -1).int(), self.ranks.size), self.rows_per_rank)


class _Sizes(NamedTuple):
    """Numbers by rank: rows sent, answers awaited, choices sent; rows received, answers to give, choices to serve."""

    sent: list[int]
    asked: list[int]
    wanted: list[int]
    received: list[int]
    answers: list[int]
    choices: list[int]

    @property
    def num_sent(self) -> int:
        return sum(self.sent)
