"""Experts of transformers outside its experts interface, against their own modules."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from moekernels.integrations.transformers import replace_moe_layers, restore_moe_layers
from moekernels.integrations.transformers.swaps import Swap
from tests.integrations.transformers_models import MAJOR

H, F, E = 16, 12, 4


def llama4(top_k: int) -> nn.Module:
    config = transformers.Llama4TextConfig(
        hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=top_k
    )
    return import_module("transformers.models.llama4.modeling_llama4").Llama4TextMoe(config)


def dbrx() -> nn.Module:
    sizes: dict[str, Any] = {"ffn_hidden_size": F, "moe_num_experts": E, "moe_top_k": 2}
    sizes |= {"hidden_size": H} if MAJOR >= 5 else {}
    config = transformers.DbrxConfig(d_model=H, ffn_config=sizes)
    return import_module("transformers.models.dbrx.modeling_dbrx").DbrxFFN(config)


def jetmoe() -> nn.Module:
    config = transformers.JetMoeConfig(
        hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2, activation_function="silu"
    )
    return import_module("transformers.models.jetmoe.modeling_jetmoe").JetMoeMoE(config)


def granite() -> nn.Module:
    config = transformers.GraniteMoeConfig(
        hidden_size=H, intermediate_size=F, num_local_experts=E, num_experts_per_tok=2
    )
    return import_module("transformers.models.granitemoe.modeling_granitemoe").GraniteMoeMoE(config)


def longcat() -> nn.Module:
    config = transformers.LongcatFlashConfig(
        hidden_size=H, expert_ffn_hidden_size=F, n_routed_experts=E, zero_expert_num=2, moe_topk=3,
        num_experts_per_tok=3, num_local_experts=E,
    )  # fmt: skip
    return import_module("transformers.models.longcat_flash.modeling_longcat_flash").LongcatFlashMoE(config)


def step(limit: float) -> nn.Module:
    modeling = import_module("transformers.models.step3p7.modeling_step3p7")
    config = modeling.Step3p7TextConfig(
        hidden_size=H, moe_intermediate_size=F, share_expert_dim=F, num_local_experts=E, num_experts_per_tok=2
    )
    config.swiglu_limits = [limit]
    config.swiglu_limits_shared = None
    return modeling.Step3p7SparseMoeBlock(config, 0)


NEW = pytest.mark.skipif(MAJOR < 5, reason="the model came with transformers 5")
CASES = {
    "llama4": lambda: llama4(1),
    "llama4-of-two": lambda: llama4(2),
    "dbrx": dbrx,
    "jetmoe": jetmoe,
    "granite": granite,
    "longcat": pytest.param(longcat, marks=NEW),
    "step": pytest.param(lambda: step(0.0), marks=NEW),
    "step-clamped": pytest.param(lambda: step(0.5), marks=NEW),
}


def made(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    layer = make()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.5)
    return layer


def run(layer: nn.Module) -> list[Tensor]:
    """Outputs, and the gradients of hidden states and parameters."""
    hidden = torch.randn(3, 5, H, generator=torch.Generator().manual_seed(1), requires_grad=True)
    output: Any = layer(hidden)
    outputs = [output] if isinstance(output, Tensor) else [x for x in output if isinstance(x, Tensor)]
    wanted = [hidden, *layer.parameters()]
    loss = torch.stack([x.float().square().sum() for x in outputs if x.requires_grad]).sum()
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    return [*(x.detach() for x in outputs), *(torch.zeros(()) if g is None else g for g in grads)]


@pytest.mark.parametrize("make", CASES.values(), ids=CASES.keys())
def test_outputs_and_gradients(make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch) -> None:
    layer = made(make)
    expected = run(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        replaced = replace_moe_layers(nn.Sequential(layer))
        assert replaced.names
        for module in layer.modules():
            if isinstance(module, Swap):
                monkeypatch.setattr(module.original, "forward", None)
        for ours, truth in zip(run(layer), expected, strict=True):
            torch.testing.assert_close(ours, truth, rtol=1e-4, atol=1e-5 + 1e-5 * float(truth.abs().max()))
    monkeypatch.undo()
    assert restore_moe_layers(layer) == len(replaced.names)
    for again, truth in zip(run(layer), expected, strict=True):
        assert torch.equal(again, truth)


@pytest.mark.parametrize(
    ("make", "weights", "message"),
    [
        (lambda: llama4(1), "experts.gate_up_proj", "Llama4TextMoe is computed by .* as long as experts has hooks"),
        (dbrx, "experts.mlp.w1", "DbrxExperts is computed by .* as long as mlp has hooks"),
        pytest.param(longcat, "experts.gate_up_proj", "LongcatFlashExperts .* identity_expert has hooks", marks=NEW),
    ],
    ids=["llama4", "dbrx", "longcat"],
)
def test_what_is_not_plain_takes_its_own_way(make: Callable[[], nn.Module], weights: str, message: str) -> None:
    layer = made(make)
    expected = run(layer)
    replace_moe_layers(nn.Sequential(layer))
    name, owner = weights.rpartition(".")[2], layer.get_submodule(weights.rpartition(".")[0])
    hooked = getattr(owner, "identity_expert", owner)
    handle = hooked.register_forward_hook(lambda *_: None)
    with pytest.warns(UserWarning, match=message):
        hooked_results = run(layer)
    for got, truth in zip(hooked_results, expected, strict=True):
        torch.testing.assert_close(got, truth)
    handle.remove()
    restore_moe_layers(layer)
    before = {name: parameter.clone() for name, parameter in layer.named_parameters()}
    setattr(owner, name, nn.Parameter(getattr(owner, name).double()))
    with pytest.raises(ValueError, match=f"{name} is torch.float64; the kernels take"):
        replace_moe_layers(nn.Sequential(layer))
    assert not any(isinstance(module, Swap) for module in layer.modules())
    assert all(torch.equal(before[name], p) for name, p in layer.named_parameters() if p.dtype == torch.float32)
