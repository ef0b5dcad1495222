"""Encoder, decoder and whole translations at the real sizes of m2m100_418M and switch-base-8, with random weights.

    python benchmarks/translation.py --models m2m100_418M --dtypes bfloat16 --batch 1 8 --save out.json
    python benchmarks/translation.py --models --memory

The baseline in the same process, over the same weights, is transformers 4.56; benchmarks/peers/m2m_100.py puts
CTranslate2 beside it. Columns are those of every benchmark; `tokens` counts source tokens for an encoder, and new ones
(of the best beam) for a generation. `--memory` shows what a capacity-limited layer allocates, beside what a mask of
tokens by experts by places would take.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.memory import layer_memory
from moekernels.bench.clocks import Run, interleaved_medians, make_clock
from moekernels.bench.machine import machine
from moekernels.bench.roofs import Roofs, measure_roofs, name_of
from moekernels.bench.table import Row, render, save
from moekernels.checkpoint import KEY_MAPS, checkpoint_tensors
from moekernels.models import AutoConfig, AutoModelForSeq2SeqLM
from moekernels.nn import EncoderDecoderCache, GroupedExperts
from moekernels.quantization import QuantizedWeight

Contestants = dict[str, Run]
SIZES: dict[str, dict[str, Any]] = {
    "m2m100_418M": {"model_type": "m2m_100"},
    "switch-base-8": {"model_type": "switch_transformers", "decoder_start_token_id": 0},
}


class Pair(NamedTuple):
    """A model and, over the same weights, that of transformers where it is installed."""

    name: str
    ours: Any
    theirs: Any


def build(name: str, dtype: torch.dtype, device: torch.device, layers: int | None, with_transformers: bool) -> Pair:
    fields = dict(SIZES[name])
    if layers is not None:
        keys = ("encoder_layers", "decoder_layers") if name.startswith("m2m") else ("num_layers", "num_decoder_layers")
        fields |= dict.fromkeys(keys, layers)
    config = AutoConfig.for_model(**fields)
    with torch.device("meta"):
        ours = AutoModelForSeq2SeqLM.from_config(config)
    ours = ours.to(dtype).to_empty(device=device).eval()
    ours.tie_weights()
    torch.manual_seed(0)
    for weight in ours.parameters():
        # Twice the usual width, without which the logits of a random model are all but equal.
        weight.normal_(std=0.04)
    return Pair(name, ours, transformers_model(ours, config) if with_transformers else None)


def transformers_model(ours: Any, config: Any) -> Any:
    try:
        import transformers
    except ImportError:
        return None
    fields = {**config.to_dict(), "encoder_layerdrop": 0.0, "decoder_layerdrop": 0.0}
    names = {"m2m_100": "M2M100", "switch_transformers": "SwitchTransformers"}
    prefix = names[type(config).model_type]
    with torch.device("meta"):
        theirs = getattr(transformers, f"{prefix}ForConditionalGeneration")(
            getattr(transformers, f"{prefix}Config")(**fields)
        )
    tensors = dict(checkpoint_tensors(ours, KEY_MAPS[type(config).model_type]))
    theirs.load_state_dict(tensors, assign=True, strict=False)
    theirs.tie_weights()
    for stack in (theirs.get_encoder(), theirs.get_decoder()):
        if hasattr(stack, "embed_positions"):
            positions = stack.embed_positions
            made = positions.get_embedding(config.max_position_embeddings + 2, config.d_model, config.pad_token_id)
            positions.weights = made.to(ours.device, ours.dtype)
    meta = [name for name, weight in theirs.named_parameters() if weight.is_meta]
    if meta:
        raise RuntimeError(f"transformers' model lacks {', '.join(meta)}")
    return theirs.eval()


class Work(NamedTuple):
    """FLOPs and bytes of weights that a stack needs at least; attention itself is small and not counted."""

    flops: float
    num_bytes: float


# The keys and values of the source are projected once and cached.
_ONCE = re.compile(r"encoder_attn\.[kv]_proj|EncDecAttention\.[kv]$")


def work(modules: list[nn.Module], num_tokens: int) -> Work:
    """Every token passes all weights but embeddings, and one expert of each stack of them."""
    flops = num_bytes = 0.0
    for module in modules:
        for name, part in module.named_modules():
            if isinstance(part, nn.Embedding) or _ONCE.search(name):
                continue
            share, touched = 1.0, 1.0
            if isinstance(part, GroupedExperts):
                share = 1 / part.num_experts
                touched = 1 - (1 - share) ** num_tokens  # of a stack, where each token goes to any of them
            for weight in part.parameters(recurse=False):
                flops += 2 * weight.numel() * share * num_tokens
                size = weight.num_bytes if isinstance(weight, QuantizedWeight) else weight.nbytes
                num_bytes += size * touched
    return Work(flops, num_bytes)


def encoder_runs(pair: Pair, ids: Tensor) -> Contestants:
    runs: Contestants = {"moekernels": lambda: pair.ours.get_encoder()(ids)}
    if pair.theirs is not None:
        runs["transformers"] = lambda: pair.theirs.get_encoder()(ids)
    return runs


def decoder_runs(pair: Pair, ids: Tensor, past: int) -> Contestants:
    """One step with `past` tokens in the cache, which is cut back after it."""
    start = torch.randint(4, 32000, (len(ids), past)).to(ids.device)  # unlike ones, for several experts
    token = start[:, :1]

    def step(model: Any, cache: Any) -> Run:
        encoded = model.get_encoder()(ids)
        model(encoder_outputs=encoded, decoder_input_ids=start, past_key_values=cache)

        def run() -> object:
            out = model(encoder_outputs=encoded, decoder_input_ids=token, past_key_values=cache)
            cache.crop(past)
            return out.logits

        return run

    runs: Contestants = {"moekernels": step(pair.ours, EncoderDecoderCache())}
    if pair.theirs is not None:
        import transformers

        cache = transformers.EncoderDecoderCache(transformers.DynamicCache(), transformers.DynamicCache())
        runs["transformers"] = step(pair.theirs, cache)
    return runs


def generate_runs(pair: Pair, ids: Tensor, num_beams: int, new_tokens: int) -> Contestants:
    fixed = {"num_beams": num_beams, "min_new_tokens": new_tokens, "max_new_tokens": new_tokens, "do_sample": False}
    runs: Contestants = {"moekernels": lambda: pair.ours.generate(ids, **fixed)}
    if pair.theirs is not None:
        runs["transformers"] = lambda: pair.theirs.generate(ids, **fixed)
    return runs


def check(runs: Contestants, title: str) -> None:
    """The encoder's outputs agree with those of transformers up to what the dtype allows."""
    if "transformers" not in runs:
        return
    ours, theirs = (
        torch.as_tensor(getattr(out, "last_hidden_state", out)) for out in map(call, list(runs.values())[:2])
    )
    difference = (ours.float() - theirs.float()).abs().max().item() / theirs.float().abs().max().item()
    if not difference < 0.1:
        raise RuntimeError(f"{title}: differs from transformers by {difference:.2g} of the largest value")


