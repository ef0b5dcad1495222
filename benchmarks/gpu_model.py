"""What the CUDA kernels should take on an H200, by counted bytes and clocks and published rates: nothing is measured.

    python benchmarks/gpu_model.py     # the table of docs/performance.md

For every kernel of a problem the model takes the largest of: tensor-core clocks and what nothing overlaps, bytes
through shared memory and through the second-level cache, bytes of device memory. The tiles are those that the launcher
would choose. A measurement that is slower shows what the model does not know; one that is faster, that a rate here is
wrong.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

from moekernels._library import _C
from moekernels.bench.shapes import NLLB_MOE, OLMOE, PHIMOE, LayerShape

# ---- published of the GPU ----
SMS = 132
CLOCK = 1.83e9  # 989 TFLOP/s of dense bf16 / (132 multiprocessors * 4096 FLOP per clock)
FLOP_PER_CLOCK = 4096  # of one multiprocessor
MEMORY = 4.8e12  # bytes/s
SHARED_PER_CLOCK = 128  # bytes, of one multiprocessor
L2_PER_CLOCK = 5120 / SMS  # bytes for one multiprocessor: published for the A100, whose cache has the same two halves

# ---- assumed, and the first things to correct by a measurement ----
SUSTAINED = 0.8  # of the published clock while the tensor cores work on random data
MEMORY_SHARE = 0.9  # of the published rate, for long streams
LAUNCH = 1.5e-6  # s a kernel of few blocks takes from the end of the one before it to its own, without its work

# ---- counted in the machine code of the kernels, per tile and warp, times the two warps of a scheduler ----
EPILOGUE_GATED = 2600  # clocks in which the tensor cores have nothing to do, unless consumers take turns
EPILOGUE_PLAIN = 1300

# ---- the same of the decode path with codes of a quantised weight: instructions of a lane per weight, 8 × 32 tile ----
CODES = {"int4": 3.6, "nf4": 5.3, "int8": 5.1}
BYTES = {"int4": 4.5 / 8, "nf4": 4.5 / 8, "int8": 1.0}  # of a weight, its share of a scale included
LANES = 128  # of a multiprocessor, an instruction each per clock

# ---- and of the kernel of many rows: instructions of a warp for a step, of the 128 × 128 × 32 tile on sm_90a ----
MMA_SYNC = 0.6  # assumed: what mma.sync reaches of the rate of wgmma
CODES_STEP = {"int4": 374, "nf4": 435, "int8": 450}

ELEMENT = 2  # bytes of bfloat16


@dataclass(frozen=True)
class Tile:
    rows: int
    columns: int  # weight rows
    depth: int
    paired: bool = False  # blocks share weights by twos
    in_turn: bool = False  # half of it is stored while the other half is multiplied


def tile_of(**problem: int | bool) -> Tile:
    """The tile of the grouped GEMM's launcher: `sm90 128x256x64, 4 stages, groups of 16, clusters of 2, in turn`."""
    text = _C.describe_tiles(**problem)
    match = re.match(r"(\w+) (\d+)x(\d+)x(\d+)", text)
    assert match is not None and match[1] == "sm90", problem
    return Tile(int(match[2]), int(match[3]), int(match[4]), "clusters of 2" in text, "in turn" in text)


def multiply_clocks(tile: Tile) -> float:
    """What the tensor cores need for a step."""
    return 2 * tile.rows * tile.columns * tile.depth / FLOP_PER_CLOCK


def copy_clocks(tile: Tile) -> float:
    """The same of the cache, and of shared memory: a stage is written, and read by two consumers with half its rows."""
    weights = tile.columns / 2 if tile.paired else tile.columns
    through_l2 = (tile.rows + weights) * tile.depth * ELEMENT / L2_PER_CLOCK
    written, read = tile.rows + tile.columns, tile.rows + 2 * tile.columns
    return max(through_l2, (written + read) * tile.depth * ELEMENT / SHARED_PER_CLOCK)


def tile_clocks(tile: Tile, depth: float, epilogue: float) -> float:
    """Of a tile in the middle of a block's work: the ring fills while the tile before is stored."""
    steps = math.ceil(depth / tile.depth)
    return max(steps * multiply_clocks(tile) + (0 if tile.in_turn else epilogue), steps * copy_clocks(tile))


