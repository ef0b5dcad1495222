"""Every rule by which routers choose experts, beside softmax and top-k: the kernels' part of a router, from its logits.

    python benchmarks/routers.py --save out.md

A cell is the time of a rule as a multiple of that of `ops.route`, which stands beside it in microseconds. Rules take
turns in one process, some calls at a time; cells are medians. `MOEKERNELS_CPU_ISA=avx2` and the like say with which
instructions.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from moekernels import ops
from moekernels._files import write_file
from moekernels.bench.clocks import interleaved_medians
from moekernels.bench.machine import described, machine

_TOP_K = 8
_TURN = 1e-3  # seconds: that many calls follow one another, as a clock is read

Rule = Callable[[Tensor, Tensor], object]

BASELINE = "softmax"
RULES: dict[str, Rule] = {
    BASELINE: lambda logits, bias: ops.route(logits, _TOP_K),
    "renormalised": lambda logits, bias: ops.route(logits, _TOP_K, renormalize=True),
    "sigmoid": lambda logits, bias: ops.route_by_score(logits, _TOP_K),
    "sqrt-softplus": lambda logits, bias: ops.route_by_score(logits, _TOP_K, score="sqrt_softplus"),
    "softmax by score": lambda logits, bias: ops.route_by_score(logits, _TOP_K, score="softmax"),
    "with bias": lambda logits, bias: ops.route_by_score(logits, _TOP_K, selection_bias=bias),
    "renormalised, scaled": lambda logits, bias: ops.route_by_score(
        logits, _TOP_K, selection_bias=bias, renormalize=True, scale=2.5
    ),
    "4 of 8 groups": lambda logits, bias: ops.route_by_score(
        logits, _TOP_K, selection_bias=bias, num_groups=8, top_groups=4, renormalize=True, scale=2.5
    ),
}  # fmt: skip


def measure(num_tokens: int, num_experts: int, dtype: torch.dtype, budget: float) -> str:
    """A row of the table."""
    logits, bias = torch.randn(num_tokens, num_experts).to(dtype), torch.randn(num_experts) * 0.1
    cpu = torch.device("cpu")
    once = interleaved_medians({name: partial(rule, logits, bias) for name, rule in RULES.items()}, cpu, 0.05)
    calls = max(int(_TURN / min(once.values())), 1)

    def turn(rule: Rule) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                rule(logits, bias)

        return run

    times = interleaved_medians({name: turn(rule) for name, rule in RULES.items()}, cpu, budget)
    first = times.pop(BASELINE)
    cells = [f"{seconds / first:.2f}" for seconds in times.values()]
    what = [str(num_tokens), str(num_experts), str(dtype).removeprefix("torch.")]
    return " | ".join([*what, f"{first / calls * 1e6:.1f}", *cells])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[1, 16, 512, 2048, 16384])
    parser.add_argument("--experts", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", choices=["bfloat16", "float32"], default=["bfloat16", "float32"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, default=1.0, help="seconds of measuring for a row")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the result as Markdown")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    heads = ["tokens", "experts", "logits", f"{BASELINE} µs", *(f"× {name}" for name in RULES if name != BASELINE)]
    lines = [f"| {' | '.join(heads)} |", "| --- " * len(heads) + "|"]
    for dtype, num_experts, num_tokens in itertools.product(args.dtypes, args.experts, args.tokens):
        lines.append(f"| {measure(num_tokens, num_experts, getattr(torch, dtype), args.budget)} |")
    command = shlex.join(["python", "benchmarks/routers.py", *sys.argv[1:]])
    text = "\n\n".join([f"`{command}`", described(machine(torch.device("cpu"))), "\n".join(lines)]) + "\n"
    print(text)
    if args.save is not None:
        write_file(args.save, text)


if __name__ == "__main__":
    main()
