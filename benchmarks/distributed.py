"""A layer with its experts on several processes, beside one process with as many threads.

    python -m torch.distributed.run --standalone --nproc-per-node 2 benchmarks/distributed.py [--json FILE]
    ... benchmarks/distributed.py --transformers       # beside its own expert parallelism, from version 5.24 on
    ... benchmarks/distributed.py --memory             # instead: what a rank of a whole model has in memory

Every process has one thread; the one process beside them has as many threads as there are processes, and is rank 0
while the others wait. All ways take turns. A row: time of a forward pass or a training step (median, slowest rank), how
many times as fast as the one process, bytes that rank 0 sent, and how many times the least that the routing needs.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import moekernels as mk
from moekernels.bench.machine import described, machine
from moekernels.bench.ranks import ALONE, RankRow, measure
from moekernels.bench.shapes import REAL_LAYERS, LayerShape


def transformers_layers(shape: LayerShape, dtype: torch.dtype, mesh: Any) -> dict[str, nn.Module]:
    """A block of transformers' OLMoE of this shape, divided by transformers in both of its ways."""
    import transformers
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.models.olmoe.modeling_olmoe import OlmoeSparseMoeBlock

    config = transformers.OlmoeConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
    )
    config._experts_implementation = "grouped_mm"  # what from_pretrained chooses
    config._experts_implementation_internal = "grouped_mm"
    alone = init_device_mesh("cpu", (mesh.size(), 1), mesh_dim_names=("other", "tp"))["tp"]
    found: dict[str, nn.Module] = {}
    for way, shares_batch in (("all_to_all", False), ("all_reduce", True)):
        torch.manual_seed(0)
        block = OlmoeSparseMoeBlock(config).to(dtype)
        for parameter in block.parameters():
            nn.init.normal_(parameter.data, std=0.02)
        plan = {"experts.gate_up_proj": "grouped_gemm", "experts.down_proj": "grouped_gemm"}
        plan["experts"] = "ep_dispatch_experts"
        apply_expert_parallelism(block, mesh, mesh if shares_batch else alone, plan, way)
        found[f"transformers, {way}"] = block
    return found


def resident(what: str) -> int:
    """Bytes of this process's memory, by a name in /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{what}:"))


def memory(shape: LayerShape, dtype: torch.dtype, mesh: Any) -> None:
    """What loading one layer of a model with embeddings and head takes, beside the dense part and this rank's share."""
    config = mk.OlmoeConfig(
        hidden_size=shape.hidden_size,
        intermediate_size=shape.ffn_size,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        num_hidden_layers=1,
    )
    folder = [tempfile.mkdtemp() if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(folder)
    if dist.get_rank() == 0:
        child = torch.multiprocessing.get_context("spawn").Process(target=write, args=(config, dtype, folder[0]))
        child.start()
        child.join()
    dist.barrier()
    before = resident("RssAnon")
    model: Any = mk.OlmoeForCausalLM.from_pretrained(folder[0], mesh=mesh, dtype=dtype, progress=False)
    taken = resident("RssAnon") - before
    experts = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name) * dtype.itemsize
    dense = sum(p.numel() for name, p in model.named_parameters() if ".experts." not in name) * dtype.itemsize
    expected = dense + experts / mesh.size()
    dist.barrier()
    if dist.get_rank() == 0:
        print(
            f"memory of rank 0 after loading: {taken / 2**20:.0f} MiB; dense part {dense / 2**20:.0f} and share "
            f"{experts / mesh.size() / 2**20:.0f} MiB: {100 * (taken / expected - 1):+.1f} %"
        )
        for path in Path(folder[0]).iterdir():
            path.unlink()
        Path(folder[0]).rmdir()


def write(config: mk.OlmoeConfig, dtype: torch.dtype, folder: str) -> None:
    model: Any = mk.OlmoeForCausalLM(config).to(dtype)
    model.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=[shape.name for shape in REAL_LAYERS], default="olmoe-1b-7b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--budget", type=float, default=3.0, help="seconds for each way")
    parser.add_argument("--transformers", action="store_true")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh = init_device_mesh("cpu", (size,), mesh_dim_names=("ep",))["ep"]
    shape = next(shape for shape in REAL_LAYERS if shape.name == args.model)
    dtype = getattr(torch, args.dtype)
    about = machine(torch.device("cpu"))
    if rank == 0:
        print(f"{shape.name}, {args.dtype}, {size} processes of one thread\n{described(about)}\n", flush=True)
    if args.memory:
        memory(shape, dtype, mesh)
    else:
        others = transformers_layers(shape, dtype, mesh) if args.transformers else None
        speed(args, shape, dtype, mesh, others, about)
    dist.barrier()
    dist.destroy_process_group()


def speed(
    args: Any, shape: LayerShape, dtype: torch.dtype, mesh: Any, others: dict[str, nn.Module] | None, about: Any
) -> None:
    found = []
    for tokens in args.tokens:
        for training in (False, True):
            options = {"training": training, "budget": args.budget, "threads": mesh.size(), "others": others}
            rows = measure(shape, tokens, dtype, mesh, **options)
            reference = next(row.seconds for row in rows if row.way == ALONE)
            for row in rows:
                found.append(dataclasses.asdict(row))
                if dist.get_rank() == 0:
                    print(line(row, reference), flush=True)
    if dist.get_rank() == 0 and args.json is not None:
        args.json.write_text(json.dumps({"machine": about, "rows": found}, indent=2, default=str) + "\n")


def line(row: RankRow, reference: float) -> str:
    what = "training step" if row.training else "forward pass "
    speed = f"{1e3 * row.seconds:9.2f} ms, {reference / row.seconds:5.2f} x one process"
    sent = "" if row.sent_bytes is None else f"; {row.sent_bytes / 2**20:7.2f} MiB sent"
    least = f", {row.sent_bytes / row.least_bytes:.3f} x the least" if row.sent_bytes and row.least_bytes else ""
    return f"{row.tokens:5} tokens, {what}  {row.way:26}{speed}{sent}{least}"


if __name__ == "__main__":
    main()
