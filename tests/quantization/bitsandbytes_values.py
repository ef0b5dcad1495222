"""The values of bitsandbytes' 4-bit weights, by its tables and scales alone."""

from __future__ import annotations

from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor


def four_bit_values(codes: Tensor, state: Any) -> Tensor:
    """What :func:`bitsandbytes.functional.dequantize_4bit` is to return, float32 of the weight's shape.

    That function itself has other values on CPUs with AVX-512 where rows are no multiple of blocks
    (`findings/bnb_avx512_rows_of_part_blocks.sh`).
    """
    absmax = state.absmax
    if state.nested:
        absmax = functional.dequantize_blockwise(absmax, state.state2) + state.offset
    flat = codes.view(torch.uint8).view(-1).int()
    values = state.code[torch.stack([flat >> 4, flat & 15], dim=1).view(-1)]
    count = state.shape.numel()
    return (values[:count] * absmax.repeat_interleave(state.blocksize)[:count]).view(state.shape)
