"""Rows: LoRA by PEFT, before and after, merged and unmerged."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.company.matrix import Case, Results, row

_PROJECTIONS = ["gate_proj", "up_proj", "down_proj", "w1", "w2", "w3", "wi", "wo", "fc1", "fc2"]
_STACKS = ["experts.gate_up_proj", "experts.down_proj"]


def _adapted(model: nn.Module, **target: Any) -> Any:
    import peft

    torch.manual_seed(4)
    # Not zero at the start, so that an adapter that is passed by shows.
    return peft.get_peft_model(model, peft.LoraConfig(r=2, lora_alpha=4, init_lora_weights=False, **target))


def _before_and_after(case: Case, **target: Any) -> tuple[Any, Any]:
    after = _adapted(case.model(), **target)
    model = _adapted(case.make(), **target)
    return case.attach(model, strict=False), after


def _all_there_is(case: Case, **target: Any) -> Results:
    results: Results = {}
    for when, model in zip(("before", "after"), _before_and_after(case, **target), strict=True):
        results |= {f"{when} {name}": value for name, value in case.results(model).items()}
        model.merge_adapter()
        results[f"{when}, merged"] = case.logits(model)
        model.unmerge_adapter()
        results[f"{when}, unmerged"] = case.logits(model)
        with model.disable_adapter():
            results[f"{when}, disabled"] = case.logits(model)
        plain = model.merge_and_unload()
        results |= {f"{when}, unloaded {name}": value for name, value in case.results(plain.requires_grad_()).items()}
    return results


@row("PEFT: target_modules on experts' Linears", packages=("peft",), tags=("linears",))
def target_modules(case: Case) -> Results:
    return _all_there_is(case, target_modules=_PROJECTIONS)


@row("PEFT: target_parameters on stacks", packages=("peft",), tags=("stacks",))
def target_parameters(case: Case) -> Results:
    return _all_there_is(case, target_parameters=_STACKS)


@row('PEFT: target_modules="all-linear"', packages=("peft",))
def all_linear(case: Case) -> Results:
    return _all_there_is(case, target_modules="all-linear", task_type="CAUSAL_LM")


@row("PEFT: attention alone", packages=("peft",))
def attention(case: Case) -> Results:
    return _all_there_is(case, target_modules=["q_proj", "v_proj", "q", "v"])


@row("PEFT: steps of training", packages=("peft",))
def trained(case: Case) -> Results:
    stacks = "stacks" in case.column.tags
    target = {"target_parameters": _STACKS} if stacks else {"target_modules": _PROJECTIONS}
    _, model = _before_and_after(case, **target)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = model.train()(**case.column.inputs()).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses)}
