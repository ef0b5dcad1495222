"""The ops in plain PyTorch as one would write them for speed: what the demo's timings are compared with.

The definitions in :mod:`moekernels.ops.reference` are written to be read, and losing to them would be hard.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

from moekernels.ops import Plan


def route(logits: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    weights, expert_ids = torch.topk(torch.softmax(logits, dim=-1, dtype=torch.float32), top_k)
    return weights, expert_ids.int()


def plan(expert_ids: Tensor, num_experts: int) -> Plan:
    flat = expert_ids.flatten()
    order = torch.argsort(flat, stable=True)
    offsets = torch.zeros(num_experts + 1, dtype=torch.int32, device=flat.device)
    offsets[1:] = torch.bincount(flat, minlength=num_experts).cumsum(0)
    row_of_slot = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=flat.device))
    return Plan(offsets, (order // expert_ids.shape[1]).int(), row_of_slot.view_as(expert_ids).int())


def permute(hidden: Tensor, token_of_row: Tensor) -> Tensor:
    return hidden.index_select(0, token_of_row)


def grouped_gemm(
    rows: Tensor, weight: Tensor, expert_offsets: Tensor, activation: str = "none", gated: bool = False
) -> Tensor:
    bounds = expert_offsets.tolist()
    outputs = []
    for expert, (first, last) in enumerate(pairwise(bounds)):
        if last > first:
            y = F.linear(rows[first:last], weight[expert])
            if gated:
                gate, up = y.chunk(2, dim=-1)
                y = (F.silu(gate) if activation == "silu" else gate) * up
            outputs.append(y)
    return torch.cat(outputs)


def unpermute(rows: Tensor, row_of_slot: Tensor, weights: Tensor) -> Tensor:
    num_tokens, top_k = row_of_slot.shape
    taken = rows.index_select(0, row_of_slot.flatten()).view(num_tokens, top_k, -1)
    return torch.einsum("tkh,tk->th", taken.float(), weights).to(rows.dtype)


def sparse_mlp(hidden: Tensor, expert_weights: Tensor, plan: Plan, up_weight: Tensor, down_weight: Tensor) -> Tensor:
    rows = permute(hidden, plan.token_of_row)
    inner = grouped_gemm(rows, up_weight, plan.expert_offsets, activation="silu", gated=True)
    return unpermute(grouped_gemm(inner, down_weight, plan.expert_offsets), plan.row_of_slot, expert_weights)
