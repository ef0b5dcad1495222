"""A layer with products of low rank beside frozen weights, and its gradients."""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import moekernels
from moekernels import ops
from moekernels.ops import _low_rank, reference
from moekernels.ops._low_rank import LowRank, adapted_mlp
from tests.tolerance import assert_accurate

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_that_are_added_some_after_others(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """To the same bits as at once, whoever's rows a cut goes through; rows past the last offset stay."""
    offsets = torch.tensor([0, 5, 5, 6, 39]).int()
    before, reduced, factor = (torch.randn(*shape).to(dtype) for shape in ((42, 17), (42, 3), (4, 3, 17)))
    whole = before.clone()
    _low_rank._add(whole, reduced, factor, offsets)
    expected = before[:39].double() + reference.grouped_gemm(
        reduced[:39].double(), factor.double(), offsets, transposed=True
    )  # fmt: skip
    product = torch.cat([reduced[a:b] @ w for (a, b), w in zip(pairwise(offsets.tolist()), factor, strict=True)])
    assert_accurate(whole[:39], expected, before[:39] + product)
    assert torch.equal(whole[39:], before[39:])
    for rows in (1, 4, 13, 41):
        monkeypatch.setattr(_low_rank, "_ADDED_BYTES", rows * 17 * dtype.itemsize)
        parts = before.clone()
        _low_rank._add(parts, reduced, factor, offsets)
        assert torch.equal(parts, whole)


class Layer(NamedTuple):
    """Letters: 9 tokens, 4 experts of which each takes 2, hidden size 24, expert size 20, ranks 3 and 5."""

    hidden: Tensor
    routing_weights: Tensor
    plan: ops.Plan
    weights: list[Tensor]
    biases: list[Tensor | None]
    factors: list[Tensor]
    options: dict[str, Any]

    def run(self, dtype: torch.dtype) -> list[Tensor]:
        return self._with_gradients(dtype, self._adapted)

    def plain(self, dtype: torch.dtype) -> list[Tensor]:
        """A loop over experts."""
        return self._with_gradients(dtype, self._loop)

    def size_of_terms(self) -> float:
        """Of those that the gradient of a routing weight is the sum of: its row's, times the output's gradient."""
        weights, biases = ([x if x is None else x.double() for x in pair] for pair in (self.weights, self.biases))
        rows = self._rows(self.hidden.double(), weights, biases, [factor.double() for factor in self.factors])
        return rows.abs().sum(dim=1).max().item()  # the gradient is 1 at most

    def _with_gradients(self, dtype: torch.dtype, compute: Any) -> list[Tensor]:
        def typed(x: Any) -> Any:
            return x if x is None else x.to(dtype)

        leaves = [typed(x).detach().requires_grad_() for x in (self.hidden, *self.factors)]
        leaves.append(self.routing_weights.detach().clone().requires_grad_())
        hidden, *factors, routing_weights = leaves
        weights, biases = ([typed(x) for x in pair] for pair in (self.weights, self.biases))
        out = compute(hidden, routing_weights, weights, biases, factors)
        direction = torch.linspace(-1, 1, out.numel(), device=out.device).view_as(out).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, direction)]

    def _adapted(self, hidden: Tensor, routing: Tensor, weights: Any, biases: Any, factors: list[Tensor]) -> Tensor:
        adapters = LowRank(factors[0], factors[1], 0.7), LowRank(factors[2], factors[3], 2.0)
        return adapted_mlp(hidden, routing, self.plan, weights, biases, adapters, **self.options)

    def _loop(self, hidden: Tensor, routing: Tensor, weights: Any, biases: Any, factors: list[Tensor]) -> Tensor:
        return reference.unpermute(self._rows(hidden, weights, biases, factors), self.plan.row_of_slot, routing)

    def _rows(self, hidden: Tensor, weights: Any, biases: Any, factors: list[Tensor]) -> Tensor:
        offsets, tokens, _ = self.plan
        rows = []
        for e, (begin, end) in enumerate(pairwise(offsets.tolist())):
            x = hidden[tokens[begin:end].long()]
            for i, scale in enumerate((0.7, 2.0)):
                weight, first, second = weights[i][e], factors[2 * i][e], factors[2 * i + 1][e]
                weight = weight.t() if self.options["transposed"] else weight
                bias = None if biases[i] is None else biases[i][e]
                x = F.linear(x, weight, bias) + scale * (x @ first.t() @ second)
                if i == 0:
                    x = reference.activation(x, self.options["activation"], gated=self.options["gated"]).to(x.dtype)
            rows.append(x)
        rows.append(hidden.new_zeros(len(tokens) - int(offsets[-1]), hidden.shape[1]))
        return torch.cat(rows)


