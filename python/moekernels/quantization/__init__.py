"""Quantised weights: the formats, and the object that stands for a parameter.

:class:`QuantizedWeight` is a tensor to whoever moves, copies, saves or multiplies it: the ops and
:func:`torch.nn.functional.linear` take it as a weight. :mod:`moekernels.quantization.formats` says what a format is.
"""

from moekernels.quantization.bitsandbytes import FP4, NF4, Int8
from moekernels.quantization.formats import FORMATS, Format, Layout, Part, parse_format
from moekernels.quantization.gguf import Q4_0, Q4_K, Q6_K, Q8_0
from moekernels.quantization.groups import Int4, Int8Groups
from moekernels.quantization.weight import QuantizedWeight

__all__ = [
    "FORMATS",
    "FP4",
    "NF4",
    "Q4_0",
    "Q4_K",
    "Q6_K",
    "Q8_0",
    "Format",
    "Int4",
    "Int8",
    "Int8Groups",
    "Layout",
    "Part",
    "QuantizedWeight",
    "parse_format",
]
