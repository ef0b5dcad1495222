"""The experts of one layer, stacked in fused weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moekernels import ops
from moekernels._settings import autocast_dtype
from moekernels.nn._checks import check_counts, check_one_of
from moekernels.quantization import QuantizedWeight


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

    Raises:
        ValueError: a size is not positive, or there is no such activation.
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
        check_counts(self, hidden_size=hidden_size, ffn_size=ffn_size, num_experts=num_experts)
        check_one_of(self, "activation", activation, ops.ACTIVATIONS)
        self.hidden_size = hidden_size
        self.ffn_size = ffn_size
        self.num_experts = num_experts
        self.activation = activation
        self.gated = gated

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self._up_name = "gate_up_proj" if gated else "up_proj"
        self._up_bias_name = f"{self._up_name}_bias"
        up_size = 2 * ffn_size if gated else ffn_size
        self.register_parameter(self._up_name, parameter(up_size, hidden_size))
        self.down_proj = parameter(hidden_size, ffn_size)
        self.register_parameter(self._up_bias_name, parameter(up_size) if bias else None)
        self.down_proj_bias: nn.Parameter | None = parameter(hidden_size) if bias else None
        self.reset_parameters()

    @property
    def up_weight(self) -> Tensor:
        """The up-projection stack, whatever it is called: ``[E, 2F, H]`` gated, ``[E, F, H]`` ungated."""
        return getattr(self, self._up_name)

    @property
    def up_bias(self) -> Tensor | None:
        return getattr(self, self._up_bias_name)

    def _stacks(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """What `forward` computes with: both weights, then their biases."""
        return self.up_weight, self.down_proj, self.up_bias, self.down_proj_bias

    def reset_parameters(self, std: float = 0.02) -> None:
        nn.init.normal_(self.up_weight, std=std)
        nn.init.normal_(self.down_proj, std=std)
        for bias in (self.up_bias, self.down_proj_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(
        self,
        hidden: Tensor,
        routing_weights: Tensor,
        plan: ops.Plan,
        *,
        dropout: float = 0.0,
        output_dropout: float = 0.0,
    ) -> Tensor:
        """The weighted sum of every token's experts.

        One op that gathers, multiplies and sums, unless something is dropped in between. Rows that have been brought
        here from elsewhere are tokens with one choice each.

        Args:
            hidden: ``[T, H]``; computed in the dtype of the weights, or in that of autocast. From quantised weights the
                result comes back in the dtype of `hidden`.
            routing_weights: ``[T, K]`` float32.
            plan: which token goes where.
            dropout: share of the inner activations that is set to zero.
            output_dropout: the same of the experts' outputs.

        Returns:
            ``[T, H]``; zero for a token without a place at any expert.

        Raises:
            ValueError: shapes, dtypes or devices do not fit.
        """
        stacks = self._stacks()
        if type(self.down_proj) is not QuantizedWeight:
            return self._compute(hidden, routing_weights, plan, *stacks, dropout, output_dropout)
        # In the dtype that the weights are to be computed in, and back.
        dtype = autocast_dtype(hidden.device) or self.down_proj.dtype
        up, down, *biases = stacks
        up_bias, down_bias = (None if bias is None else bias.to(dtype) for bias in biases)
        rows = hidden.to(dtype)
        out = self._compute(rows, routing_weights, plan, up, down, up_bias, down_bias, dropout, output_dropout)
        return out.to(hidden.dtype)

    def _compute(
        self,
        hidden: Tensor,
        routing_weights: Tensor,
        plan: ops.Plan,
        up_weight: Tensor,
        down_weight: Tensor,
        up_bias: Tensor | None,
        down_bias: Tensor | None,
        dropout: float,
        output_dropout: float,
    ) -> Tensor:
        if hidden.dtype != down_weight.dtype and autocast_dtype(hidden.device) is None:
            hidden = hidden.to(down_weight.dtype)
        activation, gated = self.activation, self.gated
        if not dropout and not output_dropout:
            return ops.sparse_mlp(
                hidden,
                routing_weights,
                plan,
                up_weight,
                down_weight,
                up_bias=up_bias,
                down_bias=down_bias,
                activation=activation,
                gated=gated,
            )
        offsets = plan.expert_offsets
        rows = ops.permute(hidden, plan.token_of_row, plan.row_of_slot)
        inner = ops.grouped_gemm(rows, up_weight, offsets, bias=up_bias, activation=activation, gated=gated)
        inner = F.dropout(inner, dropout)
        rows = ops.grouped_gemm(inner, down_weight, offsets, bias=down_bias)
        return ops.unpermute(F.dropout(rows, output_dropout), plan.row_of_slot, routing_weights)

    def extra_repr(self) -> str:
        return (
            f"hidden_size={self.hidden_size}, ffn_size={self.ffn_size}, num_experts={self.num_experts}, "
            f"activation={self.activation!r}, gated={self.gated}, bias={self.up_bias is not None}"
        )
