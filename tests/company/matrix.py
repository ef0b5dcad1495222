"""What other people's code does to a model, and whether the result is then what it would be without us.

A *column* is a kind of model: it makes the one to compare with, and ours, over the same weights. A *row* is something
that others do: a function that gets a :class:`Case`, does it to that case's model, and returns tensors by name. It runs
once for each side; everything it returns must be equal, or our side must raise a clear error before it computes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from moekernels import ops

Results = dict[str, Any]  # tensors are compared with a tolerance, everything else exactly


def _same(results: Results) -> Results:
    return results


@dataclass(frozen=True)
class Column:
    """A kind of model.

    Attributes:
        name: the heading of the table.
        make: the model to compare with (False) or ours (True); the same weights in both, in evaluation mode.
        inputs: keyword arguments of `forward`, with labels.
        attach: what makes our side ours where `make` does not: `replace_moe_layers`. Rows choose when.
        translate: results of our side under the names of the other's.
        tags: what rows may ask for, such as "linears" or "stacks" for how experts are held.
    """

    name: str
    make: Callable[[bool], nn.Module]
    inputs: Callable[[], dict[str, Any]]
    attach: Callable[[nn.Module], object] = lambda model: None
    translate: Callable[[Results], Results] = _same
    tags: frozenset[str] = frozenset()


@dataclass
class Case:
    """One side of a comparison."""

    column: Column
    ours: bool
    calls: list[str] = field(default_factory=list)  # of kernels, in the last pass

    def make(self) -> nn.Module:
        torch.manual_seed(0)
        return self.column.make(self.ours)

    def attach(self, model: nn.Module, **options: Any) -> nn.Module:
        if self.ours:
            self.column.attach(model, **options)
        return model

    def model(self) -> nn.Module:
        return self.attach(self.make())

    def logits(self, model: nn.Module) -> Tensor:
        """Of one pass without a gradient."""
        self.calls.clear()
        with torch.no_grad():
            return model(**self.column.inputs()).logits

    def results(self, model: nn.Module, seed: int = 5) -> Results:
        """Logits, loss and every gradient of one pass; a parameter without a gradient has None."""
        self.calls.clear()
        model.zero_grad()
        torch.manual_seed(seed)
        out = model(**self.column.inputs())
        out.loss.backward()
        grads = {f"grad {name}": whole(p.grad) for name, p in model.named_parameters()}
        return {"logits": out.logits.detach(), "loss": out.loss.detach(), **grads}


def whole(tensor: Tensor | None) -> Tensor | None:
    """A copy, gathered if it is sharded."""
    return None if tensor is None else getattr(tensor, "full_tensor", tensor.clone)().detach()


class Row(NamedTuple):
    """Something that others do.

    Attributes:
        name: the row of the table.
        run: does it.
        packages: what must be installed.
        tags: of these, a column must have all.
        rtol, atol: of the comparison, in float32; atol is for values up to 1 and grows with the largest.
        processes: the largest number that it is also run in.
    """

    name: str
    run: Callable[[Case], Results]
    packages: tuple[str, ...] = ()
    tags: frozenset[str] = frozenset()
    rtol: float = 1e-3
    atol: float = 2e-5
    processes: int = 1

    def missing(self, column: Column) -> str | None:
        """Why this row says nothing about this column; None if it does."""
        for package in self.packages:
            if importlib.util.find_spec(package) is None:
                return f"{package} is not installed"
        if absent := self.tags - column.tags:
            return f"no {', '.join(sorted(absent))}"
        return None


ROWS: dict[str, Row] = {}


def row(
    name: str, *, packages: tuple[str, ...] = (), tags: tuple[str, ...] = (), **fields: Any
) -> Callable[[Any], Any]:
    """Put a function into the table."""

    def add(run: Callable[[Case], Results]) -> Callable[[Case], Results]:
        assert name not in ROWS, name
        ROWS[name] = Row(name, run, packages, frozenset(tags), **fields)
        return run

    return add


@contextlib.contextmanager
def kernel_calls(calls: list[str]) -> Iterator[None]:
    """Add the ops of experts that are called meanwhile, by name."""

    def counted(name: str) -> Callable[..., Tensor]:
        op = getattr(ops, name)

        def call(*args: Any, **kwargs: Any) -> Tensor:
            calls.append(name)
            return op(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("sparse_mlp", "grouped_gemm"):
            patch.setattr(ops, name, counted(name))
        yield


class Verdict(NamedTuple):
    """What became of a row and a column.

    Attributes:
        kind: "kernels" or "modules", for what computed the experts of our side, and the results are equal; "error" if
            our side refused; "as stock" if both sides fail; "differs"; "none" if the row does not apply.
        detail: of which error or difference.
    """

    kind: str
    detail: str = ""

    @property
    def is_right(self) -> bool:
        return self.kind != "differs"


def verdict(row: Row, column: Column) -> Verdict:
    """Run a row on both sides of a column."""
    if reason := row.missing(column):
        return Verdict("none", reason)
    stock, error = _run(row, Case(column, ours=False))
    case = Case(column, ours=True)
    with kernel_calls(case.calls):
        ours, our_error = _run(row, case)
    if our_error is not None:
        if error is not None:
            return Verdict("as stock", f"{type(error).__name__}: {error}")
        if isinstance(our_error, (ValueError, NotImplementedError)):
            return Verdict("error", f"{type(our_error).__name__}: {our_error}")
        return Verdict("differs", f"{type(our_error).__name__}: {our_error}")
    if error is None:
        assert stock is not None and ours is not None
        if difference := compare(stock, column.translate(ours), row):
            return Verdict("differs", difference)
    return Verdict("kernels" if case.calls else "modules")


def _run(row: Row, case: Case) -> tuple[Results | None, Exception | None]:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return row.run(case), None
        except Exception as error:
            return None, error


def compare(stock: Results, ours: Results, row: Row) -> str | None:
    """The first thing that differs; None if nothing does."""
    if stock.keys() != ours.keys():
        return f"only one side has {', '.join(sorted(stock.keys() ^ ours.keys()))}"
    for name, expected in stock.items():
        got = ours[name]
        if isinstance(expected, Tensor) and isinstance(got, Tensor):
            try:
                # A sum that ends near zero is as far off as its terms are large.
                largest = expected.abs().max().item() if expected.is_floating_point() and expected.numel() else 0.0
                atol = row.atol * max(1.0, largest) if largest < math.inf else row.atol
                torch.testing.assert_close(got, expected, rtol=row.rtol, atol=atol)
            except AssertionError as error:
                return f"{name}: {str(error).strip()}"
        elif isinstance(expected, Tensor) or isinstance(got, Tensor) or expected != got:
            return f"{name}: expected {_short(expected)}, got {_short(got)}"
    return None


def _short(value: Any) -> str:
    return f"a tensor {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
