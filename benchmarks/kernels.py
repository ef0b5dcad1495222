"""Every op alone, at the sizes it has in a layer, beside the same step in plain PyTorch.

    python benchmarks/kernels.py --shapes olmoe-1b-7b --tokens 16 512
    python benchmarks/kernels.py --device cuda --tokens 1 8 512 8192 --save benchmarks/results/kernels.json

See moekernels.bench.kernels and moekernels.bench.backward for what is timed. `moekernels bench` shows the same for one
model at a time.
"""

from __future__ import annotations

import argparse
import shlex
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch

from moekernels.bench import backward, kernels
from moekernels.bench.backward import BACKWARD
from moekernels.bench.case import measure
from moekernels.bench.kernels import KERNELS
from moekernels.bench.machine import machine
from moekernels.bench.roofs import measure_roofs
from moekernels.bench.shapes import REAL_LAYERS, ROUTINGS, layer_inputs, with_tokens
from moekernels.bench.table import Row, render, save


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
    for shape in map(shapes.__getitem__, args.shapes):
        for dtype in dtypes:
            weights = layer_inputs(shape, 0, dtype, args.device)
            for routing in args.routing:
                for num_tokens in args.tokens:
                    x = with_tokens(weights, shape, num_tokens, routing)
                    for case in (*kernels.cases(x, shape, args.kernels), *backward.cases(x, shape, args.kernels)):
                        row = measure(case, shape, x, routing, roofs, args.budget, bounds=True, min_rounds=3)
                        rows.append(row)
                        print(f"{row.shape} T={num_tokens}: {row.seconds * 1e6:.1f} µs", file=sys.stderr)
                        if args.save:  # after every row, so that a run that is cut short leaves what it has
                            save(args.save, rows, roofs, about, command)
    print(render(rows, roofs, about))


if __name__ == "__main__":
    main()
