"""The relative error of a weight in every format that can be made: ``python benchmarks/quantization_error.py``."""

from __future__ import annotations

import torch

from moekernels import ops

FORMATS = {
    "int4 32": ("int4", {}),
    "int4 64": ("int4", {"group_size": 64}),
    "nf4 64": ("nf4", {}),
    "nf4 64 nested": ("nf4", {"double_quant": True}),
    "fp4 64": ("fp4", {}),
    "int8": ("int8", {}),
    "q8_0": ("q8_0", {}),
}


def main() -> None:
    torch.manual_seed(0)
    weight = torch.randn(1024, 2048)
    for name, (format, options) in FORMATS.items():
        quantized = ops.quantize(weight, format, **options)
        error = (quantized.dequantize() - weight).norm() / weight.norm()
        print(f"{name:14} {error:8.2%}  {8 * quantized.num_bytes / weight.numel():.2f} bits")


if __name__ == "__main__":
    main()
