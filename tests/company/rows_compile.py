"""Rows: torch.compile and torch.export, and changes after them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from tests.company.matrix import Case, Results, row
from tests.company.rows import expert_weights

_BLOCKS = ("SparseMoeBlock", "SparseMLP")


def _block(model: nn.Module) -> nn.Module:
    """The first MoE block: whole models of transformers break the graph for reasons of their own."""
    return next(module for module in model.modules() if type(module).__name__.endswith(_BLOCKS))


def _hidden() -> Tensor:
    return torch.randn(1, 5, 32, generator=torch.Generator().manual_seed(6))


def _first(out: Any) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def _compiled(case: Case, model: nn.Module) -> Any:
    """A call of the block: compiled on our side, as it is on the other."""
    torch._dynamo.reset()
    block = _block(model)
    if case.ours:
        _require_compilable(block)
    return torch.compile(block, backend="aot_eager", fullgraph=True) if case.ours else block


def _require_compilable(block: nn.Module) -> None:
    """The drop-in calls transformers' own router of Switch, which casts its weight in each pass: not every torch can
    compile that."""
    router = getattr(block, "router", None)
    if not type(router).__name__.startswith("SwitchTransformers"):
        return
    try:
        torch.compile(router, backend="eager", fullgraph=True)(_hidden())
    except torch._dynamo.exc.Unsupported as error:
        pytest.skip(f"torch {torch.__version__} cannot compile {type(router).__name__}: {str(error)[:60]}")


def _results(model: nn.Module, call: Any) -> Results:
    model.zero_grad()
    out = _first(call(_hidden()))
    out.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    return {"out": out.detach(), **grads}


@row("torch.compile(fullgraph=True)", tags=("block",))
def compiled(case: Case) -> Results:
    model = case.model()
    return _results(model, _compiled(case, model))


@row("load_state_dict(assign=True) before and after torch.compile", tags=("block",))
def compiled_assign(case: Case) -> Results:
    model = case.model()
    state = {name: value * 1.5 for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=True)
    call = _compiled(case, model)
    first = _first(call(_hidden())).detach()
    model.load_state_dict({name: value * 0.5 for name, value in state.items()}, assign=True)
    return {"first": first, **_results(model, call)}


@row("weights that lie elsewhere after torch.compile", tags=("block",))
def compiled_moved(case: Case) -> Results:
    model = case.model()
    call = _compiled(case, model)
    call(_hidden())
    for module, name in list(expert_weights(model)):
        setattr(module, name, nn.Parameter(getattr(module, name).detach() * 1.25))
    return _results(model, call)


@row("torch.export, after load_state_dict(assign=True)", tags=("exports",))
def exported(case: Case) -> Results:
    model = case.model()
    model.load_state_dict({name: value * 1.5 for name, value in model.state_dict().items()}, assign=True)
    block = _block(model)
    if case.ours:
        block = torch.export.export(block, (_hidden(),), strict=False).module()
    with torch.no_grad():
        return {"out": _first(block(_hidden()))}


@row("modules exchanged after torch.compile", tags=("linears",))
def compiled_exchanged(case: Case) -> Results:
    model = case.model()
    call = _compiled(case, model)
    call(_hidden())
    torch.manual_seed(3)
    for parent in list(_block(model).modules()):
        for name, child in list(parent.named_children()):
            if name in ("down_proj", "w2", "wo", "fc2"):
                assert isinstance(child, nn.Linear)
                setattr(parent, name, nn.Linear(child.in_features, child.out_features, bias=child.bias is not None))
    return _results(model, call)


@row("hooks that are added after torch.compile", tags=("block",))
def compiled_then_hooked(case: Case) -> Results:
    model = case.model()
    block = _block(model)
    torch._dynamo.reset()
    if case.ours:
        _require_compilable(block)
    # The modules' own loop over experts breaks the graph.
    call = torch.compile(block, backend="eager") if case.ours else block
    call(_hidden())
    for name, module in block.named_modules():
        if name.endswith((".0", ".expert_0", ".act_fn", ".act", "experts")):
            module.register_forward_hook(lambda _m, _i, out: out * 0.5)
    return _results(model, call)
