#!/usr/bin/env bash
# bitsandbytes 0.50.2 on a CPU with AVX-512: dequantize_4bit is wrong where the row of a weight is no multiple of the
# blocksize, by about a quarter of the weight's size for rows of 96 in blocks of 64. Every row is read as if its blocks began
# with it, but the scales run on from row to row. Codes and scales are right; so are other CPUs, and rows of whole blocks.
set -euo pipefail
if ! grep -qw avx512f /proc/cpuinfo; then
  echo "this CPU has no AVX-512: nothing to see"
  exit 0
fi
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import bitsandbytes
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit

for width, is_wrong in ((128, False), (96, True), (160, True)):
    weight = torch.randn(64, width, generator=torch.Generator().manual_seed(0))
    codes, state = quantize_4bit(weight, blocksize=64, quant_type="nf4")
    flat = codes.view(-1).int()
    values = state.code[torch.stack([flat >> 4, flat & 15], dim=1)].view(-1, 64) * state.absmax[:, None]
    off = (dequantize_4bit(codes, state) - values.view(64, width)).norm() / weight.norm()
    print(f"bitsandbytes {bitsandbytes.__version__}, torch {torch.__version__}: rows of {width} in blocks of 64 are off by "
          f"{float(off):.1%} of the weight")
    assert (float(off) > 0.1) == is_wrong
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 bitsandbytes==0.50.2
"$folder/venv/bin/python" "$folder/check.py"
