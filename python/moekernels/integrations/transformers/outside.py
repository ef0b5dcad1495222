"""Experts of transformers that its experts interface does not know, though they are made of the same parts.

Letters: B sequences, S tokens of each, T = B * S, N rows, E experts, K choices per token, H hidden size, F expert size.
"""

from __future__ import annotations

import sys
from itertools import accumulate
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from moekernels import ops
from moekernels.integrations.transformers.experts import ExpertWeights, activation_name
from moekernels.integrations.transformers.fused import Structure, plain_stacks, run_stacks, structure_of
from moekernels.integrations.transformers.layers import FusedExperts
from moekernels.integrations.transformers.plain import say_why, why_all_hooked, why_no_kernel, why_not_plain
from moekernels.integrations.transformers.swaps import Swap, num_bytes, stock_class


class _WithPart(Swap):
    """A module that passes by one of its own, which has to be plain for that."""

    part: ClassVar[str]  # the name of its class, in the module of the layer's class
    part_class: ClassVar[type[nn.Module]]

    @classmethod
    def prepare(cls, stock: type[nn.Module]) -> dict[str, Any]:
        return {"part_class": getattr(sys.modules[stock.__module__], cls.part)}


class Llama4Block(_WithPart):
    """``forward(hidden [..., H]) -> (out [T, H], router logits [T, E])``; scores multiply what experts are given."""

    part = "Llama4TextExperts"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        experts: Any = module.experts
        structure = structure_of(experts)
        return structure if isinstance(structure, str) else None

    @classmethod
    def hinders(cls, module: nn.Module) -> str | None:
        found = cls._stacks(module, cls.prepare(stock_class(type(module)))["part_class"], lasting=True)
        return found if isinstance(found, str) else None

    @classmethod
    def num_bytes(cls, module: nn.Module) -> int:
        experts: Any = module.experts
        return sum(num_bytes(p) for p in experts.parameters(recurse=False))

    @classmethod
    def expert_weights(cls, module: nn.Module) -> list[tuple[nn.Module, str]]:
        raise ValueError("its stacks are [E, in, out], which cannot be quantised by rows")

    @classmethod
    def _stacks(
        cls, module: Any, experts_class: type[nn.Module], *, lasting: bool = False
    ) -> tuple[Structure, ExpertWeights] | str:
        experts = module.experts
        if reason := why_not_plain(experts, experts_class, lasting=lasting):
            return f"experts {reason}"
        structure = structure_of(experts)
        if isinstance(structure, str):
            return structure
        structure = structure._replace(transposed=True)
        stacks = plain_stacks(experts, structure, lasting=lasting)
        return f"experts.{stacks}" if isinstance(stacks, str) else (structure, stacks)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        found = self._stacks(self, self.part_class)
        if isinstance(found, str):
            say_why(self.stock, found)
            return self.original.forward(self, hidden_states)
        hidden = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden)
        expert_ids = logits.topk(self.top_k, dim=1).indices  # as the router has chosen them
        # A row for each choice, so that each has its own score.
        rows = (hidden.unsqueeze(1) * scores.gather(1, expert_ids).unsqueeze(2)).flatten(0, 1)
        ones = rows.new_ones(len(rows), 1, dtype=torch.float32)
        routed = run_stacks(self.experts, found[0], rows, expert_ids.reshape(-1, 1), ones, found[1])
        return self.shared_expert(hidden) + routed.unflatten(0, (-1, self.top_k)).sum(dim=1), logits


class LongcatExperts(FusedExperts):
    """``forward(hidden [T, H], ids [T, K], weights [T, K]) -> [T, H]``; ids from E on return what they are given."""

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        return "it has no experts with weights" if module.down_proj is None else super().refuses(module)

    @classmethod
    def expert_weights(cls, module: nn.Module) -> list[tuple[nn.Module, str]]:
        raise ValueError("its stack of up-projections has matrices of no expert")

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        reason = why_not_plain(self.identity_expert, nn.Identity)
        found = f"identity_expert {reason}" if reason else self.plain_stacks()
        if isinstance(found, str):
            say_why(self.stock, found)
            return self.original.forward(self, hidden_states, top_k_index, top_k_weights)
        structure, stacks = found
        num_experts = len(stacks.down)
        out = run_stacks(
            self, structure, hidden_states, top_k_index, top_k_weights, stacks._replace(up=stacks.up[:num_experts])
        )
        unchanged = top_k_weights.masked_fill(top_k_index < num_experts, 0).sum(dim=-1, keepdim=True)
        return out + (hidden_states * unchanged).to(out.dtype)


