"""The ops: plain functions on tensors, on the CPU and on NVIDIA GPUs.

Data flows one way: logits -> :func:`route` -> :func:`plan` -> :func:`permute` -> :func:`grouped_gemm` (up) ->
:func:`grouped_gemm` (down) -> :func:`unpermute`. :func:`sparse_mlp` is everything after the plan as one op.
Shapes never depend on data and nothing waits for the device. :mod:`moekernels.ops.reference` defines each op in plain
PyTorch. Each is registered as ``torch.ops.moekernels.<name>``. All have gradients of first order, by kernels of their
own; :func:`activation` and :func:`router_stats` stand beside the chain, for training. :func:`linear`,
:func:`rms_norm` and :func:`attention` are what else a decoding step is made of: kernels on the CPU, torch elsewhere.

Letters: T tokens, E experts, K choices per token, N = T * K rows, H hidden size, F expert size.
"""

from moekernels.ops import _register  # noqa: F401
from moekernels.ops._types import Plan, Routing
from moekernels.ops.activation import ACTIVATIONS, Swiglu, activation
from moekernels.ops.attention import attention
from moekernels.ops.grouped_gemm import grouped_gemm
from moekernels.ops.grouped_weight_grad import grouped_weight_grad
from moekernels.ops.linear import linear
from moekernels.ops.permute import permute, unpermute
from moekernels.ops.plan import plan
from moekernels.ops.quantize import dequantize, quantize
from moekernels.ops.rms_norm import rms_norm
from moekernels.ops.route import SCORINGS, route
from moekernels.ops.route_by_score import route_by_score
from moekernels.ops.router_stats import RouterStats, router_stats
from moekernels.ops.sparse_mlp import sparse_mlp

__all__ = [
    "ACTIVATIONS",
    "SCORINGS",
    "Plan",
    "RouterStats",
    "Routing",
    "Swiglu",
    "activation",
    "attention",
    "dequantize",
    "grouped_gemm",
    "grouped_weight_grad",
    "linear",
    "permute",
    "plan",
    "quantize",
    "rms_norm",
    "route",
    "route_by_score",
    "router_stats",
    "sparse_mlp",
    "unpermute",
]
