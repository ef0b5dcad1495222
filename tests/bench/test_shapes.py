from __future__ import annotations

import pytest
import torch

from moekernels.bench.shapes import NLLB_MOE, OLMOE, REAL_LAYERS, ROUTINGS, layer_inputs, router_logits, with_tokens
from moekernels.ops import reference
from tests.bench.conftest import KINDS
from tests.generators import LayerShape


def test_sizes_are_those_of_the_models() -> None:
    assert {shape.name for shape in REAL_LAYERS} == {"olmoe-1b-7b", "phi-3.5-moe", "nllb-moe-54b", "switch-base-8"}
    assert OLMOE.expert_size == 3 * 2048 * 1024 and OLMOE.up_features == 2048
    assert NLLB_MOE.expert_size == 2 * 2048 * 8192 and NLLB_MOE.up_features == 8192


@pytest.mark.parametrize("shape", KINDS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_routers_choose_what_inputs_say(shape: LayerShape, dtype: torch.dtype, routing: str) -> None:
    x = layer_inputs(shape, 50, dtype, routing=routing)
    _, ids = reference.route(router_logits(x, shape), shape.top_k, scoring=shape.scoring)
    assert torch.equal(ids.sort(-1).values, x.expert_ids.sort(-1).values)
    assert router_logits(x, shape, torch.float32).dtype == torch.float32


def test_other_tokens_meet_the_same_weights() -> None:
    x = layer_inputs(KINDS[0], 0, torch.bfloat16)
    y = with_tokens(x, KINDS[0], 7, "one-expert")
    assert y.up_weight is x.up_weight and y.down_weight is x.down_weight
    assert (x.hidden.shape[0], y.hidden.shape[0]) == (0, 7) and y.expert_ids.tolist() == [[5, 4, 3]] * 7


@pytest.mark.parametrize("shape", KINDS, ids=str)
def test_activations_stay_of_order_one(shape: LayerShape) -> None:
    x = layer_inputs(shape, 64)
    for weight in (x.up_weight, x.down_weight):
        assert 0.7 < weight.std().item() * weight.shape[2] ** 0.5 < 1.3
    assert not torch.equal(x.up_weight[0], x.up_weight[1])
