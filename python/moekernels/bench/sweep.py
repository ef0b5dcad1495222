"""The kernels and the layer of one shape, over token counts, routings and dtypes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from moekernels.bench import backward, kernels, quantized
from moekernels.bench.backward import BACKWARD
from moekernels.bench.case import Case, Note, measure, say
from moekernels.bench.check import Mismatch
from moekernels.bench.kernels import KERNELS
from moekernels.bench.layer import layer_case
from moekernels.bench.roofs import Roofs, name_of
from moekernels.bench.shapes import LayerInputs, LayerShape, layer_inputs, with_tokens
from moekernels.bench.table import Row
from moekernels.bench.training import step_case

LAYERS = {"layer": False, "layer-with-routing": True}
STEP = "layer-forward+backward"
PARTS = (*KERNELS, *LAYERS)
BACKWARD_PARTS = (*BACKWARD, STEP)


@dataclass(frozen=True)
class Sweep:
    """What is to be measured.

    Attributes:
        parts: some of :data:`PARTS` and :data:`BACKWARD_PARTS`.
        weights: formats to quantise the experts to: only the layer is measured then.
        activations: "int8" rounds what those are multiplied with.
        budget: seconds per row; see :func:`~moekernels.bench.case.measure`, also for what comes after it. Bounds are
            those of a uniform routing.
    """

    shape: LayerShape
    tokens: Sequence[int]
    dtypes: Sequence[torch.dtype]
    routings: Sequence[str]
    device: torch.device
    parts: Sequence[str] = PARTS
    budget: float = 1.0
    check: bool = False
    baselines: bool = True
    weights: Sequence[str] = ()
    activations: str | None = None
    bounds: bool = False
    min_rounds: int = 1

    def __len__(self) -> int:
        return len(self.tokens) * len(self.dtypes) * len(self.routings) * len(self.weights or self.parts)

    def require_memory(self, free: int) -> None:
        """Raises ValueError if the largest inputs and results take more than `free` bytes."""
        dtype = max(self.dtypes, key=lambda dtype: dtype.itemsize)
        num_tokens = max(self.tokens)
        backward = any(part in BACKWARD_PARTS for part in self.parts)
        needed = memory_needed(self.shape, num_tokens, dtype, self.check, backward)
        if needed > free:
            raise ValueError(
                f"{self.shape} with {num_tokens} tokens in {name_of(dtype)} takes about {needed / 2**30:.1f} GiB, "
                f"and {free / 2**30:.1f} GiB are free on {self.device}"
            )

    def run(self, roofs: Roofs | None, note: Note = say) -> Iterator[Row | Mismatch]:
        """Measures one row after the other; what computed something else comes as a :class:`Mismatch`."""
        for dtype in self.dtypes:
            weights = layer_inputs(self.shape, 0, dtype, self.device)
            for routing in self.routings:
                for num_tokens in self.tokens:
                    x = with_tokens(weights, self.shape, num_tokens, routing)
                    for case in self._cases(x, note):
                        try:
                            yield measure(
                                case, self.shape, x, routing, roofs, self.budget,
                                check=self.check, baselines=self.baselines, note=note,
                                bounds=self.bounds and routing == "uniform", min_rounds=self.min_rounds,
                            )  # fmt: skip
                        except Mismatch as mismatch:
                            yield mismatch

    def _cases(self, x: LayerInputs, note: Note) -> Iterator[Case]:
        if self.weights:
            yield from (quantized.layer_case(x, self.shape, format, self.activations) for format in self.weights)
            return
        yield from kernels.cases(x, self.shape, self.parts)
        for part, with_routing in LAYERS.items():
            if part in self.parts:
                yield layer_case(x, self.shape, with_routing, note)
        yield from backward.cases(x, self.shape, self.parts)
        if STEP in self.parts:
            yield step_case(x, self.shape)


def layer_of(rows: Sequence[Row]) -> str:
    """The name of the layer whose parts the rows are.

    Raises:
        ValueError: there are rows of several, or none.
    """
    of_formats = [quantized.row_name(format) for format in quantized.FORMATS_TO_MAKE]
    of_formats += [quantized.row_name(format, "int8") for format in quantized.INTEGER_FORMATS]
    parts = sorted((*PARTS, *BACKWARD_PARTS, *of_formats), key=len, reverse=True)
    ends = [f" {name}" for part in parts for name in (part, part.replace("-", " "))]
    names = {row.shape.removesuffix(next(filter(row.shape.endswith, ends), "")) for row in rows}
    if len(names) != 1:
        raise ValueError(f"rows of one layer are wanted, got those of {', '.join(sorted(names)) or 'none'}")
    return names.pop()


def memory_needed(
    shape: LayerShape, num_tokens: int, dtype: torch.dtype, check: bool = False, backward: bool = False
) -> int:
    """Bytes of a layer's weights, and of what its kernels, their baselines and definitions keep at once; roughly."""
    stack = shape.num_experts * shape.expert_size
    row = 2 * shape.hidden_size + shape.up_features + shape.ffn_size
    rows = num_tokens * shape.top_k * row * (2 * dtype.itemsize + (8 if check else 0))
    # Of gradients there are those of two contestants at once, or the definition's, twice.
    gradients = stack * ((3 * dtype.itemsize + 8 if check else 2 * dtype.itemsize) if backward else 0)
    return stack * dtype.itemsize + rows + gradients + 8 * shape.expert_size
