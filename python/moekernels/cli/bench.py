"""`moekernels bench`: how fast each kernel and a layer are here, beside plain PyTorch and what the machine can do."""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import os
import shlex
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from moekernels._devices import named_device
from moekernels._files import write_file
from moekernels._memory import free_memory
from moekernels.bench import experts
from moekernels.bench.check import Mismatch
from moekernels.bench.machine import described, machine
from moekernels.bench.quantized import FORMATS_TO_MAKE, INTEGER_FORMATS
from moekernels.bench.roofs import Roofs, measure_roofs
from moekernels.bench.shapes import REAL_LAYERS, ROUTINGS, LayerShape
from moekernels.bench.sweep import BACKWARD_PARTS, PARTS, Sweep, layer_of
from moekernels.bench.table import Row, cells, load, record
from moekernels.cli.device import add_device_argument
from moekernels.cli.ranks import add_expert_parallel_argument
from moekernels.cli.table import listing, table
from moekernels.ops import ACTIVATIONS

_MODELS = {shape.name: shape for shape in REAL_LAYERS}
_ALL = (*PARTS, *BACKWARD_PARTS)
_DTYPES = ("float32", "bfloat16", "float16")


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="time every kernel and a whole layer, beside plain PyTorch and the limits of this machine",
        description="Time each kernel and a whole MoE layer at the sizes of a model, with random weights, beside what "
        "else computes the same here: plain PyTorch, torch's grouped matrix product, and transformers where it is "
        "installed. All take turns in one process; a row is the median. The roof is the nearer of memory bandwidth and "
        "matrix product rate, measured in the same run; data in a cache may pass it. Exit code 1 if results "
        "differ, and with --check also if a baseline fails.",
    )
    layer = parser.add_argument_group("the layer", "That of a model; sizes that are given take the place of its own.")
    layer.add_argument(
        "--model", choices=(*_MODELS, *experts.MODELS), default="olmoe-1b-7b",
        help=f"default: olmoe-1b-7b. {', '.join(experts.MODELS)}: the experts as transformers 5 stores them",
    )  # fmt: skip
    layer.add_argument("--hidden-size", type=int, metavar="N")
    layer.add_argument("--ffn-size", type=int, metavar="N", help="inner size of an expert")
    layer.add_argument("--experts", type=int, metavar="N")
    layer.add_argument("--top-k", type=int, metavar="N", help="experts per token")
    layer.add_argument("--activation", choices=ACTIVATIONS)
    layer.add_argument("--gated", action=argparse.BooleanOptionalAction, help="whether experts multiply by a gate")
    layer.add_argument("--bias", action=argparse.BooleanOptionalAction, help="whether experts have biases")
    what = parser.add_argument_group("what to measure")
    what.add_argument(
        "--tokens", type=int, nargs="+", default=[1, 16, 512], metavar="N", help="tokens at a time (default: 1 16 512)"
    )
    what.add_argument("--dtype", nargs="+", choices=_DTYPES, default=["bfloat16"], help="default: bfloat16")
    what.add_argument(
        "--routing", nargs="+", choices=ROUTINGS, default=["uniform"], help="who gets the tokens (default: uniform)"
    )
    what.add_argument(
        "--kernels", nargs="+", choices=_ALL, metavar="NAME", help=f"some of {', '.join(_ALL)} (default: forward ones)"
    )
    what.add_argument("--backward", action="store_true", help="also the kernels of gradients, and a training step")
    what.add_argument(
        "--weights", nargs="+", choices=FORMATS_TO_MAKE, default=[], metavar="FORMAT",
        help=f"the layer with experts quantised, beside whole ones: some of {', '.join(FORMATS_TO_MAKE)}",
    )  # fmt: skip
    what.add_argument(
        "--activations", choices=["int8"],
        help=f"beside --weights {', '.join(INTEGER_FORMATS)}: with rows rounded to 8 bits, beside unrounded ones",
    )  # fmt: skip
    what.add_argument("--no-baselines", dest="baselines", action="store_false", help="only moekernels")
    what.add_argument("--check", action="store_true", help="hold every result against the definition of its op")
    running = parser.add_argument_group("running")
    add_device_argument(running)
    add_expert_parallel_argument(running)
    running.add_argument("--threads", type=int, metavar="N", help="threads of the CPU (default: PyTorch's)")
    running.add_argument(
        "--budget", type=float, default=1.0, metavar="SECONDS", help="time for each row (default: 1); more is steadier"
    )
    output = parser.add_argument_group("output")
    output.add_argument("--json", metavar="FILE", help="write the rows, the machine and its roofs as JSON")
    output.add_argument(
        "--plot", metavar="FILE", help="draw the roofline and the speed-ups, as SVG if its name ends in .svg, else PNG"
    )
    output.add_argument(
        "--from", dest="source", metavar="FILE", help="measure nothing; show the rows of one layer that --json wrote"
    )
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    for option, name in (("--json", args.json), ("--plot", args.plot)):
        if name is not None and not os.path.isdir(os.path.dirname(os.path.realpath(name))):
            raise ValueError(f"{option}: there is no directory {str(Path(name).parent)!r}")
    if args.plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot needs matplotlib: pip install 'moekernels[plot]'")
    if args.model in experts.MODELS:
        return _run_experts(args)
    if args.expert_parallel:
        return _run_on_ranks(args)
    return _run_sweep(args) if args.source is None else _show_saved(args)


