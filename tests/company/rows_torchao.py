"""Rows: torchao's quantisation of every Linear, after `replace_moe_layers` and before."""

from __future__ import annotations

import torch
from torch import nn

from tests.company.matrix import Case, Results, row


def _quantize(model: nn.Module) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantize_(model, Int8WeightOnlyConfig(version=2))


def _results(case: Case, model: nn.Module) -> Results:
    """Of one row of tokens and of many, which kernels of few rows must not tell apart."""
    inputs = case.column.inputs()
    few = {name: value[:1, :1] for name, value in inputs.items()}
    many = {name: value.repeat(1, 20) for name, value in inputs.items()}
    found: Results = {"logits": case.logits(model)}
    with torch.no_grad():
        found["few"], found["many"] = model(**few).logits, model(**many).logits
    kinds = sorted({type(m.weight).__name__ for m in model.modules() if isinstance(m, nn.Linear)})
    assert kinds != ["Parameter"], "nothing was quantised"
    return found | {"kinds": kinds}


@row("torchao: quantize_ to int8 weights, after", packages=("torchao",))
def after(case: Case) -> Results:
    model = case.model()
    case.logits(model)
    _quantize(model)
    return _results(case, model)


@row("torchao: quantize_ to int8 weights, before", packages=("torchao",))
def before(case: Case) -> Results:
    model = case.make()
    _quantize(model)
    options = {"strict": False} if "drop-in" in case.column.tags else {}
    return _results(case, case.attach(model, **options))
