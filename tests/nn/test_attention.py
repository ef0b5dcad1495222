from __future__ import annotations

import math
import sys
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from moekernels._settings import current_cpu_isa
from moekernels.nn import (
    ATTENTION_FUNCTIONS,
    AttentionMask,
    DynamicCache,
    StaticCache,
    causal_mask,
    eager_attention,
    padding_mask,
    sdpa_attention,
)
from moekernels.nn.attention import additive_mask, flash_attention
from tests.nn.test_cache import tiny_config
from tests.tolerance import assert_accurate

# Flash attention takes none, and needs a package.
TAKING_A_BIAS = ("eager", "sdpa")


def definition(
    query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float, bias: float | Tensor = 0.0
) -> Tensor:
    """Attention in float64, every head with its own copy of the key."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.double().repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = (query.double() @ key.transpose(2, 3) * scale + bias).masked_fill(~visible, -math.inf)
    return (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)


def qkv(
    num_queries: int, num_keys: int, heads: int = 4, kv_heads: int = 2, dtype: torch.dtype = torch.float32
) -> list[Tensor]:
    sizes = ((heads, num_queries), (kv_heads, num_keys), (kv_heads, num_keys))
    return [torch.randn(2, h, n, 8).to(dtype) for h, n in sizes]


@pytest.mark.parametrize("name", TAKING_A_BIAS)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_padded_causal_attention(name: str, kv_heads: int, num_queries: int, dtype: torch.dtype) -> None:
    query, key, value = qkv(num_queries, 9, kv_heads=kv_heads, dtype=dtype)
    visible = torch.ones(2, 1, num_queries, 9, dtype=torch.bool).tril(9 - num_queries)
    visible[0, ..., :3] = False
    mask = AttentionMask(additive_mask(visible, dtype))
    out, _ = ATTENTION_FUNCTIONS[name](query, key, value, mask, scale=0.3)
    truth = definition(query, key, value, visible, 0.3)
    # Plain PyTorch: matrix products, softmax in float32.
    repeats = 4 // kv_heads
    scores = query @ key.repeat_interleave(repeats, 1).transpose(2, 3) * 0.3
    probs = scores.masked_fill(~visible, -math.inf).softmax(-1, dtype=torch.float32).to(dtype)
    plain = (probs @ value.repeat_interleave(repeats, 1)).transpose(1, 2).flatten(2)
    assert_accurate(out, truth, plain)


@pytest.mark.parametrize("name", TAKING_A_BIAS)
def test_triangle_without_a_bias(name: str) -> None:
    query, key, value = qkv(6, 6)
    out, _ = ATTENTION_FUNCTIONS[name](query, key, value, AttentionMask(is_causal=True), scale=0.3)
    truth = definition(query, key, value, torch.ones(6, 6, dtype=torch.bool).tril(), 0.3)
    torch.testing.assert_close(out, truth.float())


@pytest.mark.parametrize("name", TAKING_A_BIAS)
@pytest.mark.parametrize("num_queries", [1, 5])
def test_bias_per_head_and_no_scale(name: str, num_queries: int) -> None:
    query, key, value = qkv(num_queries, 7)
    bias = torch.randn(1, 4, num_queries, 7)
    out, _ = ATTENTION_FUNCTIONS[name](query, key, value, AttentionMask(bias), scale=1.0)
    truth = definition(query, key, value, torch.ones(7, dtype=torch.bool), 1.0, bias)
    torch.testing.assert_close(out, truth.float())


@pytest.mark.parametrize("name", TAKING_A_BIAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_a_row_that_sees_nothing_is_finite(name: str, dtype: torch.dtype, num_queries: int) -> None:
    query, key, value = qkv(num_queries, 3, dtype=dtype)
    mask = AttentionMask(additive_mask(torch.zeros(2, 1, num_queries, 3, dtype=torch.bool), dtype))
    out, _ = ATTENTION_FUNCTIONS[name](query * 20, key, value, mask, scale=1.0)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", TAKING_A_BIAS)
def test_gradients(name: str) -> None:
    inputs = [x.double().requires_grad_() for x in qkv(4, 4)]
    mask = AttentionMask(is_causal=True)
    visible = torch.ones(4, 4, dtype=torch.bool).tril()
    weights = torch.randn(2, 4, 32, dtype=torch.float64)
    ours = torch.autograd.grad((ATTENTION_FUNCTIONS[name](*inputs, mask, scale=0.3)[0] * weights).sum(), inputs)
    truth = torch.autograd.grad((definition(*inputs, visible, 0.3) * weights).sum(), inputs)
    for mine, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize(
    ("of_query", "num_keys", "is_ours"),
    [
        ((2, 4, 1, 8), 900, True),
        ((8, 4, 4, 8), 9, False),
        ((2, 4, 9, 8), 512, "amx"),
        ((2, 4, 9, 8), 513, False),
        ((2, 4, 9, 264), 9, False),
    ],
    ids=str,
)
def test_where_the_kernel_is_the_faster(
    of_query: tuple[int, ...], num_keys: int, is_ours: bool | str, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr("moekernels.nn.attention.attention_by_kernel", lambda *args: calls.append(args))
    query = torch.ones(of_query, dtype=torch.bfloat16)
    key = torch.ones(2, 4, num_keys, of_query[3], dtype=torch.bfloat16)
    expected = current_cpu_isa() == is_ours if isinstance(is_ours, str) else is_ours
    sdpa_attention(query, key, key, AttentionMask(), scale=1.0)
    assert bool(calls) == expected
    calls.clear()
    sdpa_attention(query.float(), key.float(), key.float(), AttentionMask(), scale=1.0)
    assert bool(calls) == (is_ours is True)


def test_probabilities() -> None:
    query, key, value = qkv(3, 5)
    out, probs = eager_attention(query, key, value, AttentionMask(), scale=0.3)
    assert probs.shape == (2, 4, 3, 5)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4, 3))
    torch.testing.assert_close((probs @ value.repeat_interleave(2, 1)).transpose(1, 2).flatten(2), out)
    assert sdpa_attention(query, key, value, AttentionMask(), scale=0.3)[1] is None


def test_dropout_of_everything() -> None:
    query, key, value = qkv(3, 5)
    for attend in (eager_attention, sdpa_attention):
        out, _ = attend(query, key, value, AttentionMask(), scale=0.3, dropout=0.999999)
        assert (out == 0).all()


def test_masks_are_left_out_where_nothing_is_hidden() -> None:
    positions = torch.arange(5)
    assert causal_mask(None, None, positions, 2, torch.float32) == AttentionMask(is_causal=True)
    assert causal_mask(torch.ones(2, 5), None, positions, 2, torch.float32) == AttentionMask(is_causal=True)
    assert causal_mask(None, None, positions[:1], 2, torch.float32) == AttentionMask()
    assert padding_mask(None, torch.float32) == padding_mask(torch.ones(2, 5), torch.float32) == AttentionMask()
    explicit = causal_mask(None, None, positions, 2, torch.float32, explicit=True)
    assert torch.equal(explicit.bias == 0, torch.ones(1, 1, 5, 5, dtype=torch.bool).tril())


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_causal_mask_over_a_cache(padded: bool, is_static: bool, num_queries: int) -> None:
    past, num_keys = 4, 4 + num_queries
    cache = StaticCache(tiny_config(), 2, 10) if is_static else DynamicCache()
    for layer in range(2):
        cache.update(torch.zeros(2, 2, past, 8), torch.zeros(2, 2, past, 8), layer, torch.arange(past))
    attention_mask = torch.ones(2, num_keys)
    attention_mask[1, :2] = 0
    positions = cache.next_positions(num_queries, torch.device("cpu"))
    mask = causal_mask(attention_mask if padded else None, cache, positions, 2, torch.float32)

    expected = torch.zeros(2, 1, num_queries, 10 if is_static else num_keys, dtype=torch.bool)
    expected[..., :num_keys] = torch.ones(num_queries, num_keys, dtype=torch.bool).tril(past)
    if padded:
        expected[1, ..., :2] = False
    visible = torch.ones(1, dtype=torch.bool) if mask.bias is None else mask.bias == 0
    assert not mask.is_causal
    assert torch.equal(visible.expand_as(expected), expected)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["none", "dynamic", "static"])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("window", [1, 2, 6, 7, 100])
def test_sliding_window(window: int, num_queries: int, kind: str, padded: bool) -> None:
    past = 0 if kind == "none" else 4
    num_keys = past + num_queries
    cache = {"none": None, "dynamic": DynamicCache(), "static": StaticCache(tiny_config(), 2, 10)}[kind]
    if cache is not None:
        for layer in range(2):
            cache.update(torch.zeros(2, 2, past, 8), torch.zeros(2, 2, past, 8), layer, torch.arange(past))
    attention_mask = torch.ones(2, num_keys)
    attention_mask[1, :1] = 0
    positions = torch.arange(past, num_keys)
    mask = causal_mask(attention_mask if padded else None, cache, positions, 2, torch.float32, sliding_window=window)

    width = 10 if kind == "static" else num_keys
    expected = torch.zeros(2, 1, num_queries, width, dtype=torch.bool)
    for row in range(2):
        for i, query in enumerate(positions.tolist()):
            for key in range(max(query - window + 1, 0), query + 1):
                expected[row, 0, i, key] = not padded or bool(attention_mask[row, key])
    if mask.is_causal:
        visible = torch.ones(num_queries, width, dtype=torch.bool).tril()
    else:
        visible = torch.ones(1, dtype=torch.bool) if mask.bias is None else mask.bias == 0
    assert torch.equal(visible.expand_as(expected), expected)
    if window >= width and kind == "none" and not padded and num_queries > 1:
        assert mask == AttentionMask(is_causal=True), "a window over everything costs nothing"


def test_padding_mask_of_an_encoder() -> None:
    mask = padding_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.bfloat16)
    assert mask.bias is not None and mask.bias.dtype == torch.bfloat16
    assert (mask.bias == 0).tolist() == [[[[True, True, False]]], [[[True, True, True]]]]
    assert mask.bias.min() == torch.finfo(torch.bfloat16).min


@pytest.mark.parametrize("name", TAKING_A_BIAS)
@pytest.mark.parametrize("bias", [None, (2, 1, 1, 5), (1, 4, 3, 5), (2, 4, 3, 5), (6, 1, 1, 5), (6, 4, 3, 5)], ids=str)
@pytest.mark.parametrize("kv_heads", [2, 4])
def test_rows_that_share_their_keys(name: str, bias: tuple[int, ...] | None, kv_heads: int) -> None:
    """Three rows of queries to each row of keys, as if the keys had been repeated."""
    torch.manual_seed(2)
    query, key, value = torch.randn(6, 4, 3, 8), *(torch.randn(2, kv_heads, 5, 8) for _ in range(2))
    given = repeated = None if bias is None else torch.randn(bias)
    if given is not None and given.shape[0] == 2:
        repeated = given.repeat_interleave(3, 0)
    attend = ATTENTION_FUNCTIONS[name]
    out, probs = attend(query, key, value, AttentionMask(given), scale=0.4)
    expected, expected_probs = attend(
        query, key.repeat_interleave(3, 0), value.repeat_interleave(3, 0), AttentionMask(repeated), scale=0.4
    )
    torch.testing.assert_close(out, expected)
    if name == "eager":
        torch.testing.assert_close(probs, expected_probs)
    with pytest.raises(ValueError, match="6 rows of queries cannot share 4 rows of keys"):
        attend(query, key.repeat(2, 1, 1, 1), value.repeat(2, 1, 1, 1), AttentionMask(), scale=0.4)
    with pytest.raises(ValueError, match="cannot causally share"):
        attend(query, key, value, AttentionMask(is_causal=True), scale=0.4)


# --- flash attention, with a stand-in for the package -----------------------------------------------------------------


class FakeFlashAttention:
    """The two functions of flash-attn that are used, by their documentation."""

    def flash_attn_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        dropout_p: float,
        softmax_scale: float,
        causal: bool,
        window_size: tuple[int, int] = (-1, -1),
    ) -> Tensor:
        visible = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool)
        # Causal masks and windows are aligned with the last key.
        last = k.shape[1] - q.shape[1]
        visible = visible.tril(last) if causal else visible
        if window_size != (-1, -1):
            visible = visible.triu(last - window_size[0]).tril(last + window_size[1])
        out = definition(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), visible, softmax_scale)
        return out.view(q.shape).to(q.dtype)

    def flash_attn_varlen_func(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        **options: Any,
    ) -> Tensor:
        assert cu_seqlens_q.dtype == cu_seqlens_k.dtype == torch.int32
        starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
        assert starts_q[-1] == q.shape[0] and starts_k[-1] == k.shape[0]
        outputs = []
        for i in range(len(starts_q) - 1):
            rows, keys = slice(starts_q[i], starts_q[i + 1]), slice(starts_k[i], starts_k[i + 1])
            assert rows.stop - rows.start <= max_seqlen_q and keys.stop - keys.start <= max_seqlen_k
            outputs.append(self.flash_attn_func(q[None, rows], k[None, keys], v[None, keys], **options)[0])
        return torch.cat(outputs)


@pytest.fixture
def flash(monkeypatch: pytest.MonkeyPatch) -> None:
    package: Any = FakeFlashAttention()
    monkeypatch.setitem(sys.modules, "flash_attn", package)


@pytest.mark.usefixtures("flash")
@pytest.mark.parametrize("window", [None, 3, 20])
@pytest.mark.parametrize("padded", [None, "left", "right"])
@pytest.mark.parametrize("num_queries", [1, 4, 9])
def test_flash_attention_agrees_with_sdpa(padded: str | None, num_queries: int, window: int | None) -> None:
    query, key, value = qkv(num_queries, 9, dtype=torch.bfloat16)
    attention_mask = None
    if padded is not None:
        attention_mask = torch.ones(2, 9)
        attention_mask[1, slice(0, 3) if padded == "left" else slice(7, None)] = 0
    past = DynamicCache()
    if num_queries < 9:
        past.update(key[:, :, num_queries:], value[:, :, num_queries:], 0)
    positions = torch.arange(9 - num_queries, 9)
    windowed = partial(causal_mask, sliding_window=window)
    cases = [
        (windowed, (attention_mask, past if num_queries < 9 else None, positions, 2, query.dtype)),
        (padding_mask, (attention_mask, query.dtype)),
    ]
    for make, arguments in cases:
        mask = make(*arguments, deferred=True)
        assert mask.bias is None
        actual, probs = flash_attention(query, key, value, mask, scale=0.3)
        expected, _ = sdpa_attention(query, key, value, make(*arguments), scale=0.3)
        kept = slice(None) if attention_mask is None else attention_mask[:, 9 - num_queries :].bool()
        torch.testing.assert_close(actual[kept], expected[kept], atol=0.02, rtol=0.02)
        assert probs is None


@pytest.mark.usefixtures("flash")
def test_what_flash_attention_cannot_do() -> None:
    query, key, value = qkv(4, 4, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="float16 and bfloat16 only, got torch\\.float32"):
        flash_attention(query.float(), key.float(), value.float(), AttentionMask(), scale=1.0)
    cache = StaticCache(tiny_config(), 2, 8)
    masks = [
        padding_mask(torch.ones(2, 1, 4, 4, dtype=torch.bool), query.dtype, deferred=True),
        causal_mask(None, cache, torch.arange(4), 2, query.dtype, deferred=True),
    ]
    for mask in masks:
        with pytest.raises(ValueError, match="a four-dimensional mask, a position bias or a cache of fixed size"):
            flash_attention(query, key, value, mask, scale=1.0)


def test_flash_attention_is_a_package() -> None:
    query, key, value = qkv(4, 4, dtype=torch.bfloat16)
    with pytest.raises(ImportError, match="pip install flash-attn --no-build-isolation"):
        flash_attention(query, key, value, AttentionMask(), scale=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_queries", [1, 8, 9])
@pytest.mark.parametrize("num_keys", [3, 200])
@pytest.mark.parametrize("contiguous", [True, False])
def test_every_way_through_sdpa_is_accurate(
    dtype: torch.dtype, num_queries: int, num_keys: int, contiguous: bool
) -> None:
    """Few queries in half precision take other paths, by the number of keys and how they lie."""
    torch.manual_seed(3)
    query = torch.randn(2, 4, num_queries, 8).to(dtype)
    key, value = (torch.randn(2, num_keys, 4, 8).to(dtype).transpose(1, 2) for _ in range(2))
    if contiguous:
        key, value = key.contiguous(), value.contiguous()
    mask = padding_mask(torch.arange(num_keys).expand(2, -1) != 1, dtype)
    out, _ = ATTENTION_FUNCTIONS["sdpa"](query, key, value, mask, scale=0.4)
    inputs = [x.double() for x in (query, key, value)]
    assert mask.bias is not None
    truth, plain = (
        torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask.bias.to(q.dtype), scale=0.4)
        for q, k, v in (inputs, (query, key, value))
    )
    assert out.dtype == dtype
    assert_accurate(out, *(x.transpose(1, 2).reshape(2, num_queries, 32) for x in (truth, plain)))
