#!/usr/bin/env bash
# torch 2.11.0: an autograd.Function whose passes are a functional collective has a wrong gradient under
# torch.compile(backend="eager"), the backend that one takes to find out whether tracing is at fault. Nothing is said, and
# the outputs are right. backend="aot_eager" gives the right gradient. One process in a group of its own is enough, where
# the sum over all ranks is the tensor itself. 2.13 gives the right gradient with both.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import sys

import torch
import torch.distributed as dist
from torch.distributed import _functional_collectives as collectives

dist.init_process_group("gloo", f"file://{sys.argv[1]}/store", world_size=1, rank=0)


class Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor):
        return collectives.wait_tensor(collectives.all_reduce(tensor, "sum", dist.group.WORLD))

    @staticmethod
    def backward(ctx, grad):
        return collectives.wait_tensor(collectives.all_reduce(grad, "sum", dist.group.WORLD))


def layer(hidden):
    return Sum.apply(hidden * 2).cos()


def run(call):
    hidden = torch.arange(15.0).div(7).requires_grad_()
    out = call(hidden)
    out.sum().backward()
    return out.detach(), hidden.grad


out, grad = run(layer)
off = {}
for backend in ("eager", "aot_eager"):
    torch._dynamo.reset()
    compiled_out, compiled_grad = run(torch.compile(layer, backend=backend))
    assert torch.allclose(compiled_out, out), backend
    off[backend] = (compiled_grad - grad).abs().max().item()
largest = grad.abs().max().item()
print(f"torch {torch.__version__}: gradients up to {largest:.3f}; off by {off['eager']:.3f} with backend='eager',")
print(f"  by {off['aot_eager']:.3f} with backend='aot_eager'; outputs are right with both")
assert off["eager"] > 1 and off["aot_eager"] < 1e-6
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.11.0
"$folder/venv/bin/python" "$folder/check.py" "$folder"
