from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from moekernels.nn import Cache, DynamicCache, EncoderDecoderCache, StaticCache


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


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_reorder_from_a_position_on(kind: str) -> None:
    cache, first = make(kind), tokens(6)
    for layer in range(2):
        cache.update(first, first + 1, layer)
    cache.reorder(torch.tensor([0, 0, 1]), start=4)
    for layer in range(2):
        for stored, before in zip(cache[layer], (first, first + 1), strict=True):
            assert torch.equal(stored[:, :, :4], before[:, :, :4])
            assert torch.equal(stored[:, :, 4:6], before[[0, 0, 1], :, 4:])


def test_rows_that_stay_are_not_copied() -> None:
    cache, first = DynamicCache(), tokens(6)
    cache.update(first, first, 0)
    cache.reorder(torch.arange(3))
    cache.reorder(torch.tensor([2, 2, 2]), start=6)
    assert cache[0][0].data_ptr() == first.data_ptr()
    kept = first.clone()
    cache.reorder(torch.tensor([0, 0, 2]))
    assert torch.equal(first, kept)  # what the model gave is not written to
    address = cache[0][0].data_ptr()
    cache[0][0][0] = float("nan")
    cache.reorder(torch.tensor([0, 1, 1]))
    keys = cache[0][0]
    assert keys.data_ptr() == address and keys[0].isnan().all()
    assert torch.equal(keys[1:], first[[0, 0]])


def test_gradients_flow_through_a_reordered_cache() -> None:
    cache, first = DynamicCache(), tokens(2).requires_grad_()
    cache.update(first, first, 0)
    cache.reorder(torch.tensor([1, 1, 2]))
    cache[0][0].sum().backward()
    assert [row.unique().tolist() for row in first.grad] == [[0], [2], [1]]


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


# --- encoder and decoder ----------------------------------------------------------------------------------------------


def encoder_decoder(num_sources: int, rows_per_source: int = 1, layers: int = 2) -> EncoderDecoderCache:
    """With four source tokens and three target tokens; what is stored tells its row."""
    cache = EncoderDecoderCache()
    rows = num_sources * rows_per_source
    for layer in range(layers):
        source = torch.arange(num_sources).float().view(-1, 1, 1, 1).expand(-1, 2, 4, 8).clone()
        cache.store_cross(source, -source, layer)
        target = torch.arange(rows).float().view(-1, 1, 1, 1).expand(-1, 2, 3, 8).clone()
        cache.update(target, -target, layer)
    return cache


def rows_of(keys: Tensor) -> list[float]:
    return keys[:, 0, -1, 0].tolist()


def test_source_and_target_are_kept_apart() -> None:
    cache = EncoderDecoderCache()
    assert cache.cross(0) is None and cache.get_seq_length() == 0 and len(cache) == 0
    cache = encoder_decoder(3)
    assert cache.get_seq_length() == 3 and cache.key_length(2) == 5 and len(cache) == 2
    assert cache.next_positions(2, torch.device("cpu")).tolist() == [3, 4]
    assert cache.cross(1)[0].shape == (3, 2, 4, 8) and cache[1][0].shape == (3, 2, 3, 8)
    cache.crop(1)
    assert cache.get_seq_length() == 1 and cache.cross(1)[0].shape[2] == 4
    static = EncoderDecoderCache(StaticCache(tiny_config(), 3, 10))
    assert static.fixed_size and static.key_length(1) == 10 and not cache.fixed_size


def test_the_source_is_stored_without_a_copy() -> None:
    cache, key, value = EncoderDecoderCache(), tokens(5), tokens(5)
    cache.store_cross(key, value, 0)
    assert cache.cross(0)[0].data_ptr() == key.data_ptr() and cache.cross(0)[1].data_ptr() == value.data_ptr()


def test_reordering_takes_the_source_along() -> None:
    cache = encoder_decoder(4)
    cache.reorder(torch.tensor([1, 1, 3, 3]))
    for layer in range(2):
        for keys, values in (cache[layer], cache.cross(layer)):
            assert rows_of(keys) == [1, 1, 3, 3] and rows_of(values) == [-1, -1, -3, -3]


def test_sources_that_stay_are_not_copied() -> None:
    cache = encoder_decoder(2, rows_per_source=3)
    places = [cache.cross(layer)[0].data_ptr() for layer in range(2)]
    # Beams of one source change places among themselves.
    cache.reorder(torch.tensor([2, 0, 0, 5, 4, 3]))
    assert rows_of(cache[1][0]) == [2, 0, 0, 5, 4, 3]
    assert [cache.cross(layer)[0].data_ptr() for layer in range(2)] == places
    # A whole source takes the place of another.
    cache.reorder(torch.tensor([3, 4, 5, 3, 3, 3]))
    assert rows_of(cache[1][0]) == [5, 4, 3, 5, 5, 5] and rows_of(cache.cross(1)[0]) == [1, 1]
    with pytest.raises(ValueError, match=r"every 3 rows share one source, which .* would tear apart"):
        cache.reorder(torch.tensor([0, 1, 3, 3, 4, 5]))


def test_a_source_may_leave_the_batch() -> None:
    cache = encoder_decoder(3, rows_per_source=2)
    cache.reorder(torch.tensor([0, 1, 4, 5]))
    assert rows_of(cache[0][0]) == [0, 1, 4, 5] and rows_of(cache.cross(0)[0]) == [0, 2]


def test_every_row_becomes_several() -> None:
    cache = encoder_decoder(2)
    cache.reorder(torch.tensor([0, 0, 1, 1]))
    assert rows_of(cache[0][0]) == rows_of(cache.cross(0)[0]) == [0, 0, 1, 1]


def test_caches_do_not_nest() -> None:
    with pytest.raises(ValueError, match="self_cache must be a cache or None, got EncoderDecoderCache"):
        EncoderDecoderCache(EncoderDecoderCache())
    with pytest.raises(ValueError, match="cross_cache must be a cache or None, got list"):
        EncoderDecoderCache(None, [])


def test_static_caches_of_decoders() -> None:
    cache = StaticCache(tiny_config(decoder_layers=3, decoder_attention_heads=8, num_key_value_heads=None), 1, 5)
    assert len(cache) == 3 and cache[0][0].shape == (1, 8, 5, 4)
    cache = StaticCache(tiny_config(num_decoder_layers=4, d_kv=6, num_key_value_heads=None), 1, 5)
    assert len(cache) == 4 and cache[0][0].shape == (1, 4, 5, 6)
