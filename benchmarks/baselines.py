"""What a PyTorch user has today for one MoE layer after the routing, each as a function without arguments."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.timing import Run
from moekernels import ops
from tests.generators import LayerInputs, LayerShape

BATCHED_MM_MAX_TOKENS = 16  # transformers' batched_mm copies a weight per row

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": torch.nn.functional.silu, "relu": torch.relu}


def activate(y: Tensor, shape: LayerShape) -> Tensor:
    act = ACTIVATIONS[shape.activation]
    if not shape.gated:
        return act(y)
    gate, value = y.chunk(2, dim=-1)
    return act(gate) * value


def eager_loop(x: LayerInputs, shape: LayerShape) -> Run:
    weights = x.expert_weights.to(x.hidden.dtype)

    def run() -> Tensor:
        out = torch.zeros_like(x.hidden)
        for e in torch.unique(x.expert_ids).tolist():
            tokens, slots = (x.expert_ids == e).nonzero(as_tuple=True)
            y = torch.nn.functional.linear(
                x.hidden[tokens], x.up_weight[e], None if x.up_bias is None else x.up_bias[e]
            )
            y = activate(y, shape)
            y = torch.nn.functional.linear(y, x.down_weight[e], None if x.down_bias is None else x.down_bias[e])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out

    return run


def grouped_mm_layer(x: LayerInputs, shape: LayerShape) -> Run:
    """torch._grouped_mm twice, on rows gathered in expert order; no host synchronisation. Without biases only."""
    plan = ops.plan(x.expert_ids, shape.num_experts)
    token_of_row = plan.token_of_row.long()
    row_of_slot = plan.row_of_slot.long()
    ends = plan.expert_offsets[1:]
    up, down = x.up_weight.transpose(1, 2), x.down_weight.transpose(1, 2)
    weights = x.expert_weights.to(x.hidden.dtype).unsqueeze(-1)

    def run() -> Tensor:
        inner = activate(torch._grouped_mm(x.hidden[token_of_row], up, offs=ends), shape)
        rows = torch._grouped_mm(inner, down, offs=ends)
        return (rows[row_of_slot] * weights).sum(1)

    return run


def transformers_experts(x: LayerInputs, shape: LayerShape) -> dict[str, Run]:
    """The experts module of transformers 5 over the same weights, once per implementation; gated layers only."""
    try:
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
    except ImportError:
        return {}
    if not shape.gated:
        return {}
    names = ["eager", "grouped_mm"] + (["batched_mm"] if x.hidden.shape[0] <= BATCHED_MM_MAX_TOKENS else [])
    ids, weights = x.expert_ids.long(), x.expert_weights.to(x.hidden.dtype)
    contestants: dict[str, Run] = {}
    for name in names:
        config = OlmoeConfig(
            hidden_size=shape.hidden_size,
            intermediate_size=shape.ffn_size,
            num_experts=shape.num_experts,
            hidden_act=shape.activation,
        )
        config._experts_implementation = name
        with torch.device("meta"):
            experts = OlmoeExperts(config)
        # The tensors themselves and no parameters of them, so that gradients reach the inputs.
        for parameter, weight in (("gate_up_proj", x.up_weight), ("down_proj", x.down_weight)):
            delattr(experts, parameter)
            setattr(experts, parameter, weight)
        contestants[f"transformers {name}"] = lambda experts=experts: experts(x.hidden, ids, weights)
    return contestants


def transformers_4_block(x: LayerInputs, shape: LayerShape, logits: Tensor) -> dict[str, Run]:
    """PhiMoE's block of transformers 4, from router logits on, over the same weights; of its shape only."""
    try:
        from transformers import PhimoeConfig
        from transformers.models.phimoe.modeling_phimoe import PhimoeBlockSparseTop2MLP, PhimoeSparseMoeBlock
    except ImportError:
        return {}
    if shape.scoring != "sparsemixer":
        return {}
    config = PhimoeConfig(
        hidden_size=shape.hidden_size, intermediate_size=shape.ffn_size, num_local_experts=shape.num_experts
    )
    with torch.device("meta"):
        block = PhimoeSparseMoeBlock(config).eval()
    block.gate = _Given(logits)
    for e, expert in enumerate(block.experts):
        assert isinstance(expert, PhimoeBlockSparseTop2MLP)
        weights = (*x.up_weight[e].chunk(2), x.down_weight[e])
        for linear, weight in zip((expert.w1, expert.w3, expert.w2), weights, strict=True):
            linear.weight = torch.nn.Parameter(weight, requires_grad=False)
    return {"transformers 4 block": lambda: block(x.hidden[None])[0][0]}


class _Given(torch.nn.Module):
    """A layer whose output is known."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, hidden: Tensor) -> Tensor:
        return self.out


def working(contestants: dict[str, Run], device: torch.device) -> dict[str, Run]:
    """Those that run here: an implementation may lack a dtype, a device or a shape."""
    found: dict[str, Run] = {}
    for name, run in contestants.items():
        try:
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        except (RuntimeError, NotImplementedError, ValueError) as error:
            print(f"  without {name}: {str(error).partition(chr(10))[0][:150]}")
        else:
            found[name] = run
    return found
