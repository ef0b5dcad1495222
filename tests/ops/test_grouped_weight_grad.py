from __future__ import annotations

from itertools import pairwise

import pytest
import torch

import moekernels
from moekernels import ops
from moekernels.ops import reference
from tests.isa import isas
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
COUNTS = ([0, 0, 0], [1, 0, 0], [0, 1, 1], [5, 0, 7], [33, 1, 2], [0, 0, 70], [16, 16, 16])


def plain(grad_rows: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, *, grad_token_of_row=None,
          token_of_row=None, bias_scale=None, need_bias=False) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """What a PyTorch user writes today, in the dtype of the inputs: a loop over experts."""
    grad_rows = grad_rows if grad_token_of_row is None else ops.permute(grad_rows, grad_token_of_row)
    rows = rows if token_of_row is None else ops.permute(rows, token_of_row)
    scaled = grad_rows if bias_scale is None else grad_rows * bias_scale.to(grad_rows.dtype).unsqueeze(-1)
    experts = list(pairwise(offsets.tolist()))
    grad_weight = torch.stack([grad_rows[begin:end].T @ rows[begin:end] for begin, end in experts])
    return grad_weight, torch.stack([scaled[begin:end].sum(0) for begin, end in experts])


def check(grad_rows: torch.Tensor, rows: torch.Tensor, offsets: torch.Tensor, **options: object) -> None:
    def up(value: object) -> object:
        return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value

    actual = ops.grouped_weight_grad(grad_rows, rows, offsets, **options)
    truth = reference.grouped_weight_grad(
        grad_rows.double(), rows.double(), offsets, **{k: up(v) for k, v in options.items()}
    )
    expected = plain(grad_rows, rows, offsets, **options)
    # Sums may cancel: what is lost counts against their terms.
    count = int(offsets.diff().max())
    assert_accurate(actual[0], truth[0], expected[0], scale=count**0.5)
    if options.get("need_bias"):
        assert_accurate(actual[1], truth[1], expected[1], scale=count**0.5)
    else:
        assert actual[1].shape == (0,) and actual[1].dtype == grad_rows.dtype


def offsets_of(counts: list[int], device: torch.device | str = "cpu") -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32, device=device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize(("out_features", "in_features"), [(1, 1), (2, 3), (17, 33), (130, 127), (31, 260)])
def test_shapes(
    device: torch.device, out_features: int, in_features: int, counts: list[int], dtype: torch.dtype
) -> None:
    grad_rows = torch.randn(sum(counts), out_features, device=device).to(dtype)
    rows = torch.randn(sum(counts), in_features, device=device).to(dtype)
    check(grad_rows, rows, offsets_of(counts, device))
    bias_scale = torch.rand(sum(counts), device=device)
    check(grad_rows, rows, offsets_of(counts, device), need_bias=True, bias_scale=bias_scale)


@pytest.mark.parametrize("isa", isas())
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_instruction_set(dtype: torch.dtype, isa: str) -> None:
    with moekernels.cpu_isa(isa):
        for counts, *sizes in (([9, 0, 40, 1], 64, 48), ([0, 2300, 31], 37, 19), ([35, 2], 290, 530)):
            grad_rows, rows = (torch.randn(sum(counts), size).to(dtype) for size in sizes)
            check(grad_rows, rows, offsets_of(counts), need_bias=True)


