"""What may be passed by: the answer of the compiled code, that of its definition in Python, and what is said of it."""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize, prune
from torch.utils._python_dispatch import TorchDispatchMode

from moekernels import _C
from moekernels.integrations.transformers import plain, replace_moe_layers, restore_moe_layers
from moekernels.integrations.transformers.swaps import LinearExperts
from tests.integrations.transformers_models import MAJOR, make_inputs, make_model

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:NLLB-MoE in transformers")


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(4, 6)
        self.fc2 = nn.Linear(6, 4)
        self.act = nn.GELU()
        self.dropout = nn.Dropout(0.1)


LAYOUT = plain.layout_of(Expert, ("fc1",), "fc2", ("act", "dropout"))


def own_forward(expert: Any) -> None:
    expert.fc1.forward = lambda rows: rows


def bound_forward(expert: Any) -> None:
    expert.fc1.forward = expert.fc1.forward


def adapter(expert: Any) -> None:
    expert.fc2 = nn.Sequential(expert.fc2)


def like_fsdp1(expert: Any) -> None:
    weight = expert.fc1.weight.detach()
    del expert.fc1._parameters["weight"]
    object.__setattr__(expert.fc1, "weight", weight)


def subclass_weight(expert: Any) -> None:
    expert.fc1._parameters["weight"] = nn.Parameter(torch.randn(6, 4).as_subclass(type("Own", (torch.Tensor,), {})))


def without_bias(expert: Any) -> None:
    expert.fc1.bias = None


def missing(expert: Any) -> None:
    del expert.act


# What is done to the third of four experts, and the reason that it gives; None if it may still be passed by.
TREATMENTS: dict[Callable[[Any], Any], str | None] = {
    (lambda expert: None): None,
    bound_forward: None,
    like_fsdp1: None,
    (lambda expert: expert.requires_grad_(False)): None,
    (lambda expert: expert.register_forward_hook(lambda *_: None).remove()): None,
    (lambda expert: expert.register_forward_hook(lambda *_: None)): "e.2 has hooks",
    (lambda expert: expert.fc1.register_forward_pre_hook(lambda *_: None)): "e.2.fc1 has hooks",
    (lambda expert: expert.fc2.register_full_backward_hook(lambda *_: None)): "e.2.fc2 has hooks",
    (lambda expert: expert.act.register_full_backward_pre_hook(lambda *_: None)): "e.2.act has hooks",
    (lambda expert: expert.dropout.register_forward_hook(lambda *_: None)): "e.2.dropout has hooks",
    own_forward: "e.2.fc1 has a forward of its own",
    adapter: "e.2.fc2 is a Sequential",
    missing: "e.2 has no module act",
    (lambda expert: setattr(expert, "act", nn.ReLU())): "e.2.act is a ReLU",
    (lambda expert: setattr(expert, "act", nn.GELU("tanh"))): "e.2.act differs",
    (lambda expert: setattr(expert.dropout, "p", 0.5)): "e.2.dropout differs",
    (lambda expert: expert.dropout.eval()): "e.2.dropout differs",
    (lambda expert: prune.l1_unstructured(expert.fc1, "weight", 0.5)): "e.2.fc1 has hooks",
    (lambda expert: nn.utils.parametrizations.weight_norm(expert.fc1)): "e.2.fc1 is a ParametrizedLinear",
    (lambda expert: parametrize.register_parametrization(expert.fc2, "bias", nn.Identity())): "e.2.fc2 is a Parametr",
    subclass_weight: "e.2.fc1.weight is a Own",
    without_bias: "e.2.fc1 differs",
    (lambda expert: setattr(expert, "fc1", nn.Linear(4, 7))): "e.2.fc1 differs",
    (lambda expert: expert.fc2.to(torch.bfloat16)): "e.2.fc2 differs",
    (lambda expert: expert.fc2.to("meta")): r"e.2.fc2.weight has no data",
}


def make_experts() -> dict[str, nn.Module]:
    return {str(number): Expert() for number in range(4)}


@pytest.mark.parametrize("number", range(len(TREATMENTS)))
def test_compiled_code_and_definition_agree(number: int) -> None:
    treat, reason = list(TREATMENTS.items())[number]
    experts = make_experts()
    treat(experts["2"])
    fast, slow = _C.plain_experts(list(experts.values()), *LAYOUT), plain.examine(experts, LAYOUT, "e.")
    if reason is not None:
        assert fast is None
        assert isinstance(slow, str) and slow.startswith(reason), slow
        return
    assert fast is not None and not isinstance(slow, str)
    linears: list[Any] = [expert.fc1 for expert in experts.values()], [expert.fc2 for expert in experts.values()]
    for found in (fast, slow):
        for tensors, owners, name in zip(found, linears * 2, ("weight", "weight", "bias", "bias"), strict=True):
            assert all(tensor is getattr(owner, name) for tensor, owner in zip(tensors, owners, strict=True))


def test_dtypes_without_a_kernel_and_no_experts() -> None:
    experts = {name: expert.double() for name, expert in make_experts().items()}
    assert _C.plain_experts(list(experts.values()), *LAYOUT) is None
    assert "float64; the kernels take" in str(plain.examine(experts, LAYOUT))
    assert _C.plain_experts([], *LAYOUT) is None
    assert plain.examine({}, LAYOUT) == "it has no experts"


