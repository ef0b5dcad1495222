"""Shapes and inputs for tests: the real layers and skewed routing that benchmarks measure, and the ugly edges."""

from __future__ import annotations

from moekernels.bench.shapes import (
    OLMOE,
    PHIMOE,
    REAL_LAYERS,
    ROUTINGS,
    SWITCH_BASE_8,
    LayerInputs,
    LayerShape,
    layer_inputs,
)

__all__ = [
    "OLMOE",
    "PHIMOE",
    "REAL_LAYERS",
    "ROUTINGS",
    "SMALL_LAYERS",
    "SWITCH_BASE_8",
    "LayerInputs",
    "LayerShape",
    "layer_inputs",
]

# Odd sizes, one expert, more experts than tokens, sizes below a vector: each breaks a different shortcut.
SMALL_LAYERS = (
    LayerShape("even", 64, 32, 8, 2),
    LayerShape("odd", 37, 19, 5, 3, activation="gelu"),
    LayerShape("one-expert", 16, 24, 1, 1, activation="gelu_tanh", bias=True),
    LayerShape("many-experts", 40, 8, 96, 4),
    LayerShape("ungated", 72, 51, 6, 2, activation="relu", gated=False, bias=True),
    LayerShape("tiny", 1, 1, 3, 2, activation="none", gated=False),
    LayerShape("wide", 520, 264, 4, 2),
)
