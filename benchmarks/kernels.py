"""Every op alone, at the sizes it has in a layer, beside the same step in plain PyTorch.

    python benchmarks/kernels.py --shapes olmoe-1b-7b --tokens 16 512
    python benchmarks/kernels.py --device cuda --tokens 1 8 512 8192 --save benchmarks/results/kernels.json

Timed one call at a time, on a GPU from a cold L2. The roof of route, plan, permute and unpermute is bandwidth for what
they must read and write; that of the grouped GEMMs is the nearer of bandwidth and matmul rate.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.baselines import activate, working
from benchmarks.harness import BOUND, Roofs, Row, machine, measure_roofs, name_of, render, save
from benchmarks.timing import Run, interleaved_medians, make_clock
from moekernels import ops
from tests.generators import REAL_LAYERS, ROUTINGS, LayerInputs, LayerShape, layer_inputs

KERNELS = ("route", "plan", "permute", "unpermute", "up", "down")
# The gradients of a projection's rows and of its weight.
BACKWARD = ("up-rows-grad", "up-weight-grad", "down-rows-grad", "down-weight-grad")


@dataclass
class Case:
    """One kernel at one size: `ours` and others that compute the same, with the work it cannot avoid."""

    kernel: str
    ours: Run
    baselines: dict[str, Run]
    bytes: float
    flops: float = 0.0
    bounds: dict[str, Run] = field(default_factory=dict)  # as much work, another result


def size_of(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def routing_cases(x: LayerInputs, shape: LayerShape) -> Iterator[Case]:
    num_tokens, top_k = x.expert_ids.shape
    num_rows, experts = num_tokens * top_k, shape.num_experts
    logits = torch.randn(num_tokens, experts, device=x.hidden.device)
    yield Case(
        "route",
        lambda: ops.route(logits, top_k),
        {"torch": lambda: torch.softmax(logits, -1).topk(top_k)},
        size_of(logits) + 8 * num_rows,
    )

    def torch_plan() -> tuple[Tensor, Tensor, Tensor]:
        ids = x.expert_ids.flatten()
        order = torch.argsort(ids, stable=True)
        ends = torch.bincount(ids, minlength=experts).cumsum(0)
        return (
            ends,
            order // top_k,
            torch.empty_like(order).scatter_(0, order, torch.arange(num_rows, device=ids.device)),
        )

    plan_bytes = 3 * 4 * num_rows + 4 * (experts + 1)
    yield Case("plan", lambda: ops.plan(x.expert_ids, experts), {"torch": torch_plan}, plan_bytes)


def movement_cases(x: LayerInputs, shape: LayerShape) -> Iterator[Case]:
    plan = ops.plan(x.expert_ids, shape.num_experts)
    token_of_row, row_of_slot = plan.token_of_row.long(), plan.row_of_slot.long()
    rows = ops.permute(x.hidden, plan.token_of_row)
    yield Case(
        "permute",
        lambda: ops.permute(x.hidden, plan.token_of_row),
        {"torch": lambda: x.hidden[token_of_row]},
        size_of(x.hidden, rows, plan.token_of_row),
    )
    weights = x.expert_weights.to(rows.dtype).unsqueeze(-1)
    yield Case(
        "unpermute",
        lambda: ops.unpermute(rows, plan.row_of_slot, x.expert_weights),
        {"torch": lambda: (rows[row_of_slot] * weights).sum(1)},
        size_of(rows, x.hidden, plan.row_of_slot, x.expert_weights),
    )


def batched_matmul(weight: Tensor, num_rows: int) -> Run:
    """A product [E, rows, K] x [E, K, M] of as many FLOPs, every expert with the same number of rows."""
    a = torch.randn(weight.shape[0], num_rows // weight.shape[0], weight.shape[2], device=weight.device)
    a, b = a.to(weight.dtype), weight.transpose(1, 2)
    return lambda: torch.bmm(a, b)


def gemm_cases(x: LayerInputs, shape: LayerShape) -> Iterator[Case]:
    plan = ops.plan(x.expert_ids, shape.num_experts)
    num_rows, touched = x.expert_ids.numel(), torch.unique(x.expert_ids).numel()
    token_of_row, ends = plan.token_of_row.long(), plan.expert_offsets[1:]
    inner = torch.randn(num_rows, shape.ffn_size, device=x.hidden.device).to(x.hidden.dtype)

    def case(kernel: str, ours: Run, torch_run: Run, weight: Tensor, num_bytes: int) -> Case:
        found = Case(kernel, ours, {}, num_bytes + touched * size_of(weight[0]))
        found.flops = 2.0 * num_rows * weight.shape[1] * weight.shape[2]
        if not shape.bias:
            found.baselines["torch grouped_mm"] = torch_run
        if num_rows >= shape.num_experts:
            found.bounds[BOUND] = batched_matmul(weight, num_rows)
        return found

    def up() -> Tensor:
        return ops.grouped_gemm(
            x.hidden,
            x.up_weight,
            plan.expert_offsets,
            bias=x.up_bias,
            activation=shape.activation,
            gated=shape.gated,
            token_of_row=plan.token_of_row,
        )

    def torch_up() -> Tensor:
        rows = torch._grouped_mm(x.hidden[token_of_row], x.up_weight.transpose(1, 2), offs=ends)
        return activate(rows, shape)

    def down() -> Tensor:
        return ops.grouped_gemm(inner, x.down_weight, plan.expert_offsets, bias=x.down_bias)

    def torch_down() -> Tensor:
        return torch._grouped_mm(inner, x.down_weight.transpose(1, 2), offs=ends)

    yield case("up", up, torch_up, x.up_weight, size_of(x.hidden, inner))
    rows_bytes = num_rows * shape.hidden_size * x.hidden.element_size()
    yield case("down", down, torch_down, x.down_weight, size_of(inner) + rows_bytes)


def backward_cases(x: LayerInputs, shape: LayerShape) -> Iterator[Case]:
    plan = ops.plan(x.expert_ids, shape.num_experts)
    num_rows, touched = x.expert_ids.numel(), torch.unique(x.expert_ids).numel()
    offsets, ends = plan.expert_offsets, plan.expert_offsets[1:]
    inner = torch.randn(num_rows, shape.ffn_size, device=x.hidden.device).to(x.hidden.dtype)
    for name, weight, rows, token_of_row in (
        ("up", x.up_weight, x.hidden, plan.token_of_row),
        ("down", x.down_weight, inner, None),
    ):
        grad_rows = torch.randn(num_rows, weight.shape[1], device=weight.device).to(weight.dtype)
        flops = 2.0 * num_rows * weight.shape[1] * weight.shape[2]
        bounds = {BOUND: batched_matmul(weight, num_rows)} if num_rows >= shape.num_experts else {}

        def rows_grad(grad_rows: Tensor = grad_rows, weight: Tensor = weight) -> Tensor:
            return ops.grouped_gemm(grad_rows, weight, offsets, transposed=True)

        def torch_rows_grad(grad_rows: Tensor = grad_rows, weight: Tensor = weight) -> Tensor:
            return torch._grouped_mm(grad_rows, weight, offs=ends)

        def weight_grad(
            grad_rows: Tensor = grad_rows, rows: Tensor = rows, token_of_row: Tensor | None = token_of_row
        ) -> Tensor:
            return ops.grouped_weight_grad(grad_rows, rows, offsets, token_of_row=token_of_row)[0]

        def torch_weight_grad(
            grad_rows: Tensor = grad_rows, rows: Tensor = rows, token_of_row: Tensor | None = token_of_row
        ) -> Tensor:
            in_order = rows if token_of_row is None else rows[token_of_row.long()]
            return torch._grouped_mm(grad_rows.T, in_order, offs=ends)

        out_bytes = num_rows * weight.shape[2] * weight.element_size()
        read = size_of(grad_rows) + touched * size_of(weight[0])
        yield Case(
            f"{name}-rows-grad", rows_grad, {"torch grouped_mm": torch_rows_grad}, read + out_bytes, flops, bounds
        )
        moved = size_of(grad_rows, rows, weight)
        yield Case(f"{name}-weight-grad", weight_grad, {"torch grouped_mm": torch_weight_grad}, moved, flops, bounds)


def cases(x: LayerInputs, shape: LayerShape, kernels: Sequence[str]) -> Iterator[Case]:
    for make, names in (
        (routing_cases, KERNELS[:2]),
        (movement_cases, KERNELS[2:4]),
        (gemm_cases, KERNELS[4:]),
        (backward_cases, BACKWARD),
    ):
        if set(names) & set(kernels):
            yield from (case for case in make(x, shape) if case.kernel in kernels)


def measure(case: Case, shape: LayerShape, x: LayerInputs, routing: str, roofs: Roofs, budget: float) -> Row:
    device, dtype = x.hidden.device, x.hidden.dtype
    contestants = {"moekernels": case.ours, **working({**case.baselines, **case.bounds}, device)}
    medians = interleaved_medians(contestants, device, budget)
    seconds = medians.pop("moekernels")
    roof = roofs.seconds(case.flops, case.bytes, dtype) / seconds
    return Row(f"{shape.name} {case.kernel}", x.hidden.shape[0], routing, name_of(dtype), seconds, case.flops,
               case.bytes, roof, medians, make_clock(device).name)  # fmt: skip


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    shapes = {shape.name: shape for shape in REAL_LAYERS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kernels", nargs="+", choices=KERNELS + BACKWARD, default=KERNELS)
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=["olmoe-1b-7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["bfloat16"])
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["uniform"])
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of measuring per row")
    parser.add_argument("--save", type=Path, help="write the rows to this .json, and the table to an .md beside it")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")

    command = "python benchmarks/kernels.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    roofs, about = measure_roofs(args.device, dtypes), machine(args.device)
    rows: list[Row] = []
    for name in args.shapes:
        for dtype in dtypes:
            for routing in args.routing:
                for num_tokens in args.tokens:
                    x = layer_inputs(shapes[name], num_tokens, dtype, args.device, routing)
                    for case in cases(x, shapes[name], args.kernels):
                        rows.append(measure(case, shapes[name], x, routing, roofs, args.budget))
                        print(f"{rows[-1].shape} T={num_tokens}: {rows[-1].seconds * 1e6:.1f} µs", file=sys.stderr)
                        if args.save:  # after every row, so that a run that is cut short leaves what it has
                            save(args.save, rows, roofs, about, command)
    print(render(rows, roofs, about))


if __name__ == "__main__":
    main()
