"""What benchmarks/regression.py measures, as seen by one of its two processes.

A row is made once and then called again and again. It uses only what every revision has: the positional arguments of
the ops, and the names of the models. Started by regression.py, with the folder of a build unless the installed package
is meant; reads a JSON command per line and answers with one.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

Run = Callable[[], object]
SECONDS_PER_TURN = 0.1
NUMBERS = 1_000_003  # divides no size of a weight, so that no two rows or experts are alike

HIDDEN, FFN, EXPERTS, TOP_K = 2048, 1024, 64, 8  # one layer of OLMoE-1B-7B


def filled(*shape: int, dtype: torch.dtype, std: float = 0.02) -> Tensor:
    """Random values; the same numbers again and again, as a billion of them would take longer than the measuring."""
    out = torch.empty(shape, dtype=dtype)
    fill(out, std)
    return out


def fill(tensor: Tensor, std: float) -> None:
    numbers = torch.randn(NUMBERS, generator=torch.Generator().manual_seed(0)).mul_(std).to(tensor.dtype)
    for part in tensor.detach().view(-1).split(NUMBERS):
        part.copy_(numbers[: len(part)])


def layer(num_tokens: int, dtype: torch.dtype, training: bool = False) -> Run:
    """One layer after the routing. Inputs take turns, so that few tokens find none of their experts in a cache."""
    from moekernels import ops

    up = filled(EXPERTS, 2 * FFN, HIDDEN, dtype=dtype)
    down = filled(EXPERTS, HIDDEN, FFN, dtype=dtype)
    inputs = []
    for seed in range(1 if training else 4):
        generator = torch.Generator().manual_seed(seed)
        weights, expert_ids = ops.route(torch.randn(num_tokens, EXPERTS, generator=generator), TOP_K)
        hidden = torch.randn(num_tokens, HIDDEN, generator=generator).to(dtype)
        inputs.append((hidden, weights, ops.plan(expert_ids, EXPERTS)))
    if not training:
        turns = cycle(inputs)
        return torch.no_grad()(lambda: ops.sparse_mlp(*next(turns), up, down))

    hidden, weights, plan = inputs[0]
    leaves = [tensor.requires_grad_() for tensor in (hidden, weights, up, down)]
    direction = torch.randn_like(hidden)

    def step() -> None:
        ops.sparse_mlp(hidden, weights, plan, up, down).backward(direction)
        for leaf in leaves:
            leaf.grad = None

    return step


def on_meta(name: str, dtype: torch.dtype) -> Any:
    from moekernels.models import AutoConfig, AutoModelForSeq2SeqLM

    model_type = {"m2m100": "m2m_100", "switch": "switch_transformers"}[name]
    with torch.device("meta"):
        model = AutoModelForSeq2SeqLM.from_config(AutoConfig.for_model(model_type, decoder_start_token_id=0))
    return model.to(dtype)


def translation_model(name: str, dtype: torch.dtype) -> Any:
    """m2m100_418M or switch-base-8 at real size, with random weights."""
    model = on_meta(name, dtype).to_empty(device="cpu").eval()
    model.tie_weights()
    for weight in model.parameters():
        fill(weight, 0.04)
    return model


def token_ids(*shape: int) -> Tensor:
    """The same ones in both processes; unlike ones, so that they are routed to several experts."""
    return torch.randint(4, 32000, shape, generator=torch.Generator().manual_seed(0))


def encoder(name: str, batch: int, dtype: torch.dtype) -> Run:
    model = translation_model(name, dtype)
    ids = token_ids(batch, 32)
    return torch.no_grad()(lambda: model.get_encoder()(ids))


def decoder_step(name: str, batch: int, dtype: torch.dtype, past: int = 16) -> Run:
    """One step with `past` tokens in the cache, which is cut back after it."""
    from moekernels.nn import EncoderDecoderCache

    model, cache = translation_model(name, dtype), EncoderDecoderCache()
    start = token_ids(batch, past)

    @torch.no_grad()
    def run() -> None:
        model(encoder_outputs=encoded, decoder_input_ids=start[:, :1], past_key_values=cache)
        cache.crop(past)

    with torch.no_grad():
        encoded = model.get_encoder()(token_ids(batch, 32))
        model(encoder_outputs=encoded, decoder_input_ids=start, past_key_values=cache)
    return run


def small_generation() -> Run:
    """Greedy steps of a model so small that what is measured is Python around the kernels."""
    from moekernels.models import OlmoeConfig, OlmoeForCausalLM

    config = OlmoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=4, num_attention_heads=4, num_experts=4,
        num_experts_per_tok=2, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = OlmoeForCausalLM(config).eval()
    ids = torch.tensor([[5, 6, 7]])
    return lambda: model.generate(ids, max_new_tokens=32, min_new_tokens=32, do_sample=False)


def drop_in(batch: int, dtype: torch.dtype, past: int = 16) -> Run:
    """A decoding step of transformers' OLMoE, two layers at real width, with replaced layers."""
    import transformers

    from moekernels.integrations.transformers import replace_moe_layers

    config = transformers.OlmoeConfig(num_hidden_layers=2)
    with torch.device("meta"):
        model = transformers.OlmoeForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu").eval()
    for name, weight in model.named_parameters():
        weight.data.fill_(1.0) if "norm" in name else fill(weight, 0.02)
    model.model.rotary_emb = type(model.model.rotary_emb)(config)  # no weights, but lost on the meta device
    replace_moe_layers(model)
    cache = transformers.DynamicCache()
    prompt = torch.randint(0, 50000, (batch, past))
    tokens = cycle([torch.randint(0, 50000, (batch, 1)) for _ in range(4)])

    @torch.no_grad()
    def run() -> None:
        model(next(tokens), past_key_values=cache)
        cache.crop(past)

    with torch.no_grad():
        model(prompt, past_key_values=cache)
    return run


