"""Shapes and inputs: the layers of real models, uniform and skewed routing, random weights."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class LayerShape:
    """One MoE layer: H hidden size, F expert size, E experts, K choices per token, and the rule that makes them."""

    name: str
    hidden_size: int
    ffn_size: int
    num_experts: int
    top_k: int
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    scoring: str = "softmax"

    def __str__(self) -> str:
        return self.name

    @property
    def up_features(self) -> int:
        """Rows of an expert's up-projection."""
        return self.ffn_size * (2 if self.gated else 1)

    @property
    def expert_size(self) -> int:
        """Weights of an expert, without biases."""
        return (self.up_features + self.ffn_size) * self.hidden_size


OLMOE = LayerShape("olmoe-1b-7b", 2048, 1024, 64, 8)
PHIMOE = LayerShape("phi-3.5-moe", 4096, 6400, 16, 2, scoring="sparsemixer")
NLLB_MOE = LayerShape(
    "nllb-moe-54b", 2048, 8192, 128, 2, activation="relu", gated=False, bias=True, scoring="top2_gate"
)
SWITCH_BASE_8 = LayerShape("switch-base-8", 768, 3072, 8, 1, activation="relu", gated=False)
REAL_LAYERS = (OLMOE, PHIMOE, NLLB_MOE, SWITCH_BASE_8)


def uniform_ids(num_tokens: int, num_experts: int, top_k: int, device: torch.device | str = "cpu") -> Tensor:
    """Distinct experts per token, all equally likely. -> [T, K] int32"""
    return torch.rand(num_tokens, num_experts, device=device).argsort(dim=-1)[:, :top_k].int()


def zipf_ids(num_tokens: int, num_experts: int, top_k: int, device: torch.device | str = "cpu") -> Tensor:
    """Distinct experts per token, expert e drawn with weight 1 / (e + 1). -> [T, K] int32"""
    weights = 1.0 / torch.arange(1, num_experts + 1, device=device, dtype=torch.float32)
    return (
        torch.multinomial(weights.expand(num_tokens, -1), top_k).int()
        if num_tokens
        else uniform_ids(0, num_experts, top_k, device)
    )


def one_expert_ids(num_tokens: int, num_experts: int, top_k: int, device: torch.device | str = "cpu") -> Tensor:
    """Every token makes the same choices, beginning with the last expert. -> [T, K] int32"""
    return torch.arange(num_experts - 1, num_experts - 1 - top_k, -1, device=device).int().repeat(num_tokens, 1)


ROUTINGS = {"uniform": uniform_ids, "zipf": zipf_ids, "one-expert": one_expert_ids}


@dataclass
class LayerInputs:
    hidden: Tensor  # [T, H]
    expert_ids: Tensor  # [T, K] int32
    routing_weights: Tensor  # [T, K] float32
    up_weight: Tensor  # [E, 2F or F, H]
    down_weight: Tensor  # [E, H, F]
    up_bias: Tensor | None
    down_bias: Tensor | None

    def to(self, dtype: torch.dtype) -> LayerInputs:
        """New leaves: the floating-point tensors in another dtype, the routing weights as they are."""

        def cast(x: Tensor | None) -> Tensor | None:
            return None if x is None else x.detach().to(dtype)

        return LayerInputs(
            self.hidden.detach().to(dtype),
            self.expert_ids,
            self.routing_weights.detach(),
            self.up_weight.detach().to(dtype),
            self.down_weight.detach().to(dtype),
            cast(self.up_bias),
            cast(self.down_bias),
        )


def layer_inputs(
    shape: LayerShape,
    num_tokens: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    routing: str = "uniform",
) -> LayerInputs:
    """Random inputs scaled so that activations stay of order one."""
    experts, hidden, ffn, up = shape.num_experts, shape.hidden_size, shape.ffn_size, shape.up_features

    def stack(*sizes: int, scale: float = 1.0) -> Tensor:
        """Filled expert by expert: a layer may be too large to be there in float32 as well."""
        out = torch.empty(experts, *sizes, dtype=dtype, device=device)
        for part in out:
            part.copy_(torch.randn(*sizes, device=device) * scale)
        return out

    weights = LayerInputs(
        hidden=torch.empty(0, hidden, dtype=dtype, device=device),
        expert_ids=torch.empty(0, shape.top_k, dtype=torch.int32, device=device),
        routing_weights=torch.empty(0, shape.top_k, device=device),
        up_weight=stack(up, hidden, scale=hidden**-0.5),
        down_weight=stack(hidden, ffn, scale=ffn**-0.5),
        up_bias=stack(up) if shape.bias else None,
        down_bias=stack(hidden) if shape.bias else None,
    )
    return with_tokens(weights, shape, num_tokens, routing)


def with_tokens(x: LayerInputs, shape: LayerShape, num_tokens: int, routing: str = "uniform") -> LayerInputs:
    """The same weights, and other random tokens."""
    device = x.hidden.device
    return replace(
        x,
        hidden=torch.randn(num_tokens, shape.hidden_size, device=device).to(x.hidden.dtype),
        expert_ids=ROUTINGS[routing](num_tokens, shape.num_experts, shape.top_k, device),
        routing_weights=torch.softmax(torch.randn(num_tokens, shape.top_k, device=device), dim=-1),
    )


def router_logits(x: LayerInputs, shape: LayerShape, dtype: torch.dtype | None = None) -> Tensor:
    """Logits ``[T, E]`` from which a router makes the choices of `x`; in the dtype of `x` if none is given."""
    logits = torch.randn(x.hidden.shape[0], shape.num_experts, device=x.hidden.device)
    logits.scatter_(1, x.expert_ids.long(), 8.0 + torch.rand(x.expert_ids.shape, device=x.hidden.device))
    return logits.to(dtype or x.hidden.dtype)
