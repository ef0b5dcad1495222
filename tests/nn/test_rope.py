"""The rotation itself; that every kind of scaling agrees with transformers is tested with the models."""

from __future__ import annotations

import pytest
import torch

from moekernels.nn import RotaryEmbedding, apply_rotary
from moekernels.nn.rope import rope_type
from tests.tolerance import assert_accurate


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [2, 6, 128])
def test_pairs_turn_like_complex_numbers(head_dim: int, dtype: torch.dtype) -> None:
    half = head_dim // 2
    hidden = torch.randn(2, 5, 3, head_dim).to(dtype)
    positions = torch.tensor([[0, 1, 2, 3, 4], [7, 7, 100, 31, 2]])
    cos, sin = RotaryEmbedding(head_dim, theta=100.0)(positions, dtype)

    frequencies = 100.0 ** (-torch.arange(half, dtype=torch.float64) / half)
    turn = torch.polar(torch.ones(1, dtype=torch.float64), positions[..., None, None] * frequencies)
    pairs = torch.complex(hidden[..., :half].double(), hidden[..., half:].double()) * turn
    truth = torch.cat((pairs.real, pairs.imag), dim=-1)
    first, second = hidden.chunk(2, dim=-1)
    plain = hidden * cos + torch.cat((-second, first), dim=-1) * torch.cat((sin[..., half:], sin[..., half:]), dim=-1)
    assert_accurate(apply_rotary(hidden, cos, sin), truth, plain)


def test_only_the_distance_matters() -> None:
    rope = RotaryEmbedding(16)
    query, key = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)

    def score(i: int, j: int) -> torch.Tensor:
        turned = [apply_rotary(x, *rope(torch.tensor([[p]]), torch.float32)) for x, p in ((query, i), (key, j))]
        return (turned[0] * turned[1]).sum()

    torch.testing.assert_close(score(3, 1), score(53, 51), atol=1e-4, rtol=0)


def test_names_of_kinds() -> None:
    assert rope_type(None) == "default"
    assert rope_type({"type": "yarn"}) == rope_type({"rope_type": "yarn", "type": "linear"}) == "yarn"
    assert rope_type({"type": "su"}) == "longrope"


def test_length_decides_between_short_and_long() -> None:
    scaling = {"type": "longrope", "short_factor": [1.0, 2.0], "long_factor": [3.0, 4.0]}
    rope = RotaryEmbedding(4, scaling=scaling, original_max_position_embeddings=8)
    positions = torch.tensor([[2, 3]])
    short, long = (rope(positions, torch.float32, torch.tensor(length)) for length in (8, 9))
    assert torch.equal(rope(positions, torch.float32)[0], short[0])
    assert torch.equal(rope(torch.tensor([[2, 8]]), torch.float32)[0][:, 0], long[0][:, 0])
    assert not torch.equal(short[0], long[0])


def test_frequencies_survive_an_empty_allocation() -> None:
    rope = RotaryEmbedding(8)
    expected = rope.inv_freq.clone()
    assert torch.equal(rope.to("meta").to_empty(device="cpu").inv_freq, expected)
