"""What the processes of `test_models.py` run: our models, with their experts divided, beside whole ones."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import moekernels as mk
from moekernels.distributed import expert_parallel, is_expert_parallel, reduce_gradients
from tests.company.own_models import MODELS, make
from tests.distributed.compare import gradients_off, off, part, split, whole

SPARSE = tuple(name for name in MODELS if name != "M2M100")
ROWS, SOURCE, TARGET = 6, 7, 5
DISPATCHES = ("all_to_all", "all_reduce")


def model(name: str) -> Any:
    """With capacities that drop tokens, auxiliary losses, and no chance but PhiMoE's and the routers' own."""
    made: Any = make(name)
    made.config.output_router_logits = True
    made.config.router_aux_loss_coef = 0.3
    for module in made.modules():
        if isinstance(module, mk.NllbMoeTop2Router):
            module.expert_capacity, module.batch_prioritized_routing = 9, True
        if isinstance(module, mk.SwitchTransformersTop1Router):
            module.expert_capacity = 2
    return made.train(name != "PhiMoE")  # which draws experts in training


def inputs(name: str) -> dict[str, Tensor]:
    """Rows of which some are padded, on the right."""
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(3, 61, (ROWS, SOURCE), generator=generator)
    mask = torch.arange(SOURCE) < torch.tensor([7, 4, 6, 7, 2, 5])[:, None]
    given = {"input_ids": ids.where(mask, 0), "attention_mask": mask.long()}
    if name in ("OLMoE", "PhiMoE"):
        return {**given, "labels": ids.where(mask, -100)}
    return {**given, "labels": torch.randint(3, 61, (ROWS, TARGET), generator=generator)}


def run(rank: int, folder: str) -> dict[str, Any]:
    size = dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))["ep"]
    alone = init_device_mesh("cpu", (size, 1), mesh_dim_names=("other", "ep"))["ep"]
    found: dict[str, Any] = {}
    for name in SPARSE:
        for dispatch in DISPATCHES:
            found[f"{name}, {dispatch}"] = _training_step(name, dispatch, mesh, rank)
            if size == 2:
                found[f"{name}, {dispatch}, one rank"] = _training_step(name, dispatch, alone, 0)
        found[f"{name}, files"] = _files(name, mesh, Path(folder), rank)
        found[f"{name}, generate"] = _generate(name, mesh, rank)
    for name in ("NLLB-MoE", "Switch") if size == 2 else ():
        found[f"{name}, curve"] = _curve(name, mesh, rank)
    return found


def _training_step(name: str, dispatch: Any, mesh: Any, rank: int) -> dict[str, float]:
    one, many = model(name), model(name)
    expert_parallel(many, mesh, dispatch=dispatch)
    given = inputs(name)
    items = int((given["labels"] != -100).sum())
    counts = split(ROWS, mesh.size())
    mine = given if dispatch == "all_reduce" else {key: part(value, counts, rank) for key, value in given.items()}

    torch.manual_seed(11)
    expected = one(**given, num_items_in_batch=items)
    expected.loss.backward()
    torch.manual_seed(11)
    output = many(**mine, num_items_in_batch=items)
    output.loss.backward()
    reduce_gradients(many, average=False)

    losses = [torch.zeros(()) for _ in range(mesh.size())]
    dist.all_gather(losses, output.loss.detach(), group=mesh.get_group())
    loss = torch.stack(losses).sum() if dispatch == "all_to_all" else losses[0]

    def here(rows: Tensor) -> Tensor:
        return rows.detach() if dispatch == "all_reduce" else part(rows.detach(), counts, rank)

    auxiliary = [key for key in expected if key.endswith(("aux_loss", "z_loss"))]
    logits = [key for key in expected if key.endswith("router_logits")]
    pairs = [(own, its) for key in logits for own, its in zip(output[key], expected[key], strict=True)]
    by_row = [(own, its.reshape(ROWS, -1, its.shape[-1])) for own, its in pairs]
    return {
        "loss": off(loss, expected.loss.detach()),
        "logits": off(output.logits.detach(), here(expected.logits)),
        "auxiliary losses": max(off(output[key], expected[key]) for key in auxiliary),
        "router logits": max(off(own.detach().reshape(here(its).shape), here(its)) for own, its in by_row),
        "gradients": gradients_off(many, one),
    }


def _files(name: str, mesh: Any, folder: Path, rank: int) -> dict[str, Any]:
    """Written by one process, read by many, each its own experts; written by many again."""
    written, again = folder / name, folder / f"{name}, again"
    one = model(name).eval()
    if rank == 0:
        one.save_pretrained(written, max_shard_size=40_000)
    dist.barrier()
    many = type(one).from_pretrained(written, mesh=mesh, progress=False)
    held = sum(p.to_local().numel() for key, p in many.named_parameters() if ".experts." in key)
    total = sum(p.numel() for key, p in one.named_parameters() if ".experts." in key)
    differences = [
        off(whole(mine), its)
        for (_, mine), (_, its) in zip(many.named_parameters(), one.named_parameters(), strict=True)
    ]
    many.save_pretrained(again, max_shard_size=40_000)
    files = sorted(path.name for path in written.iterdir())
    same = all((written / file).read_bytes() == (again / file).read_bytes() for file in files)
    return {
        "weights": max(differences),
        "share": held / total,
        "same files": same and files == sorted(path.name for path in again.iterdir()) and len(files) > 4,
        "is divided": is_expert_parallel(many),
    }


def _generate(name: str, mesh: Any, rank: int) -> dict[str, bool]:
    """The same tokens as one process: alike on all ranks, or every rank its own rows, some with fewer steps."""
    one = model(name).eval()
    one.config.output_router_logits = False
    given = {key: value[:4] for key, value in inputs(name).items() if key != "labels"}
    if name in ("OLMoE", "PhiMoE"):
        given = {"input_ids": given["input_ids"][:, :2]}
    options: dict[str, Any] = {"do_sample": False, "num_beams": 1, "eos_token_id": None}
    expected = one.generate(**given, max_new_tokens=4, **options)
    alike = expert_parallel(copy.deepcopy(one), mesh, dispatch="all_reduce").generate(  # type: ignore[operator]
        **given, max_new_tokens=4, **options
    )
    split_model: Any = expert_parallel(copy.deepcopy(one), mesh)
    mine = {key: value[rank : rank + 1] for key, value in given.items()}
    steps = 2 + rank % 2
    own = split_model.generate(**mine, max_new_tokens=steps, **options)
    length = own.shape[1]
    return {"alike": torch.equal(alike, expected), "split": torch.equal(own, expected[rank : rank + 1, :length])}


def _curve(name: str, mesh: Any, rank: int) -> float:
    """The largest difference of a loss over 50 steps of training; rank 0 takes them alone as well."""
    one, many = model(name), model(name)
    expert_parallel(many, mesh)
    given = inputs(name)
    counts = split(ROWS, mesh.size())
    mine = {key: part(value, counts, rank) for key, value in given.items()}
    items = int((given["labels"] != -100).sum())
    pairs = [(many, mine), (one, given)] if rank == 0 else [(many, mine)]
    optimizers = [torch.optim.SGD(made.parameters(), lr=0.003) for made, _ in pairs]
    worst = 0.0
    for _ in range(50):
        losses = []
        for (made, batch), optimizer in zip(pairs, optimizers, strict=True):
            optimizer.zero_grad()
            loss = made(**batch, num_items_in_batch=items).loss
            loss.backward()
            reduce_gradients(made, average=False)
            optimizer.step()
            losses.append(loss.detach())
        dist.all_reduce(losses[0], group=mesh.get_group())
        worst = max(worst, off(losses[0], losses[-1]))
    return worst
