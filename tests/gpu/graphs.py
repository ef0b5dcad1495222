"""What tests of CUDA graphs share."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

Result = TypeVar("Result")


def captured(run: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
    """The run as a graph, and what it returned: tensors that a replay writes. It ran once before, to warm up."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph, result
