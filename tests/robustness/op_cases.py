"""Inputs for the ops that hypothesis draws: shapes, strides, dtypes, and values that are not finite."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from torch import Tensor

from moekernels import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: One element; below, at and above a vector of every instruction set; odd ones.
WIDTHS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 64, 65, 130)
NAN, INF = float("nan"), float("inf")


class Case(NamedTuple):
    """One call of an op: its name, and its arguments."""

    op: str
    args: tuple[Any, ...]
    options: dict[str, Any]


class Draw:
    """Tensors of one case. Values come from a seed, so that hypothesis has few things to shrink.

    Args:
        draw: of hypothesis.
    """

    def __init__(self, draw: st.DrawFn) -> None:
        self.draw = draw
        self.generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        self.dtype = draw(st.sampled_from(DTYPES))
        # Most cases are finite, so that sums are compared as numbers.
        self.special = draw(st.sampled_from(("", "", "", "nan", "inf", "both", "zeros", "large")))

    def width(self) -> int:
        return self.draw(st.sampled_from(WIDTHS))

    def count(self, low: int, high: int) -> int:
        return self.draw(st.integers(low, high))

    def flag(self) -> bool:
        return self.draw(st.booleans())

    def tensor(
        self, *shape: int, dtype: torch.dtype | None = None, plain: bool = False, infinite: bool = True
    ) -> Tensor:
        """Values and strides of all kinds; `plain` is finite and contiguous, without `infinite` only NaN is special."""
        values = torch.randn(shape, generator=self.generator)
        if not plain:
            values = self._with_special(values, infinite)
        values = values.to(dtype or self.dtype)
        return values if plain else self._strided(values)

    def _with_special(self, values: Tensor, infinite: bool) -> Tensor:
        if self.special == "zeros":
            return values * (torch.rand(values.shape, generator=self.generator) < 0.5)
        if self.special == "large":
            return values * 200
        if self.special and values.numel() and self.flag():
            kinds = {"nan": (NAN,), "inf": (INF, -INF), "both": (NAN, INF, -INF)}[self.special]
            kinds = kinds if infinite else (NAN,)
            flat = values.reshape(-1)
            for _ in range(self.count(1, 3)):
                flat[self.count(0, len(flat) - 1)] = self.draw(st.sampled_from(kinds))
        return values

    def _strided(self, values: Tensor) -> Tensor:
        """The same values in memory that lies otherwise."""
        kind = self.draw(st.sampled_from(("contiguous", "contiguous", "transposed", "sliced", "offset")))
        if values.dim() == 0 or kind == "contiguous":
            return values
        if kind == "transposed" and values.dim() > 1:
            return values.transpose(-1, -2).contiguous().transpose(-1, -2)
        if kind == "sliced":
            between = NAN if values.is_floating_point() else 1
            wide = values.new_full((*values.shape[:-1], 2 * values.shape[-1] + 1), between)
            wide[..., 1::2] = values
            return wide[..., 1::2]
        store = values.new_zeros(values.numel() + 3)
        view = store[3:].view(values.shape)
        view.copy_(values)
        return view

    def offsets(self, experts: int, rows: int) -> Tensor:
        """Rows of each expert, some of them none, and maybe some rows of nobody at the end."""
        cuts = sorted(self.count(0, rows) for _ in range(experts - 1))
        last = rows if self.flag() else self.count(cuts[-1] if cuts else 0, rows)
        return torch.tensor([0, *(min(cut, last) for cut in cuts), last], dtype=torch.int32)

    def plan(self, tokens: int, top_k: int, experts: int) -> ops.Plan:
        ids = torch.randint(-1, experts, (tokens, top_k), generator=self.generator, dtype=torch.int32)
        return ops.plan(ids, experts, capacity=self.draw(st.sampled_from((None, None, 1, 3))))


ACTIVATIONS = st.sampled_from(ops.ACTIVATIONS)


@st.composite
def route(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    scoring = draw(st.sampled_from(ops.SCORINGS))
    experts = draw(st.sampled_from((2, 3, 4, 8, 16, 17, 64, 65, 130)))
    tokens = d.count(0, 9)
    top_k = d.count(1, min(experts, 9)) if scoring == "softmax" else 2
    options: dict[str, Any] = {"scoring": scoring, "renormalize": d.flag()}
    if scoring == "sparsemixer":
        options["renormalize"] = False
    if d.flag():
        options["mask"] = torch.rand(tokens, generator=d.generator) < 0.7
    return Case("route", (d.tensor(tokens, experts), top_k), options)


@st.composite
def router_stats(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    groups, each, experts = d.count(1, 3), d.count(0, 5), draw(st.sampled_from((1, 2, 8, 17, 64, 130)))
    options: dict[str, Any] = {"num_groups": groups}
    if d.flag():
        options["mask"] = (torch.rand(groups * each, generator=d.generator) - 0.3).clamp(min=0)
    return Case("router_stats", (d.tensor(groups * each, experts), d.count(1, min(experts, 8))), options)


@st.composite
def plan(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    tokens, top_k, experts = d.count(0, 24), d.count(1, 5), draw(st.sampled_from((1, 2, 3, 8, 65, 300)))
    low, high = draw(st.sampled_from(((-1, experts), (0, experts), (-(2**31), 2**31 - 1))))
    ids = torch.randint(low, high, (tokens, top_k), generator=d.generator, dtype=torch.int32)
    options: dict[str, Any] = {}
    if d.flag():
        options["capacity"] = d.count(1, 6)
        if d.flag():
            options["group_size"] = d.count(1, 30)
        if d.flag():
            options["priority"] = d.tensor(tokens, dtype=torch.float32, plain=True).round()
    return Case("plan", (ids, experts), options)


@st.composite
def permute(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    tokens, width = d.count(0, 12), d.width()
    index = torch.randint(-2, tokens + 2, (d.count(0, 30),), generator=d.generator, dtype=torch.int32)
    return Case("permute", (d.tensor(tokens, width), index), {})


@st.composite
def unpermute(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    tokens, top_k, width = d.count(0, 12), d.count(1, 5), d.width()
    found = d.plan(tokens, top_k, d.count(1, 6))
    weights = d.tensor(tokens, top_k, dtype=torch.float32) if d.flag() else None
    return Case("unpermute", (d.tensor(tokens * top_k, width), found.row_of_slot, weights), {})


@st.composite
def grouped_gemm(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    experts, tokens, inner = d.count(1, 4), d.count(0, 40), d.width()
    gated = d.flag()
    options: dict[str, Any] = {"activation": draw(ACTIVATIONS), "gated": gated}
    transposed = d.flag()
    if transposed:
        gated, options = False, {"transposed": True}
    rows = tokens
    if d.flag():
        rows = d.count(0, 40)
        options["token_of_row"] = torch.randint(-1, max(tokens, 1), (rows,), generator=d.generator, dtype=torch.int32)
    outer = d.width() * (2 if gated else 1)
    if not transposed and d.flag():
        options["bias"] = d.tensor(experts, outer, infinite=not gated)
    # What an activation has made tiny may be zero instead, and infinity tells them apart.
    if d.flag():
        options["row_scale"] = d.tensor(rows, dtype=torch.float32, infinite=transposed)
    weight = d.tensor(experts, *((inner, outer) if transposed else (outer, inner)), infinite=not gated)
    return Case("grouped_gemm", (d.tensor(tokens, inner), weight, d.offsets(experts, rows)), options)


@st.composite
def grouped_weight_grad(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    experts, rows = d.count(1, 4), d.count(0, 40)
    options: dict[str, Any] = {"need_bias": d.flag()}
    return Case(
        "grouped_weight_grad",
        (d.tensor(rows, d.width()), d.tensor(rows, d.width()), d.offsets(experts, rows)),
        options,
    )


@st.composite
def sparse_mlp(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    experts, tokens, top_k = d.count(1, 5), d.count(0, 12), d.count(1, 3)
    hidden, inner, gated = d.width(), d.width(), d.flag()
    found = d.plan(tokens, top_k, experts)
    options: dict[str, Any] = {"activation": draw(ACTIVATIONS), "gated": gated}
    if d.flag():
        options["up_bias"] = d.tensor(experts, inner * (2 if gated else 1), infinite=not gated)
        options["down_bias"] = d.tensor(experts, hidden)
    weights = d.tensor(tokens, top_k, dtype=torch.float32, infinite=False)
    up = d.tensor(experts, inner * (2 if gated else 1), hidden, infinite=not gated)
    down = d.tensor(experts, hidden, inner, infinite=False)
    return Case("sparse_mlp", (d.tensor(tokens, hidden), weights, found, up, down), options)


@st.composite
def activation(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    gated = d.flag()
    x = d.tensor(d.count(0, 9), d.width() * (2 if gated else 1))
    return Case("activation", (x, draw(ACTIVATIONS)), {"gated": gated})


@st.composite
def linear(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    inner, outer = d.width(), d.width()
    bias = d.tensor(outer) if d.flag() else None
    args = (d.tensor(d.count(0, 40), inner), d.tensor(outer, inner), bias)
    return Case("linear", args, {"activation": draw(ACTIVATIONS)})


@st.composite
def rms_norm(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    width = d.width()
    args = (d.tensor(d.count(0, 9), width), d.tensor(width))
    return Case("rms_norm", args, {"eps": draw(st.sampled_from((1e-5, 1e-6)))})


@st.composite
def attention(draw: st.DrawFn) -> Case:
    d = Draw(draw)
    shared, groups = d.count(1, 3), d.count(1, 3)
    batch, heads, size = d.count(1, 2), d.count(1, 2), draw(st.sampled_from((1, 4, 8, 16, 33, 64)))
    queries, keys = d.count(1, 4), d.count(1, 33)
    bias = None
    if d.flag():
        bias = torch.zeros(draw(st.sampled_from((1, batch * shared))), 1, queries, keys)
        blocked = torch.rand(bias.shape, generator=d.generator) < 0.4
        blocked[..., :1] = False
        bias = bias.masked_fill(blocked, draw(st.sampled_from((-INF, -1e4)))).to(d.dtype)
    args = (
        d.tensor(batch * shared, heads * groups, queries, size),
        d.tensor(batch, heads, keys, size),
        d.tensor(batch, heads, keys, size),
    )
    return Case("attention", args, {"scale": size**-0.5, "bias": bias})


CASES: dict[str, st.SearchStrategy[Case]] = {
    make.__name__: make()
    for make in (route, router_stats, plan, permute, unpermute, grouped_gemm, grouped_weight_grad, sparse_mlp,
                 activation, linear, rms_norm, attention)
}  # fmt: skip
