"""Columns: models of the installed transformers, as they are and with `replace_moe_layers` or `register`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from moekernels.integrations.transformers import register, replace_moe_layers
from tests.company.matrix import Column
from tests.integrations.transformers_models import MAJOR, make_inputs, make_model

# Dropout inside the experts draws in another order than the original's.
_NO_DROPOUT: dict[str, dict[str, float]] = {
    "switch": {"dropout_rate": 0.0},
    "nllb": {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0, "moe_token_dropout": 0.0},
}


def _use_registered(model: nn.Module, **_: Any) -> None:
    register()
    model.set_experts_implementation("moekernels")


def _column(name: str, attach: Callable[..., object] = replace_moe_layers, how: str = "replaced") -> Column:
    def inputs() -> dict[str, Any]:
        given = make_inputs(name, batch=1, length=6)
        del given["output_router_logits"]
        return given

    def make(ours: bool) -> nn.Module:
        model = make_model(name, **_NO_DROPOUT.get(name, {}))
        if how == "registered" and not ours:
            # The loop of the module's class, which is also what ours calls where something hooks its activation.
            model.set_experts_implementation("eager")
        return model

    held = "stacks" if MAJOR >= 5 and name not in ("switch", "nllb") else "linears"
    # Switch's router gives its classifier another dtype in every pass, which torch.export refuses.
    tags = {"drop-in", "block", held} if name == "switch" else {"drop-in", "block", held, "exports"}
    return Column(f"{name}, {how}", make, inputs, attach, tags=frozenset(tags))


# NLLB-MoE of transformers 5 runs only two experts: there is nothing to compare with.
COLUMNS = [_column(name) for name in ("olmoe", "mixtral", "switch", "nllb") if not (MAJOR >= 5 and name == "nllb")]
if MAJOR >= 5:
    COLUMNS += [_column(name, _use_registered, "registered") for name in ("olmoe", "mixtral")]
