"""One MoE layer at the real shapes, or its kernels one by one, beside what a PyTorch user has today.

    python benchmarks/moe_layer.py --shapes olmoe-1b-7b --tokens 1 16 512 --dtypes bfloat16 --save out.json
    python benchmarks/moe_layer.py --device cuda --tokens 1 8 --with-routing
    python benchmarks/moe_layer.py --kernels all --tokens 1 8 512 8192
    python benchmarks/moe_layer.py --weights int4 nf4 int8 --tokens 1 8

It measures what `moekernels bench` does, for several models in one run, and saves after every row.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from moekernels.bench.kernels import KERNELS
from moekernels.bench.machine import machine
from moekernels.bench.quantized import FORMATS_TO_MAKE
from moekernels.bench.roofs import measure_roofs
from moekernels.bench.shapes import REAL_LAYERS, ROUTINGS
from moekernels.bench.sweep import BACKWARD_PARTS, Sweep
from moekernels.bench.table import Row, render, save


@torch.no_grad()
def main(arguments: Sequence[str] | None = None) -> None:
    shapes = {shape.name: shape for shape in REAL_LAYERS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=shapes, default=["olmoe-1b-7b"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 4, 16, 64, 512])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"], default=["bfloat16"])
    parser.add_argument("--routing", nargs="+", choices=ROUTINGS, default=["uniform"])
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--with-routing", action="store_true", help="time route and plan too")
    what.add_argument(
        "--kernels", nargs="+", choices=("all", *KERNELS, *BACKWARD_PARTS), help="not the layer; all: those forward"
    )
    what.add_argument(
        "--weights", nargs="+", choices=FORMATS_TO_MAKE, default=[], help="the layer with experts quantised to these"
    )
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--no-baselines", dest="baselines", action="store_false")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds of measuring per row")
    parser.add_argument("--save", type=Path, help="write the rows to this .json, and the table to an .md beside it")
    args = parser.parse_args(arguments)
    warnings.filterwarnings("ignore")

    command = "python benchmarks/moe_layer.py " + shlex.join(sys.argv[1:] if arguments is None else arguments)
    parts = args.kernels or ["layer-with-routing" if args.with_routing else "layer"]
    parts = KERNELS if "all" in parts else parts
    dtypes = [getattr(torch, name) for name in args.dtypes]
    roofs, about = measure_roofs(args.device, dtypes), machine(args.device)
    rows: list[Row] = []
    for shape in map(shapes.__getitem__, args.shapes):
        sweep = Sweep(
            shape, args.tokens, dtypes, args.routing, args.device, parts, args.budget,
            baselines=args.baselines, weights=args.weights, bounds=args.baselines, min_rounds=3,
        )  # fmt: skip
        for row in sweep.run(roofs):
            if not isinstance(row, Row):
                raise row
            rows.append(row)
            print(f"{row.shape} T={row.tokens} {row.dtype}: {row.seconds * 1e6:.1f} µs", file=sys.stderr)
            if args.save:  # after every row, so that a run that is cut short leaves what it has
                save(args.save, rows, roofs, about, command)
    print(render(rows, roofs, about))


if __name__ == "__main__":
    main()
