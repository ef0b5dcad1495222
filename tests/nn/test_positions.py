from __future__ import annotations

import pytest
import torch
from transformers.models.m2m_100.modeling_m2m_100 import M2M100SinusoidalPositionalEmbedding
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersAttention

from moekernels.nn.positions import SinusoidalPositions, positions_of_tokens, relative_position_buckets


@pytest.mark.parametrize(("width", "padding_idx"), [(16, 1), (27, 1), (8, 4)])
def test_the_table_is_that_of_transformers(width: int, padding_idx: int) -> None:
    positions = SinusoidalPositions(20, width, padding_idx)
    expected = M2M100SinusoidalPositionalEmbedding.get_embedding(50, width, padding_idx)
    for count in (10, 50, 20):
        rows = positions(torch.arange(count)[None], count, torch.float32)
        assert torch.equal(rows[0], expected[:count])
    assert (positions(torch.tensor([padding_idx]), padding_idx + 1, torch.float32) == 0).all()
    # Rounded once, from float32, and exact again afterwards.
    assert torch.equal(positions(torch.arange(50), 50, torch.bfloat16), expected.bfloat16())
    assert torch.equal(positions(torch.arange(50), 50, torch.float32), expected)


def test_a_model_built_without_memory_gets_its_table_later() -> None:
    with torch.device("meta"):
        positions = SinusoidalPositions(4, 8, 1)
    assert positions(torch.arange(4), 4, torch.float32).isfinite().all()
    assert not positions.state_dict()


def test_padding_is_not_counted() -> None:
    ids = torch.tensor([[1, 1, 7, 8, 9], [7, 8, 1, 9, 1]])
    assert positions_of_tokens(ids, 1).tolist() == [[1, 1, 2, 3, 4], [2, 3, 1, 4, 1]]
    past = torch.tensor([[3], [0]])
    assert positions_of_tokens(ids, 1, past).tolist() == [[1, 1, 5, 6, 7], [2, 3, 1, 4, 1]]


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize(("num_buckets", "max_distance"), [(32, 128), (8, 10), (4, 3), (33, 500)])
def test_relative_position_buckets(bidirectional: bool, num_buckets: int, max_distance: int) -> None:
    distance = torch.arange(-600, 600).view(3, -1)
    options = {"bidirectional": bidirectional, "num_buckets": num_buckets, "max_distance": max_distance}
    buckets = relative_position_buckets(distance, **options)
    expected = SwitchTransformersAttention._relative_position_bucket(distance, **options)
    assert torch.equal(buckets, expected)
    assert buckets.min() >= 0 and buckets.max() < num_buckets
