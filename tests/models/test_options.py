"""What all models make of the arguments of a forward pass."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moekernels.models import PretrainedConfig
from moekernels.models.options import (
    attention_implementation,
    exactly_one,
    kept_for_logits,
    new_positions,
    optional_outputs,
    resolve_cache,
)
from moekernels.nn import Cache, DynamicCache, EncoderDecoderCache
from tests.models import tiny


def test_what_a_call_leaves_open_the_configuration_decides() -> None:
    config = PretrainedConfig(output_attentions=True, output_hidden_states=False, output_router_logits=True)
    assert optional_outputs(config, None, None, None) == (True, False, True)
    assert optional_outputs(config, False, True, False) == (False, True, False)


def test_exactly_one() -> None:
    given = torch.ones(1)
    assert exactly_one(input_ids=given, inputs_embeds=None) is given
    assert exactly_one(input_ids=None, inputs_embeds=given) is given
    message = "exactly one of input_ids and inputs_embeds must be given, got "
    with pytest.raises(ValueError, match=f"^{message}both$"):
        exactly_one(input_ids=given, inputs_embeds=given, neither="none at all")
    with pytest.raises(ValueError, match=f"^{message}neither$"):
        exactly_one(input_ids=None, inputs_embeds=None)
    with pytest.raises(ValueError, match=f"^{message}none at all$"):
        exactly_one(input_ids=None, inputs_embeds=None, neither="none at all")


def test_probabilities_need_the_eager_implementation() -> None:
    config = PretrainedConfig(attn_implementation="sdpa")
    assert attention_implementation(config, False) == "sdpa"
    assert attention_implementation(config, True) == "eager"


def resolved(given: Any, use_cache: bool | None, configured: bool = True, checkpointed: bool = False) -> Any:
    config = PretrainedConfig(use_cache=configured)
    return resolve_cache(given, use_cache, config, kind=Cache, make=DynamicCache, checkpointed=checkpointed)


@pytest.mark.parametrize(
    ("use_cache", "configured", "is_made"),
    [(None, True, True), (None, False, False), (True, False, True), (False, True, False)],
)
def test_a_cache_is_made_if_it_is_wanted(use_cache: bool | None, configured: bool, is_made: bool) -> None:
    assert isinstance(resolved(None, use_cache, configured), DynamicCache) == is_made
    assert resolved(None, use_cache, configured, checkpointed=True) is None
    given = EncoderDecoderCache()
    assert resolved(given, use_cache, configured) is given


def test_a_cache_that_cannot_be_used() -> None:
    with pytest.raises(ValueError, match=r"^past_key_values must be a moekernels Cache or None, got list$"):
        resolved([], None)
    with pytest.raises(ValueError, match=r"^past_key_values cannot be combined with gradient checkpointing$"):
        resolved(DynamicCache(), False, checkpointed=True)


def test_positions_follow_the_cache() -> None:
    cache, device = DynamicCache(), torch.device("cpu")
    assert new_positions(None, 3, device).tolist() == new_positions(cache, 3, device).tolist() == [0, 1, 2]
    cache.update(torch.zeros(1, 1, 4, 2), torch.zeros(1, 1, 4, 2), 0)
    assert new_positions(cache, 2, device).tolist() == [4, 5]
    assert new_positions(None, 0, device).tolist() == []


@pytest.mark.parametrize(
    ("keep", "positions"),
    [(0, [0, 1, 2, 3]), (1, [3]), (3, [1, 2, 3]), (9, [0, 1, 2, 3]), (torch.tensor([2, 0]), [2, 0])],
)
def test_positions_of_logits(keep: int | Tensor, positions: list[int]) -> None:
    hidden = torch.arange(24).view(2, 4, 3)
    assert torch.equal(kept_for_logits(hidden, keep), torch.stack([hidden[:, i] for i in positions], dim=1))


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_a_keyword_that_there_is_not(name: str) -> None:
    inputs, message = (
        tiny.inputs(name),
        r"forward\(\) got an unexpected keyword argument 'attention_masks'; did you mean",
    )
    for made in (tiny.base_class(name), tiny.head_class(name)):
        model = made(tiny.CONFIGS[name]).eval()
        with pytest.raises(TypeError, match=rf"^{type(model).__name__}\.{message} 'attention_mask'\?$"):
            model(**inputs, attention_masks=torch.ones_like(inputs["input_ids"]))
        with torch.no_grad():
            expected = model(**inputs)[0]
            assert torch.equal(model(**inputs, token_type_ids=torch.zeros_like(inputs["input_ids"]))[0], expected)