# Puts a folder before what is installed; the finder of an editable install would come before every folder.
_PREFER = "import sys; sys.path.insert(0, {site!r}); sys.meta_path[:] = sys.meta_path[-3:]"
_site = sys.argv[1] if len(sys.argv) > 1 and __name__ == "__main__" else None


def import_time() -> Run:
    """A fresh interpreter that imports torch, then this package; it says itself how long that took."""
    program = "import torch, time; t = time.perf_counter(); import moekernels; print(time.perf_counter() - t)"
    if _site:
        program = f"{_PREFER.format(site=_site)}; {program}"
    # Both with the bytecode that the first import writes.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    command = [sys.executable, "-c", program]
    return lambda: float(subprocess.run(command, capture_output=True, check=True, env=env).stdout)


def reading() -> Run:
    """A GiB of memory; a row's share of the read roof is measured in turns with it."""
    buffer = torch.ones(1 << 28)
    return buffer.sum


BF16, F32 = torch.bfloat16, torch.float32
ROWS: dict[str, Callable[[], Run]] = {
    "read": reading,
    **{f"layer bfloat16 {n}": lambda n=n: layer(n, BF16) for n in (1, 16, 64, 128, 512)},
    **{f"layer float32 {n}": lambda n=n: layer(n, F32) for n in (1, 16, 128)},
    "training step bfloat16 2048": lambda: layer(2048, BF16, training=True),
    "m2m100 decoder step 1": lambda: decoder_step("m2m100", 1, BF16),
    "m2m100 decoder step 8": lambda: decoder_step("m2m100", 8, BF16),
    "m2m100 encoder 8": lambda: encoder("m2m100", 8, BF16),
    "switch decoder step 1": lambda: decoder_step("switch", 1, BF16),
    "switch decoder step 8": lambda: decoder_step("switch", 8, BF16),
    "small generation": small_generation,
    "drop-in step 1": lambda: drop_in(1, BF16),
    "drop-in step 8": lambda: drop_in(8, BF16),
    "import": import_time,
}

# Of the rows that read more than they compute: the bytes of weights that a call reads at least.
_EXPERT = 3 * HIDDEN * FFN


@cache
def bytes_read(row: str) -> float | None:
    """Bytes of weights behind a row of few tokens; None where reading is not what bounds it."""
    kind, *rest = row.split()
    if kind == "read":
        return float(1 << 30)
    if "decoder step" in row:
        from benchmarks.translation import work

        model = on_meta(kind, BF16)
        return work([model.get_decoder(), model.get_output_embeddings()], int(rest[-1])).num_bytes
    if kind != "layer" or int(rest[1]) > 128:
        return None
    touched = EXPERTS * (1 - (1 - TOP_K / EXPERTS) ** int(rest[1]))
    return touched * _EXPERT * (2 if rest[0] == "bfloat16" else 4)


def turn(run: Run) -> float:
    """Seconds of a call, the median of those that fit a turn.

    In the first ones the threads of this process wake up, and those of the other one still wait by spinning.
    """
    times: list[float] = []
    begin = time.perf_counter()
    while not times or time.perf_counter() - begin < SECONDS_PER_TURN:
        begun = time.perf_counter()
        out = run()
        times.append(out if isinstance(out, float) else time.perf_counter() - begun)
    return statistics.median(times)


def serve(commands: Iterator[str]) -> None:
    import moekernels

    answer: Any = {"package": moekernels.__file__, "revision": moekernels.build_info()["git_revision"]}
    runs: dict[str, Run] = {}
    print(json.dumps(answer), flush=True)
    for line in commands:
        command, row = json.loads(line)
        if command == "prepare":
            for other in [name for name in runs if name != "read"]:
                del runs[other]  # two models at once would not fit
            runs.setdefault(row, ROWS[row]())
            for _ in range(2):
                runs[row]()
            print(json.dumps("ready"), flush=True)
        else:
            print(json.dumps(turn(runs[row])), flush=True)


if __name__ == "__main__":
    if _site:
        exec(_PREFER.format(site=_site))
    serve(iter(sys.stdin.readline, ""))
