"""LoRA on stacks of experts, by PEFT alone and by PEFT with the drop-in."""

from __future__ import annotations

import copy
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moekernels.integrations.transformers import replace_moe_layers, restore_moe_layers
from moekernels.integrations.transformers.experts import ExpertWeights
from moekernels.integrations.transformers.fused import run_stacks, structure_of
from moekernels.integrations.transformers.lora import adapters_of
from tests.integrations.transformers_models import MAJOR, make_inputs, make_model

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.skipif(MAJOR < 5, reason="transformers 4 has no stacks of experts")

TARGETS = {"target_modules": [], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


class Layer(nn.Module):
    """A module of experts under the name that PEFT is told."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, *arguments: Tensor) -> Tensor:
        return self.experts(*arguments)


def adapted(model: nn.Module, ranks: tuple[int, ...] = (3,)) -> Any:
    """With adapters of these ranks, all of them active, none of them zero."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, rank in enumerate(ranks):
            config = peft.LoraConfig(r=rank, lora_alpha=2 * rank, init_lora_weights=False, **TARGETS)
            if i == 0:
                model = peft.get_peft_model(model, config)
            else:
                model.add_adapter(f"adapter_{i}", config)
        model.base_model.set_adapter(["default", *(f"adapter_{i}" for i in range(1, len(ranks)))])
    return model


def results(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits, and the gradients of all that is trained."""
    logits = model(**inputs).logits
    trained = [p for p in model.parameters() if p.requires_grad]
    return [logits.detach(), *torch.autograd.grad(logits.square().mean(), trained)]


def close(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5 + 1e-4 * b.abs().max().item())


@pytest.fixture
def no_weight_is_built(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    def forbid() -> None:
        def build(*_: Any) -> None:
            raise AssertionError("a weight was built")

        wrapper = peft.tuners.lora.layer.ParamWrapper
        for name in ("_activate_lora", "get_delta_weight", "get_delta_factors"):
            monkeypatch.setattr(wrapper, name, build)

    return forbid


@pytest.mark.parametrize("replaced_first", [False, True], ids=["adapted-first", "replaced-first"])
@pytest.mark.parametrize("ranks", [(3,), (2, 5)], ids=["one-adapter", "two-adapters"])
def test_outputs_and_gradients(
    ranks: tuple[int, ...], replaced_first: bool, no_weight_is_built: Callable[[], None]
) -> None:
    stock, inputs = adapted(make_model("olmoe"), ranks), make_inputs("olmoe")
    expected = results(stock, inputs)
    ours = make_model("olmoe")
    if replaced_first:
        replace_moe_layers(ours)
    ours = adapted(ours, ranks)
    ours.load_state_dict(stock.state_dict())
    replaced = replace_moe_layers(ours)
    assert replaced.classes["ParamWrapper"] == 4
    no_weight_is_built()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(results(ours, inputs), expected)
    assert sorted(ours.state_dict()) == sorted(stock.state_dict())


def test_disabled_merged_and_taken_off() -> None:
    model, inputs = adapted(make_model("olmoe"), (2, 5)), make_inputs("olmoe")
    stock = copy.deepcopy(model)
    replace_moe_layers(model)
    with torch.no_grad():
        for both in (model, stock):
            both.base_model.set_adapter("adapter_1")
        close([model(**inputs).logits], [stock(**inputs).logits])
        with model.disable_adapter(), stock.disable_adapter():
            close([model(**inputs).logits], [stock(**inputs).logits])
        model.merge_adapter()
        stock.merge_adapter()
        close([model(**inputs).logits], [stock(**inputs).logits])
        model.unmerge_adapter()
        stock.unmerge_adapter()
        close([model(**inputs).logits], [stock(**inputs).logits])
        restored = restore_moe_layers(copy.deepcopy(model))
        assert restored > 0
        close([model.merge_and_unload()(**inputs).logits], [stock.merge_and_unload()(**inputs).logits])


@pytest.mark.parametrize("name", ["OlmoeExperts", "GptOssExperts", "AriaExperts", "DeepseekV4Experts"])
def test_gradients_in_float64(name: str) -> None:
    from tests.integrations.every_experts import experts_classes, inputs, make_experts

    experts_class = next(cls for cls in experts_classes() if cls.__name__ == name)
    layer = adapted(Layer(make_experts(experts_class)).double(), (2, 3))
    wrapper = layer.base_model.model.experts
    hidden, ids, weights = inputs()
    hidden, weights = hidden.double().requires_grad_(), weights.double()  # which fit into float32
    wanted = [hidden, *(p for p in layer.parameters() if p.requires_grad)]
    assert len(wanted) == 1 + 2 * 2 * 2

    def gradients(out: Tensor) -> list[Tensor]:
        return [out.detach(), *torch.autograd.grad(out.square().sum(), wanted)]

    expected = gradients(layer(hidden, ids, weights))
    experts = wrapper.get_base_layer()
    structure = structure_of(experts)
    found = adapters_of(wrapper, structure.transposed)
    assert not isinstance(found, str) and found[0] is experts
    stacks = ExpertWeights(*(getattr(experts, name) for name in structure.tensors))
    got = gradients(run_stacks(experts, structure, hidden, ids, weights, stacks, found[1]))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9 * b.abs().max().item())


@pytest.mark.parametrize(
    ("targets", "router"),
    [
        ({"target_modules": "all-linear"}, r"base_model\.model\.model\.layers\.0\.mlp\.gate and 1 more"),
        ({"target_modules": [], "target_parameters": ["gate.weight"]}, r"\.mlp\.gate and 1 more"),
        ({"target_modules": ["q_proj"], "target_parameters": TARGETS["target_parameters"]}, None),
    ],
    ids=["all-linear", "by-name", "without"],
)
def test_warning_of_adapted_routers(targets: dict[str, Any], router: str | None) -> None:
    model = make_model("olmoe")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's own
        model = peft.get_peft_model(model, peft.LoraConfig(r=2, **targets))
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        replace_moe_layers(model)
    messages = [str(warning.message) for warning in said]
    assert len(messages) == (router is not None)
    if router is not None:
        assert re.search(f"{router} .*carry adapters of PEFT.* target_parameters", messages[0])


def test_hooks_take_the_way_of_peft() -> None:
    model, inputs = adapted(make_model("olmoe")), make_inputs("olmoe")
    expected = model(**inputs).logits
    replace_moe_layers(model)
    wrapper = model.base_model.model.model.layers[0].mlp.experts
    calls = []
    handle = wrapper.lora_A["default"].register_forward_hook(lambda *_: calls.append(1))
    with pytest.warns(UserWarning, match="ParamWrapper is computed by .* the adapter of .* lora_A has hooks"):
        close([model(**inputs).logits], [expected])
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close([model(**inputs).logits], [expected])


def test_factors_that_are_of_no_rank() -> None:
    """PEFT itself says what is wrong with them, after a warning that names them."""
    model, inputs = adapted(make_model("olmoe")), make_inputs("olmoe")
    replace_moe_layers(model)
    down = model.base_model.model.model.layers[0].mlp.experts.lora_A["default"]
    down.weight = nn.Parameter(down.weight.detach()[:-1])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with (
        pytest.warns(
            UserWarning, match=r"ParamWrapper is computed by .* has no rank: \d+ rows of lora_A and \d+ columns"
        ),
        pytest.raises(RuntimeError),
    ):
        model(**inputs)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_experts_of_a_registered_name(no_weight_is_built: Callable[[], None]) -> None:
    from moekernels.integrations.transformers import register

    register()
    stock, inputs = adapted(make_model("olmoe")), make_inputs("olmoe")
    expected = results(stock, inputs)
    ours = make_model("olmoe")
    ours.set_experts_implementation("moekernels")
    ours = adapted(ours)
    ours.load_state_dict(stock.state_dict())
    close(results(ours, inputs), expected)  # by weights that PEFT builds
    replace_moe_layers(ours)
    no_weight_is_built()
    close(results(ours, inputs), expected)
