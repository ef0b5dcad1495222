"""LoRA on the experts of models of this package, by PEFT alone and without a weight being built."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekernels.integrations.transformers import replace_moe_layers, restore_moe_layers
from tests.integrations.test_lora import TARGETS, adapted, close, no_weight_is_built, results
from tests.integrations.test_trainer import own
from tests.integrations.transformers_models import VOCABULARY

peft = pytest.importorskip("peft")

__all__ = ["no_weight_is_built"]  # a fixture


def inputs() -> dict[str, Tensor]:
    return {"input_ids": torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(2))}


@pytest.fixture
def model() -> Any:
    model = own().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter.data, std=0.3)
    return model


@pytest.mark.parametrize("ranks", [(3,), (2, 5)], ids=["one-adapter", "two-adapters"])
def test_outputs_and_gradients(ranks: tuple[int, ...], model: Any, no_weight_is_built: Callable[[], None]) -> None:
    ours = adapted(model, ranks)
    expected, names = results(ours, inputs()), sorted(ours.state_dict())
    replaced = replace_moe_layers(ours)
    assert replaced.classes == {"ParamWrapper": 4}
    no_weight_is_built()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(results(ours, inputs()), expected)
    assert sorted(ours.state_dict()) == names
    assert restore_moe_layers(ours) == 4


def test_disabled_merged_and_taken_off(model: Any) -> None:
    ours = adapted(model, (2, 5))
    stock = copy.deepcopy(ours)
    replace_moe_layers(ours)
    with torch.no_grad():
        for both in (ours, stock):
            both.base_model.set_adapter("adapter_1")
        close([ours(**inputs()).logits], [stock(**inputs()).logits])
        with ours.disable_adapter(), stock.disable_adapter():
            close([ours(**inputs()).logits], [stock(**inputs()).logits])
        ours.merge_adapter()
        stock.merge_adapter()
        close([ours(**inputs()).logits], [stock(**inputs()).logits])
        ours.unmerge_adapter()
        restore_moe_layers(ours)
        stock.unmerge_adapter()
        close([ours.merge_and_unload()(**inputs()).logits], [stock.merge_and_unload()(**inputs()).logits])


def test_warning_of_adapted_routers(model: Any) -> None:
    """PEFT's "all-linear" leaves routers of models of this package alone; one that is named is adapted."""
    stacks = TARGETS["target_parameters"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        plain = peft.get_peft_model(copy.deepcopy(model), peft.LoraConfig(r=2, target_modules="all-linear"))
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=[*stacks, "router.weight"])
        adapted_router = peft.get_peft_model(model, config)
    adapted = [name for name, _ in plain.named_parameters() if "lora_" in name]
    assert adapted and not any(".router." in name for name in adapted)
    with pytest.warns(UserWarning, match=r"layers\.0\.mlp\.router and 1 more of .* carry adapters of PEFT"):
        replace_moe_layers(adapted_router)


def test_dropout_is_refused_as_peft_does(model: Any) -> None:
    with pytest.raises(ValueError, match="lora_dropout"):
        peft.get_peft_model(model, peft.LoraConfig(r=2, lora_dropout=0.1, **TARGETS))
