"""What the processes of `test_distributed.py` run: models of transformers 5 under its own `DistributedConfig`."""

from __future__ import annotations

import os
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from moekernels.integrations.transformers import plain, register, replace_moe_layers
from tests.distributed.compare import off, whole
from tests.integrations.transformers_models import make_inputs, make_model

MODELS = ("olmoe", "phimoe")
#: Sizes of a `DistributedConfig`, and what comes of a model's experts.
WAYS: dict[str, dict[str, Any]] = {
    "experts, all_reduce": {"tp_size": 2, "ep_size": 2, "ep_implementation": "all_reduce"},
    "experts, all_to_all": {"fsdp_size": 2, "ep_size": 2, "ep_implementation": "all_to_all"},
    "tensors": {"tp_size": 2},
    "FSDP": {"fsdp_size": 2},
}


def told(call: Any) -> str:
    """What a call that must fail says."""
    try:
        call()
    except ValueError as error:
        return str(error)
    return "nothing"


def run(rank: int, folder: str) -> dict[str, Any]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(dist.get_world_size())}
    from transformers.distributed import DistributedConfig

    register()
    found: dict[str, Any] = {}
    for name in MODELS:
        one: Any = make_model(name)
        if rank == 0:
            one.save_pretrained(f"{folder}/{name}")
        dist.barrier()
        for way, sizes in WAYS.items():
            options = {"distributed_config": DistributedConfig(**sizes), "experts_implementation": "moekernels"}
            many = type(one).from_pretrained(f"{folder}/{name}", **options)
            row = rank if "fsdp_size" in sizes else None
            found[f"{name}, {way}"] = _compare(name, one, many, row)
            if way == "FSDP":
                many = type(one).from_pretrained(f"{folder}/{name}", distributed_config=options["distributed_config"])
                replace_moe_layers(many)
                found[f"{name}, {way}, replaced"] = _compare(name, one, many, row)
            else:
                found[f"{name}, {way}, replaced"] = told(partial(replace_moe_layers, many))
    plan = {"layers.*.mlp.expert": "ep_dispatch_experts"}
    config = DistributedConfig(tp_size=2, ep_size=2, ep_plan=plan)
    found["misspelt"] = told(partial(type(one).from_pretrained, f"{folder}/{name}", distributed_config=config))
    found["not by the kernels"] = sorted(plain._said)
    return found


def _compare(name: str, one: Any, many: Any, row: int | None) -> dict[str, float]:
    """The differences of logits and gradients; `row` is the only one that this rank has, or it has all."""
    inputs = {"input_ids": make_inputs(name)["input_ids"]}
    expected = one(**inputs)
    one.zero_grad()
    _loss(expected.logits).backward()
    mine = inputs if row is None else {key: value[row : row + 1] for key, value in inputs.items()}
    output = many(**mine)
    _loss(output.logits).backward()
    here = expected.logits if row is None else expected.logits[row : row + 1]
    return {
        "logits": off(output.logits.detach(), here.detach()),
        "gradients": max(off(whole(parameter.grad), its.grad, least=0.1) for parameter, its in _pairs(many, one)),
    }


def _pairs(many: nn.Module, one: nn.Module) -> list[tuple[Any, Any]]:
    theirs = dict(one.named_parameters())
    return [(parameter, theirs[name]) for name, parameter in many.named_parameters()]


def _loss(logits: torch.Tensor) -> torch.Tensor:
    return (logits * logits.detach().cos()).mean()
