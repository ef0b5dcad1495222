"""A command in several processes, which `torchrun` starts: experts are divided among them, and rank 0 prints."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch

from moekernels._devices import named_device


def add_expert_parallel_argument(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--expert-parallel",
        action="store_true",
        help="divide the experts among the processes of torchrun: "
        "torchrun --nproc-per-node 2 -m moekernels COMMAND --expert-parallel ...",
    )


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """For `from_pretrained`: the mesh, if the experts are divided."""
    mesh = getattr(args, "mesh", None)
    return {} if mesh is None else {"mesh": mesh, "dispatch": "all_reduce"}


@contextmanager
def ranks(args: argparse.Namespace) -> Iterator[None]:
    """All processes run the command alike, on the same input and with the same random numbers; `args.mesh` holds the
    experts. Rank 0 reads stdin for all, and alone it prints and writes.

    Raises:
        ValueError: the processes were not started by `torchrun`.
    """
    if "RANK" not in os.environ:
        raise ValueError(
            "--expert-parallel needs processes: torchrun --nproc-per-node 2 -m moekernels ... --expert-parallel"
        )
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh

    if args.device != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    device = named_device(args.device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    args.mesh = init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("ep",))
    torch.manual_seed(_of_rank_0(torch.seed() % 2**63))
    if _reads_stdin(args):
        text = _of_rank_0(_stdin() if dist.get_rank() == 0 else None)
        sys.stdin = io.TextIOWrapper(io.BytesIO(text), encoding="utf-8", errors="surrogateescape")
    if dist.get_rank() == 0:
        yield
        return
    streams = sys.stdout, sys.stderr
    args.output = None
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        sys.stdout = sys.stderr = nowhere
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams


def leave(code: int) -> NoReturn:
    """End the process as it is: a thread of the group that is still at work aborts it if Python takes itself apart."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _of_rank_0(value: Any) -> Any:
    import torch.distributed as dist

    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def _reads_stdin(args: argparse.Namespace) -> bool:
    return any(getattr(args, name, "") in (None, "-") for name in ("file", "prompt"))


def _stdin() -> bytes:
    source: Any = getattr(sys.stdin, "buffer", sys.stdin)
    data = source.read()
    return data if isinstance(data, bytes) else data.encode("utf-8", "surrogateescape")
