"""Some of the cases of `python -m tests.robustness.fuzz_ops`."""

from __future__ import annotations

import pytest

pytest.importorskip("hypothesis")

import torch
from hypothesis import find, settings

from moekernels import ops
from tests.robustness import fuzz_ops
from tests.robustness.op_cases import CASES, Case


@pytest.mark.parametrize("op", CASES)
def test_equals_its_definition(op: str) -> None:
    found = fuzz_ops.fuzz(op, cases=60, start=0)
    assert not found, found


def test_a_wrong_op_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the test above relies on: NaN in another place, one element off, a changed argument."""
    right = ops.linear

    def loses_nan(*args: torch.Tensor, **options: str) -> torch.Tensor:
        return right(*args, **options).nan_to_num(0.0)

    def one_off(*args: torch.Tensor, **options: str) -> torch.Tensor:
        out = right(*args, **options)
        out.view(-1)[-1:] *= 1.1
        return out

    def writes(input: torch.Tensor, *args: torch.Tensor, **options: str) -> torch.Tensor:
        out = right(input, *args, **options)
        input[:1] += 1
        return out

    for wrong, message in ((loses_nan, "not finite"), (one_off, "allowed"), (writes, "has changed")):
        monkeypatch.setattr(ops, "linear", wrong)
        assert message in fuzz_ops.fuzz("linear", cases=400, start=0)


def test_cases_have_what_they_promise() -> None:
    def special(case: Case) -> bool:
        return not case.args[0].is_contiguous() and bool(case.args[0].isnan().any())

    assert find(CASES["linear"], special, settings=settings(max_examples=2000, database=None)).op == "linear"
