from __future__ import annotations

import pytest
import torch

from moekernels import cpu_isa, ops
from moekernels.ops import reference
from tests.isa import isas
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "shape", [(1, 1, 768), (3, 70), (2, 3, 5), (40, 1), (300, 1000), (0, 8), (2, 0), (9,)], ids=str
)
@pytest.mark.parametrize("isa", isas("portable", "avx2", "amx"))
def test_against_the_definition(dtype: torch.dtype, shape: tuple[int, ...], isa: str) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    truth = reference.rms_norm(x.double(), weight.double(), eps=0.1)
    plain = torch.nn.functional.rms_norm(x, weight.shape, weight, 0.1)
    with cpu_isa(isa):
        assert_accurate(ops.rms_norm(x, weight, eps=0.1), truth, plain)


def test_strides() -> None:
    x, weight = torch.randn(6, 40).T, torch.randn(12)[::2]
    expected = reference.rms_norm(x, weight)
    torch.testing.assert_close(ops.rms_norm(x, weight), expected)


def test_a_row_does_not_depend_on_the_others() -> None:
    x, weight = torch.randn(500, 300).bfloat16(), torch.randn(300).bfloat16()
    x[7, 5] = torch.nan
    together = ops.rms_norm(x, weight)
    assert torch.equal(together.isnan().all(dim=1), torch.arange(500) == 7)
    for row in (0, 8, 499):
        assert torch.equal(ops.rms_norm(x[row], weight), together[row])


def test_zeros_and_large_numbers() -> None:
    weight = torch.ones(64).half()
    assert torch.equal(ops.rms_norm(torch.zeros(2, 64).half(), weight), torch.zeros(2, 64).half())
    assert torch.equal(ops.rms_norm(torch.full((2, 64), 60000.0).half(), weight), torch.ones(2, 64).half())


def test_gradients_are_those_of_torch() -> None:
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (5,))]
    assert torch.autograd.gradcheck(lambda *x: ops.rms_norm(*x), leaves)
    narrow = [leaf.detach().float().requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(ops.rms_norm(*narrow).square().sum(), narrow)
    truth = torch.autograd.grad(ops.rms_norm(*leaves).square().sum(), leaves)
    for grad, expected in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, expected.float())


def test_in_a_graph_and_on_the_meta_device() -> None:
    x, weight = torch.randn(3, 40), torch.randn(40)
    compiled = torch.compile(lambda x: ops.rms_norm(x, weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.rms_norm(x, weight))
    assert ops.rms_norm(x.to("meta"), weight.to("meta")).shape == (3, 40)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.ones(3), r"rms_norm: weight must have shape \[hidden_size\] = \[4\], got \[3\]"),
        (torch.ones(1, 4), r"weight must have 1 dimensions \[hidden_size\], got 2"),
    ],
)
def test_wrong_arguments(weight: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.rms_norm(torch.zeros(2, 4), weight)
