"""Every case at tiny sizes: all contestants agree, and a wrong one is found."""

from __future__ import annotations

from importlib.metadata import version
from typing import NoReturn

import pytest
import torch

from moekernels import ops
from moekernels.bench import backward
from moekernels.bench import case as case_module
from moekernels.bench import transformers as transformers_layers
from moekernels.bench.case import Case, measure
from moekernels.bench.check import Mismatch
from moekernels.bench.clocks import Run
from moekernels.bench.kernels import KERNELS, cases
from moekernels.bench.layer import definition, layer_case, ours, work
from moekernels.bench.roofs import Probe, Roofs
from moekernels.bench.shapes import LayerInputs, layer_inputs, router_logits
from moekernels.bench.training import as_leaves, as_step, step_case
from moekernels.bench.training import definition as definition_of_step
from moekernels.bench.training import work as work_of_step
from moekernels.ops import reference
from tests.bench.conftest import KINDS, SteppingClock
from tests.generators import LayerShape
from tests.tolerance import assert_accurate

NAMES = [*KERNELS, "layer", "layer with routing", *backward.BACKWARD, "layer forward+backward"]
MAJOR = int(version("transformers").partition(".")[0])
ROOFS = Roofs(1e9, 1e9, {"float32": 1e9, "bfloat16": 1e9}, probe_bytes=64, matmul_size=8)


def all_cases(x: LayerInputs, shape: LayerShape) -> list[Case]:
    return [
        *cases(x, shape),
        layer_case(x, shape),
        layer_case(x, shape, with_routing=True),
        *backward.cases(x, shape),
        step_case(x, shape),
    ]


@pytest.mark.parametrize("shape", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("num_tokens", "routing"), [(1, "uniform"), (33, "zipf"), (9, "one-expert")])
def test_all_contestants_compute_the_definition(
    shape: LayerShape, dtype: torch.dtype, num_tokens: int, routing: str
) -> None:
    x = layer_inputs(shape, num_tokens, dtype, routing=routing)
    notes: list[str] = []
    found = [
        measure(case, shape, x, routing, ROOFS, 1e-9, check=True, bounds=True, note=notes.append)
        for case in all_cases(x, shape)
    ]
    assert [row.shape.removeprefix(f"{shape} ") for row in found] == NAMES
    assert all(row.seconds > 0 and row.bytes > 0 and row.roof is not None and not row.failures for row in found)
    assert [row.flops > 0 for row in found] == [name.startswith(("up", "down", "layer")) for name in NAMES]
    assert notes == []
    experts = {"torch eager", *([] if shape.bias else ["torch grouped_mm"])}
    if MAJOR >= 5 and shape.gated:
        experts |= {"transformers eager", "transformers grouped_mm"}
    block = {f"transformers {MAJOR} block"} if MAJOR < 5 or shape.name == "switch" else set()
    for row, name in zip(found, NAMES, strict=True):
        assert (block if name == "layer with routing" else experts if name == "layer" else set()) <= set(row.baselines)
        assert row.baselines or name == "layer with routing"


@pytest.mark.parametrize("shape", KINDS, ids=str)
def test_definition_of_the_layer(shape: LayerShape) -> None:
    """That of the ops in one piece, from which the benchmark's differs by never converting all weights at once."""
    x = layer_inputs(shape, 21)
    y, logits = x.to(torch.float64), router_logits(x, shape)
    plan = reference.plan(x.expert_ids, shape.num_experts)
    biases = {"up_bias": y.up_bias, "down_bias": y.down_bias}
    activation = {"activation": shape.activation, "gated": shape.gated}
    truth = reference.sparse_mlp(y.hidden, x.routing_weights, plan, y.up_weight, y.down_weight, **biases, **activation)
    torch.testing.assert_close(definition(x, shape, None, torch.float64), truth)
    routed = definition(x, shape, logits, torch.float64)
    assert not torch.allclose(routed, truth) or shape.top_k == 1
    assert_accurate(ours(x, shape, logits)(), routed, definition(x, shape, logits, torch.float32))


