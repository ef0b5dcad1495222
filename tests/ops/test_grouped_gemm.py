from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import moekernels
from moekernels import ops
from moekernels.ops import reference
from tests.generators import SMALL_LAYERS, LayerShape
from tests.isa import isas
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ACT = {
    "none": lambda x: x,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": lambda x: torch.nn.functional.gelu(x, approximate="tanh"),
    "silu": torch.nn.functional.silu,
    "relu2": lambda x: x.relu().square(),
}


def plain(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, *, bias=None, activation="none", gated=False,
          row_scale=None, token_of_row=None, transposed=False) -> torch.Tensor:  # fmt: skip
    """What a PyTorch user writes today, in the dtype of the inputs: a loop over experts."""
    rows = rows if token_of_row is None else rows[token_of_row.long()]
    weight = weight.transpose(1, 2) if transposed else weight
    bounds = offsets.tolist()
    parts = []
    for e, (begin, end) in enumerate(pairwise(bounds)):
        y = torch.nn.functional.linear(rows[begin:end], weight[e], None if bias is None else bias[e])
        y = ACT[activation](y.chunk(2, -1)[0]) * y.chunk(2, -1)[1] if gated else ACT[activation](y)
        parts.append(y)
    out = torch.cat([*parts, rows.new_zeros(rows.shape[0] - bounds[-1], parts[0].shape[1])])
    return out if row_scale is None else out * row_scale.to(out.dtype).unsqueeze(-1)


def check(rows: torch.Tensor, weight: torch.Tensor, offsets: torch.Tensor, **options: object) -> torch.Tensor:
    def up(value: object) -> object:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    actual = ops.grouped_gemm(rows, weight, offsets, **options)
    truth = reference.grouped_gemm(rows.double(), weight.double(), offsets, **{k: up(v) for k, v in options.items()})
    assert_accurate(actual, truth, plain(rows, weight, offsets, **options))
    return actual


def offsets_of(counts: list[int], device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)


COUNTS = ([0, 0, 0], [1, 0, 0], [0, 1, 1], [5, 0, 7], [33, 1, 2], [0, 0, 70], [16, 16, 16])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (2, 3), (17, 33), (34, 64), (130, 127), (64, 1040)])
def test_shapes(
    device: torch.device, out_features: int, in_features: int, counts: list[int], dtype: torch.dtype
) -> None:
    rows = torch.randn(sum(counts), in_features, device=device).to(dtype)
    weight = (torch.randn(3, out_features, in_features, device=device) * in_features**-0.5).to(dtype)
    check(rows, weight, offsets_of(counts, device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (2, 3), (33, 17), (130, 127), (31, 1040)])
