"""What the processes of `test_training.py` run: FSDP2 beside expert parallelism, optimizers, norms and checkpoints."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from moekernels.distributed import clip_grad_norm_, expert_parallel, parameter_groups, reduce_gradients
from tests.company.own_models import make
from tests.distributed.compare import off, whole

ROWS, LENGTH, MAX_NORM = 8, 6, 0.5
RECIPES = ("experts alone", "FSDP2 over the other dimension", "FSDP2 of the dense part over all ranks")


def model() -> Any:
    made: Any = make("OLMoE")  # of 6 experts
    return made.train()


def batch() -> torch.Tensor:
    return torch.randint(3, 61, (ROWS, LENGTH), generator=torch.Generator().manual_seed(2))


def divided(recipe: str, meshes: Any) -> Any:
    made = model()
    if recipe == RECIPES[0]:
        return expert_parallel(made, meshes["flat"])
    expert_parallel(made, meshes["ep"])
    dense = meshes["fsdp"] if recipe == RECIPES[1] else meshes["flat"]
    for layer in made.model.layers:
        fully_shard(layer.mlp.experts, mesh=meshes["fsdp"])
        fully_shard(layer, mesh=dense)
    return fully_shard(made, mesh=dense)


def step(made: nn.Module, optimizer: torch.optim.Optimizer, ids: torch.Tensor, clip: Any) -> tuple[float, float]:
    optimizer.zero_grad()
    loss = made(input_ids=ids, labels=ids).loss
    loss.backward()
    reduce_gradients(made)
    norm = clip(made.parameters(), MAX_NORM)
    optimizer.step()
    return loss.detach(), float(norm)


def run(rank: int, folder: str) -> dict[str, Any]:
    size = dist.get_world_size()
    both = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("fsdp", "ep"))
    meshes = {"fsdp": both["fsdp"], "ep": both["ep"], "flat": init_device_mesh("cpu", (size,), mesh_dim_names=("all",))}
    ids = batch()
    mine = ids.chunk(size)[rank]
    found: dict[str, Any] = {}
    for recipe in RECIPES:
        for foreach in (False, True) if recipe == RECIPES[0] else (True,):
            one, many = model(), divided(recipe, meshes)
            grouped = parameter_groups(many) if foreach else many.parameters()
            options: dict[str, Any] = {"lr": 0.01, "eps": 1e-3, "foreach": foreach}
            optimizers = [torch.optim.AdamW(params, **options) for params in (one.parameters(), grouped)]
            steps = []
            for _ in range(2):
                loss, norm = step(one, optimizers[0], ids, nn.utils.clip_grad_norm_)
                own, own_norm = step(many, optimizers[1], mine, clip_grad_norm_)
                dist.all_reduce(own)
                steps += [off(own / size, loss), abs(own_norm / norm - 1)]
            pairs = zip(many.named_parameters(), one.named_parameters(), strict=True)
            found[f"{recipe}, {'foreach' if foreach else 'one by one'}"] = {
                "losses and norms": max(steps),
                "weights": max(off(whole(mine), its.detach()) for (_, mine), (_, its) in pairs),
            }
        found[f"{recipe}, checkpoint"] = _checkpoint(many, optimizers[1], one, f"{folder}/{recipe}", meshes, mine)
    return found


def _checkpoint(many: Any, optimizer: Any, one: Any, folder: str, meshes: Any, ids: torch.Tensor) -> dict[str, Any]:
    """A distributed checkpoint of one division is loaded into another, which goes on as the first would."""
    weights, states = get_state_dict(many, optimizer)
    dcp.save({"weights": weights, "optimizer": states}, checkpoint_id=folder)
    other = divided(RECIPES[0], meshes)
    fresh = torch.optim.AdamW(parameter_groups(other), lr=0.01, eps=1e-3, foreach=True)
    weights, states = get_state_dict(other, fresh)
    dcp.load(read := {"weights": weights, "optimizer": states}, checkpoint_id=folder)
    set_state_dict(other, fresh, model_state_dict=read["weights"], optim_state_dict=read["optimizer"])
    step(many, optimizer, ids, clip_grad_norm_)
    step(other, fresh, ids, clip_grad_norm_)
    pairs = zip(many.parameters(), other.parameters(), strict=True)
    full = get_model_state_dict(many, options=StateDictOptions(full_state_dict=True))
    return {
        "difference": max(off(whole(mine), whole(theirs)) for mine, theirs in pairs),
        "whole state": not full
        or {key: value.shape for key, value in full.items()}
        == {key: value.shape for key, value in one.state_dict().items()},
    }