_OF_ANY_LAYER = (
    "hidden_size", "ffn_size", "top_k", "activation", "gated", "bias", "kernels", "backward", "weights", "activations",
    "json", "plot", "source", "expert_parallel",
)  # fmt: skip


def _run_experts(args: argparse.Namespace) -> int:
    """A layer that only transformers has, beside its own implementations."""
    model = experts.MODELS[args.model]
    for option in _OF_ANY_LAYER:
        if getattr(args, option):
            raise ValueError(f"--model {model.name} goes with --experts, --tokens and --dtype, not with {option}")
    if args.experts is not None:
        model = model.with_experts(args.experts)
    device = named_device(args.device)
    names = [experts.OURS, "eager", "grouped_mm", "batched_mm"]
    lines: list[list[str]] = []
    failed = []
    print(listing({"experts": str(model), "machine": described(machine(device)), "": ""}))
    with _threads(args.threads), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for dtype in (getattr(torch, name) for name in args.dtype):
            needed, free = model.num_bytes(dtype), free_memory(device)
            if needed > 0.9 * free:
                raise ValueError(
                    f"--model {model.name} takes {needed / 2**30:.1f} GiB, and {free / 2**30:.1f} are free; "
                    f"--experts N measures fewer of the {model.num_experts} experts"
                )
            module = experts.make_experts(model, dtype, device)
            for tokens in _positive("--tokens", args.tokens):
                row = experts.measure(module, model, tokens, args.budget)
                times = [f"{1e3 * row.seconds[name]:.2f}" if name in row.seconds else "" for name in names]
                lines.append([str(tokens), row.dtype, *times, f"{1e3 * row.reading:.2f}", f"{row.speedup:.2f}x"])
                if row.error > experts.TOLERANCES[dtype]:
                    failed.append(f"{tokens} tokens, {row.dtype}: differs by {row.error:.1e} of the largest value")
    heads = [*(f"{name} ms" for name in names), "reading the weights ms", "of the fastest"]
    print(table(["tokens", "dtype", *heads], lines))
    for failure in failed:
        print(f"FAILED: {failure}")
    return 1 if failed else 0


def _run_on_ranks(args: argparse.Namespace) -> int:
    """The layer alone, with its experts on all processes of torchrun."""
    from moekernels.bench.ranks import measure

    shape, mesh = resolve_shape(args), args.mesh
    print(f"{_described(shape)}; {mesh.size()} processes\n")
    lines = []
    with _threads(args.threads):
        for tokens, dtype in itertools.product(_positive("--tokens", args.tokens), args.dtype):
            rows = measure(shape, tokens, getattr(torch, dtype), mesh, training=args.backward, budget=args.budget)
            for row in rows:
                sent = "" if row.sent_bytes is None else f"{row.sent_bytes / 2**20:.2f}"
                lines.append([row.way, str(tokens), dtype, f"{1e3 * row.seconds:.2f}", sent])
    what = "ms of a training step" if args.backward else "ms"
    print(table(["experts", "tokens", "dtype", what, "MiB sent by rank 0"], lines))
    return 0


