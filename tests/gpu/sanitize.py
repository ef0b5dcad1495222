"""Every kernel on small shapes, for compute-sanitizer; what they compute is compared too.

    compute-sanitizer --tool racecheck --kernel-regex kns=moekernels python tests/gpu/sanitize.py

Runs on a CPU as well (`--device cpu`), where it only shows that it runs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

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


def check_gradients(layer: Layer, capacity: int | None) -> None:
    direction = torch.randn_like(layer.x.hidden)
    layer.assert_gradients(layer.gradients(direction, capacity), layer.true_gradients(direction, capacity))


def check_router(scoring: str, num_experts: int, device: torch.device) -> None:
    """Choices, their gradient, and the sums of the auxiliary losses with theirs."""
    logits = torch.randn(34, num_experts, device=device, requires_grad=True)
    direction, of_stats = torch.randn(34, 2, device=device), torch.randn(2, num_experts, device=device)

    def run(module: object, logits: Tensor, to: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        weights, expert_ids = module.route(logits, 2, scoring=scoring, renormalize=True)  # type: ignore[attr-defined]
        _, prob_sums, z_sums = module.router_stats(logits, 2, num_groups=2)  # type: ignore[attr-defined]
        grads = to(direction), to(of_stats), torch.ones_like(z_sums)
        return expert_ids, *torch.autograd.grad((weights, prob_sums, z_sums), logits, grads)

    expert_ids, grad = run(ops, logits, lambda x: x)
    wide = logits.detach().cpu().double().requires_grad_()
    true_ids, true_grad = run(reference, wide, lambda x: x.cpu().double())
    if not torch.equal(expert_ids.cpu(), true_ids.int()):
        raise AssertionError(f"route: {scoring}, {num_experts} experts")
    torch.testing.assert_close(grad.cpu().double(), true_grad, rtol=1e-4, atol=1e-4)


def check_rows(width: int, device: torch.device) -> None:
    """There and back, and the gradient where copies of a token must be looked for."""
    hidden = torch.randn(50, width, device=device, requires_grad=True)
    rows = ops.permute(hidden, torch.randperm(50, device=device).int())
    activated = ops.activation(rows, "gelu", gated=True)
    out = ops.unpermute(activated, torch.randperm(50, device=device).int().view(25, 2))
    (grad,) = torch.autograd.grad(out, hidden, torch.ones_like(out))
    truth = hidden.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(reference.activation(truth, "gelu", gated=True).sum(), truth)
    torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-5)


def check_quantized(format: str, counts: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """By the codes of a weight, whose last row ends within a tile, and with gradients of the rows."""
    weight = ops.quantize(torch.randn(len(counts), 52, 320, device=device) / 18, format)
    num_rows = sum(counts) + 1
    rows, bias = (torch.randn(*shape, device=device).to(dtype) for shape in ((num_rows, 320), (len(counts), 52)))
    offsets = torch.tensor([0, *counts], device=device).cumsum(0).int()
    more = {"gated": True, "activation": "silu"}
    results = []
    for multiply, stack, wide in (
        (ops.grouped_gemm, weight, dtype),
        (reference.grouped_gemm, weight.dequantize(torch.float64), torch.float64),
    ):
        inputs = rows.to(wide).requires_grad_()
        out = multiply(inputs, stack, offsets, bias=bias.to(wide), **more)
        plain = multiply(inputs.detach(), stack, offsets, bias=bias.to(wide), **more)
        (grad,) = torch.autograd.grad(out, inputs, torch.ones_like(out))
        results.append([x.double() for x in (plain, out, grad)])
    eps = torch.finfo(dtype).eps
    for actual, truth in zip(*results, strict=True):
        torch.testing.assert_close(actual, truth, rtol=16 * eps, atol=16 * eps)


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
                check_gradients(layer, None)
                check_gradients(layer, 3)
    for scoring in ("softmax", "top2_gate", "sparsemixer"):
        for num_experts in (16, 60, 1100):
            check_router(scoring, num_experts, device)
    for format in ("int4", "nf4", "int8", "int8_groups"):
        for dtype in DTYPES:
            check_quantized(format, (1, 0, 19, 2), dtype, device)
            check_quantized(format, (0, 150, 1, 70), dtype, device)
    for width in (38, 40, 2064):
        check_rows(width, device)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    print(f"ran {len(SHAPES) * len(TOKENS) * len(DTYPES)} layers on {device}")


if __name__ == "__main__":
    main()
