"""The experts of models that only transformers has, at their real sizes, as transformers stores and computes them.

All contestants read the weights of one module of transformers, filled with random numbers: its own implementations,
and our ops in the order in which the drop-in calls them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn

from moekernels import ops
from moekernels.bench.clocks import Run, interleaved_medians
from moekernels.bench.roofs import reading
from moekernels.bench.shapes import uniform_ids

OURS = "moekernels"
BATCHED_MM_MAX_TOKENS = 16  # transformers' batched_mm copies a weight per row
# How far from the loop of the class, relative to the largest value.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass(frozen=True)
class ModelExperts:
    """One layer's experts of a model of transformers.

    Attributes:
        path: of the class in `transformers.models`.
        config: of the configuration, by its own names; `num_experts` takes the place of what `counts` names.
        transposed: whether the stacks are ``[E, in, out]``.
    """

    name: str
    path: str
    config_class: str
    config: Mapping[str, Any] = field(hash=False)
    counts: str
    num_experts: int
    top_k: int
    hidden_size: int
    ffn_size: int
    activation: str | ops.Swiglu
    gated: bool = True
    transposed: bool = False

    def __str__(self) -> str:
        kind = f"{self.activation}{', gated' if self.gated else ''}{', stored [E, in, out]' if self.transposed else ''}"
        return (
            f"{self.name}: hidden size {self.hidden_size}, {self.num_experts} experts of {self.ffn_size} ({kind}), "
            f"{self.top_k} per token"
        )

    def with_experts(self, count: int) -> ModelExperts:
        """The same layer with fewer of its experts."""
        if not self.top_k <= count <= self.num_experts:
            raise ValueError(f"--experts must be between {self.top_k} and {self.num_experts}, got {count}")
        return replace(self, num_experts=count)

    def num_bytes(self, dtype: torch.dtype) -> int:
        return self.num_experts * self.hidden_size * self.ffn_size * (3 if self.gated else 2) * dtype.itemsize


GPT_OSS_20B = ModelExperts(
    "gpt-oss-20b", "gpt_oss.modeling_gpt_oss.GptOssExperts", "GptOssConfig",
    {"hidden_size": 2880, "intermediate_size": 2880}, "num_local_experts", 32, 4, 2880, 2880,
    ops.Swiglu(1.702, 7.0, 1.0, interleaved=True), transposed=True,
)  # fmt: skip
DEEPSEEK_V4 = ModelExperts(
    "deepseek-v4", "deepseek_v4.modeling_deepseek_v4.DeepseekV4Experts", "DeepseekV4Config",
    {"hidden_size": 4096, "moe_intermediate_size": 2048, "swiglu_limit": 10.0}, "n_routed_experts", 256, 6, 4096, 2048,
    ops.Swiglu(limit=10.0),
)  # fmt: skip
NEMOTRON_H = ModelExperts(
    "nemotron-h", "nemotron_h.modeling_nemotron_h.NemotronHExperts", "NemotronHConfig",
    {"hidden_size": 2688, "moe_intermediate_size": 1856, "mlp_hidden_act": "relu2"}, "n_routed_experts", 128, 6,
    2688, 1856, "relu2", gated=False,
)  # fmt: skip
MODELS = {model.name: model for model in (GPT_OSS_20B, DEEPSEEK_V4, NEMOTRON_H)}


@dataclass(frozen=True)
class ExpertsRow:
    """Median seconds of every contestant, which take turns.

    Attributes:
        reading: the same of reading the weights of the chosen experts, and nothing else.
        error: how far ours is from the loop of the class, relative to its largest value.
    """

    tokens: int
    dtype: str
    seconds: Mapping[str, float]
    reading: float
    error: float

    @property
    def speedup(self) -> float:
        """Over the fastest of transformers."""
        return min(value for name, value in self.seconds.items() if name != OURS) / self.seconds[OURS]


def make_experts(model: ModelExperts, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """The module of transformers, with random weights that keep activations of order one.

    Raises:
        ImportError: there is no transformers with that model.
    """
    path, _, name = model.path.rpartition(".")
    try:
        experts_class = getattr(import_module(f"transformers.models.{path}"), name)
        config_class = getattr(import_module("transformers"), model.config_class)
    except (ImportError, AttributeError) as error:
        raise ImportError(f"--model {model.name} needs a transformers that has {name} (5.24 does)") from error
    config = config_class(**{**model.config, model.counts: model.num_experts})
    with torch.device("meta"):
        experts: nn.Module = experts_class(config)
    experts = experts.to(dtype).to_empty(device=device).requires_grad_(False)
    for parameter in experts.parameters():
        fan_in = parameter.shape[-2 if model.transposed else -1] if parameter.dim() == 3 else 1
        for part in parameter:
            part.copy_(torch.randn(part.shape, device=device) * fan_in**-0.5)
    return experts


def contestants(experts: Any, model: ModelExperts, hidden: Tensor, ids: Tensor, weights: Tensor) -> dict[str, Run]:
    """Ours, and the implementations of transformers."""

    def theirs(implementation: str) -> Run:
        def run() -> Tensor:
            experts.config._experts_implementation = implementation
            out: Tensor = experts(hidden, ids, weights)
            return out

        return run

    names = ["eager", "grouped_mm"] + (["batched_mm"] if hidden.shape[0] <= BATCHED_MM_MAX_TOKENS else [])
    return {OURS: _ours(experts, model, hidden, ids, weights), **{name: theirs(name) for name in names}}


def _ours(experts: Any, model: ModelExperts, hidden: Tensor, ids: Tensor, weights: Tensor) -> Run:
    up_name = "gate_up_proj" if model.gated else "up_proj"
    up, down = getattr(experts, up_name), experts.down_proj
    up_bias, down_bias = (getattr(experts, f"{name}_bias", None) for name in (up_name, "down_proj"))
    between: dict[str, Any] = {"activation": model.activation, "gated": model.gated}

    def run() -> Tensor:
        plan = ops.plan(ids.int(), model.num_experts)
        if not model.transposed:
            return ops.sparse_mlp(
                hidden, weights.float(), plan, up, down, up_bias=up_bias, down_bias=down_bias, **between
            )
        rows = ops.permute(hidden, plan.token_of_row, plan.row_of_slot)
        rows = ops.grouped_gemm(rows, up, plan.expert_offsets, bias=up_bias, transposed=True, **between)
        rows = ops.grouped_gemm(rows, down, plan.expert_offsets, bias=down_bias, transposed=True)
        return ops.unpermute(rows, plan.row_of_slot, weights.float())

    return run


def measure(experts: nn.Module, model: ModelExperts, tokens: int, budget: float) -> ExpertsRow:
    """One row of the table, on random tokens that are routed uniformly."""
    parameter = next(experts.parameters())
    dtype, device = parameter.dtype, parameter.device
    hidden = torch.randn(tokens, model.hidden_size, device=device).to(dtype)
    ids = uniform_ids(tokens, model.num_experts, model.top_k, device).long()
    weights = torch.randn(tokens, model.top_k, device=device).softmax(dim=-1).to(dtype)
    runs = contestants(experts, model, hidden, ids, weights)
    ours, expected = (runs[name]() for name in (OURS, "eager"))
    assert isinstance(ours, Tensor) and isinstance(expected, Tensor)
    error = ((ours.float() - expected.float()).abs().max() / expected.float().abs().max()).item()
    probe = reading(replace(model, num_experts=len(ids.unique())).num_bytes(dtype), device)
    seconds = interleaved_medians({**runs, "": probe.run}, device, budget)
    read = seconds.pop("") / probe.times
    return ExpertsRow(tokens, str(dtype).removeprefix("torch."), seconds, read, error)
