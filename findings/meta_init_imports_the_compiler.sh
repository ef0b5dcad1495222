#!/usr/bin/env bash
# torch 2.13.0: drawing weights on the meta device, where there is nothing to draw, imports torch's compiler. The first
# `torch.nn.Embedding` made there, or any `normal_` of a meta tensor, brings some 800 modules, torch._dynamo,
# torch._inductor and sympy among them: 70 MiB and a second, for as long as the process lives. Whoever builds a model on
# "meta" so that nothing is spent before it is loaded pays this. `torch.nn.utils.skip_init`, which is for not drawing,
# imports 480 modules and sympy for a Linear, which on meta alone, drawn by `kaiming_uniform_`, imports none.
# Needs Linux.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys

import torch

WAYS = {
    "Linear": lambda: torch.nn.Linear(8, 8),
    "Linear on meta": lambda: torch.nn.Linear(8, 8, device="meta"),
    "Linear by skip_init": lambda: torch.nn.utils.skip_init(torch.nn.Linear, 8, 8),
    "Embedding": lambda: torch.nn.Embedding(8, 8),
    "Embedding on meta": lambda: torch.nn.Embedding(8, 8, device="meta"),
}


def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1024


modules, memory = len(sys.modules), resident()
WAYS[sys.argv[1]]()
modules, memory = len(sys.modules) - modules, resident() - memory
print(f"torch {torch.__version__}, {sys.argv[1]}: {modules} modules imported, {memory:.0f} MiB")
least, most = {"Linear by skip_init": (200, 1000), "Embedding on meta": (500, 2000)}.get(sys.argv[1], (0, 20))
assert least <= modules <= most
assert ("sympy" in sys.modules) == (least > 0) and ("torch._dynamo" in sys.modules) == (least >= 500)
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.3.5
for way in Linear "Linear on meta" "Linear by skip_init" Embedding "Embedding on meta"; do
  "$folder/venv/bin/python" "$folder/check.py" "$way"
done
