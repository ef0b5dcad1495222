"""The experts of one layer, which are read when tokens are routed to them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import closing
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from moekernels import ops
from moekernels._settings import autocast_dtype
from moekernels.expert_memory.cache import ExpertCache
from moekernels.nn import GroupedExperts
from moekernels.ops._expert_weights import ExpertTensors

#: Expert -> its tensors.
_Group = Mapping[int, Mapping[str, Tensor]]


class StreamedExperts(nn.Module):
    """In the place of a :class:`GroupedExperts`, with the same results to the bit, for inference.

    It has no parameters: a cache hands over the experts that tokens visit. Those that are in memory compute while
    others are read, each with its own rows; the sum over a token's experts comes last, in the order it always has.

    Args:
        experts: whose place it takes; its parameters may be on the meta device.
        cache: where the experts come from.
        layer: which of the cache's layers this is.
        dtype: in which it computes: that of the down-projections.
        is_quantized: whether weights are quantised; results then come back in the dtype of the hidden states.
        device: where the cache has the experts.
    """

    def __init__(
        self,
        experts: GroupedExperts,
        cache: ExpertCache,
        layer: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        is_quantized: bool = False,
    ) -> None:
        super().__init__()
        self.hidden_size = experts.hidden_size
        self.ffn_size = experts.ffn_size
        self.num_experts = experts.num_experts
        self.activation = experts.activation
        self.gated = experts.gated
        self.cache = cache
        self.layer = layer
        self.dtype = dtype
        self.device = device
        self._up_name = experts._up_name
        self._has_bias = experts.up_bias is not None
        self._is_quantized = is_quantized

    def forward(
        self,
        hidden: Tensor,
        routing_weights: Tensor,
        plan: ops.Plan,
        *,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
    ) -> Tensor:
        """As :meth:`GroupedExperts.forward`.

        Raises:
            RuntimeError: the model is in training mode, or a gradient is wanted.
            ExpertReadError: an expert cannot be read.
        """
        wants_gradient = torch.is_grad_enabled() and (hidden.requires_grad or routing_weights.requires_grad)
        if self.training or dropout or output_dropout or wants_gradient:
            raise RuntimeError(
                "experts that stay in files (expert_memory) are for inference: call model.eval(), and use "
                "torch.no_grad() where inputs or weights require gradients; to train, load without expert_memory"
            )
        if not self._is_quantized:
            if hidden.dtype != self.dtype and autocast_dtype(hidden.device) is None:
                hidden = hidden.to(self.dtype)
            return self._routed(hidden, routing_weights, plan)
        dtype = autocast_dtype(hidden.device) or self.dtype
        return self._routed(hidden.to(dtype), routing_weights, plan).to(hidden.dtype)

    # The compiler would have to wait for files: it leaves this to Python.
    forward._torchdynamo_disable = True  # type: ignore[attr-defined]

    def _routed(self, hidden: Tensor, routing_weights: Tensor, plan: ops.Plan) -> Tensor:
        rows_of = {e: rows for e, rows in enumerate(pairwise(plan.expert_offsets.tolist())) if rows[0] < rows[1]}
        out: Tensor | None = None
        with closing(self.cache.visit(self.layer, list(rows_of))) as groups:
            for group in groups:
                ranges = [rows_of[expert] for expert in group]
                if len(group) == len(rows_of) and not self._is_quantized:
                    offsets = self._offsets(ranges, plan.expert_offsets)
                    return self._layer(hidden, routing_weights, plan._replace(expert_offsets=offsets), group)
                results = self._rows(hidden, plan, ranges, group)
                if out is None:
                    out = results.new_empty(plan.token_of_row.shape[0], self.hidden_size)
                for (begin, end), rows in zip(ranges, results.split([e - b for b, e in ranges]), strict=True):
                    out[begin:end] = rows
        if out is None:
            return hidden.new_zeros(hidden.shape, dtype=autocast_dtype(hidden.device))
        return ops.unpermute(out, plan.row_of_slot, routing_weights)

    def _layer(self, hidden: Tensor, routing_weights: Tensor, plan: ops.Plan, group: _Group) -> Tensor:
        """All that is visited, at once; `plan` knows only these experts."""
        up, down = self._weights(group)
        up_bias, down_bias = self._biases(group, hidden.dtype)
        return ops.sparse_mlp(
            hidden,
            routing_weights,
            plan,
            up,
            down,
            up_bias=up_bias,
            down_bias=down_bias,
            activation=self.activation,
            gated=self.gated,
        )

    def _rows(self, hidden: Tensor, plan: ops.Plan, ranges: list[tuple[int, int]], group: _Group) -> Tensor:
        """The outputs of some experts, for the ranges of rows that are theirs."""
        if self._is_quantized and len(group) > 1:  # kernels read one stack, here of one expert
            single = zip(ranges, group.items(), strict=True)
            return torch.cat([self._rows(hidden, plan, [rows], {e: tensors}) for rows, (e, tensors) in single])
        up, down = self._weights(group)
        up_bias, down_bias = self._biases(group, hidden.dtype)
        offsets = self._offsets(ranges, plan.expert_offsets)
        tokens = torch.cat([plan.token_of_row[begin:end] for begin, end in ranges])
        activation, gated = self.activation, self.gated
        inner = ops.grouped_gemm(
            hidden, up, offsets, bias=up_bias, activation=activation, gated=gated, token_of_row=tokens
        )
        return ops.grouped_gemm(inner, down, offsets, bias=down_bias)

    @staticmethod
    def _offsets(ranges: list[tuple[int, int]], like: Tensor) -> Tensor:
        ends = accumulate((end - begin for begin, end in ranges), initial=0)
        return torch.tensor(list(ends), dtype=like.dtype, device=like.device)

    @staticmethod
    def _tensors(group: _Group, name: str) -> list[Tensor]:
        return [tensors[name] for tensors in group.values()]

    def _weights(self, group: _Group) -> tuple[ExpertTensors, ExpertTensors]:
        """Both weights: matrices of each expert, or a stack of one that is quantised."""
        up, down = self._tensors(group, self._up_name), self._tensors(group, "down_proj")
        return up[0] if up[0].dim() == 3 else up, down[0] if down[0].dim() == 3 else down

    def _biases(self, group: _Group, dtype: torch.dtype) -> tuple[list[Tensor] | None, list[Tensor] | None]:
        if not self._has_bias:
            return None, None
        up, down = (self._tensors(group, name) for name in (f"{self._up_name}_bias", "down_proj_bias"))
        return (
            ([bias.to(dtype) for bias in up], [bias.to(dtype) for bias in down]) if self._is_quantized else (up, down)
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Of ``model.to``: there is nothing here to convert or to move.

        Raises:
            RuntimeError: that is wanted.
        """
        probe = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        if (probe.dtype, probe.device.type) != (self.dtype, self.device.type):
            raise RuntimeError(
                f"experts that stay in files (expert_memory) are read as {self.dtype} to {self.device}; for "
                f"{probe.dtype} on {probe.device}, load the model with that dtype and device"
            )
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, ffn_size={self.ffn_size}, num_experts={self.num_experts}, "
            f"activation={self.activation!r}, gated={self.gated}, bias={self._has_bias}, dtype={self.dtype}"
        )
