"""Shapes and inputs for tests and benchmarks: the real layers, the ugly edges, and skewed routing."""

from __future__ import annotations

from dataclasses import dataclass

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


OLMOE = LayerShape("olmoe-1b-7b", 2048, 1024, 64, 8)
PHIMOE = LayerShape("phi-3.5-moe", 4096, 6400, 16, 2, scoring="sparsemixer")
NLLB_MOE = LayerShape(
    "nllb-moe-54b", 2048, 8192, 128, 2, activation="relu", gated=False, bias=True, scoring="top2_gate"
)
SWITCH_BASE_8 = LayerShape("switch-base-8", 768, 3072, 8, 1, activation="relu", gated=False)
REAL_LAYERS = (OLMOE, PHIMOE, NLLB_MOE, SWITCH_BASE_8)

# Odd sizes, one expert, more experts than tokens, sizes below a vector: each breaks a different shortcut.
SMALL_LAYERS = (
    LayerShape("even", 64, 32, 8, 2),
    LayerShape("odd", 37, 19, 5, 3, activation="gelu"),
    LayerShape("one-expert", 16, 24, 1, 1, activation="gelu_tanh", bias=True),
    LayerShape("many-experts", 40, 8, 96, 4),
    LayerShape("ungated", 72, 51, 6, 2, activation="relu", gated=False, bias=True),
    LayerShape("tiny", 1, 1, 3, 2, activation="none", gated=False),
    LayerShape("wide", 520, 264, 4, 2),
)


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
    expert_weights: Tensor  # [T, K] float32
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
            self.expert_weights.detach(),
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
    up_features = shape.ffn_size * (2 if shape.gated else 1)

    def randn(*sizes: int, scale: float = 1.0) -> Tensor:
        return (torch.randn(*sizes, device=device) * scale).to(dtype)

    return LayerInputs(
        hidden=randn(num_tokens, shape.hidden_size),
        expert_ids=ROUTINGS[routing](num_tokens, shape.num_experts, shape.top_k, device),
        expert_weights=torch.softmax(torch.randn(num_tokens, shape.top_k, device=device), dim=-1),
        up_weight=randn(shape.num_experts, up_features, shape.hidden_size, scale=shape.hidden_size**-0.5),
        down_weight=randn(shape.num_experts, shape.hidden_size, shape.ffn_size, scale=shape.ffn_size**-0.5),
        up_bias=randn(shape.num_experts, up_features) if shape.bias else None,
        down_bias=randn(shape.num_experts, shape.hidden_size) if shape.bias else None,
    )
