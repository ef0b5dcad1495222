from __future__ import annotations

import pytest
import torch

from moekernels import batch_invariant, cpu_isa, ops
from moekernels.ops import reference
from tests.isa import isa_case, isas
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(40,), (1, 40), (64, 40), (65, 40), (2, 3, 40), (0, 40), (2, 0, 40)], ids=str)
def test_against_the_definition(dtype: torch.dtype, activation: str, bias: bool, shape: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    x, weight = torch.randn(shape).to(dtype), torch.randn(24, 40).to(dtype)
    biases = torch.randn(24).to(dtype) if bias else None
    wide = [None if t is None else t.double() for t in (x, weight, biases)]
    truth = reference.linear(*wide, activation=activation)
    linear = torch.nn.functional.linear(x, weight, biases)
    plain = ops.activation(linear.view(-1, 24), activation).view(linear.shape)
    out = ops.linear(x, weight, biases, activation=activation)
    assert_accurate(out, truth, plain)
    registered = torch.ops.moekernels.linear(x, weight, biases, activation)
    assert_accurate(registered, truth, plain)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides(dtype: torch.dtype) -> None:
    x, weight = torch.randn(40, 5).to(dtype).T, torch.randn(40, 24).to(dtype).T
    expected = ops.linear(x.contiguous(), weight.contiguous())
    assert torch.equal(ops.linear(x, weight), expected)
    wide = torch.randn(6, 50).to(dtype)
    assert torch.equal(ops.linear(wide[::2, 5:45], weight), ops.linear(wide[::2, 5:45].contiguous(), weight))
    cube = torch.randn(3, 5, 40).to(dtype).transpose(0, 1)
    assert torch.equal(ops.linear(cube, weight), ops.linear(cube.contiguous(), weight))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_does_not_depend_on_the_others(dtype: torch.dtype) -> None:
    x, weight = torch.randn(150, 300).to(dtype), torch.randn(50, 300).to(dtype)
    with batch_invariant():
        together = ops.linear(x, weight)
        for rows in (1, 7, 33, 64, 65):
            assert torch.equal(ops.linear(x[:rows], weight), together[:rows])
    assert torch.equal(ops.linear(x[:6], weight), together[:6])


@pytest.mark.parametrize(
    ("isa", "dtype", "most"),
    [
        isa_case("amx", torch.bfloat16, 256),
        isa_case("amx", torch.float32, 1024),
        isa_case("avx2", torch.bfloat16, 64),
        isa_case("portable", torch.float32, 64),
    ],
)
def test_more_rows_are_left_to_torch(isa: str, dtype: torch.dtype, most: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *_: x)
    x, weight = torch.randn(most + 1, 40).to(dtype), torch.randn(24, 40).to(dtype)
    with cpu_isa(isa):
        assert ops.linear(x[:most], weight).shape == (most, 24)
        assert ops.linear(x, weight) is x


def test_nan_stays_in_its_row() -> None:
    x, weight = torch.randn(4, 40), torch.randn(24, 40)
    x[1, 3] = float("nan")
    assert torch.equal(ops.linear(x, weight).isnan().all(dim=1), torch.tensor([False, True, False, False]))
    assert not ops.linear(x, weight)[[0, 2, 3]].isnan().any()


@pytest.mark.parametrize("activation", ["none", "gelu_tanh"])
def test_gradients_are_those_of_torch(activation: str) -> None:
    leaves = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in ((3, 5), (4, 5), (4,))]
    assert torch.autograd.gradcheck(lambda *x: ops.linear(*x, activation=activation), leaves)
    narrow = [leaf.detach().float().requires_grad_() for leaf in leaves]
    grads = torch.autograd.grad(ops.linear(*narrow, activation=activation).sum(), narrow)
    truth = torch.autograd.grad(ops.linear(*leaves, activation=activation).sum(), leaves)
    for grad, expected in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, expected.float())


@pytest.mark.parametrize("trained", range(3), ids=["input", "weight", "bias"])
def test_each_gradient_by_itself(trained: int) -> None:
    arguments = [torch.randn(shape) for shape in ((3, 5), (4, 5), (4,))]
    leaf = arguments[trained].requires_grad_()
    wide = [x.detach().double() for x in arguments]
    wide[trained].requires_grad_()
    ops.linear(*arguments, activation="gelu").sum().backward()
    ops.linear(*wide, activation="gelu").sum().backward()
    torch.testing.assert_close(leaf.grad, wide[trained].grad.float())


def test_under_autocast_and_in_a_graph() -> None:
    x, weight = torch.randn(3, 40), torch.randn(24, 40)
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(x, weight, activation="relu").dtype == torch.bfloat16
    compiled = torch.compile(lambda x: ops.linear(x, weight, activation="relu"), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), ops.linear(x, weight, activation="relu"))
    assert ops.linear(x.to("meta"), weight.to("meta")).shape == (3, 24)


@pytest.mark.parametrize("isa", isas())
def test_every_instruction_set(isa: str) -> None:
    x, weight, bias = torch.randn(5, 70).bfloat16(), torch.randn(33, 70).bfloat16(), torch.randn(33).bfloat16()
    truth = reference.linear(x.double(), weight.double(), bias.double(), activation="gelu")
    plain = torch.nn.functional.gelu(torch.nn.functional.linear(x, weight, bias))
    with cpu_isa(isa):
        assert_accurate(ops.linear(x, weight, bias, activation="gelu"), truth, plain)


ROWS = torch.zeros(3, 4)
WEIGHT = torch.zeros(5, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((ROWS, torch.zeros(4)), r"linear: weight must have 2 dimensions \[out_features, in_features\], got 1"),
        ((ROWS[:, :3], WEIGHT), "input must have the in_features of weight, 4, got 3"),
        ((ROWS, WEIGHT, torch.zeros(4)), r"bias must have shape \[out_features\] = \[5\], got \[4\]"),
        ((ROWS, WEIGHT, torch.zeros(5).bfloat16()), "bias must be float32 like input, got bfloat16"),
    ],
)
def test_wrong_arguments(arguments: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.linear(*arguments)


@pytest.mark.parametrize("rows", [3, 100])
def test_unknown_activation(rows: int) -> None:
    with pytest.raises(ValueError, match=r"linear: activation must be one of none, relu, .*; got 'swish'"):
        ops.linear(torch.zeros(rows, 4), WEIGHT, activation="swish")
