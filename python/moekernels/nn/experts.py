"""The experts of one layer, stacked in fused weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops


class GroupedExperts(nn.Module):
    """E two-layer MLPs that share their shape, held as stacks so that a grouped GEMM serves them all.

    An expert computes ``down(act(gate(x)) * up(x))``, or ``down(act(up(x)))`` when ungated.

    Parameters (H hidden size, F expert size):
        gate_up_proj: ``[E, 2F, H]``, the F gate rows first, when gated; else ``up_proj``: ``[E, F, H]``.
        down_proj: ``[E, H, F]``.
        gate_up_proj_bias ``[E, 2F]`` (or up_proj_bias ``[E, F]``) and down_proj_bias ``[E, H]`` with ``bias=True``.

    Args:
        hidden_size, ffn_size, num_experts: H, F and E.
        activation: an activation name of :mod:`moekernels.ops`.
        gated: multiply the activated gate with a second projection.
        bias: give both projections a bias.
    """

    def __init__(
        self,
        hidden_size: int,
        ffn_size: int,
        num_experts: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.hidden_size = hidden_size
        self.ffn_size = ffn_size
        self.num_experts = num_experts
        self.activation = activation
        self.gated = gated

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self._up_name = "gate_up_proj" if gated else "up_proj"
        up_size = 2 * ffn_size if gated else ffn_size
        self.register_parameter(self._up_name, parameter(up_size, hidden_size))
        self.down_proj = parameter(hidden_size, ffn_size)
        self.register_parameter(f"{self._up_name}_bias", parameter(up_size) if bias else None)
        self.down_proj_bias: nn.Parameter | None = parameter(hidden_size) if bias else None
        self.reset_parameters()

    @property
    def up_weight(self) -> Tensor:
        """The up-projection stack, whatever it is called: ``[E, 2F, H]`` gated, ``[E, F, H]`` ungated."""
        return getattr(self, self._up_name)

    @property
    def up_bias(self) -> Tensor | None:
        return getattr(self, f"{self._up_name}_bias")

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.up_weight, std=std)
        nn.init.normal_(self.down_proj, std=std)
        for bias in (self.up_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, rows: Tensor, expert_offsets: Tensor, dropout: float = 0.0) -> Tensor:
        """``rows [N, H]`` sorted by expert, ``expert_offsets [E + 1]`` -> ``[N, H]``.

        `dropout` is the share of the inner activations that is set to zero.
        """
        inner = ops.grouped_gemm(
            rows, self.up_weight, expert_offsets, bias=self.up_bias, activation=self.activation, gated=self.gated
        )
        if dropout:
            inner = F.dropout(inner, p=dropout)
        return ops.grouped_gemm(inner, self.down_proj, expert_offsets, bias=self.down_proj_bias)

    def forward_fused(self, hidden: Tensor, expert_weights: Tensor, plan: ops.Plan) -> Tensor:
        """Gather, experts and weighted sum as one op: ``hidden [T, H]``, ``expert_weights [T, K]`` -> ``[T, H]``."""
        return ops.sparse_mlp(
            hidden,
            expert_weights,
            plan,
            self.up_weight,
            self.down_proj,
            up_bias=self.up_bias,
            down_bias=self.down_proj_bias,
            activation=self.activation,
            gated=self.gated,
        )

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, ffn_size={self.ffn_size}, num_experts={self.num_experts}, "
            f"activation={self.activation!r}, gated={self.gated}, bias={self.up_bias is not None}"
        )