def test_parts_of_an_expert_follow_one_another() -> None:
    layout = plain.layout_of(Expert, ("fc1", "fc3"), "fc2", ())
    experts: dict[str, Any] = make_experts()
    for expert in experts.values():
        expert.fc3 = nn.Linear(4, 6)
    wanted = [part.weight for expert in experts.values() for part in (expert.fc1, expert.fc3)]
    found = _C.plain_experts(list(experts.values()), *layout)
    slow = plain.examine(experts, layout)
    assert found is not None and not isinstance(slow, str)
    for up in (found[0], slow.up):
        assert all(a is b for a, b in zip(up, wanted, strict=True))


# --- what is said -----------------------------------------------------------------------------------------------------


def expert_layer(model: nn.Module) -> Any:
    return [module for module in model.modules() if isinstance(module, LinearExperts)][-1]


def test_which_module_and_why_is_said_once() -> None:
    model, inputs = make_model("switch"), make_inputs("switch")
    replace_moe_layers(model)
    layer = expert_layer(model)
    plain._said.clear()
    experts: Any = layer.experts_of(layer)
    experts["expert_1"].wo.register_forward_hook(lambda *_: None)
    with pytest.warns(
        UserWarning, match=r"SwitchTransformers.* not by moekernels, as long as .*expert_1\.wo has hooks"
    ):
        model(**inputs)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model(**inputs)


def test_strict_or_not() -> None:
    model, inputs = make_model("switch"), make_inputs("switch")
    experts = next(m for n, m in model.named_modules() if n.endswith("experts"))
    linear: Any = experts.expert_0.wi
    prune.l1_unstructured(linear, "weight", 0.5)
    expected = model(**inputs).logits
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match=r"encoder.block.1.*expert_0.wi.weight is no parameter.*see strict=False"):
        replace_moe_layers(model)
    assert [type(module) for module in model.modules()] == classes
    replaced = replace_moe_layers(model, strict=False)
    assert len(replaced.by_modules) == 1 and len(replaced.names) == 4
    assert "as transformers does for now: encoder.block.1" in str(replaced)
    torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=2e-5)
    prune.remove(linear, "weight")
    assert not isinstance(plain.plain_experts(layer_of(model, linear), expert_layer(model).layout), str)


def layer_of(model: nn.Module, linear: nn.Module) -> Any:
    layer: Any = next(m for m in model.modules() if isinstance(m, LinearExperts) and linear in set(m.modules()))
    return layer.experts_of(layer)


def test_a_class_derived_since_is_not_restored() -> None:
    model = make_model("switch")
    replace_moe_layers(model)
    layer = expert_layer(model)
    layer.weight = nn.Parameter(torch.zeros(1))
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    classes = [type(module) for module in model.modules()]
    with pytest.raises(ValueError, match="became a ParametrizedSwitch"):
        restore_moe_layers(model)
    assert [type(module) for module in model.modules()] == classes
    parametrize.remove_parametrizations(layer, "weight")
    assert restore_moe_layers(model) == 4


@pytest.mark.skipif(MAJOR < 5, reason="the original of transformers 4 is right")
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_nllb_called_by_modules_is_nllb(dropout: float) -> None:
    model, inputs = make_model("nllb", moe_token_dropout=dropout), make_inputs("nllb")
    replace_moe_layers(model)
    model(**inputs).loss.backward()
    expected = {name: p.grad for name, p in model.named_parameters()}
    logits = model(**inputs).logits
    model.zero_grad()
    for module in model.modules():
        if isinstance(module, LinearExperts):
            module.token_dropout.register_forward_hook(lambda *_: None)
    out = model(**inputs)
    out.loss.backward()
    torch.testing.assert_close(out.logits, logits, rtol=1e-4, atol=2e-5)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-4)


# --- memory -----------------------------------------------------------------------------------------------------------


def test_nothing_is_computed_or_moved_while_replacing() -> None:
    class Nothing(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(func)

    for name in ("olmoe", "switch"):
        model = make_model(name)
        places = [parameter.data_ptr() for parameter in model.parameters()]
        with Nothing():
            replace_moe_layers(model)
            restore_moe_layers(model)
        assert [parameter.data_ptr() for parameter in model.parameters()] == places


_PEAK = """
import warnings; warnings.simplefilter("ignore")
import torch, transformers
from moekernels.integrations.transformers import replace_moe_layers
def peak(): return int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1])
config = transformers.MixtralConfig(hidden_size=1024, intermediate_size=2048, num_hidden_layers=2,
    num_attention_heads=8, num_key_value_heads=8, vocab_size=64, num_local_experts=16)
model = transformers.MixtralForCausalLM(config).eval()
ids = torch.arange(3, 35)[None]
with torch.no_grad():
    model(ids)
    stock = peak()
    replace_moe_layers(model)
    model(ids)
print(stock, peak())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_peak_memory_is_the_stock_models() -> None:
    run = subprocess.run([sys.executable, "-c", _PEAK], capture_output=True, text=True, check=True)
    stock, replaced = map(int, run.stdout.split())
    assert replaced <= 1.01 * stock
