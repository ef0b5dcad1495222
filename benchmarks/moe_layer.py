"""One MoE layer after the routing (`ops.sparse_mlp`), at the real shapes, beside what a PyTorch user has today.

    python benchmarks/moe_layer.py --shapes olmoe-1b-7b --tokens 1 16 512 --dtypes bfloat16 --save out.json
    python benchmarks/moe_layer.py --device cuda --tokens 1 8 --with-routing

On a GPU up to 64 tokens are timed as a CUDA graph of several layers, each with other experts, as a model has them;
more tokens one call at a time, from a cold L2. Baselines: an eager loop over experts, torch._grouped_mm, a batched
matmul of as many FLOPs, and, where transformers 5 is installed, each of its experts implementations (if gated). With
the routing, which is that of the model the shape comes from, and transformers 4 installed, also its block of PhiMoE.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.baselines import eager_loop, grouped_mm_layer, transformers_4_block, transformers_experts, working
from benchmarks.harness import BOUND, Roofs, Row, machine, measure_roofs, name_of, render, save
from benchmarks.timing import Run, in_one_graph, interleaved_medians, make_clock
from moekernels import ops
from tests.generators import REAL_LAYERS, ROUTINGS, LayerInputs, LayerShape, layer_inputs

GRAPH_MAX_TOKENS = 64
GRAPH_LAYERS = 8


def router_logits(x: LayerInputs, shape: LayerShape) -> torch.Tensor:
    """Logits ``[T, E]`` from which the router makes the choices of `x`."""
    logits = torch.randn(x.hidden.shape[0], shape.num_experts, device=x.hidden.device)
    logits.scatter_(1, x.expert_ids.long(), 8.0 + torch.rand(x.expert_ids.shape, device=x.hidden.device))
    return logits.to(x.hidden.dtype)


def ours(x: LayerInputs, shape: LayerShape, logits: torch.Tensor | None = None) -> Run:
    """The layer from router logits on or, without any, from a plan made before."""
    fixed = ops.plan(x.expert_ids, shape.num_experts)

    def run() -> torch.Tensor:
        plan, expert_weights = fixed, x.expert_weights
        if logits is not None:
            expert_weights, expert_ids = ops.route(logits, shape.top_k, scoring=shape.scoring)
            plan = ops.plan(expert_ids, shape.num_experts)
        return ops.sparse_mlp(
            x.hidden,
            expert_weights,
            plan,
            x.up_weight,
            x.down_weight,
            up_bias=x.up_bias,
            down_bias=x.down_bias,
            activation=shape.activation,
            gated=shape.gated,
        )

    return run


def batched_matmul(x: LayerInputs, shape: LayerShape) -> Run:
    """As many FLOPs in two batched matmuls, every expert with the same number of rows: what BLAS can do."""
    rows = max(x.expert_ids.numel() // shape.num_experts, 1)
    a = torch.randn(shape.num_experts, rows, shape.hidden_size, device=x.hidden.device).to(x.hidden.dtype)
    b = torch.randn(shape.num_experts, rows, shape.ffn_size, device=x.hidden.device).to(x.hidden.dtype)
    up, down = x.up_weight.transpose(1, 2), x.down_weight.transpose(1, 2)
    return lambda: (torch.bmm(a, up), torch.bmm(b, down))


def as_other_layers(x: LayerInputs, shape: LayerShape, count: int) -> list[LayerInputs]:
    """The same weights met by other experts each time, so that one layer's weights do not serve the next from L2."""
    shifted = [(x.expert_ids + i * shape.top_k) % shape.num_experts for i in range(count)]
    return [replace(x, expert_ids=ids) for ids in shifted]


def work(x: LayerInputs, shape: LayerShape) -> tuple[float, float]:
    """FLOPs of the layer, and the bytes it must move: each touched expert's weights once, tokens in and out."""
    num_rows = x.expert_ids.numel()
    projections = 3 if shape.gated else 2
    flops = 2 * projections * num_rows * shape.hidden_size * shape.ffn_size
    touched = torch.unique(x.expert_ids).numel()
    element = x.hidden.element_size()
    weights = touched * projections * shape.hidden_size * shape.ffn_size * element
    return flops, weights + 2 * x.hidden.numel() * element


