#!/usr/bin/env bash
# torch 2.13.0: a custom operator with a gradient by torch.library.register_autograd
#   - raises under torch.func.grad and vmap(grad): "In order to use an autograd.Function with functorch transforms ..., it
#     must override the setup_context staticmethod", though setup_context was given;
#   - is silently constant in forward mode: torch.func.jvp and dual numbers give a tangent of zeros (or none), no error.
# An operator without the registration, made of an autograd.Function with a setup_context, passes through grad.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/check.py" <<'PY'
import torch
import torch.autograd.forward_ad as forward_ad


@torch.library.custom_op("finding::square", mutates_args=())
def square(x: torch.Tensor) -> torch.Tensor:
    return x * x


@square.register_fake
def _(x):
    return torch.empty_like(x)


def setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


square.register_autograd(lambda ctx, grad: 2 * grad * ctx.saved_tensors[0], setup_context=setup_context)

print("torch", torch.__version__)
x = torch.tensor([1.0, 2.0])
leaf = x.clone().requires_grad_()
print("autograd:", torch.autograd.grad(square(leaf).sum(), leaf)[0].tolist())
try:
    print("torch.func.grad:", torch.func.grad(lambda y: square(y).sum())(x).tolist())
    raise SystemExit("it passes through torch.func.grad now")
except RuntimeError as error:
    assert "must override the setup_context staticmethod" in str(error), error
    print("torch.func.grad:", str(error)[:120])
value, tangent = torch.func.jvp(square, (x,), (torch.ones(2),))
print("torch.func.jvp:", value.tolist(), "with tangent", tangent.tolist(), "where 2x =", (2 * x).tolist())
assert tangent.tolist() == [0.0, 0.0]
with forward_ad.dual_level():
    dual = forward_ad.unpack_dual(square(forward_ad.make_dual(x, torch.ones(2))))
print("a dual number: tangent", dual.tangent)
assert dual.tangent is None
PY
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.13.0 numpy
"$folder/venv/bin/python" "$folder/check.py"
