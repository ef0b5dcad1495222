from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moekernels.nn import Cache, DynamicCache, StaticCache


def tiny_config(**overrides: int) -> SimpleNamespace:
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "hidden_size": 32}
    return SimpleNamespace(**{**sizes, **overrides})


def tokens(count: int) -> Tensor:
    return torch.randn(3, 2, count, 8)


def make(kind: str) -> Cache:
    return DynamicCache() if kind == "dynamic" else StaticCache(tiny_config(), 3, 300)


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_tokens_come_back_in_order(kind: str) -> None:
    cache, seen = make(kind), [[], []]
    for count in (7, 1, 1, 5, 1, 100, 1, 64, 1):
        for layer in range(2):
            key, value = tokens(count), tokens(count)
            seen[layer].append((key, value))
            keys, values = cache.update(key, value, layer)
            length = sum(k.shape[2] for k, _ in seen[layer])
            assert torch.equal(keys[:, :, :length], torch.cat([k for k, _ in seen[layer]], 2))
            assert torch.equal(values[:, :, :length], torch.cat([v for _, v in seen[layer]], 2))
            assert keys.shape[2] == (300 if kind == "static" else length)
        assert cache.get_seq_length() == length
        assert cache.next_positions(3, torch.device("cpu")).tolist() == [length, length + 1, length + 2]
    assert len(cache) == 2


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_crop(kind: str) -> None:
    cache, first = make(kind), tokens(6)
    for layer in range(2):
        cache.update(first, first, layer)
    cache.crop(-2)
    assert cache.get_seq_length() == 4
    cache.crop(9)
    assert cache.get_seq_length() == 4
    more = tokens(1)
    keys, _ = cache.update(more, more, 0)
    assert torch.equal(keys[:, :, :5], torch.cat([first[:, :, :4], more], 2))
    # The tensor that was handed in first belongs to someone else.
    assert not torch.equal(first[:, :, 4:5], more)
    cache.crop(0)
    assert cache.get_seq_length() == 0
    cache.crop(-3)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reorder(kind: str) -> None:
    cache, first = make(kind), tokens(6)
    for layer in range(2):
        cache.update(first, first + 1, layer)
    cache.reorder(torch.tensor([2, 2, 0]))
    for layer in range(2):
        keys, values = cache[layer]
        assert torch.equal(keys[:, :, :6], first[[2, 2, 0]])
        assert torch.equal(values[:, :, :6], first[[2, 2, 0]] + 1)


def test_a_dynamic_cache_may_change_its_batch() -> None:
    cache, first = DynamicCache(), tokens(2)
    cache.update(first, first, 0)
    cache.reorder(torch.tensor([0, 0, 1, 1, 2, 2]))
    assert torch.equal(cache[0][0], first.repeat_interleave(2, 0))


def test_appending_copies_little(monkeypatch: pytest.MonkeyPatch) -> None:
    """Buffers are made anew a logarithmic number of times."""
    cache, key = DynamicCache(), tokens(100)
    cache.update(key, key, 0)
    assert cache[0][0].data_ptr() == key.data_ptr()
    places = {cache.update(tokens(1), tokens(1), 0)[0].data_ptr() for _ in range(1000)}
    assert len(places) <= 7


def test_gradients_flow_through_a_dynamic_cache() -> None:
    cache = DynamicCache()
    pieces = [tokens(3).requires_grad_(), tokens(2).requires_grad_(), tokens(1).requires_grad_()]
    squares = [cache.update(piece, piece, 0)[0].square().sum() for piece in pieces]
    torch.stack(squares).sum().backward()
    for times, piece in zip((3, 2, 1), pieces, strict=True):
        torch.testing.assert_close(piece.grad, 2 * times * piece.detach())


def test_going_on_outside_of_inference_mode() -> None:
    cache = DynamicCache()
    with torch.inference_mode():
        for _ in range(3):
            cache.update(tokens(1), tokens(1), 0)
    assert cache.update(tokens(1), tokens(1), 0)[0].shape[2] == 4


def test_layers_come_in_order() -> None:
    with pytest.raises(ValueError, match="layers must come in order, got 1, expected 0"):
        DynamicCache().update(tokens(1), tokens(1), 1)


def test_static_positions_given_on_the_device() -> None:
    cache, key = StaticCache(tiny_config(), 3, 10), tokens(2)
    for layer in range(2):
        keys, _ = cache.update(key, key, layer, torch.tensor([4, 5]))
    assert torch.equal(keys[:, :, 4:6], key)
    assert (keys[:, :, :4] == 0).all() and (keys[:, :, 6:] == 0).all()
    assert cache.get_seq_length() == 6
    address = keys.data_ptr()
    cache.reset()
    assert cache.get_seq_length() == 0 and cache[1][0].data_ptr() == address


def test_static_shapes() -> None:
    assert StaticCache(tiny_config(head_dim=5), 3, 7, dtype=torch.bfloat16)[0][0].shape == (3, 2, 7, 5)
    assert StaticCache(tiny_config(num_key_value_heads=None), 3, 7)[0][0].shape == (3, 4, 7, 8)
    cache = StaticCache(tiny_config(), 2, 10)
    with pytest.raises(
        ValueError, match=r"holds torch.float32 keys of shape \[2, 2, 10, 8\], got torch.float32 \[3, 2, 1, 8\]"
    ):
        cache.update(tokens(1), tokens(1), 0)
    with pytest.raises(ValueError, match=r"got torch.float32 \[3, 2, 11, 8\]"):
        StaticCache(tiny_config(), 3, 10).update(tokens(11), tokens(11), 0)
    with pytest.raises(ValueError, match=r"got torch.float16"):
        StaticCache(tiny_config(), 3, 10).update(tokens(1).half(), tokens(1).half(), 0)
