from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from moekernels import cpu_isa, ops
from moekernels.ops import reference
from tests.isa import isas
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# B, B', H, G, Q, S, D: beams, grouped heads, more rows than a task has, heads below and beside a vector, long keys;
# then many queries, for which there are tile registers.
SHAPES = (
    (2, 2, 4, 4, 1, 9, 16),
    (5, 1, 3, 3, 1, 33, 64),
    (6, 2, 8, 2, 3, 21, 20),
    (1, 1, 2, 1, 8, 17, 3),
    (1, 1, 2, 2, 1, 1, 1),
    (2, 1, 2, 2, 2, 7, 1100),
    (1, 1, 2, 1, 1, 700, 128),
    (1, 1, 2, 2, 32, 32, 64),
    (6, 2, 4, 2, 19, 45, 40),
    (1, 1, 2, 1, 140, 33, 256),
    (1, 1, 1, 1, 9, 1, 1),
    (1, 1, 1, 1, 10, 50, 300),
)


def inputs(shape: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    """As a decoder has them: queries [B, Q, H, D] seen by head, keys and values in a buffer with room for more."""
    torch.manual_seed(1)
    batch, key_batch, heads, groups, queries, keys, width = shape
    query = torch.randn(batch, queries, heads, width).transpose(1, 2)
    key, value = (torch.randn(key_batch, groups, keys + 5, width)[:, :, :keys] for _ in range(2))
    return query.to(dtype), key.to(dtype), value.to(dtype)


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, bias: Tensor | None) -> Tensor:
    """Products in the dtype of the arguments, softmax in float32."""
    repeats = query.shape[0] // key.shape[0], query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats[0], 0).repeat_interleave(repeats[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scale
    scores = scores if bias is None else scores + bias
    return (scores.softmax(-1, dtype=torch.float32).to(query.dtype) @ value).transpose(1, 2).flatten(2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_against_the_definition(dtype: torch.dtype, shape: tuple[int, ...], biased: bool) -> None:
    query, key, value = inputs(shape, dtype)
    bias = torch.randn(1, shape[2], shape[4], shape[5]).to(dtype) if biased else None
    wide = None if bias is None else bias.double()
    truth = reference.attention(query.double(), key.double(), value.double(), scale=0.3, bias=wide)
    assert_accurate(
        ops.attention(query, key, value, scale=0.3, bias=bias),
        truth,
        plain_attention(query, key, value, 0.3, bias),
        value.abs().max().item(),
    )


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_instruction_set(isa: str, dtype: torch.dtype) -> None:
    for shape in ((6, 2, 8, 2, 3, 21, 72), (1, 1, 1, 1, 5, 6, 7), (1, 1, 2, 1, 17, 20, 33)):
        query, key, value = inputs(shape, dtype)
        truth = reference.attention(query.double(), key.double(), value.double(), scale=0.2)
        with cpu_isa(isa):
            out = ops.attention(query, key, value, scale=0.2)
        plain = plain_attention(query, key, value, 0.2, None)
        assert_accurate(out, truth, plain, value.abs().max().item())


# float32, and bfloat16 of many queries: both kernels.
BOTH_KERNELS = pytest.mark.parametrize(("dtype", "num_queries"), [(torch.float32, 3), (torch.bfloat16, 12)], ids=str)


@BOTH_KERNELS
@pytest.mark.parametrize("of_bias", [(4, 6, 0, 9), (1, 6, 1, 9), (2, 6, 0, 9), (4, 1, 1, 9), (1, 1, 0, 9)], ids=str)
def test_broadcast_bias_and_strides(of_bias: tuple[int, ...], dtype: torch.dtype, num_queries: int) -> None:
    query, key, value = inputs((4, 2, 6, 3, num_queries, 9, 16), dtype)
    bias = torch.randn([size or num_queries for size in of_bias]).to(dtype)
    expected = reference.attention(query, key, value, scale=1.0, bias=bias)
    close = partial(
        torch.testing.assert_close, expected=expected, atol=0.02 if dtype == torch.bfloat16 else 1e-5, rtol=0
    )
    close(ops.attention(query, key, value, scale=1.0, bias=bias))
    across = (x.transpose(2, 3).contiguous().transpose(2, 3) for x in (query, key, value, bias))
    query, key, value, bias = across
    close(ops.attention(query, key, value, scale=1.0, bias=bias))


@pytest.mark.parametrize("num_queries", [2, 40])
def test_a_query_does_not_depend_on_the_others(num_queries: int) -> None:
    query, key, value = inputs((6, 1, 4, 2, num_queries, 33, 64), torch.bfloat16)
    together = ops.attention(query, key, value, scale=0.1)
    for row in range(6):
        assert torch.equal(ops.attention(query[row : row + 1], key, value, scale=0.1), together[row : row + 1])
    assert torch.equal(ops.attention(query[:, :, 1:], key, value, scale=0.1), together[:, 1:])


@BOTH_KERNELS
def test_hidden_keys_and_rows_that_see_nothing(dtype: torch.dtype, num_queries: int) -> None:
    query, key, value = inputs((1, 1, 1, 1, num_queries, 4, 16), dtype)
    lowest = torch.finfo(dtype).min
    bias = torch.full((1, 1, num_queries, 4), lowest, dtype=dtype)
    bias[..., 0, :] = torch.tensor([0.0, lowest, -torch.inf, 0.0])
    out = ops.attention(query * 20, key, value, scale=1.0, bias=bias)
    seen = reference.attention(query[:, :, :1] * 20, key[:, :, [0, 3]], value[:, :, [0, 3]], scale=1.0)
    torch.testing.assert_close(out[:, :1], seen)
    assert out.isfinite().all()
    value[0, 0, 0, 0] = torch.nan
    out = ops.attention(query, key, value, scale=1.0)
    assert torch.equal(out.isnan()[0], torch.tensor([[True] + [False] * 15] * num_queries))
    query[0, 0, 1, 0] = torch.nan
    out = ops.attention(query, key, value, scale=1.0)
    assert torch.equal(out.isnan()[0, :, 1], torch.arange(num_queries) == 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape", [(0, 0, 2, 2, 1, 3, 8), (2, 2, 2, 2, 0, 3, 8), (2, 1, 2, 2, 1, 0, 8), (2, 1, 2, 2, 10, 0, 8)], ids=str
)
def test_empty(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    query, key, value = inputs(shape, dtype)
    expected = reference.attention(query, key, value, scale=1.0)
    assert torch.equal(ops.attention(query, key, value, scale=1.0), expected)


def test_gradients_are_those_of_torch() -> None:
    arguments = [x.double().requires_grad_() for x in inputs((4, 2, 4, 2, 2, 3, 5))]
    assert torch.autograd.gradcheck(lambda *x: ops.attention(*x, scale=0.3), arguments)
    narrow = [x.detach().float().requires_grad_() for x in arguments]
    grads = torch.autograd.grad(ops.attention(*narrow, scale=0.3).sum(), narrow)
    truth = torch.autograd.grad(ops.attention(*arguments, scale=0.3).sum(), arguments)
    for grad, expected in zip(grads, truth, strict=True):
        torch.testing.assert_close(grad, expected.float())


def test_in_a_graph_and_on_the_meta_device() -> None:
    arguments = inputs((4, 2, 4, 2, 2, 3, 5))
    compiled = torch.compile(lambda *x: ops.attention(*x, scale=0.3), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), ops.attention(*arguments, scale=0.3))
    assert ops.attention(*(x.to("meta") for x in arguments), scale=0.3).shape == (4, 2, 20)


QUERY = torch.zeros(4, 6, 2, 8)
KEY = torch.zeros(2, 3, 5, 8)


@pytest.mark.parametrize(
    ("arguments", "bias", "message"),
    [
        ((QUERY[0], KEY, KEY), None, r"attention: query must have 4 dimensions .*, got 3"),
        ((QUERY, KEY[..., :7], KEY), None, r"key must have shape .* = \[2, 3, 5, 8\], got \[2, 3, 5, 7\]"),
        ((QUERY, KEY, KEY[:, :, 1:]), None, r"value must have shape .* = \[2, 3, 5, 8\], got \[2, 3, 4, 8\]"),
        ((QUERY[:3], KEY, KEY), None, "the batch of key must divide that of query, 3, got 2"),
        ((QUERY[:, :4], KEY, KEY), None, "the heads of key must divide those of query, 4, got 3"),
        (
            (QUERY, KEY, KEY),
            torch.zeros(3, 1, 1, 5),
            r"bias must be \[4, 6, 2, 5\] or broadcast .*, got \[3, 1, 1, 5\]",
        ),
        ((QUERY, KEY, KEY), torch.zeros(5), r"bias must have 4 dimensions .*, got 1"),
    ],
)
def test_wrong_arguments(arguments: tuple, bias: Tensor | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.attention(*arguments, scale=1.0, bias=bias)
