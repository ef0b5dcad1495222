"""How far what several processes compute is from what one computes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def split(total: int, size: int) -> list[int]:
    """Unlike numbers of rows for every rank, and none for one of four."""
    return {1: [total], 2: [total - 2, 2], 4: [2, 0, total - 3, 1]}[size]


def part(tensor: Tensor, counts: list[int], rank: int) -> Tensor:
    return tensor.split(counts)[rank]


def whole(tensor: Any) -> Any:
    if isinstance(tensor, DTensor):
        tensor = tensor.full_tensor()
    return None if tensor is None else tensor.detach()


def off(found: Tensor | None, expected: Tensor | None, least: float = 1e-3) -> float:
    """The largest difference, beside the largest value or at least `least`; a gradient that is not there is zero."""
    if found is None or expected is None:
        there = found if expected is None else expected
        return 0.0 if there is None else float(there.abs().max())
    assert found.shape == expected.shape, (found.shape, expected.shape)
    if not found.numel():
        return 0.0
    return float((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=least))


def gradients_off(found: nn.Module, expected: nn.Module) -> float:
    """Of all gradients; every rank calls this."""
    pairs = zip(found.named_parameters(), expected.named_parameters(), strict=True)
    differences = []
    for (name, mine), (other, theirs) in pairs:
        assert name == other
        differences.append(off(whole(mine.grad), whole(theirs.grad), least=0.1))
    return max(differences)


def normal_(module: nn.Module, seed: int = 3, std: float = 0.3) -> nn.Module:
    """All parameters anew, so that nothing is zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return module
