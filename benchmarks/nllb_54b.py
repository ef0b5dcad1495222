"""NLLB-MoE-54B with its experts on the disk: a checkpoint of its real sizes, and translations with it.

    python benchmarks/nllb_54b.py --make DIR --weights int4        # all of it: 32 GB
    python benchmarks/nllb_54b.py --make DIR --sparse-step 24      # 16 bits: 5.9 GB, and 8.6 GB for every sparse layer
    python benchmarks/nllb_54b.py --make DIR --model olmoe-1b-7b   # 14 GB; with --weights int4 4 GB
    python benchmarks/nllb_54b.py --run DIR --expert-memory 8GiB --save out.md
    python benchmarks/nllb_54b.py --overhead                       # OLMoE layers that all fit, beside in-memory ones

The weights are pseudo-random, the same each time. Left alone, they send most tokens of a text to the same few experts;
with embeddings that outweigh what the layers add, each token goes its own way, and no expert is visited more often than
others: the cache hits as rarely as it can. A trained model lies between. Both are measured, as `few` and `even`.

Where the disk has no room for the 12 sparse layers, `--sparse-step` leaves fewer (24: one of the encoder, one of the
decoder); then the budget that stands for a real one is that times their share, and a column scales to all layers.
"""

from __future__ import annotations

import argparse
import mmap
import random
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from moekernels._files import write_file
from moekernels.bench.clocks import interleaved_medians
from moekernels.bench.machine import described, machine
from moekernels.checkpoint import KEY_MAPS, parse_size, replace_files
from moekernels.checkpoint.packed import Group, TensorHeader, packed_size, write_packed
from moekernels.expert_memory.cache import READERS
from moekernels.expert_memory.memory import PIECE
from moekernels.models import AutoConfig, NllbMoeConfig, OlmoeConfig, OlmoeForCausalLM, QuantizationConfig
from moekernels.models.auto import model_class
from moekernels.models.quantized import describe_quantization, packing_of
from moekernels.quantization import Format

SPARSE_STEP = 4  # of the real NLLB-MoE-54B
_POOL = 2**25  # weights that all tensors are cut from
_ROW = 64  # they are cut at multiples of this, which no group of a format crosses
_WORDS = 30


def configuration(model: str, sparse_step: int) -> NllbMoeConfig | OlmoeConfig:
    """That of facebook/nllb-moe-54b, or of allenai/OLMoE-1B-7B-0924."""
    if model == "olmoe-1b-7b":
        return OlmoeConfig(intermediate_size=1024, dtype="bfloat16")
    return NllbMoeConfig(
        vocab_size=256206,
        d_model=2048,
        encoder_layers=24,
        decoder_layers=24,
        encoder_ffn_dim=8192,
        decoder_ffn_dim=8192,
        encoder_attention_heads=16,
        decoder_attention_heads=16,
        num_experts=128,
        encoder_sparse_step=sparse_step,
        decoder_sparse_step=sparse_step,
        router_dtype="float32",
        moe_eval_capacity_token_fraction=1.0,
        dtype="bfloat16",
    )