def call(run: Run) -> Any:
    return run()


def measurements(pair: Pair, args: argparse.Namespace) -> Iterator[tuple[str, int, Work, Contestants]]:
    """What is measured, its tokens and work, and who takes part."""
    encoder, decoder, head = pair.ours.get_encoder(), pair.ours.get_decoder(), pair.ours.lm_head
    for batch in args.batch:
        ids = torch.randint(4, 32000, (batch, args.source_length), device=pair.ours.device)
        runs = encoder_runs(pair, ids)
        check(runs, f"{pair.name} encoder")
        yield f"{pair.name} encoder {batch} × {args.source_length}", ids.numel(), work([encoder], ids.numel()), runs
        runs = decoder_runs(pair, ids, args.past)
        check(runs, f"{pair.name} decoder")
        yield f"{pair.name} decoder step {batch} × 1", batch, work([decoder, head], batch), runs
        for num_beams in args.beams:
            once, steps = work([encoder], ids.numel()), work([decoder, head], batch * num_beams)
            total = Work(*(a + args.new_tokens * b for a, b in zip(once, steps, strict=True)))
            runs = generate_runs(pair, ids, num_beams, args.new_tokens)
            yield f"{pair.name} generate {batch}, {num_beams} beams", batch * args.new_tokens, total, runs


def measure(title: str, num_tokens: int, done: Work, runs: Contestants, dtype: torch.dtype, device: torch.device,
            roofs: Roofs, budget: float) -> Row:  # fmt: skip
    medians = interleaved_medians(runs, device, budget, max_rounds=30)
    seconds = medians.pop("moekernels")
    roof = roofs.seconds(done.flops, done.num_bytes, dtype) / seconds
    return Row(title, num_tokens, "–", name_of(dtype), seconds, done.flops, done.num_bytes, roof, medians,
               make_clock(device).name)  # fmt: skip


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="*", choices=SIZES, default=list(SIZES))
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16"], default=["bfloat16", "float32"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="sentences")
    parser.add_argument("--source-length", type=int, default=32)
    parser.add_argument("--past", type=int, default=16, help="tokens in the cache of a decoder step")
    parser.add_argument("--beams", nargs="*", type=int, default=[1, 5])
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--layers", type=int, help="of encoder and decoder each; the real number if not given")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--no-transformers", action="store_true")
    parser.add_argument("--memory", action="store_true", help="show what a capacity-limited layer allocates")
    parser.add_argument("--budget", type=float, default=5.0, help="seconds of measuring per row")
    parser.add_argument("--save", type=Path, help="write the rows to this .json, and the table to an .md beside it")
    args = parser.parse_args()
    warnings.filterwarnings("ignore")

    if args.memory:
        print(layer_memory(args.device))
    rows: list[Row] = []
    if not args.models:
        return
    dtypes = [getattr(torch, name) for name in args.dtypes]
    roofs, about = measure_roofs(args.device, dtypes), machine(args.device)
    for name in args.models:
        for dtype in dtypes:
            pair = build(name, dtype, args.device, args.layers, not args.no_transformers)
            for title, num_tokens, done, runs in measurements(pair, args):
                row = measure(title, num_tokens, done, runs, dtype, args.device, roofs, args.budget)
                rows.append(row)
                others = "".join(f", × {other} {seconds / row.seconds:.2f}" for other, seconds in row.baselines.items())
                print(f"{row.shape} {row.dtype}: {row.seconds * 1e3:.1f} ms{others}", file=sys.stderr)
            del pair
    print(render(rows, roofs, about))
    if args.save:
        save(args.save, rows, roofs, about, "python benchmarks/translation.py " + shlex.join(sys.argv[1:]))


if __name__ == "__main__":
    main()