@pytest.mark.parametrize("shape", KINDS, ids=str)
def test_definition_of_a_step(shape: LayerShape) -> None:
    """That of PyTorch's autograd on the definition of the layer."""
    x = layer_inputs(shape, 13).to(torch.float64)
    y, leaves = as_leaves(x)
    plan = reference.plan(x.expert_ids, shape.num_experts)
    direction = torch.randn_like(x.hidden)

    def layer() -> torch.Tensor:
        return reference.sparse_mlp(
            y.hidden, y.routing_weights, plan, y.up_weight, y.down_weight, up_bias=y.up_bias, down_bias=y.down_bias,
            activation=shape.activation, gated=shape.gated,
        )  # fmt: skip

    expected = as_step(layer, leaves, direction)()
    found = definition_of_step(x, shape, direction, torch.float64)
    assert len(found) == len(leaves) == (6 if shape.bias else 4)
    for mine, theirs in zip(found, expected, strict=True):  # type: ignore[call-overload]
        torch.testing.assert_close(mine, theirs.double(), rtol=1e-6, atol=1e-6)
    assert len(as_leaves(x, frozen_experts=True)[1]) == 2


def test_work() -> None:
    shape = LayerShape("a", 10, 3, 4, 2)
    x = layer_inputs(shape, 5, torch.bfloat16, routing="one-expert")
    flops = 6.0 * 5 * 2 * 10 * 3
    assert work(x, shape) == (flops, 2.0 * (2 * 90 + 2 * 5 * 10))
    assert work_of_step(x, shape) == (3 * flops, 2.0 * (4 * 90 + 4 * 90 + 4 * 5 * 10))
    assert work_of_step(x, shape, frozen_experts=True) == (2 * flops, 2.0 * (4 * 90 + 4 * 5 * 10))


@pytest.mark.parametrize(
    ("op", "name"),
    [("route", "route"), ("plan", "plan"), ("permute", "permute"), ("grouped_gemm", "up"), ("unpermute", "unpermute"),
     ("sparse_mlp", "layer"), ("grouped_gemm", "up-rows-grad"), ("grouped_weight_grad", "down-weight-grad")],
)  # fmt: skip
def test_a_wrong_kernel_is_found(monkeypatch: pytest.MonkeyPatch, op: str, name: str) -> None:
    """By its definition if no baseline is there, and by any baseline."""
    shape = KINDS[0]
    x = layer_inputs(shape, 40)
    right = getattr(ops, op)

    def wrong(*args: object, **kwargs: object) -> object:
        out = right(*args, **kwargs)
        if op == "route":
            return out[0], out[1].flip(1)
        if op == "plan":
            return out._replace(token_of_row=out.token_of_row.roll(1))
        first, *more = out if op == "grouped_weight_grad" else (out,)
        third = torch.arange(len(first)).view(-1, *[1] * (first.dim() - 1)) == 3
        first = torch.where(third, 2 * first, first)
        return (first, *more) if more else first

    measured = next(case for case in all_cases(x, shape) if case.name == name)
    monkeypatch.setattr(ops, op, wrong)
    with pytest.raises(Mismatch, match=rf"^olmoe {name}, 40 tokens, uniform, float32"):
        measure(measured, shape, x, "uniform", ROOFS, 1e-9, check=True, baselines=False)
    row = measure(measured, shape, x, "uniform", ROOFS, 1e-9)
    assert set(row.failures) == set(measured.baselines) and not row.baselines
    assert all(why.startswith("differs: results are") for why in row.failures.values())


def few_numbers(x: LayerInputs, shape: LayerShape) -> list[Case]:
    """The cases that have an output of one number per token and expert, the sum of long products."""
    names = ("unpermute-grad", "activation-grad")
    return [*(case for case in backward.row_cases(x, shape) if case.name in names), step_case(x, shape)]