def check_agreement(contestants: dict[str, Run]) -> None:
    """All compute the same thing, up to the rounding of the dtype."""
    outputs = {name: run() for name, run in contestants.items()}
    (_, truth), *others = outputs.items()
    for name, out in others:
        torch.testing.assert_close(out, truth, rtol=0.1, atol=0.1, msg=lambda m, name=name: f"{name}: {m}")


def measure(
    shape: LayerShape, num_tokens: int, dtype: torch.dtype, routing: str, device: torch.device, roofs: Roofs,
    args: argparse.Namespace,
) -> Row:  # fmt: skip
    x = layer_inputs(shape, num_tokens, dtype, device, routing)
    contestants: dict[str, Run] = {"moekernels": ours(x, shape)}
    if args.baselines:
        others = {"eager loop": eager_loop(x, shape), **transformers_experts(x, shape)}
        if not shape.bias:
            others["torch grouped_mm"] = grouped_mm_layer(x, shape)
        contestants |= working(others, device)
        check_agreement(contestants)
        if num_tokens * shape.top_k >= shape.num_experts and routing == "uniform":
            contestants |= working({BOUND: batched_matmul(x, shape)}, device)

    logits = router_logits(x, shape) if args.with_routing else None
    contestants["moekernels"] = ours(x, shape, logits)
    if args.baselines and logits is not None:
        blocks = working(transformers_4_block(x, shape, logits), device)
        check_agreement({"moekernels": contestants["moekernels"], **blocks})
        contestants |= blocks
    clock = make_clock(device).name
    scale = dict.fromkeys(contestants, 1)
    if device.type == "cuda" and num_tokens <= GRAPH_MAX_TOKENS:
        layers = as_other_layers(x, shape, GRAPH_LAYERS)
        makers: dict[str, Callable[[LayerInputs], Run]] = {
            "moekernels": lambda y: ours(y, shape, router_logits(y, shape) if args.with_routing else None),
            "torch grouped_mm": lambda y: grouped_mm_layer(y, shape),
        }
        for name, make in makers.items():
            if name not in contestants:
                continue
            try:
                contestants[name] = in_one_graph([make(y) for y in layers], device)
                scale[name] = len(layers)
            except RuntimeError as error:
                if name == "moekernels":
                    raise
                print(f"  {name} cannot be captured: {str(error).partition(chr(10))[0][:150]}")
        clock = f"CUDA graph of {len(layers)} layers"
    medians = interleaved_medians(contestants, device, args.budget)
    medians = {name: seconds / scale[name] for name, seconds in medians.items()}
    seconds = medians.pop("moekernels")
    flops, num_bytes = work(x, shape)
    name = shape.name + (" with routing" if args.with_routing else "")
    roof = roofs.seconds(flops, num_bytes, dtype) / seconds
    return Row(name, num_tokens, routing, name_of(dtype), seconds, flops, num_bytes, roof, medians, clock)


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    shapes = {shape.name: shape for shape in REAL_LAYERS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=["olmoe-1b-7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["bfloat16"])
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["uniform"])
    parser.add_argument("--with-routing", action="store_true", help="time route and plan too")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of measuring per row")
    parser.add_argument("--save", type=Path, help="write the rows to this .json, and the table to an .md beside it")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")

    command = "python benchmarks/moe_layer.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    roofs, about = measure_roofs(args.device, dtypes), machine(args.device)
    rows = []
    for name in args.shapes:
        for dtype in dtypes:
            for routing in args.routing:
                for num_tokens in args.tokens:
                    row = measure(shapes[name], num_tokens, dtype, routing, args.device, roofs, args)
                    rows.append(row)
                    print(f"{row.shape} T={row.tokens} {row.dtype}: {row.seconds * 1e6:.1f} µs", file=sys.stderr)
                    if args.save:  # after every row, so that a run that is cut short leaves what it has
                        save(args.save, rows, roofs, about, command)
    print(render(rows, roofs, about))


if __name__ == "__main__":
    main()
