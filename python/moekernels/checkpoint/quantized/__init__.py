"""Quantised weights in checkpoint files: which tensors make up one, in bitsandbytes' layout and in our own."""

from moekernels.checkpoint.quantized.layouts import QuantizedReader, check_method, check_whole
from moekernels.checkpoint.quantized.saving import experts_slice, quantized_tensors, weight_of

__all__ = ["QuantizedReader", "check_method", "check_whole", "experts_slice", "quantized_tensors", "weight_of"]