class _Glu(NamedTuple):
    """``w1``, ``v1`` and ``w2 [E, F, H]``, and what lies between."""

    gate: Tensor
    value: Tensor
    down: Tensor
    activation: str


class DbrxExperts(_WithPart):
    """``forward(hidden [B, S, H], ...) -> [B, S, H]``; the matrices of all experts are one below the other."""

    part = "DbrxExpertGLU"

    @classmethod
    def refuses(cls, module: nn.Module) -> str | None:
        glu: Any = module.mlp
        if activation_name(glu.activation_fn) is None:
            return f"its activation {type(glu.activation_fn).__name__} is none of {', '.join(ops.ACTIVATIONS)}"
        return None

    @classmethod
    def hinders(cls, module: nn.Module) -> str | None:
        found = cls._weights(module, cls.prepare(stock_class(type(module)))["part_class"], lasting=True)
        return found if isinstance(found, str) else None

    @classmethod
    def num_bytes(cls, module: nn.Module) -> int:
        return sum(num_bytes(p) for p in module.parameters())

    @classmethod
    def expert_weights(cls, module: nn.Module) -> list[tuple[nn.Module, str]]:
        raise ValueError("its down-projections are [in, out], which cannot be quantised by rows")

    @classmethod
    def _weights(cls, module: Any, glu_class: type[nn.Module], *, lasting: bool = False) -> _Glu | str:
        if not lasting and (reason := why_all_hooked()):
            return reason
        glu = module.mlp
        if reason := why_not_plain(glu, glu_class, lasting=lasting):
            return f"mlp {reason}"
        act, activation = glu.activation_fn, activation_name(glu.activation_fn)
        if activation is None:
            return f"its activation is a {type(act).__name__}"
        if isinstance(act, nn.Module) and (reason := why_not_plain(act, type(act), lasting=lasting)):
            return f"mlp.activation_fn {reason}"
        weights = []
        for name in ("w1", "v1", "w2"):
            weight = getattr(glu, name)
            if reason := why_no_kernel(weight, lasting=lasting):
                return f"mlp.{name} {reason}"
            weights.append(weight.unflatten(0, (-1, glu.ffn_hidden_size)))
        gate, value, down = weights
        return _Glu(gate, value, down, activation)

    def forward(self, hidden_states: Tensor, *routing: Tensor) -> Tensor:
        found = self._weights(self, self.part_class)
        if isinstance(found, str):
            say_why(self.stock, found)
            return self.original.forward(self, hidden_states, *routing)
        # transformers 4 gives all weights, those of the chosen, and the chosen; 5 the chosen and their weights.
        expert_ids, weights = routing if len(routing) == 2 else (routing[2], routing[1])
        plan = ops.plan(expert_ids.int(), len(found.down))
        hidden = hidden_states.reshape(-1, hidden_states.shape[-1])
        rows = ops.permute(hidden.to(found.down.dtype), plan.token_of_row, plan.row_of_slot)
        up = [matrix for pair in zip(found.gate.unbind(), found.value.unbind(), strict=True) for matrix in pair]
        inner = ops.grouped_gemm(rows, up, plan.expert_offsets, activation=found.activation, gated=True)
        rows = ops.grouped_gemm(inner, found.down, plan.expert_offsets, transposed=True)
        return ops.unpermute(rows, plan.row_of_slot, weights.float()).to(hidden.dtype).view(hidden_states.shape)


class ParallelExperts(Swap):
    """One projection of all experts: ``forward(rows [N, in], rows of each expert) -> [N, out]``."""

    @classmethod
    def hinders(cls, module: nn.Module) -> str | None:
        reason = why_no_kernel(module.weight, lasting=True)
        return f"weight {reason}" if reason else None

    @classmethod
    def num_bytes(cls, module: nn.Module) -> int:
        weight: Any = module.weight
        return num_bytes(weight)

    @classmethod
    def expert_weights(cls, module: nn.Module) -> list[tuple[nn.Module, str]]:
        return [(module, "weight")]

    def forward(self, inputs: Tensor, expert_size: list[int]) -> Tensor:
        if reason := why_no_kernel(self.weight):
            say_why(self.stock, f"weight {reason}")
            return self.original.forward(self, inputs, expert_size)
        offsets = torch.tensor([0, *accumulate(expert_size)], dtype=torch.int32, device=inputs.device)
        return ops.grouped_gemm(inputs, self.weight, offsets)
