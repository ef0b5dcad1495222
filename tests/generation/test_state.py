from __future__ import annotations

import pytest
import torch

from moekernels.generation import DecodeState
from moekernels.generation.state import position_ids_from_mask


class Cache:
    def __init__(self, length: int = 0) -> None:
        self.length = length

    def get_seq_length(self) -> int:
        return self.length

    def crop(self, length: int) -> None:
        self.length = length


def test_a_step_sees_only_what_is_new() -> None:
    state = DecodeState(torch.tensor([[5, 6, 7]]), make_cache=Cache, max_length=6)
    assert state.next_input_ids.tolist() == [[5, 6, 7]]
    assert state.position_ids.tolist() == [[0, 1, 2]] and state.cache_position.tolist() == [0, 1, 2]
    state.seen(state.cache)
    state.append(torch.tensor([9]))
    assert state.next_input_ids.tolist() == [[9]]
    assert state.position_ids.tolist() == [[3]] and state.cache_position.tolist() == [3]
    assert state.input_ids.tolist() == [[5, 6, 7, 9]]
    state.forget()
    assert state.next_input_ids.tolist() == [[5, 6, 7, 9]] and state.cache_position.tolist() == [0, 1, 2, 3]


def test_padding_and_holes_are_not_counted() -> None:
    mask = torch.tensor([[0, 0, 1, 1], [1, 0, 1, 1]])
    state = DecodeState(torch.zeros(2, 4, dtype=torch.long), mask, make_cache=Cache)
    assert state.position_ids.tolist() == [[1, 1, 0, 1], [0, 1, 1, 2]]
    for expected in ([[2], [3]], [[3], [4]]):  # the second one does not fit and makes the buffers grow
        state.seen(state.cache)
        state.append(torch.tensor([1, 1]))
        assert state.position_ids.tolist() == expected
    assert state.attention_mask.tolist() == [[0, 0, 1, 1, 1, 1], [1, 0, 1, 1, 1, 1]]
    assert torch.equal(position_ids_from_mask(mask), torch.tensor([[1, 1, 0, 1], [0, 1, 1, 2]]))


def test_without_a_cache_everything_is_new() -> None:
    state = DecodeState(torch.tensor([[5, 6]]))
    state.seen(None)
    state.append(torch.tensor([7]))
    assert state.next_input_ids.tolist() == [[5, 6, 7]] and state.cache is None
    state.forget()
    assert state.next_input_ids.tolist() == [[5, 6, 7]]


def test_embeddings_come_first() -> None:
    embeds = torch.randn(2, 3, 4)
    state = DecodeState(torch.zeros(2, 0, dtype=torch.long), inputs_embeds=embeds, make_cache=Cache, max_length=2)
    assert torch.equal(state.next_inputs_embeds, embeds) and state.input_ids.shape == (2, 0)
    state.seen(state.cache)
    state.append(torch.tensor([8, 9]))
    assert state.next_inputs_embeds is None and state.next_input_ids.tolist() == [[8], [9]]
    assert state.cache_position.tolist() == [3]
    with pytest.raises(ValueError, match="cannot be rebuilt"):
        state.forget()
    state.forget(lambda ids: ids[..., None].expand(-1, -1, 4).float())
    assert state.next_inputs_embeds.shape == (2, 4, 4) and state.cache_position.tolist() == [0, 1, 2, 3]
    assert torch.equal(state.next_inputs_embeds[:, :3], embeds)
    assert state.next_inputs_embeds[:, 3, 0].tolist() == [8, 9]
    state.seen(state.cache)
    state.append(torch.tensor([5, 6]))
    assert state.next_inputs_embeds is None and state.next_input_ids.tolist() == [[5], [6]]


def test_a_given_cache_is_gone_on_from() -> None:
    given = Cache(2)
    state = DecodeState(torch.tensor([[5, 6, 7]]), cache=given)
    assert state.next_input_ids.tolist() == [[7]] and state.cache_position.tolist() == [2]
    state.forget()
    assert state.cache is given and given.length == 0
    assert state.next_input_ids.tolist() == [[5, 6, 7]] and state.cache_position.tolist() == [0, 1, 2]


def test_steps_do_not_copy_what_is_there() -> None:
    state = DecodeState(torch.arange(5).view(1, 5), torch.tensor([[0, 1, 1, 1, 1]]), make_cache=Cache, max_length=900)
    address = state.input_ids.data_ptr()
    for _ in range(800):
        state.append(torch.tensor([1]))
    assert state.input_ids.data_ptr() == address and state.input_ids.shape == (1, 805)


def test_tokens_taken_back() -> None:
    state = DecodeState(torch.tensor([[5, 6]]), torch.tensor([[0, 1]]), make_cache=Cache)
    state.extend(torch.tensor([[7, 8, 9]]))  # they do not fit and make the buffers grow, twice
    assert state.next_input_ids.tolist() == [[5, 6, 7, 8, 9]] and state.position_ids.tolist() == [[1, 0, 1, 2, 3]]
    state.seen(state.cache)
    state.rewind(3)
    assert state.input_ids.tolist() == [[5, 6, 7]] and state.cached == 5
    state.crop()
    assert state.cached == state.cache.length == 2
    assert state.next_input_ids.tolist() == [[7]] and state.position_ids.tolist() == [[1]]


def test_following_other_tokens() -> None:
    state = DecodeState(torch.tensor([[5, 6, 7], [5, 6, 8]]), make_cache=Cache)
    state.seen(state.cache)
    state.cache.length = 3
    state.follow(torch.tensor([[5, 6, 7, 1], [5, 6, 8, 2]]))
    assert state.next_input_ids.tolist() == [[1], [2]] and state.cache.length == 3
    state.seen(state.cache)
    state.cache.length = 4
    state.follow(torch.tensor([[5, 6, 7, 1, 3], [5, 9, 8, 2, 4]]))  # the second row differs early on
    assert state.next_input_ids.tolist() == [[6, 7, 1, 3], [9, 8, 2, 4]] and state.cache.length == 1
    state.seen(state.cache)
    state.cache.length = 5
    for tokens in ([[5, 6, 7, 1, 3], [5, 9, 8, 2, 4]], [[5, 6, 7], [5, 9, 8]]):  # the same, and fewer of them
        state.follow(torch.tensor(tokens))
        assert state.input_ids.tolist() == tokens
        assert state.cached == state.cache.length == len(tokens[0]) - 1


def test_embeddings_of_tokens_taken_back() -> None:
    state = DecodeState(torch.zeros(1, 0, dtype=torch.long), inputs_embeds=torch.ones(1, 3, 2), make_cache=Cache)
    state.extend(torch.tensor([[8, 9]]))
    state.forget(lambda ids: ids[..., None].expand(-1, -1, 2).float())
    state.rewind(1)
    assert state.next_inputs_embeds.shape == (1, 4, 2) and state.next_inputs_embeds[0, 3, 0] == 8
