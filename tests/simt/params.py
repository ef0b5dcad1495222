"""The parameter structs of ``csrc/include/moekernels/params.h``, mirrored for ctypes.

``test_runtime.py`` compares every size and offset with what C++ says.
"""

from __future__ import annotations

import ctypes
from ctypes import c_bool, c_float, c_int32, c_int64
from enum import IntEnum

import torch


class InputPointer(ctypes.c_void_p):
    """A pointer to memory the op only reads."""


class TablePointer(InputPointer):
    """A pointer to an array in host memory: of matrices and their row strides, or of vectors."""


class OutputPointer(ctypes.c_void_p):
    """A pointer to memory the op writes."""


class DType(IntEnum):
    FLOAT32 = 0
    BFLOAT16 = 1
    FLOAT16 = 2

    @classmethod
    def of(cls, dtype: torch.dtype) -> DType:
        return {torch.float32: cls.FLOAT32, torch.bfloat16: cls.BFLOAT16, torch.float16: cls.FLOAT16}[dtype]


class Scoring(IntEnum):
    SOFTMAX = 0
    TOP2_GATE = 1
    SPARSEMIXER = 2


class Activation(IntEnum):
    NONE = 0
    RELU = 1
    GELU = 2
    GELU_TANH = 3
    SILU = 4
    RELU2 = 5
    SWIGLU = 6


class Swiglu(ctypes.Structure):
    _fields_ = [("alpha", c_float), ("limit", c_float), ("shift", c_float), ("interleaved", c_bool)]


class WeightPart(ctypes.Structure):
    _fields_ = [("data", InputPointer), ("row_stride", c_int64)]


class RouteParams(ctypes.Structure):
    _fields_ = [
        ("logits", InputPointer),
        ("noise", InputPointer),
        ("mask", InputPointer),
        ("weights", OutputPointer),
        ("expert_ids", OutputPointer),
        ("num_tokens", c_int64),
        ("logits_stride", c_int64),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("scoring", c_int32),
        ("logits_dtype", c_int32),
        ("probs_dtype", c_int32),
        ("renormalize", c_bool),
        ("eps", c_float),
    ]


class PlanParams(ctypes.Structure):
    _fields_ = [
        ("expert_ids", InputPointer),
        ("token_order", InputPointer),
        ("expert_offsets", OutputPointer),
        ("token_of_row", OutputPointer),
        ("row_of_slot", OutputPointer),
        ("workspace", OutputPointer),
        ("num_tokens", c_int64),
        ("capacity", c_int64),
        ("group_size", c_int64),
        ("num_experts", c_int32),
        ("top_k", c_int32),
    ]


class PermuteParams(ctypes.Structure):
    _fields_ = [
        ("hidden", InputPointer),
        ("token_of_row", InputPointer),
        ("rows", OutputPointer),
        ("num_tokens", c_int64),
        ("num_rows", c_int64),
        ("hidden_size", c_int64),
        ("hidden_stride", c_int64),
        ("dtype", c_int32),
    ]


class GroupedGemmParams(ctypes.Structure):
    _fields_ = [
        ("rows", InputPointer),
        ("token_of_row", InputPointer),
        ("weight", InputPointer),
        ("weight_parts", TablePointer),
        ("bias", InputPointer),
        ("bias_parts", TablePointer),
        ("row_scale", InputPointer),
        ("expert_offsets", InputPointer),
        ("out", OutputPointer),
        ("workspace", OutputPointer),
        ("num_rows", c_int64),
        ("num_source_rows", c_int64),
        ("row_stride", c_int64),
        ("weight_expert_stride", c_int64),
        ("weight_row_stride", c_int64),
        ("bias_stride", c_int64),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("num_experts", c_int32),
        ("num_parts", c_int32),
        ("activation", c_int32),
        ("swiglu", Swiglu),
        ("gated", c_bool),
        ("transposed", c_bool),
        ("allow_tf32", c_bool),
        ("batch_invariant", c_bool),
        ("dtype", c_int32),
    ]


class CodeOrder(IntEnum):
    PAIRS = 0
    HALVES = 1
    BYTES = 2


class QuantizedWeightParams(ctypes.Structure):
    _fields_ = [
        ("codes", InputPointer),
        ("scales", InputPointer),
        ("table", InputPointer),
        ("map", InputPointer),
        ("nested", InputPointer),
        ("offset", InputPointer),
        ("codes_stride", c_int64),
        ("scales_stride", c_int64),
        ("nested_stride", c_int64),
        ("group", c_int64),
        ("unit", c_float),
        ("order", c_int32),
        ("scales_dtype", c_int32),
    ]


class QuantizedGemmParams(ctypes.Structure):
    _fields_ = [
        ("gemm", GroupedGemmParams),
        ("weight", QuantizedWeightParams),
        ("int8_rows", c_bool),
        ("int8_threshold", c_float),
    ]