def test_shapes_of_a_transposed_weight(
    device: torch.device, out_features: int, in_features: int, counts: list[int], dtype: torch.dtype
) -> None:
    rows = torch.randn(sum(counts), in_features, device=device).to(dtype)
    weight = (torch.randn(3, in_features, out_features, device=device) * in_features**-0.5).to(dtype)
    row_scale, bias = torch.rand(sum(counts), device=device), torch.randn(3, out_features, device=device).to(dtype)
    check(rows, weight, offsets_of(counts, device), bias=bias, row_scale=row_scale, transposed=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_transposed_weight_whose_rows_do_not_fit_the_scratch_memory(device: torch.device, dtype: torch.dtype) -> None:
    rows = torch.randn(70, 12000, device=device).to(dtype)
    weight = (torch.randn(2, 12000, 30, device=device) * 12000**-0.5).to(dtype)
    check(rows, weight, offsets_of([1, 69], device), transposed=True)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_more_rows_and_columns_than_a_block(dtype: torch.dtype, isa: str) -> None:
    rows = torch.randn(300, 530).to(dtype)
    weight = (torch.randn(2, 530, 530) * 530**-0.5).to(dtype)
    with moekernels.cpu_isa(isa):
        check(rows, weight, offsets_of([17, 283]), gated=True, activation="silu")
        check(rows, weight, offsets_of([283, 17]), transposed=True)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("in_features", [300, 544])
@pytest.mark.parametrize("num_rows", [1, 16, 17, 33, 49, 65, 81, 96, 97, 112, 113, 256, 257])
def test_numbers_of_rows_at_which_tile_registers_are_used_otherwise(
    num_rows: int, in_features: int, gated: bool
) -> None:
    """All rows at once, copied weights, weights fetched ahead; over several tasks, to the same bits."""
    rows = torch.randn(280, in_features).bfloat16()
    weight = (torch.randn(1, 270, in_features) * in_features**-0.5).bfloat16()
    actual = check(rows[:num_rows], weight, offsets_of([num_rows]), gated=gated, activation="silu")
    together = ops.grouped_gemm(rows, weight, offsets_of([280]), gated=gated, activation="silu")
    assert torch.equal(actual, together[:num_rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", isas())
def test_numbers_of_rows_at_which_weights_are_read_in_another_order(isa: str, dtype: torch.dtype) -> None:
    """Chunks of K over blocks of columns, with all rows or by halves: to the same bits."""
    rows = torch.randn(70, 2100).to(dtype)
    weight = (torch.randn(1, 300, 2100) * 2100**-0.5).to(dtype)
    with moekernels.cpu_isa(isa), moekernels.batch_invariant(isa == "amx" and dtype is torch.float32):
        together = ops.grouped_gemm(rows, weight, offsets_of([70]), activation="silu", gated=True)
        for count in (1, 7, 16, 18, 19, 27, 32, 33):
            some = check(rows[:count], weight, offsets_of([count]), activation="silu", gated=True)
            assert torch.equal(some, together[:count])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [1056, 1050])
def test_an_output_that_no_cache_holds(width: int, dtype: torch.dtype) -> None:
    """As parts of it that some do: large outputs may be written past the caches."""
    rows = torch.randn(4200, 33).to(dtype)
    weight = torch.randn(3, width, 33).to(dtype)
    together = ops.grouped_gemm(rows, weight, offsets_of([70, 4000, 130]))
    assert together.nbytes > 8 << 20
    for expert, (begin, end) in enumerate(((0, 70), (70, 1000), (4070, 4200))):
        part = ops.grouped_gemm(rows[begin:end], weight[expert : expert + 1], offsets_of([end - begin]))
        torch.testing.assert_close(together[begin:end], part, rtol=0, atol=0)


@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_do_not_fit_the_scratch_memory(device: torch.device, dtype: torch.dtype, gated: bool) -> None:
    rows = torch.randn(70, 12000, device=device).to(dtype)
    weight = (torch.randn(2, 150, 12000, device=device) * 12000**-0.5).to(dtype)
    check(rows, weight, offsets_of([1, 69], device), gated=gated)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SMALL_LAYERS, ids=str)
def test_every_instruction_set(shape: LayerShape, dtype: torch.dtype, isa: str) -> None:
    features = shape.ffn_size * (2 if shape.gated else 1)
    counts = torch.randint(0, 9, (shape.num_experts,)).tolist()
    rows = torch.randn(sum(counts), shape.hidden_size).to(dtype)
    weight = (torch.randn(shape.num_experts, features, shape.hidden_size) * shape.hidden_size**-0.5).to(dtype)
    bias = torch.randn(shape.num_experts, features).to(dtype)
    with moekernels.cpu_isa(isa):
        check(rows, weight, offsets_of(counts), bias=bias, activation=shape.activation, gated=shape.gated)
        check(rows, weight.transpose(1, 2).contiguous(), offsets_of(counts), transposed=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("gated", [False, True], ids=["plain", "gated"])
@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_epilogues(device: torch.device, activation: str, gated: bool, dtype: torch.dtype) -> None:
    counts = [3, 0, 20, 1]
    rows = (torch.randn(24, 48, device=device) * 3).to(dtype)
    weight = (torch.randn(4, 50, 48, device=device) * 48**-0.5).to(dtype)
    bias = torch.randn(4, 50, device=device).to(dtype)
    row_scale = torch.rand(24, device=device)
    offsets = offsets_of(counts, device)
    for options in (dict(bias=bias), dict(row_scale=row_scale), dict(bias=bias, row_scale=row_scale)):
        check(rows, weight, offsets, activation=activation, gated=gated, **options)


@pytest.mark.parametrize("activation", ops.ACTIVATIONS)
def test_activations_far_out(device: torch.device, activation: str) -> None:
    """Large, tiny, infinite and NaN pre-activations, passed through an identity weight."""
    inf, nan = float("inf"), float("nan")
    x = [-inf, -1e30, -90.0, -20.0, -9.5, -1e-3, -1e-30, 0.0, 1e-30, 1e-3, 0.5, 9.5, 20.0, 90.0, 1e30, inf, nan]
    rows = torch.tensor(x, device=device).unsqueeze(1)
    actual = ops.grouped_gemm(
        rows, torch.ones(1, 1, 1, device=device), offsets_of([len(x)], device), activation=activation
    )
    expected = ACT[activation](rows.double()).float()
    torch.testing.assert_close(actual, expected, rtol=3e-6, atol=1e-7, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathering_equals_permuting_first(device: torch.device, dtype: torch.dtype) -> None:
    hidden = torch.randn(40, 96, device=device).to(dtype)
    weight = torch.randn(6, 64, 96, device=device).to(dtype)
    ids = torch.rand(40, 6, device=device).argsort(-1)[:, :3].int()
    for capacity in (None, 7):
        plan = ops.plan(ids, 6, capacity=capacity)
        gathered = ops.grouped_gemm(hidden, weight, plan.expert_offsets, token_of_row=plan.token_of_row)
        permuted = ops.grouped_gemm(ops.permute(hidden, plan.token_of_row), weight, plan.expert_offsets)
        assert torch.equal(gathered, permuted)
        assert (gathered[plan.expert_offsets[-1] :] == 0).all()
        transposed = weight.transpose(1, 2).contiguous()
        gathered = ops.grouped_gemm(
            hidden, transposed, plan.expert_offsets, token_of_row=plan.token_of_row, transposed=True
        )
        permuted = ops.grouped_gemm(
            ops.permute(hidden, plan.token_of_row), transposed, plan.expert_offsets, transposed=True
        )
        assert torch.equal(gathered, permuted)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("isa", isas())
def test_a_row_does_not_depend_on_its_neighbours(isa: str, dtype: torch.dtype) -> None:
    """Bit for bit: each row alone, and all together. Of float32 by tile registers this must be asked for."""
    rows = torch.randn(70, 600).to(dtype)
    weight = torch.randn(1, 90, 600).to(dtype)
    with moekernels.cpu_isa(isa), moekernels.batch_invariant(isa == "amx" and dtype is torch.float32):
        together = ops.grouped_gemm(rows, weight, offsets_of([70]), activation="silu", gated=True)
        for count in (1, 2, 3, 5, 8, 13):
            some = ops.grouped_gemm(rows[:count], weight, offsets_of([count]), activation="silu", gated=True)
            assert torch.equal(some, together[:count])
        weight = torch.randn(1, 600, 90).to(dtype)
        together = ops.grouped_gemm(rows, weight, offsets_of([70]), transposed=True)
        for count in (1, 5, 13):
            assert torch.equal(
                ops.grouped_gemm(rows[:count], weight, offsets_of([count]), transposed=True), together[:count]
            )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_that_are_not_contiguous(device: torch.device, dtype: torch.dtype) -> None:
    rows = torch.randn(20, 200, device=device).to(dtype)[:, 3:100]
    weight = torch.randn(6, 70, 120, device=device).to(dtype)
    bias = torch.randn(6, 70, device=device).to(dtype)
    offsets = offsets_of([4, 11, 5], device)
    check(rows, weight[::2, 5:35, 10:107], offsets, bias=bias[::2, ::2][:, :30])
    check(rows, weight[:3, :30].transpose(1, 2)[:, :97].transpose(1, 2), offsets)
    check(torch.randn(97, 20, device=device).to(dtype).T, weight[1:4, :31, :97], offsets)
    check(rows[:, :35], weight[::2, 5:40, 10:107], offsets, transposed=True)
    check(rows[:, :35], weight[:3, :35, :97].transpose(1, 2).contiguous().transpose(1, 2), offsets, transposed=True)


def test_an_expert_with_nan_keeps_it_to_itself(device: torch.device) -> None:
    weight = torch.randn(3, 8, 16, device=device)
    weight[1] = float("nan")
    out = ops.grouped_gemm(torch.randn(9, 16, device=device), weight, offsets_of([4, 0, 5], device))
    assert out.isfinite().all()


def test_no_input_features_leave_the_bias(device: torch.device) -> None:
    bias = torch.randn(2, 3, device=device)
    out = ops.grouped_gemm(
        torch.zeros(4, 0, device=device), torch.zeros(2, 3, 0, device=device), offsets_of([1, 3], device), bias=bias
    )
    assert torch.equal(out, bias[[0, 1, 1, 1]])


ROWS, WEIGHT, OFFSETS = torch.zeros(4, 6), torch.zeros(2, 8, 6), torch.tensor([0, 1, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(rows=torch.zeros(4)), r"rows must have 2 dimensions \[num_rows, in_features\], got 1"),
        (
            dict(weight=torch.zeros(8, 6)),
            r"weight must have 3 dimensions \[num_experts, out_features, in_features\], got 2",
        ),
        (dict(weight=WEIGHT.half()), "weight must be float32 like rows, got float16"),
        (dict(rows=ROWS.int(), weight=WEIGHT.int()), "rows must be float32, bfloat16 or float16, got int32"),
        (dict(rows=torch.zeros(4, 5)), "rows must have the in_features of weight, 6, got 5"),
        (dict(weight=torch.zeros(2, 7, 6), gated=True), "must be even, got 7"),
        (dict(expert_offsets=OFFSETS.long()), "expert_offsets must be int32, got int64"),
        (dict(expert_offsets=OFFSETS[:2]), r"expert_offsets must have shape \[num_experts \+ 1\] = \[3\], got \[2\]"),
        (dict(expert_offsets=torch.tensor([1, 2, 4]).int()), "expert_offsets must begin with 0, got 1"),
        (dict(expert_offsets=torch.tensor([0, 3, 2]).int()), "expert_offsets must not fall, got 3 then 2 at expert 1"),
        (dict(expert_offsets=torch.tensor([0, 3, 5]).int()), "no more than the number of rows, 4, got 5"),
        (dict(bias=torch.zeros(2, 7)), r"bias must have shape \[num_experts, out_features\] = \[2, 8\], got \[2, 7\]"),
        (dict(row_scale=torch.zeros(5)), r"row_scale must have shape \[num_rows\] = \[4\], got \[5\]"),
        (dict(activation="swiglu"), "activation must be one of none, relu, gelu, gelu_tanh, silu, relu2; got 'swiglu'"),
        (dict(transposed=True), "rows must have the in_features of weight, 8, got 6"),
        (
            dict(weight=torch.zeros(2, 6, 8), transposed=True, gated=True, row_scale=torch.ones(4)),
            "row_scale goes with no activation or gate of a transposed weight",
        ),
        (
            dict(activation=ops.Swiglu(interleaved=True), gated=True, row_scale=torch.ones(4)),
            "row_scale goes with no interleaved gate",
        ),
        (dict(activation=ops.Swiglu()), "activation swiglu is a gate, so gated must be true"),
        (dict(activation="swiglu(1,2)"), r"activation must be one of none, .*relu2; got 'swiglu\(1,2\)'"),
        (
            dict(weight=torch.zeros(2, 6, 8), transposed=True, bias=torch.zeros(2, 6)),
            r"bias must have shape \[num_experts, out_features\] = \[2, 8\], got \[2, 6\]",
        ),
        (
            dict(weight=torch.zeros(2, 6, 8), transposed=True, bias=list(torch.zeros(2, 8))),
            r"bias of a transposed weight must be one stack .*, got 2 vectors",
        ),
        (dict(token_of_row=torch.zeros(4)), "token_of_row must be int32, got float32"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"moekernels::grouped_gemm: .*{message}"):
        ops.grouped_gemm(**{"rows": ROWS, "weight": WEIGHT, "expert_offsets": OFFSETS, **arguments})
