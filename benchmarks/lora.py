"""A step with LoRA on the experts of one OLMoE layer: the drop-in beside PEFT's own way, and beside frozen experts.

    python benchmarks/lora.py --tokens 256 2048 --save out.md

Needs transformers 5 and peft. The layer is transformers' own, with adapters of PEFT on both stacks; a step is a forward
and a backward pass with the gradients of the hidden states and of the adapters. "frozen" is the drop-in without
adapters, which is the least a step can be; PEFT builds the adapted stack for transformers' grouped_mm. Beside the
times stands what a step's peak memory is above the one before it, in shares of the stacks' bytes.
"""

from __future__ import annotations

import argparse
import copy
import shlex
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory import peak_bytes
from moekernels._files import write_file
from moekernels.bench.clocks import interleaved_medians
from moekernels.bench.machine import described, machine
from moekernels.integrations.transformers import replace_moe_layers

_STACKS = ["experts.gate_up_proj", "experts.down_proj"]
# How far gradients may be apart. In bfloat16 PEFT rounds the adapted weight, of which the adapter is a small part.
_APART = {torch.float32: 1e-4, torch.bfloat16: 0.2}


def block(dtype: torch.dtype) -> nn.Module:
    """The sparse block of OLMoE-1B-7B, frozen."""
    from transformers.models.olmoe.configuration_olmoe import OlmoeConfig
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = OlmoeConfig(intermediate_size=1024)
    config._experts_implementation = "grouped_mm"
    made = OlmoeSparseMoeBlock(config).to(dtype).requires_grad_(False)
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.02)
    return made


def contestants(rank: int, dtype: torch.dtype) -> dict[str, nn.Module]:
    import peft

    torch.manual_seed(0)
    stock = nn.Sequential(block(dtype))
    frozen = copy.deepcopy(stock)
    replace_moe_layers(frozen)
    adapted = peft.get_peft_model(stock, peft.LoraConfig(r=rank, target_modules=[], target_parameters=_STACKS))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            nn.init.normal_(parameter, std=0.02)
            parameter.data = parameter.data.to(dtype)
    ours = copy.deepcopy(adapted)
    replace_moe_layers(ours)
    return {"frozen": frozen, "moekernels": ours, "PEFT over grouped_mm": adapted}


def as_step(model: nn.Module, hidden: Tensor, direction: Tensor) -> Callable[[], list[Tensor]]:
    leaves = [hidden, *(parameter for parameter in model.parameters() if parameter.requires_grad)]

    def step() -> list[Tensor]:
        out: Any = model(hidden)
        out = out[0] if isinstance(out, tuple) else out
        return list(torch.autograd.grad(out, leaves, direction))

    return step


def measure(num_tokens: int, dtype: torch.dtype, rank: int, budget: float) -> list[str]:
    models = contestants(rank, dtype)
    hidden = torch.randn(1, num_tokens, 2048).to(dtype).requires_grad_()
    direction = torch.randn_like(hidden)
    steps = {name: as_step(model, hidden, direction) for name, model in models.items()}
    ours, theirs = steps["moekernels"](), steps["PEFT over grouped_mm"]()
    for mine, other in zip(ours, theirs, strict=True):
        if (apart := ((mine - other).norm() / other.norm()).item()) > _APART[dtype]:
            raise SystemExit(f"gradients are {apart:.1%} apart")
    times = interleaved_medians(dict(steps), torch.device("cpu"), budget)
    peaks = {name: peak_bytes(step, torch.device("cpu")) for name, step in steps.items()}
    stacks = sum(p.nbytes for name, p in models["frozen"].named_parameters() if "experts" in name)
    return [
        f"| {num_tokens} | {name} | {seconds * 1e3:.1f} | {seconds / times['frozen']:.2f} | "
        f"{times['PEFT over grouped_mm'] / seconds:.2f} | {peaks[name] / 2**20:.0f} | "
        f"{(peaks[name] - peaks['frozen']) / stacks:.1%} |"
        for name, seconds in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", nargs="+", type=int, default=[256, 2048])
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of measuring for a number of tokens")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the result as Markdown")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    lines = [
        "| tokens | a step | ms | × frozen | PEFT is × as slow | peak MiB | beyond frozen, of the stacks |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for num_tokens in args.tokens:
        lines += measure(num_tokens, getattr(torch, args.dtype), args.rank, args.budget)
    command = shlex.join(["python", "benchmarks/lora.py", *sys.argv[1:]])
    text = "\n\n".join([f"`{command}`", described(machine(torch.device("cpu"))), "\n".join(lines)]) + "\n"
    print(text)
    if args.save is not None:
        write_file(args.save, text)


if __name__ == "__main__":
    main()