@pytest.mark.parametrize("shape", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_token_is_right_whatever_its_numbers(shape: LayerShape, dtype: torch.dtype) -> None:
    """Of a single number neither the error of plain PyTorch nor the value says how large an error may be."""
    for seed in range(25):
        torch.manual_seed(seed)
        x = layer_inputs(shape, 1, dtype)
        for case in few_numbers(x, shape):
            measure(case, shape, x, "uniform", None, 1e-9, check=True)


@pytest.mark.parametrize("shape", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_one_token_with_a_wrong_weight_is_found(shape: LayerShape, dtype: torch.dtype) -> None:
    """A step in which every other row of one expert's weight is too large: a little by definition, by others twice."""
    for seed in range(25):

        def step(factor: float, seed: int = seed) -> tuple[LayerInputs, Case]:
            torch.manual_seed(seed)
            x = layer_inputs(shape, 1, dtype)
            x.down_weight[x.expert_ids[0, x.routing_weights[0].argmax()], ::2] *= factor
            return x, step_case(x, shape)

        x, case = step(1.0)
        case.ours = step(1.25)[1].ours
        with pytest.raises(Mismatch):
            measure(case, shape, x, "uniform", None, 1e-9, check=True, baselines=False)
        case.ours = step(2.0)[1].ours
        assert set(measure(case, shape, x, "uniform", None, 1e-9).failures) == set(case.baselines)


@pytest.mark.parametrize("error", [0.0, 0.0035, 0.04, 0.06])
def test_a_number_that_cancels(error: float) -> None:
    """A sum that is next to nothing, of terms of size one: only they say what a rounding is."""
    shape, exact = KINDS[0], torch.tensor([1e-5])

    def case(terms: dict[int, float]) -> Case:
        run, definition = (lambda: (exact + error).bfloat16()), (lambda dtype: exact.to(dtype))
        other = {"other": lambda: exact.bfloat16()}
        return Case("k", run, other, 1.0, definition=definition, terms=lambda: terms)

    def passes(terms: dict[int, float], **options: bool) -> bool:
        try:
            row = measure(case(terms), shape, layer_inputs(shape, 1), "uniform", None, 1e-9, **options)  # type: ignore[arg-type]
        except Mismatch:
            return False
        return not row.failures

    assert passes({}, check=True) == passes({}, check=False) == (error == 0.0)
    assert passes({0: 1.0}, check=True, baselines=False) == (error < 0.0041)
    assert passes({0: 1.0}, check=False) == (error < 0.045)
    assert not passes({0: 0.01}, check=False) or error == 0.0


def test_nan_and_wrong_shapes_are_found() -> None:
    shape = KINDS[0]
    x = layer_inputs(shape, 4)
    for out in (torch.full((2, 2), float("nan")), torch.zeros(2, 3)):
        case = Case("k", lambda out=out: out, {}, 1.0, definition=lambda dtype: torch.zeros(2, 2, dtype=dtype))  # type: ignore[misc]
        with pytest.raises(Mismatch):
            measure(case, shape, x, "uniform", ROOFS, 1e-9, check=True)
    others = {
        "nan": lambda: torch.full((2,), float("nan")),
        "row": lambda: torch.zeros(1, 2),
        "right": lambda: [torch.zeros(2)],
    }
    row = measure(Case("k", lambda: torch.zeros(2), others, 1.0), shape, x, "uniform", ROOFS, 1e-9)  # type: ignore[arg-type]
    assert row.failures == {
        "nan": "differs: results are nan apart, and the largest is 0",
        "row": "differs: results of shape (1, 2) instead of (2,)",
    }
    assert list(row.baselines) == ["right"]


def test_a_baseline_that_fails_is_named_in_its_row() -> None:
    """Whatever it does, at any time; the others are measured."""

    def failing(error: Exception) -> Run:
        def run() -> NoReturn:
            raise error

        return run

    others: dict[str, Run] = {
        "broken": failing(IndexError("too many indices\nand more")),
        "torch": failing(RuntimeError("shapes do not fit")),
        "words": lambda: ("logits", "loss"),
        "right": lambda: torch.zeros(2),
        "lacking": failing(RuntimeError("\"grouped\" not implemented for 'Half'")),
    }
    shape, notes = KINDS[0], []
    case = Case("k", lambda: torch.zeros(2), others, 1.0, bounds={"bound": failing(KeyError("x"))})
    row = measure(case, shape, layer_inputs(shape, 4), "uniform", ROOFS, 1e-9, bounds=True, note=notes.append)
    assert row.failures == {
        "broken": "fails: IndexError: too many indices",
        "torch": "fails: RuntimeError: shapes do not fit",
        "words": "fails: TypeError: tensors are wanted, got tuple of str",
        "bound": "fails: KeyError: 'x'",
    }
    assert list(row.baselines) == ["right"]
    assert notes == ["without lacking: \"grouped\" not implemented for 'Half'"]


def test_a_baseline_that_cannot_be_made_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a version of transformers that is not known yet."""

    def modeling(model: str) -> NoReturn:
        raise AttributeError("Olmoe is another class now")

    monkeypatch.setattr(transformers_layers, "_modeling", modeling)
    shape = KINDS[3]
    x = layer_inputs(shape, 4)
    row = measure(layer_case(x, shape, with_routing=True), shape, x, "uniform", ROOFS, 1e-9)
    assert row.failures == {f"transformers {MAJOR} block": "fails: AttributeError: Olmoe is another class now"}


def test_two_calls_must_give_the_same_bits() -> None:
    shape = KINDS[0]
    x = layer_inputs(shape, 4)
    case = Case("k", lambda: 1.0 + 1e-6 * torch.rand(3), {}, 1.0, definition=lambda dtype: torch.ones(3, dtype=dtype))
    with pytest.raises(Mismatch, match="two calls gave different results"):
        measure(case, shape, x, "uniform", ROOFS, 1e-9, check=True)


def test_row_of_a_case(stepping: SteppingClock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(case_module, "make_clock", lambda device: stepping)
    shape, out, notes = KINDS[0], torch.zeros(2), []

    def of(seconds: float) -> object:
        run = stepping.takes(seconds)
        return lambda: (run(), out)[1]

    def broken() -> None:
        raise NotImplementedError("not in float32\nand more")

    # The roof takes turns with the others: a call of 6 s for twice the work is 1.5 times what ours takes.
    monkeypatch.setattr(Roofs, "probe", lambda *work: Probe(of(6.0), 2.0))  # type: ignore[arg-type]
    case = Case("k", of(2.0), {"slow": of(6.0), "broken": broken}, 1e9, 3e9, bounds={"bound": of(1.0)})  # type: ignore[arg-type, dict-item]
    row = measure(case, shape, layer_inputs(shape, 4), "zipf", ROOFS, 1.0, bounds=True, note=notes.append)
    assert (row.shape, row.tokens, row.routing, row.dtype, row.clock) == ("olmoe k", 4, "zipf", "float32", "stepping")
    assert (row.seconds, row.baselines, row.roof) == (2.0, {"slow": 6.0, "bound": 1.0}, 1.5)
    assert notes == ["without broken: not in float32"]
    case.captured, case.captured_calls = (lambda: {"moekernels": of(8.0), "torch grouped_mm": of(1.0)}), 8  # type: ignore[assignment]
    row = measure(case, shape, layer_inputs(shape, 4), "zipf", None, 1.0, note=notes.append)
    assert (row.seconds, row.baselines, row.roof, row.clock) == (1.0, {"slow": 6.0}, None, "CUDA graph of 8 layers")
