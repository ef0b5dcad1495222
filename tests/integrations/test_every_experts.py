"""The drop-in on every experts class of the installed transformers, against the loop of that class."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers
from torch import Tensor, nn

from moekernels.integrations.transformers import replace_moe_layers
from moekernels.integrations.transformers.fused import structure_of
from tests.integrations.transformers_models import MAJOR

pytestmark = pytest.mark.skipif(MAJOR < 5, reason="the experts interface came with transformers 5")

if MAJOR >= 5:
    from tests.integrations.every_experts import experts_classes, inputs, make_experts

    CLASSES = list(experts_classes())
else:
    CLASSES = []


def run(experts: nn.Module) -> tuple[Tensor, ...]:
    """The output, and the gradients of hidden states, weights and parameters."""
    hidden, ids, weights = inputs()
    hidden.requires_grad_()
    weights.requires_grad_()
    out = experts(hidden, ids, weights)
    wanted = (hidden, weights, *experts.parameters())
    return out.detach(), *torch.autograd.grad(out.float().square().sum(), wanted)


def test_there_are_as_many_as_known() -> None:
    version = tuple(int(number) for number in transformers.__version__.split(".")[:2])
    assert len(set(CLASSES)) >= (68 if version >= (5, 24) else 20)


@pytest.mark.parametrize("experts_class", CLASSES, ids=lambda cls: cls.__name__)
def test_every_class_runs_on_the_kernels(experts_class: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    experts = make_experts(experts_class)
    truth = run(experts)
    assert not isinstance(structure_of(experts), str), structure_of(experts)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replace_moe_layers(nn.Sequential(experts))
        monkeypatch.setattr(type(experts).original, "forward", None)
        for ours, expected in zip(run(experts), truth, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


def test_gates_of_other_bounds_compile_one_after_the_other() -> None:
    """Whose limits torch.compile takes for symbols from the second one on."""
    torch.compiler.reset()
    for name in ("DeepseekV4Experts", "GptOssExperts", "MiniMaxM3VLExperts"):
        experts = make_experts(next(cls for cls in CLASSES if cls.__name__ == name))
        truth = experts(*inputs())
        replace_moe_layers(nn.Sequential(experts))
        compiled = torch.compile(experts, fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(*inputs()), truth, rtol=1e-4, atol=1e-4)
    experts.swiglu_limit = experts.swiglu_limit / 4  # guarded: the graph is made anew
    expected = experts(*inputs())
    assert not torch.allclose(expected, truth, rtol=1e-2)
    torch.testing.assert_close(compiled(*inputs()), expected, rtol=1e-4, atol=1e-4)
