"""`moekernels demo`: a small OLMoE from nothing to text, with every layer checked and every kernel timed."""

from __future__ import annotations

import argparse
import contextlib
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

from moekernels import build_info
from moekernels.cli.checks import LayerCheck, check_layers
from moekernels.cli.demo_text import TEXT
from moekernels.cli.device import add_device_argument, resolve_device
from moekernels.cli.table import listing, table
from moekernels.cli.timings import time_ops
from moekernels.generation import GenerationConfig
from moekernels.models import AutoModelForCausalLM, OlmoeConfig, OlmoeForCausalLM
from moekernels.tokenizers import AutoTokenizer, GPTNeoXTokenizerFast

_SEED = 0
_PROMPT = "A mixture of experts"
_VOCAB_SIZE = 768
_NEW_TOKENS = 24


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "demo",
        help="build, check, run and time a small model, without a download",
        description="Write a small OLMoE checkpoint, load it, continue a text, check every sparse layer against the "
        "definition of its ops in float64, and time every kernel beside plain PyTorch. Exit code 1 if a check fails.",
    )
    parser.add_argument("--keep", metavar="DIR", help="write the checkpoint to DIR and leave it there")
    add_device_argument(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    start = time.perf_counter()
    device = resolve_device(args.device)
    with contextlib.ExitStack() as stack:
        if args.keep is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="moekernels-demo-")))
        else:
            directory = Path(args.keep)
        write_checkpoint(directory)
        print(listing({"kernels": _kernels(device), "checkpoint": _described(directory, kept=args.keep is not None)}))
        passed = _generate(directory, device)
        for dtype in (torch.float32, torch.bfloat16):
            passed &= _check(directory, device, dtype)
    _time(device)
    seconds = time.perf_counter() - start
    print(f"\n{'all checks passed' if passed else 'A CHECK FAILED'}, {seconds:.1f} s")
    return 0 if passed else 1


def write_checkpoint(directory: Path) -> None:
    """A complete checkpoint: configurations, random weights in bfloat16, and a tokenizer trained on the spot."""
    tokenizer = train_tokenizer()
    config = OlmoeConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        num_experts=16,
        num_experts_per_tok=4,
        initializer_range=0.1,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(_SEED)
        model = OlmoeForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.generation_config = GenerationConfig(
        max_new_tokens=_NEW_TOKENS, pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def train_tokenizer() -> GPTNeoXTokenizerFast:
    """Byte-level BPE, as OLMoE has it, with a vocabulary of the demo's text."""
    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCAB_SIZE,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([TEXT], trainer)
    return GPTNeoXTokenizerFast(tokenizer_object=backend, pad_token="<|padding|>", padding_side="left")


def _kernels(device: torch.device) -> str:
    build = build_info()
    if device.type == "cuda":
        return f"CUDA ({', '.join(build['cuda_archs'])}) on {torch.cuda.get_device_name(device)}"
    return f"CPU, {build['cpu_isa']}, {torch.get_num_threads()} threads; torch {build['torch_running']}"


def _described(directory: Path, kept: bool) -> str:
    size = sum(file.stat().st_size for file in directory.iterdir())
    return f"{directory}{'' if kept else ' (temporary)'}: {len(list(directory.iterdir()))} files, {size / 1e6:.1f} MB"


def _generate(directory: Path, device: torch.device) -> bool:
    """Continues the prompt with and without a cache, which must not matter."""
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, device=device, progress=False)
    inputs = tokenizer(_PROMPT, return_tensors="pt").to(device)
    length = inputs.input_ids.shape[1]
    start = time.perf_counter()
    ids = model.generate(**inputs)
    seconds = time.perf_counter() - start
    same = torch.equal(ids, model.generate(**inputs, use_cache=False))
    drawn = model.generate(**inputs, do_sample=True, temperature=0.8, seed=_SEED)
    print(
        listing(
            {
                "prompt": repr(_PROMPT),
                "greedy": repr(tokenizer.decode(ids[0, length:])),
                "sampled": repr(tokenizer.decode(drawn[0, length:])),
                "": "(the weights are random, and so is the text)",
                "speed": f"{(ids.shape[1] - length) / seconds:.0f} tokens/s",
                "with cache": "the same tokens as without" if same else "OTHER TOKENS than without: FAILED",
            }
        )
    )
    return same


def _check(directory: Path, device: torch.device, dtype: torch.dtype) -> bool:
    """Runs the demo's text through the model and holds every sparse layer against the reference."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=dtype, device=device, progress=False)
    ids = AutoTokenizer.from_pretrained(directory)(TEXT[:400], return_tensors="pt").input_ids.to(device)
    checks = check_layers(model, ids)
    name = str(dtype).removeprefix("torch.")
    print(f"\nevery sparse layer on {ids.shape[1]} tokens in {name}, against the reference in float64\n")
    print(table(("layer", "routing", "error", "plain PyTorch", "allowed", ""), [_row(check) for check in checks]))
    return bool(checks) and all(check.passed for check in checks)


def _row(check: LayerCheck) -> tuple[str, ...]:
    return (
        check.layer,
        "same" if check.routed else "OTHER",
        f"{check.error:.1e}",
        f"{check.plain_error:.1e}",
        f"{check.allowed:.1e}",
        "ok" if check.passed else "FAILED",
    )


def _time(device: torch.device) -> None:
    dtype = torch.bfloat16
    tokens, hidden, ffn, experts, top_k = 256, 512, 256, 32, 4
    print(f"\neach kernel, {tokens} tokens, {experts} experts, {top_k} per token (best of many)\n")
    rows = time_ops(tokens, hidden, ffn, experts, top_k, dtype, device)
    rows += [row for row in time_ops(1, hidden, ffn, experts, top_k, dtype, device) if row[0] == "sparse_mlp"]
    print(table(("kernel", "shape", "dtype", "µs", "rate", "vs eager"), rows, left=3))
