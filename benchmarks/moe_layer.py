"""One MoE layer after the routing (`ops.sparse_mlp`), at the real shapes, beside what a PyTorch user has today.

    python benchmarks/moe_layer.py --shapes olmoe-1b-7b --tokens 1 16 512 --dtypes bfloat16 --save out.json

Baselines: an eager loop over experts, and, where transformers 5 is installed, each of its experts implementations that
runs on the device (gated layers only; `batched_mm` copies a weight per row, so it runs up to 16 tokens).
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.harness import Roofs, Row, interleaved_medians, machine, measure_roofs, name_of, render, save
from moekernels import ops
from tests.generators import REAL_LAYERS, ROUTINGS, LayerInputs, LayerShape, layer_inputs

BATCHED_MM_MAX_TOKENS = 16


def ours(x: LayerInputs, shape: LayerShape) -> Callable[[], torch.Tensor]:
    plan = ops.plan(x.expert_ids, shape.num_experts)
    return lambda: ops.sparse_mlp(
        x.hidden,
        x.expert_weights,
        plan,
        x.up_weight,
        x.down_weight,
        up_bias=x.up_bias,
        down_bias=x.down_bias,
        activation=shape.activation,
        gated=shape.gated,
    )


def eager_loop(x: LayerInputs, shape: LayerShape) -> Callable[[], torch.Tensor]:
    act = {"silu": torch.nn.functional.silu, "relu": torch.relu}[shape.activation]
    weights = x.expert_weights.to(x.hidden.dtype)

    def run() -> torch.Tensor:
        out = torch.zeros_like(x.hidden)
        for e in torch.unique(x.expert_ids).tolist():
            tokens, slots = (x.expert_ids == e).nonzero(as_tuple=True)
            y = torch.nn.functional.linear(
                x.hidden[tokens], x.up_weight[e], None if x.up_bias is None else x.up_bias[e]
            )
            y = act(y.chunk(2, -1)[0]) * y.chunk(2, -1)[1] if shape.gated else act(y)
            y = torch.nn.functional.linear(y, x.down_weight[e], None if x.down_bias is None else x.down_bias[e])
            out.index_add_(0, tokens, y * weights[tokens, slots, None])
        return out

    return run


def transformers_experts(x: LayerInputs, shape: LayerShape) -> dict[str, Callable[[], torch.Tensor]]:
    """Its experts module over the same weights, once per implementation."""
    try:
        from transformers import OlmoeConfig
        from transformers.models.olmoe.modeling_olmoe import OlmoeExperts
    except ImportError:
        return {}
    if not shape.gated:
        return {}
    names = ["eager", "grouped_mm"] + (["batched_mm"] if x.hidden.shape[0] <= BATCHED_MM_MAX_TOKENS else [])
    ids, weights = x.expert_ids.long(), x.expert_weights.to(x.hidden.dtype)
    contestants = {}
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
        experts.gate_up_proj = torch.nn.Parameter(x.up_weight, requires_grad=False)
        experts.down_proj = torch.nn.Parameter(x.down_weight, requires_grad=False)
        contestants[f"transformers {name}"] = lambda experts=experts: experts(x.hidden, ids, weights)
    return contestants


def work(x: LayerInputs, shape: LayerShape) -> tuple[float, float]:
    """FLOPs of the layer, and the bytes it must move: each touched expert's weights once, tokens in and out."""
    num_rows = x.expert_ids.numel()
    projections = 3 if shape.gated else 2
    flops = 2 * projections * num_rows * shape.hidden_size * shape.ffn_size
    touched = torch.unique(x.expert_ids).numel()
    element = x.hidden.element_size()
    weights = touched * projections * shape.hidden_size * shape.ffn_size * element
    return flops, weights + 2 * x.hidden.numel() * element


def measure(shape: LayerShape, num_tokens: int, dtype: torch.dtype, routing: str, device: torch.device, roofs: Roofs,
            baselines: bool, budget: float) -> Row:  # fmt: skip
    x = layer_inputs(shape, num_tokens, dtype, device, routing)
    contestants = {"moekernels": ours(x, shape)}
    if baselines:
        contestants |= {"eager loop": eager_loop(x, shape), **transformers_experts(x, shape)}
        truth = contestants["eager loop"]()
        for name, run in contestants.items():
            torch.testing.assert_close(run(), truth, rtol=0.1, atol=0.1, msg=lambda m, name=name: f"{name}: {m}")
    medians = interleaved_medians(contestants, device, budget)
    seconds = medians.pop("moekernels")
    flops, num_bytes = work(x, shape)
    fastest_possible = max(flops / roofs.matmul[name_of(dtype)], num_bytes / roofs.read_bandwidth)
    return Row(
        shape.name, num_tokens, routing, name_of(dtype), seconds, flops, num_bytes, fastest_possible / seconds, medians
    )


@torch.no_grad()
def main() -> None:
    shapes = {shape.name: shape for shape in REAL_LAYERS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=["olmoe-1b-7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["bfloat16"])
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["uniform"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--no-baselines", action="store_true")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of measuring per row")
    parser.add_argument("--save", type=Path, help="write the rows to this .json, and the table to an .md beside it")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    dtypes = [getattr(torch, name) for name in args.dtypes]
    roofs, about = measure_roofs(args.device, dtypes), machine(args.device)
    rows = []
    for name in args.shapes:
        for dtype in dtypes:
            for routing in args.routing:
                for num_tokens in args.tokens:
                    row = measure(
                        shapes[name], num_tokens, dtype, routing, args.device, roofs, not args.no_baselines, args.budget
                    )
                    rows.append(row)
                    print(f"{row.shape} T={row.tokens} {row.dtype}: {row.seconds * 1e6:.0f} µs", file=sys.stderr)
    print(render(rows, roofs, about))
    if args.save:
        save(args.save, rows, roofs, about, "python benchmarks/moe_layer.py " + shlex.join(sys.argv[1:]))


if __name__ == "__main__":
    main()