class UnpermuteParams(ctypes.Structure):
    _fields_ = [
        ("rows", InputPointer),
        ("row_of_slot", InputPointer),
        ("weights", InputPointer),
        ("out", OutputPointer),
        ("num_tokens", c_int64),
        ("num_rows", c_int64),
        ("hidden_size", c_int64),
        ("row_stride", c_int64),
        ("top_k", c_int32),
        ("dtype", c_int32),
    ]


class GroupedWeightGradParams(ctypes.Structure):
    _fields_ = [
        ("grad_rows", InputPointer),
        ("rows", InputPointer),
        ("grad_token_of_row", InputPointer),
        ("token_of_row", InputPointer),
        ("bias_scale", InputPointer),
        ("expert_offsets", InputPointer),
        ("grad_weight", OutputPointer),
        ("grad_bias", OutputPointer),
        ("num_rows", c_int64),
        ("num_source_grad_rows", c_int64),
        ("num_source_rows", c_int64),
        ("grad_row_stride", c_int64),
        ("row_stride", c_int64),
        ("out_features", c_int64),
        ("in_features", c_int64),
        ("num_experts", c_int32),
        ("allow_tf32", c_bool),
        ("dtype", c_int32),
    ]


class ActivationParams(ctypes.Structure):
    _fields_ = [
        ("linear", InputPointer),
        ("out", OutputPointer),
        ("num_rows", c_int64),
        ("width", c_int64),
        ("activation", c_int32),
        ("swiglu", Swiglu),
        ("gated", c_bool),
        ("dtype", c_int32),
    ]


class ActivationGradParams(ctypes.Structure):
    _fields_ = [
        ("grad_out", InputPointer),
        ("linear", InputPointer),
        ("row_scale", InputPointer),
        ("expert_offsets", InputPointer),
        ("grad_linear", OutputPointer),
        ("scaled", OutputPointer),
        ("grad_scale", OutputPointer),
        ("num_rows", c_int64),
        ("width", c_int64),
        ("num_experts", c_int32),
        ("activation", c_int32),
        ("swiglu", Swiglu),
        ("gated", c_bool),
        ("dtype", c_int32),
    ]


class UnpermuteGradParams(ctypes.Structure):
    _fields_ = [
        ("grad_out", InputPointer),
        ("rows", InputPointer),
        ("row_of_slot", InputPointer),
        ("token_of_row", InputPointer),
        ("weights", InputPointer),
        ("grad_rows", OutputPointer),
        ("grad_weights", OutputPointer),
        ("num_tokens", c_int64),
        ("num_rows", c_int64),
        ("hidden_size", c_int64),
        ("grad_stride", c_int64),
        ("row_stride", c_int64),
        ("top_k", c_int32),
        ("dtype", c_int32),
    ]


class RouteGradParams(ctypes.Structure):
    _fields_ = [
        ("logits", InputPointer),
        ("expert_ids", InputPointer),
        ("grad_weights", InputPointer),
        ("grad_logits", OutputPointer),
        ("num_tokens", c_int64),
        ("logits_stride", c_int64),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("scoring", c_int32),
        ("logits_dtype", c_int32),
        ("probs_dtype", c_int32),
        ("renormalize", c_bool),
        ("eps", c_float),
    ]


class RouterStatsParams(ctypes.Structure):
    _fields_ = [
        ("logits", InputPointer),
        ("mask", InputPointer),
        ("counts", OutputPointer),
        ("prob_sums", OutputPointer),
        ("z_sums", OutputPointer),
        ("workspace", OutputPointer),
        ("num_groups", c_int64),
        ("group_size", c_int64),
        ("logits_stride", c_int64),
        ("num_experts", c_int32),
        ("top_k", c_int32),
        ("logits_dtype", c_int32),
    ]


class RouterStatsGradParams(ctypes.Structure):
    _fields_ = [
        ("logits", InputPointer),
        ("mask", InputPointer),
        ("grad_prob_sums", InputPointer),
        ("grad_z_sums", InputPointer),
        ("grad_logits", OutputPointer),
        ("num_groups", c_int64),
        ("group_size", c_int64),
        ("logits_stride", c_int64),
        ("num_experts", c_int32),
        ("logits_dtype", c_int32),
    ]


STRUCTS: dict[str, type[ctypes.Structure]] = {
    "route": RouteParams,
    "plan": PlanParams,
    "permute": PermuteParams,
    "grouped_gemm": GroupedGemmParams,
    "quantized_weight": QuantizedWeightParams,  # no op: part of the following
    "quantized_gemm": QuantizedGemmParams,
    "unpermute": UnpermuteParams,
    "grouped_weight_grad": GroupedWeightGradParams,
    "activation": ActivationParams,
    "activation_grad": ActivationGradParams,
    "unpermute_grad": UnpermuteGradParams,
    "route_grad": RouteGradParams,
    "router_stats": RouterStatsParams,
    "router_stats_grad": RouterStatsGradParams,
}
