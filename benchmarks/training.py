"""One MoE layer after the routing forwards and backwards, at the real shapes, beside what a PyTorch user has today.

    python benchmarks/training.py --shapes olmoe-1b-7b --tokens 2048 --dtypes bfloat16 --save out.json
    python benchmarks/training.py --tokens 512 --frozen-experts --skip eager

A step is one forward and one backward pass with the gradients of the hidden states, the expert weights and, unless
they are frozen, the experts; the backward pass alone has a row of its own. Baselines as in moe_layer.py: an eager loop
over experts, torch._grouped_mm and, where transformers 5 is installed, each of its experts implementations (if gated).
Beside the times stand, per contestant, the memory kept between the two passes (all saved tensors but the parameters)
and the peak of a step above what was in use before, gradients included.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory import peak_bytes
from moekernels.bench.case import results
from moekernels.bench.check import Mismatch, disagreements
from moekernels.bench.clocks import Run, interleaved_medians, make_clock
from moekernels.bench.layer import baselines, ours
from moekernels.bench.machine import machine
from moekernels.bench.roofs import Roofs, measure_roofs, name_of
from moekernels.bench.shapes import REAL_LAYERS, ROUTINGS, LayerShape, layer_inputs
from moekernels.bench.table import Row, render, save
from moekernels.bench.training import as_backward, as_leaves, as_step, work


def kept_bytes(forward: Callable[[], Tensor], parameters: Sequence[Tensor | None]) -> int:
    """What a forward pass keeps for the backward pass, besides the parameters."""
    of_parameters = {p.untyped_storage().data_ptr() for p in parameters if p is not None}
    kept: dict[int, tuple[int, Tensor]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in of_parameters:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        forward()
    return sum(num_bytes for num_bytes, _ in kept.values())


def measure(
    shape: LayerShape, num_tokens: int, dtype: torch.dtype, routing: str, roofs: Roofs, args: argparse.Namespace
) -> tuple[list[Row], dict[str, tuple[int, int]]]:
    """The times of a step and of its backward pass as rows, and per contestant the bytes kept and at the peak."""
    x = layer_inputs(shape, num_tokens, dtype, args.device, routing)
    x, leaves = as_leaves(x, args.frozen_experts)
    direction = torch.randn_like(x.hidden)
    forwards: dict[str, Run] = {"moekernels": ours(x, shape)}
    if args.baselines:
        others = baselines(x, shape).items()
        forwards |= {name: run for name, run in others if not any(part in name for part in args.skip)}
    steps = {name: as_step(forward, leaves, direction) for name, forward in forwards.items()}
    outputs, failures = results(steps, args.device)
    failures |= disagreements(outputs)
    if failures:
        found = ", ".join(f"{name} {what}" for name, what in failures.items())
        raise Mismatch(f"{shape.name}, {num_tokens} tokens: {found}")
    steps = {name: steps[name] for name in outputs}
    del outputs
    memory = {
        name: (kept_bytes(forwards[name], leaves[2:]), peak_bytes(run, args.device)) for name, run in steps.items()
    }

    def row(name: str, contestants: dict[str, Run], flops: float, num_bytes: float) -> Row:
        medians = interleaved_medians(contestants, args.device, args.budget)
        seconds = medians.pop("moekernels")
        roof = roofs.seconds(flops, num_bytes, dtype) / seconds
        clock = make_clock(args.device).name
        return Row(name, num_tokens, routing, name_of(dtype), seconds, flops, num_bytes, roof, medians, clock)

    name = shape.name + (" frozen experts" if args.frozen_experts else "")
    rows = [row(name, steps, *work(x, shape, args.frozen_experts))]
    backward = {name: as_backward(forwards[name], leaves, direction) for name in steps}
    rows.append(row(f"{name} backward", backward, *work(x, shape, args.frozen_experts, forward=False)))
    return rows, memory


def render_memory(row: Row, memory: dict[str, tuple[int, int]]) -> str:
    lines = [
        f"{row.shape}, {row.tokens} tokens, {row.routing}, {row.dtype}",
        "",
        "| | kept for the backward pass MiB | peak of a step MiB |",
        "| --- | --- | --- |",
    ]
    for name, (kept, peak) in memory.items():
        lines.append(f"| {name} | {kept / 2**20:.1f} | {peak / 2**20:.1f} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    shapes = {shape.name: shape for shape in REAL_LAYERS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=["olmoe-1b-7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[512, 2048])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["bfloat16"])
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["uniform"])
    parser.add_argument("--frozen-experts", action="store_true", help="no gradients of the experts' weights and biases")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--skip", nargs="+", default=[], help="leave out baselines whose name holds one of these")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of measuring per row")
    parser.add_argument("--save", type=Path, help="write the rows to this .json, and the tables to an .md beside it")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")

    command = "python benchmarks/training.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    dtypes = [getattr(torch, name) for name in args.dtypes]
    roofs, about = measure_roofs(args.device, dtypes), machine(args.device)
    rows, tables = [], []
    for name in args.shapes:
        for dtype in dtypes:
            for routing in args.routing:
                for num_tokens in args.tokens:
                    measured, memory = measure(shapes[name], num_tokens, dtype, routing, roofs, args)
                    rows += measured
                    tables.append(render_memory(measured[0], memory))
                    for row in measured:
                        print(f"{row.shape} T={row.tokens} {row.dtype}: {row.seconds * 1e3:.1f} ms", file=sys.stderr)
                    if args.save:  # after every row, so that a run that is cut short leaves what it has
                        save(args.save, rows, roofs, about, command)
                        with args.save.with_suffix(".md").open("a") as file:
                            file.write("\n" + "\n\n".join(tables) + "\n")
    print(render(rows, roofs, about), *tables, sep="\n\n")


if __name__ == "__main__":
    main()