@pytest.mark.parametrize(
    ("dtype", "in_features"),
    [(torch.float32, 1030), (torch.float32, 1040), (torch.bfloat16, 1408), (torch.bfloat16, 1410)],
    ids=str,
)
def test_a_gradient_of_many_megabytes(device: torch.device, dtype: torch.dtype, in_features: int) -> None:
    grad_rows = torch.randn(9, 1100, device=device).to(dtype)
    check(grad_rows, torch.randn(9, in_features, device=device).to(dtype), offsets_of([2, 0, 7], device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gathering_equals_permuting_first(device: torch.device, dtype: torch.dtype) -> None:
    ids = torch.rand(40, 6, device=device).argsort(-1)[:, :3].int()
    plan = ops.plan(ids, 6, capacity=11)
    hidden = torch.randn(40, 50, device=device).to(dtype)
    grads = torch.randn(40, 34, device=device).to(dtype)
    tokens = plan.token_of_row.clone()
    tokens[::7] = torch.tensor([-1, 40, -5, 1000], device=device).int().repeat(5)[: tokens[::7].numel()]
    for grad_tokens, row_tokens in ((tokens, plan.token_of_row), (plan.token_of_row, tokens)):
        options = dict(bias_scale=torch.rand(120, device=device), need_bias=True)
        gathered = ops.grouped_weight_grad(
            grads, hidden, plan.expert_offsets, grad_token_of_row=grad_tokens, token_of_row=row_tokens, **options
        )
        permuted = ops.grouped_weight_grad(
            ops.permute(grads, grad_tokens), ops.permute(hidden, row_tokens), plan.expert_offsets, **options
        )
        assert all(torch.equal(a, b) for a, b in zip(gathered, permuted, strict=True))
        check(grads, hidden, plan.expert_offsets, grad_token_of_row=grad_tokens, token_of_row=row_tokens, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_past_the_last_offset_have_no_influence(device: torch.device, dtype: torch.dtype) -> None:
    grad_rows = torch.randn(30, 18, device=device).to(dtype)
    rows = torch.randn(30, 35, device=device).to(dtype)
    offsets = offsets_of([4, 0, 9], device)
    expected = ops.grouped_weight_grad(grad_rows[:13], rows[:13], offsets, need_bias=True)
    grad_rows[13:] = rows[13:] = float("nan")
    bias_scale = torch.ones(30, device=device)
    bias_scale[13:] = float("nan")
    actual = ops.grouped_weight_grad(grad_rows, rows, offsets, bias_scale=bias_scale, need_bias=True)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    assert (actual[0][1] == 0).all() and (actual[1][1] == 0).all()


def test_an_expert_with_nan_keeps_it_to_itself(device: torch.device) -> None:
    rows = torch.randn(9, 16, device=device)
    rows[4:6] = float("nan")
    grad_weight, _ = ops.grouped_weight_grad(torch.randn(9, 5, device=device), rows, offsets_of([4, 2, 3], device))
    assert grad_weight[0].isfinite().all() and grad_weight[1].isnan().all() and grad_weight[2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_inputs_that_are_not_contiguous(device: torch.device, dtype: torch.dtype) -> None:
    grad_rows = torch.randn(20, 200, device=device).to(dtype)[:, 3:100]
    rows = torch.randn(60, 20, device=device).to(dtype).T
    bias_scale = torch.rand(40, device=device)[::2]
    check(grad_rows, rows, offsets_of([4, 11, 5], device), bias_scale=bias_scale, need_bias=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_number_of_threads_changes_no_bit(dtype: torch.dtype) -> None:
    counts = [70, 0, 3, 150]
    grad_rows, rows = torch.randn(223, 150).to(dtype), torch.randn(223, 290).to(dtype)
    threads = torch.get_num_threads()
    results = []
    for count in (1, 3):
        torch.set_num_threads(count)
        results.append(ops.grouped_weight_grad(grad_rows, rows, offsets_of(counts), need_bias=True))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_empty_sizes(device: torch.device) -> None:
    offsets = offsets_of([1, 3], device)
    grad_weight, grad_bias = ops.grouped_weight_grad(
        torch.ones(4, 3, device=device), torch.zeros(4, 0, device=device), offsets, need_bias=True
    )
    assert grad_weight.shape == (2, 3, 0)
    assert torch.equal(grad_bias, torch.tensor([[1.0] * 3, [3.0] * 3], device=device))
    grad_weight, grad_bias = ops.grouped_weight_grad(
        torch.zeros(4, 0, device=device), torch.zeros(4, 5, device=device), offsets, need_bias=True
    )
    assert grad_weight.shape == (2, 0, 5) and grad_bias.shape == (2, 0)


GRADS, ROWS, OFFSETS = torch.zeros(4, 8), torch.zeros(4, 6), torch.tensor([0, 1, 4], dtype=torch.int32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(grad_rows=torch.zeros(4)), r"grad_rows must have 2 dimensions \[num_rows, out_features\], got 1"),
        (dict(rows=torch.zeros(4)), r"rows must have 2 dimensions \[num_rows, in_features\], got 1"),
        (dict(rows=ROWS.half()), "rows must be float32 like grad_rows, got float16"),
        (dict(grad_rows=GRADS.int()), "grad_rows must be float32, bfloat16 or float16, got int32"),
        (dict(rows=torch.zeros(5, 6)), "rows must have as many rows as the gradient, 4, got 5"),
        (dict(token_of_row=torch.zeros(3).int()), "token_of_row must have as many rows as the gradient, 4, got 3"),
        (dict(grad_token_of_row=torch.zeros(3)), "grad_token_of_row must be int32, got float32"),
        (dict(expert_offsets=OFFSETS[:1]), "expert_offsets must have at least 2 elements, for 1 expert, got 1"),
        (dict(expert_offsets=torch.tensor([0, 3, 2]).int()), "expert_offsets must not fall, got 3 then 2 at expert 1"),
        (dict(expert_offsets=torch.tensor([0, 3, 5]).int()), "no more than the number of rows, 4, got 5"),
        (dict(bias_scale=torch.zeros(5)), r"bias_scale must have shape \[num_rows\] = \[4\], got \[5\]"),
        (dict(bias_scale=torch.zeros(4).half()), "bias_scale must be float32, got float16"),
    ],
)
def test_bad_input(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=f"moekernels::grouped_weight_grad: .*{message}"):
        ops.grouped_weight_grad(**{"grad_rows": GRADS, "rows": ROWS, "expert_offsets": OFFSETS, **arguments})
