"""Every kernel on small shapes, for compute-sanitizer; what they compute is compared too.

    compute-sanitizer --tool racecheck --kernel-regex kns=moekernels python tests/gpu/sanitize.py

Runs on a CPU as well (`--device cpu`), where it only shows that it runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from moekernels import ops
from moekernels.ops import reference
from tests.generators import LayerShape
from tests.gpu.layer import Layer

# Aligned and not, gated and not, one token (the path for few rows) and enough for several tiles.
SHAPES = (
    LayerShape("aligned", 128, 64, 8, 2),
    LayerShape("ungated", 64, 96, 4, 1, activation="relu", gated=False, bias=True),
    LayerShape("odd", 37, 19, 5, 3, activation="gelu"),
)
TOKENS = (1, 7, 200)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def check(layer: Layer, capacity: int | None) -> None:
    error = (layer.forward(capacity).cpu().double() - layer.truth(capacity)).abs().max().item()
    if error > layer.error_scale():
        raise AssertionError(f"{layer.shape} {tuple(layer.x.hidden.shape)} {layer.x.hidden.dtype}: error {error:.3g}")


def check_backward_gemms(layer: Layer) -> None:
    """The gradients of the up projection: of its rows, of its weight, and of its bias."""
    _, expert_ids = ops.route(layer.logits, layer.shape.top_k)
    plan = ops.plan(expert_ids, layer.shape.num_experts)
    weight = layer.x.up_weight
    grad_rows = torch.randn(plan.token_of_row.shape[0], weight.shape[1], device=weight.device).to(weight.dtype)
    hidden, offsets, tokens = layer.x.hidden, plan.expert_offsets, plan.token_of_row
    actual = (
        ops.grouped_gemm(grad_rows, weight, offsets, transposed=True),
        *ops.grouped_weight_grad(grad_rows, hidden, offsets, token_of_row=tokens, need_bias=True),
    )
    wide = [x.double().cpu() for x in (grad_rows, weight, hidden)]
    expected = (
        reference.grouped_gemm(wide[0], wide[1], offsets.cpu(), transposed=True),
        *reference.grouped_weight_grad(wide[0], wide[2], offsets.cpu(), token_of_row=tokens.cpu(), need_bias=True),
    )
    for a, b in zip(actual, expected, strict=True):
        error = (a.cpu().double() - b).abs().max().item()
        if (
            error
            > 64 * torch.finfo(torch.float32).eps * b.abs().max().item() + torch.finfo(a.dtype).eps * b.abs().max()
        ):
            raise AssertionError(f"backward: {layer.shape} {a.dtype}: error {error:.3g}")


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default=torch.device("cuda"))
    device = parser.parse_args().device
    for shape in SHAPES:
        for num_tokens in TOKENS:
            for dtype in DTYPES:
                layer = Layer.random(shape, num_tokens, dtype, device)
                check(layer, None)
                check(layer, 3)
                check_backward_gemms(layer)
    for scoring in ("softmax", "top2_gate", "sparsemixer"):
        logits = torch.randn(33, 16, device=device)
        _, expert_ids = ops.route(logits, 2, scoring=scoring)
        if not torch.equal(expert_ids.cpu(), reference.route(logits.cpu(), 2, scoring=scoring)[1]):
            raise AssertionError(f"route: {scoring}")
    hidden = torch.randn(50, 40, device=device)
    rows = ops.permute(hidden, torch.randperm(50, device=device).int())
    ops.unpermute(rows, torch.randperm(50, device=device).int().view(25, 2))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(f"ran {len(SHAPES) * len(TOKENS) * len(DTYPES)} layers on {device}")


if __name__ == "__main__":
    main()