def gemm(num_rows: int, experts: int, m: int, k: int, gated: bool, gathered: bool, shared: bool) -> float:
    """Seconds of [num_rows, k] by [experts, m, k], the rows spread evenly; `shared`: as chosen, or each block alone."""
    tile = tile_of(
        num_rows=num_rows, out_features=m, in_features=k, num_experts=experts, gated=gated, gathered=gathered
    )
    if not shared:
        tile = replace(tile, paired=False, in_turn=False)
    together = 2 if tile.paired else 1
    row_tiles = together * experts * math.ceil(num_rows / experts / tile.rows / together)
    tiles = row_tiles * math.ceil(m / tile.columns)
    epilogue = EPILOGUE_GATED if gated else EPILOGUE_PLAIN
    compute = math.ceil(tiles / SMS) * tile_clocks(tile, k, epilogue) / (CLOCK * SUSTAINED)
    out = m // 2 if gated else m
    memory = (experts * m * k + num_rows * (k + out)) * ELEMENT / (MEMORY * MEMORY_SHARE)
    return LAUNCH + max(compute, memory)


def weight_grad(num_rows: int, experts: int, m: int, k: int) -> float:
    """Seconds of [experts, m, k], each the product of an expert's rows."""
    tile = Tile(128, 256, 64)
    tiles = experts * math.ceil(m / tile.rows) * math.ceil(k / tile.columns)
    clocks = tile_clocks(tile, num_rows / experts, EPILOGUE_PLAIN)
    memory = (num_rows * (m + k) + experts * m * k) * ELEMENT / (MEMORY * MEMORY_SHARE)
    return LAUNCH + max(math.ceil(tiles / SMS) * clocks / (CLOCK * SUSTAINED), memory)


def stream(num_bytes: float) -> float:
    return LAUNCH + num_bytes / (MEMORY * MEMORY_SHARE)


def forward(shape: LayerShape, tokens: int, shared: bool) -> float:
    """The layer after routing: up-projection of gathered rows, down-projection, weighted sum per token."""
    rows = tokens * shape.top_k
    up = gemm(rows, shape.num_experts, shape.up_features, shape.hidden_size, shape.gated, True, shared)
    down = gemm(rows, shape.num_experts, shape.hidden_size, shape.ffn_size, False, False, shared)
    return up + down + stream((rows + tokens) * shape.hidden_size * ELEMENT)


def backward(shape: LayerShape, tokens: int, shared: bool) -> float:
    """Gradients of rows and weights of both projections, and the element-wise passes between them."""
    rows, h, f, up = tokens * shape.top_k, shape.hidden_size, shape.ffn_size, shape.up_features
    products = (
        gemm(rows, shape.num_experts, f, h, False, False, shared)
        + gemm(rows, shape.num_experts, h, up, False, False, shared)
        + weight_grad(rows, shape.num_experts, h, f)
        + weight_grad(rows, shape.num_experts, up, h)
    )
    passes = stream(2 * rows * h * ELEMENT) + stream(rows * (2 * up + 2 * f) * ELEMENT)
    return products + passes + stream((rows + tokens) * h * ELEMENT)


def few_tokens(shape: LayerShape, tokens: int, format: str | None = None) -> float:
    """Weights of the experts that are touched, read once, and where they are codes widened; uniform routing."""
    touched = shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** tokens)
    weights = touched * shape.expert_size
    read = weights * (BYTES[format] if format else ELEMENT) / (MEMORY * MEMORY_SHARE)
    widen = weights * CODES[format] / (SMS * LANES * CLOCK) if format else 0.0
    return 3 * LAUNCH + max(read, widen)


def quantized_gemm(num_rows: int, experts: int, m: int, k: int, format: str) -> float:
    """Seconds of [num_rows, k] by the codes of [experts, m, k]. Two blocks share a multiprocessor, each with a warp on
    every scheduler: one's epilogue runs under the other's multiplications."""
    tile = Tile(128, 128, 32)
    tiles = experts * math.ceil(num_rows / experts / tile.rows) * math.ceil(m / tile.columns)
    # A step reads 16 or 32 bytes of a row of codes, and the cache gives 32.
    through_l2 = tile.rows * tile.depth * ELEMENT + tile.columns * 32
    step = max(multiply_clocks(tile) / MMA_SYNC, CODES_STEP[format], through_l2 / L2_PER_CLOCK)
    return LAUNCH + math.ceil(tiles / SMS) * math.ceil(k / tile.depth) * step / (CLOCK * SUSTAINED)


def forward_of_codes(shape: LayerShape, tokens: int, format: str) -> float:
    """:func:`forward` with quantised weights."""
    rows = tokens * shape.top_k
    up = quantized_gemm(rows, shape.num_experts, shape.up_features, shape.hidden_size, format)
    down = quantized_gemm(rows, shape.num_experts, shape.hidden_size, shape.ffn_size, format)
    return up + down + stream((rows + tokens) * shape.hidden_size * ELEMENT)


