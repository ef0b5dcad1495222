from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

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
from moekernels.nn.attention import additive_mask
from tests.nn.test_cache import tiny_config
from tests.tolerance import assert_accurate


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


@pytest.mark.parametrize("name", ATTENTION_FUNCTIONS)
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


@pytest.mark.parametrize("name", ATTENTION_FUNCTIONS)
def test_triangle_without_a_bias(name: str) -> None:
    query, key, value = qkv(6, 6)
    out, _ = ATTENTION_FUNCTIONS[name](query, key, value, AttentionMask(is_causal=True), scale=0.3)
    truth = definition(query, key, value, torch.ones(6, 6, dtype=torch.bool).tril(), 0.3)
    torch.testing.assert_close(out, truth.float())


@pytest.mark.parametrize("name", ATTENTION_FUNCTIONS)
@pytest.mark.parametrize("num_queries", [1, 5])
def test_bias_per_head_and_no_scale(name: str, num_queries: int) -> None:
    query, key, value = qkv(num_queries, 7)
    bias = torch.randn(1, 4, num_queries, 7)
    out, _ = ATTENTION_FUNCTIONS[name](query, key, value, AttentionMask(bias), scale=1.0)
    truth = definition(query, key, value, torch.ones(7, dtype=torch.bool), 1.0, bias)
    torch.testing.assert_close(out, truth.float())


@pytest.mark.parametrize("name", ATTENTION_FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("num_queries", [1, 3])
def test_a_row_that_sees_nothing_is_finite(name: str, dtype: torch.dtype, num_queries: int) -> None:
    query, key, value = qkv(num_queries, 3, dtype=dtype)
    mask = AttentionMask(additive_mask(torch.zeros(2, 1, num_queries, 3, dtype=torch.bool), dtype))
    out, _ = ATTENTION_FUNCTIONS[name](query * 20, key, value, mask, scale=1.0)
    assert torch.isfinite(out).all()


@pytest.mark.parametrize("name", ATTENTION_FUNCTIONS)
def test_gradients(name: str) -> None:
    inputs = [x.double().requires_grad_() for x in qkv(4, 4)]
    mask = AttentionMask(is_causal=True)
    visible = torch.ones(4, 4, dtype=torch.bool).tril()
    weights = torch.randn(2, 4, 32, dtype=torch.float64)
    ours = torch.autograd.grad((ATTENTION_FUNCTIONS[name](*inputs, mask, scale=0.3)[0] * weights).sum(), inputs)
    truth = torch.autograd.grad((definition(*inputs, visible, 0.3) * weights).sum(), inputs)
    for mine, other in zip(ours, truth, strict=True):
        torch.testing.assert_close(mine, other)


def test_probabilities() -> None:
    query, key, value = qkv(3, 5)
    out, probs = eager_attention(query, key, value, AttentionMask(), scale=0.3)
    assert probs.shape == (2, 4, 3, 5)
    torch.testing.assert_close(probs.sum(-1), torch.ones(2, 4, 3))
    torch.testing.assert_close((probs @ value.repeat_interleave(2, 1)).transpose(1, 2).flatten(2), out)
    assert sdpa_attention(query, key, value, AttentionMask(), scale=0.3)[1] is None


def test_dropout_of_everything() -> None:
    query, key, value = qkv(3, 5)
    for attend in ATTENTION_FUNCTIONS.values():
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


def test_padding_mask_of_an_encoder() -> None:
    mask = padding_mask(torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.bfloat16)
    assert mask.bias is not None and mask.bias.dtype == torch.bfloat16
    assert (mask.bias == 0).tolist() == [[[[True, True, False]]], [[[True, True, True]]]]
    assert mask.bias.min() == torch.finfo(torch.bfloat16).min