KINDS = {
    "silu": {"activation": "silu", "gated": True},
    "relu2": {"activation": "relu2", "gated": False},
    "swiglu": {"activation": ops.Swiglu(1.702, 7.0, 1.0, interleaved=True), "gated": True},
}


IDS = torch.tensor([[0, 1], [1, 3], [3, 0], [1, -1], [3, 1], [0, 3], [1, 0], [3, 1], [0, 1]]).int()


def make_layer(kind: str, biased: bool, transposed: bool, device: torch.device | str = "cpu") -> Layer:
    """One choice is dropped, an expert is unvisited, and the second factors lie as PEFT's."""
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device) * shape[-1] ** -0.5

    options = {**KINDS[kind], "transposed": transposed}
    up = 40 if options["gated"] else 20
    weights = [random(4, up, 24), random(4, 24, 20)]
    return Layer(
        random(9, 24) * 5,
        torch.rand(9, 2, generator=generator).to(device),
        ops.plan(IDS.to(device), 4),
        [weight.transpose(1, 2).contiguous() if transposed else weight for weight in weights],
        [random(4, up), random(4, 24)] if biased else [None, None],
        [random(4, 3, 24), random(up, 3, 4).permute(2, 1, 0), random(4, 5, 20), random(24, 5, 4).permute(2, 1, 0)],
        options,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("transposed", [False, True], ids=["by-rows", "transposed"])
@pytest.mark.parametrize("biased", [False, True], ids=["plain", "biased"])
@pytest.mark.parametrize("kind", KINDS)
def test_layer(unit: torch.device, kind: str, biased: bool, transposed: bool, dtype: torch.dtype) -> None:
    if unit.type == "cuda" and biased and transposed:
        pytest.skip("on CUDA there is no bias beside a transposed weight")
    layer = make_layer(kind, biased, transposed, unit)
    rounded = layer._replace(
        hidden=layer.hidden.to(dtype), weights=[x.to(dtype) for x in layer.weights],
        biases=[x if x is None else x.to(dtype) for x in layer.biases], factors=[x.to(dtype) for x in layer.factors],
    )  # fmt: skip
    results = zip(rounded.run(dtype), rounded.plain(torch.float64), rounded.plain(dtype), strict=True)
    *others, (actual, truth, plain) = results
    for result in others:
        assert_accurate(*result)
    # Such a sum in float32 is of terms that were rounded to the dtype.
    assert_accurate(actual.to(dtype), truth.double(), plain.to(dtype), rounded.size_of_terms())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bits_of_a_token_are_its_own(unit: torch.device, dtype: torch.dtype) -> None:
    """In its output and in its gradient, whoever else there is."""
    layer = make_layer("silu", False, False, unit)
    some = layer._replace(
        hidden=layer.hidden[:4], routing_weights=layer.routing_weights[:4], plan=ops.plan(IDS[:4].to(unit), 4)
    )
    adapters = LowRank(*(x.to(dtype) for x in layer.factors[:2]), 0.7), LowRank(*layer.factors[2:], 2.0)
    weights, direction = [x.to(dtype) for x in layer.weights], torch.randn(9, 24, device=unit).to(dtype)
    results = []
    for x in (layer, some):
        hidden = x.hidden.to(dtype).requires_grad_()
        with moekernels.batch_invariant():
            out = adapted_mlp(hidden, x.routing_weights, x.plan, weights, (None, None), adapters, **x.options)
            results.append([out, *torch.autograd.grad(out, hidden, direction[: len(out)])])
    for whole, part in zip(*results, strict=True):
        assert torch.equal(whole[:4], part)


@pytest.mark.parametrize("transposed", [False, True], ids=["by-rows", "transposed"])
@pytest.mark.parametrize("kind", KINDS)
def test_layer_in_float64(kind: str, transposed: bool) -> None:
    layer = make_layer(kind, True, transposed)
    for actual, expected in zip(layer.run(torch.float64), layer.plain(torch.float64), strict=True):
        if actual.dtype is torch.float64:  # the routing weights and their gradient are not
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("present", [(True, False), (False, True)], ids=["up", "down"])
def test_adapter_of_one_projection(present: tuple[bool, bool]) -> None:
    layer = make_layer("silu", False, False)
    hidden, *factors = (x.double().requires_grad_() for x in (layer.hidden, *layer.factors))
    up, down = LowRank(*factors[:2], 0.7), LowRank(*factors[2:], 2.0)
    weights = [weight.double() for weight in layer.weights]
    chosen = [adapter if there else None for adapter, there in zip((up, down), present, strict=True)]
    merged = [
        weight if adapter is None else weight + adapter.scale * adapter.second.transpose(1, 2) @ adapter.first
        for weight, adapter in zip(weights, chosen, strict=True)
    ]
    out = adapted_mlp(hidden, layer.routing_weights, layer.plan, weights, (None, None), chosen, **layer.options)
    expected = ops.sparse_mlp(hidden, layer.routing_weights, layer.plan, *merged)
    torch.testing.assert_close(out, expected, rtol=1e-12, atol=1e-12)
    leaves = [hidden, *(x for adapter in chosen if adapter is not None for x in adapter[:2])]
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (out, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_factors_of_float32_beside_bfloat16() -> None:
    """PEFT keeps adapters in float32; their gradients are too."""
    layer = make_layer("silu", False, False)
    hidden, weights = layer.hidden.bfloat16(), [weight.bfloat16() for weight in layer.weights]
    results = []
    for factors in (layer.factors, [factor.bfloat16() for factor in layer.factors]):
        leaves = [factor.detach().requires_grad_() for factor in factors]
        adapters = LowRank(*leaves[:2], 0.5), LowRank(*leaves[2:], 2.0)
        out = adapted_mlp(
            hidden, layer.routing_weights, layer.plan, weights, (None, None), adapters, **layer.options
        )  # fmt: skip
        grads = torch.autograd.grad(out.sum(), leaves)
        assert [grad.dtype for grad in grads] == [leaf.dtype for leaf in leaves]
        results.append([out, *(grad.bfloat16() for grad in grads)])
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def test_what_is_kept_for_the_gradient() -> None:
    layer = make_layer("silu", False, False)
    leaves = [x.detach().requires_grad_() for x in (layer.hidden, *layer.factors)]
    adapters = LowRank(*leaves[1:3], 0.5), LowRank(*leaves[3:], 2.0)
    given = {x.data_ptr() for x in (*leaves, layer.routing_weights, *layer.plan, *layer.weights)}
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        adapted_mlp(
            leaves[0], layer.routing_weights, layer.plan, layer.weights, (None, None), adapters, **layer.options
        )
    assert [tuple(x.shape) for x in kept if x.data_ptr() not in given] == [(18, 40), (18, 3), (18, 5)]


def test_no_second_derivative() -> None:
    layer = make_layer("silu", False, False)
    hidden = layer.hidden.requires_grad_()
    adapters = LowRank(*layer.factors[:2], 0.5), LowRank(*layer.factors[2:], 2.0)
    out = adapted_mlp(
        hidden, layer.routing_weights, layer.plan, layer.weights, (None, None), adapters, **layer.options
    )  # fmt: skip
    (grad,) = torch.autograd.grad(out.square().sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