def flops(shape: LayerShape, tokens: int) -> float:
    return 2 * tokens * shape.top_k * shape.expert_size


def rows(shared: bool) -> list[tuple[str, str, str]]:
    """What, the goal, the prediction."""

    def rate(seconds: float, work: float) -> str:
        return f"{work / seconds / 1e12:.0f} TFLOP/s"

    def micros(seconds: float) -> str:
        return f"{seconds * 1e6:.0f} µs"

    def layer(shape: LayerShape, tokens: int) -> str:
        return rate(forward(shape, tokens, shared), flops(shape, tokens))

    one_gemm = gemm(131072, 64, 2048, 2048, False, True, shared)
    dense = 2 * 131072 * 2048**2 / (SMS * FLOP_PER_CLOCK * CLOCK * SUSTAINED)
    moe_step = few_tokens(OLMOE, 1) + 2 * LAUNCH
    attention = 4 * OLMOE.hidden_size**2 * ELEMENT / (MEMORY * MEMORY_SHARE) + 6 * LAUNCH
    head = 50304 * OLMOE.hidden_size * ELEMENT / (MEMORY * MEMORY_SHARE)
    bandwidth: Callable[[float, float], str] = lambda s, b: f"{b / s / MEMORY:.0%} of {MEMORY / 1e12} TB/s"  # noqa: E731
    eight = OLMOE.num_experts * (1 - (1 - OLMOE.top_k / OLMOE.num_experts) ** 8) * OLMOE.expert_size * ELEMENT
    routed = 16384 * (OLMOE.num_experts * 4 + OLMOE.top_k * 20)
    return [
        ("G1: OLMoE layer, 32768 tokens", "≥ 600 TFLOP/s", layer(OLMOE, 32768)),
        ("G1: OLMoE layer, 8192 tokens", "≥ 500 TFLOP/s", layer(OLMOE, 8192)),
        ("G2: Phi-3.5 layer, 8192 tokens", "≥ 660 TFLOP/s", layer(PHIMOE, 8192)),
        (
            "G3: GEMM of 64 experts, 2048 rows each, 2048×2048",
            "≥ 95 % of dense",
            f"{dense / one_gemm:.0%} of dense",
        ),
        ("G4: NLLB layer, 32768 tokens", "≥ 600 TFLOP/s", layer(NLLB_MOE, 32768)),
        ("G5: OLMoE layer, one token", "≤ 30 µs", micros(few_tokens(OLMOE, 1))),
        ("G5: Phi-3.5 layer, one token", "≤ 80 µs", micros(few_tokens(PHIMOE, 1))),
        *(
            (f"{name} layer, one token, {format}", "–", micros(few_tokens(shape, 1, format)))
            for name, shape in (("OLMoE", OLMOE), ("Phi-3.5", PHIMOE))
            for format in CODES
        ),
        *(
            (
                f"OLMoE layer, 8192 tokens, {format}",
                "–",
                rate(forward_of_codes(OLMOE, 8192, format), flops(OLMOE, 8192)),
            )
            for format in CODES
        ),
        ("G6: OLMoE layer, 8 tokens", "≥ 75 % of bandwidth", bandwidth(few_tokens(OLMOE, 8), eight)),
        ("G7: routing and plan, 16384 tokens", "≤ 20 µs", micros(3 * LAUNCH + routed / (MEMORY * MEMORY_SHARE))),
        (
            "G8: OLMoE-1B-7B, one sequence",
            "≥ 1200 tokens/s",
            f"{1 / (16 * (moe_step + attention) + head):.0f} tokens/s",
        ),
        (
            "G9: OLMoE layer backward, 32768 tokens",
            "≥ 520 TFLOP/s",
            rate(backward(OLMOE, 32768, shared), 2 * flops(OLMOE, 32768)),
        ),
        ("G10: un-permute, 32768 tokens", "≥ 90 % of a copy", f"{MEMORY_SHARE:.0%} of {MEMORY / 1e12} TB/s"),
    ]


def table() -> str:
    lines = [
        "| what | goal | predicted, not measured | the same without clusters and turns |",
        "| --- | --- | --- | --- |",
    ]
    both = zip(rows(shared=True), rows(shared=False), strict=True)
    lines += [f"| {what} | {goal} | {paired} | {alone} |" for (what, goal, paired), (_, _, alone) in both]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    print(table())


if __name__ == "__main__":
    main()
