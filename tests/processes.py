"""Tests of several processes: starts them, joins them in one group, and brings back what each of them found."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# Processes are forked from one that has imported what takes seconds, and does nothing else.
multiprocessing.set_forkserver_preload(["moekernels.distributed", "torch._dynamo"])


def run_processes(function: Callable[..., Any], count: int, *arguments: Any, timeout: float = 120) -> list[Any]:
    """The results of `function(rank, *arguments)` in each of `count` processes of one gloo group, by rank.

    Args:
        function: of a module that the processes can import; what it returns, `torch.load` must be able to read.
        count: processes, of one thread each.
        arguments: for every process.
        timeout: seconds that one operation of the group may wait for the others.

    Raises:
        torch.multiprocessing.ProcessRaisedException: one of them raised an exception; its traceback is in the message.
    """
    with tempfile.TemporaryDirectory() as folder:
        work = (count, folder, timeout, function, arguments)
        torch.multiprocessing.start_processes(_process, work, nprocs=count, start_method="forkserver")
        return [torch.load(f"{folder}/result{rank}") for rank in range(count)]


def _process(
    rank: int, count: int, folder: str, timeout: float, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    warnings.simplefilter("ignore")  # in these processes pytest does not watch
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", f"file://{folder}/store", timedelta(seconds=timeout), world_size=count, rank=rank
    )  # fmt: skip
    torch.save(function(rank, *arguments), f"{folder}/result{rank}")
    dist.barrier()
    # Gloo's threads may still hold tensors, and a thread that asks for the interpreter while it ends is aborted by
    # Python, and the process with it. There is nothing left to clean up: leave without that.
    os._exit(0)
