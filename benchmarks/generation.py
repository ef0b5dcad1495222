"""What `generate` costs beside the model: its loop around a model that answers at once, and a step of OLMoE-1B-7B.

    python benchmarks/generation.py --save out.json
    python benchmarks/generation.py --device cuda --new-tokens 64

The loop is timed by the step: a long generation less one of a single token, over the tokens between them, with logits
as wide as OLMoE's vocabulary. The model's step is that of OLMoE-1B-7B at its real size and with random weights, after a
prompt of `--prompt` tokens; its layers share one set of experts, far larger than any cache, so that it fits into 2 GB.
Both take the least of several runs. The start of a call (configs, processors, buffers) is the time of one token.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from moekernels import GenerationConfig, OlmoeConfig, OlmoeForCausalLM
from moekernels.bench.machine import described, machine
from moekernels.bench.roofs import name_of
from moekernels.generation import GenerationMixin
from moekernels.nn import DynamicCache

OLMOE_1B_7B: dict[str, Any] = {"vocab_size": 50304, "pad_token_id": 1, "eos_token_id": 50279}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "greedy, no end token": {"eos_token_id": None},
    "greedy, repetition penalty": {"repetition_penalty": 1.1},
    "greedy, scores kept": {"output_scores": True, "return_dict_in_generate": True},
    "sampling": {"do_sample": True, "top_k": 0},
    "sampling, top-k 50": {"do_sample": True, "top_k": 50},
    "sampling, top-p 0.9": {"do_sample": True, "top_k": 0, "top_p": 0.9},
    "prompt lookup": {"prompt_lookup_num_tokens": 4},
    "4 beams": {"num_beams": 4},
}


class NoModel(GenerationMixin):
    """Answers every call with the same logits, peaked as those of a language model, and keeps no cache."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.config = OlmoeConfig(**OLMOE_1B_7B)
        self.generation_config = GenerationConfig.from_model_config(self.config)
        self.dtype, self.device = dtype, device
        generator = torch.Generator().manual_seed(0)
        logits = 4 * torch.randn(1, 1, self.config.vocab_size, generator=generator)
        logits[..., self.config.eos_token_id] = -100.0
        self._logits = logits.to(device, dtype)

    def forward(self, input_ids: torch.Tensor, logits_to_keep: int = 0, past_key_values: Any = None) -> Any:
        logits = self._logits.expand(len(input_ids), logits_to_keep, -1)
        return SimpleNamespace(logits=logits, past_key_values=past_key_values)

    __call__ = forward


def real_model(dtype: torch.dtype, device: torch.device) -> OlmoeForCausalLM:
    """OLMoE-1B-7B, whose layers share their experts."""
    config = OlmoeConfig(**OLMOE_1B_7B)
    with torch.device("meta"):
        model = OlmoeForCausalLM(config)
    for layer in model.model.layers[1:]:
        layer.mlp.experts = model.model.layers[0].mlp.experts
    model = model.to(dtype).to_empty(device=device).eval()
    torch.manual_seed(0)
    for weight in model.parameters():
        weight.data.normal_(std=0.02)
    return model


def least_seconds(run: Callable[[], object], device: torch.device, repeats: int) -> float:
    """The least wall-clock time of several runs, with what they leave to the device."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return min(times)


@torch.no_grad()
def step_seconds(model: OlmoeForCausalLM, prompt_length: int, num_steps: int) -> float:
    ids = torch.randint(model.config.vocab_size, (1, prompt_length), device=model.device)
    cache = DynamicCache()
    model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)

    def step() -> None:
        # Another token every time, so that other experts are read.
        token = torch.randint(model.config.vocab_size, (1, 1), device=model.device)
        model(token, past_key_values=cache, use_cache=True, logits_to_keep=1)

    return least_seconds(step, model.device, num_steps)


def loop_seconds(
    model: NoModel, ids: torch.Tensor, new_tokens: int, repeats: int, kwargs: dict[str, Any]
) -> tuple[float, float]:
    """Seconds per step, and of a call that generates one token."""

    def seconds(length: int) -> float:
        return least_seconds(lambda: model.generate(ids, max_new_tokens=length, **kwargs), model.device, repeats)

    start = seconds(1)
    return max(seconds(1 + new_tokens) - start, 0.0) / new_tokens, start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu", type=torch.device)
    parser.add_argument("--dtype", default="bfloat16", help="of the model and of its logits")
    parser.add_argument("--prompt", default=128, type=int, metavar="N", help="tokens of the prompt")
    parser.add_argument("--new-tokens", default=128, type=int, metavar="N")
    parser.add_argument("--repeats", default=5, type=int, metavar="N")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the figures as JSON")
    args = parser.parse_args()
    dtype: torch.dtype = getattr(torch, args.dtype)

    model_step = step_seconds(real_model(dtype, args.device), args.prompt, max(10, 4 * args.repeats))
    stand_in = NoModel(dtype, args.device)
    ids = torch.randint(stand_in.config.vocab_size, (1, args.prompt), device=args.device)
    about = machine(args.device)
    print(described(about))
    print(f"a step of OLMoE-1B-7B in {name_of(dtype)}: {model_step * 1e6:.0f} µs\n")
    print("| decoding | loop, µs per step | % of the model's step | start of a call, µs |\n| --- | --- | --- | --- |")
    rows = []
    for way, kwargs in WAYS.items():
        loop, start = loop_seconds(stand_in, ids, args.new_tokens, args.repeats, kwargs)
        rows.append({"decoding": way, "loop": loop, "share": loop / model_step, "start": start})
        print(f"| {way} | {loop * 1e6:.0f} | {loop / model_step:.1%} | {start * 1e6:.0f} |", flush=True)
    if args.save:
        args.save.write_text(json.dumps({"machine": about, "step": model_step, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
