"""Every op on whatever hypothesis can think of, on every instruction set of this machine, against its definition.

python -m tests.robustness.fuzz_ops --cases 100000

Exit code 1 if an op differs from its definition; what hypothesis shrank the case to is printed.
"""

from __future__ import annotations

import argparse
import collections
import signal
import sys
import time
import traceback
from collections.abc import Iterable
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from torch import Tensor

import moekernels
from moekernels import ops
from moekernels.ops import reference
from tests.robustness.op_cases import CASES, Case
from tests.robustness.poison import poison_free_memory

ISAS = tuple(moekernels.build_info()["cpu_isas"])
#: One rounding of the largest term, a few in float32.
_FLOOR = {torch.float32: 4e-6, torch.bfloat16: 8e-3, torch.float16: 1e-3}


def _mapped(value: Any, change: Any) -> Any:
    """The floating-point tensors among arguments changed."""
    if isinstance(value, Tensor):
        return change(value) if value.is_floating_point() else value
    if isinstance(value, ops.Plan):
        return value
    if isinstance(value, dict):
        return {name: _mapped(entry, change) for name, entry in value.items()}
    if isinstance(value, tuple):
        return tuple(_mapped(entry, change) for entry in value)
    return value


def _outputs(result: Any) -> list[Tensor]:
    return [result] if isinstance(result, Tensor) else list(result)


def _defined(case: Case, change: Any) -> list[Tensor]:
    args, options = _mapped(case.args, change), _mapped(case.options, change)
    return _outputs(getattr(reference, case.op)(*args, **options))


def _tensors(value: Any) -> Iterable[Tensor]:
    for entry in value.values() if isinstance(value, dict) else value:
        if isinstance(entry, Tensor) and entry.is_floating_point():
            yield entry


def check(case: Case) -> None:
    """Raise AssertionError where the op and its definition differ; the arguments stay as they are."""
    before = [tensor.clone() for tensor in (*_tensors(case.args), *_tensors(case.options))]
    actual = _outputs(getattr(ops, case.op)(*case.args, **case.options))
    for tensor, old in zip((*_tensors(case.args), *_tensors(case.options)), before, strict=True):
        assert torch.equal(tensor.nan_to_num(), old.nan_to_num()), "an argument has changed"
    poison_free_memory()
    again = _outputs(getattr(ops, case.op)(*case.args, **case.options))
    for a, b in zip(actual, again, strict=True):
        assert torch.equal(_bits(a), _bits(b)), "the same call gives other bits"
    plain = _defined(case, lambda tensor: tensor)
    if case.op in ("plan", "permute", "route"):
        _check_exact(case, actual, plain)
        return
    truth = _defined(case, Tensor.double)
    # The largest sum of the magnitudes of terms: what errors of a sum are measured by.
    scales = _defined(case, lambda tensor: tensor.double().abs().nan_to_num(0, 0, 0))
    for a, t, p, s in zip(actual, truth, plain, scales, strict=True):
        _check_close(a, t, p, s)


def _bits(tensor: Tensor) -> Tensor:
    kinds = {2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.contiguous().view(kinds[tensor.itemsize]) if tensor.is_floating_point() else tensor


def _check_exact(case: Case, actual: list[Tensor], expected: list[Tensor]) -> None:
    for a, e in zip(actual, expected, strict=True):
        assert a.shape == e.shape and a.dtype == e.dtype, (a.shape, e.shape, a.dtype, e.dtype)
        if case.op == "route" and a.is_floating_point():
            # Sparsemixer computes in the dtype of the logits: a probability on a boundary may be rounded either way.
            coarse = case.options["scoring"] == "sparsemixer" and case.args[0].dtype != torch.float32
            torch.testing.assert_close(a, e, rtol=1e-2 if coarse else 4e-6, atol=1e-6, equal_nan=True)
        else:
            torch.testing.assert_close(a, e, rtol=0, atol=0, equal_nan=True)


def _check_close(actual: Tensor, truth: Tensor, plain: Tensor, scale: Tensor) -> None:
    """Finite where the definition is, within twice PyTorch's own error; and of the same kind where it is not."""
    assert actual.shape == truth.shape and actual.dtype == plain.dtype, (actual.shape, truth.shape, actual.dtype)
    if not actual.is_floating_point() or actual.numel() == 0:
        assert torch.equal(actual, plain), "integers differ"
        return
    expected = truth.to(actual.dtype)
    kind, theirs, rounded = (_kind(tensor) for tensor in (actual, plain, expected))
    same = (kind == theirs) | (kind == rounded)
    assert bool(same.all()), f"not finite in other places: {actual[~same][:4]}, expected {expected[~same][:4]}"
    finite = (kind == 0) & (theirs == 0) & (rounded == 0)
    if not bool(finite.any()):
        return
    error = (actual[finite].double() - truth[finite]).abs().max().item()
    largest = max(truth[finite].abs().max().item(), scale.nan_to_num(0, 0, 0).abs().max().item())
    allowed = 2 * (plain[finite].double() - truth[finite]).abs().max().item() + _FLOOR[actual.dtype] * largest
    assert error <= allowed, f"error {error:.3g}, allowed {allowed:.3g}"


def _kind(tensor: Tensor) -> Tensor:
    """0 for finite numbers, 1 for inf, -1 for -inf, 2 for NaN."""
    return tensor.isposinf().int() - tensor.isneginf().int() + 2 * tensor.isnan().int()


def fuzz(op: str, cases: int, start: int) -> str:
    """Try so many cases of an op; the traceback of the smallest that fails, or an empty string."""

    @seed(start)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=(Phase.generate, Phase.shrink),
        report_multiple_bugs=False,
    )
    @given(CASES[op], st.sampled_from(ISAS))
    def differs(case: Case, isa: str) -> None:
        counted[isa] += 1
        with moekernels.cpu_isa(isa):
            check(case)

    try:
        differs()
    except Exception:
        return traceback.format_exc(limit=-6)
    return ""


counted: collections.Counter[str] = collections.Counter()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1200, help="of all ops together")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ops", nargs="+", choices=CASES, default=list(CASES))
    args = parser.parse_args()
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which ends it with what it has, in the background too
    begun, failed = time.monotonic(), 0
    for op in args.ops:
        try:
            found = fuzz(op, args.cases // len(args.ops), args.seed)
        except KeyboardInterrupt:  # as many as there was time for
            break
        failed += bool(found)
        print(f"{op}: {'DIFFERS' if found else 'equals its definition'}", flush=True)
        if found:
            print(found, flush=True)
    print(f"{sum(counted.values())} cases, {dict(counted)}, {failed} ops differ, {time.monotonic() - begun:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
