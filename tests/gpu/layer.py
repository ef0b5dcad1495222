"""The whole sparse MLP from router logits on, and its definition."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moekernels import ops
from moekernels.ops import reference
from tests.generators import LayerInputs, LayerShape, layer_inputs


@dataclass
class Layer:
    shape: LayerShape
    x: LayerInputs
    logits: Tensor  # [T, E]

    @classmethod
    def random(
        cls, shape: LayerShape, num_tokens: int, dtype: torch.dtype, device: torch.device | str, seed: int = 0
    ) -> Layer:
        torch.manual_seed(seed)
        x = layer_inputs(shape, num_tokens, dtype, device)
        return cls(shape, x, torch.randn(num_tokens, shape.num_experts, device=device))

    def forward(self, capacity: int | None = None) -> Tensor:
        """Route, plan, sparse_mlp. -> [T, H]"""
        weights, expert_ids = ops.route(self.logits, self.shape.top_k)
        plan = ops.plan(expert_ids, self.shape.num_experts, capacity=capacity)
        return self._mlp(ops, self.x, weights, plan)

    def truth(self, capacity: int | None = None) -> Tensor:
        """The definition of the same in float64, on the CPU."""
        weights, expert_ids = reference.route(self.logits.cpu(), self.shape.top_k)
        plan = reference.plan(expert_ids, self.shape.num_experts, capacity=capacity)
        x = self.x.to(torch.float64)
        for name, value in vars(x).items():
            setattr(x, name, None if value is None else value.cpu())
        return self._mlp(reference, x, weights, plan)

    def error_scale(self) -> float:
        """A bound on rounding: half precision rounds the inner values and the outputs, float32 its long sums."""
        roundings = 64 if self.x.hidden.dtype == torch.float32 else 8
        return roundings * torch.finfo(self.x.hidden.dtype).eps * max(self.truth().abs().max().item(), 1.0)

    def _mlp(self, module: object, x: LayerInputs, weights: Tensor, plan: ops.Plan) -> Tensor:
        return module.sparse_mlp(  # type: ignore[attr-defined]
            x.hidden,
            weights,
            plan,
            x.up_weight,
            x.down_weight,
            up_bias=x.up_bias,
            down_bias=x.down_bias,
            activation=self.shape.activation,
            gated=self.shape.gated,
        )


# Small enough to be quick, wide enough for every path: 16-byte rows, several tiles and experts.
SHAPE = LayerShape("gpu", 512, 256, 16, 4)
UNGATED = LayerShape("gpu-ungated", 256, 384, 8, 2, activation="relu", gated=False, bias=True)
# One token: the path for few rows; 700 tokens: the tiled ones.
TOKENS = (1, 8, 40, 700)