def _run_sweep(args: argparse.Namespace) -> int:
    sweep = Sweep(
        resolve_shape(args),
        _positive("--tokens", args.tokens),
        [getattr(torch, name) for name in args.dtype],
        args.routing,
        named_device(args.device),
        _parts(args),
        args.budget,
        args.check,
        args.baselines,
        args.weights,
        args.activations,
    )
    if args.activations is not None and not (args.weights and {*args.weights} <= {*INTEGER_FORMATS}):
        raise ValueError(
            f"--activations {args.activations} goes with --weights {', '.join(INTEGER_FORMATS)}, got "
            f"{', '.join(args.weights) or 'none'}"
        )
    if args.weights and (args.kernels or args.backward):
        raise ValueError("--weights measures the layer in inference: leave out --kernels and --backward")
    if not args.budget > 0:
        raise ValueError(f"--budget must be greater than 0, got {args.budget}")
    sweep.require_memory(free_memory(sweep.device))

    with _threads(args.threads), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # baselines warn of what they are about to change
        about = machine(sweep.device)
        buffer_bytes = min(1 << 30, free_memory(sweep.device) // 8)
        roofs = measure_roofs(sweep.device, sweep.dtypes, min(args.budget, 1.0), buffer_bytes)
        print(_heading(_described(sweep.shape), about, roofs))
        rows, mismatches = _measure(sweep, roofs)
    print(_table(rows, sweep.shape.name))
    failed = [*map(str, mismatches), *_failures(rows)]
    for failure in failed:
        print(f"FAILED: {failure}")
    if args.check and not failed:
        print("\nall results are those of the definitions")
    if args.json is not None:
        command = f"moekernels {shlex.join(sys.argv[1:])}"
        write_file(args.json, record(rows, roofs, about, command, failed))
    if args.plot is not None:
        _plot(Path(args.plot), rows, roofs, about, sweep.shape.name)
    differ = mismatches or any(failure.startswith("differs") for row in rows for failure in row.failures.values())
    return 1 if differ or (args.check and failed) else 0


def _failures(rows: list[Row]) -> list[str]:
    """What is wrong with baselines, a line each."""
    return [
        f"{row.shape}, {row.tokens} tokens, {row.routing}, {row.dtype}: {name} {failure}"
        for row in rows
        for name, failure in row.failures.items()
    ]


def _show_saved(args: argparse.Namespace) -> int:
    if args.check or args.json is not None:
        raise ValueError("--from measures nothing: there is nothing to --check, and no --json to write")
    rows, roofs, about = load(Path(args.source))
    name = layer_of(rows)
    print(_heading(name, about, roofs))
    print(_table(rows, name))
    if args.plot is not None:
        _plot(Path(args.plot), rows, roofs, about, name)
    return 0


def _heading(layer: str, about: dict[str, object], roofs: Roofs) -> str:
    return listing({"layer": layer, "machine": described(about), "roofs": str(roofs), "": ""})


def _table(rows: list[Row], layer: str) -> str:
    header, body = cells(rows)
    return table(header, [[name.removeprefix(f"{layer} "), *values] for name, *values in body])


def _plot(path: Path, rows: list[Row], roofs: Roofs, about: dict[str, object], layer: str) -> None:
    from moekernels.bench.plot import draw

    write_file(path, draw(rows, roofs, about, layer, "svg" if path.suffix == ".svg" else "png"))


def resolve_shape(args: argparse.Namespace) -> LayerShape:
    """The model's layer, or one of the sizes that are given.

    Raises:
        ValueError: there is no such layer.
    """
    options = ("hidden_size", "ffn_size", "experts", "top_k", "activation", "gated", "bias")
    given = {name: getattr(args, name) for name in options if getattr(args, name) is not None}
    shape = _MODELS[args.model]
    if not given:
        return shape
    for name in ("hidden_size", "ffn_size", "experts", "top_k"):
        if name in given:
            _positive(f"--{name.replace('_', '-')}", [given[name]])
    if "experts" in given:
        given["num_experts"] = given.pop("experts")
    shape = replace(shape, **given)
    if shape.top_k > shape.num_experts:
        raise ValueError(f"--top-k {shape.top_k}: there are {shape.num_experts} experts")
    if shape.scoring != "softmax" and shape.top_k != 2:
        raise ValueError(f"--top-k {shape.top_k}: {args.model} routes by {shape.scoring}, which chooses 2 experts")
    return replace(shape, name=f"{shape.hidden_size}x{shape.ffn_size}, {shape.top_k} of {shape.num_experts}")


def _parts(args: argparse.Namespace) -> list[str]:
    """The named ones, and with `--backward` all of the backward ones too."""
    wanted = {*(args.kernels or PARTS), *(BACKWARD_PARTS if args.backward else ())}
    return [part for part in _ALL if part in wanted]


def _positive(option: str, values: list[int]) -> list[int]:
    for value in values:
        if value < 1:
            raise ValueError(f"{option} must be a positive integer, got {value}")
    return values


def _described(shape: LayerShape) -> str:
    kind = [shape.activation, *(["gated"] if shape.gated else []), *(["with biases"] if shape.bias else [])]
    return (
        f"{shape.name}: hidden size {shape.hidden_size}, {shape.num_experts} experts of {shape.ffn_size} "
        f"({', '.join(kind)}), {shape.top_k} per token, routed by {shape.scoring}"
    )


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if number is not None:
        torch.set_num_threads(_positive("--threads", [number])[0])
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _measure(sweep: Sweep, roofs: Roofs) -> tuple[list[Row], list[Mismatch]]:
    rows: list[Row] = []
    mismatches: list[Mismatch] = []
    said: set[str] = set()
    with tqdm(total=len(sweep), desc="Measuring", unit="row", disable=not sys.stderr.isatty()) as progress:

        def note(text: str) -> None:
            if text not in said:
                said.add(text)
                progress.write(f"  {text}", file=sys.stderr)

        for found in sweep.run(roofs, note):
            if isinstance(found, Row):
                rows.append(found)
                progress.set_description(f"{found.shape}, {found.tokens} tokens")
            else:
                mismatches.append(found)
            progress.update()
    return rows, mismatches