class Weights:
    """Pseudo-random tensors: pieces of one pool that begin where a tensor's name says."""

    def __init__(self, dtype: torch.dtype, format: Format | None) -> None:
        pool = torch.empty(_POOL, dtype=torch.float32).normal_(generator=torch.Generator().manual_seed(54))
        self._pool = torch.cat([pool, pool]).to(dtype)
        parts = {} if format is None else format.quantize(pool.view(-1, _ROW))
        self._parts = {part: torch.cat([values, values]) for part, values in parts.items()}

    def of(self, header: TensorHeader) -> Tensor:
        name, shape, dtype = header
        if len(shape) == 1 and (name.endswith("weight") or "norm" in name):
            return torch.full(shape, float(name.endswith("weight")), dtype=dtype)
        # Sums of unit size keep 24 layers of random weights apart from zero and infinity.
        values = self._cut(self._pool, name, shape, 1)
        return values.mul_(shape[-1] ** -0.5 if len(shape) > 1 else 0.02).view(shape)

    def part(self, weight: str, columns: int, header: TensorHeader) -> Tensor:
        """A part of a quantised weight."""
        name, shape, _ = header
        part = name.rpartition(".")[2]
        values = self._cut(self._parts[part], weight, shape, 2 * _POOL // len(self._parts[part]))
        return (values.mul_(columns**-0.5) if values.is_floating_point() else values).view(shape)

    @staticmethod
    def _cut(pool: Tensor, name: str, shape: tuple[int, ...], per_entry: int) -> Tensor:
        """Entries of a pool, each of so many weights."""
        size, length = torch.Size(shape).numel(), _POOL // per_entry
        begin = random.Random(name).randrange(_POOL // _ROW) * _ROW // per_entry
        return torch.cat([pool[begin : begin + min(length, size - done)] for done in range(0, size, length)])


def quantized_group(weights: Weights, name: str, shape: tuple[int, ...], format: Format) -> Group:
    """A quantised weight in the layout of :mod:`moekernels.checkpoint.quantized.own`, but for its shape."""
    *stack, rows, columns = shape
    sizes = {part: (kind.size(rows * columns), kind.dtype) for part, kind in format.parts(columns).items()}
    headers = [TensorHeader(f"{name}.{part}", (*stack, size), dtype) for part, (size, dtype) in sizes.items()]

    def tensors() -> Iterator[Tensor]:
        for header in headers:
            yield weights.part(name, columns, header)

    return Group(tuple(headers), tensors)


def make(directory: Path, config: NllbMoeConfig | OlmoeConfig, quantize_to: str | None) -> None:
    with torch.device("meta"):
        model: Any = model_class(config)(config)
    config, key_map = model.config, KEY_MAPS[config.model_type]
    quantization = None if quantize_to is None else QuantizationConfig(quantize_to).quantization()
    weights = Weights(torch.bfloat16, quantization and quantization.format)
    format_of = packing_of(model, key_map, quantization).format
    formats = {name: format for name, _ in model.named_parameters() if (format := format_of(name)) is not None}
    describe_quantization(model, formats)
    groups: dict[object, list[TensorHeader]] = {}
    for name, parameter in model.named_parameters():
        if name in formats:
            continue
        canonical = key_map.canonical(name)
        prefix = name.removesuffix(canonical)
        for key, place in key_map.checkpoint_names(canonical, tuple(parameter.shape)):
            header = TensorHeader(prefix + key, tuple(place.view(parameter).shape), torch.bfloat16)
            group = key if place.expert is None else (place.parameter.rpartition(".")[0], place.expert)
            groups.setdefault(group, []).append(header)

    def group_of(headers: list[TensorHeader]) -> Group:
        headers = sorted(headers, key=lambda header: -len(header.shape))
        return Group(tuple(headers), lambda: map(weights.of, headers))

    shapes = {name: tuple(model.get_parameter(name).shape) for name in formats}
    # What is a multiple of a block comes first, so that it is aligned to one.
    packed = [quantized_group(weights, name, shapes[name], format) for name, format in formats.items()]
    packed += [group_of(headers) for headers in groups.values()]
    for name, shape in shapes.items():
        about = TensorHeader(f"{name}.shape", (len(shape),), torch.int64)
        packed.append(Group((about,), lambda shape=shape: [torch.tensor(shape)]))
    print(f"writing {packed_size(packed) / 1e9:.1f} GB to {directory}", file=sys.stderr)
    with replace_files(directory) as stage:
        config.architectures = [type(model).__name__]
        config.to_json_file(stage / "config.json")
        write_packed(stage, packed, parse_size("5GB"))


# Running.


def resident(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def bandwidth(cache: Any, seconds: float = 4.0) -> float:
    """Bytes per second of the cache's own kind of reads, at random places of its files."""
    files = list(cache._files.values())
    sizes = [file.path.stat().st_size // PIECE for file in files]
    end = time.perf_counter() + seconds

    def read(seed: int) -> int:
        draw, buffer, done = random.Random(seed), memoryview(mmap.mmap(-1, PIECE)), 0
        while time.perf_counter() < end:
            i = draw.randrange(len(files))
            # As many pieces in a row as a matrix of an expert has.
            first = draw.randrange(max(sizes[i] - 32, 1))
            for piece in range(first, min(first + 32, sizes[i])):
                files[i].read(buffer, piece * PIECE, PIECE)
                done += PIECE
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        total = sum(pool.map(read, range(READERS)))
    return total / (time.perf_counter() - start)


def even(model: Any) -> float:
    """Let embeddings outweigh what the layers add, so that a token's experts depend on the token. Returns a factor by
    which the logits of a tied head have grown."""
    factor = 10.0 if getattr(model.config, "scale_embedding", False) else 10.0 * model.config.hidden_size**0.5
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(factor)
    return factor


@torch.no_grad()
def translate(model: Any, ids: Tensor, beams: int, new_tokens: int, temperature: float) -> tuple[float, float]:
    """Seconds of the encoder, and of a step of the decoder. Its tokens are drawn: the likeliest one of random weights
    is always the same, and so are its experts."""
    start = time.perf_counter()
    encoded = model.get_encoder()(input_ids=ids, return_dict=True)
    encoder = time.perf_counter() - start
    if beams == 1:
        model.expert_cache.reset_stats()
        return encoder, feed(model, len(ids), new_tokens, "decoder_input_ids", encoder_outputs=encoded)
    options = {"num_beams": beams, "do_sample": True, "top_k": 0, "temperature": temperature, "seed": 1}
    lengths = {"max_new_tokens": new_tokens, "min_new_tokens": new_tokens}
    model.expert_cache.reset_stats()
    start = time.perf_counter()
    model.generate(encoder_outputs=encoded, **options, **lengths)
    return encoder, (time.perf_counter() - start) / new_tokens


@torch.no_grad()
def go_on(model: Any, ids: Tensor, new_tokens: int) -> tuple[float, float]:
    """Seconds of the prompt, and of one further token."""
    start = time.perf_counter()
    output = model(input_ids=ids, use_cache=True)
    prompt = time.perf_counter() - start
    model.expert_cache.reset_stats()
    return prompt, feed(model, len(ids), new_tokens, "input_ids", past_key_values=output.past_key_values)


def feed(model: Any, rows: int, new_tokens: int, name: str, **state: Any) -> float:
    """Seconds of a step with one drawn token per row."""
    generator = torch.Generator().manual_seed(2)
    drawn = torch.randint(4, model.config.vocab_size, (new_tokens, rows, 1), generator=generator)
    start = time.perf_counter()
    for token in drawn:
        state["past_key_values"] = model(**{name: token}, **state, use_cache=True).past_key_values
    return (time.perf_counter() - start) / new_tokens


def row(model: Any, routing: str, rows: int, beams: int, new_tokens: int, temperature: float, disk: float) -> list[str]:
    """A line of the table."""
    ids = torch.randint(4, model.config.vocab_size, (rows, _WORDS), generator=torch.Generator().manual_seed(1))
    config, scale = model.config, 1.0
    if isinstance(config, NllbMoeConfig):
        first, step = translate(model, ids, beams, new_tokens, temperature)
        scale = (config.decoder_layers // SPARSE_STEP) / (config.decoder_layers // config.decoder_sparse_step)
    else:
        first, step = go_on(model, ids, new_tokens)
    stats = model.expert_cache.stats()
    waited, rate = stats.seconds_waited / new_tokens, stats.bytes_read / max(stats.seconds_reading, 1e-9)
    return [
        f"{rows}{f', {beams} beams' if beams > 1 else ''}",
        routing,
        f"{first:.1f}",
        f"{step:.3f}",
        f"{waited:.3f}",
        f"{step + waited * (scale - 1):.3f}",
        f"{rows / step:.2f}",
        f"{stats.hits} / {stats.misses}",
        f"{stats.bytes_read / 1e9:.1f}",
        f"{rate / 1e9:.2f} ({rate / disk:.0%})",
    ]


_COLUMNS = (
    f"texts of {_WORDS} words",
    "experts",
    "encoder or prompt s",
    "a step s",
    "of which waited s",
    "step with all sparse layers s",
    "tokens/s",
    "hits / misses",
    "GB read",
    "GB/s while reading (of the disk's)",
)


def run(directory: Path, expert_memory: str, new_tokens: int, many: int) -> str:
    """The table, with what stands beside it."""
    NllbMoeConfig()  # what is loaded but once
    cls: Any = model_class(AutoConfig.from_pretrained(directory))
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    model = cls.from_pretrained(directory, expert_memory=expert_memory)
    dense, cache = model.get_memory_footprint(), model.expert_cache
    disk = bandwidth(cache)
    cases = [(1, 1), *([(1, 5)] if model.config.is_encoder_decoder else []), *([(many, 1)] if many else [])]
    lines = [row(model, "few", *case, new_tokens, 10.0, disk) for case in cases]
    temperature = 10.0 * even(model)
    lines += [row(model, "even", *case, new_tokens, temperature, disk) for case in cases]
    peak, stats = resident("VmHWM") - before, cache.stats()
    sparse = getattr(model.config, "decoder_sparse_step", 1)
    return "\n".join(
        [
            f"{model.config.model_type}, {model.num_parameters() / 1e9:.1f} G weights, {stats.num_experts} experts, "
            f"every {sparse}th layer is sparse; disk: {disk / 1e9:.2f} GB/s past the page cache",
            "",
            f"resident memory, peak: {peak / 2**30:.2f} GiB; dense part and budget: {dense / 2**30:.2f} + "
            f"{stats.budget / 2**30:.2f} GiB ({peak / (dense + stats.budget) - 1:+.1%})",
            "",
            *(f"| {' | '.join(cells)} |" for cells in (_COLUMNS, ["---"] * len(_COLUMNS), *lines)),
        ]
    )


def overhead() -> str:
    """Two layers of OLMoE's sizes with room for all experts, beside the same in memory: a decoding step."""
    with tempfile.TemporaryDirectory() as directory:
        config = OlmoeConfig(num_hidden_layers=2, intermediate_size=1024, vocab_size=1024)
        OlmoeForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(directory)
        models = {
            "in memory": OlmoeForCausalLM.from_pretrained(directory),
            "streamed, all fit": OlmoeForCausalLM.from_pretrained(directory, expert_memory="8GiB"),
        }
    lines = ["| 2 layers of OLMoE, bf16 | tokens | ms | × in memory |", "| --- | --- | --- | --- |"]
    for tokens in (1, 16, 256):
        ids = torch.randint(3, 1000, (1, tokens), generator=torch.Generator().manual_seed(tokens))
        with torch.no_grad():
            outputs = [model(input_ids=ids).logits for model in models.values()]
            assert torch.equal(*outputs)
            runs: dict[str, Callable[[], object]] = {
                name: (lambda model=model, ids=ids: model(input_ids=ids)) for name, model in models.items()
            }
            times = interleaved_medians(runs, torch.device("cpu"), 10.0)
        for name, seconds in times.items():
            lines.append(f"| {name} | {tokens} | {seconds * 1e3:.2f} | {seconds / times['in memory']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--make", type=Path, metavar="DIR", help="write the checkpoint")
    parser.add_argument("--weights", choices=["int4", "q8_0"], help="quantise Linears and experts of --make")
    parser.add_argument("--model", choices=["nllb-moe-54b", "olmoe-1b-7b"], default="nllb-moe-54b", help="of --make")
    parser.add_argument("--sparse-step", type=int, default=SPARSE_STEP, help="every so many-th layer is sparse")
    parser.add_argument("--run", type=Path, metavar="DIR", help="translate with it")
    parser.add_argument("--expert-memory", default="8GiB", metavar="SIZE")
    parser.add_argument("--new-tokens", type=int, default=24)
    parser.add_argument("--many", type=int, default=16, help="sentences at once; 0 leaves that out")
    parser.add_argument("--overhead", action="store_true", help="OLMoE layers that all fit")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the result as Markdown")
    args = parser.parse_args()
    if args.make is not None:
        make(args.make, configuration(args.model, args.sparse_step), args.weights)
    parts = []
    if args.run is not None:
        parts.append(run(args.run, args.expert_memory, args.new_tokens, args.many))
    if args.overhead:
        parts.append(overhead())
    if parts:
        command = shlex.join(["python", "benchmarks/nllb_54b.py", *sys.argv[1:]])
        text = "\n\n".join([f"`{command}`", described(machine(torch.device("cpu"))), *parts]) + "\n"
        print(text)
        if args.save is not None:
            write_file(args.save, text)


if __name__ == "__main__":
    main()
